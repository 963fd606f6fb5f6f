"""Where every tensor of a Hugging Face checkpoint lives among our parameters, and in which orientation.

The table of each family stands in its module of `architectures/`.
"""

from __future__ import annotations

import re

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.families import family_of
from dpo_jax.models.tensor_layouts import Tensor


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
