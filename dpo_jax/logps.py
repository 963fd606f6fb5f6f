"""Log-probabilities of completions: only scored positions reach the head, and never all of them at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.axes import parts_of
from dpo_jax.types import ROW_AXES, Array, Model, Rows, Variables

CHUNK = 1024  # scored tokens of a device per pass through the head, at least; see `token_logps`


Read = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits float32[..., V], target int32[...]) -> float32[...]: a number of each scored token."""


def log_probability(logits: jax.Array, target: jax.Array) -> jax.Array:
    """log pi of the token `target`."""
    return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def aligned_log_probability(logits: jax.Array, target: jax.Array) -> jax.Array:
    """log pi of the token `target` less that of a token of the policy's own: log sum_v pi(v)^2 (WPO, Zhou et al. 2024)."""
    own = jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)
    return log_probability(logits, target) - own


def completion_logps(
    model: Model, variables: Variables, rows: Rows, *, chunk: int | None = None, ld_alpha: float = 1.0
) -> jax.Array:
    """log pi(y|x) of each completion of each pair: float32[P, 2], in nats, summed over its tokens, chosen first.

    Of rankings: float32[P, K], best first. Differentiable in `variables`; pure, so jit it. `ld_alpha`: see `pair_sums`.

    >>> jax.jit(partial(completion_logps, model))(variables, rows).shape
    (2, 2)
    """
    hidden = scored_hidden(model, variables, rows)
    return pair_sums(hidden_logps(model, variables, hidden, rows, chunk=chunk), rows, ld_alpha=ld_alpha)


def pair_sums(values: Array, rows: Rows, *, ld_alpha: float = 1.0) -> jax.Array:
    """Sums of a value of each scored token, float32[R, S], over the completions of each pair: float32[P, 2] (or [P, K]).

    `ld_alpha` below 1 is that of LD-DPO (Liu et al. 2024, arXiv 2409.06411): the weight of the tokens beyond the length of
    the pair's shorter completion.
    """
    if ld_alpha == 1:
        return slots_to_pairs(_slot_sums(values, rows), rows)
    in_slot, (count, _) = _in_slot(rows), rows.tokens.shape
    places = (
        np.broadcast_to(np.arange(rows.slots), (count, rows.slots)) if rows.pairs is None else rows.pairs.reshape(count, -1)
    )
    in_completion = jnp.take_along_axis(in_slot, jnp.asarray(places)[:, None, :], axis=2)  # [R, S, completions of its pairs]
    lengths = completion_lengths(rows)
    shared = jnp.repeat(lengths.min(axis=1), lengths.shape[1]).reshape(count, 1, -1)
    # The scored tokens of a completion come in the order of its text, also where shared rows hold it backwards.
    weight = jnp.where(jnp.cumsum(in_completion, axis=1, dtype=shared.dtype) <= shared, 1.0, ld_alpha)
    sums = jnp.where(in_completion, jnp.asarray(values)[:, :, None] * weight, 0.0).sum(axis=1)
    return sums.reshape(lengths.shape)


def slots_to_pairs(values: Array, rows: Rows) -> jax.Array:
    """From a value of each completion slot, [R * slots], to those of each pair, [P, 2], chosen first (of rankings, [P, K]).

    What `completion_logps` does with `sequence_logps`: for other numbers of completions, such as rewards, and for pairs that
    share completions.

    >>> slots_to_pairs(np.array([-9.0, -8.0, -7.0, -6.0]), rows).tolist()  # of two pairs, a row each
    [[-9.0, -8.0], [-7.0, -6.0]]
    """
    values = jnp.asarray(values)
    if rows.pairs is None:
        return values.reshape(rows.weight.shape[0], -1)
    in_row = values.reshape(rows.tokens.shape[0], rows.slots)
    return jnp.take_along_axis(in_row, rows.pairs.reshape(len(in_row), -1), axis=1).reshape(-1, 2)


def sequence_logps(model: Model, variables: Variables, rows: Rows, *, chunk: int | None = None) -> jax.Array:
    """Summed log-probability of every completion slot: float32[R * slots], in nats. A slot without tokens has 0.

    >>> texts = completion_rows([(pair.prompt, pair.chosen) for pair in encoded], length=64)
    >>> jax.jit(partial(sequence_logps, model))(variables, texts).shape
    (2,)
    """
    return _slot_sums(hidden_logps(model, variables, scored_hidden(model, variables, rows), rows, chunk=chunk), rows).reshape(
        -1
    )


def scored_hidden(model: Model, variables: Variables, rows: Rows) -> jax.Array:
    """The hidden states that predict the scored tokens: [R, S, D]."""
    hidden = model.forward(variables, rows)
    shape = tuple(getattr(hidden, "shape", ()))  # a tuple of outputs has none
    if len(shape) != 3 or shape[:2] != np.shape(rows.tokens):
        found = f"an array {list(shape)}" if hasattr(hidden, "shape") else type(hidden).__name__
        raise ValueError(
            f"model.forward returns {found} for rows of {list(np.shape(rows.tokens))} tokens: hidden states [R, L, D] are "
            "expected; dpo_jax.check_model tells whether a model of your own is right"
        )
    return jnp.take_along_axis(hidden, rows.source[:, :, None], axis=1)


def hidden_logps(
    model: Model, variables: Variables, hidden: Array, rows: Rows, *, chunk: int | None = None, read: Read = log_probability
) -> jax.Array:
    """log pi of each scored token from the `scored_hidden` states: float32[R, S]; of padding it means nothing."""
    return token_logps(model, variables, hidden, rows.target, used=rows.slot < rows.slots, chunk=chunk, read=read)


