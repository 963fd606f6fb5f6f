"""SFT, CPL, P-IQL and percent-BC on preferences between segments, with the same policy network and number of policy updates.

A method is a function `(learner, preferences, kind, seed, folder) -> points`, with a line in `METHODS`. The points are the
evaluations during training; metrics of all steps are written to `folder`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.control.iql import Critics, iql_step, reward_of, segment_reward_step
from dpo_jax.control.policies import Network, gaussian_policy
from dpo_jax.control.rollouts import Kind, Preferences, World, best_segments, draws
from dpo_jax.cpl import bc_step, cpl_step
from dpo_jax.runtime.fit import Evaluation, fit
from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.step import init_state
from dpo_jax.types import Partitioner, TrainState, Variables

Points = list[dict[str, Any]]


class Options(NamedTuple):
    """Training settings. Steps are optimizer steps; batch sizes count pairs of segments, or transitions."""

    hidden: tuple[int, ...] = (64, 64)
    std: float | None = 0.7  # of the policy; None: learned
    alpha: float = 0.1
    lam: float = 0.5
    lr: float = 1e-3
    sft_steps: int = 1000
    steps: int = 3000
    reward_steps: int = 1000
    pairs: int = 64
    transitions: int = 512
    expectile: float = 0.7
    beta: float = 3.0
    share: float = 0.1
    evaluations: int = 5


class Learner:
    """An environment, a policy for it, and the compiled steps shared by all runs."""

    def __init__(self, world: World, options: Options, partitioner: Partitioner) -> None:
        self.world, self.options, self.partitioner = world, options, partitioner
        self.policy = gaussian_policy([world.state], world.actions, hidden=options.hidden, bound=world.bound, std=options.std)
        # P-IQL's networks have the size of the policy; with an affine policy they have the default size.
        hidden = options.hidden or Options().hidden
        self.reward, self.critics = Network(1, hidden), Critics(world.state, world.actions, hidden)
        self.tx = make_optimizer(linear_warmup(options.lr, warmup_steps=100), name="adamw")
        self.act = jax.jit(self.policy.act)

    def compiled(self, step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`step` with the optimizer and `options`, on the devices."""
        return self.partitioner.compile_step(
            functools.partial(step, tx=self.tx, axis_name=self.partitioner.axis_name, **options)
        )

    @functools.cached_property
    def bc(self) -> Callable[..., Any]:
        return self.compiled(bc_step, log_prob=self.policy.log_prob)

    @functools.cached_property
    def cpl(self) -> Callable[..., Any]:
        o = self.options
        options = {"alpha": o.alpha, "lam": o.lam, "gamma": self.world.gamma}
        return self.compiled(cpl_step, log_prob=self.policy.log_prob, **options)

    @functools.cached_property
    def rewards(self) -> Callable[..., Any]:
        return self.compiled(segment_reward_step, network=self.reward, gamma=self.world.gamma)

    @functools.cached_property
    def iql(self) -> Callable[..., Any]:
        o = self.options
        options = {"expectile": o.expectile, "beta": o.beta, "gamma": self.world.gamma}
        return self.compiled(iql_step, critics=self.critics, log_prob=self.policy.log_prob, **options)

    def measure(self, policy: Variables, step: int) -> dict[str, Any]:
        learned = np.asarray(self.policy.precision(policy), np.float64) if self.options.std is None else None
        return {"step": float(step), **self.world.measure(self.act, policy, learned)}

    def train(
        self,
        step: Callable[..., Any],
        variables: Variables,
        stream: Callable[[int], Any],
        log: Path,
        *,
        steps: int,
        start: int = 0,
        points: Points | None = None,
        policy_of: Callable[[Variables], Variables] = lambda variables: variables,
    ) -> Variables:
        """Updates `variables` by `steps` calls of a compiled step, and returns them on the host.

        Measurements are appended to `points`, `evaluations` of them over all steps of the options."""
        partitioner, o = self.partitioner, self.options

        def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
            assert points is not None
            points.append(self.measure(policy_of(partitioner.to_host(state.params)), done))
            return {name: value for name, value in points[-1].items() if name != "episodes"}

        measured = Evaluation(evaluate, every=math.ceil((o.sft_steps + o.steps) / o.evaluations))
        begun = init_state(variables, self.tx).replace(step=np.int32(start))
        with MetricsLog(log) as metrics:
            state = fit(
                step,
                partitioner.put_state(begun),
                stream,
                total_steps=start + steps,
                log=metrics,
                evaluation=None if points is None else measured,
                get_state=partitioner.get_state,
            )
        return partitioner.to_host(state.params)

    def clone(self, prefs: Preferences, segments: np.ndarray, seed: int, log: Path, **options: Any) -> Variables:
        """Behavior cloning of segments from a new policy."""
        data = prefs.transitions(segments)
        of_step = draws(len(data.weight), self.options.transitions, seed)
        return self.train(self.bc, self.policy.init(jax.random.key(seed)), lambda i: _take(data, of_step(i)), log, **options)


