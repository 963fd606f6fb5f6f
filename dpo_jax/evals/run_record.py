"""What lies in a run directory: its stages, how far each came, what went wrong, and what is not there.

Reads only. A file that is damaged is a problem of its stage to report, and no reason to stop.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dpo_jax.data.pairs import FILTERED
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

T = TypeVar("T")
TRAINING = ("sft", "dpo", "ppo")
# A stage is done when this lies in its folder.
RESULT = {
    **{name: "export/config.json" for name in TRAINING},
    **{name: "report.json" for name in ("eval", "rewards", "judge")},
    "audit": "data_report.json",
    "refs": "identity.json",
    "label": "train.jsonl",
    "reward-model": "export",
    "optimum": "optimum.json",
    "frontier": "results.csv",
    "study": "key.json",
    "agree": "agreement.json",
}
ORDER = ("audit", "prepare", "sft", "refs", "dpo", "label", "reward-model", "ppo", "optimum", "frontier", "bench", "eval")
LATER = ("rewards", "judge", "study", "agree")
MANY_FAILED = 0.05  # of a judge's pairs: enough to move a win rate by as much as is at stake
# What a reader may look for: the stage, what it would tell, and the command that makes it.
EXPECTED = {
    "eval": ("held-out evaluation", "dpo-jax eval"),
    "rewards": ("implicit-reward tables", "dpo-jax eval --rewards"),
    "frontier": ("frontier of reward and KL", "dpo-jax frontier"),
    "judge": ("win rates by a judge", "dpo-jax judge"),
    "agree": ("ratings by people", "dpo-jax study, then dpo-jax agree"),
}


@dataclasses.dataclass
class Stage:
    """One folder of a run: what a command wrote."""

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
        """`reader(path)`, or `otherwise` where there is no such file, or where it is damaged: then that is a problem."""
        path = self.path / file
        if not path.is_file():
            return otherwise
        try:
            return reader(path)
        except (OSError, ValueError) as error:
            self.problems.append(f"{file} cannot be read: {error}")
            return otherwise


@dataclasses.dataclass
class RunRecord:
    """A run directory. `name` tells it from the others of a report."""

    name: str
    path: Path
    stages: dict[str, Stage]

    @property
    def missing(self) -> list[str]:
        """What is not there, in words, with the command that would make it."""
        kinds = {kind_of(stage) for stage in self.stages}
        return [f"{what} ({command})" for stage, (what, command) in EXPECTED.items() if stage not in kinds]


def kind_of(stage: str) -> str:
    """A run may be judged in several ways, each in a folder of its own: judge, judge-steps, judge-news, rewards-bench."""
    kind, dash, _ = stage.partition("-")
    return kind if dash and kind in ("judge", "rewards") else stage


def one_or_more(runs: Sequence[RunRecord], kind: str) -> list[tuple[RunRecord, Stage]]:
    """Each stage of a kind, with its run."""
    return [(run, stage) for run in runs for stage in run.stages.values() if kind_of(stage.name) == kind]


def of(run: RunRecord, runs: Sequence[RunRecord], what: str) -> str:
    """`what`, with the name of the run where there are several."""
    return f"{run.name}: {what}" if len(runs) > 1 else what


def read_run(path: Path, *, name: str) -> RunRecord:
    """Raises ValueError if the folder holds no stage of a run, or is itself one."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path}: this is one stage of a run; give its run directory, {path.parent}")
    found = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and (folder / "config.yaml").is_file()]
    if not found:
        raise ValueError(f"{path}: no run directory: no folder in it has a config.yaml, as each command leaves one")
    known = (*ORDER, *LATER)
    found.sort(key=lambda folder: known.index(kind) if (kind := kind_of(folder.name)) in known else len(ORDER))
    return RunRecord(name, path, {folder.name: _read_stage(folder) for folder in found})


