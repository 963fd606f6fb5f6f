"""Attention in blocks, for CPUs: only blocks in which some query sees some key are computed, and scores stay in the cache.

A packed row of 1,024 tokens holds three or four pairs that do not see each other. All its scores at once are 1,024 numbers a
token and head, written and read some ten times; of these a token sees a tenth. So rows are cut into blocks of `BLOCK` tokens.
The keys that a block of queries sees lie in neighbouring blocks (`types.Rows`: one interval a token), which a loop visits one
after the other with a running softmax (Milakov and Gimelshein 2018), as FlashAttention does (Dao et al. 2022). The backward
pass computes the scores again, once to collect the gradient of the queries and once for keys and values.

Blocks are visited in groups, because XLA multiplies eight small matrices at once faster than one. Blocks that see equally much
are in one group, so that few of its visits are in vain.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.attention import dense
from dpo_jax.models.kernels import on_each_device
from dpo_jax.types import Array

BLOCK = 64
GROUP = 8
LOWEST = float(jnp.finfo(jnp.float32).min)


class _Tokens(NamedTuple):
    """What decides who sees whom: int32[blocks, BLOCK] each. `window` is the layer's, int32[]."""

    k_start: jax.Array
    k_end: jax.Array
    column: jax.Array
    position: jax.Array

    def of(self, blocks: jax.Array) -> _Tokens:
        return _Tokens(*(x[blocks] for x in self))


class _Visits(NamedTuple):
    """Every block's run of partners, for groups of blocks: int32[groups, GROUP] each. Blocks with long runs come first."""

    block: jax.Array
    first: jax.Array
    count: jax.Array
    place: jax.Array  # int32[blocks]: where in this order a block is

    def collect(self, x: jax.Array) -> jax.Array:
        """Results of the groups `[groups, GROUP, ...]` in the order of the blocks."""
        return x.reshape(-1, *x.shape[2:])[self.place]


def blocked(
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
    """`attention.attend`, block by block. Short rows, and those that attend to a cache, whose queries are few, are dense."""
    if q.shape[1] != k.shape[1] or q.shape[1] <= 2 * BLOCK:
        options = {"q_positions": q_positions, "k_positions": k_positions, "window": window, "softcap": softcap}
        return dense(q, k, v, k_start=k_start, k_end=k_end, scale=scale, **options)
    if window is not None and q_positions is None:
        raise ValueError("a sliding window needs q_positions and k_positions")
    by_row = [jnp.asarray(k_start), jnp.asarray(k_end)]
    if window is not None:
        by_row += [jnp.asarray(q_positions), jnp.broadcast_to(jnp.asarray(window, jnp.int32), (q.shape[0], 1))]
    # On a mesh rows have to be cut into blocks where they lie.
    return on_each_device(functools.partial(_rows, scale=scale, softcap=softcap))(q, k, v, by_row)


def _rows(q: jax.Array, k: jax.Array, v: jax.Array, by_row: Any, *, scale: float, softcap: float | None) -> jax.Array:
    rows, length = q.shape[:2]
    padding = -length % BLOCK
    start, end, *windowed = by_row
    column = jnp.broadcast_to(jnp.arange(length + padding, dtype=jnp.int32), (rows, length + padding))
    start = jnp.minimum(start, length - 1)
    end = jnp.maximum(end, start + 1)  # a query that sees nothing sees one key: no softmax is empty
    position, window = (windowed[0], windowed[1][0, 0]) if windowed else (column[:, :length], None)
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        beyond = column[:, length:]
        pairs = ((start, beyond), (end, beyond + 1), (position, jnp.zeros_like(beyond)))
        start, end, position = (jnp.concatenate(pair, axis=1) for pair in pairs)
    tokens = _Tokens(*(x.reshape(-1, BLOCK) for x in (start, end, column, position)))
    mixed: jax.Array = _attention(q, k, v, tokens, window, scale, softcap)  # pyright: ignore[reportAssignmentType]
    return mixed[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: _Tokens, window: Any, scale: float, softcap: float | None
) -> jax.Array:
    return _forward(q, k, v, tokens, window, scale, softcap)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: _Tokens, window: Any, scale: float, softcap: float | None
) -> tuple[jax.Array, Any]:
    rows, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    queries, keys, values = (_cut(x, kv_heads) for x in (q, k, v))
    visits = _visits(tokens, rows)[0]

    def group(of: _Visits) -> tuple[jax.Array, jax.Array]:
        here, seen_by = queries[of.block], tokens.of(of.block)

        def visit(number: jax.Array, carry: Any) -> Any:
            total, largest, mass = carry
            there, inside = _partner(of, number)
            scores = _scores(here, keys[there], seen_by, tokens.of(there), inside, window, scale, softcap)
            new = jnp.maximum(largest, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
            mixed = _dot("bnqk,bnkh->bnqh", weights.astype(v.dtype), values[there])
            return total * shrink[..., None] + mixed, new, mass * shrink + weights.sum(-1)

        nothing = jnp.zeros(here.shape, jnp.float32)
        none = jnp.full(here.shape[:-1], LOWEST)
        total, largest, mass = jax.lax.fori_loop(0, of.count.max(), visit, (nothing, none, jnp.zeros_like(none)))
        mass = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)  # of a block that only fills up the group
        return total / mass[..., None], largest + jnp.log(mass)

    mixed, log_mass = (visits.collect(x) for x in jax.lax.map(group, visits._replace(place=visits.block)))
    # What the backward pass needs beside q, k and v; see `decoder.REMAT`.
    out = checkpoint_name(_join(mixed, rows, heads).astype(v.dtype), "kernel")
    return out, (q, k, v, tokens, window, out, checkpoint_name(log_mass, "kernel"))


