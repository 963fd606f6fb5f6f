"""Weight digests: one SHA-256 over a model's parameters, computed while they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.models.checkpoint_stream import Piece, pieces_of
from dpo_jax.types import Variables


class WeightsDigest:
    """SHA-256 over names, shapes, types and bytes of all parameters: equal exactly when the weights are equal.

    `watch(pieces)` passes pieces through, so that a model is digested while it is loaded, however it is then sharded. Several
    hosts may share the work: with `share=(n, hosts)` the n-th host adds some parameters whole and `note`s the others, and
    `joined` concatenates the arrays of all hosts. All then call `hexdigest`.
    """

    def __init__(
        self, *, share: tuple[int, int] = (0, 1), joined: Callable[[np.ndarray], np.ndarray] = lambda mine: mine
    ) -> None:
        self.base: str | None = None  # the digest of the base alone, if an adapter's weights follow it
        self.share, self._joined = share, joined
        self._leaves: dict[str, tuple[str, Any]] = {}  # {name: (name, shape and type so far, SHA-256 of the bytes so far)}

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.add(piece)
            yield piece

    def add(self, piece: Piece) -> None:
        """Adds one piece. The layers of a parameter come in order."""
        array = np.ascontiguousarray(piece.array)
        _, sha = self._leaves.get(".".join(piece.path), ("", None))
        self.note(piece)
        name, sha = ".".join(piece.path), sha or hashlib.sha256()
        sha.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
        self._leaves[name] = self._leaves[name][0], sha

    def note(self, piece: Piece) -> None:
        """Adds only name, shape and type of a piece; another host adds its bytes."""
        name, array = ".".join(piece.path), piece.array
        shape = array.shape if piece.layer is None else (piece.layer + 1, *array.shape)
        self._leaves[name] = f"{name} {shape} {array.dtype}", None

    def all_in(self, dtype: str) -> bool:
        """Whether every parameter is stored in `dtype`."""
        return all(described.endswith(f" {dtype}") for described, _ in self._leaves.values())

    def hexdigest(self) -> str:
        own = np.zeros((1, len(self._leaves), 33), np.uint8)  # whether this host has it, and the SHA-256
        for line, (_, sha) in zip(own[0], self._leaves.values(), strict=True):
            line[:] = [sha is not None, *(bytes(32) if sha is None else sha.digest())]
        every = self._joined(own)
        found = every[every[:, :, 0].argmax(axis=0), np.arange(len(self._leaves))]
        assert found[:, 0].all(), "every parameter is in the share of some host"
        lines = sorted(
            f"{described} {sha[1:].tobytes().hex()}\n" for (described, _), sha in zip(self._leaves.values(), found, strict=True)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def shares(sizes: Sequence[int], hosts: int) -> list[int]:
    """The host that takes each item of the given sizes, so that all hosts have about the same total: the largest go first.

    >>> shares([8, 1, 4, 3], 2)
    [0, 1, 1, 1]
    """
    filled, found = [0] * hosts, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        found[number] = filled.index(min(filled))
        filled[found[number]] += sizes[number]
    return found


def files_digest(folder: str | Path) -> tuple[str, str]:
    """A digest of a Hugging Face folder's weights that anybody can check: a SHA-256, and a description of what it covers.

    For one file it is the file's own, as the Hub shows it; for several, that of the output of `sha256sum *.safetensors`.
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
