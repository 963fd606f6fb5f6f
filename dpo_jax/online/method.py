"""Online DPO as a method of a sweep: the rounds of one run in its folder, and its measurements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optax

from dpo_jax.dpo import dpo_step
from dpo_jax.lab.world import Points, World, copy_of
from dpo_jax.losses import PreferenceLoss
from dpo_jax.online.labels import LabelLog
from dpo_jax.online.rounds import RoundOptions, Rounds
from dpo_jax.runtime import hosts
from dpo_jax.runtime.fit import Evaluation, fit
from dpo_jax.types import TrainState, Variables

Keep = Callable[[dict[str, float], Variables], None]
"""Callback (point of a run, its policy on the devices): may save the policy and add to the point."""


def _quiet(line: str) -> None:
    """Suppresses the output of rounds: the sweep prints a line for each run."""


class OnlineMethod:
    """Online runs that differ only in beta, seed and elicitation, so that the step is compiled once.

    `loss` takes per-pair inputs by keyword (`RoundOptions`). The reference is the world's. Unlike `dpo-jax online` a run has no
    checkpoints: an interrupted run begins again.
    """

    def __init__(self, world: World, *, loss: PreferenceLoss, tx: optax.GradientTransformation, microbatches: int = 1) -> None:
        self.world, self.tx = world, tx
        options = {"model": world.model, "tx": tx, "loss": loss, "microbatches": microbatches}
        step = functools.partial(dpo_step, **options, axis_name=world.partitioner.axis_name)
        self.step = world.partitioner.compile_step(step)

    def train(
        self, folder: Path, options: RoundOptions, *, settings: Mapping[str, Any], evaluations: int, keep: Keep
    ) -> tuple[Points, Variables]:
        """About `evaluations` points of a run of `options.rounds` rounds, each with the `labels` used so far, and the final
        variables on the host. `settings`: JSON values that the files of the rounds depend on. Also writes `metrics.jsonl`."""
        world, partitioner, points = self.world, self.world.partitioner, []
        log = LabelLog(folder / "labels.jsonl", settings)
        rounds = Rounds(world, folder, options, log=log, settings=settings, start="reference", reward=world.reward, say=_quiet)

        def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
            labels = float(log.total((done - 1) // options.steps))
            measured = world.measure(state.variables)
            # It decides which policy is kept, and all hosts must save the same one.
            points.append(hosts.run_on_first(lambda: {"step": float(done), **measured, "labels": labels}))
            keep(points[-1], state.variables)
            return points[-1]

        def refresh(state: TrainState, done: int) -> None:
            rounds.update(done, state.variables, f"step {done}")

        rounds.begin(world.reference)
        with hosts.metrics_log(folder / "metrics.jsonl") as metrics:
            state = fit(
                self.step,
                partitioner.init_state(functools.partial(world.begin, tx=self.tx), copy_of(world.reference)),
                rounds.batch,
                total_steps=options.rounds * options.steps,
                log=metrics,
                evaluation=Evaluation(evaluate, every=options.steps * max(1, math.ceil(options.rounds / evaluations))),
                refresh=refresh,
                refresh_every=options.steps,
                get_state=partitioner.get_state,
                agree=hosts.agreement(),
            )
        return points, partitioner.to_host(state.variables)
