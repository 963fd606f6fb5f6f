"""Reading single settings of a Hugging Face `config.json`: defaults of each family, types, and errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.rope import Rope

_GPT = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
}
_LLAMA = {
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
_QWEN = {**_LLAMA, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    **_LLAMA,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT, "tie_word_embeddings": True, "scale_attn_weights": True},
    "gptj": {**_GPT, "tie_word_embeddings": False, "rotary_dim": 64},
    "gpt_neox": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "tie_word_embeddings": False,
    },
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": {**_GEMMA, "vocab_size": 256000, "max_position_embeddings": 8192}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072}
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
}
"""What a key means where a `config.json` leaves it out (the defaults of Hugging Face's configuration classes). A key without an
entry must be there."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Reader:
    """Typed access to a configuration with its family's defaults; every error names family, key and value."""

    def __init__(self, family: str, hf: Mapping[str, Any]):
        self.family = family
        self.given = hf
        self.all = {**DEFAULTS[family], **hf}

    def size(self, key: str, default: int | None = None) -> int:
        value = self.all.get(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.family} config: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.family} config: {key} = {value!r} is not a positive integer")
        return value

    def number(self, key: str) -> float:
        value = self.all.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.family} config: {key} = {value!r} is not a number")
        return float(value)

    def activation(self, key: str) -> str:
        name = self.all[key]
        if name not in _ACTIVATIONS:
            raise ValueError(f"{self.family} config: {key} = {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def head_size(self, width: int, heads: int) -> int:
        if width % heads:
            raise ValueError(f"{self.family} config: the width {width} is not a multiple of the {heads} attention heads")
        return width // heads

    def rope(self, size: int, *, theta: float, settings: Mapping[str, Any], interleaved: bool = False) -> Rope:
        """`settings`: the rotary dict, under whichever key and age of transformers it was written."""
        kind = settings.get("rope_type", settings.get("type")) or "default"
        if size < 2 or size % 2:
            raise ValueError(f"{self.family} config: rotary size {size} is not a positive even number")
        theta = float(settings.get("rope_theta") or theta)
        if kind == "default":
            return Rope(theta, size, interleaved)
        needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        if kind not in needed:
            raise ValueError(f"{self.family} config: rope_type = {kind!r} is not supported; supported: default, linear, llama3")
        missing = [key for key in needed[kind] if not isinstance(settings.get(key), int | float)]
        if missing:
            raise ValueError(f"{self.family} config: rope_type {kind!r} needs {', '.join(missing)}; got {dict(settings)}")
        scaling = {key: float(settings[key]) for key in needed[kind]}
        original = settings.get("original_max_position_embeddings") or self.size("max_position_embeddings")
        return Rope(theta, size, interleaved, kind, original_max_positions=original, **scaling)
