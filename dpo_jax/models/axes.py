"""Sharding constraints inside the model: mesh axes of activations and parameters.

XLA spreads the operations of a step over a mesh by itself, from how its arguments lie. Two things it cannot know, and decides
expensively: that activations stay cut by row, and that the gradient of a parameter is wanted in the parts in which the
parameter itself lies. Without the second it sums whole gradients on every device (all-reduce) and throws most of them away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

from dpo_jax.models.logical_axes import RULES
from dpo_jax.types import TOKEN_AXES


def auto_axes() -> frozenset[str]:
    """The mesh axes over which XLA spreads the program being traced; none without a mesh and under pmap."""
    return frozenset(jax.sharding.get_abstract_mesh().auto_axes)


def parts_of(axes: Sequence[str]) -> int:
    """Into how many parts the mesh of the program being traced cuts something along `axes`; 1 without a mesh and under pmap."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.auto_axes)


def by_row(x: jax.Array) -> jax.Array:
    """`x[R, ...]`, cut over the mesh by row, if there is a mesh. XLA may cut D as the weights are, not the batch.

    Along a context axis, rows are pieces of rows (`models.context`).
    """
    return _cut(x, TOKEN_AXES)


def as_stored(parameter: jax.Array, axes: Sequence[str | None], *, gathered: Sequence[str] = ()) -> jax.Array:
    """A parameter that lies as `RULES` cut its logical `axes`, and whose gradient is summed straight into those parts.

    `gathered`: mesh axes along which it is wanted whole.
    """
    over = (None if axis is None else RULES[axis] for axis in axes)
    return _cut(parameter, *(None if axis in gathered else axis for axis in over))


def _cut(x: jax.Array, *axes: str | Sequence[str] | None) -> jax.Array:
    """`x` cut along those of `axes` (one entry per axis of `x`) that the mesh of the program has."""
    auto = jax.sharding.get_abstract_mesh().auto_axes
    if not auto:
        return x
    kept = (tuple(name for name in ((axis,) if isinstance(axis, str) else axis or ()) if name in auto) for axis in axes)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))
