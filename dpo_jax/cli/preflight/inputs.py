"""`--check` of a command's inputs: data and single files."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_jax import loss_table
from dpo_jax.cli import model_folders
from dpo_jax.cli.config import GENERATED, Config, ConfigError, MixConfig
from dpo_jax.cli.preflight.scope import Scope
from dpo_jax.models.config import DecoderConfig
from dpo_jax.runtime.progress import reported
from dpo_jax.untrusted import Unreadable

if TYPE_CHECKING:
    from dpo_jax.data.pairs import DataError
    from dpo_jax.data.row_kinds import Wanted

LINES_BYTES = 64 * 2**20  # larger files are not read just to count their rows


class Check:
    """One command's check: its findings, and what is wrong."""

    def __init__(self, name: str, config: Config, scope: Scope):
        self.name, self.config, self.scope = name, config, scope
        self.told: list[tuple[str, str]] = []
        self.problems: list[Exception] = []
        self.warnings: list[str] = []
        self.rows: int | None = None  # of the train split
        self.train_files: dict[str, int] | None = None  # "file NAME, bytes", as `data_report.json` names them
        self.images: str | None = None  # the first place with an image in the data that were read
        self.chat: DataError | None = None  # what to say if the tokenizer has no chat template
        self.tools: str | None = None  # the first place with a conversation that has tools
        self.decoders: dict[str, DecoderConfig] = {}  # of the models that are known, by origin

    @contextmanager
    def collecting(self) -> Iterator[None]:
        from dpo_jax.runtime.chips import TopologyError
        from dpo_jax.runtime.rundir import RunLocked

        try:
            yield
        except (ConfigError, Unreadable, TopologyError, RunLocked) as problem:
            self.problems.append(problem)
        except OSError as problem:
            self.problems.append(OSError(f"{problem.filename}: {problem.strerror}" if problem.strerror else str(problem)))

    def tell(self, what: str, words: str) -> None:
        self.told.append((what, words))

    def warn(self, words: str) -> None:
        self.warnings.append(words)

    def unseen(self, what: str, path: str, made_by: str | None = None) -> bool:
        """Whether a path need not exist now; if so, the reason is reported."""
        if self.scope.hides(path):
            self.tell(what, f"{path}: on the hosts, not visible from here")
            return True
        if made_by in self.scope.after:  # even if something is there, such as an interrupted run
            self.tell(what, f"{path}: will be made by: dpo-jax {made_by}")
            return True
        return False


# Data


TEXT_SOURCES = ("snippets", "imdb")
OF_PROMPTS = ("online", "ppo", "label", "optimum", "frontier", "sample")  # commands that sample completions of their own
READ_IMAGES = ("audit", "sft", "refs", "dpo", "eval", "sample")
"""Commands that read prompts with images."""
NO_IMAGES = (
    f"the prompt shows an image, but this command reads only texts ({', '.join(READ_IMAGES)} read images): leave out the "
    "rows with images, or their content parts of type image and the column images"
)

TFDS_OF_PAIRS = "a TFDS folder holds pairs; train on these files directly"
"""Remedy for single completions that `prepare` is to write."""


def refuse_texts(config: Config) -> None:
    """Raises `ConfigError` for data that are not preferences."""
    if config.data.source == "cnn_dailymail":
        raise ConfigError("data.source: cnn_dailymail holds articles and summaries, not preferences; sample and judge use them")
    if config.data.source in TEXT_SOURCES:
        raise ConfigError(
            f"data.source: {config.data.source} holds texts, not preferences; sft, ppo, optimum and frontier can use them, and "
            "label makes preferences from them"
        )


def data(*splits: str, preferences: bool = False) -> Callable[[Check], None]:
    """Checks the splits of the data; with `preferences` they must be pairs."""

    def look(check: Check) -> None:
        data = check.config.data
        if preferences:
            refuse_texts(check.config)
        if check.name == "prepare":
            _need_tfds(check, "prepare")
        if data.source in GENERATED:
            from dpo_jax.data.row_kinds import check_kind

            wanted = rows_wanted(check)
            check_kind("pairs", wanted, where=f"data.source {data.source}")
            each, what = (2, "single completions") if wanted == "unpaired" else (1, "pairs")
            counts = {"train": each * data.reviews_train, "test": each * data.reviews_test}
            told = [f"{split} {most(counts[split], getattr(data, f'max_{split}')):,} {what}" for split in splits]
            check.rows = most(counts["train"], data.max_train) if each == 1 else None
            check.tell("data", f"generated {data.source.replace('_', ' ')}: {', '.join(told)}")
            return
        with naming_trained_loss(check.config) if check.name == "eval" else nullcontext():
            for part in data.parts():
                _source(check, part, splits)

    return look


