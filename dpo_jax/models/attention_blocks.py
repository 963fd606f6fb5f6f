"""Block-sparse attention for CPUs: only blocks with visible keys are computed, and scores stay in the CPU cache.

A packed row of 1,024 tokens holds three or four pairs that do not see each other. Dense scores are 1,024 numbers per token and
head, written and read some ten times, although a token sees only a tenth of them. Rows are therefore split into blocks of
`BLOCK` tokens. The keys that a block of queries sees lie in neighboring blocks (`types.Rows`: one interval per token). A loop
visits these one after the other with a running softmax (Milakov and Gimelshein 2018), as FlashAttention does (Dao et al. 2022).
The backward pass makes the same visits, recomputes the scores, and accumulates the gradients of queries, keys and values.

Blocks are visited in groups, because XLA multiplies several small matrices at once faster than one by one. Blocks that see
about as many keys are grouped, so that few visits of a group are wasted.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.attention import Mixed, PartialAttention, Scoring, Span, VisibleKeys, dense
from dpo_jax.models.attention_common import on_each_device
from dpo_jax.models.products import precision_of

BLOCK = 64
GROUP = 4
LOWEST = float(jnp.finfo(jnp.float32).min)


class _Tokens(NamedTuple):
    """Visibility of tokens: int32[blocks, BLOCK] each. `window` is the layer's, int32[]."""

    k_start: jax.Array
    k_end: jax.Array
    column: jax.Array
    position: jax.Array

    def of(self, blocks: jax.Array) -> _Tokens:
        return _Tokens(*(x[blocks] for x in self))


class _Visits(NamedTuple):
    """The run of key blocks that each query block visits, in groups, long runs first: int32[groups, GROUP] each."""

    block: jax.Array
    first: jax.Array
    count: jax.Array
    place: jax.Array  # int32[blocks]: position of each block in this order

    def collect(self, x: jax.Array) -> jax.Array:
        """Results of the groups, `[groups, GROUP, ...]`, reordered by block."""
        return x.reshape(-1, *x.shape[2:])[self.place]


def blocked(q: jax.Array, k: jax.Array, v: jax.Array, keys: VisibleKeys, scoring: Scoring) -> jax.Array:
    """`attention.attend`, block by block. Short rows, and rows that attend to a cache and have few queries, use `dense`."""
    if q.shape[1] != k.shape[1] or q.shape[1] <= 2 * BLOCK:
        return dense(q, k, v, keys, scoring)
    if keys.window is not None and keys.q_positions is None:
        raise ValueError("a sliding window needs q_positions and k_positions")
    by_row = [jnp.asarray(keys.start), jnp.asarray(keys.end)]
    if keys.window is not None:
        by_row += [jnp.asarray(keys.q_positions), jnp.broadcast_to(jnp.asarray(keys.window, jnp.int32), (q.shape[0], 1))]
    # On a mesh each device splits its own rows into blocks.
    return on_each_device(functools.partial(_rows, scoring=scoring))(q, k, v, by_row)


def _rows(q: jax.Array, k: jax.Array, v: jax.Array, by_row: Any, *, scoring: Scoring) -> jax.Array:
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
    mixed: jax.Array = _attention(q, k, v, tokens, window, scoring)  # pyright: ignore[reportAssignmentType]
    return mixed[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, tokens: _Tokens, window: Any, scoring: Scoring) -> jax.Array:
    return _forward(q, k, v, tokens, window, scoring)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, tokens: _Tokens, window: Any, scoring: Scoring) -> tuple[jax.Array, Any]:
    rows, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    # Names what the backward pass needs; see `decoder.REMAT`.
    queries, keys, values = (checkpoint_name(_cut(x, kv_heads), "kernel") for x in (q, k, v))
    mixed, log_mass = _mixed(queries, keys, values, tokens, window, scoring, rows=rows)
    out = checkpoint_name(_join(mixed, rows, heads).astype(v.dtype), "kernel")
    return out, (queries, keys, values, tokens, window, out, checkpoint_name(log_mass, "kernel"))


