"""The settings of a vision encoder in a `config.json`. Needs no JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.models.fields import Fields
from dpo_jax.models.hf_settings import Reader

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Everything that determines the encoder's arithmetic."""

    width: int  # W
    layers: int
    heads: int
    mlp_width: int
    image_size: int  # pixels per side
    patch_size: int
    activation: str  # a key of activations.ACTIVATIONS
    eps: float
    tokens: int  # T of an image, after averaging

    @property
    def side(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


def vision_settings(hf: Mapping[str, Any], where: str | Path = "config.json") -> VisionConfig:
    """The encoder's settings in the `config.json` of a `Gemma3ForConditionalGeneration`.

    Raises `Unreadable` for a missing or impossible value, ValueError for one that the encoder does not support.
    """
    whole = Fields(hf, where, defaults={"mm_tokens_per_image": 256})
    read = Reader("siglip_vision_model", whole.part("vision_config").all, f"{where}: vision_config", defaults=_DEFAULTS)
    config = VisionConfig(
        width=read.size("hidden_size"),
        layers=read.layers("num_hidden_layers"),
        heads=read.size("num_attention_heads"),
        mlp_width=read.size("intermediate_size"),
        image_size=read.size("image_size"),
        patch_size=read.size("patch_size"),
        activation=read.activation("hidden_act"),
        eps=read.number("layer_norm_eps"),
        tokens=whole.size("mm_tokens_per_image"),
    )
    if read.size("num_channels") != 3:
        read.refuse("num_channels", "3")
    if read.flag("vision_use_head"):
        read.refuse("vision_use_head", "false")
    if config.width % config.heads:
        read.wrong("num_attention_heads", f"a divisor of the width {config.width}")
    squares = math.isqrt(config.tokens)
    if squares**2 != config.tokens or not config.side or config.side % squares:
        whole.wrong("mm_tokens_per_image", f"the square of a divisor of the {config.side} patches along a side")
    return config
