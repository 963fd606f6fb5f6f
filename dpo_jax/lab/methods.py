"""Trains a policy from pairs by each method of the paper's section 6.1, from the same reference, with regular measurements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from dpo_jax.data.encode import Encoded
from dpo_jax.data.groups import PairGroup, group_pairs
from dpo_jax.data.layout import Layout
from dpo_jax.data.loader import eval_batches, plan_layout, skippable, total_steps, train_batches
from dpo_jax.dpo import dpo_step
from dpo_jax.lab.world import Points, TrainingWorld, copy_of
from dpo_jax.reference import reference_logps
from dpo_jax.runtime import hosts
from dpo_jax.runtime.fit import Evaluation, fit
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Metrics, Partitioner, Rows, TrainState, Variables

SETTINGS = "settings"
"""Non-trained collection of the state that holds a method's settings."""


class PairData(NamedTuple):
    """Preference pairs with the reference's log-probabilities: the data of every method but PPO and Best-of-N."""

    groups: Sequence[PairGroup]
    ref_logps: np.ndarray  # float32[groups, pairs, 2]
    layout: Layout
    batch: int  # groups a step
    microbatches: int

    def steps(self, epochs: float) -> int:
        return total_steps(len(self.groups), batch=self.batch, epochs=epochs)


def pair_data(world: TrainingWorld, pairs: Sequence[Encoded], *, batch: int, microbatches: int = 1) -> PairData:
    """`pairs` grouped by prompt, about `batch` of them a step, in whole prompts."""
    return grouped_data(world, group_pairs(pairs), batch=batch, microbatches=microbatches)


def grouped_data(
    world: TrainingWorld, groups: Sequence[PairGroup], *, batch: int, microbatches: int = 1, largest: Sequence[PairGroup] = ()
) -> PairData:
    """Pairs that are already grouped, about `batch` of them a step, in whole groups. Shapes also fit groups like `largest`."""
    several = max(1, round(batch * len(groups) / sum(len(group.pairs) for group in groups)))
    # Few shapes: with as many as in a long run, a short run would spend much of its time compiling.
    parts = row_parts(world.partitioner, microbatches)
    layout = plan_layout([*groups, *largest], kind="packed", batch=several, shapes=2, **parts)
    return in_layout(world, PairData(groups, np.zeros(0, np.float32), layout, several, microbatches), groups)


def in_layout(world: TrainingWorld, like: PairData, groups: Sequence[PairGroup]) -> PairData:
    """`groups` with the reference's log-probabilities, in the shapes of `like`."""
    layout, several = like.layout, like.batch
    score = world.partitioner.compile_map(functools.partial(reference_logps, world.model))
    ref_logps = np.zeros((len(groups), layout.pairs, 2), np.float32)
    for batched in eval_batches(groups, layout=layout, batch=several, part=world.partitioner.host_part):
        numbers, found = batched.of_examples(score(world.reference, batched.rows))
        ref_logps.reshape(-1, 2)[numbers] = found
    return like._replace(groups=groups, ref_logps=ref_logps)


def row_parts(partitioner: Partitioner, microbatches: int) -> dict[str, int]:
    """Arguments of `plan_layout` for the parts into which a batch is cut."""
    shards = partitioner.row_shards
    return {"multiple": shards * microbatches, "microbatches": skippable(microbatches, shards)}


class PairMethod:
    """DPO, IPO, unlikelihood or Preferred-FT on the pairs of a world: `dpo_step` with their loss.

    `loss(logps, ref_logps, **settings)`. The settings (beta, alpha) are inputs of the program, so it is compiled once for all
    of them. Compiling it for each would take as long as a quarter of a short run.
    """

    def __init__(
        self, world: TrainingWorld, data: PairData, *, loss: Callable[..., Any], tx: optax.GradientTransformation, epochs: float
    ) -> None:
        self.world, self.data, self.tx, self.epochs = world, data, tx, epochs
        step = functools.partial(
            _step,
            model=world.model,
            tx=tx,
            loss=loss,
            microbatches=data.microbatches,
            axis_name=world.partitioner.axis_name,
        )
        self.step = world.partitioner.compile_step(step)

    def start(self, settings: Mapping[str, float]) -> TrainState:
        """The state before the first step, from the reference."""
        world, partitioner = self.world, self.world.partitioner

        def begin(variables: Variables) -> TrainState:
            state = world.begin(variables, tx=self.tx)
            return state.replace(frozen={**state.frozen, SETTINGS: {k: np.float32(v) for k, v in settings.items()}})

        return partitioner.init_state(begin, copy_of(world.reference))

    def train(
        self,
        folder: Path,
        *,
        settings: Mapping[str, float],
        evaluations: int,
        seed: int,
        data: PairData | None = None,
        measure: Callable[[Variables], dict[str, float]] | None = None,
    ) -> tuple[Points, Variables]:
        """`evaluations` equally spaced points of a run from the reference, and the final variables on the host.

        `data` replaces the method's pairs by others of the same shapes, such as the same pairs with other labels. `measure`
        (default: `World.measure`) measures a policy. Also writes `metrics.jsonl` to `folder`.
        """
        world, partitioner = self.world, self.world.partitioner
        data, measure = data or self.data, measure or world.measure
        steps = data.steps(self.epochs)
        points: Points = []

        def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
            points.append({"step": float(done), **measure(policy_of(state))})
            return points[-1]

        steps_of_run = reported("training", total=steps, unit="steps", brief=True)
        with hosts.metrics_log(folder / "metrics.jsonl") as log, steps_of_run as task:
            state = fit(
                self.step,
                self.start(settings),
                train_batches(
                    data.groups,
                    layout=data.layout,
                    batch=data.batch,
                    seed=seed,
                    epochs=self.epochs,
                    ref_logps=data.ref_logps,
                    part=partitioner.host_part,
                ),
                total_steps=steps,
                log=log,
                evaluation=Evaluation(evaluate, every=max(1, math.ceil(steps / evaluations))),
                check=lambda step, metrics: task.advance(note="loss {loss:.4f}".format(**metrics)),
                get_state=partitioner.get_state,
                agree=hosts.agreement(),
            )
        return points, partitioner.to_host(policy_of(state))


def policy_of(state: TrainState) -> Variables:
    """The model's variables in a state of `PairMethod`."""
    return {name: collection for name, collection in state.variables.items() if name != SETTINGS}


def _step(state: TrainState, rows: Rows, *, loss: Callable[..., Any], **options: Any) -> tuple[TrainState, Metrics]:
    return dpo_step(state, rows, loss=functools.partial(loss, **state.frozen[SETTINGS]), **options)
