"""Grouped matrix products for mixtures of experts: each row is multiplied by the matrix of its group. No row is dropped.

    groups = group_rows(chosen, experts)          slots of the rows: rows of one group side by side, in whole blocks
    x = to_groups(rows, groups)                   [slots, D]
    y = grouped_product(x, kernels, groups)       [slots, F], with kernels [E, D, F]
    z = from_groups(y, groups)                    [rows, F], in the order of `chosen`

A group is padded to whole blocks of rows, so that a block uses one matrix. On TPUs the product is `jax.lax.ragged_dot`, which
has a kernel there. Elsewhere it is a loop over blocks, because XLA for CPUs and GPUs would multiply each row by every matrix.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.products import precision_of
from dpo_jax.types import Array

ROUTED_LOOP = "routed_loop"
"""Part of the name of a loop over the blocks that the router has filled; their number is not in the program."""
_COUNTED = 256  # rows that are counted together
_FEWEST_ROWS = 8
MOST_ROWS = 2048
"""Largest number of rows in a block. Long blocks read their group's matrix less often."""


class Groups(NamedTuple):
    """Placement of rows in the grouped order. A slot is a place in that order; some slots are empty."""

    row: jax.Array  # int32[slots]  the row in each slot; the number of rows where it is empty
    slot: jax.Array  # int32[rows]  the slot of each row
    sizes: jax.Array  # int32[E]  slots of each group, whole blocks
    of_block: jax.Array  # int32[blocks]  the group of each block
    used: jax.Array | None = None  # int32[]  blocks to visit, the first ones; None: all


