"""Continuous batching: which completion of which prompt each row of a decoding loop draws. A row whose completion has ended
takes the next one.

Rows are *lanes*, in groups of W. A group holds one prompt, whose keys and values its lanes share, until all of its completions
are drawn; then it takes the next prompt that no group has begun. On a mesh, prompts and groups are cut into as many parts as
rows are, D, and a group takes prompts of its own part only: nothing then moves between devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Lanes(NamedTuple):
    """What each lane is at. Prompts are numbered within their part, completions within their prompt."""

    prompt: jax.Array  # int32[D, G]  that the group holds
    begun: jax.Array  # int32[D, G]  completions of it that were begun
    prompts_begun: jax.Array  # int32[D]
    completion: jax.Array  # int32[D, G, W]
    busy: jax.Array  # bool[D, G, W]  it has not ended


def idle(parts: int, groups: int, width: int, *, completions: int) -> Lanes:
    """Lanes before anything is begun: `groups` in each of `parts`, `width` lanes in each."""
    none = jnp.zeros((parts, groups, width), jnp.int32)
    return Lanes(none[..., 0], jnp.full((parts, groups), completions, jnp.int32), none[:, 0, 0], none, none > 0)


def refill(lanes: Lanes, *, prompts: int, completions: int) -> tuple[Lanes, jax.Array]:
    """Gives lanes that have ended something to do, where there is any: (lanes, bool[D, G, W] of those that begin anew).

    `prompts` in each part, `completions` of each prompt.
    """
    left = ~lanes.busy.any(axis=-1) & (lanes.begun >= completions)
    number = lanes.prompts_begun[:, None] + _count(left) - 1
    moves = left & (number < prompts)
    begun = jnp.where(moves, 0, lanes.begun)
    place = begun[..., None] + _count(~lanes.busy) - 1
    new = ~lanes.busy & (place < completions)
    return Lanes(
        prompt=jnp.where(moves, number, lanes.prompt),
        begun=begun + new.sum(axis=-1, dtype=jnp.int32),
        prompts_begun=lanes.prompts_begun + moves.sum(axis=-1, dtype=jnp.int32),
        completion=jnp.where(new, place, lanes.completion),
        busy=lanes.busy | new,
    ), new


def of_groups(values: Any, lanes: Lanes) -> Any:
    """Arrays [B, ...] with a value for each prompt to [R, ...] with one for each lane."""

    def of(leaf: jax.Array) -> jax.Array:
        parts, groups, width = lanes.busy.shape
        taken = jax.vmap(lambda part, index: part[index])(leaf.reshape(parts, -1, *leaf.shape[1:]), lanes.prompt)
        return jnp.repeat(taken.reshape(parts * groups, *leaf.shape[1:]), width, axis=0)

    return jax.tree.map(of, values)


def of_completions(values: jax.Array, lanes: Lanes, *, completions: int) -> jax.Array:
    """An array [B * completions] with a value for each completion to [R] with one for each lane."""
    parts = len(lanes.prompt)
    number = lanes.prompt[..., None] * completions + lanes.completion
    return jax.vmap(lambda part, index: part[index])(values.reshape(parts, -1), number.reshape(parts, -1)).reshape(-1)


def store(results: Any, values: Any, lanes: Lanes, *, completions: int) -> Any:
    """Arrays [B * completions, ...] with what lanes [R, ...] hold written over the completions they are at."""
    parts = len(lanes.prompt)
    number = (lanes.prompt[..., None] * completions + lanes.completion).reshape(parts, -1)

    def one(result: jax.Array, value: jax.Array) -> jax.Array:
        cut = (x.reshape(parts, -1, *x.shape[1:]) for x in (result, value))
        put = jax.vmap(lambda part, index, new: part.at[index].set(new))
        first, second = cut
        return put(first, number, second).reshape(result.shape)

    return jax.tree.map(one, results, values)


def _count(where: jax.Array) -> jax.Array:
    return jnp.cumsum(where, axis=-1, dtype=jnp.int32)