def _slot_sums(values: Array, rows: Rows) -> jax.Array:
    """float32[R, slots] from a value of each scored token, float32[R, S]. A slot without tokens has 0."""
    return jnp.where(_in_slot(rows), jnp.asarray(values)[:, :, None], 0.0).sum(axis=1)


def completion_lengths(rows: Rows) -> jax.Array:
    """Scored tokens of each completion of each pair, its EOS included: float32[P, 2], chosen first (of rankings, [P, K]).

    A pair that only fills up the batch has 0: divide by `jnp.maximum(lengths, 1)`. Works on numpy rows and
    inside a compiled step.

    >>> print(completion_lengths(rows))
    [[5. 5.]
     [4. 7.]]
    """
    return slots_to_pairs(scored_tokens(rows), rows)


def scored_tokens(rows: Rows) -> jax.Array:
    """How many tokens each completion slot scores: float32[R * slots]."""
    return _in_slot(rows).sum(axis=1).astype(jnp.float32).reshape(-1)


def _in_slot(rows: Rows) -> jax.Array:
    """Which slot each scored position belongs to: bool[R, S, slots]."""
    return jnp.asarray(rows.slot)[:, :, None] == jnp.arange(rows.slots, dtype=jnp.int32)[None, None, :]


def at_least_float32(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def token_logps(
    model: Model,
    variables: Variables,
    hidden: Array,
    target: Array,
    *,
    used: Array | None = None,
    chunk: int | None = None,
    read: Read = log_probability,
) -> jax.Array:
    """log-probability of `target[R, S]` given `hidden[R, S, D]`: float32[R, S]. Where `used[R, S]` is false, it means nothing.

    `read` may take another number from the logits.

    The head runs over at most `chunk` positions of each device at a time: first those that are used, and on one device no chunk
    in which none is. By default these are `CHUNK`, or D where that is more: each pass reads the head's weights and adds to
    their gradient, V x D numbers, and so does most of its work on its chunk x V logits.

    With several chunks the backward pass computes the logits again instead of keeping them: no buffer of all positions times
    the vocabulary exists in either direction.
    """

    def score(hidden: jax.Array, target: jax.Array) -> jax.Array:
        # Whatever the model computes in: a reward is a small difference of large sums.
        return read(at_least_float32(model.unembed(variables, hidden)), target)

    chunk = chunk or head_chunk(hidden.shape[-1])
    rows, scored = target.shape
    parts = math.gcd(rows, parts_of(ROW_AXES))  # each device sorts its own
    each = rows // parts * scored
    count = -(-each // chunk)
    if count == 1:
        return score(jnp.asarray(hidden), jnp.asarray(target))
    width = min(chunk, -(-each // count // 64) * 64)  # a CPU multiplies matrices of odd sizes a third slower
    used = jnp.ones(target.shape, bool) if used is None else jnp.asarray(used)
    order = jnp.argsort(~used.reshape(parts, each), axis=1)

    def split(x: Array) -> jax.Array:
        """[R, S, ...] to [count, parts, width, ...], what is used first."""
        x = jnp.asarray(x).reshape(parts, each, *x.shape[2:])
        x = jnp.take_along_axis(x, order.reshape(parts, each, *(1 for _ in x.shape[2:])), axis=1)
        x = jnp.pad(x, [(0, 0), (0, count * width - each)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(parts, count, width, *x.shape[2:]), 1, 0)

    chunks = (split(hidden), split(target), split(used))
    if parts == 1:
        score_chunk = _where_used(score, *(chunk[0] for chunk in chunks[:2]))
    else:
        # A chunk is rarely unused on all devices, and inside a condition the head's gradient would be summed chunk by chunk.
        score_chunk = lambda hidden, target, _: jax.checkpoint(score)(hidden, target)  # noqa: E731
    logps = jnp.moveaxis(jax.lax.map(lambda chunk: score_chunk(*chunk), chunks), 0, 1)
    logps = logps.reshape(parts, count * width)[:, :each]
    return jnp.take_along_axis(logps, jnp.argsort(order, axis=1), axis=1).reshape(rows, scored)


def head_chunk(width: int) -> int:
    """Scored tokens of a device per pass through the head, where nobody says otherwise. `width` is D."""
    return max(CHUNK, width)


def _where_used(score: Callable[..., jax.Array], *example: jax.Array) -> Callable[..., jax.Array]:
    """`score(hidden, target)` as a function of `(hidden, target, used)` that computes nothing where nothing is used.

    The backward pass is written out, because what `jax.grad` makes of a condition keeps a copy of the head for each chunk. The
    gradient of a matrix leaves the condition in the type of `hidden`, which is the type of a product with `hidden`: a float32
    copy of it would be the largest buffer of a step.
    """
    score, weights = jax.closure_convert(score, *example)
    scores = jax.eval_shape(score, *example, *weights)

    @jax.custom_vjp
    def score_chunk(weights: list[jax.Array], hidden: jax.Array, target: jax.Array, used: jax.Array) -> jax.Array:
        return jax.lax.cond(used.any(), lambda: score(hidden, target, *weights), lambda: jnp.zeros_like(scores))

    def backward(inputs: Any, d_logps: jax.Array) -> tuple[Any, ...]:
        weights, hidden, target, used = inputs

        def gradients() -> Any:
            found = jax.vjp(lambda weights, hidden: score(hidden, target, *weights), weights, hidden)[1](d_logps)
            return jax.tree.map(lambda d: d.astype(hidden.dtype) if d.ndim > 1 else d, found)

        shapes = jax.eval_shape(gradients)
        found = jax.lax.cond(used.any(), gradients, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        return *jax.tree.map(lambda d, like: d.astype(like.dtype), found, (weights, hidden)), None, None

    score_chunk.defvjp(lambda *inputs: (score_chunk(*inputs), inputs), backward)
    return functools.partial(score_chunk, weights)