def _backward(scale: float, softcap: float | None, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, tokens, window, out, log_mass = kept
    rows, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    queries, keys, values, d_mixed = (_cut(x, kv_heads) for x in (q, k, v, d_out))
    pull = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)
    pull = _cut(pull, kv_heads)[..., 0]
    by_query, by_key = _visits(tokens, rows)

    def weights_and_gradient(at: jax.Array, there: jax.Array, inside: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the blocks of scores of queries `at` and keys `there`: the softmax, and the gradient of q @ k."""
        scores = _scores(queries[at], keys[there], tokens.of(at), tokens.of(there), inside, window, scale, softcap)
        weights = jnp.exp(scores - log_mass[at][..., None])
        slope = weights * (_dot("bnqh,bnkh->bnqk", d_mixed[at], values[there]) - pull[at][..., None]) * scale
        if softcap is not None:
            slope = slope * jnp.where(weights > 0, 1 - jnp.square(scores / softcap), 0.0)
        return weights.astype(v.dtype), slope.astype(q.dtype)

    def of_queries(of: _Visits) -> jax.Array:
        def visit(number: jax.Array, total: jax.Array) -> jax.Array:
            there, inside = _partner(of, number)
            _, slope = weights_and_gradient(of.block, there, inside)
            return total + _dot("bnqk,bnkh->bnqh", slope, keys[there])

        nothing = jnp.zeros((GROUP, *queries.shape[1:]), jnp.float32)
        return jax.lax.fori_loop(0, of.count.max(), visit, nothing)

    def of_keys(of: _Visits) -> tuple[jax.Array, jax.Array]:
        def visit(number: jax.Array, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            there, inside = _partner(of, number)
            weights, slope = weights_and_gradient(there, of.block, inside)
            d_keys = _dot("bnqk,bnqh->bnkh", slope, queries[there])
            return total[0] + d_keys, total[1] + _dot("bnqk,bnqh->bnkh", weights, d_mixed[there])

        nothing = jnp.zeros((GROUP, *keys.shape[1:]), jnp.float32)
        return jax.lax.fori_loop(0, of.count.max(), visit, (nothing, nothing))

    d_q = by_query.collect(jax.lax.map(of_queries, by_query._replace(place=by_query.block)))
    d_k, d_v = (by_key.collect(x) for x in jax.lax.map(of_keys, by_key._replace(place=by_key.block)))
    d_q, d_k, d_v = _join(d_q, rows, heads), _join(d_k, rows, kv_heads), _join(d_v, rows, kv_heads)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def _visits(tokens: _Tokens, rows: int) -> tuple[_Visits, _Visits]:
    """Which blocks of keys each block of queries meets, and the other way round. Both are runs of neighbouring blocks."""
    first = (tokens.k_start.min(1) // BLOCK).reshape(rows, -1)
    end = (-(-tokens.k_end.max(1) // BLOCK)).reshape(rows, -1)
    count = first.shape[1]
    block = jnp.arange(count, dtype=jnp.int32)[None, None, :]
    meets = (first[:, :, None] <= block) & (block < end[:, :, None])  # [rows, blocks of queries, blocks of keys]
    first_query = jnp.argmax(meets, axis=1).astype(jnp.int32)
    end_query = jnp.where(meets.any(axis=1), count - jnp.argmax(meets[:, ::-1], axis=1).astype(jnp.int32), first_query)
    return _in_groups(first, end), _in_groups(first_query, end_query)


def _in_groups(first: jax.Array, end: jax.Array) -> _Visits:
    """`first` and `end` int32[rows, blocks of a row] -> visits of blocks that are numbered through all rows."""
    rows, blocks = first.shape
    before = (jnp.arange(rows, dtype=jnp.int32) * blocks)[:, None]
    padding = (0, -(rows * blocks) % GROUP)
    count = jnp.pad((end - first).reshape(-1), padding)
    start = jnp.pad((before + first).reshape(-1), padding)
    order = jnp.argsort(-count).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32)[: rows * blocks]
    block = jnp.minimum(order, rows * blocks - 1)
    return _Visits(*(x.reshape(-1, GROUP) for x in (block, start[order], count[order])), place=place)


def _partner(of: _Visits, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block that each block of a group meets on visit `number`, and whether it still meets one."""
    return of.first + jnp.clip(number, 0, jnp.maximum(of.count - 1, 0)), number < of.count


def _scores(
    q: jax.Array,
    k: jax.Array,
    of_q: _Tokens,
    of_k: _Tokens,
    inside: jax.Array,
    window: Any,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """float32[blocks, K, queries of all heads of a group, BLOCK], the lowest number where a query does not see a key."""
    scores = _dot("bnqh,bnkh->bnqk", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    column = of_k.column[:, None, :]
    seen = (of_q.k_start[:, :, None] <= column) & (column < of_q.k_end[:, :, None]) & inside[:, None, None]
    if window is not None:
        seen &= of_q.position[:, :, None] - of_k.position[:, None, :] < window
    return jnp.where(jnp.tile(seen, (1, q.shape[2] // BLOCK, 1))[:, None], scores, LOWEST)


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _cut(x: jax.Array, kv_heads: int) -> jax.Array:
    """[R, L, N, H] to [blocks, K, N / K * BLOCK, H]: the queries of all heads that read one key/value head in one matrix."""
    rows, length, heads, size = x.shape
    x = x.reshape(rows, length // BLOCK, BLOCK, kv_heads, heads // kv_heads, size)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, kv_heads, heads // kv_heads * BLOCK, size)


def _join(x: jax.Array, rows: int, heads: int) -> jax.Array:
    """What `_cut` cuts."""
    blocks, kv_heads, _, size = x.shape
    x = x.reshape(rows, blocks // rows, kv_heads, heads // kv_heads, BLOCK, size)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(rows, -1, heads, size)
