"""The mapping from Hugging Face checkpoint tensors to our parameters, with their layouts.

The table of each family is in its module of `architectures/`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.families import family_of
from dpo_jax.models.tensor_layouts import Tensor


class Contents(NamedTuple):
    """The tensors that a folder's files must hold for a model, or for a part of one."""

    what: str  # in messages
    table: Sequence[Tensor]
    layers: int
    known: Callable[[str], str | None]  # the name in `table` of a stored tensor; None if it belongs to another part or to none
    spare: frozenset[str] = frozenset()  # optional names


def contents(config: DecoderConfig) -> Contents:
    """The contents for a decoder. A tied head may be present, and is then checked (`Checkpoint.check_tied_head`)."""
    spare = {head_name(config), "lm_head.weight"} if config.tied else set()
    known = functools.partial(canonical_name, config=config)
    return Contents(config.family, tensors(config), config.layers, known, frozenset(spare))


def tensors(config: DecoderConfig) -> list[Tensor]:
    """The tensor table of a model: each of our parameters and each checkpoint tensor exactly once."""
    table = family_of(config).tensors(config)
    return table + ([] if config.tied else [Tensor(head_name(config), ("head_kernel",), alias="lm_head.weight")])


def head_name(config: DecoderConfig) -> str:
    """The name of the output head in a checkpoint."""
    return family_of(config).head


SCORE = "score.weight"  # of a reward model: `models.scorer`
_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$|\.embed_positions$")


def canonical_name(name: str, config: DecoderConfig) -> str | None:
    """The name of a checkpoint tensor in our tables, or None for one that holds no weight of the language model.

    None stands for the causal mask and rotary buffers that older transformers saved, for the image part of a Gemma 3, and for
    the score of a reward model. Checkpoints saved from the bare trunk lack its prefix (such as the official GPT-2); multimodal
    ones have an additional one.
    """
    if _BUFFERS.search(name) or name == SCORE:
        return None
    family = family_of(config)
    known = family.rename(name)
    if known is None or known.startswith((family.trunk, "lm_head.", "embed_out.")):
        return known
    return family.trunk + known


def module_name(name: str, config: DecoderConfig) -> str:
    """The name of a module in transformers 5, from that in a checkpoint; they differ for a Gemma 3 with images."""
    return re.sub(r"^language_model\.model\.", "model.language_model.", name) if config.image_width else name
