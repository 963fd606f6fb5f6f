"""A mixture of experts in the place of a layer's MLP (Shazeer et al. 2017), as Mixtral, Qwen3-MoE and OLMoE compute it."""

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
    """What the router of one layer did; see `types.Routing`."""

    chosen: jax.Array
    probability: jax.Array
    entropy: jax.Array


class Experts(nn.Module):
    """Each token goes through the `experts_per_token` experts that the router gives most, weighed by what it gives them.

    No token is dropped: experts take as many as come. Probabilities are those of a softmax over all experts, in float32;
    `norm_routes` makes those that are taken sum to one. Padding is routed as well: it costs, and changes nothing.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, counted: jax.Array | None) -> tuple[jax.Array, Routed | None]:
        """x[R, L, D] to the same shape, and what the router did with the tokens that `counted` bool[R, L] marks."""
        c = self.config
        # Each device keeps the whole router: its tokens may go to any expert.
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
