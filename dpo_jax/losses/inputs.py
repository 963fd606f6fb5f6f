"""Checks of what a loss takes, and the rewards that all losses return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.types import Array


def implicit_rewards(logps: Array, ref_logps: Array, *, beta: float | Array) -> jax.Array:
    """The reward that a policy is optimal for: `beta * log(pi / pi_ref)` (eq. 5), float[P, K], without gradient.

    `logps` and `ref_logps` are float[P, K] in nats. A prompt's rewards are known up to a constant: compare them within it.

    >>> print(implicit_rewards(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), beta=0.5))
    [[ 1. -1.]]
    """
    return jax.lax.stop_gradient(column(beta) * (jnp.asarray(logps) - jnp.asarray(ref_logps)))


def right(rewards: Array, logps: Array, ref_logps: Array) -> Any:
    """1 where the chosen completion has the higher reward, 0 where it has the lower one, 1/2 in a tie: float[P].

    Of `[P, K]` the first and the last column are compared. A tie is also where the four log-probabilities differ by no more
    than their rounding. So a policy that still is its reference has accuracy 1/2, also where the cached log-probabilities come
    from rows of another shape; computed in bfloat16 they may differ by more, and then the side is chance. numpy or JAX.
    """
    margins = rewards[:, 0] - rewards[:, -1]
    tie = (tied(logps, ref_logps) | (margins == 0)).astype(margins.dtype)
    return (1 - tie) * (margins > 0).astype(margins.dtype) + tie / 2


def right_label(logps: Array, ref_logps: Array, desirable: Array) -> Any:
    """1 where the policy writes a desirable completion more often than the reference, or an undesirable one less often, 0 where
    it is the other way round, and 1/2 where it is the same up to rounding: float[P]. Of [P, 2] the first column counts."""
    ratios = logps[:, 0] - ref_logps[:, 0]
    rounding = 2 * float(np.finfo(ratios.dtype).eps) * (abs(logps[:, 0]) + abs(ref_logps[:, 0]))
    tie = (abs(ratios) <= rounding).astype(ratios.dtype)
    agrees = ((ratios > 0) == (desirable > 0)).astype(ratios.dtype)
    return (1 - tie) * agrees + tie / 2


def tied(logps: Array, ref_logps: Array) -> Any:
    """Where chosen and rejected differ by no more than the rounding of their log-probabilities `[P, K]`: bool[P]."""
    ratios = logps - ref_logps
    rounding = 2 * float(np.finfo(ratios.dtype).eps) * sum(abs(x[:, 0]) + abs(x[:, -1]) for x in (logps, ref_logps))
    return abs(ratios[:, 0] - ratios[:, -1]) <= rounding


def pairs_of(logps: Array, ref_logps: Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of one shape [P, 2]. ValueError for another one."""
    logps, ref_logps = arrays_of(logps, ref_logps)
    if logps.shape[1] != 2:
        raise ValueError(f"this loss is for pairs, and each example has {logps.shape[1]} completions: use plackett_luce_loss")
    return logps, ref_logps


def arrays_of(logps: Array, ref_logps: Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays, after the one check of shapes: what broadcasts by accident would be a wrong loss in silence."""
    if np.ndim(logps) != 2:
        raise ValueError(
            f"logps has shape {np.shape(logps)}; a loss takes log-probabilities [P, 2], one row for each pair, chosen first: "
            "jnp.stack([chosen, rejected], axis=1)"
        )
    if np.shape(ref_logps) != np.shape(logps):
        raise ValueError(f"ref_logps has shape {np.shape(ref_logps)} and logps {np.shape(logps)}: they must be equal")
    return jnp.asarray(logps), jnp.asarray(ref_logps)


def lengths_of(lengths: Array, logps: jax.Array) -> jax.Array:
    """Lengths [P, K] to divide by: those of fillers, which are 0, count as 1."""
    if np.shape(lengths) != logps.shape:
        raise ValueError(f"lengths has shape {np.shape(lengths)} and logps {logps.shape}: they must be equal")
    return jnp.maximum(jnp.asarray(lengths, logps.dtype), 1)


def check_beta(value: float | Array, logps: jax.Array) -> Any:
    return check_option("beta", value, logps, lambda x: (x > 0) & np.isfinite(x), "a positive finite number")


def check_smoothing(value: float | Array, logps: jax.Array) -> Any:
    return check_option("label_smoothing", value, logps, lambda x: (x >= 0) & (x < 0.5), "a share in [0, 0.5)")


def check_option(name: str, value: float | Array, logps: jax.Array, inside: Callable[[Any], Any], expected: str) -> Any:
    """`value` after a check: a scalar, or float[P], and in its range."""
    if np.shape(value) not in ((), logps.shape[:1]):
        raise ValueError(f"{name} has shape {np.shape(value)}; give one number, or one for each of the {len(logps)} examples")
    # Under jit or vmap it is data of the program, which cannot be asked.
    if not isinstance(value, Tracer) and not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name}={value}: {expected} is expected")
    return value


def column(value: float | Array) -> Any:
    """One number as it is; float[P] as [P, 1], to be multiplied with [P, K]."""
    return jnp.asarray(value)[:, None] if np.ndim(value) else value
