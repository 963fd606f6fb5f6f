"""Microbatches: splits a batch into equal parts by rows, and restores the order of its examples."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from dpo_jax.models.axes import parts_of
from dpo_jax.types import ROW_AXES, Array

Batch = TypeVar("Batch")


def split(batch: Batch, microbatches: int) -> Batch:
    """The batch in microbatches: every leaf [n, ...] as [microbatches, n / microbatches, ...]. Examples stay with their rows.

    If the rows are sharded over devices, microbatch `i` takes every `microbatches`-th row (of plain pairs: both rows), starting
    from row `i`. Each device then takes part in every microbatch with rows that it already holds. On one device a microbatch
    takes neighboring rows, so that the empty rows, which come last, fill microbatches of their own.

    >>> split(np.arange(6), 3).tolist()
    [[0, 1], [2, 3], [4, 5]]
    """
    groups = _groups(batch)
    if groups % microbatches:
        raise ValueError(f"a batch of {groups} rows cannot be split into {microbatches} microbatches of equal size")

    def parts(x: Array) -> Array:
        if parts_of(ROW_AXES) == 1:
            return x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])
        strided = x.reshape(groups // microbatches, microbatches, x.shape[0] // groups, *x.shape[1:])
        return strided.swapaxes(0, 1).reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])

    return jax.tree.map(parts, batch)


def join(values: Any, batch: Any) -> Any:
    """Values of the examples of each microbatch of `batch`, [microbatches, n / microbatches, ...], in its order: [n, ...].

    >>> join(split(np.arange(6), 3), np.arange(6)).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    groups = _groups(batch)

    def whole(x: Array) -> Array:
        count, size = x.shape[0] * x.shape[1], x.shape[2:]
        if parts_of(ROW_AXES) == 1:
            return x.reshape(count, *size)
        return x.reshape(x.shape[0], groups // x.shape[0], count // groups, *size).swapaxes(0, 1).reshape(count, *size)

    return jax.tree.map(whole, values)


def _groups(batch: Any) -> int:
    return min(x.shape[0] for x in jax.tree.leaves(batch))
