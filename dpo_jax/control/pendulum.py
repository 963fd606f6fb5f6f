"""Gymnasium's Pendulum-v1: the simulator, an expert by value iteration, and behavior of mixed skill.

States are the environment's observations, (cos, sin, speed / 8), and actions are torques divided by the largest one, so both
are within [-1, 1]. Behavior and returns come from the environment itself (`pip install gymnasium`, extra `control`). The
expert and its values come from the same equations, vectorized over states (`advance`; a test compares the two). The dynamics
are deterministic, so the expert's V at a state is one rollout from it, and the advantages of a segment add up to

    sum_t gamma^t A(s_t, a_t) = sum_t gamma^t r_t + gamma^T V(s_T) - V(s_0).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpo_jax.control.rollouts import Rollouts, discounts
from dpo_jax.extras import install_command
from dpo_jax.types import Variables

STEPS = 200  # of an episode
SPEED, TORQUE, DT, GRAVITY = 8.0, 2.0, 0.05, 10.0
ANGLES, SPEEDS = 121, 81  # points of the grid
TORQUES = np.linspace(-TORQUE, TORQUE, 15)


class MissingGymnasium(RuntimeError):
    """The gymnasium package is required but not installed. The message says how to install it."""


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise MissingGymnasium(f"the Pendulum needs the package gymnasium: {install_command('control')}") from error
    return gymnasium


def advance(angle: np.ndarray, speed: np.ndarray, torque: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of Pendulum-v1 for arrays of states: angle (0 is upright, radians), speed (rad/s), torque in [-2, 2] -> angle,
    speed and reward."""
    wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
    reward = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = np.clip(speed + (1.5 * GRAVITY * np.sin(angle) + 3.0 * torque) * DT, -SPEED, SPEED)
    return angle + speed * DT, speed, reward


class Expert:
    """Expert that takes greedy torques under a value function on a grid, found by value iteration."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        angles = np.linspace(-np.pi, np.pi, ANGLES)[:, None, None]
        speeds = np.linspace(-SPEED, SPEED, SPEEDS)[None, :, None]
        after = advance(*np.broadcast_arrays(angles, speeds, TORQUES))
        corners, weights = _corners(after[0], after[1])
        values = np.zeros(ANGLES * SPEEDS)
        for _ in range(2000):
            found = (after[2] + gamma * (values[corners] * weights).sum(axis=0)).max(axis=-1).reshape(-1)
            change, values = np.abs(found - values).max(), found
            if change < 1e-3:
                break
        self.values = values

    def torque(self, angle: np.ndarray, speed: np.ndarray) -> np.ndarray:
        """The torque with the best reward plus next value."""
        after = advance(angle[..., None], speed[..., None], np.broadcast_to(TORQUES, (*angle.shape, len(TORQUES))))
        corners, weights = _corners(after[0], after[1])
        return TORQUES[(after[2] + self.gamma * (self.values[corners] * weights).sum(axis=0)).argmax(axis=-1)]

    def value(self, angle: np.ndarray, speed: np.ndarray) -> np.ndarray:
        """Discounted return of the expert from each state: a rollout of `STEPS` steps, then the grid's value."""
        total, factor = np.zeros_like(angle), 1.0
        for _ in range(STEPS):
            angle, speed, reward = advance(angle, speed, self.torque(angle, speed))
            total, factor = total + factor * reward, factor * self.gamma
        corners, weights = _corners(angle, speed)
        return total + factor * (self.values[corners] * weights).sum(axis=0)


