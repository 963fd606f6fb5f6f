"""Attention on GPUs: our flash kernels, the default, and cuDNN's, which skip no blocks.

`python -m dpo_jax.check` compares both with the dense path, as do tests in the Pallas interpreter. Tests marked `plan` compile
them for GPUs that are not present.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models import flash_kernels
from dpo_jax.models.attention import AttentionPath, Mixed, PartialAttention, Scoring, Span
from dpo_jax.models.attention_common import KeySpans, key_spans, keys_twice, of_window, on_each_device
from dpo_jax.models.flash_kernels import BLOCK, LANES, LOG2E, LONGEST, Settings, Spans
from dpo_jax.types import Array

MOST = (1 << 31) - 1  # older versions of Pallas index arrays in int32


class Prepared(NamedTuple):
    spans: Spans  # stacked by window
    second: jax.Array | None


def flash_path(*, interpret: bool = False) -> AttentionPath:
    """Our flash kernels. `interpret`: run them step by step in ordinary operations, on any device; slow, for tests only."""
    how = {"interpret": interpret}
    partial = PartialAttention(functools.partial(_partial_forward, **how), functools.partial(_partial_backward, **how))
    return AttentionPath("flash", functools.partial(_attend, **how), _prepare, partial)


def _prepare(k_start: Array, k_end: Array, windows: Sequence[int | None]) -> Prepared:
    found = key_spans(k_start, k_end, windows)
    keys = found.k_start.shape[2] * (1 if found.second is None else 2)
    spans = [_spans(start, end, keys=keys) for start, end in zip(found.k_start, found.k_end, strict=True)]
    return Prepared(jax.tree.map(lambda *leaves: jnp.stack(leaves), *spans), found.second)


def _spans(start: jax.Array, end: jax.Array, *, keys: int) -> Spans:
    rows, length = start.shape
    # A padding query of the last tile copies its neighbor's interval, so it needs no further blocks.
    start, end = (jnp.pad(x, ((0, 0), (0, -length % LONGEST)), mode="edge") for x in (start, end))
    key_first = start.reshape(rows, -1, BLOCK).min(axis=2) // BLOCK
    key_last = -(-end.reshape(rows, -1, BLOCK).max(axis=2) // BLOCK)
    block = jnp.arange(-(-keys // LONGEST) * (LONGEST // BLOCK), dtype=jnp.int32)[None, None]
    met = (key_first[:, :, None] <= block) & (block < key_last[:, :, None])  # [R, blocks of queries, blocks of keys]
    number = jnp.arange(met.shape[1], dtype=jnp.int32)[None, :, None]
    query_first = jnp.where(met, number, met.shape[1]).min(axis=1)
    query_last = jnp.where(met, number + 1, 0).max(axis=1)
    return Spans(start, end, key_first, key_last, query_first, query_last)


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
    kernel = functools.partial(_rows, settings=Settings(*scoring, interpret))
    return on_each_device(kernel)(q, k, v, of_window(prepared.spans, number))


def _rows(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, *, settings: Settings) -> jax.Array:
    """The kernel on the rows and heads of one device."""
    length, size = q.shape[1], q.shape[3]
    _check_size(q, k)
    mixed: jax.Array = _flash(*map(_whole_blocks, (q, k, v)), spans, settings)  # pyright: ignore[reportAssignmentType]
    return mixed[:, :length, :, :size]


def _check_size(q: jax.Array, k: jax.Array) -> None:
    padded = max(jax.eval_shape(_whole_blocks, x).size for x in (q, k))
    if padded >= MOST:  # older versions would read wrong elements silently
        raise ValueError(
            f"flash attention counts at most {MOST:,} numbers a device, and the queries or keys of a batch have "
            f"{padded:,} there: use more microbatches"
        )


def _whole_blocks(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LONGEST), (0, 0), (0, -x.shape[3] % LANES)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, settings: Settings) -> jax.Array:
    return flash_kernels.forward(q, k, v, spans, settings)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, settings: Settings) -> tuple[jax.Array, Any]:
    # Names what the backward pass needs of the kernel; see `decoder.REMAT`. Rotated queries and keys are kept instead of the
    # projections that they come from, and are not recomputed.
    q, k, v = (checkpoint_name(x, "kernel") for x in (q, k, v))
    out, log_mass = (checkpoint_name(x, "kernel") for x in flash_kernels.forward(q, k, v, spans, settings))
    return out, (q, k, v, spans, out, log_mass)


def _backward(settings: Settings, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, spans, out, log_mass = kept
    return *flash_kernels.backward(q, k, v, spans, settings, out=out, log_mass=log_mass, d_out=d_out), None


_flash.defvjp(_forward, _backward)


def _partial_forward(q: jax.Array, k: jax.Array, v: jax.Array, span: Span, scoring: Scoring, *, interpret: bool) -> Mixed:
    _check_size(q, k)
    spans, settings = _partial_spans(span), Settings(*scoring, interpret)
    mixed, log_mass = flash_kernels.forward(_whole_blocks(q), _whole_blocks(k), _whole_blocks(v), spans, settings)
    return Mixed(mixed[:, : q.shape[1], :, : q.shape[3]], log_mass[:, :, : q.shape[1]] / LOG2E)


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
    length, size = q.shape[1], q.shape[3]
    spans, settings = _partial_spans(span), Settings(*scoring, interpret)
    in_base_2 = jnp.pad(mixed.log_mass * LOG2E, ((0, 0), (0, 0), (0, -length % LONGEST)))
    of_all = {"out": _whole_blocks(mixed.out), "log_mass": in_base_2, "d_out": _whole_blocks(d_out)}
    gradients = flash_kernels.backward(_whole_blocks(q), _whole_blocks(k), _whole_blocks(v), spans, settings, **of_all)
    d_q, d_k, d_v = (x[:, :length, :, :size] for x in gradients)
    return d_q, d_k, d_v


def _partial_spans(span: Span) -> Spans:
    """Spans of intervals, some of which may be empty; empty ones do not make a block of queries visit more blocks of keys."""
    start, end = span
    nothing = end <= start
    # Padding of the last tile sees nothing.
    beyond = ((0, 0), (0, -start.shape[1] % LONGEST))
    start = jnp.pad(jnp.where(nothing, start.shape[1], start), beyond, constant_values=start.shape[1])
    return _spans(start, jnp.pad(jnp.where(nothing, 0, end), beyond), keys=start.shape[1])


def cudnn_path(*, implementation: Any = "cudnn") -> AttentionPath:
    """cuDNN's flash attention through `jax.nn.dot_product_attention`. Its mask is passed as a bias, so it skips no block."""
    return AttentionPath("cudnn", functools.partial(_cudnn, implementation=implementation), key_spans)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prepared: KeySpans,
    number: jax.Array | None,
    scoring: Scoring,
    *,
    implementation: Any,
) -> jax.Array:
    assert scoring.softcap is None, "attention_path refuses this"

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, span: tuple[jax.Array, jax.Array]) -> jax.Array:
        length = q.shape[1]
        # With a mask its backward pass returns NaN for lengths of 64 beyond a multiple of 128 (seen with 9.20 on Hopper).
        q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), (0, 0), (0, 0))) for x in (q, k, v))
        start, end = (jnp.pad(x, ((0, 0), (0, -length % 128)), mode="edge")[:, None, :, None] for x in span)
        column = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, None, :]
        mask = (start <= column) & (column < end)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scoring.scale, implementation=implementation)
        return mixed[:, :length]

    k, v = keys_twice(k, prepared.second), keys_twice(v, prepared.second)
    return on_each_device(kernel)(q, k, v, of_window((prepared.k_start, prepared.k_end), number))