def _source(check: Check, part: MixConfig, splits: tuple[str, ...]) -> None:
    """Reports on one source of the data. Raises `DataError`, and `ConfigError` naming an option."""
    from dpo_jax.cli.data_sources import check_held_out, folder_of, names_of, sources_to_cut
    from dpo_jax.data.hub_files import is_dataset_id

    data, name = check.config.data, part.path if part.weight == 1 else f"{part.path} (weight {part.weight:g})"
    made_by = {"label": "label", "tfds": "prepare"}.get(Path(part.path).name)
    if check.unseen("data", part.path, made_by):
        return
    if data.source == "files" and is_dataset_id(part.path):
        note_misspelled(check, part.path, "data.mix" if data.mix else "data.path")
        check.tell("data", f"{name}: from the Hub or its local cache; not checked")
        return
    with reported("looking at the data"):
        cut = False
        if data.test_share is not None and not any(is_dataset_id(one.path) for one in data.parts()):
            cut = names_of(check.config)[data.parts().index(part)] in sources_to_cut(check.config)
        if data.source == "files" and "train" in splits and not cut:
            check_held_out(check.config, part)
        path = str(folder_of(part))
        told = [_split(check, part, path, split) for split in (("train",) if cut else splits)]
    if cut:
        told.append(f"of which {data.test_share:.1%} of the prompts are held out")
    if cut or data.mix:
        check.rows = None
    check.tell("data", f"{name}: {', '.join(told)}")


def _split(check: Check, part: MixConfig, path: str, split: str) -> str:
    """A description of one split of a source. Raises `DataError`."""
    from dpo_jax.data.format_table import FORMATS
    from dpo_jax.data.row_kinds import check_kind
    from dpo_jax.data.snippets import load_snippets
    from dpo_jax.data.sources import peek
    from dpo_jax.data.tfds_folder import tfds_folders

    stated, wanted = "pairs", rows_wanted(check)
    data, name = check.config.data, getattr(part, f"{split}_split")
    if data.source == "snippets":
        return f"{split} of {len(load_snippets(path)):,} snippets"
    if data.source != "files" or part.format == "tfds" or (part.format == "auto" and tfds_folders(Path(path))):
        _need_tfds(check, f"data.source: {data.source}")
        kind, rows = "TFDS", _tfds_rows(path, name)
        check_kind(stated, wanted, where=f"{path} [{name}]")
    else:
        on_bad = "drop" if check.name == "audit" else data.on_bad  # audit counts bad rows
        found = peek(path, name, format=part.format or "auto", columns=part.columns, on_bad=on_bad)
        format, files, shown = found[:3]
        if shown is not None and check.name not in READ_IMAGES:
            raise ConfigError(f"{shown}: {NO_IMAGES}")
        check.images, check.chat = check.images or shown, check.chat or found.chat
        check.tools = check.tools or (found.tools if found.chat else None)
        stated = FORMATS[format].rows if format in FORMATS else "pairs"
        remedy = TFDS_OF_PAIRS if check.name == "prepare" else None
        check_kind(stated, wanted, where=f"{path} [{name}] (format {format})", remedy=remedy, hint=found.hint)
        if found.unusable is not None:
            raise found.unusable
        if found.doubt is not None:
            check.warn(found.doubt)
        images = ", with images" if shown is not None else ""
        kind, rows = f"{format}{images}, {files} {'file' if files == 1 else 'files'}", _rows(path, name)
        if split == "train" and not data.mix:
            check.train_files = {f"file {file}, bytes": where.stat().st_size for file, where in _files(path, name)}
    limit = getattr(data, f"max_{split}")
    # A row may hold several examples.
    several = kind.startswith("stack_exchange") or (stated, wanted) == ("pairs", "unpaired")
    several = several or (stated == "rankings" and wanted != "rankings")
    if split == "train" and rows is not None and not several:
        check.rows = most(rows, limit)
    number = f", {rows:,} rows" if rows is not None else ""
    return f"{name} ({kind}{number}{f', the first {limit:,} used' if limit is not None else ''})"


