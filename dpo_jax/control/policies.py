"""Gaussian policies and the networks of P-IQL, in Flax: an MLP for states, preceded by convolutions for images.

A policy is N(mean(s), (U' U)^-1). With a fixed `std`, U = I / std, and log pi = -||a - mean||^2 / (2 std^2) up to a constant.
The authors' networks are deterministic and use -||a - mean||^2: ours with std^2 = 1/2, or any other std with alpha rescaled.
Without `std`, U is learned, upper triangular with positive diagonal and the same in all states: in maximum-entropy
linear-quadratic control the optimum is Gaussian with such a covariance.

With `bound` the mean is `bound tanh(...)`, so that it is a valid action. Only the mean is squashed, not the distribution: log
pi stays finite at the bound, where many actions of the data lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.cpl import LogProb
from dpo_jax.types import Array, Variables


class Policy(NamedTuple):
    """Functions of a policy: `init(key) -> variables`; `log_prob` for `cpl_step` and `bc_step`; `act(variables, states) -> mean
    actions`; `precision(variables) -> float32[A, A]`, the inverse covariance."""

    init: Callable[[jax.Array], Variables]
    log_prob: LogProb
    act: Callable[[Variables, Array], jax.Array]
    precision: Callable[[Variables], jax.Array]


class Network(nn.Module):
    """Convolutions of stride 2 over images [..., H, W, C] (`filters`, may be empty), then dense layers; float32[..., outputs].

    Without `hidden` and `filters` it is an affine map.
    """

    outputs: int
    hidden: Sequence[int] = ()
    filters: Sequence[int] = ()

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        x = jnp.asarray(x, jnp.float32)
        if self.filters:
            leading = x.shape[:-3]
            x = x.reshape(-1, *x.shape[-3:])
            for count in self.filters:
                x = nn.relu(nn.Conv(count, (3, 3), strides=(2, 2))(x))
            x = x.reshape(*leading, -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class Gaussian(nn.Module):
    """States -> (mean [..., A], U [A, A])."""

    network: Network
    bound: float | None = None
    std: float | None = None

    @nn.compact
    def __call__(self, states: Array) -> tuple[jax.Array, jax.Array]:
        mean, size = self.network(states), self.network.outputs
        if self.bound is not None:
            mean = self.bound * jnp.tanh(mean)
        if self.std is not None:
            return mean, jnp.eye(size) / self.std
        raw = self.param("factor", nn.initializers.zeros, (size, size))
        return mean, jnp.triu(raw, 1) + jnp.diag(jnp.exp(jnp.diag(raw)))


def gaussian_policy(
    state: Sequence[int],
    actions: int,
    *,
    hidden: Sequence[int] = (64, 64),
    filters: Sequence[int] = (),
    bound: float | None = None,
    std: float | None = None,
) -> Policy:
    """A Gaussian policy for states of shape `state` and actions of size `actions`.

    >>> policy = gaussian_policy([3], 2, hidden=[8], std=0.5)
    >>> variables = policy.init(jax.random.key(0))
    >>> states, actions = jnp.ones((4, 5, 3)), jnp.zeros((4, 5, 2))
    >>> policy.act(variables, states).shape, policy.log_prob(variables, states, actions).shape
    ((4, 5, 2), (4, 5))
    """
    module = Gaussian(Network(actions, tuple(hidden), tuple(filters)), bound, std)

    def apply(variables: Variables, states: Array) -> Any:
        with jax.default_matmul_precision("highest"):  # the loss is a small difference of sums over segments
            return module.apply(variables, states)

    def log_prob(variables: Variables, states: Array, acted: Array) -> jax.Array:
        mean, factor = apply(variables, states)
        whitened = jnp.matmul(acted - mean, factor.T, precision="highest")
        log_det = jnp.log(jnp.diag(factor)).sum()
        return log_det - (jnp.square(whitened).sum(axis=-1) + actions * math.log(2 * math.pi)) / 2

    def precision(variables: Variables) -> jax.Array:
        factor = apply(variables, jnp.zeros(tuple(state)))[1]
        return jnp.matmul(factor.T, factor, precision="highest")

    return Policy(
        init=lambda key: module.init(key, jnp.zeros(tuple(state))),
        log_prob=log_prob,
        act=lambda variables, states: apply(variables, states)[0],
        precision=precision,
    )
