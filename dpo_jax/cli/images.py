"""Images in prompts: which runs read them, and a model folder's frozen vision encoder with its cached features.

A run reads images if its preferences show any. Its model is then the decoder with its projector, and the model's folder must
have the encoder. If no prompt shows an image, such a folder gives its text model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from dpo_jax.cli import build, splits
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.vision import check_mesh, encoder_settings, no_encoder
from dpo_jax.data.encode import PromptImages
from dpo_jax.data.image_prompts import ImageTokens
from dpo_jax.data.image_rows import image_marks
from dpo_jax.data.images import ImageFile, Processing
from dpo_jax.data.pairs import BadRow, PreferenceSet
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.models.encoder_folder import encoder_digest, load_encoder
from dpo_jax.models.families import reads_images
from dpo_jax.models.hf import load_config
from dpo_jax.models.hub import model_folder
from dpo_jax.models.vision_config import VisionConfig
from dpo_jax.runtime.hosts import first_goes_first, is_first
from dpo_jax.runtime.progress import reported
from dpo_jax.training.features import Encoder, FeatureCache, image_features, on_devices, open_features


def say_once(words: str, *, file: Any = None) -> None:
    """Prints a message once, on the first host: to standard output, or to `file`."""
    if is_first():
        print(words, file=file, flush=True)


@dataclasses.dataclass
class Vision:
    """The frozen vision encoder of the folder `path`, and, after `compute`, the features of the images in `waiting`."""

    path: str
    option: str  # that names it
    config: VisionConfig
    processing: Processing
    cache: FeatureCache
    say: Callable[[str], None]
    waiting: dict[str, ImageFile] = dataclasses.field(default_factory=dict)  # by digest

    @property
    def digest(self) -> str:
        """Digest of everything the features depend on, for fingerprints: weights, configuration, processing."""
        return hashlib.sha256(json.dumps(self.cache.identity, sort_keys=True).encode()).hexdigest()

    @property
    def tokens(self) -> ImageTokens:
        return ImageTokens(self.config.tokens, self.cache)

    def take(self, images: Iterable[ImageFile]) -> None:
        """Registers images whose features will be needed."""
        self.waiting |= {image.digest: image for image in images}

    def compute(self, config: Config) -> None:
        """Computes the features missing from the cache, on this host's devices, and reports their size."""
        images = list(self.waiting.values())
        if not images:
            return

        def encoder() -> Encoder:
            with build.naming_option(self.option, self.path), reported(f"loading the vision encoder of {self.path}"):
                devices = jax.local_devices()[: 1 if config.run.devices == "single" else None]
                return on_devices(load_encoder(self.path)[1], self.config, devices)

        with first_goes_first("features of images"):
            self.cache.refresh()
            image_features(images, cache=self.cache, encoder=encoder, processing=self.processing, say=self.say)
        self.waiting = {}

    def expanded(self, text: str, tokenizer: Any) -> str:
        """A prompt's text with placeholders for the tokens of its images."""
        return image_marks(tokenizer).expanded(text, self.config.tokens)

    def shown(
        self, config: Config, ids: Sequence[np.ndarray], prompts: Sequence[Shows], tokenizer: Any
    ) -> list[PromptImages | None]:
        """The images of each prompt with their features; `ids` are the remaining token ids of its `expanded` text.

        Raises `ConfigError` naming a prompt in which truncation has cut an image.
        """
        found = []
        for one, prompt in zip(ids, prompts, strict=True):
            try:
                found.append(self.tokens.shown(one, prompt.images, tokenizer))
            except BadRow as problem:
                raise ConfigError(f"{prompt.uid}: {problem} (data.max_prompt_length)") from problem
            self.take(prompt.images)
        self.compute(config)
        return found


def has_encoder(config: Config, path: str, *, name: str) -> bool:
    """Whether the model folder of the option `name`, or the base of an adapter, has a vision encoder. Raises `ConfigError`."""
    path = build.require_model(config, path, name)
    with build.naming_option(name, path):
        return reads_images(load_config(path))


