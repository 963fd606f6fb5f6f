"""The vision encoder in a Hugging Face folder of a model that reads images: read it, and write it beside the decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.checkpoint_stream import Piece, assemble, path_of
from dpo_jax.models.folder import read_config
from dpo_jax.models.hf import flatten, in_hf_form
from dpo_jax.models.hub import model_folder
from dpo_jax.models.siglip import ROOT, encoder_shapes, encoder_tensors
from dpo_jax.models.vision_config import VisionConfig, vision_settings
from dpo_jax.models.weights import open_safetensors, weight_files
from dpo_jax.types import Variables


def load_encoder(path: str | Path) -> tuple[VisionConfig, Variables]:
    """The vision encoder of a Gemma 3 folder or Hub id, float32, for `siglip.encode_images`.

    Raises what `load_hf` raises; ValueError, naming the tensor, for one that is missing, unknown or of another shape.
    """
    folder = model_folder(path)
    config = vision_settings(read_config(folder), folder / "config.json")
    return config, assemble(encoder_shapes(config), _pieces(folder, config), put=jnp.asarray)


def encoder_in_hf_form(config: VisionConfig, variables: Variables) -> dict[str, np.ndarray]:
    """The encoder's tensors under the names of a checkpoint, for `save_hf(others=...)`."""
    sizes, get = in_hf_form(encoder_tensors(config), flatten(variables["params"]), np.dtype(np.float32), np.asarray)
    return {name: get(name) for name in sizes}


def _pieces(folder: Path, config: VisionConfig) -> Iterator[Piece]:
    where: dict[str, tuple[Any, str]] = {}
    for file in weight_files(folder):
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            # transformers 4 and the official checkpoints have one more part in the name than transformers 5.
            known = re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", f"{ROOT}.", name)
            if known.startswith(ROOT):
                where[known] = handle, name
    shapes = {path_of(path)[1:]: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(encoder_shapes(config))}
    for tensor in encoder_tensors(config):
        [ours] = [tuple(path.split("/")) for path in tensor.paths]
        shape = shapes[ours][1:] if tensor.stacked else shapes[ours]
        for name, layer in tensor.of_layers(config.layers):
            if name not in where:
                raise ValueError(f"{folder}: tensor {name} is missing: not a complete vision encoder of this config.json")
            handle, stored = where.pop(name)
            array = handle.get_tensor(stored)
            if array.shape != tensor.hf_shape([shape]):
                raise ValueError(
                    f"{folder}: tensor {stored} has shape {array.shape}; this config.json asks for {tensor.hf_shape([shape])}"
                )
            [loaded] = tensor.loaded([array])
            yield Piece(("params", *ours), layer, loaded)
    if where:
        raise ValueError(f"{folder}: {sorted(where)[0]}: no such tensor in the vision encoder of this config.json")
