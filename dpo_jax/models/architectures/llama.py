"""Llama (2023), and what its successors share: RMS norms, rotary positions, a gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family, Sizes
from dpo_jax.models.fields import shown
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.rope import Rope
from dpo_jax.models.tensor_layouts import SAME, Tensor, linear, norm

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "layer_types": None,
}
LAYER = "model.layers.{}"


def _one_rope(read: Reader, head_size: int, layers: int) -> tuple[Rope, ...]:
    return (read.rope(head_size, theta="rope_theta", settings=read.rope_settings()),) * layers


def shared_fields(
    read: Reader,
    *,
    activation: str = "hidden_act",
    sliding: Sequence[bool] = (),
    ropes: Callable[[Reader, int, int], tuple[Rope, ...]] = _one_rope,
) -> dict[str, Any]:
    """Fields of Llama and its successors, without biases.

    `sliding`: which layers have a sliding window; empty for none. `ropes`: (reader, head size, layers) -> one per layer.
    """
    width, heads, layers = read.size("hidden_size"), read.size("num_attention_heads"), read.layers("num_hidden_layers")
    head_size = read.size("head_dim") if read.has("head_dim") else read.head_size(width, heads)
    window = read.size("sliding_window") if any(sliding) else None
    if ropes is _one_rope:
        _refuse_partial_ropes(read)
    return {
        "vocab_size": read.size("vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": read.size("num_key_value_heads", heads),
        "head_size": head_size,
        "mlp_width": read.size("intermediate_size"),
        "max_positions": read.size("max_position_embeddings"),
        "activation": read.activation(activation),
        "norm": "rms",
        "norm_eps": read.number("rms_norm_eps"),
        "attention_scale": head_size**-0.5,
        "tied": read.flag("tie_word_embeddings"),
        "ropes": ropes(read, head_size, layers),
        "windows": tuple(window if s else None for s in sliding) if window else (),
        "gated_mlp": True,
    }


def attention_biases(read: Reader) -> dict[str, bool]:
    """Fields of families in which one setting gives a bias to all four projections of attention."""
    bias = read.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def _refuse_partial_ropes(read: Reader) -> None:
    key = "partial_rotary_factor"
    for part in (read, read.rope_settings()):
        if part.has(key) and part.number(key) != 1.0:
            raise ValueError(f"{part.where}: {key} = {shown(part.all[key])} is not supported in a {read.family}")


def named_layers(read: Reader, layers: int) -> list[bool]:
    """Which layers have a sliding window according to `layer_types`."""
    named = read.texts("layer_types")
    if set(named) - {"full_attention", "sliding_attention"} or len(named) != layers:
        read.wrong("layer_types", f'"full_attention" or "sliding_attention" for each of {layers} layers')
    return [kind == "sliding_attention" for kind in named]


def matrices(c: DecoderConfig) -> list[Tensor]:
    """Embedding, attention, MLP and final norm; of a layer's norms only those of queries and keys."""
    table = [
        Tensor("model.embed_tokens.weight", ("token_embedding",)),
        *linear(f"{LAYER}.self_attn.q_proj", "layers/attention/query", c.qkv_bias),
        *linear(f"{LAYER}.self_attn.k_proj", "layers/attention/key", c.qkv_bias),
        *linear(f"{LAYER}.self_attn.v_proj", "layers/attention/value", c.qkv_bias),
        *linear(f"{LAYER}.self_attn.o_proj", "layers/attention/out", c.out_bias, SAME),
        *linear(f"{LAYER}.mlp.gate_proj", "layers/mlp/gate", c.mlp_bias),
        *linear(f"{LAYER}.mlp.up_proj", "layers/mlp/up", c.mlp_bias),
        *linear(f"{LAYER}.mlp.down_proj", "layers/mlp/down", c.mlp_bias, SAME),
        *norm("model.norm", "final_norm", False),
    ]
    if c.qk_norm:
        table += norm(f"{LAYER}.self_attn.q_norm", "layers/attention/query_norm", False)
        table += norm(f"{LAYER}.self_attn.k_norm", "layers/attention/key_norm", False)
    return table


def tensors(c: DecoderConfig) -> list[Tensor]:
    """The table of Llama, Mistral and Qwen."""
    return [
        *matrices(c),
        *norm(f"{LAYER}.input_layernorm", "layers/attention_norm", False),
        *norm(f"{LAYER}.post_attention_layernorm", "layers/mlp_norm", False),
    ]


def sizes(asked: Sizes) -> dict[str, Any]:
    """Sizes of Llama and its successors."""
    return {
        "hidden_size": asked.width,
        "num_hidden_layers": asked.layers,
        "num_attention_heads": asked.heads,
        "num_key_value_heads": asked.kv_heads or asked.heads,
        "head_dim": asked.head_size or asked.width // asked.heads,
        "intermediate_size": asked.mlp_width or -(-8 * asked.width // 24) * 8,
        "max_position_embeddings": asked.max_positions,
    }


LLAMA = Family(
    name="llama",
    title="Llama",
    architecture="LlamaForCausalLM",
    defaults=DEFAULTS,
    fields=lambda read: {**shared_fields(read), **attention_biases(read), "mlp_bias": read.flag("mlp_bias")},
    tensors=tensors,
    sizes=sizes,
)
