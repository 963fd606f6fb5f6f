"""`dpo-jax robust`: label noise, prompt shift and over-optimization, measured by true reward at equal KL.

One command on top of `lab.sweep`: the three experiments differ only in what is varied. They share the reference, the labeled
pairs and the methods, and do not repeat finished runs. `--robust.experiment` selects one; each is a module of `cli/robust/`.

Writes to `<run.dir>/robust-<experiment>`: `robust.png`, `results.csv` and `.jsonl` (every measured point), `summary.json` (the
printed figures), `pairs/`, `reward_models/` and `runs/` (a folder for each run).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from dpo_jax.cli import build
from dpo_jax.cli.config import Config
from dpo_jax.cli.experiment import FAST, sized
from dpo_jax.cli.robust import noise, overoptimization, shift
from dpo_jax.cli.robust.runs import runs_of
from dpo_jax.cli.starting_policy import refuse_bfloat16
from dpo_jax.lab import report
from dpo_jax.lab.robust import COLUMNS, rows
from dpo_jax.lab.robust_plot import plot_curves
from dpo_jax.lab.sweep import sweep
from dpo_jax.runtime.rundir import write_json

EXPERIMENTS: dict[str, Any] = {"noise": noise, "shift": shift, "overoptimization": overoptimization}


def run(config: Config) -> int:
    config = _sized(config)
    refuse_bfloat16(config, "robust")
    runs, module = runs_of(config), EXPERIMENTS[config.robust.experiment]
    module.prepare(config)
    with build.open_run(config, "robust", out=config.robust_out()) as run_dir:
        experiment = module.Experiment(config, run_dir.path)
        build.describe(run_dir, config)
        print(f"{len(runs)} runs of experiment {config.robust.experiment}", flush=True)
        results = sweep(
            runs,
            run_dir.path / "runs",
            shared=experiment.shared,
            perform=experiment.perform,
            jobs=config.frontier.jobs,
            say=functools.partial(print, flush=True),
        )
        summary, curves = experiment.summary(results)
        report.write(run_dir.path, rows(results), COLUMNS)
        tables = experiment.tables(summary)
        shown = [table._asdict() for table in tables]
        write_json(run_dir.path / "summary.json", {"experiment": config.robust.experiment, **summary, "tables": shown})
        figure = plot_curves(curves, run_dir.path / "robust.png", line=module.LINES)
        print("\n".join(["", *(f"{table.text()}\n" for table in tables), f"figure: {figure}"]))
    return 0


def _sized(config: Config) -> Config:
    """The configuration with the smaller sizes of `frontier.fast`, including the numbers of training prompts."""
    if not config.frontier.fast:
        return config
    counts = dict.fromkeys(str(max(1, n // FAST["prompts"])) for n in config.robust.counts("train_prompts"))
    return dataclasses.replace(sized(config), robust=dataclasses.replace(config.robust, train_prompts=",".join(counts)))
