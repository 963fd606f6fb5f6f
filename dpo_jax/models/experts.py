"""A mixture of experts in the place of a layer's MLP (Shazeer et al. 2017), as Mixtral, Qwen3-MoE and OLMoE compute it."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.activations import ACTIVATIONS
from dpo_jax.models.axes import as_stored
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.grouped_product import from_groups, group_rows, grouped_product, to_groups
from dpo_jax.models.products import precision_of

KERNEL = ("experts", "embed", "mlp")


class Experts(nn.Module):
    """Each token goes through the `experts_per_token` experts that the router gives most, weighed by what it gives them.

    No token is dropped: experts take as many as come. Probabilities are those of a softmax over all experts, in float32;
    `norm_routes` makes those that are taken sum to one. Padding is routed as well: it costs, and changes nothing.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        tokens = x.reshape(-1, x.shape[-1])
        shares, chosen = self._route(tokens)
        groups = group_rows(chosen.reshape(-1), c.experts)
        several = to_groups(jnp.repeat(tokens, c.experts_per_token, axis=0), groups)
        gate, up = (
            checkpoint_name(grouped_product(several, self._kernel(name, x), groups), "kernel") for name in ("gate", "up")
        )
        hidden = ACTIVATIONS[c.activation](gate) * up
        down = checkpoint_name(grouped_product(hidden, self._kernel("down", x), groups, True), "kernel")
        found = from_groups(down, groups).reshape(*shares.shape, -1)
        return (found * shares.astype(x.dtype)[:, :, None]).sum(axis=1).reshape(x.shape)

    def _route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(shares, experts) of each token: float32 and int32[T, experts_per_token]."""
        c = self.config
        router = _declared(self, "router", c.init_std, (c.width, c.experts), ("embed", "experts"))
        logits = jnp.dot(tokens, router.astype(tokens.dtype), precision=precision_of(tokens.dtype))
        shares, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), c.experts_per_token)
        return shares / shares.sum(axis=-1, keepdims=True) if c.norm_routes else shares, chosen

    def _kernel(self, name: str, x: jax.Array) -> jax.Array:
        """The kernels of all experts, [E, D, F] each: D first within an expert, as in `layers.Linear`."""
        c = self.config
        std = c.init_std / math.sqrt(2 * c.layers) if name == "down" else c.init_std
        return _declared(self, name, std, (c.experts, c.width, c.mlp_width), KERNEL).astype(x.dtype)


def _declared(module: nn.Module, name: str, std: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    value: jax.Array = module.param(name, nn.with_partitioning(nn.initializers.normal(std), axes), shape)  # pyright: ignore[reportAssignmentType]
    return value if module.is_initializing() else as_stored(value, axes)
