"""GPT-NeoX (2022), of which Pythia is one: rotary positions in part of each head; attention and MLP side by side."""

from __future__ import annotations

from typing import Any

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family, Sizes, without_own_heads
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.tensor_layouts import SAME, Tensor, fused, linear, norm, per_head


def _fields(read: Reader) -> dict[str, Any]:
    width, heads, layers = read.size("hidden_size"), read.size("num_attention_heads"), read.layers("num_hidden_layers")
    head_size = read.head_size(width, heads)
    settings = read.rope_settings()
    part, key = (settings, "partial_rotary_factor") if settings.has("partial_rotary_factor") else (read, "rotary_pct")
    if (share := part.number(key)) > 1:
        part.wrong(key, "a number above 0 and at most 1")
    bias = read.flag("attention_bias")
    return {
        "vocab_size": read.size("vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads,
        "head_size": head_size,
        "mlp_width": read.size("intermediate_size"),
        "max_positions": read.size("max_position_embeddings"),
        "activation": read.activation("hidden_act"),
        "norm": "layer",
        "norm_eps": read.number("layer_norm_eps"),
        "attention_scale": head_size**-0.5,
        "tied": read.flag("tie_word_embeddings"),
        "ropes": (read.rope(int(head_size * share), theta="rotary_emb_base", settings=settings),) * layers,
        "parallel_residual": read.flag("use_parallel_residual"),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
    }


def _tensors(c: DecoderConfig) -> list[Tensor]:
    h = "gpt_neox.layers.{}"
    return [
        Tensor("gpt_neox.embed_in.weight", ("token_embedding",)),
        *norm(f"{h}.input_layernorm", "layers/attention_norm", True),
        *fused(f"{h}.attention.query_key_value", c.qkv_bias, per_head(c.heads)),
        *linear(f"{h}.attention.dense", "layers/attention/out", c.out_bias, SAME),
        *norm(f"{h}.post_attention_layernorm", "layers/mlp_norm", True),
        *linear(f"{h}.mlp.dense_h_to_4h", "layers/mlp/up", True),
        *linear(f"{h}.mlp.dense_4h_to_h", "layers/mlp/down", True, SAME),
        *norm("gpt_neox.final_layer_norm", "final_norm", True),
    ]


def _sizes(asked: Sizes) -> dict[str, Any]:
    without_own_heads(asked, "gpt_neox")
    return {
        "hidden_size": asked.width,
        "num_hidden_layers": asked.layers,
        "num_attention_heads": asked.heads,
        "intermediate_size": asked.mlp_width or 4 * asked.width,
        "max_position_embeddings": asked.max_positions,
    }


GPT_NEOX = Family(
    name="gpt_neox",
    title="GPT-NeoX/Pythia",
    architecture="GPTNeoXForCausalLM",
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "tie_word_embeddings": False,
    },
    fields=_fields,
    tensors=_tensors,
    sizes=_sizes,
    trunk="gpt_neox.",
    head="embed_out.weight",
)
