"""Gemma 3 with images (Kamath et al. 2025, arXiv 2503.19786): the text model, and the projector of image features.

The vision encoder is `models.siglip`; its outputs, pooled to `mm_tokens_per_image` tokens, are inputs of this decoder.
"""

from __future__ import annotations

import re
from typing import Any

from dpo_jax.models.architectures.gemma import GEMMA3_TEXT, text_part
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.tensor_layouts import Tensor
from dpo_jax.models.vision_config import vision_settings

PROJECTOR = "multi_modal_projector."
TEXT = "language_model."


def _fields(read: Reader) -> dict[str, Any]:
    text = Reader("gemma3_text", text_part(read.all, read.where), read.where, defaults=GEMMA3_TEXT.defaults)
    for key in GEMMA3_TEXT.refused:
        if text.all.get(key):
            text.refuse(key)
    fields = GEMMA3_TEXT.fields(text)
    vision = vision_settings(read.all, read.where)
    windows = [window for window in fields["windows"] if window is not None]
    if windows and min(windows) < vision.tokens:
        raise ValueError(
            f"{read.where}: the tokens of an image see each other in all layers, but a sliding window of {min(windows)} "
            f"positions is smaller than the {vision.tokens} tokens (mm_tokens_per_image) of one: not supported"
        )
    return {
        **fields,
        "init_std": text.number("initializer_range", least=0.0, right="a number of at least 0"),
        "image_width": vision.width,
        "image_tokens": vision.tokens,
        "image_norm_eps": vision.eps,
    }


def _tensors(c: DecoderConfig) -> list[Tensor]:
    text = [tensor._replace(name=TEXT + tensor.name) for tensor in GEMMA3_TEXT.tensors(c)]
    return [
        *text,
        Tensor(f"{PROJECTOR}mm_soft_emb_norm.weight", ("image_norm/scale",)),
        Tensor(f"{PROJECTOR}mm_input_projection_weight", ("image_kernel",)),  # [W, D], unlike a torch.nn.Linear
    ]


def _rename(name: str) -> str | None:
    """Names of transformers 4.52 and later mapped to those of the official checkpoints; None for the vision encoder's."""
    name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector|language_model)", "", name)
    if name.startswith("vision_tower."):
        return None
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", f"{TEXT}model.", name)
    return re.sub(r"^lm_head\.", f"{TEXT}lm_head.", name)


GEMMA3 = GEMMA3_TEXT._replace(
    name="gemma3",
    title="Gemma 3 (images)",
    architecture="Gemma3ForConditionalGeneration",
    defaults={},
    fields=_fields,
    tensors=_tensors,
    refused=(),
    trunk="",
    head=f"{TEXT}lm_head.weight",
    rename=_rename,
)
