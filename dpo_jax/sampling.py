"""Sampling completions: one pass over the prompts, then one token at a time against a key/value cache, in one compiled loop.

Prompts of unequal length are padded on the left, so that all rows write their next token to the same cache column:

    column     0    1    2    3    4    5
    row 0      .    .   p_0  p_1  y_0  y_1
    row 1     p_0  p_1  p_2  p_3  y_0  y_1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.types import Array, Model, Rows, Variables

SMALL = 1e-6
"""Temperatures below this could make logits overflow. Those above are divided by as in transformers, to the last bit."""


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

    drawn: jax.Array  # int32[]  tokens drawn so far
    samples: Samples
    ended: jax.Array  # bool[B]
    cache: Any


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
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cache_dtype: Any = jnp.float32,
) -> Samples:
    """Sample a completion of every prompt (`prompts` int32[B, Lp] and `lengths` int32[B] from `left_pad`). Pure: jit it.

    The distribution is `model`'s with logits divided by `temperature`, cut to the `top_k` likeliest tokens (0: all), then to
    the likeliest ones that together reach probability `top_p` (1: all; nucleus sampling, Holtzman et al. 2019), as in
    transformers. Temperature 0 takes the likeliest token. A row ends with `eos_id`, or with any of several (-1: no token ends
    it), the loop when all rows have ended or after T = `max_new_tokens` tokens.

    `key` is one key (`jax.random.key`, or the older `PRNGKey`), or keys [B], one for each row: then a completion does not
    depend on which rows it shares a batch or a device with.

    `Samples.token_logps` are under the model itself, before temperature and cuts: `Samples.logps`, their sums, equal what
    `logps.sequence_logps` finds for the same tokens. They are NaN where a completion ran past the model's position table.

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
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} and top_k={top_k} at least 0, "
            f"top_p={top_p} in (0, 1]"
        )
    ends = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    if not ends:
        raise ValueError("eos_id names no token; -1 lets no token end a row")
    _check_prompts(prompts, lengths)
    batch, columns = prompts.shape
    start = columns - jnp.asarray(lengths, jnp.int32)
    keys = _keys_of_rows(key, batch)

    def draw(hidden: jax.Array, loop: _Loop) -> _Loop:
        """Draw token number `loop.drawn` of every row from the hidden state before it."""
        logits = model.unembed(variables, hidden)
        token = _choose(
            logits, jax.vmap(jax.random.fold_in, (0, None))(keys, loop.drawn), temperature=temperature, top_k=top_k, top_p=top_p
        )
        picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        logp = (picked - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)
        tokens, counts, logps = loop.samples
        samples = Samples(
            jax.lax.dynamic_update_slice(tokens, jnp.where(loop.ended, ends[0], token)[:, None], (0, loop.drawn)),
            counts + jnp.where(loop.ended, 0, 1),
            jax.lax.dynamic_update_slice(logps, jnp.where(loop.ended, 0.0, logp)[:, None], (0, loop.drawn)),
        )
        stops = (token[:, None] == jnp.asarray(ends, jnp.int32)[None]).any(axis=-1)
        return loop._replace(drawn=loop.drawn + 1, samples=samples, ended=loop.ended | stops)

    def advance(loop: _Loop) -> _Loop:
        """Feed the last token drawn and draw the next one."""
        last = loop.drawn - 1
        token = jax.lax.dynamic_slice(loop.samples.tokens, (0, last), (batch, 1))
        column = jnp.broadcast_to(columns + last, (batch, 1))
        rows = _rows(token, column - start[:, None], start[:, None], column + 1)
        hidden, cache = decode(weights, rows, loop.cache)
        return draw(hidden[:, 0], loop._replace(cache=cache))

    # The last token drawn is never fed, and needs no column.
    weights, cache = variables, init_cache(batch, columns + max_new_tokens - 1, cache_dtype)
    if model.by_layer is not None and jax.default_backend() == "cpu":
        weights, cache = model.by_layer(weights, cache)
    hidden, cache = decode(weights, _prompt_rows(jnp.asarray(prompts, jnp.int32), start), cache)
    shape = (batch, max_new_tokens)
    none = Samples(jnp.full(shape, ends[0], jnp.int32), jnp.zeros(batch, jnp.int32), jnp.zeros(shape, jnp.float32))
    loop = draw(hidden[:, -1], _Loop(jnp.int32(0), none, jnp.zeros(batch, bool), cache))
    loop = jax.lax.while_loop(lambda loop: (loop.drawn < max_new_tokens) & ~loop.ended.all(), advance, loop)
    return loop.samples


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


def _keys_of_rows(key: jax.Array, batch: int) -> jax.Array:
    """A key for each row, [B], of one key or as many."""
    dtype = getattr(key, "dtype", None)
    if dtype == np.uint32 and np.ndim(key):
        key = jax.random.wrap_key_data(jnp.asarray(key))  # of jax.random.PRNGKey
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"key: one of jax.random.key(seed), or one for each prompt, is expected; got {type(key).__name__}")
    if key.shape not in ((), (batch,)):
        raise ValueError(
            f"key: one of jax.random.key(seed), or one for each of the {batch} prompts, not keys of shape {key.shape}"
        )
    return key if key.shape else jax.random.split(key, batch)


def _choose(logits: jax.Array, keys: jax.Array, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token per row: `logits` float32[B, V], keys [B] -> int32[B]."""
    if temperature < float(jnp.finfo(jnp.float32).tiny):  # 0, as far as float32 is concerned
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if temperature < SMALL:  # a quotient too large for float32 becomes -inf, and the likeliest token stays at 0
        logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return _draw(jnp.exp(logits - logits.max(axis=-1, keepdims=True)), keys)


def _draw(weights: jax.Array, keys: jax.Array) -> jax.Array:
    """An index per row with a probability proportional to `weights[B, V]`: first a block of them, then one in the block.

    Two random numbers a row instead of one for each token of the vocabulary, which would take longer than a small model.
    Sums over few numbers, too: a single running sum over a large vocabulary is too coarse in float32.
    """
    vocab = weights.shape[1]
    size = 1 << round(math.log2(vocab) / 2)
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % size))).reshape(len(weights), -1, size)
    first, second = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys).T
    block = _invert(blocks.sum(axis=-1), first)
    inside = _invert(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], second)
    return (block * size + inside).astype(jnp.int32)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index at which the running sum of `weights[B, n]` passes the share `uniform[B]` of it, in [0, 1)."""
    reached, possible = jnp.cumsum(weights, axis=-1), weights > 0  # a sum may grow by rounding where nothing is added
    target = uniform * jnp.where(possible, reached, 0).max(axis=-1)
    return jnp.argmax(possible & (reached > target[:, None]), axis=-1)


def _prompt_rows(prompts: jax.Array, start: jax.Array) -> Rows:
    """Left-padded `prompts[B, Lp]` whose first token is in column `start[B]`."""
    column = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=jnp.int32), prompts.shape)
    start = start[:, None]
    padding = column < start
    return _rows(prompts, jnp.where(padding, 0, column - start), jnp.where(padding, column, start), column + 1)


def _rows(tokens: jax.Array, positions: jax.Array, k_start: jax.Array, k_end: jax.Array) -> Rows:
    """Rows that are only read, `[B, L]` each: nothing in them is scored."""
    batch, length = tokens.shape
    none = jnp.zeros((batch, 0), jnp.int32)
    keys = jnp.broadcast_to(k_start, (batch, length))
    return Rows(
        tokens, positions, keys, k_end, none, none, none, jnp.ones(batch, jnp.float32), jnp.arange(batch, dtype=jnp.int32)
    )
