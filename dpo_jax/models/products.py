"""Matrix products and lookups at the precision of their dtype and at full accelerator speed, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """The `precision` argument for a product of this type. By default GPUs multiply float32 in TF32, TPUs in bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def float32_product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum` of two arrays of one type, with an unrounded result: float32 (float64 for float64).

    For bfloat16 arrays all three products, forward and backward, have bfloat16 operands, because the gradient of the result is
    rounded first. Otherwise it would be float32, and so would both products of the backward pass, at half of a tensor core's
    rate or less.
    """
    if jnp.finfo(a.dtype).bits < 32:
        return _of_few_bits(subscripts, a, b)
    return jnp.einsum(subscripts, a, b, precision=precision_of(a.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_few_bits(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _forward(subscripts: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    return _of_few_bits(subscripts, a, b), (a, b)


def _backward(subscripts: str, factors: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    gradient = jax.vjp(functools.partial(jnp.einsum, subscripts), *factors)[1]
    return gradient(cotangent.astype(factors[0].dtype))


_of_few_bits.defvjp(_forward, _backward)


def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]` of [V, D], NaN outside, with a gradient that is summed in float32.

    The gradient of `jnp.take` is summed in the type of the table: in bfloat16 a sum of ones ends at 256.
    """
    return jnp.take(table, index, axis=0) if jnp.finfo(table.dtype).bits >= 32 else _take_few_bits(table, index)


@jax.custom_vjp
def _take_few_bits(table: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(table, index, axis=0)


def _take_forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
    # Columns of no width tell the size and type of the table, which may be gathered from devices and need not be kept.
    return jnp.take(table, index, axis=0), (table[:, :0], index)


def _sum_rows(inputs: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    like, index = inputs
    total = jnp.zeros((len(like), cotangent.shape[-1]), jnp.float32).at[index].add(cotangent.astype(jnp.float32))
    return total.astype(like.dtype), None


_take_few_bits.defvjp(_take_forward, _sum_rows)
