"""OLMo 2 (2024): norms after attention and MLP, none before; one norm over all query heads, and one over all key heads."""

from __future__ import annotations

from typing import Any

from dpo_jax.models.architectures import llama
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.tensor_layouts import Tensor, norm


def _fields(read: Reader) -> dict[str, Any]:
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}
    return llama.shared_fields(read) | llama.attention_biases(read) | norms


def _tensors(c: DecoderConfig) -> list[Tensor]:
    return [
        *llama.matrices(c),
        *norm(f"{llama.LAYER}.post_attention_layernorm", "layers/post_attention_norm", False),
        *norm(f"{llama.LAYER}.post_feedforward_layernorm", "layers/post_mlp_norm", False),
    ]


OLMO2 = Family(
    name="olmo2",
    title="OLMo 2",
    architecture="Olmo2ForCausalLM",
    defaults={**llama.DEFAULTS, "rms_norm_eps": 1e-5},
    fields=_fields,
    tensors=_tensors,
    sizes=llama.sizes,
)
