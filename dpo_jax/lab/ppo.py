"""PPO training of a policy in a world: rollouts, rewards computed on the host, and an adaptive KL coefficient.

A step of the training loop is a rollout. The next rollout depends only on the state, a `PpoState`, and its own number.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dpo_jax.data.loader import round_up
from dpo_jax.data.tokenizer import decode_completion
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.world import Points, World
from dpo_jax.ppo import (
    Collected,
    Prompts,
    ScoreStats,
    advantages,
    collect,
    completion_ids,
    minibatches,
    next_kl_coef,
    normalize_scores,
    observe,
    ppo_step,
    prompt_batch,
)
from dpo_jax.reward_model import HEAD, scalar_head, with_scalar_head
from dpo_jax.runtime import hosts
from dpo_jax.runtime.fit import Evaluation, fit
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.training.run import train
from dpo_jax.types import Array, Partitioner, TrainState, Variables


class PpoOptions(NamedTuple):
    """Sizes of a run, and the constants of the algorithm (the names of `dpo_jax.ppo`)."""

    iterations: int  # rollouts
    batch: int  # completions of a rollout
    epochs: int
    minibatches: int
    microbatches: int
    horizon: int  # completions in which the coefficient can change by a fifth
    clip: float
    value_clip: float
    value_weight: float
    gamma: float
    lam: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoState:
    """PPO state carried from rollout to rollout. `step` counts rollouts, `train.step` optimizer steps.

    Only `train` is on the devices. The rest stays on the host as float64 numpy arrays, which JAX would round.
    """

    step: Array  # int64[]
    train: TrainState
    kl_coef: Array  # float64[]
    stats: ScoreStats  # of all rewards so far, float64[] each

    @classmethod
    def of(cls, step: int, train: TrainState, kl_coef: float, stats: ScoreStats) -> PpoState:
        """A `PpoState` from plain numbers."""
        wide = functools.partial(np.array, dtype=np.float64)
        return cls(np.array(step, np.int64), train, wide(kl_coef), jax.tree.map(wide, stats))

    @property
    def frozen(self) -> Variables:
        """The variables that are not trained and not in checkpoints."""
        return self.train.frozen

    def replace(self, *, frozen: Variables) -> PpoState:
        return dataclasses.replace(self, train=self.train.replace(frozen=frozen))


def _placing(partitioner: Partitioner) -> Partitioner:
    """`partitioner` for a `PpoState`: places the trained part on devices and leaves the rest on the host."""

    def get_state(state: Any) -> Any:
        """Works on a whole state, and on `state.step` alone."""
        if not isinstance(state, PpoState):
            return state
        return dataclasses.replace(state, train=partitioner.get_state(state.train))

    def put_state(state: Any) -> Any:
        return dataclasses.replace(state, train=partitioner.put_state(state.train))

    def saved_shapes(state: Any) -> Any:
        rest = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dataclasses.replace(state, train=None))
        return dataclasses.replace(rest, train=partitioner.saved_shapes(state.train))

    return partitioner._replace(get_state=get_state, saved_shapes=saved_shapes, put_state=put_state)


class Draw(NamedTuple):
    """The random choices of a rollout: its prompts, and the order in which its rows are trained on."""

    prompts: np.ndarray  # int64[B]
    orders: np.random.Generator


def _draws(prompts: int, *, size: int, epochs: int, seed: int) -> Callable[[int], Draw]:
    """`draw(i) -> Draw` of rollout `i`: a pure function of `i`, fast when called in order."""
    drawn, rng = 0, np.random.default_rng(seed)

    def draw(number: int) -> Draw:
        nonlocal drawn, rng
        if number < drawn:
            drawn, rng = 0, np.random.default_rng(seed)
        while True:
            chosen = rng.choice(prompts, size, replace=prompts < size)
            orders = copy.deepcopy(rng)
            for _ in range(epochs):  # as `minibatches` does
                rng.permutation(size)
            drawn += 1
            if drawn > number:
                return Draw(chosen, orders)

    return draw


def collect_in_parts(
    compiled: Callable[[Any, Prompts], Collected],
    variables: Any,
    prompts: Prompts,
    *,
    size: int,
    host_part: tuple[int, int] = (0, 1),
) -> Collected:
    """Runs a compiled `collect`, `compiled(variables, prompts)`, on `size` rows at a time: a large rollout would not fit.

    Every part has the same number of rows: the last one is padded with the first rows. Samples equal those of a single call,
    because each row has its own key. `compiled` takes the rows of this host (`Partitioner.host_part`) and returns all rows.
    """
    rows, (host, of) = len(prompts.lengths), host_part
    parts = -(-rows // size)
    filled = np.resize(np.arange(rows), parts * size)
    found = []
    for members in np.split(filled, parts):
        mine = members[host * size // of : (host + 1) * size // of]
        found.append(compiled(variables, Prompts(*(np.asarray(leaf)[mine] for leaf in prompts))))
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:rows], *found)
    return dataclasses.replace(whole, rows=whole.rows.replace(index=np.arange(rows, dtype=np.int32)))


class PpoMethod:
    """PPO in a world. Reward and target KL are not compiled in: runs that differ in them share the programs."""

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
        folder: Path | RunDir,
        *,
        reward: Reward,
        target_kl: float,
        kl_coef: float,
        evaluations: int,
        seed: int,
        say: Callable[[str], None] = lambda line: None,
        measure: Callable[[Variables], dict[str, float]] | None = None,
        resumable: Mapping[str, Any] | None = None,
    ) -> tuple[Points, Variables]:
        """`evaluations` equally spaced points of a run from the reference, and the final policy's variables on the host.

        `target_kl` is in nats a completion. `kl_coef` is the initial coefficient; rewards are normalized, so its unit is their
        standard deviation per nat. Also writes `metrics.jsonl` to `folder`, with a row for each rollout. `say` gets a line for
        each point; `measure` (default: `World.measure`) measures a policy. Raises `NonFinite` for a non-finite loss.

        `resumable` are options of `training.run.train`, at least a `fingerprint` that covers the arguments above. With them a
        killed run in `folder` continues, and ends bit for bit the same. Without them no checkpoint is saved.
        """
        o, world, partitioner = self.options, self.world, _placing(self.world.partitioner)
        log_file = folder.metrics if isinstance(folder, RunDir) else folder / "metrics.jsonl"

        def evaluate(state: PpoState, done: int) -> Mapping[str, float]:
            measured = (measure or world.measure)(_policy(state.train))
            say(f"rollout {done}/{o.iterations}: reward {measured['reward']:.2f} at KL {measured['kl']:.2f} nats")
            return measured

        step = functools.partial(self._rollout, reward=reward, target_kl=target_kl, key=jax.random.key(seed))
        state = PpoState.of(0, self._begin(), kl_coef, ScoreStats())
        draws = _draws(len(world.train.ids), size=o.batch, epochs=o.epochs, seed=seed)
        evaluation = Evaluation(evaluate, every=max(1, math.ceil(o.iterations / evaluations)))
        with reported("PPO", total=o.iterations, unit="rollouts", brief=True) as task:
            done = 0

            def check(step: int, row: Mapping[str, float]) -> None:
                nonlocal done
                task.advance(step + 1 - done, note="reward {rollout/reward:.2f}, KL {rollout/kl:.2f} nats".format(**row))
                done = step + 1

            options: dict[str, Any] = {"total_steps": o.iterations, "evaluation": evaluation, "check": check}
            if resumable is None:
                with hosts.metrics_log(log_file) as log:
                    of_hosts = {"get_state": partitioner.get_state, "agree": hosts.agreement()}
                    state = fit(step, state, draws, log=log, **of_hosts, **options)
            else:
                state = train(step, state, draws, folder=folder, partitioner=partitioner, say=say, **options, **resumable)
        return self._points(log_file), partitioner.to_host(_policy(state.train))

    def _points(self, log_file: Path) -> Points:
        """All points, read from the log: some may have been measured before an interruption."""
        points, each = Points(), self.options.epochs * self.options.minibatches
        for row in hosts.run_on_first(lambda: list(filter(is_evaluation, read_metrics(log_file)))):
            measured = {name.removeprefix("eval/"): value for name, value in row.items() if name != "step"}
            points.append({"step": float(row["step"] * each), **measured})
        return points

    def _rollout(
        self, state: PpoState, draw: Draw, *, reward: Reward, target_kl: float, key: jax.Array
    ) -> tuple[PpoState, dict[str, Any]]:
        """Samples completions, scores them, and takes some epochs of optimizer steps on them."""
        o, world = self.options, self.world
        ids, texts = ([side[i] for i in draw.prompts] for side in (world.train.ids, world.train.texts))
        number, kl_coef = int(state.step), float(state.kl_coef)
        prompts = prompt_batch(ids, jax.random.fold_in(key, number), length=world.width - world.max_new_tokens)
        at_once = round_up(min(world.batch, o.batch), world.partitioner.row_shards)
        both, part = (state.train.variables, world.reference), world.partitioner.host_part
        collected = collect_in_parts(self.collect, both, prompts, size=at_once, host_part=part)
        completions = [
            decode_completion(world.tokenizer, prompt, completion, stop_ids=world.stop_ids)
            for prompt, completion in zip(ids, completion_ids(collected.rows), strict=True)
        ]
        scores = hosts.from_first(np.asarray(reward(texts, completions)))  # other hosts may round differently
        stats = observe(ScoreStats(*map(float, state.stats)), scores)
        normal = normalize_scores(stats, scores).astype(np.float32)
        rollout, health = self.advantages(collected, normal, kl_coef=np.float32(kl_coef))
        rng, size = copy.deepcopy(draw.orders), o.batch // o.minibatches
        trained, metrics = state.train, {}
        for _ in range(o.epochs):
            for rows in minibatches(rollout, size=size, rng=rng, part=part):
                trained, metrics = self.step(trained, rows)
        row = {
            **{f"rollout/{name}": value for name, value in health.items()},
            **metrics,
            "rollout/reward": np.mean(scores),
            "kl_coef": kl_coef,
        }
        moved = next_kl_coef(kl_coef, kl=float(health["kl"]), target=target_kl, horizon=o.horizon, samples=o.batch)
        return PpoState.of(number + 1, trained, moved, stats), row

    def _begin(self) -> TrainState:
        partitioner, head = self.world.partitioner, scalar_head(self.model.config.width)
        start = {**partitioner.to_host(self.world.reference), HEAD: jax.device_get(head)}
        return partitioner.init_state(functools.partial(self.world.begin, tx=self.tx), partitioner.put_variables(start))


def _policy(state: TrainState) -> Variables:
    return {name: collection for name, collection in state.variables.items() if name != HEAD}
