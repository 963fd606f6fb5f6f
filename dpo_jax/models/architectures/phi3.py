"""Phi-3 (2024) and Phi-4 (2025): Llama with query, key and value in one checkpoint tensor, and gate and up in another."""

from __future__ import annotations

from typing import Any

from dpo_jax.models.architectures import llama
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family, Sizes
from dpo_jax.models.fields import Fields
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.rope import LongRope, Rope
from dpo_jax.models.tensor_layouts import SAME, Tensor, linear, norm, stacked


def _fields(read: Reader) -> dict[str, Any]:
    fields = llama.shared_fields(read, sliding=[read.has("sliding_window")] * read.layers("num_hidden_layers"), ropes=_ropes)
    # Longer texts use other positions, which the decoder does not support: see `LongRope`.
    longest = [rope.original_max_positions for rope in fields["ropes"][:1] if isinstance(rope, LongRope)]
    fields["max_positions"] = min([fields["max_positions"], *longest])
    if fields["windows"] and fields["windows"][0] >= fields["max_positions"]:  # no text is as long
        fields["windows"] = ()
    return fields


def _ropes(read: Reader, head_size: int, layers: int) -> tuple[Rope, ...]:
    """Positions in part of each head, if `partial_rotary_factor` says so (Phi-4-mini: three quarters)."""
    settings, key = read.rope_settings(), "partial_rotary_factor"
    for name in ("rope_type", "type"):  # the first folders said su or yarn
        if settings.all.get(name) in ("su", "yarn"):
            settings = Fields({**settings.all, name: "longrope"}, settings.where)
    part = settings if settings.has(key) else read
    if (share := part.number(key)) > 1:
        part.wrong(key, "a number above 0 and at most 1")
    return (read.rope(int(head_size * share), theta="rope_theta", settings=settings),) * layers


def _tensors(c: DecoderConfig) -> list[Tensor]:
    h, d = llama.LAYER, c.head_size
    query, key, value = (f"layers/attention/{part}/kernel" for part in ("query", "key", "value"))
    return [
        Tensor("model.embed_tokens.weight", ("token_embedding",)),
        Tensor(f"{h}.self_attn.qkv_proj.weight", (query, key, value), stacked(c.heads * d, c.kv_heads * d, c.kv_heads * d)),
        *linear(f"{h}.self_attn.o_proj", "layers/attention/out", False, SAME),
        Tensor(
            f"{h}.mlp.gate_up_proj.weight",
            ("layers/mlp/gate/kernel", "layers/mlp/up/kernel"),
            stacked(c.mlp_width, c.mlp_width),
        ),
        *linear(f"{h}.mlp.down_proj", "layers/mlp/down", False, SAME),
        *norm("model.norm", "final_norm", False),
        *norm(f"{h}.input_layernorm", "layers/attention_norm", False),
        *norm(f"{h}.post_attention_layernorm", "layers/mlp_norm", False),
    ]


def _sizes(asked: Sizes) -> dict[str, Any]:
    return {**llama.sizes(asked), "original_max_position_embeddings": asked.max_positions}


PHI3 = Family(
    name="phi3",
    title="Phi-3/4",
    architecture="Phi3ForCausalLM",
    defaults={
        **llama.DEFAULTS,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
    fields=_fields,
    tensors=_tensors,
    sizes=_sizes,
)
