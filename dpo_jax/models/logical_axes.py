"""Logical axes of a decoder's parameters: their lengths, and the mesh axes that shard them. Needs no JAX."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_jax.models.config import DecoderConfig

RULES: Mapping[str, str | None] = {
    "layers": None,  # scanned one after the other
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",  # types.HEAD_AXIS
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}
"""The mesh axis of each logical axis that a parameter may name."""


def axis_lengths(config: DecoderConfig) -> dict[str, int]:
    """{logical axis: length in the parameters}; heads are counted in entries, `heads * head_size`."""
    return {
        "layers": config.layers,
        "embed": config.width,
        "vocab": config.vocab_size,
        "heads": config.heads * config.head_size,
        "kv_heads": config.kv_heads * config.head_size,
        "mlp": config.mlp_width,
        **({"experts": config.experts} if config.experts else {}),
    }


def whole_heads(config: DecoderConfig) -> dict[str, int]:
    """{logical axis: unit}: sizes that must not be split, so that no head is cut in two."""
    return dict.fromkeys(("heads", "kv_heads"), config.head_size)
