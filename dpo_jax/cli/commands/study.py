"""`dpo-jax study`: makes a page for blind human ratings of two sets of completions (appendix D.3).

Writes to `<run.dir>/study`: `study.html`, to give to the raters; `key.json`, to keep from them; `ratings/`, for the files they
save, which `dpo-jax agree` reads; and `data_report.json`, in which kept + dropped = read.
"""

from __future__ import annotations

from pathlib import Path

import jax

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.data.completion_files import read_completions
from dpo_jax.data.pairs import DataReport
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import write_json
from dpo_jax.study.page import WORDINGS, Comparison, draw, join, make_study, one_each, render
from dpo_jax.study.ratings import sealed
from dpo_jax.untrusted import read_object
from dpo_jax.writing import write_text


def run(config: Config) -> int:
    section = config.study
    jax.config.update("jax_platforms", "cpu")  # a training run may hold the accelerator
    with build.open_run(config, "study") as run_dir:
        with reported("reading the completions"):
            comparisons, report = _comparisons(config)
        wording = WORDINGS[section.task]
        study = make_study(
            comparisons,
            names=(section.name_a, section.name_b),
            title=section.title,
            wording=wording._replace(question=section.question) if section.question else wording,
            raters=section.raters,
            twice=section.share_twice(),
            seed=config.run.seed,
        )
        page, key = run_dir.path / "study.html", run_dir.path / "key.json"
        _refuse_other(key, study.key["study"])
        (run_dir.path / "ratings").mkdir(exist_ok=True)
        write_json(key, sealed(study.key | {"files": report.files}))
        write_text(page, render(study.page))
        build.describe(run_dir, config, report)
        print(report.summary())
        lists = [len(assigned) for assigned in study.key["raters"]]
        sizes = f"{lists[0]} comparisons" if len(set(lists)) == 1 else f"{min(lists)} or {max(lists)} comparisons"
        many = f"{len(lists)} lists of {sizes}; give each person a number from 1 to {len(lists)}" if len(lists) > 1 else sizes
        print(f"\nstudy {study.key['study']}: {many}")
        print(f"give raters     {page}")
        print(f"hide from them  {key}")
        print(f"put what they save into {run_dir.path / 'ratings'}, then: dpo-jax agree")
    return 0


def _comparisons(config: Config) -> tuple[list[Comparison], DataReport]:
    section = config.study
    report = DataReport(source=f"{section.a} and {section.b}", split="study", format="completions")
    a, b = (one_each(read_completions(str(path), report=report)) for path in (section.a, section.b))
    comparisons = join(a, b, report=report)
    if section.items is not None:
        if section.items > len(comparisons):
            raise ConfigError(f"study.items: {section.items} comparisons are wanted, but there are {len(comparisons)}")
        comparisons = draw(comparisons, section.items, seed=config.run.seed, report=report)
    if section.raters > len(comparisons):
        raise ConfigError(f"study.raters: {section.raters} lists cannot be made of {len(comparisons)} comparisons")
    return comparisons, report


def _refuse_other(key: Path, study: str) -> None:
    """Raises `ConfigError` if `key` belongs to another study: without its key, that study's saved ratings could not be read.

    Raises `Unreadable` if the key's study cannot be determined.
    """
    if not key.exists():
        return
    found = read_object(key, remedy="restore it, or move that folder away: a study may depend on it").get("study")
    if found != study:
        raise ConfigError(
            f"run.dir: {key} is the key of study {found!s:.40}, and this would be {study} (other texts, options or seed): "
            "choose another run.dir, or move that folder away"
        )
