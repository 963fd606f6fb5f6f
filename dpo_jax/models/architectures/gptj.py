"""GPT-J (2021): interleaved rotary positions; parallel attention and MLP, on the same normed input."""

from __future__ import annotations

from typing import Any

from dpo_jax.models.architectures.gpt2 import SHARED_DEFAULTS, shared_fields, shared_sizes
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family, Sizes, without_own_heads
from dpo_jax.models.fields import Fields
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.tensor_layouts import SAME, Tensor, linear, norm


def _fields(read: Reader) -> dict[str, Any]:
    fields = shared_fields(read)
    rotary = read.size("rotary_dim")
    if rotary > fields["head_size"]:
        read.wrong("rotary_dim", f"at most the size of a head, {fields['head_size']}")
    rope = read.rope(rotary, theta=10000.0, settings=Fields({}, read.where), interleaved=True)
    return fields | {
        "ropes": (rope,) * fields["layers"],
        "parallel_residual": True,
        "shared_norm": True,
        "head_bias": True,
    }


def _tensors(c: DecoderConfig) -> list[Tensor]:
    h = "transformer.h.{}"
    return [
        Tensor("transformer.wte.weight", ("token_embedding",)),
        *norm(f"{h}.ln_1", "layers/attention_norm", True),
        *linear(f"{h}.attn.q_proj", "layers/attention/query", False),
        *linear(f"{h}.attn.k_proj", "layers/attention/key", False),
        *linear(f"{h}.attn.v_proj", "layers/attention/value", False),
        *linear(f"{h}.attn.out_proj", "layers/attention/out", False, SAME),
        *linear(f"{h}.mlp.fc_in", "layers/mlp/up", True),
        *linear(f"{h}.mlp.fc_out", "layers/mlp/down", True, SAME),
        *norm("transformer.ln_f", "final_norm", True),
        *([Tensor("lm_head.bias", ("head_bias",))] if c.head_bias else []),
    ]


def _sizes(asked: Sizes) -> dict[str, Any]:
    without_own_heads(asked, "gptj")
    return shared_sizes(asked) | {"rotary_dim": min(64, asked.width // asked.heads)}


GPTJ = Family(
    name="gptj",
    title="GPT-J",
    architecture="GPTJForCausalLM",
    defaults={**SHARED_DEFAULTS, "tie_word_embeddings": False, "rotary_dim": 64},
    fields=_fields,
    tensors=_tensors,
    sizes=_sizes,
    trunk="transformer.",
)
