"""A policy trained by PPO in a world: rollouts, their rewards on the host, and a KL coefficient that seeks its target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dpo_jax.data.tokenizer import decode_completion
from dpo_jax.evals.rewards import Reward
from dpo_jax.lab.world import Points, World
from dpo_jax.ppo import (
    ScoreStats,
    advantages,
    collect,
    completion_ids,
    minibatches,
    next_kl_coef,
    normalised,
    observe,
    ppo_step,
    prompt_batch,
)
from dpo_jax.reward import HEAD, scalar_head, with_scalar_head
from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.progress import reported
from dpo_jax.types import TrainState, Variables


class PpoOptions(NamedTuple):
    """Sizes of a run, and the constants of the algorithm (the names of `dpo_jax.ppo`)."""

    iterations: int  # rollouts
    batch: int  # completions of a rollout
    epochs: int
    minibatches: int
    microbatches: int
    horizon: int  # completions within which the coefficient can change by a fifth
    clip: float
    value_clip: float
    value_weight: float
    gamma: float
    lam: float


class PpoMethod:
    """PPO in a world. Reward and target KL are not part of its programs: runs that differ in them share these."""

    def __init__(self, world: World, *, tx: optax.GradientTransformation, options: PpoOptions) -> None:
        self.world, self.tx, self.options = world, tx, options
        self.model = with_scalar_head(world.model)
        self.step = world.partitioner.compile_step(
            functools.partial(
                ppo_step,
                model=self.model,
                tx=tx,
                clip=options.clip,
                value_clip=options.value_clip,
                value_weight=options.value_weight,
                microbatches=options.microbatches,
                axis_name=world.partitioner.axis_name,
            )
        )
        sampling = {"max_new_tokens": world.max_new_tokens, "eos_id": world.stop_ids}
        self.collect = world.partitioner.compile_map(functools.partial(collect, self.model, **sampling))
        self.advantages = jax.jit(functools.partial(advantages, gamma=options.gamma, lam=options.lam))

    def train(
        self,
        folder: Path,
        *,
        reward: Reward,
        target_kl: float,
        kl_coef: float,
        evaluations: int,
        seed: int,
        say: Callable[[str], None] = lambda line: None,
    ) -> tuple[Points, Variables]:
        """`evaluations` points of a run from the reference, equally far apart, and the final policy's variables on the host.

        `target_kl` is in nats a completion. `kl_coef`, at the start: rewards are normalised, so its unit is their standard
        deviation a nat. Also leaves `metrics.jsonl` in `folder`. `say` is given a line for each point.
        """
        o, world, partitioner = self.options, self.world, self.world.partitioner
        state, rng, key = self._begin(), np.random.default_rng(seed), jax.random.key(seed)
        stats, taken, points = ScoreStats(), 0, Points()
        every = max(1, math.ceil(o.iterations / evaluations))
        rollouts = reported("PPO", total=o.iterations, unit="rollouts", brief=True)
        with MetricsLog(folder / "metrics.jsonl") as log, rollouts as task:
            for iteration in range(o.iterations):
                chosen = rng.choice(len(world.train.ids), o.batch, replace=len(world.train.ids) < o.batch)
                prompts = prompt_batch(
                    [world.train.ids[i] for i in chosen],
                    jax.random.fold_in(key, iteration),
                    length=world.width - world.max_new_tokens,
                )
                collected = self.collect((state.variables, world.reference), prompts)
                texts = [
                    decode_completion(world.tokenizer, world.train.ids[i], ids, stop_ids=world.stop_ids)
                    for i, ids in zip(chosen, completion_ids(collected.rows), strict=True)
                ]
                scores = reward([world.train.texts[i] for i in chosen], texts)
                stats = observe(stats, scores)
                normal = normalised(stats, scores).astype(np.float32)
                rollout, health = self.advantages(collected, normal, kl_coef=np.float32(kl_coef))
                metrics: dict[str, Any] = {}
                for _ in range(o.epochs):
                    for part in minibatches(rollout, size=o.batch // o.minibatches, rng=rng, part=partitioner.host_part):
                        state, metrics = self.step(state, part)
                        taken += 1
                log.write(
                    {
                        "step": taken,
                        **{f"rollout/{name}": float(value) for name, value in health.items()},
                        **{name: float(value) for name, value in metrics.items()},
                        "rollout/reward": float(np.mean(scores)),
                        "kl_coef": kl_coef,
                    }
                )
                kl = float(health["kl"])
                task.advance(note=f"reward {np.mean(scores):.2f}, KL {kl:.2f} nats")
                kl_coef = next_kl_coef(kl_coef, kl=kl, target=target_kl, horizon=o.horizon, samples=o.batch)
                if (iteration + 1) % every == 0 or iteration + 1 == o.iterations:
                    points.append({"step": float(taken), **world.measure(_policy(state))})
                    log.write(
                        {"step": taken, **{f"eval/{name}": value for name, value in points[-1].items() if name != "step"}}
                    )
                    reached = f"reward {points[-1]['reward']:.2f} at KL {points[-1]['kl']:.2f} nats"
                    say(f"rollout {iteration + 1}/{o.iterations}: {reached}")
        return points, partitioner.to_host(_policy(state))

    def _begin(self) -> TrainState:
        partitioner, head = self.world.partitioner, scalar_head(self.model.config.width)
        start = {**partitioner.to_host(self.world.reference), HEAD: jax.device_get(head)}
        return partitioner.init_state(functools.partial(self.world.begin, tx=self.tx), partitioner.put_variables(start))


def _policy(state: TrainState) -> Variables:
    return {name: collection for name, collection in state.variables.items() if name != HEAD}
