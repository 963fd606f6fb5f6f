"""`dpo-jax audit`: what is in the data, and what a run would do with it, before any training."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config
from dpo_jax.data.loader import plan_layout, stream
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.runtime.rundir import write_json


def run(config: Config) -> int:
    """Prints and writes the report. With bad data under `data.on_bad=refuse` it still counts everything, then fails."""
    with build.open_run(config, "audit") as run_dir:
        tolerant = build.with_data(config, on_bad="drop", max_dropped_share=1.0)
        tokenizer = build.tokenizer_of(tolerant, model_path=config.model.path)
        reports: dict[str, Any] = {}
        bad: list[Literal["train", "test"]] = []
        for split in ("train", "test"):
            encoded = build.encode_split(tolerant, build.load_split(tolerant, split, tokenizer), tokenizer)
            report = encoded.report
            if report.bad_share:
                bad.append(split)
            print(report.summary())
            lengths = length_table(encoded)
            print(_format_lengths(lengths))
            rows = row_statistics(config, encoded)
            print("  rows of {length} tokens ({layout}): {padding:.0%} padding at {batch} pairs a step\n".format(**rows))
            print(report.reasons(), end="")
            reports[report.split] = {**report.to_json(), "lengths": lengths, "rows": rows}
        write_json(run_dir.data_report, reports)
        print(f"full report: {run_dir.data_report}")
        # The same checks as a training command makes, with the configured strictness.
        for split in bad:
            build.encode_split(config, build.load_split(config, split, tokenizer), tokenizer)
    return 0


def length_table(encoded: EncodedSet) -> dict[str, dict[str, float]]:
    """Mean and percentiles of token counts."""
    table = {}
    for name in ("prompt", "chosen", "rejected"):
        sizes = np.array([len(getattr(pair, name)) for pair in encoded])
        percentiles = np.percentile(sizes, [50, 90, 99])
        table[name] = {
            "mean": float(sizes.mean()),
            **{f"p{p}": float(v) for p, v in zip((50, 90, 99), percentiles, strict=True)},
            "max": float(sizes.max()),
        }
    return table


def _format_lengths(table: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(table.values())))
    lines = ["  tokens    " + "".join(f"{name:>8}" for name in columns)]
    lines += [f"  {name:<10}" + "".join(f"{row[column]:>8.0f}" for column in columns) for name, row in table.items()]
    return "\n".join(lines)


def row_statistics(config: Config, encoded: EncodedSet, *, batch: int = 64, batches: int = 8) -> dict[str, Any]:
    """How the configured layout fills its rows, over the first batches."""
    layout = plan_layout(encoded, kind=config.data.layout, batch=batch, length=config.data.row_length)
    at = stream(encoded, layout=layout, batch=min(batch, len(encoded)), seed=config.run.seed)
    filled = [at(step).stats["padding"] for step in range(min(batches, max(1, len(encoded) // batch)))]
    return {"layout": layout.kind, "length": layout.length, "batch": batch, "padding": float(np.mean(filled))}