def _read_stage(path: Path) -> Stage:
    stage = Stage(path.name, path)
    stage.env = stage.read("env.json", read_object, {})
    stage.data = stage.read("data_report.json", read_object, {})
    stage.report = stage.read("report.json", read_object, {})
    stage.metrics = stage.read("metrics.jsonl", read_metrics, [])
    result = RESULT.get(kind_of(path.name))
    stage.done = (result is None or (path / result).exists()) and not _undecided(stage)
    stage.state = _state(stage)
    stage.problems += _failures(stage)
    return stage


def read_object(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is no JSON object."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file. Lines end with a newline only: a text in them may hold any other separator."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def steps_taken(stage: Stage) -> int:
    return max((int(row["step"]) + (not is_evaluation(row)) for row in stage.metrics), default=0)


def _state(stage: Stage) -> str:
    steps = f"{steps_taken(stage):,} steps" if stage.name in TRAINING else ""
    if stage.done:
        return f"done, {steps}" if steps else "done"
    return f"not finished, {steps} so far" if steps else "not finished"


def _outcomes(stage: Stage) -> dict[str, int]:
    """What became of a judge's pairs; nothing for another stage."""
    return stage.report.get("outcomes", {}) if kind_of(stage.name) == "judge" else {}


def _undecided(stage: Stage) -> int:
    """Pairs that a judge was not asked about before it stopped."""
    return _outcomes(stage).get("unanswered", 0)


def _failures(stage: Stage) -> list[str]:
    found = []
    if not stage.done:
        lacking = (
            f"{left:,} pairs have no verdict yet"
            if (left := _undecided(stage))
            else f"{RESULT[kind_of(stage.name)]} is not there"
        )
        found.append(f"{stage.state}: {lacking}; the same command again continues it")
    failed, pairs = _outcomes(stage).get("failed", 0), sum(_outcomes(stage).values())
    if failed > MANY_FAILED * pairs:
        found.append(
            f"the judge gave no answer in the format on {failed:,} of {pairs:,} pairs: its win rates are of the others"
        )
    bad = stage.read("bad_batch.json", read_object, {})
    if bad:
        values = ", ".join(f"{name} {bad['metrics'][name]}" for name in ("loss", "grad_norm") if name in bad.get("metrics", {}))
        uids = bad.get("uids", [])
        shown = ", ".join(uids[:3]) + ", ..." * (len(uids) > 3)
        later = " It was continued and got past that step." if steps_taken(stage) > bad.get("step", 0) + 1 else ""
        found.append(f"stopped at step {bad.get('step')} because of {values}, in a batch of {len(uids)}: {shown}.{later}")
    for resumed in stage.read("resumes.jsonl", read_lines, []):
        found.append(f"was interrupted, and continued after {resumed.get('step'):,} steps ({resumed.get('time')})")
    holes = [(row["step"], name) for row in stage.metrics for name, value in row.items() if value is None]
    if holes:
        step, name = holes[0]
        found.append(f"{len(holes)} values in metrics.jsonl are not finite, the first {name} at step {step}")
    for folder in ("checkpoints/quarantine", "quarantine"):
        if (stage.path / folder).is_dir():
            damaged = sorted(path.name for path in (stage.path / folder).iterdir())
            found.append(f"{folder}/ holds what was found damaged: {', '.join(damaged)}")
    return found + _dropped(stage) + _misleading(stage)


def _misleading(stage: Stage) -> list[str]:
    """What the audit found that makes held-out numbers mean less than they seem to."""
    notes = [note for report in stage.data.values() for note in report.get("verdict", ())]
    return [f"{note['found']}: {note['remedy']}" for note in notes if note["about"] in ("overlap", "contradictions")]


def _dropped(stage: Stage) -> list[str]:
    found = []
    for split, report in stage.data.items():
        bad = {cause: count for cause, count in report.get("dropped", {}).items() if cause not in FILTERED}
        if bad:
            causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(bad.items()))
            found.append(f"{sum(bad.values()):,} of {report['read']:,} pairs of {split} were dropped as bad: {causes}")
    return found
