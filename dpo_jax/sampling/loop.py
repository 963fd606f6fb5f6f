"""The decoding loop of `sampling`: one token per lane at a time; a lane whose completion has ended starts the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.models.axes import parts_of, whole_along
from dpo_jax.sampling.draw import choose
from dpo_jax.sampling.lanes import Lanes, idle, put, refill, take, waiting
from dpo_jax.types import ROW_AXES, Model, Rows, SharedCache, Variables

MEMORY_FRACTION = 0.6
"""Largest part of a device's memory for the weights and the copy that the loop reads."""
REFILL = 8
"""Ended lanes wait until one in this many has ended, so that restarting them costs little compared with the tokens drawn."""


class Samples(NamedTuple):
    """Completions of a batch of prompts. A row that ended before `T` tokens is padded with the first of the end tokens."""

    tokens: jax.Array  # int32[B, T]
    lengths: jax.Array  # int32[B]  tokens of each completion, including the end token
    token_logps: jax.Array  # float32[B, T]  log-probability of each token in nats; 0 after the end

    @property
    def logps(self) -> jax.Array:
        """log pi(y|x) of each completion: float32[B], in nats."""
        return self.token_logps.sum(-1)


class Source(NamedTuple):
    """The source of completions: a model, and B prompts that it has read."""

    model: Model
    variables: Variables
    weights: Variables  # the same for the loop over tokens, as `loop_weights` gives them
    whole: tuple[str, ...]  # mesh axes along which `weights` are whole on each device
    cache: Any  # cache of the prompts; with room for the completions, if the model cannot share it
    columns: int  # Lp
    start: jax.Array  # int32[B]  column of each prompt's first token
    last: jax.Array  # [B, D]  the hidden state at the prompt's end, from which a completion's first token is drawn
    keys: jax.Array  # [B * K]


class Options(NamedTuple):
    completions: int  # K
    new_tokens: int  # T
    ends: tuple[int, ...]
    cache_dtype: Any
    choice: dict[str, Any]  # options of `draw.choose`


class _Loop(NamedTuple):
    """State that the loop carries from token to token."""

    lanes: Lanes
    samples: Samples  # of the lanes' current completions
    token: jax.Array  # int32[R]  the last one drawn
    cache: Any


class _LanePrompts(NamedTuple):
    """Per lane: what it reads of its prompt, and the key of its completion."""

    start: jax.Array  # int32[R]
    last: jax.Array  # [R, D]
    keys: jax.Array  # [R]


