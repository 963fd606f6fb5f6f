"""Attention over key intervals, and rotary position embedding. Axis letters: see `dpo_jax.types`; T counts keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.products import float32_product, precision_of
from dpo_jax.models.rope import Rope as Rope
from dpo_jax.types import Array


def dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    k_start: Array,
    k_end: Array,
    scale: float,
    q_positions: Array | None = None,
    k_positions: Array | None = None,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """`attend` with all scores of all heads in memory: the reference implementation that other paths are tested against."""
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads cannot share {kv_heads} key/value heads evenly")
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, size)
    scores = float32_product("rlkgh,rtkh->rkglt", grouped, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    column = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    visible = (jnp.asarray(k_start)[:, :, None] <= column) & (column < jnp.asarray(k_end)[:, :, None])
    if window is not None:
        if q_positions is None or k_positions is None:
            raise ValueError("a sliding window needs q_positions and k_positions")
        visible &= jnp.asarray(q_positions)[:, :, None] - jnp.asarray(k_positions)[:, None, :] < window
    # The lowest finite number, not -inf: a query that sees no key then averages over all keys instead of becoming NaN,
    # and NaN in a row that nobody reads would still reach the gradient of the shared weights.
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkglt,rtkh->rlkgh", weights, v, precision=precision_of(v.dtype)).reshape(rows, length, heads, size)


class PartialAttention(NamedTuple):
    """Attention to a part of the keys, which `models.attention_ring` combines. Pure functions of the arrays of one device.

    `forward(q, k, v, start, end, scale=..., softcap=...) -> (out[R, L, N, H], log_mass float32[R, N, L])`: mixed values,
    and the log-sum-exp of the scores. A query with `end <= start` sees nothing, and its results are
    meaningless. `backward(q, k, v, start, end, out, log_mass, d_out, scale=..., softcap=...) -> (d_q, d_k, d_v)`, where
    `out` and `log_mass` are those over all keys.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class AttentionPath(NamedTuple):
    """One attention implementation; `models.attention_paths` lists them.

    Without `prepare`, `attend` takes the arguments of `dense`. A kernel that needs more than a batch's intervals has
    `prepare(k_start, k_end, windows)`, called once for all layers with the distinct windows of the model (None: full
    attention), and `attend(q, k, v, prepared, number=..., scale=..., softcap=...)`, where `number` is the index of the layer's
    window. Kernels are for rows that attend to themselves, not for a cache.
    """

    name: str
    attend: Callable[..., jax.Array]
    prepare: Callable[..., Any] | None = None
    partial: PartialAttention | None = None  # for rows split over devices; None: not supported


DENSE = AttentionPath("dense", dense)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    k_start: Array,
    k_end: Array,
    scale: float,
    q_positions: Array | None = None,
    k_positions: Array | None = None,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    path: AttentionPath = DENSE,
    prepared: Any = None,
    number: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention in which query `x` sees the keys `k_start[x] <= t < k_end[x]`. Returns `[R, L, N, H]`, typed like `v`.

    `q[R, L, N, H]`, `k[R, T, K, H]`, `v[R, T, K, H]`; head `n` reads key/value head `n // (N / K)` (grouped queries, Ainslie et
    al. 2023). `k_start`, `k_end`: int32[R, L] in `[0, T]`. With a `window`, a visible key must also satisfy
    `q_position - k_position < window`: a distance between positions in the text (`q_positions` int32[R, L], `k_positions`
    int32[R, T]), not between row columns, so it means the same in every row layout. `softcap` bounds the scores:
    `c * tanh(score / c)` (Gemma 2). Scores and softmax are float32 whatever the type of `q`. `path` selects the
    implementation; a caller with many layers passes the result of its `prepare`, and in `number` the index of the window.
    """
    if path.prepare is not None:
        prepared = path.prepare(k_start, k_end, (window,)) if prepared is None else prepared
        return path.attend(q, k, v, prepared, number=number, scale=scale, softcap=softcap)
    return path.attend(
        q,
        k,
        v,
        k_start=k_start,
        k_end=k_end,
        scale=scale,
        q_positions=q_positions,
        k_positions=k_positions,
        window=window,
        softcap=softcap,
    )


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotate `x[R, L, heads, H]` by the angles of `Rope.angles`; entries beyond the rotated ones pass through unchanged."""
    size = 2 * cos.shape[-1]
    turned = x[..., :size].astype(jnp.float32)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)
