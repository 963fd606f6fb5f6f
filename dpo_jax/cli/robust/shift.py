"""Prompt shift: policies trained on one family of reviews, tested on it and on the other.

To add a method, add a line to `METHODS`, and one to `runs.shift` for its settings. A method is a function
`(experiment, run, folder, measure) -> (point on the family that it was trained on, by measure; final variables on the host)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.cli.config import Config
from dpo_jax.cli.experiment import prompts_of
from dpo_jax.cli.robust.runs import FAMILIES, REFERENCE, families
from dpo_jax.cli.robust.setup import Measure, Setup
from dpo_jax.cli.starting_policy import make_reference
from dpo_jax.data.encode import Encoded
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.methods import PairMethod
from dpo_jax.lab.paired import (
    PROMPTS_KEPT,
    Policy,
    gain_lost,
    gains_at_kl,
    mean_gain,
    plot_points,
    policy,
    read_prompts,
    write_prompts,
)
from dpo_jax.lab.ppo import PpoMethod
from dpo_jax.lab.robust import EQUAL_KL, Grid, cell
from dpo_jax.lab.robust_plot import Curve
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.lab.world import World
from dpo_jax.losses import dpo_loss
from dpo_jax.types import Variables

LINES = ""  # the figure has none
Trained = tuple[dict[str, float], Variables]
prepare = make_reference


class Experiment:
    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.setup = config, Setup(config, folder)
        self.shared = self.setup.shared | PROMPTS_KEPT
        everywhere = self.setup.world
        self.families = {name: Family(self.setup, everywhere, name, topics) for name, topics in families(config).items()}

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        worlds, rewards = {name: family.world for name, family in self.families.items()}, {}

        def measure(name: str, variables: Variables) -> dict[str, float]:
            found = worlds[name].observe(variables)
            rewards[name] = found.rewards
            return worlds[name].point(found)

        if run.method == REFERENCE:
            variables, points, step = self.setup.world.reference, {}, 0.0
        else:
            own = run.settings["family"]
            point, final = METHODS[run.method](self, run, folder, functools.partial(measure, own))
            variables, points, step = self.setup.world.partitioner.put_variables(final), {own: point}, point["step"]
        for name in worlds:
            if name not in points:
                points[name] = {"step": step, **measure(name, variables)}
        write_prompts(folder, [{"reward": rewards[name]} for name in FAMILIES])
        return [{**points[name], "tested": float(number)} for number, name in enumerate(FAMILIES)]

    def summary(self, results: Sequence[Result]) -> tuple[dict[str, Any], list[Curve]]:
        """For each tested family, method and KL: the gain after training on it, on the other, and the cost of the shift."""
        found, curves, seed = [], [], self.config.run.seed
        rewards = {r.run.name: self._rewards(r) for r in results}
        base = next(rewards[r.run.name] for r in results if r.run.method == REFERENCE)
        for number, tested in enumerate(FAMILIES):
            for method in METHODS:
                by_origin: dict[str, list[Policy]] = {"home": [], "away": []}
                for r in results:
                    if r.run.method == method:
                        where = "home" if r.run.settings["family"] == tested else "away"
                        by_origin[where].append(policy(r, number, rewards[r.run.name][number], base[number]))
                for at in EQUAL_KL:
                    gains = {where: gains_at_kl(of, at) for where, of in by_origin.items()}
                    values = {where: mean_gain(of, seed=seed) for where, of in gains.items()}
                    lost = gain_lost(gains["home"], gains["away"], seed=seed)
                    found.append({"tested": tested, "method": method, "kl": at, **values, "lost": lost})
                for where, of in by_origin.items():
                    name = f"{method}, trained on {'the same' if where == 'home' else 'the other'}"
                    panel = f"tested on {', '.join(self.families[tested].topics)}"
                    curves.append(Curve(panel, name, plot_points(of, seed=seed), np.empty(0), np.empty(0)))
        return {"families": {name: list(f.topics) for name, f in self.families.items()}, "gains": found}, curves

    def _rewards(self, result: Result) -> list[list[float]]:
        """True rewards of a policy on the prompts of each family."""
        rows = read_prompts(self.setup.folder / "runs" / result.run.name, len(FAMILIES))
        return [row["reward"] for row in rows]

    def tables(self, summary: Mapping[str, Any]) -> list[Grid]:
        """The printed tables."""
        found = []
        for tested, topics in summary["families"].items():
            for at in EQUAL_KL:
                mine = [row for row in summary["gains"] if row["tested"] == tested and row["kl"] == at]
                rows = [[row["method"], *(cell(row[name]) for name in ("home", "away", "lost"))] for row in mine]
                caption = f"tested on {', '.join(topics)}: gain at KL {at:g}"
                found.append(Grid(caption, ["trained on the same", "trained on the other", "lost by the shift"], rows))
        note = (
            "gain in true reward over the reference, 95 % interval over prompts and seeds; differences are paired by both; "
            "of the policies measured the best counts, chosen on the same prompts"
        )
        return [*found[:-1], found[-1]._replace(note=note)]


class Family:
    """Prompts about some topics, and what is learned from pairs on them. Made when a run first needs it."""

    def __init__(self, setup: Setup, world: World, name: str, topics: Sequence[str]) -> None:
        self.setup, self.name, self.topics = setup, name, topics
        train, test = (prompts_of(setup.config, n, world.tokenizer, topics=topics) for n in ("prompts", "test_prompts"))
        self.world = world.with_prompts(train=train, test=test)

    @functools.cached_property
    def pairs(self) -> Sequence[Encoded]:
        return self.setup.labeled(self.world, self.name)

    @functools.cached_property
    def dpo(self) -> PairMethod:
        return self.setup.method(self.world, self.setup.data(self.world, self.pairs), dpo_loss)

    @functools.cached_property
    def learned_reward(self) -> Reward:
        return self.setup.reward_model(self.world, self.pairs, self.name)

    @functools.cached_property
    def ppo(self) -> PpoMethod:
        return self.setup.ppo(self.world)


def _by_dpo(experiment: Experiment, run: Run, folder: Path, measure: Measure) -> Trained:
    family = experiment.families[run.settings["family"]]
    with experiment.setup.making:
        method = family.dpo
    settings = {"beta": run.settings["beta"]}
    points, variables = method.train(folder, settings=settings, evaluations=1, seed=run.seed, measure=measure)
    return points[-1], variables


def _by_ppo(experiment: Experiment, run: Run, folder: Path, measure: Measure) -> Trained:
    family = experiment.families[run.settings["family"]]
    with experiment.setup.making:
        method, reward = family.ppo, family.learned_reward
    points, variables = experiment.setup.train_ppo(method, run, folder, reward, evaluations=1, measure=measure)
    return points[-1], variables


METHODS: Mapping[str, Callable[[Experiment, Run, Path, Measure], Trained]] = {"dpo": _by_dpo, "ppo": _by_ppo}
