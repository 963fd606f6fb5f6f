"""A small diffusion transformer (DiT, Peebles and Xie 2022, arXiv 2212.09748) in Flax, as a denoiser of `diffusion.step`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.schedule import Schedule
from dpo_jax.diffusion.step import Denoiser
from dpo_jax.types import Variables


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """Sizes of a network for square images of one channel, `size` x `size`. Label `classes` is the null label of guidance."""

    size: int = 8
    patch: int = 2
    classes: int = 10
    width: int = 64
    layers: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise ValueError(f"patch={self.patch} must divide the image's size {self.size}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of twice the heads, {2 * self.heads}")

    @property
    def null(self) -> int:
        return self.classes


def make_dit(config: DitConfig, schedule: Schedule) -> tuple[Callable[[jax.Array], Variables], Denoiser]:
    """`init(key) -> variables` and `predict(variables, x_t[B, size, size], t, label) -> noise[B, size, size]`.

    The network's output v is the velocity (Salimans and Ho 2022, arXiv 2202.00512): `noise = signal[t] v + noise[t] x_t`. At
    initialization v is 0, so the error is small where the image is almost all noise.
    """
    network = _Dit(config)

    def init(key: jax.Array) -> Variables:
        x = jnp.zeros((1, config.size, config.size))
        return network.init(key, x, jnp.zeros(1), jnp.zeros(1, jnp.int32))

    def predict(variables: Variables, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        signal, noise = (jnp.asarray(table, x.dtype)[t][:, None, None] for table in (schedule.signal, schedule.noise))
        # Time enters as the log signal-to-noise ratio, so the network does not depend on the number of steps.
        level = jnp.asarray(np.log(schedule.signal / schedule.noise), x.dtype)[t]
        with jax.default_matmul_precision("highest"):  # the loss is a small difference of two errors
            velocity: Any = network.apply(variables, x, level, label)
        return signal * velocity + noise * x

    return init, predict


class _Dit(nn.Module):
    config: DitConfig

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array, label: jax.Array) -> jax.Array:
        c = self.config
        side = c.size // c.patch
        # [B, side, patch, side, patch] -> [B, side^2, patch^2]
        patches = x.reshape(-1, side, c.patch, side, c.patch).swapaxes(2, 3).reshape(-1, side**2, c.patch**2)
        place = self.param("place", nn.initializers.normal(0.02), (1, side**2, c.width))
        hidden = nn.Dense(c.width, name="patch")(patches) + place
        condition = nn.Dense(c.width, name="time")(_waves(level, c.width)) + nn.Embed(c.classes + 1, c.width, name="label")(
            label
        )
        condition = nn.silu(condition)
        for number in range(c.layers):
            hidden = _Block(c, name=f"block_{number}")(hidden, condition)
        shift, scale = _modulation(condition, 2, c.width, name="last_modulation")
        hidden = _modulated(nn.LayerNorm(use_bias=False, use_scale=False)(hidden), shift, scale)
        found = nn.Dense(c.patch**2, kernel_init=nn.initializers.zeros, name="last")(hidden)
        return found.reshape(-1, side, side, c.patch, c.patch).swapaxes(2, 3).reshape(x.shape)


class _Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero): the identity at initialization."""

    config: DitConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, condition: jax.Array) -> jax.Array:
        c = self.config
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(condition, 6, c.width, name="modulation")
        read = _modulated(nn.LayerNorm(use_bias=False, use_scale=False)(hidden), shift, scale)
        q, k, v = jnp.split(nn.Dense(3 * c.width, name="qkv")(read), 3, axis=-1)
        q, k, v = (part.reshape(*part.shape[:2], c.heads, -1) for part in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(hidden.shape)
        hidden = hidden + gate * nn.Dense(c.width, name="out")(mixed)
        read = _modulated(nn.LayerNorm(use_bias=False, use_scale=False)(hidden), shift_mlp, scale_mlp)
        return hidden + gate_mlp * nn.Dense(c.width, name="down")(nn.gelu(nn.Dense(4 * c.width, name="up")(read)))


def _modulation(condition: jax.Array, parts: int, width: int, *, name: str) -> list[jax.Array]:
    """`parts` arrays [B, 1, width] from the condition [B, width]; all 0 at initialization."""
    found = nn.Dense(parts * width, kernel_init=nn.initializers.zeros, name=name)(condition)
    return jnp.split(found[:, None], parts, axis=-1)


def _modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale) + shift


def _waves(level: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of the log signal-to-noise ratio: [B, width]."""
    half = width // 2
    angles = level[:, None] * jnp.asarray(np.exp(np.linspace(math.log(0.25), math.log(8.0), half)), level.dtype)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
