"""The record of a family of models: settings, tensor names and sizes together. `families.FAMILIES` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.hf_settings import Reader
from dpo_jax.models.tensor_layouts import Tensor


class Sizes(NamedTuple):
    """What is asked of a new model; None for the family's habit."""

    width: int
    layers: int
    heads: int
    kv_heads: int | None
    head_size: int | None
    mlp_width: int | None
    max_positions: int


class Family(NamedTuple):
    """Everything that tells one family from another; its decoder is that of all others, with these settings."""

    name: str
    """`model_type` of its `config.json`."""
    title: str
    """As people write it."""
    architecture: str
    """Hugging Face's class."""
    defaults: Mapping[str, Any]
    """What a key means where a `config.json` leaves it out (the defaults of Hugging Face's class). A key without an entry must
    be there."""
    fields: Callable[[Reader], dict[str, Any]]
    """`config.json` -> fields of `DecoderConfig`."""
    tensors: Callable[[DecoderConfig], list[Tensor]]
    """The tensors of a checkpoint, the embedding first, without an output head of its own."""
    sizes: Callable[[Sizes], dict[str, Any]]
    """Keys of the `config.json` of a new model."""
    refused: tuple[str, ...] = ()
    """Keys that must be absent, null or false: the decoder does not have them."""
    trunk: str = "model."
    """What the names of all tensors but the head begin with."""
    head: str = "lm_head.weight"
    rename: Callable[[str], str | None] = lambda name: name
    """The usual name of a tensor that also goes by others; None for one of no language model."""


def without_own_heads(asked: Sizes, family: str) -> None:
    """Raises ValueError for sizes of heads that the family has no setting for."""
    if asked.kv_heads not in (None, asked.heads) or asked.head_size not in (None, asked.width // asked.heads):
        raise ValueError(f"{family} has neither key/value heads of its own nor a head size other than width / heads")
