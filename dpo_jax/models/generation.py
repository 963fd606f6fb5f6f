"""A model's `generation_config.json`: with which settings others sample from it, and at which tokens it stops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.models.folder import read_object

GENERATION = "generation_config.json"
FLOATS = ("float32", "bfloat16", "float16")


def generation_config(folder: Path) -> dict[str, Any] | None:
    """The settings in a model folder, None if it has none. Raises ValueError naming the file where it cannot be used."""
    file = folder / GENERATION
    if not file.is_file():
        return None
    content = read_object(file)
    eos_ids(content, file)
    return content


def eos_ids(settings: Mapping[str, Any], file: Path) -> list[int]:
    """`eos_token_id` as a list, empty if there is none. Raises ValueError naming the file for what is no token id."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if bad := [one for one in ids if isinstance(one, bool) or not isinstance(one, int)]:
        raise ValueError(f"{file}: eos_token_id is {bad[0]!r}, expected a token id or a list of them")
    return ids


def float_type(config: Mapping[str, Any]) -> str:
    """The type of a model's weights by its `config.json` (`dtype`, formerly `torch_dtype`): float32, bfloat16 or float16.

    float32 where it names none or another. Weights that a training run keeps exact for its next stage are of the type of the
    model that they come from (`source_dtype`).
    """
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, Mapping) else [config]
    names = ("source_dtype", "dtype", "torch_dtype")
    found = next((str(part[name]) for part in parts for name in names if part.get(name)), "").removeprefix("torch.")
    return found if found in FLOATS else "float32"
