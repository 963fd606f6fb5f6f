"""The vision encoder in a model's Hugging Face folder: read it, and write it beside the decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.checkpoint_stream import Piece, assemble, path_of
from dpo_jax.models.digest import WeightsDigest
from dpo_jax.models.folder import read_config
from dpo_jax.models.hf import flatten, in_hf_form
from dpo_jax.models.hub import model_folder
from dpo_jax.models.siglip import ROOT, encoder_shapes, encoder_tensors
from dpo_jax.models.tensors import Contents
from dpo_jax.models.vision_config import VisionConfig, vision_settings
from dpo_jax.models.weights import Checkpoint
from dpo_jax.types import Variables


def load_encoder(path: str | Path) -> tuple[VisionConfig, Variables]:
    """The vision encoder of a Gemma 3 folder or Hub id, float32, for `siglip.encode_images`.

    Raises what `load_hf` raises.
    """
    folder = model_folder(path)
    config = vision_settings(read_config(folder), folder / "config.json")
    return config, assemble(encoder_shapes(config), _pieces(folder, config), put=jnp.asarray)


def encoder_digest(path: str | Path) -> str:
    """The `weights_digest` of the result of `load_encoder`, whatever the type in the files; one tensor in memory at a time."""
    folder, digest = model_folder(path), WeightsDigest()
    for piece in _pieces(folder, vision_settings(read_config(folder), folder / "config.json")):
        digest.add(piece._replace(array=np.asarray(piece.array, np.float32)))
    return digest.hexdigest()


def encoder_in_hf_form(config: VisionConfig, variables: Variables) -> dict[str, np.ndarray]:
    """The encoder's tensors under their checkpoint names, for `save_hf(others=...)`."""
    sizes, get = in_hf_form(encoder_tensors(config), flatten(variables["params"]), np.dtype(np.float32), np.asarray)
    return {name: get(name) for name in sizes}


def _known(name: str) -> str | None:
    """The official name of a tensor, of which transformers 5 omits a part; None for one of the language model."""
    known = re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", f"{ROOT}.", name)
    return known if known.startswith(ROOT) else None


def _pieces(folder: Path, config: VisionConfig) -> Iterator[Piece]:
    shapes = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(encoder_shapes(config))}
    table = encoder_tensors(config)
    with Checkpoint(folder, Contents("vision encoder", table, config.layers, _known)) as checkpoint:
        checkpoint.check_names()
        for tensor in table:
            path = "params", *tensor.paths[0].split("/")
            one = shapes[path][1:] if tensor.stacked else shapes[path]
            for name, layer in tensor.of_layers(config.layers):
                [loaded] = tensor.loaded([checkpoint.get(name, tensor.hf_shape([one]))])
                yield Piece(path, layer, loaded)