def group_rows(chosen: Array, groups: int, *, of: int | None = None) -> Groups:
    """Slots for rows by group: `chosen[rows]` is the group of each row, 0 to `groups` - 1. Shapes alone fix how many slots.

    If these are only some of `of` groups, the value `groups` in `chosen` stands for all others. Their rows have no slot, and
    read as zeros. Each line of `chosen[tokens, taken]` names different groups, so at most `groups` of them are here.

    >>> found = group_rows(np.array([1, 0, 1]), 2)
    >>> found.slot.tolist(), found.sizes.tolist()
    ([8, 0, 9], [8, 8])
    """
    chosen, some = jnp.asarray(chosen, jnp.int32), of is not None and of > groups
    rows = chosen.size
    most = len(chosen) * min(groups, chosen.shape[1]) if some and chosen.ndim == 2 else rows
    # Merged with what follows, the change of shape takes a TPU's compiler a minute.
    chosen = jax.lax.optimization_barrier(chosen.reshape(-1))
    block = min(MOST_ROWS, max(_FEWEST_ROWS, 1 << max(rows // (4 * (of or groups)), 1).bit_length() - 1))
    blocks = -(-(most + groups * (block - 1)) // block)
    mine = chosen[None] == jnp.arange(groups, dtype=jnp.int32)[:, None]
    running = _running_counts(mine)
    sizes = -(-running[:, -1] // block) * block
    slots = jnp.where(mine, (jnp.cumsum(sizes) - sizes)[:, None] + running - 1, 0).sum(axis=0, dtype=jnp.int32)
    slot = jnp.where(chosen < groups, slots, blocks * block) if some else slots
    row = jnp.full(blocks * block, rows, jnp.int32).at[slot].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    begins = jnp.arange(blocks, dtype=jnp.int32) * block
    of_block = jnp.minimum(jnp.searchsorted(jnp.cumsum(sizes), begins, side="right"), groups - 1)
    # With all groups here, nearly every block is used, and a loop of fixed length needs no count from the device.
    return Groups(row, slot, sizes, of_block.astype(jnp.int32), sizes.sum() // block if some else None)


def _running_counts(mine: jax.Array) -> jax.Array:
    """Running counts along the rows of `mine` bool[groups, rows]: int32, of that shape.

    Computed in two steps, because a TPU's compiler takes half a minute for a sort or cumulative sum of a hundred thousand rows.
    """
    groups, rows = mine.shape
    parts = jnp.pad(mine, ((0, 0), (0, -rows % _COUNTED))).reshape(groups, -1, _COUNTED)
    inside = jnp.cumsum(parts, axis=2, dtype=jnp.int32)
    ends = inside[:, :, -1]
    before = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends
    return (inside + before[:, :, None]).reshape(groups, -1)[:, :rows]


def to_groups(x: jax.Array, groups: Groups) -> jax.Array:
    """Rows [rows, D] in their slots [slots, D]; zeros in empty ones."""
    return _permuted(x, groups.row, groups.slot)


def from_groups(y: jax.Array, groups: Groups) -> jax.Array:
    """The inverse of `to_groups`: slots [slots, D] in the order of the rows, [rows, D]."""
    return _permuted(y, groups.slot, groups.row)


@jax.custom_vjp
def _permuted(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """`x[index]`, zeros for indices out of range. Its gradient is also a permutation, not a scatter-add."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


_permuted.defvjp(
    lambda x, index, inverse: (_permuted(x, index, inverse), (index, inverse)),
    lambda kept, g: (_permuted(g, kept[1], kept[0]), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(x: jax.Array, kernels: jax.Array, groups: Groups, transposed: bool = False) -> jax.Array:
    """`x[s] @ kernels[group of s]` in each slot s: [slots, D] and [E, D, F] to [slots, F].

    `transposed`: `x[s] @ kernels[group of s].T`, [slots, F] to [slots, D].
    """
    return jax.lax.platform_dependent(
        x,
        kernels,
        groups,
        tpu=functools.partial(_ragged, transposed=transposed),
        default=functools.partial(_in_blocks, transposed=transposed),
    )


def _forward(
    x: jax.Array, kernels: jax.Array, groups: Groups, transposed: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Groups]]:
    product: Any = grouped_product(x, kernels, groups, transposed)
    return product, (x, kernels, groups)


def _backward(transposed: bool, kept: tuple[jax.Array, jax.Array, Groups], g: jax.Array) -> tuple[jax.Array, jax.Array, Groups]:
    x, kernels, groups = kept
    dx: Any = grouped_product(g, kernels, groups, not transposed)
    left, right = (g, x) if transposed else (x, g)
    dw = jax.lax.platform_dependent(left, right, kernels, groups, tpu=_ragged_outer, default=_outer_in_blocks)
    return dx, dw, jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), groups)


grouped_product.defvjp(_forward, _backward)


def _in_blocks(x: jax.Array, kernels: jax.Array, groups: Groups, *, transposed: bool) -> jax.Array:
    def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, group = block
        kernel = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        return jnp.dot(rows, kernel.T if transposed else kernel, precision=precision_of(x.dtype))

    def put(number: jax.Array, found: jax.Array) -> jax.Array:
        return found.at[number].set(one((parts[number], groups.of_block[number])))

    blocks = len(groups.of_block)
    parts = x.reshape(blocks, -1, x.shape[-1])
    if groups.used is None:
        return jax.lax.map(one, (parts, groups.of_block)).reshape(len(x), -1)
    none = jnp.zeros((*parts.shape[:2], kernels.shape[1 if transposed else 2]), x.dtype)
    with jax.named_scope(ROUTED_LOOP):
        return jax.lax.fori_loop(0, groups.used, put, none).reshape(len(x), -1)


def _outer_in_blocks(left: jax.Array, right: jax.Array, kernels: jax.Array, groups: Groups) -> jax.Array:
    """Gradient of the kernels: the sum of `left[s]^T right[s]` over the slots of each group."""
    blocks = len(groups.of_block)

    def add(total: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        a, b, group = block
        product = jnp.dot(a.T, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)
        return total.at[group].add(product), None

    a, b, of = left.reshape(blocks, -1, left.shape[-1]), right.reshape(blocks, -1, right.shape[-1]), groups.of_block
    none = jnp.zeros(kernels.shape, jnp.float32)
    if groups.used is None:
        return jax.lax.scan(add, none, (a, b, of))[0].astype(kernels.dtype)
    with jax.named_scope(ROUTED_LOOP):
        total = jax.lax.fori_loop(0, groups.used, lambda i, total: add(total, (a[i], b[i], of[i]))[0], none)
    return total.astype(kernels.dtype)


def _ragged(x: jax.Array, kernels: jax.Array, groups: Groups, *, transposed: bool) -> jax.Array:
    kernels = kernels.swapaxes(1, 2) if transposed else kernels
    return jax.lax.ragged_dot(x, kernels, groups.sizes, precision=precision_of(x.dtype))


def _ragged_outer(left: jax.Array, right: jax.Array, kernels: jax.Array, groups: Groups) -> jax.Array:
    product = functools.partial(_ragged, left, groups=groups, transposed=False)
    return jax.linear_transpose(product, kernels)(right)[0]
