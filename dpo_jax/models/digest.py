"""The identity of weights: one SHA-256 over a model's parameters, taken while they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.models.checkpoint_stream import Piece, pieces_of
from dpo_jax.types import Variables


class WeightsDigest:
    """SHA-256 over names, shapes, types and bytes of all parameters: equal exactly when the weights are.

    `watch(pieces)` passes pieces on, so that a model is digested while it is loaded, however its pieces then lie on devices.
    """

    def __init__(self) -> None:
        self.base: str | None = None  # the digest of the base alone, where those of an adapter came after it
        self._leaves: dict[str, tuple[str, Any]] = {}  # {name: (name, shape and type so far, SHA-256 of the bytes so far)}

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.add(piece)
            yield piece

    def add(self, piece: Piece) -> None:
        """Takes in one piece. The layers of a parameter come in order."""
        array = np.ascontiguousarray(piece.array)
        name = ".".join(piece.path)
        shape = array.shape if piece.layer is None else (piece.layer + 1, *array.shape)
        _, sha = self._leaves.get(name, ("", None))
        sha = sha or hashlib.sha256()
        sha.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
        self._leaves[name] = f"{name} {shape} {array.dtype}", sha

    def all_in(self, dtype: str) -> bool:
        """Whether every parameter is stored in `dtype`."""
        return all(described.endswith(f" {dtype}") for described, _ in self._leaves.values())

    def hexdigest(self) -> str:
        lines = sorted(f"{described} {sha.hexdigest()}\n" for described, sha in self._leaves.values())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def files_digest(folder: str | Path) -> tuple[str, str]:
    """The identity of the weights in a Hugging Face folder that anybody can check: a SHA-256, and words on what it is of.

    Of one file its own, which the Hub shows, too; of several that of what `sha256sum *.safetensors` prints.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    found = []
    for path in files:
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return found[0], files[0].name
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(found, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest(), "the output of sha256sum *.safetensors"


def weights_digest(variables: Variables) -> str:
    """The `WeightsDigest` of whole arrays."""
    digest = WeightsDigest()
    for _ in digest.watch(pieces_of(variables)):
        pass
    return digest.hexdigest()
