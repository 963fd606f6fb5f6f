"""Gemma 2 (2024) and Gemma 3 (2025): norms before and after attention and MLP, scaled embeddings, windows in most layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.models.architectures import llama
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family, Sizes
from dpo_jax.models.fields import Fields
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.rope import Rope
from dpo_jax.models.tensor_layouts import Tensor, norm

_DEFAULTS = {
    **llama.DEFAULTS,
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


def _fields(read: Reader, sliding: list[bool], **options: Any) -> dict[str, Any]:
    fields = llama.shared_fields(read, activation="hidden_activation", sliding=sliding, **options)
    return {
        **fields,
        **llama.attention_biases(read),
        "norm": "rms_plus_one",
        "attention_scale": read.number("query_pre_attn_scalar") ** -0.5,
        "post_norms": True,
        "embedding_scale": fields["width"] ** 0.5,
        "attention_softcap": read.optional_number("attn_logit_softcapping"),
        "logit_softcap": read.optional_number("final_logit_softcapping"),
    }


def _sliding(read: Reader, every: int | None) -> list[bool]:
    """Which layers have a sliding window: all but one in `every`, by default as in `sliding_window_pattern`."""
    layers = read.layers("num_hidden_layers")
    if not read.has("sliding_window"):
        return [False] * layers
    if read.has("layer_types"):
        return llama.named_layers(read, layers)
    every = every or read.size("sliding_window_pattern")
    return [(i + 1) % every != 0 for i in range(layers)]


def _gemma2(read: Reader) -> dict[str, Any]:
    return _fields(read, _sliding(read, every=2))


def _gemma3(read: Reader) -> dict[str, Any]:
    sliding = _sliding(read, every=None)

    def ropes(read: Reader, head_size: int, layers: int) -> tuple[Rope, ...]:
        # Only full-attention layers are scaled; transformers 5 nests one object per kind of layer.
        settings = read.rope_settings()
        nested = settings.has("full_attention") or settings.has("sliding_attention")
        wide, narrow = (settings.part(kind) if nested else None for kind in ("full_attention", "sliding_attention"))
        full = read.rope(head_size, theta="rope_theta", settings=wide or settings)
        local = read.rope(head_size, theta="rope_local_base_freq", settings=narrow or Fields({}, read.where))
        return tuple(local if s else full for s in sliding)

    return _fields(read, sliding, ropes=ropes) | {"qk_norm": True}


def text_part(hf: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The language model's configuration inside that of a multimodal Gemma 3."""
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        Fields(hf, where).wrong("text_config", "an object with the language model's settings")
    inherited = {key: hf[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings") if key in hf}
    return {**inherited, **text, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def _tensors(c: DecoderConfig) -> list[Tensor]:
    return [
        *llama.matrices(c),
        *norm(f"{llama.LAYER}.input_layernorm", "layers/attention_norm", False),
        # "post_attention" is the norm of attention's output; in Llama the same name is the norm before the MLP.
        *norm(f"{llama.LAYER}.post_attention_layernorm", "layers/post_attention_norm", False),
        *norm(f"{llama.LAYER}.pre_feedforward_layernorm", "layers/mlp_norm", False),
        *norm(f"{llama.LAYER}.post_feedforward_layernorm", "layers/post_mlp_norm", False),
    ]


_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def _rename(name: str) -> str | None:
    """Names in a multimodal checkpoint; None for those of its image part."""
    if name.startswith(_OTHER_PARTS):
        return None
    name = re.sub(r"^(language_model\.model\.|model\.language_model\.)", "model.", name)
    return re.sub(r"^language_model\.lm_head\.", "lm_head.", name)


def _sizes(asked: Sizes, *, window: int) -> dict[str, Any]:
    sizes = llama.sizes(asked)
    return sizes | {"query_pre_attn_scalar": sizes["head_dim"], "sliding_window": window}


GEMMA2 = Family(
    name="gemma2",
    title="Gemma 2",
    architecture="Gemma2ForCausalLM",
    defaults={**_DEFAULTS, "vocab_size": 256000, "max_position_embeddings": 8192}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    fields=_gemma2,
    tensors=_tensors,
    sizes=lambda asked: _sizes(asked, window=4096),
    refused=("use_bidirectional_attention",),
)
GEMMA3_TEXT = Family(
    name="gemma3_text",
    title="Gemma 3 (text)",
    architecture="Gemma3ForCausalLM",
    defaults={**_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    fields=_gemma3,
    tensors=_tensors,
    sizes=lambda asked: _sizes(asked, window=1024),
    refused=("use_bidirectional_attention", "attn_logit_softcapping"),
    rename=_rename,
)
