"""First section of a report: warnings, headline numbers, and the health of a run."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_jax.plotting.curves import KL_OF_SAMPLES
from dpo_jax.report.health import Health, Note, examine_run
from dpo_jax.report.page import Block, Notice, Section, Table, Tiles
from dpo_jax.report.result_table import MEASURES, with_interval
from dpo_jax.report.run_record import RunRecord, of

TITLE = "Read this first"


def first_things(runs: Sequence[RunRecord], alarms: Sequence[str], *, weights_checked: bool) -> Section:
    """Everything to know before the numbers: alarms, failures, health, missing results, and the progress of each stage."""
    healths = [health_of(run) for run in runs]  # first, because unreadable files become problems of their stage
    blocks: list[Block] = [Notice(words, "alarm") for words in alarms]
    for run in runs:
        for stage in run.stages.values():
            blocks += [Notice(of(run, runs, f"{stage.name}: {problem}")) for problem in stage.problems]
    fine = [] if blocks else ["stages (none failed, stopped or dropped bad pairs)"]
    fine += ["weights (the scored ones are in this run)"] if weights_checked and not alarms else []
    if len(runs) == 1 and (tiles := _tiles(runs[0])):
        blocks.append(tiles)
    blocks += _health(runs, healths, fine)
    stages = list(dict.fromkeys(name for run in runs for name in run.stages))
    states = [[name, *(run.stages[name].state if name in run.stages else "-" for run in runs)] for name in stages]
    began = [[stage.env.get("started", "") for stage in run.stages.values() if stage.env.get("started")] for run in runs]
    states.append(["last command begun", *(moment(max(times, default="not known")) for times in began)])
    states.append(["not in this run", *("; ".join(run.missing) or "-" for run in runs)])
    blocks.append(Table(["stage", *(run.name for run in runs)], states, caption="What was done"))
    return Section(TITLE, blocks)


def _health(runs: Sequence[RunRecord], healths: Sequence[Health], fine: Sequence[str]) -> list[Block]:
    """A notice for each unusual finding, with the runs that have it, and one for all checks without findings."""
    found: dict[str, list[tuple[RunRecord, Note]]] = {}
    looked_at, not_measured = [", ".join(fine)], []
    for run, health in zip(runs, healths, strict=True):
        for note in health.notes:
            found.setdefault(note.name, []).append((run, note))
        looked_at += [of(run, runs, ", ".join(health.fine))] if health.fine else []
        not_measured += [of(run, runs, ", ".join(health.not_measured))] if health.not_measured else []
    blocks: list[Block] = []
    for name, mine in found.items():
        numbers = [of(run, runs, note.found) for run, note in mine]
        meanings = dict.fromkeys(note.meaning for _, note in mine)
        remedies = dict.fromkeys(note.remedy for _, note in mine)
        blocks.append(Notice(" ".join([*numbers, *meanings]), "health", name[0].upper() + name[1:], " ".join(remedies)))
    separator = "; " if len(runs) > 1 else ", "
    left = f" Not measured: {'; '.join(not_measured)}." if not_measured else ""
    if words := separator.join(filter(None, looked_at)):
        return [*blocks, Notice(f"{words}.{left}", "fine")]
    return [*blocks, Notice(left.strip(), "warning", "Health")] if left else blocks


def health_of(run: RunRecord) -> Health:
    """Health notes of a run with preference training or an evaluation; empty for other runs."""
    dpo, evaluated = run.stages.get("dpo"), run.stages.get("eval")
    if not dpo and not (evaluated and evaluated.report):
        return Health([], [], [])
    found = Health([], [], [])
    stage, file = (dpo, "metrics.jsonl") if dpo and not (evaluated and evaluated.report) else (evaluated, "report.json")
    assert stage is not None
    with stage.showing(file):
        report = evaluated.report if evaluated else {}
        # Training explains the figures of its own policy only.
        found = examine_run(report, dpo.metrics if dpo and report.get("of_run", True) else ())
    return found


HEADLINES = (
    ("held-out accuracy", "rewards/accuracies"),
    ("reward margin (nats)", "rewards/margins"),
    (f"{KL_OF_SAMPLES} (nats)", "kl"),
    ("true reward", "true_reward"),
    ("tokens per sample", "tokens"),
)


def _tiles(run: RunRecord) -> Tiles | None:
    """Headline numbers, with the value of the reference where that is not 0 by definition."""
    report = run.stages["eval"].report if "eval" in run.stages else {}
    policy, reference = report.get("policy", {}), report.get("reference", {})
    forms = {measure.key: measure.form for measure in MEASURES}
    items = []
    for label, key in HEADLINES:
        if not isinstance(policy.get(key), int | float):
            continue
        number, _, sure = with_interval(policy, key, forms[key]).partition(" ")
        if key in ("true_reward", "tokens") and reference.get(key) is not None:
            sure = f"{sure}, reference {reference[key]:{forms[key]}}".removeprefix(", ")
        items.append((label, number, sure))
    return Tiles(items) if items else None


def moment(written: str) -> str:
    """A UTC time from `env.json` in readable form."""
    return written.replace("T", " ").replace("+00:00", " UTC")
