"""Weight updates (final minus start) of the contenders, compared pairwise.

All contenders start from one model and write Hugging Face folders, so a tensor has the same name and orientation in each. Names
are resolved as in `load_hf`, and a tied head counts once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.models.families import decoder_config
from dpo_jax.models.folder import read_config
from dpo_jax.models.tensors import contents
from dpo_jax.models.weights import Checkpoint

BLOCK = 2**20  # elements of a tensor read at a time from each contender: 8 MiB in float64


class Updates(NamedTuple):
    """L2 norms over all parameters, in float64."""

    names: tuple[str, ...]
    norms: np.ndarray  # [contenders]: of each update
    distances: np.ndarray  # [contenders, contenders]: of the difference of two updates
    places: list[list[str]]  # [contenders][contenders]: the tensor in which two differ most


def compare(start: Path, finals: Mapping[str, Path]) -> Updates:
    """Compares the updates of the model folders `finals`, by contender, relative to the folder `start`.

    Only a block of rows of one tensor is in memory at a time. Raises ValueError or FileNotFoundError naming file and tensor, as
    `load_hf` does, for a folder that does not hold the same tensors.
    """
    config, names = decoder_config(read_config(start), where=start / "config.json"), tuple(finals)
    squares, largest = np.zeros(len(names)), np.zeros((len(names), len(names)))
    apart = np.zeros_like(largest)
    places = [[""] * len(names) for _ in names]
    with contextlib.ExitStack() as stack:
        before, *after = [stack.enter_context(Checkpoint(folder, contents(config))) for folder in (start, *finals.values())]
        for checkpoint in (before, *after):
            checkpoint.check_names()
            if config.tied:
                checkpoint.check_tied_head((config.vocab_size, config.width))
        for tensor in before.expected:
            here = np.zeros_like(apart)
            for updates in _blocks(tensor, before, after):
                for i, mine in enumerate(updates):
                    squares[i] += mine @ mine
                    for j in range(i):
                        difference = mine - updates[j]
                        here[i, j] += difference @ difference
            apart += here
            # The first non-finite difference counts as the largest.
            for i, j in zip(*np.nonzero(~(here <= largest) & np.isfinite(largest)), strict=True):
                places[i][j] = places[j][i] = tensor
                largest[i, j] = here[i, j]
    return Updates(names, np.sqrt(squares), np.sqrt(apart + apart.T), places)


def _blocks(tensor: str, before: Checkpoint, after: list[Checkpoint]) -> Any:
    """The updates of one tensor, float64[contenders, numbers], block by block."""
    shape = tuple(_slices(before, tensor).get_shape())
    for checkpoint in after:
        checkpoint.check_tensor(tensor, shape)
    rows = max(1, BLOCK // math.prod(shape[1:]))
    files = [_slices(checkpoint, tensor) for checkpoint in (before, *after)]
    for first in range(0, shape[0], rows):
        start, *finals = (np.asarray(file[first : min(first + rows, shape[0])], np.float64).ravel() for file in files)
        yield np.stack(finals) - start


def _slices(checkpoint: Checkpoint, tensor: str) -> Any:
    file, stored = checkpoint.where[tensor]
    return checkpoint.handles[file].get_slice(stored)
