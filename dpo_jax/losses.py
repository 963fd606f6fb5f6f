"""Preference losses: from log-probabilities of pairs, or of rankings, to one loss each.

All take `logps` and `ref_logps`, float[P, 2]: log pi(y|x) and log pi_ref(y|x), natural logarithm, summed over the completion's
tokens, chosen first; `plackett_luce_loss` takes rankings, float[P, K], best first. All return `(losses[P], rewards[P, K])`; the
rewards are the implicit rewards of Rafailov et al. 2023 (arXiv 2305.18290), eq. 5, up to the prompt's partition function, and
carry no gradient. `beta`, `alpha` and `label_smoothing` are one number, or float[P] with one for each example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.types import Array


def dpo_loss(
    logps: Array,
    ref_logps: Array,
    *,
    beta: float | Array,
    label_smoothing: float | Array = 0.0,
    reference_free: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Direct Preference Optimization: `-log sigmoid(beta * margin)` (Rafailov et al. 2023, eq. 7).

    Args:
      logps: float[P, 2], log pi(y|x) in nats, chosen first.
      ref_logps: float[P, 2], the same of the reference.
      beta: weight of the KL constraint, float or float[P]: the smaller, the further the policy may leave the reference.
      label_smoothing: assumed share of flipped labels in [0, 0.5), float or float[P] (conservative DPO, Mitchell 2023).
      reference_free: the loss takes a uniform reference. Rewards are still measured against `ref_logps`, as in the original.

    Returns `(losses float[P], rewards float[P, 2])`. ValueError: a wrong shape, `beta` not above 0, or `label_smoothing` out of
    its range.

    >>> logps = np.array([[-12.0, -15.0], [-40.0, -40.0]])
    >>> ref_logps = np.array([[-14.0, -13.0], [-40.0, -40.0]])
    >>> losses, rewards = dpo_loss(logps, ref_logps, beta=0.5)
    >>> print(losses, rewards[0])
    [0.126928  0.6931472] [ 1. -1.]
    """
    logps, ref_logps = _of_pairs(logps, ref_logps)
    beta = _beta(beta, logps)
    share = _option("label_smoothing", label_smoothing, logps, lambda x: (x >= 0) & (x < 0.5), "a share in [0, 0.5)")
    margins = beta * _margins(logps, jnp.zeros_like(ref_logps) if reference_free else ref_logps)
    losses = -(1 - share) * jax.nn.log_sigmoid(margins) - share * jax.nn.log_sigmoid(-margins)
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def ipo_loss(logps: Array, ref_logps: Array, *, beta: float | Array) -> tuple[jax.Array, jax.Array]:
    """Identity Preference Optimization: `(margin - 1 / (2 beta))^2` (Azar et al. 2023, arXiv 2310.12036, eq. 17; tau = beta).

    `logps` and `ref_logps` are float[P, 2], nats, chosen first; returns `(losses float[P], rewards float[P, 2])`. They are
    summed log-probabilities, as in the original implementation; for means per token divide both by `completion_lengths`.

    >>> losses, rewards = ipo_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), beta=0.1)
    >>> print(losses)  # the margin is 4 nats, and 5 is wanted
    [1.]
    """
    logps, ref_logps = _of_pairs(logps, ref_logps)
    beta = _beta(beta, logps)
    losses = (_margins(logps, ref_logps) - 1 / (2 * beta)) ** 2
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def unlikelihood_loss(logps: Array, ref_logps: Array, *, alpha: float | Array) -> tuple[jax.Array, jax.Array]:
    """Unlikelihood training: `-log pi(y_w) + alpha * log pi(y_l)` (section 6 and appendix D.3; Welleck et al. 2019).

    `logps` and `ref_logps` are float[P, 2], nats, chosen first; returns `(losses float[P], rewards float[P, 2])`.

    `alpha` in [0, 1] weighs the second term; with 0 the loss is the paper's Preferred-FT. Nothing holds the policy to its
    reference: the loss has no lower bound once a completion is rejected more than 1 / alpha times as often as it is chosen.
    There is no beta either, and the rewards are `log(pi / pi_ref)` in nats.

    >>> losses, rewards = unlikelihood_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), alpha=0.5)
    >>> print(losses, rewards)
    [4.5] [[ 2. -2.]]
    """
    logps, ref_logps = _of_pairs(logps, ref_logps)
    alpha = _option("alpha", alpha, logps, lambda x: (x >= 0) & (x <= 1), "a weight in [0, 1]")
    return -logps[:, 0] + alpha * logps[:, 1], implicit_rewards(logps, ref_logps, beta=1.0)


