"""`dpo-jax scenes`: hallucination in image captions before and after DPO, at equal recall, with Preferred-FT as the baseline.

Writes to `<run.dir>/scenes`: `results.csv` and `.jsonl` (every point), `summary.json` (the printed figures), `scenes.png`,
`encoder/`, `features/` (cached, by image) and `sft/` (the reference), and `runs/`, with captions of each run.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from dpo_jax.cli import build, identity
from dpo_jax.cli.config import Config
from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.config.scenes import ScenesConfig
from dpo_jax.data.scenes import caption
from dpo_jax.lab import report
from dpo_jax.lab import scenes_report as found
from dpo_jax.lab.robust import Grid
from dpo_jax.lab.scenes import ScenesWorld, Sizes
from dpo_jax.lab.sweep import Run, sweep
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.writing import write_text

PREPARED = (
    *("train", "adds", "omits", "width", "layers", "encoder_width", "encoder_steps", "encoder_lr"),
    *("sft_steps", "sft_batch", "sft_lr"),
)
"""Options on which the encoder and the reference depend."""
SHARED = (*PREPARED, "test", "pairs", "pair_omits", "batch", "epochs", "evaluations")
"""Options on which all runs depend."""


def run(config: Config) -> int:
    with build.open_run(config, "scenes") as run_dir:
        tables = captioned(config, run_dir)
        print("\n".join(["", *(f"{table.text()}\n" for table in tables)]))
    return 0


def runs_of(config: Config) -> list[Run]:
    """The runs: SFT, and DPO at every beta and Preferred-FT at every rate, for each kind of pairs."""
    section, seeds = config.scenes, range(config.run.seed, config.run.seed + config.scenes.seeds)
    runs = [Run(found.REFERENCE, "", {}, seed) for seed in seeds]
    for kind in section.kinds():
        for beta in numbers(section.betas):
            settings = {"chosen": kind, "beta": beta, "lr": section.lr}
            runs += [Run("dpo", f"{kind} beta {beta:g}", settings, seed) for seed in seeds]
        for lr in numbers(section.ft_lrs):
            runs += [Run("preferred-ft", f"{kind} rate {lr:g}", {"chosen": kind, "lr": lr}, seed) for seed in seeds]
    return runs


def captioned(config: Config, run_dir: RunDir) -> list[Grid]:
    section, folder = config.scenes, run_dir.path
    world = make_world(section, folder, seed=config.run.seed)
    with identity.refusing_mismatch():
        world.prepare()
    build.describe(run_dir, config)

    def perform(run: Run, here: Path) -> list[dict[str, float]]:
        if run.method == found.REFERENCE:
            points, policy = [{"step": 0.0, **world.measure(world.reference, seed=run.seed)}], world.reference
        else:
            options: dict[str, Any] = dict(run.settings)
            kind, lr = options.pop("chosen"), options.pop("lr")
            points, policy = world.run(run.method, here, kind=kind, seed=run.seed, lr=lr, settings=options)
        texts = zip(world.captions(policy, seed=run.seed), world.test, strict=True)
        write_text(here / "captions.txt", "".join(f"{caption(scene.things)}\t{text}\n" for text, scene in texts))
        return points

    results = sweep(
        runs_of(config),
        folder / "runs",
        shared={**fingerprint(section, SHARED, config.run.seed), "reference": world.digest},
        perform=perform,
        point=found.POINT,
        words=found.words,
        say=functools.partial(print, flush=True),
    )
    rows = [
        {
            "method": r.run.method,
            "chosen": r.run.settings.get("chosen", ""),
            "label": r.run.label,
            "seed": r.run.seed,
            "seconds": r.seconds,
            **point,
        }
        for r in results
        for point in r.points
    ]
    report.write(folder, rows, found.COLUMNS)
    settings = found.ended(results)
    tables = found.tables(settings)
    print(f"figure: {found.plot_recall(results, folder / 'scenes.png')}")
    summary = {"settings": settings, "at_equal_recall": found.at_equal_recall(settings)}
    write_json(folder / "summary.json", {**summary, "tables": [table._asdict() for table in tables]})
    return tables


def make_world(section: ScenesConfig, folder: Path, *, seed: int) -> ScenesWorld:
    sizes = Sizes(**{field.name: getattr(section, field.name) for field in dataclasses.fields(Sizes)})
    return ScenesWorld(sizes, folder, seed=seed, fingerprint=fingerprint(section, PREPARED, seed))


def fingerprint(section: ScenesConfig, names: tuple[str, ...], seed: int) -> dict[str, Any]:
    return {f"scenes.{name}": getattr(section, name) for name in names} | {"run.seed": seed}
