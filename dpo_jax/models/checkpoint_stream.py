"""Stream checkpoint tensors to devices one at a time, so that no host holds or reads the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dpo_jax.types import Variables

Path = tuple[str, ...]
Part = tuple[tuple[int, int], ...]
"""A box of an array: (first, end) along each axis. Hashable, unlike a tuple of slices in Python 3.11."""


class Sliceable(Protocol):
    """An array, or one still in its file: `array[slices]` reads that part, and `np.asarray(array)` all of it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, box: tuple[slice, ...], /) -> np.ndarray: ...
    def __array__(self) -> np.ndarray: ...


class Piece(NamedTuple):
    """One array of one layer, or one outside the layers. The layers of a parameter come in order."""

    path: Path  # ("params", "layers", "mlp", "up", "kernel")
    layer: int | None
    array: Sliceable  # to be read before the next piece is asked for


def pieces_of(variables: Variables) -> Iterator[Piece]:
    """All leaves of a tree, as whole pieces."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        yield Piece(path_of(path), None, np.asarray(leaf))


def path_of(keys: Sequence[Any]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def assemble(shapes: Variables, pieces: Iterable[Piece], *, put: Callable[[np.ndarray], Any]) -> Variables:
    """`assemble_parts` for whole arrays: `put(array)` returns the leaf."""
    return assemble_parts(
        shapes,
        pieces,
        parts=lambda path, shape: [tuple((0, length) for length in shape)],
        place=lambda path, boxes: put(*boxes.values()),
    )


def assemble_parts(
    shapes: Variables,
    pieces: Iterable[Piece],
    *,
    parts: Callable[[Path, tuple[int, ...]], Iterable[Part]],
    place: Callable[[Path, Mapping[Part, np.ndarray]], Any],
) -> Variables:
    """A tree like `shapes` (of `ShapeDtypeStruct`s), assembled from `pieces`.

    `parts(path, shape)` returns the boxes of a parameter that are needed here. As soon as they are complete,
    `place(path, {part: array})` returns the leaf, and they are freed. Arrays are converted to the types of `shapes`.

    Raises ValueError for a parameter that is unknown, incomplete or of another shape.
    """
    wanted = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    begun: dict[Path, tuple[dict[Part, np.ndarray], int]] = {}
    done: dict[Path, Any] = {}
    for path, layer, array in pieces:
        shape, dtype = wanted[path].shape, np.dtype(wanted[path].dtype)
        if array.shape != (shape if layer is None else shape[1:]):
            raise ValueError(f"{'.'.join(path)}: a piece of shape {array.shape} does not belong to {shape}")
        if path not in begun:
            boxes = {part: np.empty([end - first for first, end in part], dtype) for part in parts(path, shape)}
            begun[path] = boxes, 1 if layer is None else shape[0]
        boxes, missing = begun[path]
        for part in boxes:
            _copy(array, layer, part, boxes[part])
        begun[path] = boxes, missing - 1
        if missing == 1:
            done[path] = place(path, begun.pop(path)[0])
        del boxes  # otherwise the next parameter would be loaded beside this one
    absent = [".".join(path) for path in wanted if path not in done]
    if absent:
        raise ValueError(f"{', '.join(absent[:5])}: {len(absent)} parameters are incomplete")
    return jax.tree.unflatten(jax.tree.structure(shapes), [done[path] for path in wanted])


def _copy(array: Sliceable, layer: int | None, part: Part, box: np.ndarray) -> None:
    if layer is None:
        box[...] = array[tuple(slice(*range_) for range_ in part)]
        return
    (first, end), *rest = part
    if first <= layer < end:
        box[layer - first] = array[tuple(slice(*range_) for range_ in rest)]
