"""Chunked output head: log-probabilities of tokens from hidden states, without logits for all positions at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.axes import parts_of
from dpo_jax.types import CONTEXT_AXIS, ROW_AXES, Array, Model, Variables

CHUNK = 1024  # least number of scored tokens per device and pass through the head; see `token_logps`

Read = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits float32[..., V], target int32[...]) -> float32[...] or [..., N]: one number for each scored token, or N."""


def log_probability(logits: jax.Array, target: jax.Array) -> jax.Array:
    """log pi of the token `target`."""
    return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def aligned_log_probability(logits: jax.Array, target: jax.Array) -> jax.Array:
    """log pi(target) - log sum_v pi(v)^2: relative to the expected probability of a sampled token (WPO, Zhou et al. 2024)."""
    own = jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)
    return log_probability(logits, target) - own


def log_probability_and_hit(logits: jax.Array, target: jax.Array) -> jax.Array:
    """[..., 2]: log pi of the token `target`, and 1 if no token is more likely, else 0. Log-sum-exp takes the maximum, too."""
    own = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    hit = jax.lax.stop_gradient(own >= logits.max(axis=-1)).astype(logits.dtype)
    return jnp.stack([log_probability(logits, target), hit], axis=-1)


def at_least_float32(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def token_logps(
    model: Model,
    variables: Variables,
    hidden: Array,
    target: Array,
    *,
    used: Array | None = None,
    chunk: int | None = None,
    read: Read = log_probability,
) -> jax.Array:
    """log-probability of `target[R, S]` given `hidden[R, S, D]`: float32[R, S]. Meaningless where `used[R, S]` is false.

    `read` may compute another number from the logits, or N of them: float32[R, S, N].

    The head runs over at most `chunk` positions of each device at a time. Used positions come first, and on one device a chunk
    without any is skipped. The default is `CHUNK`, or D if that is larger: each pass reads the head's weights and adds to their
    gradient, V x D numbers, so a chunk must be large enough that most of the work is on its chunk x V logits.

    With several chunks, the backward pass recomputes the logits instead of keeping them. No buffer of all positions times the
    vocabulary exists in either direction.
    """

    def score(hidden: jax.Array, target: jax.Array) -> jax.Array:
        # float32 whatever the model's type: a reward is a small difference of large sums.
        return read(at_least_float32(model.unembed(variables, hidden)), target)

    chunk = chunk or head_chunk(hidden.shape[-1])
    rows, scored = target.shape
    of_rows, of_scored = math.gcd(rows, parts_of(ROW_AXES)), math.gcd(scored, parts_of((CONTEXT_AXIS,)))
    parts = of_rows * of_scored  # each device sorts its own part
    each = rows * scored // parts
    count = -(-each // chunk)
    if count <= 1:
        return score(jnp.asarray(hidden), jnp.asarray(target))
    size = min(chunk, -(-each // count // 64) * 64)  # a CPU multiplies matrices of odd sizes a third slower
    used = jnp.ones(target.shape, bool) if used is None else jnp.asarray(used)

    def by_device(x: Array) -> jax.Array:
        """[R, S, ...] to [parts, each, ...]."""
        x = jnp.asarray(x).reshape(of_rows, rows // of_rows, of_scored, scored // of_scored, *x.shape[2:])
        return x.swapaxes(1, 2).reshape(parts, each, *x.shape[4:])

    order = jnp.argsort(~by_device(used), axis=1)

    def split(x: Array) -> jax.Array:
        """[R, S, ...] to [count, parts, size, ...], used positions first."""
        x = by_device(x)
        x = jnp.take_along_axis(x, order.reshape(parts, each, *(1 for _ in x.shape[2:])), axis=1)
        x = jnp.pad(x, [(0, 0), (0, count * size - each)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(parts, count, size, *x.shape[2:]), 1, 0)

    chunks = (split(hidden), split(target), split(used))
    if parts == 1:
        score_chunk = _where_used(score, *(chunk[0] for chunk in chunks[:2]))
    else:
        # A chunk is rarely unused on all devices, and with a condition the head's gradient would be reduced chunk by chunk.
        score_chunk = lambda hidden, target, _: jax.checkpoint(score)(hidden, target)  # noqa: E731
    logps = jnp.moveaxis(jax.lax.map(lambda chunk: score_chunk(*chunk), chunks), 0, 1)
    several = logps.shape[3:]  # () or (N,)
    logps = logps.reshape(parts, count * size, *several)[:, :each]
    back = jnp.argsort(order, axis=1).reshape(parts, each, *(1 for _ in several))
    logps = jnp.take_along_axis(logps, back, axis=1)
    logps = logps.reshape(of_rows, of_scored, rows // of_rows, scored // of_scored, *several)
    return logps.swapaxes(1, 2).reshape(rows, scored, *several)


def head_chunk(width: int) -> int:
    """Default number of scored tokens per device and pass through the head. `width` is D."""
    return max(CHUNK, width)


def _where_used(score: Callable[..., jax.Array], *example: jax.Array) -> Callable[..., jax.Array]:
    """`score(hidden, target)` as a function of `(hidden, target, used)` that skips chunks in which nothing is used.

    The backward pass is written by hand, because `jax.grad` of a condition keeps a copy of the head for each chunk. The
    gradient of a matrix leaves the condition in the type of `hidden`, which is the type of a product with `hidden`: a float32
    copy of it would be the largest buffer of a step.
    """
    score, weights = jax.closure_convert(score, *example)
    scores = jax.eval_shape(score, *example, *weights)

    @jax.custom_vjp
    def score_chunk(weights: list[jax.Array], hidden: jax.Array, target: jax.Array, used: jax.Array) -> jax.Array:
        return jax.lax.cond(used.any(), lambda: score(hidden, target, *weights), lambda: jnp.zeros_like(scores))

    def backward(inputs: Any, d_logps: jax.Array) -> tuple[Any, ...]:
        weights, hidden, target, used = inputs

        def gradients() -> Any:
            found = jax.vjp(lambda weights, hidden: score(hidden, target, *weights), weights, hidden)[1](d_logps)
            return jax.tree.map(lambda d: d.astype(hidden.dtype) if d.ndim > 1 else d, found)

        shapes = jax.eval_shape(gradients)
        found = jax.lax.cond(used.any(), gradients, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        return *jax.tree.map(lambda d, like: d.astype(like.dtype), found, (weights, hidden)), None, None

    score_chunk.defvjp(lambda *inputs: (score_chunk(*inputs), inputs), backward)
    return functools.partial(score_chunk, weights)
