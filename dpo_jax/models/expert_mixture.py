"""The computation of a layer's experts, on one device or over a mesh.

A mesh shards the experts along its axis `expert`, their kernels along `fsdp` and `tensor`, and tokens by row. The devices along
`expert` gather the tokens of their rows; each computes its own experts' contributions; the sums return to the rows' devices
(reduce-scatter). No token is dropped, whichever experts are chosen, and all shapes are static. This moves
2 x (devices along `expert` - 1) x D numbers per token; an exchange of only the chosen tokens would move
2 x experts per token x D.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from dpo_jax.models.activations import ACTIVATIONS
from dpo_jax.models.axes import auto_axes, parts_of, sharding_axes
from dpo_jax.models.grouped_product import from_groups, group_rows, grouped_product, to_groups
from dpo_jax.models.logical_axes import RULES
from dpo_jax.types import TOKEN_AXES

KERNEL = ("experts", "embed", "mlp")
"""Logical axes of an expert's kernels."""
_EXPERT, _EMBED, _MLP = (RULES[axis] for axis in KERNEL)


class Kernels(NamedTuple):
    """Kernels of the experts: [E, D, F] each."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def mixture(x: jax.Array, shares: jax.Array, chosen: jax.Array, kernels: Kernels, *, activation: str) -> jax.Array:
    """The weighted sum over a token's experts, `share * down(act(gate(x)) * up(x))`: x[R, L, D] to the same shape.

    `shares` and `chosen` [R, L, taken] are the weights and indices of each token's experts.
    """
    here, sharding = auto_axes(), sharding_axes()
    if not here or x.shape[0] % parts_of(TOKEN_AXES):
        return _of_experts(x, shares, chosen, kernels, experts=len(kernels.gate), activation=activation)
    by_row = P(tuple(axis for axis in TOKEN_AXES if axis in here))
    stored = P(*(axis if axis in sharding else None for axis in (_EXPERT, _EMBED, _MLP)))
    on_device = functools.partial(_on_device, here=sharding, activation=activation)
    # Only the sum over `tensor` and the gathered rows are replicated; the test against one device would find an error in them.
    specs = (by_row, by_row, by_row, stored)  # the last one for each of the kernels
    return jax.shard_map(on_device, in_specs=specs, out_specs=by_row, check_vma=False)(x, shares, chosen, kernels)


def _on_device(
    x: jax.Array, shares: jax.Array, chosen: jax.Array, kernels: Kernels, *, here: frozenset[str], activation: str
) -> jax.Array:
    """The computation of one device: its rows, its experts, its slices of their kernels."""
    if _EMBED in here:
        # The gradient of a gathered slice is reduce-scattered into the slice.
        kernels = Kernels(*(jax.lax.all_gather(kernel, _EMBED, axis=1, tiled=True) for kernel in kernels))
    held = len(kernels.gate)
    experts = held * jax.lax.axis_size(_EXPERT) if _EXPERT in here else held
    if experts > held:
        x, shares, chosen = (jax.lax.all_gather(y, _EXPERT, axis=0, tiled=True) for y in (x, shares, chosen))
        chosen = chosen - held * jax.lax.axis_index(_EXPERT)
        chosen = jnp.where((chosen >= 0) & (chosen < held), chosen, held)  # those of other devices
    y = _of_experts(x, shares, chosen, kernels, experts=experts, activation=activation)
    y = jax.lax.psum(y, _MLP) if _MLP in here else y
    return jax.lax.psum_scatter(y, _EXPERT, scatter_dimension=0, tiled=True) if experts > held else y


def _of_experts(
    x: jax.Array, shares: jax.Array, chosen: jax.Array, kernels: Kernels, *, experts: int, activation: str
) -> jax.Array:
    """Contributions of the experts in `kernels`, which are some or all of `experts`, to the tokens that chose them."""
    taken, width = chosen.shape[-1], x.shape[-1]
    tokens = x.reshape(-1, width)
    groups = group_rows(chosen.reshape(-1, taken), len(kernels.gate), of=experts)
    several = to_groups(jnp.repeat(tokens, taken, axis=0), groups)
    gate, up = (checkpoint_name(grouped_product(several, kernel, groups), "kernel") for kernel in (kernels.gate, kernels.up))
    hidden = ACTIVATIONS[activation](gate) * up
    down = checkpoint_name(grouped_product(hidden, kernels.down, groups, True), "kernel")
    found = from_groups(down, groups).reshape(*chosen.shape, width)
    return (found * shares.astype(x.dtype)[..., None]).sum(axis=-2)
