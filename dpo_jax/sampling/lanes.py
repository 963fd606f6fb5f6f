"""Continuous batching: lanes (rows of a decoding loop) each draw one completion at a time; an idle lane takes the next one.

K completions of each of B prompts are numbered prompt by prompt. On a mesh, prompts and lanes are split into D parts, as rows
are, and a lane draws completions of its own part only. Nothing then moves between devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Lanes(NamedTuple):
    """State of the `n` lanes of each part. Completions are numbered within their part."""

    completion: jax.Array  # int32[D, n]
    begun: jax.Array  # int32[D]  completions started
    busy: jax.Array  # bool[D, n]  whether it is still being drawn


def idle(parts: int, lanes: int) -> Lanes:
    """The initial state: `lanes` idle lanes in each part."""
    none = jnp.zeros((parts, lanes), jnp.int32)
    return Lanes(none, none[:, 0], none > 0)


def refill(lanes: Lanes, *, of: int) -> tuple[Lanes, jax.Array]:
    """Gives idle lanes the next of the `of` completions of their part: (lanes, bool[D, n] marking the refilled ones)."""
    number = lanes.begun[:, None] + jnp.cumsum(~lanes.busy, axis=-1, dtype=jnp.int32) - 1
    new = ~lanes.busy & (number < of)
    begun = lanes.begun + new.sum(axis=-1, dtype=jnp.int32)
    return Lanes(jnp.where(new, number, lanes.completion), begun, lanes.busy | new), new


def waiting(lanes: Lanes, *, of: int) -> jax.Array:
    """Number of lanes that `refill` would restart."""
    return jnp.minimum((~lanes.busy).sum(axis=-1, dtype=jnp.int32), of - lanes.begun).sum()


def take(values: Any, index: jax.Array) -> Any:
    """Rows `index[D, n]`, numbered within each of D parts, of arrays [D * m, ...]: [D * n, ...]."""
    return jax.tree.map(lambda leaf: rows_of(leaf, index), values)


def rows_of(array: jax.Array, index: jax.Array, *, axis: int = 0) -> jax.Array:
    """`take` along another axis of one array. No row leaves its device."""
    parts = jnp.moveaxis(array, axis, 0).reshape(len(index), -1, *array.shape[:axis], *array.shape[axis + 1 :])
    taken = jax.vmap(lambda part, numbers: part[numbers])(parts, index)
    return jnp.moveaxis(taken.reshape(index.size, *taken.shape[2:]), 0, axis)


def put(results: Any, values: Any, index: jax.Array) -> Any:
    """The inverse of `take`: `results` with `values` written to the rows `index[D, n]`."""
    parts = len(index)

    def one(result: jax.Array, value: jax.Array) -> jax.Array:
        old, new = (x.reshape(parts, -1, *x.shape[1:]) for x in (result, value))
        return jax.vmap(lambda part, numbers, rows: part.at[numbers].set(rows))(old, index, new).reshape(result.shape)

    return jax.tree.map(one, results, values)
