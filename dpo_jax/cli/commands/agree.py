"""`dpo-jax agree`: Table 2 of the paper, from raters' files and judges' verdicts.

Writes `<run.dir>/agree/agreement.json`: the figures of the printed column with their intervals and counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dpo_jax.cli import build
from dpo_jax.cli.agree_files import judge_files, key_file, rating_files
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import write_json
from dpo_jax.study.agreement import Estimate, table_2
from dpo_jax.study.agreement_table import INTERVALS, table_rows
from dpo_jax.study.ratings import Judgment, Key, RaterFile, Verdicts, read_key, read_raters, read_records, read_verdicts
from dpo_jax.untrusted import Unreadable, read_object, reading

RESULT = "agree/agreement.json"
WIDTH = 26  # of a column


def run(config: Config) -> int:
    section = config.agree
    jax.config.update("jax_platforms", "cpu")  # a training run may hold the accelerator
    saved, records = rating_files(config)
    file = key_file(config, needed=bool(saved))
    with reported("reading the ratings"):
        key = read_key(file) if file else None
        raters = read_raters(saved, key=key) if key else []
        judgments = [judgment for file in raters for judgment in file.judgments]
        judgments += [judgment for path in records for judgment in read_records(path, key=key)]
    if not judgments:
        raise ConfigError("agree.ratings: the files hold no rating yet")
    with reported("reading the verdicts"):
        judges, left_out = _verdicts(config, key)
    table = table_2(judgments, {name: verdicts.winners for name, verdicts in judges.items()}, seed=config.run.seed)
    names = key.names if key else {"a": "a", "b": "b"}
    column = {"study": key.study if key else None, "names": names, **plain(table)}
    beside = [_column(path.strip()) for path in section.beside.split(",")] if section.beside else []
    with build.open_run(config, "agree") as run_dir:
        build.describe(run_dir, config)
        write_json(run_dir.path / "agreement.json", column)
        print(text_of([column, *beside]))
        print("\n".join(f"note: {note}" for note in [*_notes(raters, judgments, judges, key), *left_out]))
        print(f"figures: {run_dir.path / 'agreement.json'}")
    return 0


def _verdicts(config: Config, key: Key | None) -> tuple[dict[str, Verdicts], list[str]]:
    """Verdicts by judge name, and notes. The run's own judge may have compared other texts; an explicitly named one may not."""
    try:
        return {name: read_verdicts(path, key=key) for name, path in judge_files(config).items()}, []
    except DataError as error:
        if config.agree.judge is None and error.causes == (Cause.NO_PAIR,):
            return {}, [str(error)]
        raise


def _column(run: str) -> dict[str, Any]:
    """Another run's column of the table. Raises `ConfigError` for one that cannot be shown."""
    path = Path(run, RESULT)
    try:
        column = read_object(path)
        with reading(path):
            table_rows([column])  # a field missing here would be missing from the table
    except (OSError, Unreadable) as error:
        said = str(error) if isinstance(error, Unreadable) else f"{path}: {error.strerror}"
        raise ConfigError(f"agree.beside: {said}; run dpo-jax agree --run.dir {run} first") from error
    return column


def plain(value: Any) -> Any:
    """JSON of a table: an estimate as an object, NaN as null."""
    if isinstance(value, Estimate):
        return {name: None if math.isnan(number) else number for name, number in value._asdict().items()}
    return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def text_of(columns: list[dict[str, Any]]) -> str:
    """The table for the screen: one column per study."""
    rows = table_rows(columns)
    width = max(len(label) for label, *_ in rows)
    lines = [f"{label:{width}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells) for label, *cells in rows]
    return "\n".join([*lines, INTERVALS])


def _notes(raters: list[RaterFile], judgments: list[Judgment], judges: Mapping[str, Verdicts], key: Key | None) -> list[str]:
    """Notes on the table: unfinished raters, lists rated twice, comparisons that judges left out."""
    notes = [f"{file.rater} has rated {len(file.judgments)} of {file.assigned}" for file in raters]
    notes = [note for note, file in zip(notes, raters, strict=True) if len(file.judgments) < file.assigned]
    lists: dict[int, list[str]] = {}
    for file in raters:
        lists.setdefault(file.number, []).append(file.rater)
    if key and len(key.lists) > 1:
        notes += [f"list {number} was rated by {' and '.join(who)}" for number, who in lists.items() if len(who) > 1]
        missing = [str(number) for number in range(1, len(key.lists) + 1) if number not in lists]
        notes += [f"nobody has rated list {', '.join(missing)} of {len(key.lists)}"] if missing and raters else []
    items = {judgment.item for judgment in judgments}
    for name, verdicts in judges.items():
        undecided = sum(winner is None for item, winner in verdicts.winners.items() if item in items)
        unjudged = len(items - set(verdicts.winners))
        others = verdicts.foreign + verdicts.repeated + len(set(verdicts.winners) - items)
        left = f"{others} of its verdicts are for other pairs or duplicates" if others else "all of its verdicts are used"
        notes.append(f"{name}: {undecided} of {len(items)} items undecided, {unjudged} not judged; {left}")
    return notes
