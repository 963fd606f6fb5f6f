"""Sampling completions in one compiled loop: one pass over the prompts, then one token at a time with a key/value cache.

Prompts of unequal length are padded on the left. A prompt is read once for all of its completions. They share its keys and
values, and write those of their own tokens to a separate cache (`types.SharedCache`):

    column     0    1    2    3      0    1
    prompt 0   .    .   p_0  p_1    y_0  y_1    completion 0
                                    y_0  y_1    completion 1
    prompt 1  p_0  p_1  p_2  p_3    y_0  y_1    completion 0
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.data.encode import PromptImages
from dpo_jax.data.segments import ImageRows
from dpo_jax.sampling.loop import Options, Samples, Source, draw_completions, loop_weights, rows_read
from dpo_jax.types import Array, Model, RowImages, Rows, Variables


def left_pad(prompts: Sequence[Sequence[int] | np.ndarray], *, multiple_of: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Input of `generate`: int32[B, Lp] token ids, padded on the left, and int32[B] lengths.

    `Lp` is rounded up to `multiple_of`, so that few shapes are compiled. An empty prompt is a ValueError: something must
    predict the first token (begin with BOS).

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


def left_pad_images(
    prompts: Sequence[PromptImages | None],
    lengths: Array,
    *,
    columns: int,
    image_shape: tuple[int, int] | None = None,
) -> RowImages | None:
    """The images of prompts that `left_pad` has padded to `columns` columns; None if no prompt shows one.

    `lengths` int32[B] come from `left_pad`. `image_shape` is M and W of `RowImages`, for batches of one shape; by default M is
    the largest number of image tokens in a prompt.
    """
    largest = max((one for one in prompts if one is not None), key=lambda one: one.columns, default=None)
    if image_shape is None:
        if largest is None:
            return None
        image_shape = largest.columns, largest.width
    found = ImageRows(len(prompts), columns, *image_shape)
    for row, (one, length) in enumerate(zip(prompts, np.asarray(lengths).tolist(), strict=True)):
        if one is not None:
            found.place(row, columns - length, one)
    return found.rows


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
    cache_dtype: Any = None,
    images: RowImages | None = None,
) -> Samples:
    """Sample K = `completions` of every prompt (`prompts` int32[B, Lp] and `lengths` int32[B] from `left_pad`). Pure: jit it,
    with its numbers, such as `temperature`, bound by `partial`: they are part of the program.

    Returns `Samples` of B * K rows, those of a prompt side by side. Each prompt is read once.

    The distribution is `model`'s with logits divided by `temperature`, restricted to the `top_k` most likely tokens (0: all),
    then to the most likely ones with total probability `top_p` (1: all; nucleus sampling, Holtzman et al. 2019), as in
    transformers. Temperature 0 is greedy. A row ends with `eos_id`, or with any of several (-1: no token ends it), and after
    T = `max_new_tokens` tokens.

    `images` are those of the prompts, from `left_pad_images`.

    `lanes`: number of completions drawn at a time; one that has ended makes room for the next (continuous batching). This saves
    memory, and saves time if lengths differ. None: all at once, until the last one ends.

    `key` is one key (`jax.random.key`, or the older `PRNGKey`), or keys [B * K], one per completion. With one key per
    completion, it does not matter which others share its batch or device.

    `Samples.token_logps` are those of the model itself, before temperature, top-k and top-p. `Samples.logps`, their sums, equal
    `logps.sequence_logps` of the same tokens. They are NaN where a completion ran past the model's position table.

    Memory of the cache: a column takes `2 * layers * kv_heads * head_size` numbers of `cache_dtype` (None: the compute type of
    the model). There are `B * Lp` columns for prompts and `lanes * (T - 1)` for completions (without `lanes` B * K * (T - 1)).
    With `lanes` below B * K, each lane also copies its prompt's columns, `lanes * Lp` more. If memory allows, the loop reads a
    copy of the weights in the compute type: of all weights on CPUs and GPUs, of wider ones on TPUs, and whole on each device
    where only `fsdp` shards them (`loop_weights`).

    Raises ValueError for options out of range, `lengths` not of shape [B] or (outside jit, where values are known) not from 1
    to Lp, and keys of another shape; TypeError if `key` is not a random key.

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
    prompts, lengths = (x if hasattr(x, "shape") else np.asarray(x) for x in (prompts, lengths))
    static = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "completions": completions, "temperature": temperature}
    if traced := sorted(name for name, x in (static | {"top_k": top_k, "top_p": top_p}).items() if isinstance(x, Tracer)):
        raise TypeError(f"{traced[0]}: expected a Python number, got a traced value: bind it with partial before jit")
    if max_new_tokens < 1 or completions < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} and completions={completions} must be at least 1, temperature={temperature} and "
            f"top_k={top_k} at least 0, top_p={top_p} in (0, 1]"
        )
    if eos_id is None:
        raise ValueError("eos_id is None; use -1 to sample without EOS")
    ends = tuple(map(operator.index, eos_id if np.iterable(eos_id) else (eos_id,)))
    if not ends:
        raise ValueError("eos_id is empty; use -1 to sample without EOS")
    _check_prompts(prompts, lengths)
    keys, own = _keys_of_rows(key, prompts.shape[0] * completions), 0
    if model.take_rows is None:  # it has one cache per completion, with room for the completion
        prompts, lengths, images = jax.tree.map(
            lambda array: jnp.repeat(jnp.asarray(array), completions, axis=0), (prompts, lengths, images)
        )
        completions, lanes, own = 1, None, max_new_tokens - 1
    batch, columns = prompts.shape
    start = columns - jnp.asarray(lengths, jnp.int32)
    rows = _prompt_rows(jnp.asarray(prompts, jnp.int32), start)
    if images is not None:  # the tokens of an image see each other both ways
        tokens = model.config.image_tokens
        last = rows.k_end - 1 + tokens - jnp.asarray(images.index) % tokens
        rows = rows.replace(images=images, k_end=jnp.where(images.index < 0, rows.k_end, last))
    hidden, cache = decode(variables, rows, init_cache(batch, columns + own, cache_dtype))
    weights, cache, whole = loop_weights(model, variables, cache)  # late: the pass over prompts would compile for longer
    source = Source(model, variables, weights, whole, cache, columns, start, hidden[:, -1], keys)
    choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return draw_completions(source, Options(completions, max_new_tokens, ends, cache_dtype, choice), lanes=lanes)


def _check_prompts(prompts: Array, lengths: Array) -> None:
    if np.ndim(prompts) != 2 or np.shape(lengths) != np.shape(prompts)[:1]:
        raise ValueError(
            f"prompts have shape {np.shape(prompts)} and lengths {np.shape(lengths)}: [B, Lp] and [B] are expected, as "
            "left_pad gives them"
        )
    if isinstance(lengths, Tracer):  # traced values of a compiled program cannot be inspected
        return
    wrong = np.flatnonzero((np.asarray(lengths) < 1) | (np.asarray(lengths) > prompts.shape[1]))
    if len(wrong):
        raise ValueError(
            f"prompt {wrong[0]} has length {np.asarray(lengths)[wrong[0]]}, and prompts have {prompts.shape[1]} columns: "
            "lengths count the tokens at the end of each row, 1 or more, as left_pad gives them"
        )


def _keys_of_rows(key: jax.Array, rows: int) -> jax.Array:
    """One key per completion, [B * K], from one key or from as many."""
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
    return rows_read(prompts, jnp.where(padding, 0, column - start), jnp.where(padding, column, start), column + 1)
