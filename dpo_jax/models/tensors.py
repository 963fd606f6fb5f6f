"""Where every tensor of a Hugging Face checkpoint lives among our parameters, and in which orientation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.models.config import DecoderConfig

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How one checkpoint tensor relates to our arrays of one layer. `to_hf` undoes `to_ours` exactly; nothing is computed."""

    to_ours: Callable[[np.ndarray], Sequence[np.ndarray]]
    to_hf: Callable[[Sequence[np.ndarray]], np.ndarray]
    hf_shape: Callable[[Sequence[Shape]], Shape]  # of the tensor, from the shapes of our arrays


SAME = Layout(lambda a: [a], lambda ours: ours[0], lambda shapes: shapes[0])
# torch.nn.Linear keeps [out, in], and GPT-2 [in, out]. Our kernels have D first: [in, out] those that read from the residual
# stream, [out, in] those that write to it.
TRANSPOSED = Layout(lambda a: [a.T], lambda ours: ours[0].T, lambda shapes: shapes[0][::-1])
# GPT-2 keeps query, key and value side by side on the last axis.
SIDE_BY_SIDE = Layout(
    lambda a: np.split(a, 3, axis=-1),
    lambda ours: np.concatenate(ours, axis=-1),
    lambda shapes: (*shapes[0][:-1], 3 * shapes[0][-1]),
)


def per_head(heads: int) -> Layout:
    """GPT-NeoX: query, key and value of head 0, then of head 1, ... on the output axis, `[N * 3 * H, D]` or `[N * 3 * H]`."""

    def to_ours(a: np.ndarray) -> list[np.ndarray]:
        split = a.reshape(heads, 3, -1, *a.shape[1:])
        return [split[:, i].reshape(-1, *a.shape[1:]).T for i in range(3)]

    def to_hf(ours: Sequence[np.ndarray]) -> np.ndarray:
        parts = [a.T.reshape(heads, -1, *a.T.shape[1:]) for a in ours]
        stacked = np.stack(parts, axis=1)
        return stacked.reshape(-1, *stacked.shape[3:])

    return Layout(to_ours, to_hf, lambda shapes: (3 * shapes[0][-1], *shapes[0][:-1]))


class Tensor(NamedTuple):
    """One line of a family's table. `{}` in the name stands for the layer; `paths` under "layers/" are stacked over layers."""

    name: str
    paths: tuple[str, ...]
    layout: Layout = SAME
    alias: str | None = None  # another name for it that is met on the Hub

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


def _linear(hf: str, ours: str, bias: bool, layout: Layout = TRANSPOSED) -> list[Tensor]:
    weight = Tensor(f"{hf}.weight", (f"{ours}/kernel",), layout)
    return [weight, Tensor(f"{hf}.bias", (f"{ours}/bias",))] if bias else [weight]


def _fused(hf: str, bias: bool, layout: Layout) -> list[Tensor]:
    def paths(leaf: str) -> tuple[str, ...]:
        return tuple(f"layers/attention/{part}/{leaf}" for part in ("query", "key", "value"))

    weight = Tensor(f"{hf}.weight", paths("kernel"), layout)
    return [weight, Tensor(f"{hf}.bias", paths("bias"), layout)] if bias else [weight]


def _norm(hf: str, ours: str, bias: bool) -> list[Tensor]:
    weight = Tensor(f"{hf}.weight", (f"{ours}/scale",))
    return [weight, Tensor(f"{hf}.bias", (f"{ours}/bias",))] if bias else [weight]


def _gpt2(c: DecoderConfig) -> list[Tensor]:
    h = "transformer.h.{}"
    return [
        Tensor("transformer.wte.weight", ("token_embedding",)),
        Tensor("transformer.wpe.weight", ("position_embedding",)),
        *_norm(f"{h}.ln_1", "layers/attention_norm", True),
        *_fused(f"{h}.attn.c_attn", True, SIDE_BY_SIDE),
        *_linear(f"{h}.attn.c_proj", "layers/attention/out", True),
        *_norm(f"{h}.ln_2", "layers/mlp_norm", True),
        *_linear(f"{h}.mlp.c_fc", "layers/mlp/up", True, SAME),
        *_linear(f"{h}.mlp.c_proj", "layers/mlp/down", True),
        *_norm("transformer.ln_f", "final_norm", True),
    ]


