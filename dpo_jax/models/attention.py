"""Attention over key intervals, and rotary position embedding. Axis letters: see `dpo_jax.types`; T counts keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.products import float32_product, precision_of
from dpo_jax.models.rope import Rope as Rope
from dpo_jax.types import Array, Rows


class VisibleKeys(NamedTuple):
    """Which keys each query sees: query `x` sees those at `start[x] <= t < end[x]`, int32[R, L] in `[0, T]`.

    With a `window` (int32[], or None) a visible key must also satisfy `q_position - k_position < window`: a distance between
    positions in the text (int32[R, L] and int32[R, T]), not between row columns, so it means the same in every row layout.
    """

    start: Array
    end: Array
    q_positions: Array | None = None
    k_positions: Array | None = None
    window: int | jax.Array | None = None

    @classmethod
    def of(cls, rows: Rows, *, window: int | jax.Array | None = None) -> VisibleKeys:
        """The keys visible in rows that attend to themselves."""
        return cls(rows.k_start, rows.k_end, rows.positions, rows.positions, window)


class Scoring(NamedTuple):
    """The score of a query and a key: `scale` times their product, bounded by a `softcap`: `c * tanh(score / c)` (Gemma 2)."""

    scale: float
    softcap: float | None = None

    def scores(self, products: jax.Array) -> jax.Array:
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, keys: VisibleKeys, scoring: Scoring) -> jax.Array:
    """`attend` with all scores of all heads in memory: the reference implementation that other paths are tested against."""
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads cannot share {kv_heads} key/value heads evenly")
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, size)
    scores = scoring.scores(float32_product("rlkgh,rtkh->rkglt", grouped, k))
    column = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    visible = (jnp.asarray(keys.start)[:, :, None] <= column) & (column < jnp.asarray(keys.end)[:, :, None])
    if keys.window is not None:
        if keys.q_positions is None or keys.k_positions is None:
            raise ValueError("a sliding window needs q_positions and k_positions")
        visible &= jnp.asarray(keys.q_positions)[:, :, None] - jnp.asarray(keys.k_positions)[:, None, :] < keys.window
    # The lowest finite number, not -inf: a query that sees no key then averages over all keys instead of becoming NaN,
    # and NaN in a row that nobody reads would still reach the gradient of the shared weights.
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkglt,rtkh->rlkgh", weights, v, precision=precision_of(v.dtype)).reshape(rows, length, heads, size)


class Span(NamedTuple):
    """One interval of keys a query: the first and one after the last, int32[R, L] each. Empty where `end <= start`."""

    start: jax.Array
    end: jax.Array


class Mixed(NamedTuple):
    """Attention to some keys, and the statistics to combine it with others. Meaningless for a query that sees no key."""

    out: jax.Array  # [R, L, N, H]  mixed values
    log_mass: jax.Array  # float32[R, N, L]  log-sum-exp of the scores


class PartialAttention(NamedTuple):
    """Attention to a part of the keys, which `models.attention_ring` combines. Pure functions of the arrays of one device.

    `forward(q, k, v, span, scoring)` mixes the values of the keys in `span`, one interval per query. `backward(q, k, v, span,
    mixed, d_out, scoring)` returns the gradients of q, k and v, where `mixed` is the result over all keys.
    """

    forward: Callable[[jax.Array, jax.Array, jax.Array, Span, Scoring], Mixed]
    backward: Callable[
        [jax.Array, jax.Array, jax.Array, Span, Mixed, jax.Array, Scoring], tuple[jax.Array, jax.Array, jax.Array]
    ]


class AttentionPath(NamedTuple):
    """One attention implementation; `models.attention_paths` lists them.

    Without `prepare`, `attend` takes the arguments of `dense`. A kernel that needs more than a batch's intervals has
    `prepare(k_start, k_end, windows)`, called once for all layers with the distinct windows of the model (None: full
    attention), and `attend(q, k, v, prepared, number, scoring)`, where `number` is the index of the layer's window. Kernels
    are for rows that attend to themselves, not for a cache.
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
    keys: VisibleKeys,
    scoring: Scoring,
    *,
    path: AttentionPath = DENSE,
    prepared: Any = None,
    number: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of each query to its visible keys. Returns `[R, L, N, H]`, typed like `v`.

    `q[R, L, N, H]`, `k[R, T, K, H]`, `v[R, T, K, H]`; head `n` reads key/value head `n // (N / K)` (grouped queries, Ainslie et
    al. 2023). Scores and softmax are float32 whatever the type of `q`. `path` selects the implementation; a caller with many
    layers passes the result of its `prepare`, and in `number` the index of the window.
    """
    if path.prepare is None:
        return path.attend(q, k, v, keys, scoring)
    prepared = path.prepare(keys.start, keys.end, (keys.window,)) if prepared is None else prepared
    return path.attend(q, k, v, prepared, number, scoring)


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