def _mixed(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tokens: _Tokens,
    window: Any,
    scoring: Scoring,
    *,
    rows: int,
) -> tuple[jax.Array, jax.Array]:
    """Mixed values, float32, and the log-sum-exp of the scores, by block."""
    visits, group_size = _visits(tokens, rows), queries.shape[2] // BLOCK

    def group(of: _Visits) -> tuple[jax.Array, jax.Array]:
        here, seen_by = queries[of.block], tokens.of(of.block)

        def visit(number: jax.Array, carry: Any) -> Any:
            total, largest, mass = carry
            there, inside = _partner(of, number)
            scores = scoring.scores(_dot("bnqh,bnkh->bnqk", here, keys[there]))
            seen = _seen(seen_by, tokens.of(there), inside, window)
            scores = jnp.where(jnp.tile(seen, (1, group_size, 1))[:, None], scores, LOWEST)
            new = jnp.maximum(largest, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
            mixed = _dot("bnqk,bnkh->bnqh", weights.astype(values.dtype), values[there])
            return total * shrink[..., None] + mixed, new, mass * shrink + weights.sum(-1)

        nothing = jnp.zeros(here.shape, jnp.float32)
        none = jnp.full(here.shape[:-1], LOWEST)
        total, largest, mass = jax.lax.fori_loop(0, of.count.max(), visit, (nothing, none, jnp.zeros_like(none)))
        mass = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)  # for a block that only pads the group
        return total / mass[..., None], largest + jnp.log(mass)

    mixed, log_mass = (visits.collect(x) for x in jax.lax.map(group, visits._replace(place=visits.block)))
    return mixed, log_mass


def _backward(scoring: Scoring, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    queries, keys, values, tokens, window, out, log_mass = kept
    rows, heads, kv_heads = out.shape[0], out.shape[2], keys.shape[1]
    d_mixed = _cut(d_out, kv_heads)
    pull = _dot("rlnh,rlnh->rln", out, d_out)[..., None]  # as a product: XLA is slow to multiply and sum over four axes
    pull = _cut(pull, kv_heads)[..., 0]
    visits = _visits(tokens, rows)

    def group(d_met: list[jax.Array], of: _Visits) -> tuple[list[jax.Array], jax.Array]:
        here, seen_by, d_here = queries[of.block], tokens.of(of.block), d_mixed[of.block]
        mass_here, pull_here = log_mass[of.block][:, :, None], pull[of.block][:, :, None]

        def visit(number: jax.Array, carry: Any) -> Any:
            d_queries, d_keys, d_values = carry
            there, inside = _partner(of, number)
            # Keys before queries: then only one product in five has to transpose its operands.
            scores = scoring.scores(_dot("bnkh,bnqh->bnkq", keys[there], here))
            seen = _seen(seen_by, tokens.of(there), inside, window).swapaxes(1, 2)
            seen = jnp.tile(seen, (1, 1, heads // kv_heads))[:, None]
            weights = jnp.where(seen, jnp.exp(scores - mass_here), 0.0)
            slope = weights * (_dot("bnkh,bnqh->bnkq", values[there], d_here) - pull_here) * scoring.scale
            if scoring.softcap is not None:
                slope = slope * (1 - jnp.square(scores / scoring.softcap))
            weights, slope = weights.astype(values.dtype), slope.astype(queries.dtype)
            d_queries = d_queries + _dot("bnkq,bnkh->bnqh", slope, keys[there])
            d_keys = d_keys.at[there].add(_dot("bnkq,bnqh->bnkh", slope, here))
            return d_queries, d_keys, d_values.at[there].add(_dot("bnkq,bnqh->bnkh", weights, d_here))

        nothing = jnp.zeros(here.shape, jnp.float32)
        d_queries, *d_met = jax.lax.fori_loop(0, of.count.max(), visit, (nothing, *d_met))
        return d_met, d_queries

    nothing = jnp.zeros(keys.shape, jnp.float32)
    (d_keys, d_values), d_queries = jax.lax.scan(group, [nothing, nothing], visits._replace(place=visits.block))
    d_q = _join(visits.collect(d_queries), rows, heads)
    d_k, d_v = _join(d_keys, rows, kv_heads), _join(d_values, rows, kv_heads)
    return d_q.astype(queries.dtype), d_k.astype(keys.dtype), d_v.astype(values.dtype), None, None


_attention.defvjp(_forward, _backward)


def _partial_forward(q: jax.Array, k: jax.Array, v: jax.Array, span: Span, scoring: Scoring) -> Mixed:
    rows, length, heads = q.shape[:3]
    queries, keys, values = (_cut(_whole_blocks(x), k.shape[2]) for x in (q, k, v))
    mixed, log_mass = _mixed(queries, keys, values, _tokens_of(span), None, scoring, rows=rows)
    log_mass = _join(log_mass[..., None], rows, heads)[:, :length, :, 0]
    return Mixed(_join(mixed, rows, heads)[:, :length], log_mass.swapaxes(1, 2))


def _partial_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, span: Span, mixed: Mixed, d_out: jax.Array, scoring: Scoring
) -> tuple[jax.Array, jax.Array, jax.Array]:
    length, kv_heads = q.shape[1], k.shape[2]
    queries, keys, values = (_cut(_whole_blocks(x), kv_heads) for x in (q, k, v))
    by_block = _cut(_whole_blocks(mixed.log_mass.swapaxes(1, 2)[..., None]), kv_heads)[..., 0]
    kept = queries, keys, values, _tokens_of(span), None, _whole_blocks(mixed.out), by_block
    d_q, d_k, d_v, *_ = _backward(scoring, kept, _whole_blocks(d_out))
    return d_q[:, :length], d_k[:, :length], d_v[:, :length]


def _whole_blocks(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0)))