def _corners(angle: np.ndarray, speed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four grid points around each state, int[4, ...], and their weights in bilinear interpolation."""
    a = ((angle + np.pi) % (2 * np.pi)) / (2 * np.pi) * (ANGLES - 1)
    s = (speed + SPEED) / (2 * SPEED) * (SPEEDS - 1)
    i, j = np.minimum(a.astype(int), ANGLES - 2), np.minimum(s.astype(int), SPEEDS - 2)
    u, v = a - i, s - j
    corners = np.stack([(i + di) * SPEEDS + j + dj for di in (0, 1) for dj in (0, 1)])
    return corners, np.stack([(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v])


class PendulumWorld:
    """Pendulum as a `World` of the experiment (`rollouts.World`)."""

    name, state, actions = "pendulum", 3, 1
    bound: float | None = 1.0

    def __init__(self, *, gamma: float = 0.99, episodes: int = 100) -> None:
        self.gamma, self.episodes = gamma, episodes
        self._make = functools.partial(_gymnasium().make, "Pendulum-v1")
        self.expert = Expert(gamma)
        angle, speed = self._starts(episodes, 0)
        total = np.zeros(episodes)
        for _ in range(STEPS):
            angle, speed, reward = advance(angle, speed, self.expert.torque(angle, speed))
            total += reward
        self.optimal = float(total.mean())

    def _starts(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        environment = self._make()
        shown = np.array([environment.reset(seed=seed + number)[0] for number in range(count)])
        return np.arctan2(shown[:, 1], shown[:, 0]), shown[:, 2]

    def _episodes(
        self, count: int, seed: int, act: Callable[[int, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whole episodes in the simulator: states [N, 201, 3], actions [N, 200, 1], rewards [N, 200]."""
        environments = [self._make() for _ in range(count)]
        shown = np.array([environment.reset(seed=seed + number)[0] for number, environment in enumerate(environments)])
        states, actions, rewards = [shown / [1, 1, SPEED]], [], []
        for step in range(STEPS):
            actions.append(np.clip(act(step, states[-1]), -1.0, 1.0))
            # In float64: a float32 torque would make the environment compute in float32.
            found = [one.step(TORQUE * np.float64(a)) for one, a in zip(environments, actions[-1], strict=True)]
            states.append(np.array([one[0] for one in found]) / [1, 1, SPEED])
            rewards.append([one[1] for one in found])
        return np.stack(states, axis=1), np.stack(actions, axis=1), np.array(rewards).T

    def collect(self, count: int, length: int, rng: np.random.Generator) -> Rollouts:
        """Segments of episodes by controllers of different skill. They take the expert's torque with some probability, else a
        random torque that is kept for a while, both with noise."""
        each = STEPS // length
        episodes = -(-count // each)
        skill = rng.uniform(0.0, 1.0, size=(episodes, 1))
        other = np.zeros((episodes, 1))
        astray = np.zeros((episodes, 1), bool)

        def act(step: int, states: np.ndarray) -> np.ndarray:
            nonlocal other, astray
            if step % 8 == 0:
                other = rng.uniform(-1.0, 1.0, size=other.shape)
                astray = rng.uniform(size=astray.shape) > skill
            known = self.expert.torque(*angle_and_speed(states))[:, None] / TORQUE
            return np.where(astray, other, known) + 0.3 * rng.standard_normal(other.shape)

        seed = int(rng.integers(2**31))
        states, actions, rewards = self._episodes(episodes, seed, act)
        cut = np.arange(each)[:, None] * length
        within, over = cut + np.arange(length), cut + np.arange(length + 1)
        s, a, r = states[:, over], actions[:, within], rewards[:, within]
        s, a, r = (x.reshape(episodes * each, *x.shape[2:]) for x in (s, a, r))
        chosen = rng.permutation(episodes * each)[:count]  # shuffled: neighbors mostly come from different episodes
        s, a, r = s[chosen], a[chosen], r[chosen]
        first, last = (self.expert.value(*angle_and_speed(s[:, place])) for place in (0, -1))
        advantages = r @ discounts(length, self.gamma) + self.gamma**length * last - first
        return Rollouts(s, a, r, advantages)

    def measure(
        self, act: Callable[[Variables, Any], Any], variables: Variables, precision: np.ndarray | None = None
    ) -> Mapping[str, Any]:
        """The undiscounted return of an episode, and those of all `episodes`, from the same initial states for every policy."""
        _, _, rewards = self._episodes(
            self.episodes, 0, lambda _, states: np.asarray(act(variables, states.astype(np.float32)), np.float64)
        )
        totals = rewards.sum(axis=1)
        half = 1.96 * totals.std(ddof=1) / math.sqrt(len(totals))
        value = float(totals.mean())
        return {"return": value, "return_low": value - half, "return_high": value + half, "episodes": totals.tolist()}


def angle_and_speed(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin, speed / 8) -> radians and rad/s."""
    return np.arctan2(states[..., 1], states[..., 0]), SPEED * states[..., 2]
