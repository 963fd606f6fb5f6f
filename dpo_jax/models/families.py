"""The nine families: how a Hugging Face `config.json` becomes a `DecoderConfig`, and how one for a new model is written.

Dropout settings are read by nobody: a policy and its reference must agree exactly at step 0, so this package never drops out.
Settings that would change the arithmetic and that the decoder does not have are refused by name. Tensor names: `tensors.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.fields import Fields, shown
from dpo_jax.models.hf_settings import DEFAULTS, Reader
from dpo_jax.models.rope import Rope
from dpo_jax.untrusted import LIMITS, Unreadable

_REFUSED: dict[str, tuple[str, ...]] = {  # keys that must be absent, null or false
    "gpt2": ("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    "gemma2": ("use_bidirectional_attention",),
    "gemma3_text": ("use_bidirectional_attention", "attn_logit_softcapping"),
}


def decoder_config(hf_config: Mapping[str, Any], *, where: str | Path = "config.json") -> DecoderConfig:
    """Read a Hugging Face configuration (the content of `config.json`, of transformers 4 or 5), which came from `where`.

    A multimodal "gemma3" configuration stands for its text model. Raises `Unreadable`, naming file, field and value, for a
    missing or impossible one; ValueError for a family, an activation, a rotary scaling or another setting that the decoder does
    not have.

    >>> sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    >>> found = decoder_config({"model_type": "gpt2", **sizes})
    >>> found.family, found.width, found.layers
    ('gpt2', 32, 2)
    """
    hf = dict(hf_config)
    family = Fields(hf, where).text("model_type")
    if family == "gemma3":
        hf, family = _gemma3_text_part(hf, where), "gemma3_text"
    if family not in DEFAULTS:
        raise ValueError(f"{where}: model_type {shown(family)} is not supported; supported: {', '.join(DEFAULTS)}")
    read = Reader(family, hf, where)
    for key in ("quantization_config", *_REFUSED.get(family, ())):
        if hf.get(key):
            read.refuse(key)
    build = {"gpt2": _gpt2, "gptj": _gptj, "gpt_neox": _gpt_neox}.get(family, _llama_like)
    fields = build(read)
    if fields["heads"] % fields["kv_heads"]:
        raise Unreadable(f"{where}: {fields['heads']} heads are not a multiple of {fields['kv_heads']} key/value heads")
    init_std = read.number("initializer_range", least=0.0, right="a number of at least 0")
    config = DecoderConfig(family=family, init_std=init_std, hf_json=json.dumps(hf, sort_keys=True), **fields)
    LIMITS.check("model_b", _billions(config), where, what="billion parameters")
    return config


def _billions(c: DecoderConfig) -> int:
    """About how many parameters a model has, in billions: its matrices."""
    attention = c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads)
    tables = c.width * (c.vocab_size * (1 if c.tied else 2) + (0 if c.ropes else c.max_positions))
    return (c.layers * (attention + c.width * c.mlp_width * (3 if c.gated_mlp else 2)) + tables) // 10**9


def _gpt2(read: Reader) -> dict[str, Any]:
    width, heads = read.size("n_embd"), read.size("n_head")
    head_size = read.head_size(width, heads)
    return {
        "vocab_size": read.size("vocab_size"),
        "width": width,
        "layers": read.layers("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": head_size,
        "mlp_width": read.size("n_inner", 4 * width),
        "max_positions": read.size("n_positions"),
        "activation": read.activation("activation_function"),
        "norm": "layer",
        "norm_eps": read.number("layer_norm_epsilon"),
        "attention_scale": head_size**-0.5 if read.flag("scale_attn_weights") else 1.0,
        "tied": read.flag("tie_word_embeddings"),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    }


def _gptj(read: Reader) -> dict[str, Any]:
    fields = _gpt2(read)
    # Hugging Face scales GPT-J's scores always.
    rotary = read.size("rotary_dim")
    if rotary > fields["head_size"]:
        read.wrong("rotary_dim", f"at most the size of a head, {fields['head_size']}")
    rope = read.rope(rotary, theta=10000.0, settings=Fields({}, read.where), interleaved=True)
    return fields | {
        "attention_scale": fields["head_size"] ** -0.5,
        "ropes": (rope,) * fields["layers"],
        "parallel_residual": True,
        "shared_norm": True,
        "qkv_bias": False,
        "out_bias": False,
        "head_bias": True,
    }


def _gpt_neox(read: Reader) -> dict[str, Any]:
    width, heads, layers = read.size("hidden_size"), read.size("num_attention_heads"), read.layers("num_hidden_layers")
    head_size = read.head_size(width, heads)
    settings = read.rope_settings()
    part, key = (settings, "partial_rotary_factor") if settings.has("partial_rotary_factor") else (read, "rotary_pct")
    if (share := part.number(key)) > 1:
        part.wrong(key, "a number above 0 and at most 1")
    bias = read.flag("attention_bias")
    return {
        "vocab_size": read.size("vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads,
        "head_size": head_size,
        "mlp_width": read.size("intermediate_size"),
        "max_positions": read.size("max_position_embeddings"),
        "activation": read.activation("hidden_act"),
        "norm": "layer",
        "norm_eps": read.number("layer_norm_eps"),
        "attention_scale": head_size**-0.5,
        "tied": read.flag("tie_word_embeddings"),
        "ropes": (read.rope(int(head_size * share), theta="rotary_emb_base", settings=settings),) * layers,
        "parallel_residual": read.flag("use_parallel_residual"),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
    }


def _llama_like(read: Reader) -> dict[str, Any]:
    family = read.family
    gemma = family.startswith("gemma")
    width, heads, layers = read.size("hidden_size"), read.size("num_attention_heads"), read.layers("num_hidden_layers")
    head_size = read.size("head_dim") if read.has("head_dim") else read.head_size(width, heads)
    sliding = _sliding_layers(read, layers)
    window = read.size("sliding_window") if any(sliding) else None
    return {
        "vocab_size": read.size("vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": read.size("num_key_value_heads", heads),
        "head_size": head_size,
        "mlp_width": read.size("intermediate_size"),
        "max_positions": read.size("max_position_embeddings"),
        "activation": read.activation("hidden_activation" if gemma else "hidden_act"),
        "norm": "rms_plus_one" if gemma else "rms",
        "norm_eps": read.number("rms_norm_eps"),
        "attention_scale": read.number("query_pre_attn_scalar") ** -0.5 if gemma else head_size**-0.5,
        "tied": read.flag("tie_word_embeddings"),
        "ropes": _ropes(read, head_size, sliding),
        "windows": tuple(window if s else None for s in sliding) if window else (),
        "gated_mlp": True,
        "post_norms": gemma,
        "qk_norm": family in ("qwen3", "gemma3_text"),
        "qkv_bias": family == "qwen2" or (family != "mistral" and read.flag("attention_bias")),
        "out_bias": family not in ("qwen2", "mistral") and read.flag("attention_bias"),
        "mlp_bias": family == "llama" and read.flag("mlp_bias"),
        "embedding_scale": width**0.5 if gemma else 1.0,
        "attention_softcap": read.optional_number("attn_logit_softcapping") if gemma else None,
        "logit_softcap": read.optional_number("final_logit_softcapping") if gemma else None,
    }


def _sliding_layers(read: Reader, layers: int) -> list[bool]:
    """Which layers see a sliding window only."""
    family, kinds = read.family, "layer_types"
    if family == "llama" or (family.startswith("qwen") and not read.flag("use_sliding_window")):
        return [False] * layers
    if not read.has("sliding_window"):
        return [False] * layers
    if family == "mistral":
        return [True] * layers
    if read.has(kinds):
        named = read.texts(kinds)
        if set(named) - {"full_attention", "sliding_attention"} or len(named) != layers:
            read.wrong(kinds, f'"full_attention" or "sliding_attention" for each of {layers} layers')
        return [kind == "sliding_attention" for kind in named]
    if family.startswith("qwen"):
        first = read.size("max_window_layers", 0, least=0, right="an integer of at least 0")
        return [i >= first for i in range(layers)]
    every = 2 if family == "gemma2" else read.size("sliding_window_pattern")
    return [(i + 1) % every != 0 for i in range(layers)]


def _ropes(read: Reader, head_size: int, sliding: list[bool]) -> tuple[Rope, ...]:
    settings, partial = read.rope_settings(), "partial_rotary_factor"
    for part in (read, settings):
        if part.has(partial) and part.number(partial) != 1.0:
            raise ValueError(f"{part.where}: {partial} = {shown(part.all[partial])} is not supported in a {read.family}")
    if read.family != "gemma3_text":
        return (read.rope(head_size, theta="rope_theta", settings=settings),) * len(sliding)
    # Gemma 3 scales its full-attention layers only; transformers 5 nests one object per kind of layer.
    nested = settings.has("full_attention") or settings.has("sliding_attention")
    wide, narrow = (settings.part(kind) if nested else None for kind in ("full_attention", "sliding_attention"))
    full = read.rope(head_size, theta="rope_theta", settings=wide or settings)
    local = read.rope(head_size, theta="rope_local_base_freq", settings=narrow or Fields({}, read.where))
    return tuple(local if s else full for s in sliding)


def _gemma3_text_part(hf: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        Fields(hf, where).wrong("text_config", "an object with the language model's settings")
    inherited = {key: hf[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings") if key in hf}
    return {**inherited, **text, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gptj": "GPTJForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def hf_config(
    family: str,
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    head_size: int | None = None,
    mlp_width: int | None = None,
    max_positions: int,
    tie: bool | None = None,
    eos_token_id: int,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """A Hugging Face `config.json` for a new model; everything not asked for is the family's habit.

    `mlp_width` defaults to 4 x width, with a gated MLP to 8/3 x width rounded up to a multiple of 8 (about as many parameters).
    Raises ValueError for an unknown family and for a size the family has no setting for.

    >>> sizes = {"vocab_size": 300, "width": 32, "layers": 2, "heads": 4, "max_positions": 64}
    >>> content = hf_config("llama", **sizes, eos_token_id=0)
    >>> content["model_type"], content["hidden_size"]
    ('llama', 32)
    """
    if family not in DEFAULTS:
        raise ValueError(f"family {family!r} is not supported; supported: {', '.join(DEFAULTS)}")
    ids = {"eos_token_id": eos_token_id, "bos_token_id": bos_token_id, "pad_token_id": pad_token_id}
    tied = DEFAULTS[family]["tie_word_embeddings"] if tie is None else tie
    common = {"model_type": family, "architectures": [ARCHITECTURES[family]], "vocab_size": vocab_size, **ids}
    common |= {"tie_word_embeddings": tied, "initializer_range": 0.02}
    if family in ("gpt2", "gptj", "gpt_neox"):
        if kv_heads not in (None, heads) or head_size not in (None, width // heads):
            raise ValueError(f"{family} has neither key/value heads of its own nor a head size other than width / heads")
        sizes = _gpt_sizes(family, width, layers, heads, mlp_width, max_positions)
    else:
        head_size = head_size or width // heads
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads or heads,
            "head_dim": head_size,
            "intermediate_size": mlp_width or -(-8 * width // 24) * 8,
            "max_position_embeddings": max_positions,
        }
        if family.startswith("gemma"):
            sizes |= {"query_pre_attn_scalar": head_size, "sliding_window": 4096 if family == "gemma2" else 1024}
    config = common | sizes
    decoder_config(config)
    return config


def _gpt_sizes(family: str, width: int, layers: int, heads: int, mlp_width: int | None, max_positions: int) -> dict[str, Any]:
    if family == "gpt_neox":
        return {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": mlp_width or 4 * width,
            "max_position_embeddings": max_positions,
        }
    sizes: dict[str, Any] = {
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": mlp_width,
        "n_positions": max_positions,
    }
    if family == "gptj":
        sizes["rotary_dim"] = min(64, width // heads)
    return sizes
