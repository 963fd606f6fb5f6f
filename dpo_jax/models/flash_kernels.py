"""Flash attention over key intervals in Pallas (Triton): a forward kernel, one for dq, and one for dk and dv.

The algorithm is FlashAttention-2 (Dao 2023): a program holds one tile of queries (or of keys), visits the tiles of the other
side one after the other, and keeps scores on the chip. The mask is an interval of keys for each query. In all three kernels a
program visits only the blocks from `first` to `last`, which `attention_gpu` computes once per step. Statistics and sums are
float32; no sum is atomic, so two runs give the same bits.

Arrays here are padded: lengths are multiples of `LONGEST`, head sizes multiples of `LANES`. Tile lengths are powers of two, as
Triton requires; a head of 80 entries is read as 64 and 16.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dpo_jax.models.products import precision_of

BLOCK = 64  # queries and keys in a block: the unit of `Spans.first` and similar fields
LONGEST = 128  # length of the longest tile
LANES = 16  # the least that a tensor core multiplies
LOWEST = -1e30  # value of a masked score: its exponential is 0, and the difference of two is not NaN
LOG2E = math.log2(math.e)


class Spans(NamedTuple):
    """Visible keys of each query, and blocks to visit. A block is `BLOCK` queries or keys of one row; `last` is exclusive."""

    start: jax.Array  # int32[R, L]  first key of a query
    end: jax.Array  # int32[R, L]  one after its last key
    key_first: jax.Array  # int32[R, L / BLOCK]  of a block of queries: the first block of keys it meets
    key_last: jax.Array  # int32[R, L / BLOCK]
    query_first: jax.Array  # int32[R, T / BLOCK]  of a block of keys: the first block of queries that meets it
    query_last: jax.Array  # int32[R, T / BLOCK]


class Settings(NamedTuple):
    """Static options of the kernels."""

    scale: float
    softcap: float | None
    interpret: bool


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles and its launch options."""

    own: int  # length of the tile a program holds: a divisor of LONGEST
    met: int  # length of the tiles it visits: a divisor of BLOCK
    warps: int = 4
    stages: int = 2


def tiles_of(kernel: str, head_size: int, dtype: Any) -> Tiles:
    """Tile sizes whose sums stay in registers: compiled for an H100, no kernel spills.

    Those for head size 80 in bfloat16 are the fastest of 16 choices on an H100 (`bench.kernel_tiles`); the others are chosen by
    register use. The gradients of keys and values hold two sums, so they visit shorter tiles if heads are large.
    """
    if dtype == jnp.float32:  # no tensor cores: more registers per product
        if head_size <= 96:
            return Tiles(32, 32)
        return Tiles(16, 32) if kernel == "forward" else Tiles(32 if head_size <= 128 else 16, 16)
    if head_size > 128:
        return Tiles(BLOCK, 16 if kernel == "d_keys" else 32, warps=8)
    if kernel == "d_keys":
        return Tiles(BLOCK, BLOCK if head_size <= 96 else 32, stages=3 if 64 < head_size <= 96 else 2)
    return Tiles(BLOCK, BLOCK)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, settings: Settings, *, tiles: Tiles | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mixed values [R, L, N, H], typed like `v`, and the log-sum-exp of each query in base 2, float32[R, N, L].

    `tiles` overrides the sizes chosen for this head size and type, to time others.
    """
    rows, length, heads, size = q.shape
    tiles = tiles or tiles_of("forward", size, q.dtype)
    of_query, of_key, ranges, statistic = _specs_by_query(q, k, tiles)
    return _call(
        functools.partial(_forward, settings=settings, tiles=tiles),
        name="flash_forward",
        grid=(length // tiles.own, heads, rows),
        in_specs=[of_query, of_key, of_key, ranges, ranges, *_bounds_specs(length)],
        out_specs=[of_query, statistic],
        out_shape=[jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)],
        tiles=tiles,
        settings=settings,
    )(q, k, v, spans.start, spans.end, spans.key_first, spans.key_last)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spans: Spans,
    settings: Settings,
    *,
    out: jax.Array,
    log_mass: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, with their shapes and types."""
    # Plain XLA: one pass over two arrays, fused with the producer of the second.
    pull = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    d_q = d_queries(q, k, v, spans, settings, log_mass=log_mass, pull=pull, d_out=d_out)
    d_k, d_v = d_keys(q, k, v, spans, settings, log_mass=log_mass, pull=pull, d_out=d_out)
    return d_q, d_k, d_v


