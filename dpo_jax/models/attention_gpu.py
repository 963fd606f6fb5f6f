"""Attention on GPUs: query chunks in plain XLA, which is what runs by default, and two fused kernels that must be asked for.

The kernels are written against their libraries' documentation and checked on CPU with the same libraries' plain versions, for
masks, padding and shapes. They have not been run on a GPU yet: compare their step-0 loss with ln 2 and with `chunked` first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import AttentionPath, dense
from dpo_jax.models.axes import parts_of
from dpo_jax.models.kernels import KeySpans, key_spans, keys_twice, of_window, on_each_device
from dpo_jax.types import HEAD_AXIS, ROW_AXES, Array

SCORES = 1 << 28  # bytes of scores at a time, per device


def chunked(
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
    limit: int = SCORES,
) -> jax.Array:
    """`dense` for as many queries at a time as keep the float32 scores below `limit` bytes a device; for all, if they fit.

    The backward pass computes the scores of a chunk again, so no buffer of L x T scores exists in it either. Masked blocks are
    computed like any other.
    """
    rows, length, heads, _ = q.shape
    here = rows * heads / parts_of((*ROW_AXES, HEAD_AXIS))
    count = math.ceil(length / max(1, min(length, limit // max(1, int(4 * here * k.shape[1])))))
    of_chunk = functools.partial(dense, scale=scale, softcap=softcap)
    ranges = {"k_start": k_start, "k_end": k_end, "q_positions": q_positions}, {"k_positions": k_positions, "window": window}
    if count == 1:
        return of_chunk(q, k, v, **ranges[0], **ranges[1])  # pyright: ignore[reportArgumentType]
    return _recomputed(functools.partial(_in_chunks, of_chunk, count), (q, k, v), ranges)


def _in_chunks(of_chunk: Callable[..., jax.Array], count: int, floats: Any, ranges: Any) -> jax.Array:
    (q, k, v), (of_query, of_key) = floats, ranges
    rows, length = q.shape[:2]
    size = -(-length // count)

    def chunks(x: jax.Array) -> jax.Array:
        """[R, L, ...] to [count, R, size, ...]; what is added at the end repeats the last query, so that it sees something."""
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return x.reshape(rows, count, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(part: Any) -> jax.Array:
        return of_chunk(part[0], k, v, **part[1], **of_key)

    mixed = jax.lax.map(one, jax.tree.map(chunks, (q, of_query)))
    return mixed.swapaxes(0, 1).reshape(rows, count * size, *mixed.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(work: Callable[..., jax.Array], floats: Any, ranges: Any) -> jax.Array:
    """`work(floats, ranges)`, of which the backward pass keeps its arguments only.

    `jax.checkpoint` says that too, but a policy around it that keeps matrix products would keep those inside it.
    """
    return work(floats, ranges)


def _recomputed_forward(work: Callable[..., jax.Array], floats: Any, ranges: Any) -> tuple[jax.Array, Any]:
    return work(floats, ranges), (floats, ranges)


def _recomputed_backward(work: Callable[..., jax.Array], kept: Any, cotangent: jax.Array) -> tuple[Any, None]:
    floats, ranges = kept
    return jax.vjp(lambda floats: work(floats, ranges), floats)[1](cotangent)[0], None


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)


def _prepare(k_start: Array, k_end: Array, windows: Sequence[int | None]) -> KeySpans:
    return key_spans(k_start, k_end, windows)


def cudnn_path(*, implementation: Any = "cudnn") -> AttentionPath:
    """cuDNN's flash attention through `jax.nn.dot_product_attention`. A mask reaches it as a bias, so it skips no block."""
    return AttentionPath("cudnn", functools.partial(_cudnn, implementation=implementation), _prepare)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prepared: KeySpans,
    *,
    number: jax.Array | None,
    scale: float,
    softcap: float | None,
    implementation: Any,
) -> jax.Array:
    assert softcap is None, "attention_path refuses this"
    start, end = of_window((prepared.k_start, prepared.k_end), number)
    k, v = keys_twice(k, prepared.second), keys_twice(v, prepared.second)
    odd = q.shape[1] % 2, k.shape[1] % 2  # the kernel's training pass wants even lengths

    def even(x: jax.Array, by: int, **how: Any) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2), **how)

    column = jnp.arange(k.shape[1] + odd[1], dtype=jnp.int32)[None, None, None, :]
    start, end = (even(x, odd[0], mode="edge")[:, None, :, None] for x in (start, end))
    q, k, v = even(q, odd[0]), even(k, odd[1]), even(v, odd[1])
    mask = (start <= column) & (column < end)
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=implementation)
    return mixed[:, : q.shape[1] - odd[0]]


def tokamax_path(*, operation: Any = None) -> AttentionPath:
    """tokamax's Pallas kernel (Hopper, Blackwell), which takes key ranges, and skips blocks outside them in the forward pass.

    `operation`: another of tokamax's attention operations.
    """
    return AttentionPath("tokamax", functools.partial(_tokamax, operation=operation), _prepare)


def _tokamax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prepared: KeySpans,
    *,
    number: jax.Array | None,
    scale: float,
    softcap: float | None,
    operation: Any,
) -> jax.Array:
    # No public name carries key ranges (0.0.17).
    from tokamax._src.ops.attention.base import Mask  # pyright: ignore[reportMissingImports]

    if operation is None:
        from tokamax.ops import gpu  # pyright: ignore[reportMissingImports]

        operation = gpu.PallasMosaicFlashAttention()

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, span: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, end = (x[:, None] for x in span)  # the same for all heads
        return operation(q, k, v, mask=Mask(k_start=start, k_end=end), logits_scale=scale, logits_soft_cap=softcap)

    k, v = keys_twice(k, prepared.second), keys_twice(v, prepared.second)
    return on_each_device(kernel)(q, k, v, of_window((prepared.k_start, prepared.k_end), number))
