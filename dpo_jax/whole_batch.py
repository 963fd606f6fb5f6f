"""Means over the global batch, and losses that depend on all of it (KTO, AOT), where it is split into parts.

The parts are microbatches or those of pmap devices.

The gradient of such a loss is the sum over examples of dL/d(log-probability) times the gradient of that log-probability. A
first pass, forward only, computes the log-probabilities of all parts. They give the loss of the whole batch, and its slopes
dL/d(log-probability). The step then takes the gradient of a linear function with these slopes, part by part. This is gradient
caching (Gao et al. 2021, arXiv 2101.06983): exact, for the price of one more forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.logps import completion_lengths
from dpo_jax.losses import PreferenceLoss
from dpo_jax.microbatches import join, split
from dpo_jax.types import Array, Rows

Inputs = Callable[[Rows], tuple[jax.Array, Array, Mapping[str, Array]]]
"""Rows -> log-probabilities of policy and reference, float32[P, K] each, and other inputs of a loss by name, [P] or [P, K]."""


def with_logp_gradients(rows: Rows, inputs: Inputs, *, loss: PreferenceLoss, microbatches: int, axis_name: str | None) -> Rows:
    """`rows` with three more columns, for which `linear_loss` has the values and gradients of `loss` on the global batch."""
    here = *join(jax.lax.map(inputs, split(rows, microbatches)), rows), jnp.asarray(rows.weight)
    logps, ref_logps, extras, weight = jax.tree.map(lambda x: _of_all(x, axis_name), here)

    def total(logps: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        losses, rewards = loss(logps, ref_logps, **extras)
        return (losses * weight).sum(), (losses, rewards)

    slopes, (losses, rewards) = jax.grad(total, has_aux=True)(logps)
    # `mean_grads` multiplies by the weight again, so it is divided out here. A padding example, of weight 0, has no slope.
    slopes = slopes / jnp.where(weight > 0, weight, 1)[:, None]
    found = {"whole_losses": losses, "whole_rewards": rewards, "whole_gradients": slopes}
    count = rows.weight.shape[0]
    return rows.replace(extras={**(rows.extras or {}), **{k: _of_this(v, count, axis_name) for k, v in found.items()}})


def linear_loss(
    logps: Array, ref_logps: Array, *, whole_losses: Array, whole_rewards: Array, whole_gradients: Array, **others: Any
) -> tuple[jax.Array, jax.Array]:
    """A loss with given values float32[P], and with slopes float32[P, K] in `logps`. Other columns are not read."""
    linear = (jnp.asarray(whole_gradients) * logps).sum(axis=1)
    return jnp.asarray(whole_losses) + linear - jax.lax.stop_gradient(linear), jnp.asarray(whole_rewards)


def _of_all(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def _of_this(x: jax.Array, count: int, axis_name: str | None) -> jax.Array:
    """This device's `count` entries."""
    return x if axis_name is None else jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * count, count)


class BatchMeans(NamedTuple):
    """Means over the examples of the global batch, without padding examples."""

    lengths: jax.Array  # float32[K]  scored tokens of each completion
    desirable: jax.Array | None  # float32[]  labels of single completions


def batch_means(rows: Rows, axis_name: str | None = None) -> BatchMeans:
    """Means that metrics and some losses need of the whole batch. `axis_name` is that of `train_step`."""
    mean, labels = (
        functools.partial(mean_of_examples, weight=rows.weight, axis_name=axis_name),
        (rows.extras or {}).get("desirable"),
    )
    return BatchMeans(mean(completion_lengths(rows)), None if labels is None else mean(labels))


def mean_of_examples(values: Array, weight: Array, axis_name: str | None) -> jax.Array:
    """The weighted mean of `values` [E, ...] over the examples of the global batch, without padding examples: [...].

    `axis_name` is that of `train_step`. It is for numbers that a loss needs of the whole batch.

    >>> print(mean_of_examples(np.array([4.0, 2.0, 9.0]), np.array([1.0, 1.0, 0.0]), None))
    3.0
    """
    values, weight = jnp.asarray(values), jnp.asarray(weight)
    # Not a matrix product, which an accelerator would round.
    sums = (weight.reshape(-1, *(1 for _ in values.shape[1:])) * values).sum(axis=0), weight.sum()
    total, count = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return total / count
