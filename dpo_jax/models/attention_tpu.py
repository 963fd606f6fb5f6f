"""Attention on TPUs: JAX's splash kernel, which computes only the blocks of the score matrix that contain visible keys.

The rows of a device are laid end to end as one long sequence, so that one kernel call handles them all. Each query block has a
list of key blocks, all in its own row. The lists are made from the batch's intervals, inside the compiled step and before the
layers, which share them. Scores, softmax and sums are float32; the matrix products have the type of `q`. For float32 the kernel
uses bfloat16 products, unless `jax_default_matmul_precision` is "highest" (the commands set it).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from dpo_jax.models.attention import AttentionPath, Mixed, PartialAttention, Scoring, Span
from dpo_jax.models.attention_common import key_spans, keys_twice, of_window, on_each_device
from dpo_jax.models.axes import parts_of
from dpo_jax.types import ROW_AXES, Array

LANES = 128  # the kernel's blocks are multiples of it
BLOCK = 512  # most queries and keys in a block; chosen without a TPU at hand
OVERHEAD = 370  # a step of the kernel takes some 0.35 us, in which a v5p computes a block of this size; an estimate


class Blocks(NamedTuple):
    """A batch's intervals in the kernel's form. Q and T: query and key blocks of a row."""

    span: jax.Array  # int32[R, L padded]  first key in the device's long sequence, and number of keys: `_InSpan`
    keys: jax.Array  # int32[R, Q, T]  the key blocks that a query block needs, then repeats of the last one
    needed: jax.Array  # int32[R, Q, T]  1 for those
    queries: jax.Array  # int32[R, Q, T]  the query blocks that need a key block, along Q
    needing: jax.Array  # int32[R, Q, T]  1 for those


class Prepared(NamedTuple):
    blocks: Blocks  # stacked by window
    second: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _InSpan:
    """The kernel's mask: columns `k` inside the span, which is packed into one int32 per query, length in the low bits."""

    bits: int

    def __call__(self, span: jax.Array, k: jax.Array) -> jax.Array:
        start = jax.lax.shift_right_logical(span, jnp.full_like(span, self.bits))
        return (k >= start) & (k < start + (span & ((1 << self.bits) - 1)))


def splash_path(*, interpret: bool = False) -> AttentionPath:
    """JAX's splash kernel. `interpret`: run it step by step in ordinary operations, on any device; slow, for tests only."""
    how = {"interpret": interpret}
    partial = PartialAttention(functools.partial(_partial_forward, **how), functools.partial(_partial_backward, **how))
    return AttentionPath("splash", functools.partial(_attend, **how), _prepare, partial)


def _prepare(k_start: Array, k_end: Array, windows: Sequence[int | None]) -> Prepared:
    spans = key_spans(k_start, k_end, windows)
    length = spans.k_start.shape[2]
    keys = length if spans.second is None else 2 * length
    blocks = [_blocks(start, end, keys=keys) for start, end in zip(spans.k_start, spans.k_end, strict=True)]
    return Prepared(jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks), spans.second)


