"""From preferences whose prompts show images to token ids: each image takes its tokens, and its features are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_jax.data.encode import Bos, Encoded, PromptImages, Truncation, encode
from dpo_jax.data.image_rows import image_marks, image_starts
from dpo_jax.data.pairs import Preference


def encode_images(
    preference: Preference,
    tokenizer: Any,
    *,
    features: Mapping[str, np.ndarray],
    tokens: int,
    max_length: int,
    max_prompt_length: int,
    truncation: Truncation = "keep_end",
    bos: Bos = "auto",
) -> Encoded:
    """Token ids of a preference with the images that its prompt shows (`Encoded.images`); without images as `encode`.

    Each image takes `tokens` tokens between its marks, as the processor of Gemma 3 writes it. `features` are looked up by the
    digests of the images when a batch is made (`training.features.FeatureCache`).

    Raises `BadRow` where truncation cuts an image, and as `encode`.
    """
    limits: dict[str, Any] = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "truncation": truncation,
        "bos": bos,
    }
    if not preference.images:
        return encode(preference, tokenizer, **limits)
    marks = image_marks(tokenizer)
    text = dataclasses.replace(preference, prompt=marks.expanded(preference.prompt, tokens), images=())
    pair = encode(text, tokenizer, **limits)
    soft, names = tokenizer.convert_tokens_to_ids(marks.soft), tuple(image.digest for image in preference.images)
    starts = image_starts(pair.prompt, soft=soft, tokens=tokens, images=len(names))
    return dataclasses.replace(pair, images=PromptImages(starts, names, tokens, features))
