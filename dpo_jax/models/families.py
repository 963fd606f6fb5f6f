"""The table of model families: reads a Hugging Face `config.json` into a `DecoderConfig`, and writes one for a new model.

To add a family, write its settings and tensor names in `architectures/` and add a line to `FAMILIES`.

Dropout settings are ignored: a policy and its reference must agree exactly at step 0, so this package never uses dropout.
Settings that would change the arithmetic and that the decoder does not support are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.models.architectures.experts import MIXTRAL, OLMOE, QWEN3_MOE
from dpo_jax.models.architectures.gemma import GEMMA2, GEMMA3_TEXT, text_part
from dpo_jax.models.architectures.gemma_images import GEMMA3
from dpo_jax.models.architectures.gpt2 import GPT2
from dpo_jax.models.architectures.gpt_neox import GPT_NEOX
from dpo_jax.models.architectures.gptj import GPTJ
from dpo_jax.models.architectures.llama import LLAMA
from dpo_jax.models.architectures.mistral import MISTRAL
from dpo_jax.models.architectures.olmo2 import OLMO2
from dpo_jax.models.architectures.phi3 import PHI3
from dpo_jax.models.architectures.qwen import QWEN2, QWEN3
from dpo_jax.models.architectures.smollm3 import SMOLLM3
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.family import Family, Sizes
from dpo_jax.models.fields import Fields, shown
from dpo_jax.models.folder import is_scorer
from dpo_jax.models.hf_settings import Reader
from dpo_jax.untrusted import LIMITS, Unreadable

_DENSE = (GPT2, GPTJ, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3_TEXT, OLMO2, SMOLLM3, PHI3)
_KNOWN = (*_DENSE, MIXTRAL, OLMOE, QWEN3_MOE)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _KNOWN}
_TEXT_PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {"gemma3": text_part}  # of multimodal models
_WITH_IMAGES: Mapping[str, Family] = {family.name: family for family in (GEMMA3,)}


def family_of(config: DecoderConfig) -> Family:
    """The family record of a decoder."""
    return (_WITH_IMAGES if config.image_width else FAMILIES)[config.family]


def reads_images(hf_config: Mapping[str, Any]) -> bool:
    """Whether a Hugging Face configuration describes a supported model with a vision encoder."""
    return hf_config.get("model_type") in _WITH_IMAGES


def decoder_config(hf_config: Mapping[str, Any], *, where: str | Path = "config.json", images: bool = False) -> DecoderConfig:
    """Read a Hugging Face configuration (the content of `config.json`, of transformers 4 or 5), which came from `where`.

    A multimodal "gemma3" configuration gives its text model, or with `images` the model that also reads images; that of a
    reward model gives the decoder below its score. Raises `Unreadable`, naming file, field and value, for a missing or
    impossible value; ValueError for a family, an activation, a rotary scaling or another setting that the decoder does not
    support.

    >>> sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    >>> found = decoder_config({"model_type": "gpt2", **sizes})
    >>> found.family, found.width, found.layers
    ('gpt2', 32, 2)
    """
    hf = dict(hf_config)
    family = Fields(hf, where).text("model_type")
    known = _WITH_IMAGES if images else FAMILIES
    if family in _TEXT_PARTS and not images:
        hf = _TEXT_PARTS[family](hf, where)
        family = hf["model_type"]
    if family not in known:
        what = " with images" if images else ""
        raise ValueError(f"{where}: model_type {shown(family)} is not supported{what}; supported: {', '.join(known)}")
    read = Reader(family, hf, where, defaults=known[family].defaults)
    for key in ("quantization_config", *known[family].refused):
        if hf.get(key):
            read.refuse(key)
    fields = known[family].fields(read)
    if fields["heads"] % fields["kv_heads"]:
        raise Unreadable(f"{where}: {fields['heads']} heads are not a multiple of {fields['kv_heads']} key/value heads")
    if is_scorer(hf):
        fields |= {"tied": True, "head_bias": False}  # it has no output head, and needs none
    init_std = fields.pop("init_std", None) or read.number("initializer_range", least=0.0, right="a number of at least 0")
    config = DecoderConfig(family=family, init_std=init_std, hf_json=json.dumps(hf, sort_keys=True), **fields)
    LIMITS.check("model_b", _billions(config), where, what="billion parameters")
    return config


def router_coefficient(config: DecoderConfig) -> float:
    """The coefficient of the load-balancing loss in `config.json`: 0 unless it has `output_router_logits`, as in
    transformers."""
    read = Reader(config.family, config.hf, "config.json", defaults=family_of(config).defaults)
    if not (config.experts and read.flag("output_router_logits")):
        return 0.0
    return read.number("router_aux_loss_coef", least=0.0, right="a number of at least 0")


def _billions(c: DecoderConfig) -> int:
    """Approximate number of parameters of a model, in billions, counting matrices only."""
    attention = c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads)
    mlp = c.width * c.mlp_width * (3 if c.gated_mlp else 2) * max(1, c.experts)
    tables = c.width * (c.vocab_size * (1 if c.tied else 2) + (0 if c.ropes else c.max_positions))
    return (c.layers * (attention + mlp) + tables) // 10**9


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
    """A Hugging Face `config.json` for a new model; everything not given takes the family's default.

    `mlp_width` defaults to 4 x width, with a gated MLP to 8/3 x width rounded up to a multiple of 8 (about as many parameters).
    Raises ValueError for an unknown family and for a size the family has no setting for.

    >>> sizes = {"vocab_size": 300, "width": 32, "layers": 2, "heads": 4, "max_positions": 64}
    >>> content = hf_config("llama", **sizes, eos_token_id=0)
    >>> content["model_type"], content["hidden_size"]
    ('llama', 32)
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    found = FAMILIES[family]
    config = {
        "model_type": family,
        "architectures": [found.architecture],
        "vocab_size": vocab_size,
        "eos_token_id": eos_token_id,
        "bos_token_id": bos_token_id,
        "pad_token_id": pad_token_id,
        "tie_word_embeddings": found.defaults["tie_word_embeddings"] if tie is None else tie,
        "initializer_range": 0.02,
        **found.sizes(Sizes(width, layers, heads, kv_heads, head_size, mlp_width, max_positions)),
    }
    decoder_config(config)
    return config
