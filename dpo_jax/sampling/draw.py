"""Draw one token per row from logits: temperature, top-k, top-p, and a key for each row."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

SMALL = 1e-6
"""Smallest temperature that is divided by, as in transformers, to the last bit; below it logits could overflow."""


def choose(logits: jax.Array, keys: jax.Array, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
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
    """An index per row, with probability proportional to `weights[B, V]`: first a block of entries, then one entry of it.

    This takes two random numbers per row instead of one per vocabulary entry, which would take longer than a small model. Sums
    are also short: a single running sum over a large vocabulary is too coarse in float32.
    """
    vocab = weights.shape[1]
    size = 1 << round(math.log2(vocab) / 2)
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % size))).reshape(len(weights), -1, size)
    first, second = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys).T
    block = _invert(blocks.sum(axis=-1), first)
    inside = _invert(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], second)
    return (block * size + inside).astype(jnp.int32)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index where the running sum of `weights[B, n]` passes the fraction `uniform[B]`, in [0, 1), of its total."""
    reached, possible = jnp.cumsum(weights, axis=-1), weights > 0  # rounding may increase a sum even where nothing is added
    target = uniform * jnp.where(possible, reached, 0).max(axis=-1)
    return jnp.argmax(possible & (reached > target[:, None]), axis=-1)
