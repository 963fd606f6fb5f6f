"""Qwen2 (2024), with biases on queries, keys and values, and Qwen3 (2025), with a norm of each query and key head."""

from __future__ import annotations

from typing import Any

from dpo_jax.models.architectures import llama
from dpo_jax.models.family import Family
from dpo_jax.models.hf_settings import Reader

_DEFAULTS = {**llama.DEFAULTS, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def _sliding(read: Reader) -> list[bool]:
    if not read.flag("use_sliding_window") or not read.has("sliding_window"):
        return []
    layers = read.layers("num_hidden_layers")
    if read.has("layer_types"):
        return llama.named_layers(read, layers)
    first = read.size("max_window_layers", 0, least=0, right="an integer of at least 0")
    return [i >= first for i in range(layers)]


def _qwen2(read: Reader) -> dict[str, Any]:
    return llama.shared_fields(read, sliding=_sliding(read)) | {"qkv_bias": True}


def qwen3_fields(read: Reader, sliding: list[bool] | None = None) -> dict[str, Any]:
    return {
        **llama.shared_fields(read, sliding=_sliding(read) if sliding is None else sliding),
        **llama.attention_biases(read),
        "qk_norm": True,
    }


QWEN2 = Family(
    name="qwen2",
    title="Qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=_DEFAULTS,
    fields=_qwen2,
    tensors=llama.tensors,
    sizes=llama.sizes,
)
QWEN3 = Family(
    name="qwen3",
    title="Qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**_DEFAULTS, "head_dim": 128},
    fields=qwen3_fields,
    tensors=llama.tensors,
    sizes=llama.sizes,
)
