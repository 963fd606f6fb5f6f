"""The folder of a reward model: a decoder with one score per text, as Hugging Face's `...ForSequenceClassification` stores it.

It holds the decoder without its output head, `score.weight` (float[1, D]), and in `config.json` the constant `reward_bias`,
which only this package adds: transformers ignores it, so its scores are lower by that number, and their differences are the
same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.models.folder import EARLIER_HEAD
from dpo_jax.models.tensor_layouts import Tensor
from dpo_jax.models.tensors import SCORE, Contents
from dpo_jax.models.weights import Checkpoint
from dpo_jax.untrusted import Unreadable

BIAS = "reward_bias"


def scorer_settings(architecture: str, *, bias: float, pad_token_id: int | None) -> dict[str, Any]:
    """The entries of `config.json` that make a language model of this class (`LlamaForCausalLM`) a reward model.

    transformers reads the score at the last token that is not `pad_token_id`. So that must not be one that ends texts, where it
    is learned. With None, transformers reads it at the last token, of one text at a time.
    """
    return {
        "architectures": [re.sub(r"(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", architecture)],
        "id2label": {"0": "REWARD"},
        "label2id": {"REWARD": 0},
        "pad_token_id": pad_token_id,
        BIAS: bias,
    }


def read_head(folder: Path, hf: Mapping[str, Any], *, width: int) -> dict[str, np.ndarray]:
    """The scalar head of a reward model: {"kernel": float32[D], "bias": float32[]}. `hf` is the content of its `config.json`.

    Raises ValueError for several outputs, another width, or a missing tensor; `Unreadable`, a ValueError, for damaged files.
    """
    file = folder / "config.json"
    labels = hf.get("id2label")
    if isinstance(labels, Mapping) and len(labels) != 1:
        raise ValueError(f"{file}: id2label has {len(labels)} outputs, but a reward model has one")
    bias = hf.get(BIAS, 0.0)
    if type(bias) not in (int, float) or not math.isfinite(bias):
        raise Unreadable(f"{file}: {BIAS} = {str(bias)[:100]!r} is not a finite number")
    contents = Contents("reward model", [Tensor(SCORE, (SCORE,))], 0, lambda name: name if name == SCORE else None)
    with Checkpoint(folder, contents) as checkpoint:
        checkpoint.check_names()
        kernel = checkpoint.get(SCORE, (1, width))[0].astype(np.float32)
        if not np.isfinite(kernel).all():
            raise Unreadable(f"{checkpoint.where[SCORE][0]}: {SCORE} holds numbers that are not finite; fetch or save it again")
    return {"kernel": kernel, "bias": np.array(bias, np.float32)}


def without_earlier_head(folder: Path) -> None:
    """Removes the file in which earlier versions kept the head. A kill must not leave an old head beside new weights."""
    (folder / EARLIER_HEAD).unlink(missing_ok=True)
