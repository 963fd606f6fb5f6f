"""The safetensors files of a model folder: index, checked reading and verified writing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dpo_jax.models.fields import shown
from dpo_jax.models.folder import refuse_adapter
from dpo_jax.models.tensor_layouts import Box, Tensor
from dpo_jax.models.tensors import Contents
from dpo_jax.untrusted import Unreadable, read_object, reading
from dpo_jax.writing import naming, write_text

INDEX = "model.safetensors.index.json"
_AGAIN = "fetch or save it again"
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SHOWN = 200  # characters of a name
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


class Checkpoint:
    """The tensors of a folder under the names of our tables, across all its files."""

    def __init__(self, folder: Path, contents: Contents):
        self.contents = contents
        self.expected = {name: t for t in contents.table for name, _ in t.of_layers(contents.layers)}
        aliases = {t.alias: t.name for t in contents.table if t.alias}
        self.where: dict[str, tuple[Path, str]] = {}
        self.handles: dict[Path, Any] = {}
        for file in _weight_files(folder):
            self.handles[file] = open_safetensors(file)
            for name in self.handles[file].keys():  # noqa: SIM118 (not a dict)
                known = contents.known(name)
                if known is None:
                    continue
                known = aliases.get(known, known)
                if known in self.where:
                    raise ValueError(f"tensor {name} of {file} is also in {self.where[known][0]} (as {self.where[known][1]})")
                self.where[known] = (file, name)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.handles.clear()

    def check_names(self) -> None:
        what = self.contents.what
        missing = sorted(self.expected.keys() - self.where.keys())
        unknown = sorted(self.where.keys() - self.expected.keys() - self.contents.spare)
        files = ", ".join(str(file) for file in self.handles)
        if missing:
            raise ValueError(f"{_some(missing)} missing in {files}: not a complete {what} of this config.json")
        if unknown:
            named = [f"{self.where[name][1]} in {self.where[name][0]}" for name in unknown]
            raise ValueError(f"{_some(named)}: no such tensor in a {what} of this config.json")

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> np.dtype:
        """The type of a tensor. ValueError if its shape is wrong or its type is not floating point."""
        file, stored = self.where[name]
        with reading(f"{file}: tensor {stored}", remedy=_AGAIN):
            header = self.handles[file].get_slice(stored)
            found, kind = tuple(header.get_shape()), str(header.get_dtype())
        if kind not in _FLOATS:
            raise ValueError(
                f"tensor {stored} in {file} is {kind}; expected one of {', '.join(_FLOATS)} (quantized weights are not read)"
            )
        if found != shape:
            raise ValueError(f"tensor {stored} in {file} has shape {found}; this config.json asks for {shape}")
        return np.dtype(_FLOATS[kind])

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self.check_tensor(name, shape)
        return self.read(name)

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A checked tensor, or a part of it, reading no more than that."""
        file, stored = self.where[name]
        with reading(f"{file}: tensor {stored}", remedy=_AGAIN):
            handle = self.handles[file]
            return handle.get_tensor(stored) if box is None else handle.get_slice(stored)[box]

    def check_tied_head(self, shape: tuple[int, ...], *, share: tuple[int, int] = (0, 1)) -> None:
        """Checks a repeated tied head: it must equal the embedding, because a different one would be lost silently.

        With `(n, hosts)` the n-th host checks the n-th part.
        """
        embedding, (number, hosts) = self.contents.table[0].name, share
        rows = slice(number * shape[0] // hosts, (number + 1) * shape[0] // hosts)
        mine = (rows, slice(0, shape[1]))
        for name in self.contents.spare & self.where.keys():
            for one in (name, embedding):
                self.check_tensor(one, shape)
            if rows.start < rows.stop and not np.array_equal(self.read(name, mine), self.read(embedding, mine)):
                file, stored = self.where[name]
                raise ValueError(f"tensor {stored} in {file} differs from the embedding although config.json ties them")


class StoredArray:
    """One of our arrays of one layer, still in its file: `array[box]` reads that part, `np.asarray(array)` all of it.

    It can be read while the checkpoint is open.
    """

    def __init__(self, checkpoint: Checkpoint, tensor: Tensor, layer: int | None, which: int, ours: Sequence[tuple[int, ...]]):
        """`which` is its index among the tensor's arrays, whose shapes are `ours`. Raises what `check_tensor` raises."""
        self.shape = ours[which]
        self._checkpoint, self._tensor, self._which = checkpoint, tensor, which
        self._names, self._of_one = tensor.names(layer), tensor.hf_shape(ours)
        [self.dtype] = {checkpoint.check_tensor(name, self._of_one) for name in self._names}

    def __getitem__(self, box: Box) -> np.ndarray:
        if not self._tensor.experts:
            return self._part(self._names[0], box)
        return np.stack([self._part(name, box[1:]) for name in self._names[box[0]]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[tuple(slice(0, length) for length in self.shape)], dtype)

    def _part(self, name: str, box: Box) -> np.ndarray:
        read = functools.partial(self._checkpoint.read, name)
        return self._tensor.layout.part(read, self._of_one, self._which, box)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in _shards(index)]
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if len(files) > 1 and (folder / "model.safetensors") in files:
        files = [folder / "model.safetensors"]
    if not files or all(file.name.startswith("adapter") for file in files):
        refuse_adapter(folder)
    if len(files) > 1:
        raise FileNotFoundError(f"{folder} has {len(files)} safetensors files but no {INDEX}; fetch it too")
    if not files:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
        found = f"only {_some(pickled)}, which can run code when read; convert it to safetensors" if pickled else "no weights"
        raise FileNotFoundError(f"{folder} holds {found} (expected model.safetensors or {INDEX})")
    return files


def _shards(index: Path) -> list[str]:
    """The files named in an index, all in its folder."""
    weight_map = read_object(index, remedy=_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Unreadable(f"{index}: weight_map = {shown(weight_map)} is not an object of tensors and their files; {_AGAIN}")
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        raise Unreadable(f"{index}: {wrong[0]} = {shown(weight_map[wrong[0]])} is not the name of a file; {_AGAIN}")
    names = sorted(set(weight_map.values()))
    folder = index.parent
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names {_some(absent)}, not in {folder}; fetch the folder again")
    return names


def open_safetensors(file: Path) -> Any:
    """A safetensors file with its header checked. Raises `Unreadable`, and ValueError for a git-lfs pointer."""
    with file.open("rb") as stream:
        if stream.read(42).startswith(b"version https://git-lfs.github.com"):
            raise ValueError(f"{file} is a git-lfs pointer, not weights; fetch them with: git lfs pull")
    with reading(f"{file} is not a complete safetensors file", remedy=_AGAIN):
        return safe_open(file, framework="np")


def _some(names: list[str]) -> str:
    listed = ", ".join(name[:_SHOWN] for name in names[:5])
    return f"{listed} and {len(names) - 5} more" if len(names) > 5 else listed


def write_shards(folder: Path, sizes: Mapping[str, int], get: Callable[[str], np.ndarray], *, max_shard_bytes: int) -> None:
    """Write tensors (bytes by name; `get` makes one) as model.safetensors, or above the limit as numbered shards with an index.

    Every file is read back and compared bit by bit. Raises OSError naming a tensor that differs.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    for file, names in zip(files, shards, strict=True):
        # safetensors 0.8 writes the wrong values for a transposed view, without an error.
        batch = {name: np.ascontiguousarray(get(name)) for name in names}
        with naming(folder / file):
            (folder / file).touch()
            mode = (folder / file).stat().st_mode  # permissions as by the umask; safetensors lets only the owner read
            save_file(batch, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(mode)
        with safe_open(folder / file, framework="np") as written:
            for name, array in batch.items():
                back = written.get_tensor(name)
                if back.dtype != array.dtype or back.shape != array.shape or back.tobytes() != array.tobytes():
                    raise OSError(
                        f"tensor {name} reads back differently from {folder / file}: the disk or safetensors is at fault"
                    )
