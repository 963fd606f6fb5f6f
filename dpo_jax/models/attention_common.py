"""Helpers of the fused attention kernels: sliding windows as key intervals, and one call per device of a mesh.

A kernel takes one contiguous range of keys for every query. A sliding window counts positions. This matters only in the
reversed layout (`dpo_jax.data.layout`): if the window of a chosen token reaches into the prompt, it covers the prompt's *end*,
while the completion lies before the prompt's beginning. The visible keys are then two ranges:

    row           c_2  c_1  c_0 | p_0  p_1  p_2  p_3 | r_0 ...       window of c_1, 4 positions: c_1, c_0, p_3, p_2
    second copy   c_2  c_1  c_0 | p_3  p_2  p_1  p_0 | r_0 ...       the same keys, in one piece

The keys are therefore passed twice, the second time with every such prompt reversed, and chosen tokens read the second copy. No
score is computed twice, linear layers still run once, and a model whose windows hide nothing has only one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpo_jax.types import HEAD_AXIS, TOKEN_AXES, Array


class KeySpans(NamedTuple):
    """Key ranges with windows applied, for each of the W distinct windows of a model (W = 1 if they hide nothing)."""

    k_start: jax.Array  # int32[W, R, L]
    k_end: jax.Array  # int32[W, R, L]  above k_start: no softmax is empty
    second: jax.Array | None  # int32[R, L]  the key at each column of the second copy; None: there is no second copy


def key_spans(k_start: Array, k_end: Array, windows: Sequence[int | None]) -> KeySpans:
    """The ranges of `types.Rows` (int32[R, L] each) under each of `windows`, in positions; None is full attention.

    Two properties of `types.Rows` and `dpo_jax.data.layout` are assumed. Positions are below L, so that a window of L or more
    hides nothing. Neighbors in the row are neighbors in the text, either forwards or backwards; they run backwards where a
    query sees keys on its right, and the next one only its own.
    """
    length = k_start.shape[1]
    windows = [None if w is None or w >= length else w for w in windows]
    x = jnp.arange(length, dtype=jnp.int32)[None]
    start = jnp.minimum(jnp.asarray(k_start), length - 1)
    end = jnp.maximum(jnp.asarray(k_end), start + 1)
    if not any(windows):
        return KeySpans(start[None], end[None], None)
    # Image tokens also see keys on their right, but then their right neighbor sees the same keys.
    own = jnp.concatenate([start[:, 1:], jnp.full_like(start[:, :1], length)], axis=1) > x
    chosen = (end > x + 1) & (start == x) & own
    prompt_end = jax.lax.cummax(jnp.where(chosen, end, 0), axis=1)  # of the last chosen completion so far
    in_prompt = ~chosen & (x < prompt_end)
    second = jnp.where(in_prompt, start + prompt_end - 1 - x, x)

    def under(window: int | None) -> tuple[jax.Array, jax.Array]:
        if window is None:
            return start, end
        return (
            jnp.where(chosen, length + x, jnp.maximum(start, x - window + 1)),
            jnp.where(chosen, length + jnp.minimum(end, x + window), end),
        )

    starts, ends = zip(*(under(window) for window in windows), strict=True)
    return KeySpans(jnp.stack(starts), jnp.stack(ends), second)


def keys_twice(x: jax.Array, second: jax.Array | None) -> jax.Array:
    """Keys or values [R, L, K, H] followed by their second copy, if there is one: [R, 2L, K, H]."""
    return x if second is None else jnp.concatenate([x, _reordered(x, second)], axis=1)


@jax.custom_vjp
def _reordered(x: jax.Array, second: jax.Array) -> jax.Array:
    """Keys or values in the order `second`, which is its own inverse: it turns prompts around. So the gradient is a lookup as
    well; that of `take_along_axis` is a scatter-add, which is slow and, on GPUs, sums in another order each time."""
    return jnp.take_along_axis(x, second[:, :, None, None], axis=1)


_reordered.defvjp(
    lambda x, second: (_reordered(x, second), second),
    lambda second, g: (_reordered(g, second), None),
)


def of_window(stacked: Any, number: jax.Array | None) -> Any:
    """Entry `number` of arrays stacked by window; the only entry, if there is one window."""
    one = all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(stacked))
    return jax.tree.map(lambda leaf: leaf[0 if one or number is None else number], stacked)


def on_each_device(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`kernel(q, k, v, by_row) -> [R, L, N, H]` run on each device's rows and heads, if there is a mesh.

    The compiler partitions ordinary operations by itself, but cannot look into a kernel. `by_row` is a tree of arrays [R, ...].
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in TOKEN_AXES if axis in mesh.auto_axes)
    heads = HEAD_AXIS if HEAD_AXIS in mesh.auto_axes else None
    if not rows and heads is None:
        return kernel
    of_heads, of_rows = P(rows or None, None, heads), P(rows or None)
    # check_vma only checks replication over an axis by collectives, and there is none here.
    return jax.shard_map(kernel, in_specs=(of_heads, of_heads, of_heads, of_rows), out_specs=of_heads, check_vma=False)