def _take(data: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[index], data)


def sft(learner: Learner, prefs: Preferences, kind: Kind, seed: int, folder: Path) -> Points:
    """SFT: behavior cloning of all preferred segments."""
    points: Points = []
    steps = learner.options.sft_steps + learner.options.steps
    learner.clone(prefs, prefs.order[:, 0], seed, folder / "metrics.jsonl", steps=steps, points=points)
    return points


def percent_bc(learner: Learner, prefs: Preferences, kind: Kind, seed: int, folder: Path) -> Points:
    """Percent-BC, an oracle: clones the best segments by true score, which the other methods never see."""
    points: Points = []
    best = best_segments(prefs.rollouts, kind, gamma=prefs.gamma, share=learner.options.share)
    steps = learner.options.sft_steps + learner.options.steps
    learner.clone(prefs, best, seed, folder / "metrics.jsonl", steps=steps, points=points)
    return points


def cpl(learner: Learner, prefs: Preferences, kind: Kind, seed: int, folder: Path) -> Points:
    """SFT, then CPL(lambda). The first point is the policy after SFT."""
    o, points = learner.options, Points()
    variables = learner.clone(prefs, prefs.order[:, 0], seed, folder / "sft.jsonl", steps=o.sft_steps)
    points.append(learner.measure(variables, o.sft_steps))
    of_step = draws(len(prefs.order), o.pairs, seed)
    learner.train(
        learner.cpl,
        variables,
        lambda i: prefs.pairs(of_step(i)),
        folder / "metrics.jsonl",
        start=o.sft_steps,
        steps=o.steps,
        points=points,
    )
    return points


def p_iql(learner: Learner, prefs: Preferences, kind: Kind, seed: int, folder: Path) -> Points:
    """P-IQL: learns a reward, scales it to standard deviation 1, then runs implicit Q-learning on all segments."""
    o, points, world = learner.options, Points(), learner.world
    of_step = draws(len(prefs.order), o.pairs, seed)
    for_reward, for_iql = jax.random.split(jax.random.key(seed))
    variables = learner.reward.init(for_reward, np.zeros(world.state + world.actions, np.float32))
    log = folder / "reward.jsonl"
    learned = learner.train(learner.rewards, variables, lambda i: prefs.pairs(of_step(i)), log, steps=o.reward_steps)
    found = np.asarray(reward_of(learner.reward, learned, prefs.rollouts.states[:, :-1], prefs.rollouts.actions))
    data = prefs.experience(found / found.std())
    of_step = draws(len(data.weight), o.transitions, seed)
    learner.train(
        learner.iql,
        learner.critics.init(for_iql, learner.policy),
        lambda i: _take(data, of_step(i)),
        folder / "metrics.jsonl",
        steps=o.sft_steps + o.steps,
        points=points,
        policy_of=lambda variables: variables["policy"],
    )
    return points


METHODS: Mapping[str, Callable[[Learner, Preferences, Kind, int, Path], Points]] = {
    "sft": sft,
    "cpl": cpl,
    "p-iql": p_iql,
    "percent-bc": percent_bc,
}
