"""Read and write Hugging Face model folders: `config.json` and safetensors, one file or sharded with an index.

Only safetensors is read, because pickled weights can run code. Every tensor of a checkpoint is used exactly once, with its
shape checked; a tensor that is missing, unused or of the wrong shape is an error that names it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.adapter import Adapter, read_adapter, resumed
from dpo_jax.models.attention_paths import attention_path
from dpo_jax.models.checkpoint_stream import Piece, assemble, path_of
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import WeightsDigest, shares
from dpo_jax.models.families import decoder_config, family_of
from dpo_jax.models.folder import ADAPTER, adapter_base, check_kind, is_scorer, read_config
from dpo_jax.models.generation import GENERATION, generation_config
from dpo_jax.models.generation import end_tokens as end_tokens_of
from dpo_jax.models.hf_settings import older_rotary_keys
from dpo_jax.models.hub import model_folder, resolve
from dpo_jax.models.tensors import Tensor, contents, tensors
from dpo_jax.models.weights import INDEX, Checkpoint, StoredArray, write_shards
from dpo_jax.types import Model, Variables, init_shapes
from dpo_jax.untrusted import read_text
from dpo_jax.writing import write_text

WEIGHTS_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def load_config(path: str | Path) -> dict[str, Any]:
    """The content of a model's `config.json`. Raises FileNotFoundError, or `Unreadable` naming the file."""
    return read_config(model_folder(path))


def end_tokens(path: str | Path) -> list[int]:
    """All stop tokens of the model, from its `config.json` and `generation_config.json`, in ascending order.

    Chat models have several: for the end of a turn (`<end_of_turn>`, `<|eot_id|>`) and for the end of the text. Raises
    `Unreadable` naming the file.
    """
    folder = model_folder(path)
    return end_tokens_of(folder, read_config(folder))


def load_hf(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "auto",
    images: bool = False,
) -> tuple[Model, Variables]:
    """Load a Hugging Face model folder or Hub id. Returns `(model, variables)`; `dtype` and `remat` as in `make_model`.

    A folder of LoRA weights, as PEFT writes them, gives its base model with the adapter merged in. A Gemma 3 with a vision
    encoder gives the text model; with `images`, the model that reads images, whose encoder `load_encoder` loads. Weights are
    converted to `param_dtype`. `attention` names a path of `attention_paths`, by default this platform's.

    Raises ValueError or FileNotFoundError naming file and tensor for an unsupported configuration, missing, unknown or
    mis-shaped tensors, pickled weights, and git-lfs pointers; `Unreadable`, a ValueError, for damaged files.

    >>> decoder, weights = load_hf(folder)  # or load_hf("EleutherAI/pythia-70m")
    >>> decoder.config.family, sorted(weights)
    ('llama', ['params'])
    """
    folder = resolve(path)
    content = load_config(folder)
    try:
        check_kind(folder, content, scorer=False)
    except ValueError as error:
        raise ValueError(f"{folder} {error}") from error
    config = decoder_config(content, where=folder / "config.json", images=images)
    path_ = attention_path(attention, platform=jax.default_backend(), config=config, dtype=dtype)
    model = make_model(config, dtype=dtype, remat=remat, attention=path_)
    variables = assemble(variable_shapes(model, param_dtype), read_weights(folder, model), put=jnp.asarray)
    return model, variables


