"""Mistral (2023): Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from typing import Any

from dpo_jax.models.architectures import llama
from dpo_jax.models.family import Family
from dpo_jax.models.hf_settings import Reader


def _fields(read: Reader) -> dict[str, Any]:
    return llama.shared_fields(read, sliding=[read.has("sliding_window")] * read.layers("num_hidden_layers"))


MISTRAL = Family(
    name="mistral",
    title="Mistral",
    architecture="MistralForCausalLM",
    defaults={**llama.DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    fields=_fields,
    tensors=llama.tensors,
    sizes=llama.sizes,
)