class Shows(Protocol):
    """A prompt that may show images: a preference, or a prompt to be completed."""

    @property
    def uid(self) -> str: ...
    @property
    def images(self) -> tuple[ImageFile, ...]: ...


def encoder_for(
    config: Config, path: str | None, tokenizer: Any, *sets: Sequence[Shows], name: str, say: Callable[[str], None] = say_once
) -> VisionConfig | None:
    """The encoder that reads images in prompts, in the folder `path` of the option `name`; None if no prompt shows an image.

    Prints which case applies. Reads no weights. Raises `ConfigError`, naming the first row with an image, if the folder has no
    encoder, and for options that do not support rows with images yet.
    """
    prompts = [one for every in sets for one in every]
    showing = [one for one in prompts if one.images]
    there = path is not None and has_encoder(config, path, name=name)
    if not showing:
        if there:
            say(f"no prompt shows an image: {path} is read as its text model, without its vision encoder")
        return None
    if path is None or not there:
        raise ConfigError(f"{name}: {no_encoder(showing[0].uid, path or 'a new model')}")
    found, _ = checked(config, path, tokenizer, name=name)
    say(
        f"{len(showing):,} of {len(prompts):,} prompts show images: {found.tokens} tokens each, read by the vision encoder of "
        f"{path}, which stays frozen"
    )
    return found


def vision_of(
    config: Config, path: str | None, tokenizer: Any, *sets: Sequence[Shows], name: str, say: Callable[[str], None] = say_once
) -> Vision | None:
    """The encoder of `encoder_for`, opened."""
    if encoder_for(config, path, tokenizer, *sets, name=name, say=say) is None or path is None:
        return None
    return open_vision(config, path, tokenizer, name=name, say=say)


def open_vision(config: Config, path: str, tokenizer: Any, *, name: str, say: Callable[[str], None] = say_once) -> Vision:
    """The encoder of a model folder, checked against the tokenizer and the image processing. Reads its weights once.

    Raises `ConfigError` naming the option.
    """
    found, processing = checked(config, path, tokenizer, name=name)
    with build.naming_option(name, path), reported(f"reading the vision encoder of {path}"):
        digest = encoder_digest(path)
    cache = open_features(config.features_cache(), digest, found, processing)
    return Vision(path, name, found, processing, cache, say)


def checked(config: Config, path: str, tokenizer: Any, *, name: str) -> tuple[VisionConfig, Processing]:
    """Configuration of a folder's encoder, and its image processing. Reads no weights. Raises like `open_vision`."""
    check_mesh(config)
    with build.naming_option(name, path):
        hf = load_config(path)
        found, processing = encoder_settings(model_folder(path), hf)
        marks = image_marks(tokenizer)
        soft, known = tokenizer.convert_tokens_to_ids(marks.soft), hf.get("image_token_index", hf.get("image_token_id"))
        if known is not None and known != soft:
            raise ValueError(f"the tokenizer's {marks.soft} is {soft}, and config.json has image_token_index {known}")
    return found, processing


def check_same_encoder(config: Config, vision: Vision | None, path: str, *, name: str) -> None:
    """Raises `ConfigError` if `path` has another encoder than the policy: rows hold the features of only one."""
    if vision is None:
        return
    there = has_encoder(config, path, name=name)
    with build.naming_option(name, path), reported(f"reading the vision encoder of {path}"):
        if not there or encoder_digest(path) != vision.cache.identity["encoder"]:
            raise ConfigError(f"{name}: {path} and {vision.path} have different vision encoders, but must share one")


def encode_shown(config: Config, preferences: PreferenceSet, tokenizer: Any, vision: Vision | None) -> EncodedSet:
    """Like `splits.encode_split`; `vision` registers the images of the kept rows."""
    encoded = splits.encode_split(config, preferences, tokenizer, None if vision is None else vision.tokens)
    if vision is not None:
        vision.take(image for one in splits.only_kept(preferences, encoded) for image in one.images)
    return encoded
