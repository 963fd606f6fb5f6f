"""Read and write Hugging Face model folders: `config.json` and safetensors, one file or sharded with an index.

Nothing but safetensors is read: pickled weights can run code. Every tensor of a checkpoint is used exactly once, with its shape
checked; what is missing, left over or of the wrong shape is an error that names it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.attention_paths import attention_path
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import ARCHITECTURES, decoder_config
from dpo_jax.models.pieces import Piece, assemble, path_of
from dpo_jax.models.tensors import Tensor, tensors
from dpo_jax.models.weights import INDEX, Checkpoint, write_shards
from dpo_jax.types import Model, Variables


def resolve(path: str | Path) -> Path:
    """The folder of a model: `path` itself, or a download of the Hub id "organization/name" (safetensors and JSON only).

    Raises FileNotFoundError if it is neither a folder nor an id that can be fetched.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{path} is a file; give the model's folder, which holds config.json and *.safetensors")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise FileNotFoundError(f"no model folder {path}, and it does not look like a Hub id (organization/name)")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # the hub client raises its own, requests' and OSError's kinds
        raise FileNotFoundError(f"{path} is no folder here and could not be fetched from the Hub: {error}") from error


def load_config(path: str | Path) -> dict[str, Any]:
    """The content of a model's `config.json`. Raises FileNotFoundError or ValueError naming the file."""
    file = resolve(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a model folder holds config.json and *.safetensors")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where a JSON object is expected")
    return content


def load_hf(
    path: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, remat: str = "none", attention: str = "auto"
) -> tuple[Model, Variables]:
    """Load a Hugging Face model folder or Hub id. Returns `(model, variables)`; `dtype` and `remat` as in `make_model`.

    Weights are converted to `param_dtype`. `attention` names a path of `attention_paths`, by default this platform's.

    Raises ValueError or FileNotFoundError naming file and tensor for an unsupported configuration, missing, unknown or
    mis-shaped tensors, pickled weights, and git-lfs pointers.
    """
    folder = resolve(path)
    config = decoder_config(load_config(folder))
    path_ = attention_path(attention, platform=jax.default_backend(), config=config, dtype=dtype)
    model = make_model(config, dtype=dtype, remat=remat, attention=path_)
    variables = assemble(variable_shapes(model, param_dtype), read_weights(folder, model), put=jnp.asarray)
    return model, variables


def variable_shapes(model: Model, dtype: Any = jnp.float32) -> Variables:
    """The tree of `model.init` as `ShapeDtypeStruct`s of `dtype`. Nothing is computed."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))  # a key outside would be compiled and computed
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def read_weights(path: str | Path, model: Model) -> Iterator[Piece]:
    """The weights of a model folder, checkpoint tensor by checkpoint tensor, under our names and in our orientation.

    No more than one tensor is in memory at a time. Names are checked before the first, and errors are those of `load_hf`.
    """
    config = model.config
    shapes = {path_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(variable_shapes(model))}
    with Checkpoint(resolve(path), config) as checkpoint:
        checkpoint.check_names()
        for tensor in tensors(config):
            paths = [("params", *name.split("/")) for name in tensor.paths]
            stack = [shapes[path] for path in paths]
            one = [shape[1:] for shape in stack] if tensor.stacked else stack
            for layer in range(stack[0][0]) if tensor.stacked else [None]:
                loaded = checkpoint.get(tensor.name.format(layer), tensor.layout.hf_shape(one))
                for path_, array in zip(paths, tensor.layout.to_ours(loaded), strict=True):
                    yield Piece(path_, layer, array)
        if config.tied:
            checkpoint.check_tied_head()


def save_hf(
    path: str | Path,
    model: Model,
    variables: Variables,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
    write: bool = True,
) -> Path:
    """Write `config.json` and safetensors that Hugging Face's `AutoModelForCausalLM` loads. Returns the folder.

    `dtype` converts the weights (None: as they are). Files are written next to the folder, read back, compared and only then
    moved in, so that a kill leaves no half-written model. In a folder that holds an earlier model its files are replaced and
    others, such as a tokenizer, stay. Weights that lie in pieces on several hosts are collected tensor by tensor with `fetch`:
    all hosts call this, and one with `write`. Raises FileExistsError for a folder that holds something else; ValueError if
    the variables do not fit the model.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not a model folder; choose another place to save the model")
    config = model.config
    expected = _flatten(variable_shapes(model)["params"])
    flat = _flatten(variables["params"])
    for name in sorted(expected.keys() | flat.keys()):
        found, asked = (_shape(tree, name) for tree in (flat, expected))
        if found != asked:
            raise ValueError(f"parameter {name} does not fit this {config.family}: {found} where {asked} is expected")
    dtype = np.dtype(dtype or flat["token_embedding"].dtype)
    sizes, get = _in_hf_form(tensors(config), flat, dtype, fetch)
    if not write:
        for name in sizes:
            get(name)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary) / "model"
        new.mkdir()
        content = config.hf | {"architectures": [ARCHITECTURES[config.family]], "dtype": dtype.name}
        content.pop("torch_dtype", None)
        (new / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_shards(new, sizes, get, max_shard_bytes=max_shard_bytes)
        _move_in(new, folder)
    return folder


def _in_hf_form(
    table: list[Tensor], flat: Mapping[str, Any], dtype: np.dtype, fetch: Callable[[Any], np.ndarray]
) -> tuple[dict[str, int], Callable[[str], np.ndarray]]:
    """({name: bytes}, `get(name)`) of the checkpoint's tensors, in the order in which all hosts take them."""
    lines: dict[str, tuple[Tensor, int | None]] = {}
    sizes: dict[str, int] = {}
    for tensor in table:
        for layer in range(flat[tensor.paths[0]].shape[0]) if tensor.stacked else [None]:
            name = tensor.name.format(layer)
            lines[name] = (tensor, layer)
            stack = flat[tensor.paths[0]].shape[0] if tensor.stacked else 1
            sizes[name] = sum(flat[p].size for p in tensor.paths) // stack * dtype.itemsize

    def get(name: str) -> np.ndarray:
        tensor, layer = lines[name]
        ours = [fetch(flat[p] if layer is None else flat[p][layer]).astype(dtype) for p in tensor.paths]
        return tensor.layout.to_hf(ours)

    return sizes, get


def _move_in(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(new, folder)
        return
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if not (new / stale.name).exists():
            stale.unlink(missing_ok=True)
    for file in sorted(new.iterdir()):
        os.replace(file, folder / file.name)


def _shape(flat: Mapping[str, Any], path: str) -> str:
    return str(tuple(np.shape(flat[path]))) if path in flat else "nothing"


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}/{name}" if prefix else name).items()}
