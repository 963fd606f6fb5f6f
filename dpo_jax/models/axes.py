"""Sharding constraints inside the model: mesh axes of activations and parameters.

XLA partitions the operations of a step by itself, from the sharding of its arguments. Without constraints it makes two costly
choices: activations do not stay sharded by row, and gradients do not get their parameter's sharding. In the second case it sums
whole gradients on every device (all-reduce) and discards most of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import jax
from jax.sharding import PartitionSpec

from dpo_jax.models.logical_axes import RULES
from dpo_jax.types import TOKEN_AXES

_WHOLE: ContextVar[frozenset[str]] = ContextVar("_WHOLE", default=frozenset())


@contextlib.contextmanager
def whole_along(*axes: str) -> Iterator[None]:
    """A context in which programs are traced whose parameters are not sharded along the mesh axes `axes`.

    `as_stored` then leaves them whole, instead of sharding them as in training.
    """
    before = _WHOLE.set(_WHOLE.get() | {*axes})
    try:
        yield
    finally:
        _WHOLE.reset(before)


def sharding_axes() -> frozenset[str]:
    """The `auto_axes` along which parameters are sharded where `RULES` say so."""
    return auto_axes() - _WHOLE.get()


def auto_axes() -> frozenset[str]:
    """The mesh axes that XLA partitions automatically in the program being traced; none without a mesh and under pmap."""
    return frozenset(jax.sharding.get_abstract_mesh().auto_axes)


def parts_of(axes: Sequence[str]) -> int:
    """Number of shards along the mesh axes `axes` in the program being traced; 1 without a mesh and under pmap."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.auto_axes)


def by_row(x: jax.Array) -> jax.Array:
    """`x[R, ...]` sharded by row, if there is a mesh. Otherwise XLA might shard D like the weights, instead of the batch.

    Along a context axis, rows are pieces of rows (`models.context`).
    """
    return _cut(x, TOKEN_AXES)


def as_stored(parameter: jax.Array, axes: Sequence[str | None], *, gathered: Sequence[str] = ()) -> jax.Array:
    """A parameter sharded as `RULES` shard its logical `axes`, whose gradient is reduce-scattered into the same shards.

    `gathered`: mesh axes along which the parameter is gathered.
    """
    over = (None if axis is None else RULES[axis] for axis in axes)
    return _cut(parameter, *(None if axis in gathered or axis in _WHOLE.get() else axis for axis in over))


def _cut(x: jax.Array, *axes: str | Sequence[str] | None) -> jax.Array:
    """`x` sharded along those of `axes` (one entry per axis of `x`) that the program's mesh has."""
    auto = jax.sharding.get_abstract_mesh().auto_axes
    if not auto:
        return x
    kept = (tuple(name for name in ((axis,) if isinstance(axis, str) else axis or ()) if name in auto) for axis in axes)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))
