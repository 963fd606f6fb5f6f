"""What a DPO step needs at least, in floating-point operations, and what a machine could do: the two sides of an MFU."""

from __future__ import annotations

import numpy as np

from dpo_jax.models.config import DecoderConfig

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
    """FLOPs of forward and backward pass per pair, float64[pairs], from the lengths of its parts in tokens.

    Counted is what cannot be left out: the trunk for P + C + R tokens, the head for the C + R that are scored, attention for
    the keys that a token really sees; 2 FLOPs per multiply-add, the backward pass twice the forward pass. Not counted: prompts
    read twice, padding, a reference model, recomputation, and everything that is no matrix product. Sliding windows are taken
    as full attention.
    """
    c = config
    attention = c.width * c.head_size * 2 * (c.heads + c.kv_heads)  # queries and output, keys and values
    mlp = c.width * c.mlp_width * (3 if c.gated_mlp else 2)
    p, w, l = (np.asarray(x, np.float64) for x in (prompt, chosen, rejected))
    seen = p * (p + 1) / 2 + sum(x * p + x * (x + 1) / 2 for x in (w, l))
    trunk = 2 * c.layers * (attention + mlp) * (p + w + l)
    head = 2 * c.width * c.vocab_size * (w + l)
    scores = 4 * c.layers * c.heads * c.head_size * seen  # q k^T, and the mixing of values
    return 3 * (trunk + head + scores)


def device_peak(name: str) -> float | None:
    """bfloat16 FLOP/s of an accelerator by its data sheet; None for one that is not in the table."""
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
