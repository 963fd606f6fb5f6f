"""Attention of one new token per row: to a prompt's keys, which several rows share, and to the row's own ring of columns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import Scoring
from dpo_jax.models.products import float32_product
from dpo_jax.types import Rows, SharedCache


class LaneKeys(NamedTuple):
    """Keys visible to the new token of each row: columns of its prompt, then its own. Computed once for all layers."""

    visible: jax.Array  # bool[R, Lp + C]
    distance: jax.Array  # int32[R, Lp + C]  distance from the token back to the key, in text positions
    prompts: tuple[Any, Any]  # keys and values of the prompts in all layers


def lane_keys(rows: Rows, cache: SharedCache) -> tuple[LaneKeys, jax.Array]:
    """The keys that `rows` of one token each see, and the ring column they write to.

    All rows write to the same column, the next after the last token's, whenever they started. A row's own tokens are the newest
    `k_end - Lp` columns, counted backwards around the ring.
    """
    of_prompt, ring = cache.prompts["positions"], cache.own["positions"].shape[1]
    (prompts, columns), lanes = of_prompt.shape, rows.tokens.shape[0]
    write_at = cache.own["length"] % ring
    back = (write_at - jnp.arange(ring, dtype=jnp.int32)) % ring
    own = jnp.asarray(rows.k_end) - columns
    on_prompt = jnp.arange(columns, dtype=jnp.int32)[None] >= jnp.asarray(rows.k_start)
    distance = jnp.asarray(rows.positions) - jnp.repeat(of_prompt, lanes // prompts, axis=0)
    return LaneKeys(
        jnp.concatenate([on_prompt, back[None] < own], axis=1),
        jnp.concatenate([distance, jnp.broadcast_to(back, (lanes, ring))], axis=1),
        (cache.prompts["key"], cache.prompts["value"]),
    ), write_at


def attend_lanes(
    q: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, jax.Array],
    *,
    visible: jax.Array,
    scoring: Scoring,
) -> jax.Array:
    """Softmax attention of `q[R, 1, N, H]` to two stores: prompts [G, K, Lp, H] and the rows' own [R, K, C, H].

    Row `r` reads prompt `r // (R / G)`. The queries of all rows that share a prompt are multiplied with its keys as
    one matrix, so the keys are read once. `visible[R, Lp + C]`. Returns [R, 1, N, H], typed like `q`.
    """
    (lanes, _, heads, size), (groups, kv_heads, columns, _) = q.shape, keys[0].shape
    width, share = lanes // groups, heads // kv_heads

    def by_prompt(x: jax.Array) -> jax.Array:
        """[R, K, N / K, ...] to [G, K, R / G * N / K, ...]"""
        return x.reshape(groups, width, kv_heads, share, -1).swapaxes(1, 2).reshape(groups, kv_heads, width * share, -1)

    def by_row(x: jax.Array) -> jax.Array:
        return x.reshape(groups, kv_heads, width, share, -1).swapaxes(1, 2).reshape(lanes, kv_heads, share, -1)

    q = q.reshape(lanes, kv_heads, share, size)
    on_prompt = by_row(float32_product("gkqh,gkth->gkqt", by_prompt(q), keys[0]))
    scores = scoring.scores(jnp.concatenate([on_prompt, float32_product("rkqh,rkth->rkqt", q, keys[1])], axis=-1))
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = by_row(float32_product("gkqt,gkth->gkqh", by_prompt(weights[..., :columns]), values[0]))
    mixed = mixed + float32_product("rkqt,rkth->rkqh", weights[..., columns:], values[1])
    return mixed.reshape(lanes, 1, heads, size).astype(q.dtype)
