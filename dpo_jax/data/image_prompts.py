"""Tokenization of preferences with images in the prompt: each image becomes image tokens, with its features referenced by
name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.encode import Bos, Encoded, PromptImages, Truncation, encode
from dpo_jax.data.image_rows import image_marks, image_starts
from dpo_jax.data.images import ImageFile
from dpo_jax.data.pairs import Preference


class ImageTokens(NamedTuple):
    """Image settings of a model: `tokens` tokens per image; batches look up features by image digest."""

    tokens: int
    features: Mapping[str, np.ndarray]  # {digest: float32[tokens, W]}, such as `training.features.FeatureCache`

    def shown(self, prompt: np.ndarray, images: Sequence[ImageFile], tokenizer: Any) -> PromptImages | None:
        """The images of a prompt int32[n] whose text was `Marks.expanded`; None without images.

        Raises `BadRow` if truncation cut one.
        """
        if not images:
            return None
        soft, names = tokenizer.convert_tokens_to_ids(image_marks(tokenizer).soft), tuple(image.digest for image in images)
        starts = image_starts(prompt, soft=soft, tokens=self.tokens, images=len(names))
        return PromptImages(starts, names, self.tokens, self.features)


def encode_images(
    preference: Preference,
    tokenizer: Any,
    *,
    images: ImageTokens,
    max_length: int,
    max_prompt_length: int,
    truncation: Truncation = "keep_end",
    bos: Bos = "auto",
) -> Encoded:
    """Token ids of a preference with its prompt's images (`Encoded.images`); like `encode` if there are none.

    Each image becomes image tokens between start and end marks, as in Gemma 3's processor. Raises `BadRow` if truncation cuts
    an image, and as `encode` does.
    """
    limits: dict[str, Any] = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "truncation": truncation,
        "bos": bos,
    }
    if not preference.images:
        return encode(preference, tokenizer, **limits)
    expanded = image_marks(tokenizer).expanded(preference.prompt, images.tokens)
    pair = encode(dataclasses.replace(preference, prompt=expanded, images=()), tokenizer, **limits)
    return dataclasses.replace(pair, images=images.shown(pair.prompt, preference.images, tokenizer))
