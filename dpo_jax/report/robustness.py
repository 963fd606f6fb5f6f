"""The experiments of `dpo-jax robust`, and after which KL the true reward falls: measured, fitted, or unknown."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dpo_jax.evals.overoptimisation import declines
from dpo_jax.report.page import Block, Figures, Section, Table
from dpo_jax.report.record_shapes import ROBUST
from dpo_jax.report.run_record import RunRecord, of, one_or_more, read_results

UNKNOWN = "unknown: no true reward was measured"
POLICIES = ("dpo", "ppo", "online")  # stages that move a policy away from its reference


def robustness(runs: Sequence[RunRecord]) -> Section | None:
    """Figure and tables of each experiment, and one table of where the true reward falls."""
    blocks: list[Block] = []
    for run, stage in one_or_more(runs, "robust"):
        experiment = stage.name.partition("-")[2]
        if os.path.isfile(stage.path / "robust.png"):
            caption = of(run, runs, f"{experiment}: gain in reward against KL")
            blocks.append(Figures([(stage.path / "robust.png", caption)], size="wide"))
        for table in stage.read_object("summary.json", ROBUST).get("tables", []):
            columns, rows = [table["caption"], *table["columns"]], table["rows"]
            if any(len(row) != len(columns) for row in rows):
                stage.problems.append(f"summary.json: a row of {table['caption']!r} has more or fewer cells than the table")
                continue
            blocks.append(Table(columns, rows, caption=of(run, runs, experiment), note=table["note"]))
    falls = [[of(run, runs, what), *cells] for run in runs for what, *cells in _falls(run)]
    if falls:
        note = (
            "True reward against KL(policy || reference). A fit counts where its interval ends within the KL that was measured."
        )
        blocks.append(
            Table(["policy", "true reward falls", "seen in"], falls, caption="Where the true reward falls", note=note)
        )
    return Section("Robustness", blocks) if blocks else None


def _falls(run: RunRecord) -> list[list[str]]:
    """What is known of each policy of a run: its name, the KL after which its true reward falls, and how that is known."""
    rows = []
    for _, stage in one_or_more([run], "robust"):
        found = stage.read_object("summary.json", ROBUST).get("falls", [])
        rows += [[row["what"], row["words"], f"{stage.name}, fitted"] for row in found]
    for _, stage in one_or_more([run], "frontier"):
        for row in declines(stage.read("results.csv", read_results, [])):
            name = " ".join(filter(None, (row.method, row.setting, f"seed {row.seed}")))
            seen = f"after KL {row.best_kl:.2f}" if row.overoptimised else f"not seen up to KL {row.last_kl:.2f}"
            rows.append([name, seen, "frontier, measured"])
    return rows + [[stage, UNKNOWN, "-"] for stage in POLICIES if stage in run.stages]
