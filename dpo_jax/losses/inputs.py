"""Checks of the arguments of losses, and the rewards and accuracies that all losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.types import Array


def implicit_rewards(logps: Array, ref_logps: Array, *, beta: float | Array) -> jax.Array:
    """The implicit reward `beta * log(pi / pi_ref)` (eq. 5), float[P, K], without gradient. It is the reward that the policy
    maximizes under a KL penalty to the reference.

    `logps` and `ref_logps` are float32[P, K] in nats. Rewards are known up to a constant per prompt: compare them only within a
    prompt.

    >>> print(implicit_rewards(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), beta=0.5))
    [[ 1. -1.]]
    """
    _check_float32(logps, ref_logps)
    return jax.lax.stop_gradient(column(beta) * (jnp.asarray(logps) - jnp.asarray(ref_logps)))


def pair_accuracy(rewards: Array, logps: Array, ref_logps: Array) -> Any:
    """Accuracy per pair: 1 if the chosen completion has the higher reward, 0 if the lower one, 1/2 for a tie: float[P].

    The first and the last column of `[P, K]` are compared. It is also a tie if the four log-probabilities differ by no more
    than their rounding error. A policy that still equals its reference therefore has accuracy 1/2, even if the cached
    log-probabilities come from rows of another shape. In bfloat16 they may differ by more, and then the outcome is chance.
    Works on numpy and JAX arrays.
    """
    margins = rewards[:, 0] - rewards[:, -1]
    tie = (tied(logps, ref_logps) | (margins == 0)).astype(margins.dtype)
    return (1 - tie) * (margins > 0).astype(margins.dtype) + tie / 2


def label_accuracy(logps: Array, ref_logps: Array, desirable: Array) -> Any:
    """Accuracy per single completion, float[P]: 1 if the policy gives a desirable completion a higher probability than the
    reference does, or an undesirable one a lower one; 0 if it is the other way round; 1/2 if they are equal up to rounding.
    Only the first column of [P, 2] is read."""
    ratios = logps[:, 0] - ref_logps[:, 0]
    rounding = 2 * float(np.finfo(ratios.dtype).eps) * (abs(logps[:, 0]) + abs(ref_logps[:, 0]))
    tie = (abs(ratios) <= rounding).astype(ratios.dtype)
    agrees = ((ratios > 0) == (desirable > 0)).astype(ratios.dtype)
    return (1 - tie) * agrees + tie / 2


def tied(logps: Array, ref_logps: Array) -> Any:
    """Whether the log-ratios of chosen and rejected differ by no more than the rounding error of `[P, K]`: bool[P]."""
    ratios = logps - ref_logps
    rounding = 2 * float(np.finfo(ratios.dtype).eps) * sum(abs(x[:, 0]) + abs(x[:, -1]) for x in (logps, ref_logps))
    return abs(ratios[:, 0] - ratios[:, -1]) <= rounding


def pairs_of(logps: Array, ref_logps: Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of one shape [P, 2]. ValueError for another shape."""
    logps, ref_logps = arrays_of(logps, ref_logps)
    if logps.shape[1] != 2:
        raise ValueError(f"this loss is for pairs, but each example has {logps.shape[1]} completions: use plackett_luce_loss")
    return logps, ref_logps


def arrays_of(logps: Array, ref_logps: Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of one shape [P, K]. The shapes are checked, because accidental broadcasting would give a wrong loss.

    TypeError for bfloat16 and float16.
    """
    if np.ndim(logps) != 2:
        raise ValueError(
            f"logps has shape {np.shape(logps)}; a loss takes log-probabilities [P, 2], one row for each pair, chosen first: "
            "jnp.stack([chosen, rejected], axis=1)"
        )
    if np.shape(ref_logps) != np.shape(logps):
        raise ValueError(f"ref_logps has shape {np.shape(ref_logps)} and logps {np.shape(logps)}: they must be equal")
    _check_float32(logps, ref_logps)
    return jnp.asarray(logps), jnp.asarray(ref_logps)


def _check_float32(logps: Array, ref_logps: Array) -> None:
    """Raises TypeError for 16-bit floats: a sum of some hundred nats would be rounded by about as much as rewards differ."""
    for name, values in (("logps", logps), ("ref_logps", ref_logps)):
        dtype = getattr(values, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise TypeError(
                f"{name}: expected float32, got {dtype}: sum log-probabilities in float32, or rounding dominates rewards"
            )


def lengths_of(lengths: Array, logps: jax.Array) -> jax.Array:
    """Lengths [P, K] as divisors: the 0 of padding examples becomes 1."""
    if np.shape(lengths) != logps.shape:
        raise ValueError(f"lengths has shape {np.shape(lengths)} and logps {logps.shape}: they must be equal")
    return jnp.maximum(jnp.asarray(lengths, logps.dtype), 1)


def check_beta(value: float | Array, logps: jax.Array) -> Any:
    return check_option("beta", value, logps, lambda x: (x > 0) & np.isfinite(x), "a positive finite number")


def check_smoothing(value: float | Array, logps: jax.Array) -> Any:
    return check_option("label_smoothing", value, logps, lambda x: (x >= 0) & (x < 0.5), "a share in [0, 0.5)")


def check_option(name: str, value: float | Array, logps: jax.Array, inside: Callable[[Any], Any], expected: str) -> Any:
    """`value`, checked to be a scalar or float[P], and in its range."""
    if np.shape(value) not in ((), logps.shape[:1]):
        raise ValueError(f"{name} has shape {np.shape(value)}; give one number, or one for each of the {len(logps)} examples")
    # Under jit or vmap the value is traced and cannot be inspected.
    if not isinstance(value, Tracer) and not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name}={value}: {expected} is expected")
    return value


def column(value: float | Array) -> Any:
    """A scalar unchanged; float[P] as [P, 1], so that it multiplies [P, K]."""
    return jnp.asarray(value)[:, None] if np.ndim(value) else value