def _gptj(c: DecoderConfig) -> list[Tensor]:
    h = "transformer.h.{}"
    return [
        Tensor("transformer.wte.weight", ("token_embedding",)),
        *_norm(f"{h}.ln_1", "layers/attention_norm", True),
        *_linear(f"{h}.attn.q_proj", "layers/attention/query", False),
        *_linear(f"{h}.attn.k_proj", "layers/attention/key", False),
        *_linear(f"{h}.attn.v_proj", "layers/attention/value", False),
        *_linear(f"{h}.attn.out_proj", "layers/attention/out", False, SAME),
        *_linear(f"{h}.mlp.fc_in", "layers/mlp/up", True),
        *_linear(f"{h}.mlp.fc_out", "layers/mlp/down", True, SAME),
        *_norm("transformer.ln_f", "final_norm", True),
        Tensor("lm_head.bias", ("head_bias",)),
    ]


def _gpt_neox(c: DecoderConfig) -> list[Tensor]:
    h = "gpt_neox.layers.{}"
    return [
        Tensor("gpt_neox.embed_in.weight", ("token_embedding",)),
        *_norm(f"{h}.input_layernorm", "layers/attention_norm", True),
        *_fused(f"{h}.attention.query_key_value", c.qkv_bias, per_head(c.heads)),
        *_linear(f"{h}.attention.dense", "layers/attention/out", c.out_bias, SAME),
        *_norm(f"{h}.post_attention_layernorm", "layers/mlp_norm", True),
        *_linear(f"{h}.mlp.dense_h_to_4h", "layers/mlp/up", True),
        *_linear(f"{h}.mlp.dense_4h_to_h", "layers/mlp/down", True, SAME),
        *_norm("gpt_neox.final_layer_norm", "final_norm", True),
    ]


def _llama_like(c: DecoderConfig) -> list[Tensor]:
    h = "model.layers.{}"
    table = [
        Tensor("model.embed_tokens.weight", ("token_embedding",)),
        *_norm(f"{h}.input_layernorm", "layers/attention_norm", False),
        *_linear(f"{h}.self_attn.q_proj", "layers/attention/query", c.qkv_bias),
        *_linear(f"{h}.self_attn.k_proj", "layers/attention/key", c.qkv_bias),
        *_linear(f"{h}.self_attn.v_proj", "layers/attention/value", c.qkv_bias),
        *_linear(f"{h}.self_attn.o_proj", "layers/attention/out", c.out_bias, SAME),
        *_linear(f"{h}.mlp.gate_proj", "layers/mlp/gate", c.mlp_bias),
        *_linear(f"{h}.mlp.up_proj", "layers/mlp/up", c.mlp_bias),
        *_linear(f"{h}.mlp.down_proj", "layers/mlp/down", c.mlp_bias, SAME),
        *_norm("model.norm", "final_norm", False),
    ]
    if c.qk_norm:
        table += _norm(f"{h}.self_attn.q_norm", "layers/attention/query_norm", False)
        table += _norm(f"{h}.self_attn.k_norm", "layers/attention/key_norm", False)
    if c.post_norms:
        # Gemma's "post_attention" norms what attention adds; in Llama the same name is the norm before the MLP.
        table += _norm(f"{h}.post_attention_layernorm", "layers/post_attention_norm", False)
        table += _norm(f"{h}.pre_feedforward_layernorm", "layers/mlp_norm", False)
        table += _norm(f"{h}.post_feedforward_layernorm", "layers/post_mlp_norm", False)
    else:
        table += _norm(f"{h}.post_attention_layernorm", "layers/mlp_norm", False)
    return table


def tensors(config: DecoderConfig) -> list[Tensor]:
    """The table of a model: each of our parameters and each checkpoint tensor exactly once."""
    build = {"gpt2": _gpt2, "gptj": _gptj, "gpt_neox": _gpt_neox}.get(config.family, _llama_like)
    return build(config) + ([] if config.tied else [Tensor(head_name(config), ("head_kernel",), alias="lm_head.weight")])


def head_name(config: DecoderConfig) -> str:
    return "embed_out.weight" if config.family == "gpt_neox" else "lm_head.weight"


_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$|\.embed_positions$")
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def canonical_name(name: str, config: DecoderConfig) -> str | None:
    """The name a checkpoint tensor has in our tables, or None for one that holds no weight of the language model.

    None: the causal mask and rotary buffers that older transformers saved, and the image side of a Gemma 3. Checkpoints saved
    from the bare trunk lack its prefix (the official GPT-2 is one); multimodal ones have one more.
    """
    if _BUFFERS.search(name):
        return None
    if config.family == "gemma3_text":
        if name.startswith(_OTHER_PARTS):
            return None
        name = re.sub(r"^(language_model\.model\.|model\.language_model\.)", "model.", name)
        name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    trunk = {"gpt2": "transformer.", "gptj": "transformer.", "gpt_neox": "gpt_neox."}.get(config.family, "model.")
    if not name.startswith((trunk, "lm_head.", "embed_out.")):
        name = trunk + name
    return name
