"""GPT-2 (2019): learned positions; query, key and value in one tensor."""

from __future__ import annotations

from typing import Any

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family, Sizes, without_own_heads
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.tensor_layouts import SAME, SIDE_BY_SIDE, Tensor, fused, linear, norm

SHARED_DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
}


def shared_fields(read: Reader) -> dict[str, Any]:
    """Fields of GPT-2 and GPT-J."""
    width, heads = read.size("n_embd"), read.size("n_head")
    head_size = read.head_size(width, heads)
    return {
        "vocab_size": read.size("vocab_size"),
        "width": width,
        "layers": read.layers("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": head_size,
        "mlp_width": read.size("n_inner", 4 * width),
        "max_positions": read.size("n_positions"),
        "activation": read.activation("activation_function"),
        "norm": "layer",
        "norm_eps": read.number("layer_norm_epsilon"),
        "attention_scale": head_size**-0.5,
        "tied": read.flag("tie_word_embeddings"),
        "mlp_bias": True,
    }


def shared_sizes(asked: Sizes) -> dict[str, Any]:
    """Sizes of GPT-2 and GPT-J."""
    return {
        "n_embd": asked.width,
        "n_layer": asked.layers,
        "n_head": asked.heads,
        "n_inner": asked.mlp_width,
        "n_positions": asked.max_positions,
    }


def _fields(read: Reader) -> dict[str, Any]:
    fields = shared_fields(read) | {"qkv_bias": True, "out_bias": True}
    return fields if read.flag("scale_attn_weights") else fields | {"attention_scale": 1.0}


def _tensors(c: DecoderConfig) -> list[Tensor]:
    h = "transformer.h.{}"
    return [
        Tensor("transformer.wte.weight", ("token_embedding",)),
        Tensor("transformer.wpe.weight", ("position_embedding",)),
        *norm(f"{h}.ln_1", "layers/attention_norm", True),
        *fused(f"{h}.attn.c_attn", True, SIDE_BY_SIDE),
        *linear(f"{h}.attn.c_proj", "layers/attention/out", True),
        *norm(f"{h}.ln_2", "layers/mlp_norm", True),
        *linear(f"{h}.mlp.c_fc", "layers/mlp/up", True, SAME),
        *linear(f"{h}.mlp.c_proj", "layers/mlp/down", True),
        *norm("transformer.ln_f", "final_norm", True),
    ]


def _sizes(asked: Sizes) -> dict[str, Any]:
    without_own_heads(asked, "gpt2")
    return shared_sizes(asked)


GPT2 = Family(
    name="gpt2",
    title="GPT-2",
    architecture="GPT2LMHeadModel",
    defaults={**SHARED_DEFAULTS, "tie_word_embeddings": True, "scale_attn_weights": True},
    fields=_fields,
    tensors=_tensors,
    sizes=_sizes,
    refused=("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    trunk="transformer.",
)
