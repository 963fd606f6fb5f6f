"""Activation functions of an MLP, by the names that `DecoderConfig.activation` takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def _gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function. `jax.nn.gelu` uses erfc, which takes more passes over memory on a CPU."""
    y = x.astype(jnp.float32)  # 1 + erf loses precision on the left by cancellation
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
