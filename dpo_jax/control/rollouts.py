"""Segments of behavior, and preferences between them by regret or partial return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from dpo_jax.control.iql import Experience
from dpo_jax.cpl import SegmentPairs, Transitions
from dpo_jax.types import Variables

Kind = Literal["regret", "return"]


class Rollouts(NamedTuple):
    """N segments of T steps.

    states      [N, T + 1, S]
    actions     [N, T, A]
    rewards     [N, T]          true rewards, used only to label preferences
    advantages  [N]             sum_t gamma^t A*(s_t, a_t): the negative regret
    """

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray

    def scores(self, kind: Kind, gamma: float) -> np.ndarray:
        """Scores that decide preferences, float64[N]: advantages, or discounted sums of rewards (partial returns)."""
        return self.advantages if kind == "regret" else self.rewards @ discounts(self.rewards.shape[1], gamma)


class World(Protocol):
    """An environment: sizes of states and actions, a `bound` of the actions or None, and the return of the optimum."""

    name: str
    state: int
    actions: int
    bound: float | None
    gamma: float
    optimal: float

    def collect(self, count: int, length: int, rng: np.random.Generator) -> Rollouts: ...

    def measure(
        self, act: Callable[[Variables, Any], Any], variables: Variables, precision: np.ndarray | None = None
    ) -> Mapping[str, Any]:
        """The return of a policy with its 95 % interval: `return`, `return_low`, `return_high`; values of the world; and where
        the return is estimated, those of all `episodes`, whose initial states are the same for every policy."""
        ...


def discounts(length: int, gamma: float) -> np.ndarray:
    """`gamma^t`: float64[length]."""
    return gamma ** np.arange(length, dtype=np.float64)


class Preferences(NamedTuple):
    """Pairs of segments: `order[p]` are the numbers of the preferred and the other segment of pair `p`."""

    rollouts: Rollouts
    order: np.ndarray  # int[P, 2]
    gamma: float

    def pairs(self, index: np.ndarray) -> SegmentPairs:
        """The pairs with these numbers, for `cpl_step`."""
        segments = self.order[index]
        states = self.rollouts.states[segments, :-1].astype(np.float32)
        weight = np.ones(len(index), np.float32)
        return SegmentPairs(states, self.rollouts.actions[segments].astype(np.float32), weight)

    def transitions(self, segments: np.ndarray) -> Transitions:
        """All steps of these segments, for `bc_step`."""
        states, actions = self.rollouts.states[segments, :-1], self.rollouts.actions[segments]
        flat = states.reshape(-1, *states.shape[2:]).astype(np.float32), actions.reshape(-1, actions.shape[-1])
        return Transitions(flat[0], flat[1].astype(np.float32), np.ones(len(flat[0]), np.float32))

    def experience(self, rewards: np.ndarray) -> Experience:
        """All steps of all segments with learned rewards [N, T], for `iql_step`."""
        states, actions = self.rollouts.states.astype(np.float32), self.rollouts.actions.astype(np.float32)
        before, after = (s.reshape(-1, s.shape[-1]) for s in (states[:, :-1], states[:, 1:]))
        flat = rewards.reshape(-1).astype(np.float32)
        return Experience(before, actions.reshape(-1, actions.shape[-1]), after, flat, np.ones(len(flat), np.float32))


def preferences(
    rollouts: Rollouts, kind: Kind, *, gamma: float, temperature: float, comparisons: int, rng: np.random.Generator
) -> Preferences:
    """Compares every segment with `comparisons` others, drawn at random. The first of a pair is preferred with probability
    sigmoid((score_1 - score_2) / temperature); at temperature 0 the better one always is.

    >>> segments = Rollouts(np.zeros((4, 3, 1)), np.zeros((4, 2, 1)), np.zeros((4, 2)), np.array([1.0, 2.0, 4.0, 3.0]))
    >>> rng = np.random.default_rng(0)
    >>> found = preferences(segments, "regret", gamma=1.0, temperature=0.0, comparisons=3, rng=rng)
    >>> found.order.shape, (segments.advantages[found.order[:, 0]] > segments.advantages[found.order[:, 1]]).all().item()
    ((6, 2), True)
    """
    scores = rollouts.scores(kind, gamma)
    half = len(scores) // 2
    pairs = np.concatenate([rng.permutation(len(scores))[: 2 * half].reshape(-1, 2) for _ in range(comparisons)])
    margins = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    # A logistic variable exceeds -x with probability sigmoid(x).
    first = margins + temperature * rng.logistic(size=len(margins)) > 0
    return Preferences(rollouts, np.where(first[:, None], pairs, pairs[:, ::-1]), gamma)


def best_segments(rollouts: Rollouts, kind: Kind, *, gamma: float, share: float) -> np.ndarray:
    """Numbers of the `share` of segments with the highest true scores, which percent-BC clones."""
    scores = rollouts.scores(kind, gamma)
    return np.argsort(-scores, kind="stable")[: max(1, round(share * len(scores)))]


def draws(count: int, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """Function that gives the example numbers of a step's batch: pure in the step, drawn below `count` with replacement."""
    return lambda step: np.random.default_rng((seed, step)).integers(0, count, size=batch)
