"""Ring attention for rows split over devices: keys and values go round in a ring (Liu et al. 2023, arXiv 2310.01889).

Each device keeps its queries. In each of C turns it attends to the keys and values that it currently holds, while they are
being sent to the next device, and combines the result with the earlier ones (the running softmax of Milakov and Gimelshein
2018, statistics and sums in float32). A turn without visible keys is skipped. In the backward pass the gradients of keys and
values go round as well, one turn behind, and reach their own device after the last turn. A device therefore holds its part of a
row, and one more part in transit, whatever the length of the row.

Each turn is computed by the device's attention path (`attention.PartialAttention`), which skips blocks within it.

A sliding window is one interval of keys, or two. A chosen completion is stored backwards (`data.layout`): if its window reaches
into the prompt, it covers the *end* of the prompt, while the completion lies before the prompt's beginning.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.attention import AttentionPath, Mixed, PartialAttention, Scoring, Span
from dpo_jax.models.attention_common import of_window, on_each_device
from dpo_jax.models.context import columns_before, context_parts, pass_on, rounds_of, to_pieces
from dpo_jax.types import CONTEXT_AXIS, Array

LOWEST = -1e30  # log-sum-exp of nothing: finite, so that the difference of two is not NaN


class _Settings(NamedTuple):
    partial: PartialAttention
    scoring: Scoring
    parts: int


def along_context(path: AttentionPath) -> AttentionPath:
    """`path`, or a ring of it if the mesh of the program being traced splits rows. ValueError if the path cannot do that."""
    if context_parts() == 1:
        return path
    if path.partial is None:
        raise ValueError(
            f"attention {path.name} reads whole rows, but mesh.context splits them over devices: use auto, or mesh.context 1"
        )
    return AttentionPath(f"{path.name} in a ring", functools.partial(_attend, partial=path.partial), _prepare)


def _prepare(k_start: Array, k_end: Array, windows: Sequence[int | None]) -> tuple[Span, ...]:
    """Intervals of the pieces from those of whole rows: [W, R * C, L / C], one or two for each query.

    They stay in columns of the whole row.
    """
    by_window = [_window_spans(jnp.asarray(k_start), jnp.asarray(k_end), window) for window in windows]
    number = max(map(len, by_window))
    nothing = (jnp.zeros_like(k_start), jnp.zeros_like(k_end))
    pieces = [[to_pieces(spans[of]) if of < len(spans) else to_pieces(nothing) for spans in by_window] for of in range(number)]
    return tuple(Span(jnp.stack([start for start, _ in one]), jnp.stack([end for _, end in one])) for one in pieces)


def _window_spans(k_start: jax.Array, k_end: jax.Array, window: int | None) -> list[Span]:
    """The keys within `window` positions of each query, which sees `k_start` to `k_end`: int32[R, L] each.

    Assumes the same as `attention_common.key_spans`: positions are below L, and neighbors in the row are neighbors in the
    text, forwards or, where a query sees keys on its right, backwards.
    """
    length = k_start.shape[1]
    x = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), k_start.shape)
    start = jnp.minimum(k_start, length - 1)
    end = jnp.maximum(k_end, start + 1)  # a query that sees nothing sees one key: no softmax is empty
    if window is None or window >= length:
        return [Span(start, end)]
    backwards = end > x + 1
    prompt = jnp.take_along_axis(start, end - 1, axis=1)  # the prompt begins at the first key that its last token sees
    near = Span(
        jnp.where(backwards, x, jnp.maximum(start, x - window + 1)),
        jnp.where(backwards, jnp.minimum(prompt, x + window), end),
    )
    far = jnp.maximum(prompt, end + prompt - x - window), end
    return [near, Span(jnp.where(backwards, far[0], 0), jnp.where(backwards, far[1], 0))]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prepared: tuple[Span, ...],
    number: jax.Array | None,
    scoring: Scoring,
    *,
    partial: PartialAttention,
) -> jax.Array:
    settings = _Settings(partial, scoring, context_parts())
    ring = on_each_device(functools.partial(_ring_of, settings=settings))
    return ring(q, k, v, of_window(prepared, number))


def _ring_of(q: jax.Array, k: jax.Array, v: jax.Array, spans: tuple[Span, ...], *, settings: _Settings) -> jax.Array:
    return _ring(q, k, v, spans, settings)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q: jax.Array, k: jax.Array, v: jax.Array, spans: tuple[Span, ...], settings: _Settings) -> jax.Array:
    return _forward(q, k, v, spans, settings)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, spans: tuple[Span, ...], settings: _Settings) -> tuple[jax.Array, Any]:
    q, k, v = (checkpoint_name(x, "kernel") for x in (q, k, v))  # see `decoder.REMAT`
    # Results that depend on the intervals alone are the same in all layers, and JAX would hoist them, for all turns at once.
    q, spans = jax.lax.optimization_barrier((q, spans))
    rows, length, heads, _ = q.shape

    def turn(carry: Any, number: jax.Array) -> tuple[Any, None]:
        keys, found = carry
        ahead = pass_on(keys, settings.parts)
        for span in _spans_of_turn(spans, number, settings):
            found = jax.lax.cond(_any_seen(span), meet, lambda *met: met[0], found, q, *keys, span)
        return (ahead, found), None

    def meet(found: Mixed, q: jax.Array, k: jax.Array, v: jax.Array, span: Span) -> Mixed:
        mixed, log_mass = found
        here, mass_here = settings.partial.forward(q, k, v, span, settings.scoring)
        seen = span.end > span.start
        here = jnp.where(seen[:, :, None, None], here.astype(jnp.float32), 0)
        mass_here = jnp.where(seen[:, None], mass_here, LOWEST)
        both = jnp.logaddexp(log_mass, mass_here)
        old, new = (jnp.exp(mass - both).swapaxes(1, 2)[..., None] for mass in (log_mass, mass_here))
        return Mixed(mixed * old + here * new, both)

    nothing = Mixed(jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32), jnp.full((rows, heads, length), LOWEST))
    (_, (mixed, log_mass)), _ = jax.lax.scan(turn, ((k, v), nothing), jnp.arange(settings.parts, dtype=jnp.int32))
    found = Mixed(checkpoint_name(mixed.astype(v.dtype), "kernel"), checkpoint_name(log_mass, "kernel"))
    return found.out, (q, k, v, spans, found)


def _backward(settings: _Settings, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, spans, mixed = kept

    def turn(carry: Any, number: jax.Array) -> tuple[Any, None]:
        keys, d_keys, d_q = carry
        ahead, d_keys = pass_on(keys, settings.parts), pass_on(d_keys, settings.parts)
        for span in _spans_of_turn(spans, number, settings):
            found = d_q, *d_keys
            d_q, *d_keys = jax.lax.cond(_any_seen(span), meet, lambda *met: met[0], found, q, *keys, span)
        return (ahead, tuple(d_keys), d_q), None

    def meet(found: Any, q: jax.Array, k: jax.Array, v: jax.Array, span: Span) -> Any:
        here = settings.partial.backward(q, k, v, span, mixed, d_out, settings.scoring)
        return tuple(old + new.astype(jnp.float32) for old, new in zip(found, here, strict=True))

    d_q, d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    turns = jnp.arange(settings.parts, dtype=jnp.int32)
    (_, d_keys, d_q), _ = jax.lax.scan(turn, ((k, v), (d_k, d_v), d_q), turns)
    d_k, d_v = pass_on(d_keys, settings.parts)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_forward, _backward)


def _any_seen(span: Span) -> jax.Array:
    return (span.end > span.start).any()


def _spans_of_turn(spans: tuple[Span, ...], number: jax.Array, settings: _Settings) -> list[Span]:
    """`spans` in columns of the piece held in turn `number`: that of the device `number` places before this one."""
    holder = (jax.lax.axis_index(CONTEXT_AXIS) - number) % settings.parts
    run = spans[0][0].shape[1] // rounds_of(settings.parts)
    before = functools.partial(columns_before, holder=holder, run=run, parts=settings.parts)
    return [Span(before(start), before(end)) for start, end in spans]
