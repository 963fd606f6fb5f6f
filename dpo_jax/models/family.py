"""The record of a model family: settings, tensor names and sizes. `families.FAMILIES` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.tensor_layouts import Tensor


class Sizes(NamedTuple):
    """Requested sizes of a new model; None for the family's default."""

    width: int
    layers: int
    heads: int
    kv_heads: int | None
    head_size: int | None
    mlp_width: int | None
    max_positions: int


class Family(NamedTuple):
    """Everything that distinguishes one family from another. All families share one decoder."""

    name: str
    """`model_type` of its `config.json`."""
    title: str
    """Its name in prose."""
    architecture: str
    """Hugging Face's class name."""
    defaults: Mapping[str, Any]
    """Value of a key that a `config.json` omits (the default of Hugging Face's class). A key without an entry is required."""
    fields: Callable[[Reader], dict[str, Any]]
    """Function from `config.json` to the fields of `DecoderConfig`."""
    tensors: Callable[[DecoderConfig], list[Tensor]]
    """The tensors of a checkpoint, embedding first, without a separate output head."""
    sizes: Callable[[Sizes], dict[str, Any]]
    """The keys of the `config.json` of a new model."""
    refused: tuple[str, ...] = ()
    """Keys that must be absent, null or false, because the decoder does not support them."""
    trunk: str = "model."
    """Prefix of the names of all tensors but the head."""
    head: str = "lm_head.weight"
    rename: Callable[[str], str | None] = lambda name: name
    """The usual name of a tensor that also has others; None for one outside the language model."""


def without_own_heads(asked: Sizes, family: str) -> None:
    """Raises ValueError for head sizes that the family has no setting for."""
    if asked.kv_heads not in (None, asked.heads) or asked.head_size not in (None, asked.width // asked.heads):
        raise ValueError(f"{family} has neither key/value heads of its own nor a head size other than width / heads")
