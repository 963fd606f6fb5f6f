"""Linear-quadratic control with an exact optimum: discounted, infinite horizon, Gaussian noise, maximum entropy.

    s' = A s + B a + w,  w ~ N(0, std_w^2 I)        reward  -(s' Q s + a' R a)
    P = Q + g A'P A - K'M K,   M = R + g B'P B,   K = g M^-1 B'P A          discounted Riccati equation
    pi*(a | s) = N(-K s, alpha/2 M^-1)              the optimum of return + alpha entropy
    A*(s, a) = alpha log pi*(a | s) = -(a + K s)' M (a + K s) + constant

Certainty equivalence: neither noise nor alpha changes K, so the mean of pi* is also the optimum without entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.control.rollouts import Rollouts, discounts
from dpo_jax.types import Variables

WORST = 100.0
"""Limit of a policy's cost, in multiples of the optimal cost: the cost of an unstable policy is infinite."""


class Optimum(NamedTuple):
    """`P` [S, S]: value -s'P s + constant. `K` [A, S]: actions -K s. `M` [A, A]: regret (a + K s)' M (a + K s) of an action."""

    P: np.ndarray
    K: np.ndarray
    M: np.ndarray


class Lqr(NamedTuple):
    """A linear-quadratic environment, in float64; `start` is the standard deviation of the initial state."""

    A: np.ndarray
    B: np.ndarray
    Q: np.ndarray
    R: np.ndarray
    gamma: float = 0.95
    alpha: float = 0.1
    noise: float = 0.05
    start: float = 1.0

    def optimum(self) -> Optimum:
        """The fixed point of the discounted Riccati equation, by iteration.

        >>> world = Lqr(*(np.array([[x]]) for x in (1.0, 1.0, 1.0, 1.0)), gamma=1 - 1e-9)
        >>> print(world.optimum().K.round(4))  # P is the golden ratio
        [[0.618]]
        """
        A, B, g = self.A, self.B, self.gamma
        P = self.Q
        for _ in range(100_000):
            M = self.R + g * B.T @ P @ B
            K = g * np.linalg.solve(M, B.T @ P @ A)
            after = self.Q + g * A.T @ P @ A - K.T @ M @ K
            if np.abs(after - P).max() <= 1e-13 * np.abs(after).max():
                return Optimum(after, K, M)
            P = after
        raise ValueError("the Riccati equation has no fixed point: (A, B) cannot be stabilized at this discount")

    def cost(self, gain: np.ndarray, offset: np.ndarray | None = None) -> float:
        """Exact expected discounted cost of the actions `gain s + offset`; infinite if the policy is unstable."""
        size = len(self.A)
        offset = np.zeros(len(gain)) if offset is None else offset
        # With a constant as an additional state, an affine policy is linear.
        acting = np.concatenate([gain, offset[:, None]], axis=1)
        flow = np.block([[self.A + self.B @ gain, (self.B @ offset)[:, None]], [np.zeros((1, size)), np.ones((1, 1))]])
        if self.gamma * np.abs(np.linalg.eigvals(flow)).max() ** 2 >= 1:
            return math.inf
        costs = acting.T @ self.R @ acting
        costs[:size, :size] += self.Q
        system = np.eye((size + 1) ** 2) - self.gamma * np.kron(flow.T, flow.T)
        P = np.linalg.solve(system, costs.reshape(-1)).reshape(size + 1, size + 1)
        spread = self.start**2 + self.gamma / (1 - self.gamma) * self.noise**2
        return float(spread * np.trace(P[:size, :size]) + P[size, size])

    def advantages(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """A*(s, a) = alpha log pi*(a | s): states [..., S], actions [..., A] -> [...]."""
        _, K, M = self.optimum()
        apart = actions + states @ K.T
        log_det = np.linalg.slogdet(M)[1] - len(M) * math.log(math.pi * self.alpha)
        return self.alpha / 2 * log_det - np.einsum("...i,ij,...j->...", apart, M, apart)


def masses(*, alpha: float = 0.1, gamma: float = 0.95) -> Lqr:
    """Two masses on a line, joined by a spring, with a force on each: states (positions, velocities), actions (forces)."""
    step, spring = 0.2, 0.5
    force = spring * np.array([[-1.0, 1.0], [1.0, -1.0]])
    A = np.eye(4) + step * np.block([[np.zeros((2, 2)), np.eye(2)], [force, -0.1 * np.eye(2)]])
    B = step * np.concatenate([np.zeros((2, 2)), np.array([[1.0, 0.3], [0.0, 1.0]])])
    return Lqr(A, B, np.diag([1.0, 1.0, 0.1, 0.1]), 0.1 * np.eye(2), gamma=gamma, alpha=alpha)


class LqrWorld:
    """Linear-quadratic control as a `World` of the experiment (`rollouts.World`)."""

    name = "lqr"
    bound: float | None = None

    def __init__(self, lqr: Lqr) -> None:
        self.lqr, self.best = lqr, lqr.optimum()
        self.actions, self.state = self.best.K.shape
        self.gamma, self.optimal = lqr.gamma, -lqr.cost(-self.best.K)

    def collect(self, count: int, length: int, rng: np.random.Generator) -> Rollouts:
        """Segments, each by its own controller: 0.4 of the optimal gain, perturbed, with noise on the actions."""
        lqr, scale = self.lqr, np.abs(self.best.K).max()
        gains = -0.4 * self.best.K + 0.1 * scale * rng.standard_normal((count, *self.best.K.shape))
        states = [lqr.start * rng.standard_normal((count, self.state))]
        actions = []
        for _ in range(length):
            noise = 0.3 * rng.standard_normal((count, self.actions))
            actions.append(np.einsum("nas,ns->na", gains, states[-1]) + noise)
            pushed = states[-1] @ lqr.A.T + actions[-1] @ lqr.B.T
            states.append(pushed + lqr.noise * rng.standard_normal(pushed.shape))
        s, a = np.stack(states, axis=1), np.stack(actions, axis=1)
        before = s[:, :-1]
        rewards = -np.einsum("nti,ij,ntj->nt", before, lqr.Q, before) - np.einsum("nti,ij,ntj->nt", a, lqr.R, a)
        return Rollouts(s, a, rewards, lqr.advantages(before, a) @ discounts(length, lqr.gamma))

    def measure(
        self, act: Callable[[Variables, Any], Any], variables: Variables, precision: np.ndarray | None = None
    ) -> Mapping[str, float]:
        """Exact return of the mean actions of an affine policy; `excess`, its cost above the optimal one, as a share; and,
        given the precision of the policy, `kl`(pi* || pi) of an action in nats, averaged over initial states. See `WORST`."""
        # The policy is affine, so its actions at 0 and at the unit states determine it.
        found = np.asarray(act(variables, np.concatenate([np.zeros((1, self.state)), np.eye(self.state)])), np.float64)
        offset, gain = found[0], (found[1:] - found[0]).T
        value = max(-self.lqr.cost(gain, offset), WORST * self.optimal)
        point = {"return": value, "return_low": value, "return_high": value, "excess": value / self.optimal - 1}
        if precision is not None:
            apart = gain + self.best.K
            spread = self.lqr.start**2 * apart @ apart.T + np.outer(offset, offset)
            covariance = self.lqr.alpha / 2 * np.linalg.inv(self.best.M)
            ratio = precision @ covariance
            terms = np.trace(ratio) - self.actions - np.linalg.slogdet(ratio)[1] + np.trace(precision @ spread)
            point["kl"] = float(terms / 2)
        return point
