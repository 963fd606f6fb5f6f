"""Sampling completions: one pass over the prompts, then one token at a time against a key/value cache, in one compiled loop.

Prompts of unequal length are padded on the left. A prompt is read once for all of its completions, which share its keys and values
and write those of their own tokens to a cache of their own (`types.SharedCache`):

    column     0    1    2    3      0    1
    prompt 0   .    .   p_0  p_1    y_0  y_1    completion 0
                                    y_0  y_1    completion 1
    prompt 1  p_0  p_1  p_2  p_3    y_0  y_1    completion 0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.lanes import Lanes, idle, of_completions, of_groups, refill, store
from dpo_jax.models.axes import parts_of
from dpo_jax.token_draw import choose
from dpo_jax.types import ROW_AXES, Array, Model, Rows, SharedCache, Variables

REFILL = 8
"""Ended rows wait for the next completion until they are one in so many: each time, prompts' keys and values are copied."""


class Samples(NamedTuple):
    """Completions of a batch of prompts. A row that ended before `T` tokens is filled up with the first of the end tokens."""

    tokens: jax.Array  # int32[B, T]
    lengths: jax.Array  # int32[B]  tokens of each completion, the one that ended it included
    token_logps: jax.Array  # float32[B, T]  log-probability of each token in nats; 0 after the end

    @property
    def logps(self) -> jax.Array:
        """log pi(y|x) of each completion: float32[B], in nats."""
        return self.token_logps.sum(-1)


class _Loop(NamedTuple):
    """What the decoding loop carries from token to token."""

    lanes: Lanes
    samples: Samples  # of the completions the lanes are at
    token: jax.Array  # int32[R]  the last one drawn
    cache: Any


class _Seats(NamedTuple):
    """What each lane reads of its prompt and of its completion's number, [R, ...] each."""

    start: jax.Array  # int32[R]  column of the prompt's first token
    first: jax.Array  # [R, D]  the hidden state at the prompt's end, from which the first token is drawn
    keys: jax.Array  # [R]


