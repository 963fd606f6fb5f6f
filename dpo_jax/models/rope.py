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
    `scaling`: "default"; "none" rotates nothing (a layer without positions); "linear" divides every frequency by `factor`;
    "llama3" divides only those whose wavelength is long compared with `original_max_positions`, with a smooth transition (Llama
    3.1). `Yarn` and `LongRope` are further scalings, with their own settings.
    """

    theta: float
    size: int
    interleaved: bool = False
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    @property
    def amplitude(self) -> float:
        """Factor on cosine and sine."""
        return 1.0

    def frequencies(self) -> np.ndarray:
        """Radians per position, float32[size / 2]."""
        return self._scaled(self.theta ** -(np.arange(0, self.size, 2, dtype=np.float64) / self.size)).astype(np.float32)

    def _scaled(self, frequency: np.ndarray) -> np.ndarray:
        if self.scaling == "none":
            frequency = np.zeros_like(frequency)
        elif self.scaling == "linear":
            frequency = frequency / self.factor
        elif self.scaling == "llama3":
            turns = self.original_max_positions * frequency / (2 * math.pi)
            keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
            frequency = keep * frequency + (1 - keep) * frequency / self.factor
        elif self.scaling != "default":
            raise ValueError(f"unknown rotary scaling {self.scaling!r}: expected default, none, linear or llama3")
        return frequency

    def angles(self, positions: Any) -> tuple[Any, Any]:
        """cos and sin of all angles: two float32[R, L, size / 2]. Not bfloat16, which cannot count positions above 256."""
        import jax.numpy as jnp  # imported here: describing and checking a decoder need no JAX

        angle = jnp.asarray(positions).astype(jnp.float32)[:, :, None] * self.frequencies()[None, None, :]
        return jnp.cos(angle) * self.amplitude, jnp.sin(angle) * self.amplitude


@dataclasses.dataclass(frozen=True)
class Yarn(Rope):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): high frequencies stay, low ones are divided by `factor`, with a ramp between.

    The ramp is over the index of a frequency, from the one that turns `beta_fast` times within `original_max_positions` to the
    one that turns `beta_slow` times; with `truncate` both are rounded outwards. `attention_factor` multiplies cosine and sine.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def _scaled(self, frequency: np.ndarray) -> np.ndarray:
        first, last = self._number(self.beta_fast), self._number(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.size - 1)
        ramp = np.clip((np.arange(self.size // 2) - first) / max(last - first, 0.001), 0.0, 1.0)
        return frequency * (1 - ramp) + frequency / self.factor * ramp

    def _number(self, turns: float) -> float:
        """The fractional index of the frequency that turns so often within `original_max_positions`."""
        return self.size * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


@dataclasses.dataclass(frozen=True)
class LongRope(Rope):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753) for texts of at most `original_max_positions` tokens.

    Each frequency has its own divisor, and `attention_factor` multiplies cosine and sine. The divisors for longer texts are not
    implemented: families with these positions read no longer texts.
    """

    divisors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def _scaled(self, frequency: np.ndarray) -> np.ndarray:
        return frequency / np.array(self.divisors)
