"""`dpo-jax control`: Contrastive Preference Learning and its baselines, on preferences by regret and by partial return.

Writes to `<run.dir>/control`: `control.png`, `results.csv` and `.jsonl` (every measured point), `summary.json` (the printed
figures) and `runs/`, a folder for each run. Finished runs are not repeated.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.preflight.experiments import check_simulator
from dpo_jax.control import summary as found
from dpo_jax.control.figure import plot_returns
from dpo_jax.control.lqr import LqrWorld, masses
from dpo_jax.control.methods import METHODS, Learner, Options
from dpo_jax.control.pendulum import PendulumWorld
from dpo_jax.control.rollouts import Preferences, World, preferences
from dpo_jax.lab import report
from dpo_jax.lab.sweep import Run, sweep
from dpo_jax.runtime.mesh import MeshError, make_mesh
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import write_json
from dpo_jax.types import Partitioner

UNSHARED = ("methods", "preferences", "seeds", "jobs")  # options on which no single run depends


_NOW = {"p-iql": {"q": "two networks"}}
"""What a method has done since its results changed, so that those of earlier versions are not taken for today's."""


def run(config: Config) -> int:
    check_simulator(config)
    section = config.control
    partitioner = _partitioner(config)
    runs = [
        Run(method, f"by {kind}", {"preferences": kind, **_NOW.get(method, {})}, config.run.seed + seed)
        for kind in section.chosen("preferences")
        for method in section.chosen("methods")
        for seed in range(section.seeds)
    ]
    with build.open_run(config, "control") as run_dir:
        with reported("solving the world"):
            world = make_world(config)
        experiment = Experiment(config, world, partitioner)
        build.describe(run_dir, config)
        print(
            f"{len(runs)} runs in the world {world.name}, whose optimum or expert has a return of {world.optimal:.2f}",
            flush=True,
        )
        results = sweep(
            runs,
            run_dir.path / "runs",
            shared={name: value for name, value in dataclasses.asdict(section).items() if name not in UNSHARED},
            perform=experiment.perform,
            jobs=section.jobs if config.run.devices == "single" else 1,
            point=found.POINT,
            words=lambda point: f"return {point['return']:8.2f}",
            say=functools.partial(print, flush=True),
        )
        report.write(run_dir.path, found.rows(results), found.COLUMNS)
        summary = found.summarized(results, world.optimal)
        tables = found.tables(summary)
        shown = [table._asdict() for table in tables]
        write_json(run_dir.path / "summary.json", {"world": world.name, **summary, "tables": shown})
        lowest = 2 * world.optimal if world.name == "lqr" else None
        figure = plot_returns(results, run_dir.path / "control.png", optimal=world.optimal, lowest=lowest)
        print("\n".join(["", *(f"{table.text()}\n" for table in tables), f"figure: {figure}"]))
    return 0


def make_world(config: Config) -> World:
    section = config.control
    if section.world == "pendulum":
        return PendulumWorld(gamma=section.discount, episodes=section.episodes)
    return LqrWorld(masses(alpha=section.alpha, gamma=section.discount))


class Experiment:
    """State shared by runs: the learner, and for each seed the segments and preferences, made when a run first needs them."""

    def __init__(self, config: Config, world: World, partitioner: Partitioner) -> None:
        section = config.control
        renamed: dict[str, Any] = {"hidden": section.widths(), "pairs": section.batch}
        options = {name: getattr(section, name) for name in Options._fields if name not in renamed}
        self.config, self.world, self.making = config, world, threading.Lock()
        self.learner = Learner(world, Options(**options, **renamed), partitioner)
        self.collected = functools.cache(self._collect)

    def _collect(self, seed: int) -> Any:
        section = self.config.control
        return self.world.collect(section.segments, section.length, np.random.default_rng((seed, 0)))

    def preferences(self, kind: Any, seed: int) -> Preferences:
        section = self.config.control
        with self.making:
            rollouts = self.collected(seed)
        options = {"gamma": section.discount, "temperature": section.temperature, "comparisons": section.comparisons}
        return preferences(rollouts, kind, rng=np.random.default_rng((seed, 1)), **options)

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        kind = run.settings["preferences"]
        return METHODS[run.method](self.learner, self.preferences(kind, run.seed), kind, run.seed, folder)


def _partitioner(config: Config) -> Partitioner:
    """The partitioner. Raises `ConfigError` if batches do not divide among the devices."""
    if config.run.devices == "single":
        return single_device()
    try:
        mesh = make_mesh(**dataclasses.asdict(config.mesh)) if config.run.devices == "mesh" else None
    except MeshError as error:
        raise ConfigError(f"mesh: {error}") from error
    partitioner = pmap_partitioner() if mesh is None else mesh_partitioner(mesh)
    for name in ("batch", "transitions"):
        if getattr(config.control, name) % partitioner.row_shards:
            raise ConfigError(f"control.{name}: cannot be split over {partitioner.row_shards} devices; use a multiple of that")
    return partitioner