def _blocks(k_start: jax.Array, k_end: jax.Array, *, keys: int) -> Blocks:
    rows, length = k_start.shape
    rows_here = rows // parts_of(ROW_AXES)
    (padded, block), (padded_keys, key_block) = _padded(length), _padded(keys)
    bits = _span_bits(keys, rows_here * padded_keys)
    # A padding query of the last block copies its neighbor's interval, so it needs no further blocks.
    start, end = (jnp.pad(x, ((0, 0), (0, padded - length)), mode="edge") for x in (k_start, k_end))
    offset = (jnp.arange(rows, dtype=jnp.int32) % rows_here)[:, None]
    span = jnp.left_shift(start + offset * padded_keys, bits) | (end - start)

    begin = jnp.arange(padded_keys // key_block, dtype=jnp.int32)[None, None, None] * key_block
    by_block = (rows, padded // block, block, 1)
    active = ((start.reshape(by_block) < begin + key_block) & (end.reshape(by_block) > begin)).any(axis=2)
    (keys_first, needed), (queries_first, needing) = _first(active, axis=2), _first(active, axis=1)
    of_row = offset[:, :, None]
    return Blocks(span, keys_first + of_row * active.shape[2], needed, queries_first + of_row * active.shape[1], needing)


def _first(active: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Indices of the active entries along `axis`, in order, then repeats of the last one; and 1 for active, 0 for repeats.

    Repeats are skipped, and because the index does not change, the kernel fetches nothing for them.
    """
    order = jnp.argsort(~active, axis=axis, stable=True).astype(jnp.int32)
    count = active.sum(axis=axis, keepdims=True, dtype=jnp.int32)
    place = jax.lax.broadcasted_iota(jnp.int32, active.shape, axis)
    kept = jnp.minimum(place, jnp.maximum(count - 1, 0))
    return jnp.take_along_axis(order, kept, axis=axis), (place < count).astype(jnp.int32)


def _padded(length: int) -> tuple[int, int]:
    """(length rounded up to whole blocks, block size), for the size that should take the least time.

    A causal row of n blocks computes n (n + 1) / 2 blocks of scores, each as large as a block and with an overhead.
    """

    def cost(block: int) -> int:
        count = -(-length // block)
        return count * (count + 1) * (block**2 + OVERHEAD**2)

    block = min(range(BLOCK, 0, -LANES), key=cost)
    return -(-length // block) * block, block


def _span_bits(keys: int, total: int) -> int:
    """Number of bits for the length of a span. ValueError if a span of `keys` within `total` columns does not fit 32 bits."""
    bits = keys.bit_length()
    if total > 1 << (32 - bits):
        raise ValueError(
            f"splash attention counts at most {1 << (32 - bits):,} columns a device with rows of {keys:,} keys, "
            f"and a batch has {total:,} there: use more microbatches"
        )
    return bits


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prepared: Prepared,
    number: jax.Array | None,
    scoring: Scoring,
    *,
    interpret: bool,
) -> jax.Array:
    k, v = keys_twice(k, prepared.second), keys_twice(v, prepared.second)
    blocks: Blocks = of_window(prepared.blocks, number)
    call = functools.partial(_kernel, bits=k.shape[1].bit_length(), softcap=scoring.softcap, interpret=interpret)
    return on_each_device(call)(q * jnp.asarray(scoring.scale, q.dtype), k, v, blocks)


def _kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, *, bits: int, softcap: float | None, interpret: bool
) -> jax.Array:
    """The kernel on the rows and heads of one device."""
    mixed = _splash(q, k, v, blocks, bits=bits, softcap=softcap, interpret=interpret, name="kernel")
    return _rows_of(mixed, q)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: Blocks,
    *,
    bits: int,
    softcap: float | None,
    interpret: bool,
    statistics: bool = False,
    name: str | None = None,
) -> Any:
    """The kernel's result for queries that are already scaled: [N, R x L padded, H]; with `statistics`, those as well.

    `name` is the name of its results for `decoder.REMAT`.
    """
    kernel = splash.SplashAttentionKernel(
        *_masks(blocks),
        block_sizes=_block_sizes(q.shape[1], k.shape[1]),
        is_mqa=False,
        save_residuals=statistics,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=name,
        mask_function=_InSpan(bits),
        interpret=interpret,
    )
    return kernel(*map(_one_sequence, (q, k, v)))


def _masks(blocks: Blocks) -> tuple[mask_info.MaskInfo, mask_info.MaskInfo, mask_info.MaskInfo]:
    """Block lists of one device for the three kernels: forward, d_queries, d_keys."""
    span = blocks.span.reshape(-1)

    def by_query(x: jax.Array) -> jax.Array:
        return x.reshape(1, -1, x.shape[2])

    def by_key(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(1, x.shape[1], -1)

    forward = mask_info.MaskInfo(by_query(blocks.keys), None, by_query(blocks.needed), None, span)  # pyright: ignore
    backward = mask_info.MaskInfo(by_key(blocks.queries), None, by_key(blocks.needing), None, span)  # pyright: ignore
    return forward, forward, backward


def _block_sizes(length: int, keys: int) -> splash.BlockSizes:
    (_, block), (_, key_block) = _padded(length), _padded(keys)
    sizes: dict[str, Any] = {f"block_q{of}": block for of in ("", "_dq", "_dkv")}
    sizes |= {f"block_kv{of}": key_block for of in ("", "_dq", "_dkv")}
    return splash.BlockSizes(**sizes)


def _one_sequence(x: jax.Array) -> jax.Array:
    """[R, L, N, H] to [N, R x L padded, H]."""
    to = _padded(x.shape[1])[0]
    x = jnp.pad(x, ((0, 0), (0, to - x.shape[1]), (0, 0), (0, 0)))
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])


def _rows_of(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_one_sequence`: [N, R x L padded, H] as rows [R, L, N, H]."""
    rows, length = like.shape[:2]
    return x.reshape(x.shape[0], rows, -1, x.shape[2])[:, :, :length].transpose(1, 2, 0, 3)


def _partial_forward(q: jax.Array, k: jax.Array, v: jax.Array, span: Span, scoring: Scoring, *, interpret: bool) -> Mixed:
    scaled, bits = q * jnp.asarray(scoring.scale, q.dtype), k.shape[1].bit_length()
    how = {"softcap": scoring.softcap, "interpret": interpret}
    mixed, (log_mass,) = _splash(scaled, k, v, _blocks_of(span), bits=bits, statistics=True, **how)
    return Mixed(_rows_of(mixed, q), _rows_of(log_mass[:, :, None], q)[..., 0].swapaxes(1, 2))


def _partial_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    span: Span,
    mixed: Mixed,
    d_out: jax.Array,
    scoring: Scoring,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, of_queries, of_keys = _masks(_blocks_of(span))
    scale = jnp.asarray(scoring.scale, q.dtype)
    mass = _one_sequence(mixed.log_mass.swapaxes(1, 2)[..., None])[:, :, 0]
    kept: Any = (*map(_one_sequence, (q * scale, k, v)), None, None, _one_sequence(mixed.out), mass, of_queries, of_keys)
    # The kernel has no public way to take statistics from outside: here those of all pieces of a row together.
    _, _, _, d_q, d_k, d_v, *_ = splash._splash_attention_bwd(  # pyright: ignore[reportPrivateUsage]
        False,
        splash.DEFAULT_MASK_VALUE,
        False,
        _block_sizes(q.shape[1], k.shape[1]),
        None,
        _InSpan(k.shape[1].bit_length()),
        scoring.softcap,
        interpret,
        kept,
        _one_sequence(d_out),
    )
    return _rows_of(d_q, q) * scale, _rows_of(d_k, k), _rows_of(d_v, v)


def _blocks_of(span: Span) -> Blocks:
    """Blocks for intervals, some of which may be empty."""
    start, end = span
    nothing = end <= start
    return _blocks(jnp.where(nothing, 0, start), jnp.where(nothing, 0, end), keys=start.shape[1])
