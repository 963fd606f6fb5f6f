"""A Bradley-Terry reward model learned from a world's pairs, as a reward that PPO can be given."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import in_order, plan_layout, stream, total_steps
from dpo_jax.evals.rewards import Reward, learned
from dpo_jax.lab.world import World
from dpo_jax.reward import HEAD, centred, completion_rewards, reward_step, scalar_head, with_scalar_head
from dpo_jax.runtime.fit import fit
from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.step import init_state
from dpo_jax.types import TrainState

HELD_OUT = 10  # one pair in this many judges the reward model


def learn_reward(
    world: World,
    pairs: Sequence[Encoded],
    folder: Path,
    *,
    tx: optax.GradientTransformation,
    batch: int,
    epochs: float,
    evaluations: int,
    seed: int,
) -> tuple[Reward, dict[str, float]]:
    """The reward of the state with the lowest held-out loss, with mean 0 over the reference's completions, and its figures.

    Whole prompts are held out: pairs of one prompt share their completions.
    """
    partitioner, model = world.partitioner, with_scalar_head(world.model)
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt.tobytes() for pair in pairs))}
    held_out = [pair for pair in pairs if order[pair.prompt.tobytes()] % HELD_OUT == 0]
    learnt = [pair for pair in pairs if order[pair.prompt.tobytes()] % HELD_OUT]
    layout = plan_layout(pairs, kind="plain", batch=batch, multiple=2 * partitioner.row_shards)
    score = partitioner.compile_map(functools.partial(completion_rewards, model))
    best: dict[str, Any] = {"loss": math.inf}

    def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
        batches = in_order(held_out, layout=layout, batch=batch, part=partitioner.host_part)
        rewards = np.concatenate(
            [score(state.variables, one.rows).reshape(-1, 2)[: len(indices)] for indices, one in batches]
        ).astype(np.float64)
        margins = rewards[:, 0] - rewards[:, 1]
        figures = {"loss": float(np.logaddexp(0, -margins).mean()), "accuracy": float((margins > 0).mean())}
        if figures["loss"] < best["loss"]:
            best.update(figures, step=done, variables=partitioner.to_host(state.variables))
        return figures

    start = {**partitioner.to_host(world.reference), HEAD: jax.device_get(scalar_head(model.config.width))}
    steps = total_steps(len(learnt), batch=batch, epochs=epochs)
    with MetricsLog(folder / "metrics.jsonl") as log:
        fit(
            partitioner.compile_step(functools.partial(reward_step, model=model, tx=tx, axis_name=partitioner.axis_name)),
            partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.put_variables(start)),
            stream(learnt, layout=layout, batch=batch, seed=seed, epochs=epochs, part=partitioner.host_part),
            total_steps=steps,
            log=log,
            evaluate=evaluate,
            eval_every=max(1, math.ceil(steps / evaluations)),
            get_state=partitioner.get_state,
        )
    variables = best.pop("variables")
    prompts = world.train.ids[: 4 * world.batch]
    drawn = world.complete(world.reference, prompts, jax.random.key(seed))
    of_reference = world.over(score, partitioner.put_variables(variables), prompts, drawn.ids)
    placed = partitioner.put_variables(centred(variables, of_reference))
    reward = learned(functools.partial(score, placed), world.tokenizer, length=world.width, batch=world.batch)
    return reward, {**best, "pairs": float(len(learnt)), "held_out": float(len(held_out))}