@contextmanager
def naming_trained_loss(config: Config) -> Iterator[None]:
    """A context that adds to an error of `eval` on rows of another kind the loss with which the run was trained."""
    from dpo_jax.data.pairs import Cause, DataError

    try:
        yield
    except DataError as error:
        trained = None if config.eval.policy is not None else model_folders.trained_section(config)
        rows_differ = trained is not None and loss_table.rows_of(trained.loss) != loss_table.rows_of(config.dpo.loss)
        if trained is None or not rows_differ or Cause.MISSING_COLUMN not in error.causes:
            raise
        told = f"{error}; this run was trained with --dpo.loss {shlex.quote(trained.loss)}: set it for eval, too"
        raise DataError(told, causes=error.causes) from error


def rows_wanted(check: Check) -> Wanted:
    """The kind of rows that a command reads, see `row_kinds.Wanted`."""
    if check.name in ("refs", "dpo", "eval"):
        return loss_table.rows_of(check.config.dpo.loss)
    if check.name in ("prepare", "reward-model", "bench"):
        return "pairs"
    return "prompts" if check.name in OF_PROMPTS else "any"


def _need_tfds(check: Check, option: str) -> None:
    packages = {"tensorflow_datasets": "tensorflow-datasets", "array_record": "array_record"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing and check.scope.elsewhere is None:
        raise ConfigError(f"{option}: needs the package {missing[0]}, which is not installed: pip install {missing[0]}")


def most(rows: int, limit: int | None) -> int:
    return rows if limit is None else min(rows, limit)


def note_misspelled(check: Check, path: str, option: str) -> None:
    first = path.partition("/")[0]
    if Path(first).is_dir():
        check.warn(
            f"{option}: there is no folder {path}, though there is {first}/: is it misspelled? It would be read as a Hub id"
        )


def _tfds_rows(path: str, split: str) -> int:
    """Number of rows in a split of a TFDS folder, from its `dataset_info.json`."""
    from dpo_jax.data.pairs import Cause, refuse
    from dpo_jax.data.tfds_folder import find_tfds, split_rows

    folder = find_tfds(Path(path))
    rows = split_rows(folder)
    if split not in rows:
        refuse(Cause.BAD_LAYOUT, folder, f"no split {split!r}; there are {', '.join(rows) or 'none'}")
    return rows[split]


def _files(path: str, split: str) -> list[tuple[str, Path]]:
    from dpo_jax.data.pairs import DataReport
    from dpo_jax.data.splits import find_files

    return find_files(path, split, report=DataReport(source=path, split=split, format="auto"))


def _rows(path: str, split: str) -> int | None:
    """Number of rows in a split of plain files; None if counting would take long, or lines are not rows (CSV, JSON arrays)."""
    from dpo_jax.data.files import is_array

    files = [file for _, file in _files(path, split)]
    if all(file.suffix == ".parquet" for file in files):
        from dpo_jax.data.parquet import declared_rows

        return sum(declared_rows(file) for file in files)
    if (
        any(file.suffix in (".gz", ".parquet", ".csv", ".tsv") for file in files)
        or sum(f.stat().st_size for f in files) > LINES_BYTES
        or any(is_array(file.name, file) for file in files)
    ):
        return None
    rows = 0
    for file in files:
        with file.open("rb") as lines:
            rows += sum(1 for line in lines if line.strip())
    return rows


def files(*options: tuple[str, Callable[[Config], str | None]]) -> Callable[[Check], None]:
    """Single files that options name."""

    def look(check: Check) -> None:
        for option, value in options:
            path = value(check.config)
            if path is None or check.unseen("file", path):
                continue
            if not Path(path).is_file():
                raise ConfigError(f"{option}: {path}: no such file")
            with open(path, "rb"):
                check.tell("file", path)

    return look


def judged_files(check: Check) -> None:
    """The files that `judge` reads."""
    section = check.config.judge
    named = [("judge.a", path) for _, path in section.series()] + [("judge.b", section.baseline_file())]
    files(*((option, lambda _, path=path: path) for option, path in named))(check)
    if section.baseline_file() is None:
        data("test")(check)


def prompts(check: Check) -> None:
    """The prompts that `sample` completes, and where it writes."""
    model_folders.refuse_other_lines(check.config.sample.out)
    if check.config.sample.prompts_file is None:
        data("test")(check)
    else:
        files(("sample.prompts_file", lambda c: c.sample.prompts_file))(check)
