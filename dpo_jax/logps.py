"""Log-probabilities of completions. Only scored positions go through the head, and only a chunk of them at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.head import Read, log_probability, log_probability_and_hit, token_logps
from dpo_jax.models.context import hidden_at
from dpo_jax.types import Array, Model, Rows, Variables


def completion_logps(
    model: Model, variables: Variables, rows: Rows, *, chunk: int | None = None, ld_alpha: float = 1.0
) -> jax.Array:
    """log pi(y|x) of each completion of each pair: float32[P, 2], in nats, summed over its tokens, chosen first.

    For rankings: float32[P, K], best first. Differentiable in `variables`; pure, so jit it. `ld_alpha`: see `pair_sums`.

    >>> jax.jit(partial(completion_logps, model))(variables, rows).shape
    (2, 2)
    """
    hidden = scored_hidden(model, variables, rows)
    return pair_sums(hidden_logps(model, variables, hidden, rows, chunk=chunk), rows, ld_alpha=ld_alpha)


def pair_sums(values: Array, rows: Rows, *, ld_alpha: float = 1.0) -> jax.Array:
    """Sums of per-token values, float32[R, S], over the completions of each pair: float32[P, 2] (rankings: [P, K]).

    `ld_alpha` is the weight of the tokens beyond the length of the pair's shorter completion (LD-DPO, Liu et al. 2024, arXiv
    2409.06411); with 1 all tokens count alike. ValueError: rankings or single completions with another one.
    """
    if ld_alpha == 1:
        return slots_to_pairs(_slot_sums(values, rows), rows)
    lengths, labeled = completion_lengths(rows), "desirable" in (rows.extras or {})
    if lengths.shape[1] != 2 or labeled:  # the cache has keys of two completions
        raise ValueError("ld_alpha compares lengths within a pair: leave it at 1 for rankings and single completions")
    in_slot, (count, _) = _in_slot(rows), rows.tokens.shape
    places = (
        np.broadcast_to(np.arange(rows.slots), (count, rows.slots)) if rows.pairs is None else rows.pairs.reshape(count, -1)
    )
    in_completion = jnp.take_along_axis(in_slot, jnp.asarray(places)[:, None, :], axis=2)  # [R, S, completions of its pairs]
    shared = jnp.repeat(lengths.min(axis=1), lengths.shape[1]).reshape(count, 1, -1)
    # The scored tokens of a completion are in text order, even where shared rows store it backwards.
    weight = jnp.where(jnp.cumsum(in_completion, axis=1, dtype=shared.dtype) <= shared, 1.0, ld_alpha)
    sums = jnp.where(in_completion, jnp.asarray(values)[:, :, None] * weight, 0.0).sum(axis=1)
    return sums.reshape(lengths.shape)


def slots_to_pairs(values: Array, rows: Rows) -> jax.Array:
    """Values of completion slots, [R * slots], regrouped by pair: [P, 2], chosen first (rankings: [P, K]).

    `completion_logps` is this applied to `sequence_logps`. Use it for other values per completion, such as rewards, and for
    pairs that share completions.

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
    logps = hidden_logps(model, variables, scored_hidden(model, variables, rows), rows, chunk=chunk)
    return _slot_sums(logps, rows).reshape(-1)


def sequence_logps_and_hits(model: Model, variables: Variables, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """`sequence_logps`, and how many scored tokens of each slot are the model's most likely ones: float32[R * slots] each.

    Both come from one pass through the head. A tie counts.
    """
    both = hidden_logps(model, variables, scored_hidden(model, variables, rows), rows, read=log_probability_and_hit)
    logps, hits = (_slot_sums(both[..., number], rows).reshape(-1) for number in range(2))
    return logps, hits


def scored_hidden(model: Model, variables: Variables, rows: Rows) -> jax.Array:
    """The hidden states that predict the scored tokens: [R, S, D]."""
    hidden = model.forward(variables, rows)
    shape = tuple(getattr(hidden, "shape", ()))  # a tuple of outputs has none
    if len(shape) != 3 or shape[:2] != np.shape(rows.tokens):
        found = f"an array {list(shape)}" if hasattr(hidden, "shape") else type(hidden).__name__
        raise ValueError(
            f"model.forward returns {found} for rows of {list(np.shape(rows.tokens))} tokens: hidden states [R, L, D] are "
            "expected; dpo_jax.check_model checks a model of your own"
        )
    return hidden_at(hidden, rows.source)


def hidden_logps(
    model: Model, variables: Variables, hidden: Array, rows: Rows, *, chunk: int | None = None, read: Read = log_probability
) -> jax.Array:
    """log pi of each scored token from the `scored_hidden` states: float32[R, S]. Values at padding are meaningless."""
    return token_logps(model, variables, hidden, rows.target, used=rows.slot < rows.slots, chunk=chunk, read=read)


def _slot_sums(values: Array, rows: Rows) -> jax.Array:
    """Sums of per-token values, float32[R, S], over completion slots: float32[R, slots]. A slot without tokens has 0."""
    return jnp.where(_in_slot(rows), jnp.asarray(values)[:, :, None], 0.0).sum(axis=1)


def completion_lengths(rows: Rows) -> jax.Array:
    """Number of scored tokens of each completion, EOS included: float32[P, 2], chosen first (rankings: [P, K]).

    A padding pair has 0, so divide by `jnp.maximum(lengths, 1)`. Works on numpy rows and inside a compiled step.

    >>> print(completion_lengths(rows))
    [[5. 5.]
     [4. 7.]]
    """
    return slots_to_pairs(scored_tokens(rows), rows)


def scored_tokens(rows: Rows) -> jax.Array:
    """Number of scored tokens in each completion slot: float32[R * slots]."""
    return _in_slot(rows).sum(axis=1).astype(jnp.float32).reshape(-1)


def _in_slot(rows: Rows) -> jax.Array:
    """One-hot mask of the slot that each scored position belongs to: bool[R, S, slots]."""
    return jnp.asarray(rows.slot)[:, :, None] == jnp.arange(rows.slots, dtype=jnp.int32)[None, None, :]