def d_queries(q, k, v, spans: Spans, settings: Settings, *, log_mass, pull, d_out, tiles: Tiles | None = None) -> jax.Array:
    """The gradient of q. `pull` is float32[R, N, L]: the sum of `out * d_out` over a head."""
    rows, length, heads, size = q.shape
    tiles = tiles or tiles_of("d_queries", size, q.dtype)
    of_query, of_key, ranges, statistic = _specs_by_query(q, k, tiles)
    return _call(
        functools.partial(_backward_queries, settings=settings, tiles=tiles),
        name="flash_dq",
        grid=(length // tiles.own, heads, rows),
        in_specs=[of_query, of_key, of_key, of_query, statistic, statistic, ranges, ranges, *_bounds_specs(length)],
        out_specs=of_query,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        tiles=tiles,
        settings=settings,
    )(q, k, v, d_out, log_mass, pull, spans.start, spans.end, spans.key_first, spans.key_last)


def d_keys(
    q, k, v, spans: Spans, settings: Settings, *, log_mass, pull, d_out, tiles: Tiles | None = None
) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v."""
    rows, length, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    tiles = tiles or tiles_of("d_keys", size, q.dtype)
    # A program handles one key head and all query heads that read it, so their gradients are summed in order.
    of_query = pl.BlockSpec((None, length, group, size), lambda j, n, r: (r, 0, n, 0))
    of_key = pl.BlockSpec((None, tiles.own, None, size), lambda j, n, r: (r, j, n, 0))
    ranges = pl.BlockSpec((None, length), lambda j, n, r: (r, 0))
    statistic = pl.BlockSpec((None, group, length), lambda j, n, r: (r, n, 0))
    return _call(
        functools.partial(_backward_keys, settings=settings, tiles=tiles, group=group),
        name="flash_dkv",
        grid=(keys // tiles.own, kv_heads, rows),
        in_specs=[of_query, of_key, of_key, of_query, statistic, statistic, ranges, ranges, *_bounds_specs(keys)],
        out_specs=[of_key, of_key],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        tiles=tiles,
        settings=settings,
    )(q, k, v, d_out, log_mass, pull, spans.start, spans.end, spans.query_first, spans.query_last)


def _specs_by_query(q: jax.Array, k: jax.Array, tiles: Tiles) -> tuple[pl.BlockSpec, ...]:
    """Block specs of a program with a query tile: arrays by query, by key, intervals, and statistics [R, N, L]."""
    size, keys, group = q.shape[3], k.shape[1], q.shape[2] // k.shape[2]
    last = q.shape[1] // tiles.own - 1  # the programs begin with the last tile: see `_own_query_tile`
    return (
        pl.BlockSpec((None, tiles.own, None, size), lambda i, n, r: (r, last - i, n, 0)),
        pl.BlockSpec((None, keys, None, size), lambda i, n, r: (r, 0, n // group, 0)),
        pl.BlockSpec((None, tiles.own), lambda i, n, r: (r, last - i)),
        pl.BlockSpec((None, None, tiles.own), lambda i, n, r: (r, n, last - i)),
    )


def _bounds_specs(length: int) -> list[pl.BlockSpec]:
    return [pl.BlockSpec((None, length // BLOCK), lambda i, n, r: (r, 0))] * 2


def _call(kernel: Any, *, tiles: Tiles, settings: Settings, **how: Any) -> Any:
    params = plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    return pl.pallas_call(kernel, compiler_params=params, interpret=settings.interpret, **how)


# The kernels. Names ending in `_ref` are arrays in the device's memory; all others are in registers.


def _forward(q_ref, k_ref, v_ref, start_ref, end_ref, first_ref, last_ref, out_ref, log_mass_ref, *, settings, tiles):
    queries = _load(q_ref)
    start, end = start_ref[...], end_ref[...]

    def meet(number: jax.Array, carry: Any) -> Any:
        mixed, largest, mass = carry
        at = pl.ds(number * tiles.met, tiles.met)
        scores, _ = _scores(queries, _load(k_ref, at), settings)
        scores = jnp.where(_seen(start[:, None], end[:, None], number, tiles), scores * LOG2E, LOWEST)
        new = jnp.maximum(largest, scores.max(axis=1))
        shrink, weights = jnp.exp2(largest - new), jnp.exp2(scores - new[:, None])
        met = (_dot(weights.astype(v_ref.dtype), values) for values in _load(v_ref, at))
        # A query that has seen no key yet sums masked keys; the first visible key rescales that sum by 0.
        mixed = tuple(old * shrink[:, None] + x for old, x in zip(mixed, met, strict=True))
        return mixed, new, mass * shrink + weights.sum(axis=1)

    nothing = jnp.full((tiles.own,), LOWEST, jnp.float32), jnp.zeros((tiles.own,), jnp.float32)
    carry = (_zeros(q_ref, tiles), *nothing)
    mixed, largest, mass = jax.lax.fori_loop(*_visits(_own_query_tile(), first_ref, last_ref, tiles), meet, carry)
    _store(out_ref, (x / mass[:, None] for x in mixed))
    log_mass_ref[...] = largest + jnp.log2(mass)


def _backward_queries(
    q_ref, k_ref, v_ref, d_out_ref, log_mass_ref, pull_ref, start_ref, end_ref, first_ref, last_ref, d_q_ref, *, settings, tiles
):
    queries, d_out = _load(q_ref), _load(d_out_ref)
    start, end = start_ref[...], end_ref[...]
    log_mass, pull = log_mass_ref[...], pull_ref[...]

    def meet(number: jax.Array, d_queries: Any) -> Any:
        at = pl.ds(number * tiles.met, tiles.met)
        keys = _load(k_ref, at)
        scores, slope = _scores(queries, keys, settings)
        seen = _seen(start[:, None], end[:, None], number, tiles)
        weights = jnp.where(seen, jnp.exp2(scores * LOG2E - log_mass[:, None]), 0.0)
        d_scores = weights * (_dots(d_out, _load(v_ref, at)) - pull[:, None]) * slope
        d_scores = d_scores.astype(k_ref.dtype)
        return tuple(old + _dot(d_scores, x) for old, x in zip(d_queries, keys, strict=True))

    visits = _visits(_own_query_tile(), first_ref, last_ref, tiles)
    d_queries = jax.lax.fori_loop(*visits, meet, _zeros(q_ref, tiles))
    _store(d_q_ref, (x * settings.scale for x in d_queries))


def _backward_keys(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    log_mass_ref,
    pull_ref,
    start_ref,
    end_ref,
    first_ref,
    last_ref,
    d_k_ref,
    d_v_ref,
    *,
    settings,
    tiles,
    group,
):
    keys, values = _load(k_ref), _load(v_ref)
    own = pl.program_id(0)
    visits = _visits(own, first_ref, last_ref, tiles)

    def of_head(head: jax.Array, carry: Any) -> Any:
        def meet(number: jax.Array, carry: Any) -> Any:
            d_keys, d_values = carry
            at = pl.ds(number * tiles.met, tiles.met)
            queries, d_out = _load(q_ref, at, head), _load(d_out_ref, at, head)
            # Keys before queries: no tile has to be transposed.
            scores, slope = _scores(keys, queries, settings)
            seen = _seen(start_ref[at][None, :], end_ref[at][None, :], own, tiles, own_keys=True)
            weights = jnp.where(seen, jnp.exp2(scores * LOG2E - log_mass_ref[head, at][None, :]), 0.0)
            d_scores = weights * (_dots(values, d_out) - pull_ref[head, at][None, :]) * slope
            weights, d_scores = weights.astype(v_ref.dtype), d_scores.astype(q_ref.dtype)
            d_keys = tuple(old + _dot(d_scores, x) for old, x in zip(d_keys, queries, strict=True))
            return d_keys, tuple(old + _dot(weights, x) for old, x in zip(d_values, d_out, strict=True))

        return jax.lax.fori_loop(*visits, meet, carry)

    d_keys, d_values = jax.lax.fori_loop(0, group, of_head, (_zeros(k_ref, tiles), _zeros(v_ref, tiles)))
    _store(d_k_ref, (x * settings.scale for x in d_keys))
    _store(d_v_ref, d_values)


# Their pieces.


def _lanes(size: int) -> list[pl.Slice]:
    """Slices of a head whose lengths are powers of two: 80 is 64 and 16."""
    cut, begin = [], 0
    for length in (256, 128, 64, 32, 16):
        if size - begin >= length:
            cut.append(pl.ds(begin, length))
            begin += length
    return cut


def _load(ref: Any, at: Any = slice(None), *head: Any) -> tuple[jax.Array, ...]:
    return tuple(ref[(at, *head, lanes)] for lanes in _lanes(ref.shape[-1]))


def _store(ref: Any, parts: Any) -> None:
    for lanes, part in zip(_lanes(ref.shape[-1]), parts, strict=True):
        ref[:, lanes] = part.astype(ref.dtype)


def _zeros(ref: Any, tiles: Tiles) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((tiles.own, lanes.size), jnp.float32) for lanes in _lanes(ref.shape[-1]))


def _own_query_tile() -> jax.Array:
    """The number of this program's query tile. Later tiles of a row see more keys, and the last programs to start should be
    short: the others then need not wait for them."""
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _visits(own: jax.Array, first_ref: Any, last_ref: Any, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """The tiles that tile number `own` visits."""
    blocks, in_block = max(1, tiles.own // BLOCK), BLOCK // tiles.met
    begin = jax.lax.div(own * tiles.own, jnp.int32(BLOCK))
    first, last = first_ref[begin], last_ref[begin]
    for block in range(1, blocks):
        first, last = jnp.minimum(first, first_ref[begin + block]), jnp.maximum(last, last_ref[begin + block])
    return first * in_block, last * in_block


def _seen(start: jax.Array, end: jax.Array, tile: jax.Array, tiles: Tiles, *, own_keys: bool = False) -> jax.Array:
    """Mask of the keys that each query of a tile sees: bool[queries, keys], or with `own_keys` bool[keys, queries]."""
    length = tiles.own if own_keys else tiles.met
    key = tile * length + jnp.arange(length, dtype=jnp.int32)
    key = key[:, None] if own_keys else key[None, :]
    return (start <= key) & (key < end)


def _scores(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...], settings: Settings) -> tuple[jax.Array, Any]:
    """Scores of `a` with `b`, and the derivative of the soft cap at them (1 without one)."""
    scores = _dots(a, b) * settings.scale
    if settings.softcap is None:
        return scores, 1.0
    bounded = jnp.tanh(scores / settings.softcap)
    return bounded * settings.softcap, 1 - bounded * bounded


def _dots(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
    """a b^T, summed over the slices of a head."""
    return functools.reduce(jnp.add, (_dot(x, y.T) for x, y in zip(a, b, strict=True)))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)
