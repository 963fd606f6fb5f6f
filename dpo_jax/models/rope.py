"""Rotary position embeddings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) of the first `size` entries of every head.

    `interleaved`: entries (0, 1), (2, 3), ... form the rotated pairs (GPT-J); otherwise `i` pairs with `i + size / 2`.
    `scaling`: "default"; "linear" divides every frequency by `factor`; "llama3" divides only those whose wavelength is long
    compared with `original_max_positions`, with a smooth transition (Llama 3.1).
    """

    theta: float
    size: int
    interleaved: bool = False
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def frequencies(self) -> np.ndarray:
        """Radians per position, float32[size / 2]."""
        frequency = self.theta ** -(np.arange(0, self.size, 2, dtype=np.float64) / self.size)
        if self.scaling == "linear":
            frequency = frequency / self.factor
        elif self.scaling == "llama3":
            turns = self.original_max_positions * frequency / (2 * math.pi)
            keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
            frequency = keep * frequency + (1 - keep) * frequency / self.factor
        elif self.scaling != "default":
            raise ValueError(f"unknown rotary scaling {self.scaling!r}: expected default, linear or llama3")
        return frequency.astype(np.float32)

    def angles(self, positions: Any) -> tuple[Any, Any]:
        """cos and sin of every angle: two float32[R, L, size / 2], always: bfloat16 cannot count positions above 256."""
        import jax.numpy as jnp  # a decoder is described, and checked, without it

        angle = jnp.asarray(positions).astype(jnp.float32)[:, :, None] * self.frequencies()[None, None, :]
        return jnp.cos(angle), jnp.sin(angle)
