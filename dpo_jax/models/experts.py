"""A mixture of experts in place of a layer's MLP (Shazeer et al. 2017), as in Mixtral, Qwen3-MoE and OLMoE."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.axes import as_stored
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.expert_mixture import KERNEL, Kernels, mixture
from dpo_jax.models.products import precision_of

Axes = tuple[str | None, ...]


class Routed(NamedTuple):
    """Router decisions of one layer; see `types.Routing`."""

    chosen: jax.Array
    probability: jax.Array
    entropy: jax.Array


class Experts(nn.Module):
    """Each token goes through its `experts_per_token` most probable experts, weighted by the router's probabilities.

    No token is dropped: experts have no capacity limit. Probabilities come from a softmax over all experts, in float32;
    `norm_routes` normalizes those of the chosen experts to sum to one. Padding is routed as well, which costs time but changes
    nothing.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, counted: jax.Array | None) -> tuple[jax.Array, Routed | None]:
        """x[R, L, D] to the same shape, and the router's decisions for the tokens marked by `counted` bool[R, L]."""
        c = self.config
        # Each device holds the whole router: its tokens may go to any expert.
        router = _declared(self, "router", c.init_std, (c.width, c.experts), ("embed", None)).astype(x.dtype)
        logits = jnp.dot(x.reshape(-1, c.width), router, precision=precision_of(x.dtype)).reshape(*x.shape[:2], -1)
        log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
        probabilities = jnp.exp(log_probabilities)
        shares, chosen = jax.lax.top_k(probabilities, c.experts_per_token)
        shares = shares / shares.sum(axis=-1, keepdims=True) if c.norm_routes else shares
        kernels = Kernels(*(self._kernel(name).astype(x.dtype) for name in Kernels._fields))
        mixed = mixture(x, shares, chosen, kernels, activation=c.activation)
        return mixed, None if counted is None else _routed(log_probabilities, probabilities, chosen, counted)

    def _kernel(self, name: str) -> jax.Array:
        """The kernels of all experts, [E, D, F] each: D first within an expert, as in `layers.Linear`."""
        c = self.config
        std = c.init_std / math.sqrt(2 * c.layers) if name == "down" else c.init_std
        return _declared(self, name, std, (c.experts, c.width, c.mlp_width), KERNEL)


def _routed(logs: jax.Array, probabilities: jax.Array, chosen: jax.Array, counted: jax.Array) -> Routed:
    entropy = -(logs * probabilities).sum(axis=-1)
    weight = counted.astype(jnp.float32)
    return Routed(chosen, (probabilities * weight[:, :, None]).sum(axis=1), (entropy * weight).sum(axis=1))


def _declared(module: nn.Module, name: str, std: float, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    value: jax.Array = module.param(name, nn.with_partitioning(nn.initializers.normal(std), axes), shape)  # pyright: ignore[reportAssignmentType]
    return value if module.is_initializing() else as_stored(value, axes)
