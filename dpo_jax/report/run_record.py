"""Reader of a run directory: its stages, the progress of each, failures, and missing files.

Nothing is written. A damaged file is reported as a problem of its stage and does not stop the report.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dpo_jax.data.pairs import FILTERED
from dpo_jax.models.folder import ADAPTER
from dpo_jax.report.record_shapes import AUDITED, BAD_BATCH, DATA, ENV, REPORTS, RESULTS, RESUMED
from dpo_jax.runtime.metrics import is_evaluation, read_metrics_lines
from dpo_jax.shapes import Shape, check_shape, misfit
from dpo_jax.untrusted import Lines, Unreadable, read_lines, read_object, read_text, reading, regular

T = TypeVar("T")
TRAINING = ("sft", "dpo", "ppo", "online")
# A stage is done when this file is in its folder.
RESULT = {
    **{name: "export/config.json" for name in TRAINING},
    **{name: "report.json" for name in ("eval", "rewards", "judge")},
    "audit": "data_report.json",
    "refs": "identity.json",
    "label": "train.jsonl",
    "reward-model": "export",
    "optimum": "optimum.json",
    "frontier": "results.csv",
    "robust": "summary.json",
    "dialogue": "summary.json",
    **dict.fromkeys(("control", "diffusion", "scenes"), "summary.json"),
    "bench": "results.json",
    "study": "key.json",
    "agree": "agreement.json",
}
# Or when this one is: an adapter, the benchmark of samplers.
INSTEAD = {**{name: f"export/{ADAPTER}" for name in TRAINING}, "bench": "sampling.json"}
ORDER = (
    *("audit", "prepare", "sft", "refs", "dpo", "label", "reward-model", "ppo", "online", "optimum", "frontier"),
    *("robust", "dialogue", "bench", "eval"),
)
LATER = ("rewards", "judge", "study", "agree")
MANY_FAILED = 0.05  # share of a judge's pairs that is enough to change the conclusion of a win rate
# Stages that a reader may look for: what they would tell, and the command that makes them.
EXPECTED = {
    "eval": ("held-out evaluation", "dpo-jax eval"),
    "rewards": ("implicit-reward tables", "dpo-jax eval --rewards"),
    "frontier": ("frontier of reward and KL", "dpo-jax frontier"),
    "judge": ("win rates by a judge", "dpo-jax judge"),
    "agree": ("ratings by people", "dpo-jax study, then dpo-jax agree"),
}


@dataclasses.dataclass
class Stage:
    """One folder of a run, written by a command."""

    name: str
    path: Path
    done: bool = False
    state: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    env: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # split -> DataReport as JSON
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def read(self, file: str, reader: Callable[[Path], T], otherwise: T) -> T:
        """`reader(path)`, or `otherwise` if the file is missing or damaged; damage is recorded as a problem."""
        path = self.path / file
        if not os.path.lexists(path):
            return otherwise
        try:
            return reader(path)
        except (OSError, Unreadable) as error:
            if (words := f"{file} cannot be read: {error}") not in self.problems:  # several sections may read it
                self.problems.append(words)
            return otherwise

    def read_object(self, file: str, shape: Shape) -> dict[str, Any]:
        """The JSON object in a file; empty if it is missing or has another shape, which is recorded as a problem."""
        return self.read(file, lambda path: check_shape(read_object(path), shape, str(path)), {})

    def read_lines(self, file: str, shape: Shape) -> list[dict[str, Any]]:
        """The objects in a JSON Lines file. Damaged lines are left out and recorded as a problem."""
        return self._sound(file, lambda path: read_lines(path, lambda row: check_shape(row, shape, "no such row")))

    def _sound(self, file: str, reader: Callable[[Path], Lines]) -> list[dict[str, Any]]:
        found = self.read(file, reader, Lines([], []))
        self.problems += [f"{file}: {found.words}"] if found.damaged else []
        return found.rows

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`. Damaged lines are left out and recorded as a problem."""
        return self._sound("metrics.jsonl", read_metrics_lines)

    @contextlib.contextmanager
    def showing(self, file: str) -> Iterator[None]:
        """Context for code that shows the content of a file: an exception there is recorded as a problem of the file."""
        try:
            with reading(self.path / file):
                yield
        except (OSError, Unreadable) as error:
            self.problems.append(f"{file} cannot be shown: {error}")


@dataclasses.dataclass
class RunRecord:
    """A run directory. `name` distinguishes it from the other runs of a report."""

    name: str
    path: Path
    stages: dict[str, Stage]

    @property
    def missing(self) -> list[str]:
        """The missing results in words, each with the command that makes it."""
        kinds = {kind_of(stage) for stage in self.stages}
        return [f"{what} ({command})" for stage, (what, command) in EXPECTED.items() if stage not in kinds]


def kind_of(stage: str) -> str:
    """The kind of a stage, which may have several folders in a run: judge, judge-steps, rewards-bench, robust-shift."""
    kind, dash, _ = stage.partition("-")
    return kind if dash and kind in ("judge", "rewards", "robust", "diffusion") else stage


def one_or_more(runs: Sequence[RunRecord], kind: str) -> list[tuple[RunRecord, Stage]]:
    """All stages of a kind, each with its run."""
    return [(run, stage) for run in runs for stage in run.stages.values() if kind_of(stage.name) == kind]


def of(run: RunRecord, runs: Sequence[RunRecord], what: str) -> str:
    """`what`, preceded by the name of the run if there are several runs."""
    return f"{run.name}: {what}" if len(runs) > 1 else what


