"""Numerator and denominator of MFU: necessary FLOPs of a DPO step, and the machine's matmul rate."""

from __future__ import annotations

import numpy as np

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.flops import pair_flops

PEAK_BFLOAT16 = (
    # Dense bfloat16 FLOP/s by substring of the device's name; data sheets of NVIDIA and Google. The first match counts.
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("v6", 918e12),
    ("v5p", 459e12),
    ("v5", 197e12),
    ("v4", 275e12),
)


def step_flops(config: DecoderConfig, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """FLOPs of the forward and backward pass per pair, float64[pairs], from token counts (see `pair_flops`).

    Not counted: prompts read twice, padding, a reference model, recomputation, and anything but matrix products.
    """
    lengths = zip(prompt, chosen, rejected, strict=True)
    return np.array([pair_flops(config, prompt=int(p), chosen=int(w), rejected=int(l)).training for p, w, l in lengths])


def device_peak(name: str) -> float | None:
    """bfloat16 FLOP/s of an accelerator by its data sheet; None if it is not in the table."""
    return next((peak for part, peak in PEAK_BFLOAT16 if part in name), None)


def typical_matmuls(config: DecoderConfig, *, tokens: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of the matrix products in one layer for `tokens` tokens: query, output, and the MLP."""
    c = config
    heads = c.heads * c.head_size
    return [
        (tokens, c.width, heads),
        (tokens, heads, c.width),
        (tokens, c.width, c.mlp_width),
        (tokens, c.mlp_width, c.width),
    ]
