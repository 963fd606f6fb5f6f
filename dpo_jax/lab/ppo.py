"""A policy trained by PPO in a world: rollouts, their rewards on the host, and a KL coefficient that seeks its target."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dpo_jax.data.tokenizer import decode_completion
from dpo_jax.evals.reward_functions import Reward
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
from dpo_jax.reward_model import HEAD, scalar_head, with_scalar_head
from dpo_jax.runtime.fit import fit
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


class PpoState(NamedTuple):
    """What PPO carries from rollout to rollout. `step` counts these, `train.step` the optimizer steps."""

    step: int
    train: TrainState
    kl_coef: float
    stats: ScoreStats  # of all rewards so far


class Draw(NamedTuple):
    """The random choices of a rollout: which prompts, and in which order its rows are learnt from."""

    prompts: np.ndarray  # int64[B]
    orders: np.random.Generator


def _draws(prompts: int, *, size: int, epochs: int, seed: int) -> Callable[[int], Draw]:
    """`draw(i) -> Draw` of rollout `i`, a pure function of `i` that is quick when asked in order."""
    drawn, rng = 0, np.random.default_rng(seed)

    def draw(number: int) -> Draw:
        nonlocal drawn, rng
        if number < drawn:
            drawn, rng = 0, np.random.default_rng(seed)
        while True:
            chosen = rng.choice(prompts, size, replace=prompts < size)
            orders = copy.deepcopy(rng)
            for _ in range(epochs):  # as `minibatches` will
                rng.permutation(size)
            drawn += 1
            if drawn > number:
                return Draw(chosen, orders)

    return draw


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
        measure: Callable[[Variables], dict[str, float]] | None = None,
    ) -> tuple[Points, Variables]:
        """`evaluations` points of a run from the reference, equally far apart, and the final policy's variables on the host.

        `target_kl` is in nats a completion. `kl_coef`, at the start: rewards are normalised, so its unit is their standard
        deviation a nat. Also leaves `metrics.jsonl` in `folder`, with a row for each rollout. `say` is given a line for each
        point, which `measure` (default: `World.measure`) makes of a policy. Raises `NonFinite` for a loss that is not.
        """
        o, world, partitioner = self.options, self.world, self.world.partitioner
        points = Points()

        def evaluate(state: PpoState, done: int) -> Mapping[str, float]:
            measured = (measure or world.measure)(_policy(state.train))
            points.append({"step": float(done * o.epochs * o.minibatches), **measured})
            say(f"rollout {done}/{o.iterations}: reward {measured['reward']:.2f} at KL {measured['kl']:.2f} nats")
            return measured

        rollouts = reported("PPO", total=o.iterations, unit="rollouts", brief=True)
        with MetricsLog(folder / "metrics.jsonl") as log, rollouts as task:
            state = fit(
                functools.partial(self._rollout, reward=reward, target_kl=target_kl, key=jax.random.key(seed)),
                PpoState(0, self._begin(), kl_coef, ScoreStats()),
                _draws(len(world.train.ids), size=o.batch, epochs=o.epochs, seed=seed),
                total_steps=o.iterations,
                log=log,
                evaluate=evaluate,
                eval_every=max(1, math.ceil(o.iterations / evaluations)),
                check=lambda step, row: task.advance(
                    note="reward {rollout/reward:.2f}, KL {rollout/kl:.2f} nats".format(**row)
                ),
            )
        return points, partitioner.to_host(_policy(state.train))

    def _rollout(
        self, state: PpoState, draw: Draw, *, reward: Reward, target_kl: float, key: jax.Array
    ) -> tuple[PpoState, dict[str, Any]]:
        """Samples completions, scores them, and takes some epochs of optimizer steps on them."""
        o, world = self.options, self.world
        ids, texts = ([side[i] for i in draw.prompts] for side in (world.train.ids, world.train.texts))
        prompts = prompt_batch(ids, jax.random.fold_in(key, state.step), length=world.width - world.max_new_tokens)
        collected = self.collect((state.train.variables, world.reference), prompts)
        completions = [
            decode_completion(world.tokenizer, prompt, completion, stop_ids=world.stop_ids)
            for prompt, completion in zip(ids, completion_ids(collected.rows), strict=True)
        ]
        scores = reward(texts, completions)
        stats = observe(state.stats, scores)
        normal = normalised(stats, scores).astype(np.float32)
        rollout, health = self.advantages(collected, normal, kl_coef=np.float32(state.kl_coef))
        rng, size, part = copy.deepcopy(draw.orders), o.batch // o.minibatches, world.partitioner.host_part
        train, metrics = state.train, {}
        for _ in range(o.epochs):
            for rows in minibatches(rollout, size=size, rng=rng, part=part):
                train, metrics = self.step(train, rows)
        row = {
            **{f"rollout/{name}": value for name, value in health.items()},
            **metrics,
            "rollout/reward": np.mean(scores),
            "kl_coef": state.kl_coef,
        }
        kl_coef = next_kl_coef(state.kl_coef, kl=float(health["kl"]), target=target_kl, horizon=o.horizon, samples=o.batch)
        return PpoState(state.step + 1, train, kl_coef, stats), row

    def _begin(self) -> TrainState:
        partitioner, head = self.world.partitioner, scalar_head(self.model.config.width)
        start = {**partitioner.to_host(self.world.reference), HEAD: jax.device_get(head)}
        return partitioner.init_state(functools.partial(self.world.begin, tx=self.tx), partitioner.put_variables(start))


def _policy(state: TrainState) -> Variables:
    return {name: collection for name, collection in state.variables.items() if name != HEAD}