def plackett_luce_loss(logps: Array, ref_logps: Array, *, beta: float | Array) -> tuple[jax.Array, jax.Array]:
    """DPO on rankings: the negative log-likelihood of float[P, K], best first, under Plackett-Luce (appendix A.3, eq. 20).

    In turn each completion is the first choice among those not placed yet. K = 2 is `dpo_loss`, bit for bit. Returns
    `(losses float[P], rewards float[P, K])`.

    >>> losses, _ = plackett_luce_loss(np.zeros((1, 3)), np.zeros((1, 3)), beta=0.1)
    >>> print(f"{losses[0]:.4f} {np.log(6):.4f}")  # six orders of three, all as likely
    1.7918 1.7918
    """
    logps, ref_logps = _checked(logps, ref_logps)
    beta = _beta(beta, logps)
    log_ratios = logps - ref_logps
    completions = log_ratios.shape[1]
    if completions < 2:
        raise ValueError(f"a ranking has at least two completions, got {completions}")
    losses = []
    for k in range(completions - 1):
        rest = jax.nn.logsumexp(_column(beta) * (log_ratios[:, k + 1 :] - log_ratios[:, k, None]), axis=1)
        # log(1 + exp(rest)) is -log(exp(r_k) / sum_{j >= k} exp(r_j)), and keeps its digits where the choice is near certain.
        losses.append(jax.nn.softplus(rest))
    return jnp.stack(losses).sum(axis=0), implicit_rewards(logps, ref_logps, beta=beta)


def implicit_rewards(logps: Array, ref_logps: Array, *, beta: float | Array) -> jax.Array:
    """The reward that a policy is optimal for: `beta * log(pi / pi_ref)` (eq. 5), float[P, K], without gradient.

    `logps` and `ref_logps` are float[P, K] in nats. A prompt's rewards are known up to a constant: compare them within it.

    >>> print(implicit_rewards(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), beta=0.5))
    [[ 1. -1.]]
    """
    return jax.lax.stop_gradient(_column(beta) * (jnp.asarray(logps) - jnp.asarray(ref_logps)))


def right(rewards: Array, logps: Array, ref_logps: Array) -> Any:
    """1 where the chosen completion has the higher reward, 0 where it has the lower one, 1/2 in a tie: float[P].

    Of `[P, K]` the first and the last column are compared. A tie is also where the four log-probabilities differ by no more
    than their rounding. So a policy that still is its reference has accuracy 1/2, also where the cached log-probabilities come
    from rows of another shape; computed in bfloat16 they may differ by more, and then the side is chance. numpy or JAX.
    """
    margins = rewards[:, 0] - rewards[:, -1]
    tie = (tied(logps, ref_logps) | (margins == 0)).astype(margins.dtype)
    return (1 - tie) * (margins > 0).astype(margins.dtype) + tie / 2


def tied(logps: Array, ref_logps: Array) -> Any:
    """Where chosen and rejected differ by no more than the rounding of their log-probabilities `[P, K]`: bool[P]."""
    ratios = logps - ref_logps
    rounding = 2 * float(np.finfo(ratios.dtype).eps) * sum(abs(x[:, 0]) + abs(x[:, -1]) for x in (logps, ref_logps))
    return abs(ratios[:, 0] - ratios[:, -1]) <= rounding


def _margins(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """How much more than the reference the policy prefers the chosen completion: float[P], in nats."""
    log_ratios = logps - ref_logps
    return log_ratios[:, 0] - log_ratios[:, 1]


def _of_pairs(logps: Array, ref_logps: Array) -> tuple[jax.Array, jax.Array]:
    logps, ref_logps = _checked(logps, ref_logps)
    if logps.shape[1] != 2:
        raise ValueError(f"this loss is for pairs, and each example has {logps.shape[1]} completions: use plackett_luce_loss")
    return logps, ref_logps


def _checked(logps: Array, ref_logps: Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays, after the one check of shapes: what broadcasts by accident would be a wrong loss in silence."""
    if np.ndim(logps) != 2:
        raise ValueError(
            f"logps has shape {np.shape(logps)}; a loss takes log-probabilities [P, 2], one row for each pair, chosen first: "
            "jnp.stack([chosen, rejected], axis=1)"
        )
    if np.shape(ref_logps) != np.shape(logps):
        raise ValueError(f"ref_logps has shape {np.shape(ref_logps)} and logps {np.shape(logps)}: they must be equal")
    return jnp.asarray(logps), jnp.asarray(ref_logps)


def _beta(value: float | Array, logps: jax.Array) -> Any:
    return _option("beta", value, logps, lambda x: (x > 0) & np.isfinite(x), "a positive finite number")


def _option(name: str, value: float | Array, logps: jax.Array, inside: Callable[[Any], Any], expected: str) -> Any:
    """`value` after a check: a scalar, or float[P], and in its range."""
    if np.shape(value) not in ((), logps.shape[:1]):
        raise ValueError(f"{name} has shape {np.shape(value)}; give one number, or one for each of the {len(logps)} examples")
    # Under jit or vmap it is data of the program, which cannot be asked.
    if not isinstance(value, Tracer) and not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name}={value}: {expected} is expected")
    return value


def _column(value: float | Array) -> Any:
    """One number as it is; float[P] as [P, 1], to be multiplied with [P, K]."""
    return jnp.asarray(value)[:, None] if np.ndim(value) else value
