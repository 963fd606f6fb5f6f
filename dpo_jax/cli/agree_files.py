"""The files that `dpo-jax agree` reads: people's ratings, the key of the study, judges' verdicts. Needs no JAX."""

from __future__ import annotations

from pathlib import Path

from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.config.judge import named_file


def rating_files(config: Config) -> tuple[list[Path], list[Path]]:
    """The files saved by the page, and the records. A folder stands for all such files in it."""
    folder = Path(config.run.dir, "study", "ratings")
    given = [Path(part.strip()) for part in config.agree.ratings.split(",")] if config.agree.ratings else [folder]
    found = [sorted(path.glob("[!.]*")) if path.is_dir() or path == folder else [path] for path in given]
    files = [file for some in found for file in some]
    kinds = [[file for file in files if file.name.endswith(ends)] for ends in ((".json",), (".jsonl", ".jsonl.gz"))]
    other = [str(file) for file in files if file not in kinds[0] and file not in kinds[1]]
    if other:
        raise ConfigError(f"agree.ratings: {', '.join(other)}: neither .json, as the page saves it, nor .jsonl")
    if odd := [str(file) for file in files if file.exists() and not file.is_file()]:
        raise ConfigError(f"agree.ratings: {', '.join(odd)}: not a file")
    if not files:
        raise ConfigError(f"agree.ratings: {given[0]} is empty; put the raters' files there, or name them with --agree.ratings")
    return kinds[0], kinds[1]


def key_file(config: Config, *, needed: bool) -> Path | None:
    """The key of the study; None if there is none and none is `needed`."""
    path = Path(config.agree.key or Path(config.run.dir, "study", "key.json"))
    if path.exists():
        return path
    if needed or config.agree.key:
        raise ConfigError(f"agree.key: {path} does not exist; it is the file that dpo-jax study wrote next to the page")
    return None


def judge_files(config: Config) -> dict[str, Path]:
    """{judge name: its verdicts}: the named ones, else those of the run, if any."""
    found = Path(config.run.dir, "judge", "pairs.jsonl")
    if config.agree.judge is None:
        return {"judge": found} if found.exists() else {}
    judges: dict[str, Path] = {}
    for part in config.agree.judge.split(","):
        name, path = named_file(part.strip())
        name = name or Path(path).stem
        if name in judges:
            raise ConfigError(f"agree.judge: two judges are called {name!r}; write NAME={path}")
        judges[name] = Path(path)
    return judges