def left_pad(prompts: Sequence[Sequence[int] | np.ndarray], *, multiple_of: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """`generate`'s input: int32[B, Lp] token ids ending in the last column, and int32[B] lengths.

    `Lp` is rounded up to `multiple_of`, so that a program compiles for few shapes. An empty prompt is a ValueError: something
    must predict the first token (begin with BOS).

    >>> tokens, lengths = left_pad([[5, 6, 7], [8]], multiple_of=4)
    >>> tokens.tolist(), lengths.tolist()
    ([[0, 5, 6, 7], [0, 0, 0, 8]], [3, 1])
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ValueError(f"prompt {int(np.argmin(lengths))} has no tokens, so nothing predicts its first token; begin with BOS")
    columns = -(-int(lengths.max(initial=1)) // multiple_of) * multiple_of
    tokens = np.zeros((len(prompts), columns), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[columns - len(prompt) :] = prompt
    return tokens, lengths


def generate(
    model: Model,
    variables: Variables,
    prompts: Array,
    lengths: Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    completions: int = 1,
    lanes: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cache_dtype: Any = jnp.float32,
) -> Samples:
    """Sample K = `completions` of every prompt (`prompts` int32[B, Lp] and `lengths` int32[B] from `left_pad`). Pure: jit it.

    Returns `Samples` of B * K rows, those of a prompt side by side. Each prompt is read once.

    The distribution is `model`'s with logits divided by `temperature`, cut to the `top_k` likeliest tokens (0: all), then to
    the likeliest ones that together reach probability `top_p` (1: all; nucleus sampling, Holtzman et al. 2019), as in
    transformers. Temperature 0 takes the likeliest token. A row ends with `eos_id`, or with any of several (-1: no token ends
    it), and after T = `max_new_tokens` tokens.

    `lanes`: so many completions are drawn at a time, and one that has ended makes room for the next (continuous batching). None:
    all at once, until the last one ends. A number of its own matters where lengths differ, and bounds the memory.

    `key` is one key (`jax.random.key`, or the older `PRNGKey`), or keys [B * K], one for each completion: then a completion does
    not depend on which others it shares a batch or a device with.

    `Samples.token_logps` are under the model itself, before temperature and cuts: `Samples.logps`, their sums, equal what
    `logps.sequence_logps` finds for the same tokens. They are NaN where a completion ran past the model's position table.

    Memory of the cache: a column of it takes `2 * layers * kv_heads * head_size` numbers of `cache_dtype`. There are `B * Lp`
    columns of prompts (with `lanes` below B * K up to `lanes * Lp` more, of those in work) and `lanes * (T - 1)` of completions.

    Raises ValueError for options out of range, `lengths` of another shape than [B] or (outside of jit, where values are known)
    not from 1 to Lp, and keys of another shape; TypeError for what is no key.

    >>> decoder, weights = load_hf(folder)
    >>> prompts, lengths = left_pad([pair.prompt for pair in encoded])
    >>> run = jax.jit(partial(generate, decoder, max_new_tokens=4, eos_id=tokenizer.eos_token_id))
    >>> samples = run(weights, prompts, lengths, jax.random.key(0))
    >>> samples.tokens.shape, samples.logps.shape
    ((2, 4), (2,))
    >>> texts = [tokenizer.decode(ids[:n]) for ids, n in zip(samples.tokens.tolist(), samples.lengths, strict=True)]
    """
    init_cache, decode = model.init_cache, model.decode
    if init_cache is None or decode is None:
        raise ValueError("sampling needs a model with init_cache and decode (see types.Model)")
    if max_new_tokens < 1 or completions < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} and completions={completions} must be at least 1, temperature={temperature} and "
            f"top_k={top_k} at least 0, top_p={top_p} in (0, 1]"
        )
    ends = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    if not ends:
        raise ValueError("eos_id names no token; -1 lets no token end a row")
    _check_prompts(prompts, lengths)
    every = _keys_of_rows(key, prompts.shape[0] * completions)
    shared = model.take_rows is not None
    if not shared:  # a cache that cannot be shared is computed for each completion, and has room for all of its tokens
        prompts, lengths = (jnp.repeat(jnp.asarray(array), completions, axis=0) for array in (prompts, lengths))
        completions, lanes = 1, None
    batch, columns = prompts.shape
    parts, groups, width = _seating(batch, completions, lanes)
    rows, own = parts * groups * width, max(1, max_new_tokens - 1)  # the last token drawn is never fed
    weights, cache = _by_layer(model, variables, init_cache(batch, columns + (0 if shared else own), cache_dtype))
    start = columns - jnp.asarray(lengths, jnp.int32)
    hidden, cache = decode(weights, _prompt_rows(jnp.asarray(prompts, jnp.int32), start), cache)
    last = hidden[:, -1]

    def seats(now: Lanes) -> _Seats:
        of_prompt = of_groups((start, last), now)
        return _Seats(*of_prompt, of_completions(every, now, completions=completions))

    def draw(loop: _Loop, at: _Seats, hidden: jax.Array) -> _Loop:
        logits = model.unembed(variables, hidden)
        now = jax.vmap(jax.random.fold_in)(at.keys, loop.samples.lengths)
        token = choose(logits, now, temperature=temperature, top_k=top_k, top_p=top_p)
        return _with_token(loop, token, logits, ends)

    def advance(loop: _Loop, at: _Seats) -> _Loop:
        """Feed the last tokens drawn and draw the next ones; a completion's first is drawn from its prompt."""
        hidden, cache = decode(weights, _next_rows(loop, at.start, columns), loop.cache)
        begins = loop.samples.lengths[:, None] == 0
        return draw(loop._replace(cache=cache), at, jnp.where(begins, at.first, hidden[:, 0]))

    def until(stop: Callable[[_Loop], jax.Array], loop: _Loop, at: _Seats) -> _Loop:
        return jax.lax.while_loop(lambda loop: ~stop(loop), lambda loop: advance(loop, at), loop)

    work = {"prompts": batch // parts, "completions": completions}
    now, _ = refill(idle(parts, groups, width, completions=completions), **work)
    if shared:
        held = cache if groups * parts == batch else model.take_rows(cache, now.prompt)
        mine = SharedCache(held, _by_layer(model, variables, init_cache(rows, own, cache_dtype))[1])
    else:
        mine = cache
    loop = _Loop(now, _no_samples(rows, max_new_tokens, ends[0]), jnp.zeros(rows, jnp.int32), mine)
    at = seats(now)
    loop = draw(loop, at, at.first)
    if rows == batch * completions:
        return until(lambda loop: ~loop.lanes.busy.any(), loop, at).samples

    def waiting(loop: _Loop) -> jax.Array:
        return refill(loop.lanes, **work)[1].sum()

    def again(state: tuple[Samples, _Loop]) -> tuple[Samples, _Loop]:
        """Let ended lanes begin anew, and draw until enough have ended for the next time."""
        results, loop = state
        results = store(results, loop.samples, loop.lanes, completions=completions)
        now, new = refill(loop.lanes, **work)
        samples = jax.tree.map(
            lambda old, fresh: jnp.where(new.reshape(-1, *[1] * (old.ndim - 1)), fresh, old),
            loop.samples,
            _no_samples(rows, max_new_tokens, ends[0]),
        )
        if groups * parts < batch:
            loop = loop._replace(cache=loop.cache._replace(prompts=model.take_rows(cache, now.prompt)))
        loop = loop._replace(lanes=now, samples=samples)
        enough = max(1, rows // REFILL)
        return results, until(lambda loop: ~loop.lanes.busy.any() | (waiting(loop) >= enough), loop, seats(now))

    results, loop = jax.lax.while_loop(
        lambda state: state[1].lanes.busy.any() | (waiting(state[1]) > 0),
        again,
        (_no_samples(batch * completions, max_new_tokens, ends[0]), loop),
    )
    return store(results, loop.samples, loop.lanes, completions=completions)


def _seating(batch: int, completions: int, lanes: int | None) -> tuple[int, int, int]:
    import os

    parts = parts_of(ROW_AXES)
    parts = parts if batch % parts == 0 else 1
    if lanes is None or lanes >= batch * completions:
        return parts, batch // parts, completions
    width = int(os.environ.get("W", "1"))
    groups = max(1, min(batch, lanes // width) // parts)
    return parts, groups, min(completions, max(1, lanes // (groups * parts)))


def _by_layer(model: Model, variables: Variables, cache: Any) -> tuple[Variables, Any]:
    if model.by_layer is not None and jax.default_backend() == "cpu":
        return model.by_layer(variables, cache)
    return variables, cache


def _no_samples(rows: int, new_tokens: int, end: int) -> Samples:
    shape = (rows, new_tokens)
    return Samples(jnp.full(shape, end, jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros(shape, jnp.float32))


def _with_token(loop: _Loop, token: jax.Array, logits: jax.Array, ends: tuple[int, ...]) -> _Loop:
    """The loop after `token[R]` was drawn from `logits[R, V]`; lanes that have ended are left as they are."""
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    logp = (picked - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)
    (tokens, counts, logps), busy = loop.samples, loop.lanes.busy.reshape(-1)
    here = (jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] == counts[:, None]) & busy[:, None]
    counts = counts + busy.astype(jnp.int32)
    samples = Samples(jnp.where(here, token[:, None], tokens), counts, jnp.where(here, logp[:, None], logps))
    stops = (token[:, None] == jnp.asarray(ends, jnp.int32)[None]).any(axis=-1) | (counts >= tokens.shape[1])
    lanes = loop.lanes._replace(busy=(busy & ~stops).reshape(loop.lanes.busy.shape))
    return loop._replace(lanes=lanes, samples=samples, token=token)


def _check_prompts(prompts: Array, lengths: Array) -> None:
    if np.ndim(prompts) != 2 or np.shape(lengths) != np.shape(prompts)[:1]:
        raise ValueError(
            f"prompts have shape {np.shape(prompts)} and lengths {np.shape(lengths)}: [B, Lp] and [B] are expected, as "
            "left_pad gives them"
        )
    if isinstance(lengths, Tracer):  # data of a compiled program, which cannot be asked
        return
    wrong = np.flatnonzero((np.asarray(lengths) < 1) | (np.asarray(lengths) > prompts.shape[1]))
    if len(wrong):
        raise ValueError(
            f"prompt {wrong[0]} has length {np.asarray(lengths)[wrong[0]]}, and prompts have {prompts.shape[1]} columns: "
            "lengths count the tokens at the end of each row, 1 or more, as left_pad gives them"
        )


def _keys_of_rows(key: jax.Array, rows: int) -> jax.Array:
    """A key for each completion, [B * K], of one key or as many."""
    dtype = getattr(key, "dtype", None)
    if dtype == np.uint32 and np.ndim(key):
        key = jax.random.wrap_key_data(jnp.asarray(key))  # of jax.random.PRNGKey
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"key: one of jax.random.key(seed), or one for each completion, is expected; got {type(key).__name__}")
    if key.shape not in ((), (rows,)):
        raise ValueError(
            f"key: one of jax.random.key(seed), or one for each of the {rows} completions, not keys of shape {key.shape}"
        )
    return key if key.shape else jax.random.split(key, rows)


def _prompt_rows(prompts: jax.Array, start: jax.Array) -> Rows:
    """Left-padded `prompts[B, Lp]` whose first token is in column `start[B]`."""
    column = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=jnp.int32), prompts.shape)
    start = start[:, None]
    padding = column < start
    return _rows(prompts, jnp.where(padding, 0, column - start), jnp.where(padding, column, start), column + 1)


def _next_rows(loop: _Loop, start: jax.Array, columns: int) -> Rows:
    """One token of each lane, the last one drawn, behind its prompt and its tokens before."""
    own = loop.samples.lengths
    return _rows(loop.token[:, None], (columns - start + own - 1)[:, None], start[:, None], (columns + own)[:, None])


def _rows(tokens: jax.Array, positions: jax.Array, k_start: jax.Array, k_end: jax.Array) -> Rows:
    """Rows that are only read, `[B, L]` each: nothing in them is scored."""
    batch, length = tokens.shape
    none = jnp.zeros((batch, 0), jnp.int32)
    keys = jnp.broadcast_to(k_start, (batch, length))
    return Rows(
        tokens, positions, keys, k_end, none, none, none, jnp.ones(batch, jnp.float32), jnp.arange(batch, dtype=jnp.int32)
    )
