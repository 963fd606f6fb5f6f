"""The static description of a decoder."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dpo_jax.models.rope import Rope


def later(default: Any) -> Any:
    """A field added after runs had started: at its default it does not change their fingerprints."""
    return dataclasses.field(default=default, metadata={"later": True})


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that determines a decoder's arithmetic. Static and hashable; made by `families.decoder_config`."""

    family: str
    vocab_size: int
    width: int  # D
    layers: int
    heads: int  # N
    kv_heads: int  # K
    head_size: int  # H
    mlp_width: int
    max_positions: int  # rows of the position table; with rotary positions, the context length of training
    activation: str  # a key of activations.ACTIVATIONS
    norm: str  # "layer" (mean and variance, bias), "rms", or "rms_plus_one" (the scale is 1 + weight)
    norm_eps: float
    attention_scale: float  # of the scores, before softmax
    tied: bool  # the head is the token embedding
    ropes: tuple[Rope, ...] = ()  # one per layer; empty: learned positions
    windows: tuple[int | None, ...] = ()  # one per layer: sliding window in positions; empty: full attention everywhere
    gated_mlp: bool = False
    parallel_residual: bool = False  # attention and MLP both read the layer's input
    shared_norm: bool = False  # with parallel_residual: both read the same normed input (GPT-J)
    post_norms: bool = False  # norms on the outputs of attention and MLP (Gemma, OLMo 2)
    qk_norm: bool = False  # RMS norm of every query and key head (Qwen 3, Gemma 3)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    init_std: float = 0.02
    pre_norms: bool = later(True)  # norms on the inputs of attention and MLP (all but OLMo 2)
    qk_norm_whole: bool = later(False)  # qk_norm is over all heads together (OLMo 2)
    experts: int = later(0)  # per layer, instead of its MLP (Mixtral); `mlp_width` is then that of one expert
    experts_per_token: int = later(0)
    norm_routes: bool = later(False)  # normalize the routing weights of a token's experts to sum to one
    image_width: int = later(0)  # W of the vision encoder whose outputs the model reads (Gemma 3 with images); 0: none
    image_tokens: int = later(0)  # T of an image
    image_norm_eps: float = later(0.0)
    hf_json: str = "{}"  # the Hugging Face config.json it came from, canonical; `hf.save_hf` writes it back

    @property
    def hf(self) -> dict[str, Any]:
        """The Hugging Face configuration as a fresh dict."""
        return json.loads(self.hf_json)
