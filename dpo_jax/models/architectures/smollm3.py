"""SmolLM3 (2025): Llama in which every fourth layer, or each named one, has no positions."""

from __future__ import annotations

import dataclasses
from typing import Any

from dpo_jax.models.architectures import llama
from dpo_jax.models.family import Family
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.rope import Rope


def _fields(read: Reader) -> dict[str, Any]:
    fields = llama.shared_fields(read, sliding=_sliding(read), ropes=_ropes)
    return {**fields, **llama.attention_biases(read), "mlp_bias": read.flag("mlp_bias")}


def _with_positions(read: Reader, layers: int) -> list[bool]:
    if not read.has("no_rope_layers"):
        every = read.size("no_rope_layer_interval")
        return [(i + 1) % every != 0 for i in range(layers)]
    named = read.all["no_rope_layers"]
    if not isinstance(named, list) or len(named) < layers or any(type(one) is not int or one not in (0, 1) for one in named):
        read.wrong("no_rope_layers", f"an array of 1 (with positions) or 0 for each of {layers} layers")
    return [one == 1 for one in named[:layers]]


def _ropes(read: Reader, head_size: int, layers: int) -> tuple[Rope, ...]:
    rope = read.rope(head_size, theta="rope_theta", settings=read.rope_settings())
    still = dataclasses.replace(rope, scaling="none") if type(rope) is Rope else Rope(rope.theta, rope.size, scaling="none")
    return tuple(rope if turns else still for turns in _with_positions(read, layers))


def _sliding(read: Reader) -> list[bool]:
    """If `layer_types` does not say, only layers without positions have windows."""
    layers = read.layers("num_hidden_layers")
    if read.has("layer_types"):
        return llama.named_layers(read, layers)
    if not read.flag("use_sliding_window") or not read.has("sliding_window"):
        return []
    return [not turns for turns in _with_positions(read, layers)]


SMOLLM3 = Family(
    name="smollm3",
    title="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    defaults={
        **llama.DEFAULTS,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    fields=_fields,
    tensors=llama.tensors,
    sizes=llama.sizes,
)
