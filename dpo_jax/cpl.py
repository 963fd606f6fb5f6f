"""Contrastive Preference Learning (Hejna et al. 2023, arXiv 2310.13639): policies from preferred segments, without RL.

    score(s) = sum_t gamma^t alpha log pi(a_t | s_t)          segment s = (s_0, a_0, ..., s_T-1, a_T-1)
    loss     = -log sigmoid(score(s+) - lambda score(s-))     eq. 5 with lambda 1; section 3.3, CPL(lambda)

In maximum-entropy control alpha log pi*(a | s) is the optimal advantage. The score is then the negative regret of a segment,
and the loss is the likelihood of preferences by regret. With lambda < 1 the loss is no longer invariant to a shift of all
log-probabilities: it falls when segments of the data become more likely, which keeps the policy near them.

States may be anything that the policy accepts: vectors `[..., S]`, images `[..., H, W, C]`. The policy is a function
`log_prob(variables, states, actions) -> float32[...]` over arbitrary leading axes; `dpo_jax.control.policies` makes some.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.rounding import Optimizer
from dpo_jax.step import train_step
from dpo_jax.types import Array, Metrics, TrainState, Variables

LogProb = Callable[[Variables, Array, Array], jax.Array]
"""(variables, states [..., *S], actions [..., A]) -> log-densities in nats, float32[...]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentPairs:
    """Pairs of segments of T steps, the preferred one first.

    states   float32[P, 2, T, *S]
    actions  float32[P, 2, T, A]
    weight   float32[P]            1, or 0 for a padding pair

    >>> pairs = SegmentPairs(states=jnp.ones((8, 2, 16, 3)), actions=jnp.zeros((8, 2, 16, 1)), weight=jnp.ones(8))
    """

    states: Array
    actions: Array
    weight: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transitions:
    """States and the actions taken in them: states float32[N, *S], actions float32[N, A], weight float32[N] as for pairs.

    >>> steps = Transitions(states=jnp.ones((64, 3)), actions=jnp.zeros((64, 1)), weight=jnp.ones(64))
    """

    states: Array
    actions: Array
    weight: Array


def discounted_sum(values: Array, gamma: float) -> jax.Array:
    """Discounted sum `sum_t gamma^t values[..., t]`: `[..., T]` -> `[...]`.

    >>> print(discounted_sum(jnp.ones((2, 3)), 0.5))
    [1.75 1.75]
    """
    return jnp.dot(values, gamma ** jnp.arange(values.shape[-1], dtype=jnp.float32), precision="highest")


def cpl_loss(scores: Array, *, lam: float = 1.0) -> jax.Array:
    """The CPL(lambda) loss `-log sigmoid(score+ - lambda score-)`, 0 < lambda <= 1: scores `[P, 2]`, preferred first -> `[P]`.

    >>> print(cpl_loss(jnp.array([[-1.0, -2.0], [-2.0, -2.0]]), lam=0.5))
    [0.6931472 1.3132617]
    """
    if not 0 < lam <= 1:
        raise ValueError(f"lambda of CPL(lambda) must be above 0 and at most 1, got {lam}")
    return -jax.nn.log_sigmoid(scores[..., 0] - lam * scores[..., 1])


def cpl_step(
    state: TrainState,
    batch: SegmentPairs,
    *,
    log_prob: LogProb,
    tx: Optimizer,
    alpha: float = 0.1,
    gamma: float = 1.0,
    lam: float = 1.0,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of CPL on pairs of segments. Pure, like `dpo_step`.

    Metrics are means over the pairs of the global batch, before the update: `loss`, `accuracy` (a tie counts half), `margin`
    (difference of scores, without lambda), `logps/chosen`, `logps/rejected` (log-density per action, nats), `grad_norm`.

    Args:
      alpha: the temperature of maximum-entropy control; the paper uses 0.1. If the policy's standard deviation is fixed,
        only alpha / std^2 matters.
      gamma: discount within a segment; the authors' code uses 1.
      lam: lambda, 0.5 in most of the paper; with 1 the loss is exactly the likelihood of the preferences.

    >>> def log_prob(variables, states, actions):  # a linear policy of standard deviation 1
    ...     return -((actions - states @ variables["gain"]) ** 2).sum(-1) / 2
    >>> pairs = SegmentPairs(jnp.ones((1, 2, 4, 3)), jnp.zeros((1, 2, 4, 1)), jnp.ones(1))
    >>> state = init_state({"gain": jnp.zeros((3, 1))}, optax.sgd(0.1))
    >>> state, metrics = jax.jit(partial(cpl_step, log_prob=log_prob, tx=optax.sgd(0.1)))(state, pairs)
    >>> print(f"{metrics['loss']:.4f} {metrics['accuracy']:.1f}")  # both segments are the same
    0.6931 0.5
    """

    def objective(variables: Variables, batch: SegmentPairs) -> tuple[jax.Array, Metrics]:
        logps = log_prob(variables, batch.states, batch.actions)  # [P, 2, T]
        scores = alpha * discounted_sum(logps, gamma)
        margins = scores[:, 0] - scores[:, 1]
        each = logps.mean(axis=-1)
        return cpl_loss(scores, lam=lam), {
            "accuracy": (1 + jnp.sign(margins)) / 2,
            "margin": margins,
            "logps/chosen": each[:, 0],
            "logps/rejected": each[:, 1],
        }

    return train_step(state, batch, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)


def bc_step(
    state: TrainState,
    batch: Transitions,
    *,
    log_prob: LogProb,
    tx: Optimizer,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of behavior cloning: `loss = -log pi(a | s)`, the mean over transitions. Pure, like `cpl_step`.

    Applied to the steps of preferred segments it is SFT, the first phase of CPL here. The authors' CPL clones both segments of
    each pair.

    >>> def log_prob(variables, states, actions):
    ...     return -((actions - states @ variables["gain"]) ** 2).sum(-1) / 2
    >>> state = init_state({"gain": jnp.zeros((3, 1))}, optax.sgd(0.1))
    >>> batch = Transitions(jnp.ones((8, 3)), jnp.full((8, 1), 2.0), jnp.ones(8))
    >>> state, metrics = jax.jit(partial(bc_step, log_prob=log_prob, tx=optax.sgd(0.1)))(state, batch)
    >>> print(metrics["loss"], state.params["gain"][:, 0])
    2.0 [0.2 0.2 0.2]
    """

    def objective(variables: Variables, batch: Transitions) -> tuple[jax.Array, Metrics]:
        return -log_prob(variables, batch.states, batch.actions), {}

    return train_step(state, batch, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)
