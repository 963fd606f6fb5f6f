"""A model's `generation_config.json`: sampling settings and stop tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.models.fields import Fields
from dpo_jax.untrusted import read_object

GENERATION = "generation_config.json"
FLOATS = ("float32", "bfloat16", "float16")


def generation_config(folder: Path) -> dict[str, Any] | None:
    """The settings in a model folder, None if it has none. Raises `Unreadable` naming the file if it is unusable."""
    file = folder / GENERATION
    if not file.is_file():
        return None
    content = read_object(file, remedy="delete it, or fetch it again")
    eos_ids(content, file)
    return content


def eos_ids(settings: Mapping[str, Any], file: Path) -> list[int]:
    """`eos_token_id` as a list, empty if there is none. Raises `Unreadable` naming the file for an invalid token id."""
    return Fields(settings, file).token_ids("eos_token_id")


def end_tokens(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """All stop tokens of a model, from its `config.json` and from the `generation_config.json` beside it."""
    file, text = folder / "config.json", config.get("text_config")
    found = {*eos_ids(config, file), *eos_ids(generation_config(folder) or {}, folder / GENERATION)}
    return sorted(found | {*eos_ids(text if isinstance(text, Mapping) else {}, file)})


def float_type(config: Mapping[str, Any]) -> str:
    """The type of a model's weights in its `config.json` (`dtype`, formerly `torch_dtype`): float32, bfloat16 or float16.

    float32 if it names none or another. Weights that a training run keeps exact for its next stage have the type of the model
    that they come from (`source_dtype`).
    """
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, Mapping) else [config]
    names = ("source_dtype", "dtype", "torch_dtype")
    found = next((str(part[name]) for part in parts for name in names if part.get(name)), "").removeprefix("torch.")
    return found if found in FLOATS else "float32"