def draw_completions(source: Source, options: Options, *, lanes: int | None) -> Samples:
    """`options.completions` of every prompt of `source`, `lanes` of them at a time (None: all)."""
    batch, every = len(source.start), len(source.start) * options.completions
    parts = parts_of(ROW_AXES)
    parts = parts if batch % parts == 0 else 1
    each = every // parts if lanes is None else max(1, min(every, lanes) // parts)
    now, _ = refill(idle(parts, each), of=every // parts)
    loop = _Loop(now, none_drawn(now.busy.size, options), jnp.zeros(now.busy.size, jnp.int32), _cache(source, options, now))
    at = _seats(source, options, now)
    loop = _draw(source, options, loop, at, at.last)
    if now.busy.size == every:
        return _until(lambda loop: ~loop.lanes.busy.any(), source, options, loop, at).samples
    return _continuous_batching(source, options, loop, of=every // parts)


def _cache(source: Source, options: Options, lanes: Lanes) -> Any:
    """The cache of the lanes before anything is drawn. If all completions are drawn at once, those of a prompt share one."""
    model, rows = source.model, lanes.busy.size
    if model.take_rows is None or model.init_cache is None:
        return source.cache
    own = model.init_cache(rows, max(1, options.new_tokens - 1), options.cache_dtype)  # the last token drawn is never fed
    at_once = rows == len(source.keys)
    held = source.cache if at_once else model.take_rows(source.cache, lanes.completion // options.completions)
    return SharedCache(held, by_layer(model, source.variables, own)[1])


def by_layer(model: Model, variables: Variables, cache: Any) -> tuple[Variables, Any]:
    """Variables and cache with layers unstacked, if that is faster and there is room."""
    if model.by_layer is not None and jax.default_backend() in ("cpu", "gpu") and _has_room(model, variables):
        return model.by_layer(variables, cache)
    return variables, cache


def loop_weights(model: Model, variables: Variables, cache: Any) -> tuple[Variables, Any, tuple[str, ...]]:
    """Variables and cache for the loop over tokens: by layer, with kernels in the compute type, and gathered along fsdp.

    The loop then reads each weight once a token, from the device's own memory. The copy of the weights lasts as long as the
    loop. If there is no room for it, layers are cut out of their stacks, rounded or gathered for each token. The last value is
    the mesh axes along which they are gathered. Weights sharded along another axis as well stay as they are.
    """
    weights, cache = by_layer(model, variables, cache)
    weights = model.rounded(weights) if model.rounded is not None and _has_room(model, variables) else weights
    if parts_of(("fsdp",)) == 1 or parts_of(("tensor", "expert")) > 1 or not _has_room(model, variables, whole=True):
        return weights, cache, ()
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), weights), cache, ("fsdp",)


def _has_room(model: Model, variables: Variables, *, whole: bool = False) -> bool:
    """Whether the variables and a copy in the compute type take at most `MEMORY_FRACTION` of the device's memory.

    With a `whole` copy Adam's state counts as well: an evaluation during training samples beside it.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:  # a CPU
        return True
    copy = variables if model.rounded is None else jax.eval_shape(model.rounded, variables)
    held, copied = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (variables, copy))
    parts = parts_of(("fsdp", "tensor", "expert"))
    return (3 * held / parts + copied if whole else (held + copied) / parts) <= MEMORY_FRACTION * limit


def _continuous_batching(source: Source, options: Options, loop: _Loop, *, of: int) -> Samples:
    """Draws the remaining completions, `of` in each part, in lanes that have ended. Each lane copies its prompt's cache."""
    times, rows, take_rows = options.completions, loop.lanes.busy.size, source.model.take_rows
    assert take_rows is not None

    def enough(loop: _Loop) -> jax.Array:
        return ~loop.lanes.busy.any() | (waiting(loop.lanes, of=of) >= max(1, rows // REFILL))

    def turn(state: tuple[Samples, _Loop]) -> tuple[Samples, _Loop]:
        results, loop = state
        results = put(results, loop.samples, loop.lanes.completion)
        lanes, new = refill(loop.lanes, of=of)
        before, after = loop.lanes.completion // times, lanes.completion // times
        held = take_rows(source.cache, after, loop.cache.prompts, before != after)
        new = new.reshape(-1)
        samples = jax.tree.map(
            lambda old, none: jnp.where(new.reshape(-1, *[1] * (old.ndim - 1)), none, old),
            loop.samples,
            none_drawn(rows, options),
        )
        loop = loop._replace(lanes=lanes, samples=samples, cache=loop.cache._replace(prompts=held))
        return results, _until(enough, source, options, loop, _seats(source, options, lanes))

    def unfinished(state: tuple[Samples, _Loop]) -> jax.Array:
        lanes = state[1].lanes
        return lanes.busy.any() | (waiting(lanes, of=of) > 0)

    results, loop = jax.lax.while_loop(unfinished, turn, (none_drawn(len(source.keys), options), loop))
    return put(results, loop.samples, loop.lanes.completion)


def _until(stop: Callable[[_Loop], jax.Array], source: Source, options: Options, loop: _Loop, at: _LanePrompts) -> _Loop:
    """Feeds the last tokens and draws the next ones, until `stop`. The first token of a completion is drawn from its prompt."""
    decode = source.model.decode
    assert decode is not None

    def advance(loop: _Loop) -> _Loop:
        own = loop.samples.lengths
        end = source.columns + own
        rows = rows_read(loop.token[:, None], (end - at.start - 1)[:, None], at.start[:, None], end[:, None])
        with whole_along(*source.whole):
            hidden, cache = decode(source.weights, rows, loop.cache)
        hidden = jnp.where(own[:, None] == 0, at.last, hidden[:, 0])
        return _draw(source, options, loop._replace(cache=cache), at, hidden)

    return jax.lax.while_loop(lambda loop: ~stop(loop), advance, loop)


def _draw(source: Source, options: Options, loop: _Loop, at: _LanePrompts, hidden: jax.Array) -> _Loop:
    """Draws one token per lane from `hidden[R, D]`, the state before it. Lanes that have ended stay as they are."""
    with whole_along(*source.whole):
        logits = source.model.unembed(source.weights, hidden)
    (tokens, counts, logps), busy = loop.samples, loop.lanes.busy.reshape(-1)
    token = choose(logits, jax.vmap(jax.random.fold_in)(at.keys, counts), **options.choice)
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    logp = (picked - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)
    here = (jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] == counts[:, None]) & busy[:, None]
    counts = counts + busy.astype(jnp.int32)
    samples = Samples(jnp.where(here, token[:, None], tokens), counts, jnp.where(here, logp[:, None], logps))
    stops = (token[:, None] == jnp.asarray(options.ends, jnp.int32)[None]).any(axis=-1) | (counts >= options.new_tokens)
    lanes = loop.lanes._replace(busy=(busy & ~stops).reshape(loop.lanes.busy.shape))
    return loop._replace(lanes=lanes, samples=samples, token=token)


def _seats(source: Source, options: Options, lanes: Lanes) -> _LanePrompts:
    start, last = take((source.start, source.last), lanes.completion // options.completions)
    return _LanePrompts(start, last, take(source.keys, lanes.completion))


def none_drawn(rows: int, options: Options) -> Samples:
    shape = (rows, options.new_tokens)
    empty = jnp.full(shape, options.ends[0], jnp.int32)
    return Samples(empty, jnp.zeros(rows, jnp.int32), jnp.zeros(shape, jnp.float32))


def rows_read(tokens: jax.Array, positions: jax.Array, k_start: jax.Array, k_end: jax.Array) -> Rows:
    """Input rows without scored positions, from arrays `[B, L]`."""
    batch, length = tokens.shape
    none = jnp.zeros((batch, 0), jnp.int32)
    keys = jnp.broadcast_to(k_start, (batch, length))
    return Rows(
        tokens, positions, keys, k_end, none, none, none, jnp.ones(batch, jnp.float32), jnp.arange(batch, dtype=jnp.int32)
    )
