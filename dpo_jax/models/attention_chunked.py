"""Attention for a chunk of queries at a time, in plain XLA. It runs on any device, and is used with key/value caches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import Scoring, VisibleKeys, dense
from dpo_jax.models.axes import parts_of
from dpo_jax.types import HEAD_AXIS, ROW_AXES

SCORES = 1 << 28  # bytes of scores per chunk and device


def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: VisibleKeys,
    scoring: Scoring,
    *,
    limit: int = SCORES,
) -> jax.Array:
    """`dense` for chunks of queries whose float32 scores fit into `limit` bytes per device; for all at once, if they fit.

    The backward pass recomputes the scores of each chunk, so it has no buffer of L x T scores either. Masked blocks are
    computed like any other.
    """
    rows, length, heads, _ = q.shape
    here = rows * heads / parts_of((*ROW_AXES, HEAD_AXIS))
    count = math.ceil(length / max(1, min(length, limit // max(1, int(4 * here * k.shape[1])))))
    if count == 1:
        return dense(q, k, v, keys, scoring)
    return _recomputed(functools.partial(_in_chunks, scoring, count), (q, k, v), keys)


def _in_chunks(scoring: Scoring, count: int, floats: Any, keys: VisibleKeys) -> jax.Array:
    q, k, v = floats
    rows, length = q.shape[:2]
    size = -(-length // count)

    def chunks(x: jax.Array) -> jax.Array:
        """[R, L, ...] to [count, R, size, ...]; padding repeats the last query, so that every query sees something."""
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return x.reshape(rows, count, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(part: Any) -> jax.Array:
        queries, start, end, positions = part
        return dense(queries, k, v, keys._replace(start=start, end=end, q_positions=positions), scoring)

    mixed = jax.lax.map(one, jax.tree.map(chunks, (q, keys.start, keys.end, keys.q_positions)))
    return mixed.swapaxes(0, 1).reshape(rows, count * size, *mixed.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(work: Callable[..., jax.Array], floats: Any, keys: VisibleKeys) -> jax.Array:
    """`work(floats, keys)`, for which the backward pass keeps only its arguments.

    `jax.checkpoint` does that too, but an enclosing policy that saves matrix products would save those inside it.
    """
    return work(floats, keys)


def _recomputed_forward(work: Callable[..., jax.Array], floats: Any, keys: VisibleKeys) -> tuple[jax.Array, Any]:
    return work(floats, keys), (floats, keys)


def _recomputed_backward(work: Callable[..., jax.Array], kept: Any, cotangent: jax.Array) -> tuple[Any, None]:
    floats, keys = kept
    return jax.vjp(lambda floats: work(floats, keys), floats)[1](cotangent)[0], None


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)
