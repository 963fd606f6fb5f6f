"""Checks of a model folder's vision encoder against its image processing and the mesh. Needs no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.data.images import PROCESSOR, Processing, load_processing
from dpo_jax.models.vision_config import VisionConfig, vision_settings


def encoder_settings(folder: Path, hf: Mapping[str, Any]) -> tuple[VisionConfig, Processing]:
    """Configuration of the encoder in `folder`, whose config.json has the content `hf`, and its image processing.

    Raises ValueError if the two differ in pixels or tokens.
    """
    found = vision_settings(hf, folder / "config.json")
    processing = load_processing(folder, tokens=found.tokens)
    if (processing.height, processing.width, processing.tokens) != (found.image_size, found.image_size, found.tokens):
        without = "" if (folder / PROCESSOR).is_file() else " (missing; these are Gemma 3's)"
        raise ValueError(
            f"an image becomes {processing.height} x {processing.width} pixels and {processing.tokens} tokens by {PROCESSOR}"
            f"{without}, but {found.image_size} x {found.image_size} and {found.tokens} by config.json"
        )
    return found, processing


def check_mesh(config: Config) -> None:
    """Raises `ConfigError` for a mesh over which rows with images cannot be sharded."""
    if config.run.devices == "mesh" and config.mesh.context > 1:
        raise ConfigError(f"mesh.context: {config.mesh.context} splits rows, but rows with images must stay whole: use 1")


def no_encoder(where: str, folder: str) -> str:
    """A message about a model that has no encoder for the image in a row."""
    return (
        f"{where}: the prompt shows an image, but {folder} has no vision encoder: name the folder of a Gemma 3 that reads "
        "images, or leave out the rows with images"
    )