def _tokens_of(span: Span) -> _Tokens:
    """Intervals, some of which may be empty. Padding of the last block sees nothing."""
    start, end = span
    length = start.shape[1]
    padding = ((0, 0), (0, -length % BLOCK))
    nothing = end <= start
    start = jnp.pad(jnp.where(nothing, length, start), padding, constant_values=length)
    end = jnp.pad(jnp.where(nothing, 0, end), padding)
    column = jnp.broadcast_to(jnp.arange(start.shape[1], dtype=jnp.int32), start.shape)
    return _Tokens(*(x.reshape(-1, BLOCK) for x in (start, end, column, column)))


PARTIAL = PartialAttention(_partial_forward, _partial_backward)


def _visits(tokens: _Tokens, rows: int) -> _Visits:
    """The run of key blocks that each query block visits. Blocks are numbered through all rows."""
    start, end = (tokens.k_start.min(1) // BLOCK), -(-tokens.k_end.max(1) // BLOCK)
    blocks = len(start)
    of_row = jnp.arange(blocks, dtype=jnp.int32) // (blocks // rows) * (blocks // rows)
    padding = (0, -blocks % GROUP)
    count, first = jnp.pad(end - start, padding), jnp.pad(of_row + start, padding)
    order = jnp.argsort(-count).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32)[:blocks]
    block = jnp.minimum(order, blocks - 1)
    return _Visits(*(x.reshape(-1, GROUP) for x in (block, first[order], count[order])), place=place)


def _partner(of: _Visits, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key block that each block of a group visits in step `number`, and whether it still visits one."""
    return of.first + jnp.clip(number, 0, jnp.maximum(of.count - 1, 0)), number < of.count


def _seen(of_q: _Tokens, of_k: _Tokens, inside: jax.Array, window: Any) -> jax.Array:
    """Mask of visible keys: bool[blocks, BLOCK, BLOCK]."""
    column = of_k.column[:, None, :]
    seen = (of_q.k_start[:, :, None] <= column) & (column < of_q.k_end[:, :, None]) & inside[:, None, None]
    if window is not None:
        seen &= of_q.position[:, :, None] - of_k.position[:, None, :] < window
    return seen


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _cut(x: jax.Array, kv_heads: int) -> jax.Array:
    """[R, L, N, H] to [blocks, K, N / K * BLOCK, H]: all heads that share a key/value head in one matrix."""
    rows, length, heads, size = x.shape
    x = x.reshape(rows, length // BLOCK, BLOCK, kv_heads, heads // kv_heads, size)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, kv_heads, heads // kv_heads * BLOCK, size)


def _join(x: jax.Array, rows: int, heads: int) -> jax.Array:
    """The inverse of `_cut`."""
    blocks, kv_heads, _, size = x.shape
    x = x.reshape(rows, blocks // rows, kv_heads, heads // kv_heads, BLOCK, size)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(rows, -1, heads, size)
