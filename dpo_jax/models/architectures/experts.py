"""Mixtures of experts: Mixtral (2024), OLMoE (2024) and Qwen3-MoE (2025)."""

from __future__ import annotations

from typing import Any

from dpo_jax.models.architectures import llama, qwen
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family, Sizes
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.tensor_layouts import SAME, TRANSPOSED, Layout, Tensor, norm
from dpo_jax.untrusted import LIMITS

_LIMIT = 4096  # experts of a layer


def _routing(read: Reader, usual: int) -> dict[str, Any]:
    """Number of experts, and of those per token. transformers uses two names for it; `usual`: the value if neither is there."""
    named = [name for name in ("num_local_experts", "num_experts") if read.has(name)]
    experts = named[0] if named else "num_experts"
    count, taken = read.size(experts, usual), read.size("num_experts_per_tok")
    if len(named) == 2 and read.size(named[1]) != count:
        read.wrong(named[1], f"{named[0]} = {count}, which it means as well")
    if count > _LIMIT:
        read.wrong(experts, f"a number of experts up to {_LIMIT:,}")
    if taken > count:
        read.wrong("num_experts_per_tok", f"at most {experts} = {count}")
    LIMITS.check("layers", read.size("num_hidden_layers"), read.where, what="layers")
    read.flag("output_router_logits")  # these two are read by `families.router_coefficient`
    read.number("router_aux_loss_coef", least=0.0, right="a number of at least 0")
    return {"experts": count, "experts_per_token": taken}


def _mixtral(read: Reader) -> dict[str, Any]:
    fields = llama.shared_fields(read, sliding=[read.has("sliding_window")] * read.layers("num_hidden_layers"))
    return {**fields, **_routing(read, 8), "norm_routes": True}


def _olmoe(read: Reader) -> dict[str, Any]:
    fields = {**llama.shared_fields(read), **llama.attention_biases(read), **_routing(read, 64)}
    return {**fields, "norm_routes": read.flag("norm_topk_prob"), "qk_norm": True, "qk_norm_whole": True}


def _qwen3_moe(read: Reader) -> dict[str, Any]:
    if read.size("decoder_sparse_step") != 1:
        read.refuse("decoder_sparse_step", "1, experts in every layer")
    # transformers gives every layer the window: `max_window_layers` and `layer_types` count in the dense Qwen3 only.
    sliding = read.flag("use_sliding_window") and read.has("sliding_window")
    fields = {**qwen.qwen3_fields(read, [sliding] * read.layers("num_hidden_layers")), **_routing(read, 128)}
    return {**fields, "norm_routes": read.flag("norm_topk_prob"), "mlp_width": read.size("moe_intermediate_size")}


def _tensors(c: DecoderConfig, room: str, gate: str, up: str, down: str) -> list[Tensor]:
    """`room`: prefix of router and experts in a checkpoint; `gate`, `up`, `down`: names of an expert's matrices."""

    def expert(hf: str, ours: str, layout: Layout) -> Tensor:
        return Tensor(f"{room}.experts.{{expert}}.{hf}.weight", (f"layers/mlp/{ours}",), layout, experts=c.experts)

    return [
        *(t for t in llama.matrices(c) if "/mlp/" not in t.paths[0]),
        Tensor(f"{room}.gate.weight", ("layers/mlp/router",), TRANSPOSED),
        expert(gate, "gate", TRANSPOSED),
        expert(up, "up", TRANSPOSED),
        expert(down, "down", SAME),
        *norm(f"{llama.LAYER}.input_layernorm", "layers/attention_norm", False),
        *norm(f"{llama.LAYER}.post_attention_layernorm", "layers/mlp_norm", False),
    ]


def _qwen_like(c: DecoderConfig) -> list[Tensor]:
    return _tensors(c, f"{llama.LAYER}.mlp", "gate_proj", "up_proj", "down_proj")


def _qwen3_moe_sizes(asked: Sizes) -> dict[str, Any]:
    sizes = llama.sizes(asked)
    return {**sizes, "moe_intermediate_size": sizes["intermediate_size"]}


MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    architecture="MixtralForCausalLM",
    defaults={
        **llama.DEFAULTS,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    fields=_mixtral,
    tensors=lambda c: _tensors(c, f"{llama.LAYER}.block_sparse_moe", "w1", "w3", "w2"),
    sizes=llama.sizes,
)
OLMOE = Family(
    name="olmoe",
    title="OLMoE",
    architecture="OlmoeForCausalLM",
    defaults={
        **llama.DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    fields=_olmoe,
    tensors=_qwen_like,
    sizes=llama.sizes,
    refused=("clip_qkv",),
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    architecture="Qwen3MoeForCausalLM",
    defaults={
        **qwen.QWEN3.defaults,
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.001,
        "mlp_only_layers": None,
    },
    fields=_qwen3_moe,
    tensors=_qwen_like,
    sizes=_qwen3_moe_sizes,
    refused=("mlp_only_layers",),
)
