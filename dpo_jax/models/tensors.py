"""Where every tensor of a Hugging Face checkpoint lives among our parameters, and in which orientation.

The table of each family stands in its module of `architectures/`.
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
    """What the files of a folder must hold of a model, or of a part of one."""

    what: str  # in messages
    table: Sequence[Tensor]
    layers: int
    known: Callable[[str], str | None]  # the name in `table` of a stored tensor; None for one of another part, or of none
    spare: frozenset[str] = frozenset()  # names that may be there, too


def contents(config: DecoderConfig) -> Contents:
    """Those of a decoder. A tied head may be there, and is then checked (`Checkpoint.check_tied_head`)."""
    spare = {head_name(config), "lm_head.weight"} if config.tied else set()
    known = functools.partial(canonical_name, config=config)
    return Contents(config.family, tensors(config), config.layers, known, frozenset(spare))


def tensors(config: DecoderConfig) -> list[Tensor]:
    """The table of a model: each of our parameters and each checkpoint tensor exactly once."""
    table = family_of(config).tensors(config)
    return table + ([] if config.tied else [Tensor(head_name(config), ("head_kernel",), alias="lm_head.weight")])


def head_name(config: DecoderConfig) -> str:
    """The name of the output head in a checkpoint."""
    return family_of(config).head


_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$|\.embed_positions$")


def canonical_name(name: str, config: DecoderConfig) -> str | None:
    """The name a checkpoint tensor has in our tables, or None for one that holds no weight of the language model.

    None: the causal mask and rotary buffers that older transformers saved, and the image side of a Gemma 3. Checkpoints saved
    from the bare trunk lack its prefix (the official GPT-2 is one); multimodal ones have one more.
    """
    if _BUFFERS.search(name):
        return None
    family = family_of(config)
    known = family.rename(name)
    if known is None or known.startswith((family.trunk, "lm_head.", "embed_out.")):
        return known
    return family.trunk + known


def module_name(name: str, config: DecoderConfig) -> str:
    """The name of a module as transformers 5 has it, of the one in a checkpoint: that of a Gemma 3 with images differs."""
    return re.sub(r"^language_model\.model\.", "model.language_model.", name) if config.image_width else name