def read_run(path: Path, *, name: str) -> RunRecord:
    """Reads a run directory. Raises ValueError if the folder contains no stage of a run, or is itself a stage."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path}: this is one stage of a run; give its run directory, {path.parent}")
    found = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and os.path.lexists(folder / "config.yaml")]
    if not found:
        raise ValueError(f"{path}: not a run directory: no folder in it has the config.yaml that each command writes")
    known = (*ORDER, *LATER)
    found.sort(key=lambda folder: known.index(kind) if (kind := kind_of(folder.name)) in known else len(ORDER))
    return RunRecord(name, path, {shown_path(folder.name): _read_stage(folder) for folder in found})


def shown_path(name: str | os.PathLike[str]) -> str:
    """A file name as text. Bytes that are not UTF-8 are escaped, as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_stage(path: Path) -> Stage:
    stage, kind = Stage(shown_path(path.name), path), kind_of(path.name)
    stage.env = stage.read_object("env.json", ENV)
    stage.data = stage.read_object("data_report.json", DATA)
    if kind == "audit":  # earlier versions had no verdict
        for split in [split for split, report in stage.data.items() if "verdict" in report]:
            if wrong := misfit(stage.data[split], AUDITED):
                stage.problems.append(f"data_report.json cannot be read: {split}, {wrong[0]}: {wrong[1]}")
                del stage.data[split]
    stage.report = stage.read_object("report.json", REPORTS.get(kind, {}))
    stage.metrics = stage.read_metrics()
    results = [table[kind] for table in (RESULT, INSTEAD) if kind in table]
    found = not results or any(os.path.exists(path / result) for result in results)
    stage.done = found and not _undecided(stage)
    stage.state = _state(stage)
    stage.problems += _failures(stage)
    return stage


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of the frontier's `results.csv`. Raises `Unreadable`, naming the line, for a row without its numbers."""
    with reading(path):
        lines = csv.DictReader(io.StringIO(read_text(regular(path)), newline=""))
        rows = [(lines.line_num, row) for row in lines]
    for number, row in rows:
        if missing := [name for name in RESULTS if row.get(name) is None]:
            raise Unreadable(f"{path}:{number}: has no {missing[0]}")
        with reading(f"{path}:{number}"):
            if not all(math.isfinite(float(row[name])) for name in RESULTS[3:]):
                raise ValueError("expected a number, got NaN or infinite")
    return [row for _, row in rows]


def steps_taken(stage: Stage) -> int:
    return max((int(row["step"]) + (not is_evaluation(row)) for row in stage.metrics), default=0)


def _state(stage: Stage) -> str:
    steps = f"{steps_taken(stage):,} steps" if stage.name in TRAINING else ""
    if stage.done:
        return f"done, {steps}" if steps else "done"
    return f"not finished, {steps} so far" if steps else "not finished"


def _outcomes(stage: Stage) -> dict[str, int]:
    """Outcome counts of a judge's pairs; empty for another stage."""
    return stage.report.get("outcomes", {}) if kind_of(stage.name) == "judge" else {}


def _undecided(stage: Stage) -> int:
    """Number of pairs that a judge was not asked about before it stopped."""
    return _outcomes(stage).get("unanswered", 0)


def _failures(stage: Stage) -> list[str]:
    found = []
    if not stage.done:
        lacking = (
            f"{left:,} pairs have no verdict yet"
            if (left := _undecided(stage))
            else f"{RESULT[kind_of(stage.name)]} is missing"
        )
        found.append(f"{stage.state}: {lacking}; run the same command again to continue it")
    failed, pairs = _outcomes(stage).get("failed", 0), sum(_outcomes(stage).values())
    if failed > MANY_FAILED * pairs:
        found.append(
            f"the judge gave no answer in the format on {failed:,} of {pairs:,} pairs: its win rates are over the others"
        )
    if bad := stage.read_object("bad_batch.json", BAD_BATCH):
        values = ", ".join(f"{name} {bad['metrics'][name]}" for name in ("loss", "grad_norm") if name in bad["metrics"])
        uids = bad["uids"]
        shown = ", ".join(uids[:3]) + ", ..." * (len(uids) > 3)
        later = " It was continued and passed that step." if steps_taken(stage) > bad["step"] + 1 else ""
        found.append(f"stopped at step {bad['step']} because of {values}, in a batch of {len(uids)}: {shown}.{later}")
    for resumed in stage.read_lines("resumes.jsonl", RESUMED):
        found.append(f"was interrupted, and continued after {resumed['step']:,} steps ({resumed['time']})")
    holes = [(row["step"], name) for row in stage.metrics for name, value in row.items() if value is None]
    if holes:
        step, name = holes[0]
        found.append(f"{len(holes)} values in metrics.jsonl are not finite, the first {name} at step {step}")
    for folder in ("checkpoints/quarantine", "quarantine"):
        if os.path.isdir(stage.path / folder):
            damaged = sorted(map(shown_path, stage.read(folder, os.listdir, [])))
            found.append(f"{folder}/ holds what was found damaged: {', '.join(damaged)}")
    return found + _dropped(stage) + _misleading(stage)


def _misleading(stage: Stage) -> list[str]:
    """Findings of the audit that make held-out numbers less meaningful than they seem."""
    # Only reports of the audit have a verdict; its shape has been checked.
    notes = [note for report in stage.data.values() for note in report.get("verdict", ()) if stage.name == "audit"]
    return [f"{note['found']}: {note['remedy']}" for note in notes if note["about"] in ("overlap", "contradictions")]


def _dropped(stage: Stage) -> list[str]:
    found = []
    for split, report in stage.data.items():
        bad = {cause: count for cause, count in report.get("dropped", {}).items() if cause not in FILTERED}
        if bad:
            causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(bad.items()))
            found.append(f"{sum(bad.values()):,} of {report['read']:,} pairs of {split} were dropped as bad: {causes}")
    return found