def variable_shapes(model: Model, dtype: Any = jnp.float32) -> Variables:
    """The tree of `model.init` as `ShapeDtypeStruct`s of `dtype`. Nothing is computed."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), init_shapes(model))


def read_weights(path: str | Path, model: Model, *, digest: WeightsDigest | None = None, merge: bool = True) -> Iterator[Piece]:
    """The weights of a model folder, one checkpoint tensor at a time, under our names and in our layout.

    Arrays are still in their files (`weights.StoredArray`): taking a part of one reads only that part. Tensors that `digest`
    covers (with several hosts, a share for each) and those of an adapter's folder are read whole. Only one tensor is in memory
    at a time; for a mixture of experts, the tensors of one layer. Names are checked before the first is read, and errors are
    those of `load_hf`. For an adapter's folder `digest` covers base and adapter. With `merge` they come as one model, otherwise
    as the base and then the collection "lora" of `models.lora`. Raises ValueError at the end if the base is not the one on
    which the adapter was trained, provided that its folder records it (ours do).
    """
    folder, config = resolve(path), model.config
    adapter = None if adapter_base(folder) is None else read_adapter(folder, config)
    digest = WeightsDigest() if digest is None and adapter is not None else digest
    number, hosts = (0, 1) if digest is None else digest.share
    shapes = {path_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(variable_shapes(model))}
    table = tensors(config)
    sizes = [sum(math.prod(shapes[path_]) for path_ in _paths(tensor)) for tensor in table]
    with Checkpoint(model_folder(path), contents(config)) as checkpoint:
        checkpoint.check_names()
        for tensor, host in zip(table, shares(sizes, hosts), strict=True):
            stack = [shapes[path_] for path_ in _paths(tensor)]
            one = [shape[1:] for shape in stack] if tensor.stacked else stack
            for layer in range(stack[0][0]) if tensor.stacked else [None]:
                if adapter is not None or (digest is not None and host == number):
                    yield from _read_whole(checkpoint, tensor, layer, one, config, digest=digest, adapter=adapter, merge=merge)
                    continue
                for which, path_ in enumerate(_paths(tensor)):
                    piece = Piece(path_, layer, StoredArray(checkpoint, tensor, layer, which, one))
                    if digest is not None:
                        digest.note(piece)
                    yield piece
        if config.tied and not is_scorer(config.hf):  # a head that was left beside a score is not read
            checkpoint.check_tied_head((config.vocab_size, config.width), share=(number, hosts))
    if adapter is not None and digest is not None:
        adapter.check_base(digest.hexdigest())
        adapter.digest_into(digest)
        if not merge:
            yield from resumed(adapter, config)[1]


def _paths(tensor: Tensor) -> list[tuple[str, ...]]:
    return [("params", *name.split("/")) for name in tensor.paths]


def _read_whole(
    checkpoint: Checkpoint,
    tensor: Tensor,
    layer: int | None,
    ours: Sequence[tuple[int, ...]],
    config: DecoderConfig,
    *,
    digest: WeightsDigest | None,
    adapter: Adapter | None,
    merge: bool,
) -> Iterator[Piece]:
    """The arrays of one layer in a tensor, with the update of `adapter`; `digest` covers what is stored."""
    names, paths = tensor.names(layer), _paths(tensor)
    loaded = [checkpoint.get(name, tensor.hf_shape(ours)) for name in names]
    if digest is not None:
        for path, array in zip(paths, tensor.loaded(loaded), strict=True):
            digest.add(Piece(path, layer, array))
    if adapter is not None:
        both = zip(names, loaded, strict=True)
        loaded = [adapter.applied(name, x, config) if merge else adapter.rounded(x) for name, x in both]
    for path, array in zip(paths, tensor.loaded(loaded), strict=True):
        yield Piece(path, layer, array)


def save_hf(
    path: str | Path,
    model: Model,
    variables: Variables,
    *,
    dtype: Any = None,
    source: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
    write: bool = True,
    others: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write `config.json` and safetensors that Hugging Face's `AutoModelForCausalLM` loads. Returns the folder.

    `dtype` converts the weights (None: to the smallest type that holds all of theirs). `source` is the folder or Hub id of the
    model that they were trained from; its `generation_config.json`, if any, is copied. `settings` are added to `config.json`.
    Files are written next to the folder, read back, compared and only then moved in, so that a kill leaves no half-written
    model. In a folder that holds an earlier model, its files are replaced and others, such as a tokenizer, stay. Weights that
    are sharded over several hosts are collected tensor by tensor with `fetch`: all hosts call this, one with `write`. `others`
    are further tensors to store unchanged, in a larger type where `dtype` would change their values: those of the vision
    encoder (`encoder_in_hf_form`), which a model that reads images needs. Raises FileExistsError for a folder that holds
    something else; ValueError if the variables do not fit the model or hold more than "params", which would be lost, and for a
    model of your own, which has no Hugging Face form; OverflowError, naming the tensor, for values too large for `dtype`.

    >>> decoder, weights = load_hf(folder)
    >>> sorted(file.name for file in save_hf("copy", decoder, weights).iterdir())
    ['config.json', 'model.safetensors']
    """
    if not isinstance(model.config, DecoderConfig):
        raise ValueError(
            "save_hf writes the model families that load_hf reads, but this model has no such config. Save "
            "its variables as they are, for instance with orbax.checkpoint or numpy.savez"
        )
    folder = Path(path).expanduser()
    # Only the host that writes looks: a network disk may tell the others for a minute that what they looked for is not there.
    if write and folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not a model folder; choose another place to save the model")
    if write and (folder / ADAPTER).is_file():
        raise FileExistsError(f"{folder} holds an adapter (LoRA); choose another place to save the model")
    if lost := sorted({*variables} - {"params"}):
        raise ValueError(
            f"save_hf writes the collection params, and {', '.join(lost)} would be lost: write LoRA weights with "
            "models.adapter.write_adapter, and save a scalar head or another collection by itself (numpy.savez); then give "
            "{'params': variables['params']}"
        )
    config = model.config
    expected = flatten(variable_shapes(model)["params"])
    flat = flatten(variables["params"])
    for name in sorted(expected.keys() | flat.keys()):
        found, asked = (_shape(tree, name) for tree in (flat, expected))
        if found != asked:
            raise ValueError(f"parameter {name} does not fit this {config.family}: expected {asked}, found {found}")
    dtype = np.dtype(dtype or functools.reduce(np.promote_types, (leaf.dtype for leaf in flat.values())))
    if config.image_width and not others:
        raise ValueError("a model that reads images is written with its vision encoder: give others=encoder_in_hf_form(...)")
    sizes, get = in_hf_form(tensors(config), flat, dtype, fetch)
    if not write:
        for name in sizes:
            get(name)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary) / "model"
        new.mkdir()
        family = family_of(config)
        older = older_rotary_keys(config.hf, family.defaults)
        content = older | config.hf | {"architectures": [family.architecture], "dtype": dtype.name}
        content = {name: value for name, value in content.items() if name not in ("torch_dtype", "source_dtype")}
        content |= settings or {}
        write_text(new / "config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
        known = None if source is None else model_folder(source)
        generation = None if known is None or generation_config(known) is None else known / GENERATION
        if generation is not None:
            write_text(new / GENERATION, read_text(generation))
        kept = {name: _unchanged(array, dtype) for name, array in (others or {}).items()}
        sizes |= {name: array.nbytes for name, array in kept.items()}
        write_shards(new, sizes, lambda name: kept[name] if name in kept else get(name), max_shard_bytes=max_shard_bytes)
        _move_in(new, folder, stale=() if source is None else (GENERATION,))
    return folder


def in_hf_form(
    table: list[Tensor], flat: Mapping[str, Any], dtype: np.dtype, fetch: Callable[[Any], np.ndarray]
) -> tuple[dict[str, int], Callable[[str], np.ndarray]]:
    """({name: bytes}, `get(name)`) of the checkpoint's tensors, in an order that is the same on all hosts."""
    lines: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    sizes: dict[str, int] = {}
    for tensor in table:
        layers = flat[tensor.paths[0]].shape[0] if tensor.stacked else 1
        named = tensor.of_layers(layers)
        for number, (name, layer) in enumerate(named):
            expert = (number % tensor.experts,) if tensor.experts else ()
            lines[name] = tensor, (() if layer is None else (layer, *expert))
            sizes[name] = sum(flat[p].size for p in tensor.paths) // len(named) * dtype.itemsize

    def get(name: str) -> np.ndarray:
        tensor, place = lines[name]
        return tensor.layout.to_hf([cast(fetch(flat[p][place] if place else flat[p]), dtype, name) for p in tensor.paths])

    return sizes, get


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The tensor `name` in another type. Raises OverflowError for values too large for it."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # looked for below
        found = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(found)
    if lost.any():
        largest = float(np.abs(array[lost].astype(np.float64)).max())
        raise OverflowError(
            f"tensor {name}: {int(lost.sum()):,} values are too large for {dtype.name}, the largest {largest:g} "
            f"(its limit is {float(jnp.finfo(dtype).max):g}); use bfloat16 or float32"
        )
    return found


def _unchanged(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array in `dtype` if that holds its values exactly, else unchanged."""
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    return found if np.array_equal(found.astype(array.dtype), array) else array


def _move_in(new: Path, folder: Path, *, stale: Sequence[str] = ()) -> None:
    if not folder.exists():
        os.replace(new, folder)
        return
    # Weights go first and come last, the index last of all: a kill in between leaves a folder that is refused, not a mixture.
    weights = [file for file in folder.iterdir() if WEIGHTS_FILE.fullmatch(file.name)]
    for file in [folder / INDEX, *weights, *(folder / name for name in stale if not (new / name).exists())]:
        file.unlink(missing_ok=True)
    last = [*sorted(file.name for file in new.iterdir() if WEIGHTS_FILE.fullmatch(file.name)), INDEX]
    for file in sorted(new.iterdir(), key=lambda file: last.index(file.name) if file.name in last else -1):
        os.replace(file, folder / file.name)


def _shape(flat: Mapping[str, Any], path: str) -> str:
    return str(tuple(np.shape(flat[path]))) if path in flat else "nothing"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in flatten(sub, f"{prefix}/{name}" if prefix else name).items()}
