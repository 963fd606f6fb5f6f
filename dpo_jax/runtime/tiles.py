"""Digests of sharded arrays, computed by each host on its own part without gathering.

An array is divided into tiles by a grid that depends only on its shape and dtype. Its digest is the sum, modulo a prime, of the
SHA-256 of each tile with its place. So it does not depend on which process holds which tiles or on the order of addition (the
incremental hash of Bellare and Micciancio 1997): each process adds the tiles it holds, and exchanges 32 bytes per array.

Mesh axes are usually powers of two, and tiles are made by halving, so the part of a process consists of whole tiles. Otherwise
(three hosts, or a part smaller than a tile) the array is gathered in chunks; its digest is the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.runtime import hosts

TILE_BYTES = 32 << 10
"""Largest tile: a matrix of 2 MB can be on 64 hosts."""
CHUNK_BYTES = 32 << 20  # per thread, of eight that copy at once
MODULUS = 2**256 - 189  # a prime, so that fractions of a tile can be added: see `_sum`
Box = tuple[tuple[int, int], ...]
"""(first, end) along each axis."""


class Held(NamedTuple):
    """The part of an array that this process holds."""

    box: Box
    copies: int  # the number of processes that hold it
    is_first: bool  # this is the first of them


def tile_digests(leaves: Mapping[str, Any], *, every_copy: bool) -> dict[str, str]:
    """The hexadecimal digest of each array, in the order of `leaves`. All hosts must call it.

    If several hosts hold the same part, `every_copy` includes all copies, so that a differing one changes the digest. Otherwise
    only the first host that holds the part reads it.
    """
    parts = {name: held_part(leaf) for name, leaf in leaves.items()}

    def add_up(name: str) -> int:
        part = parts[name]
        return 0 if part is None else _sum(leaves[name], part, every_copy=every_copy)

    # hashlib releases the interpreter lock, so threads hash in parallel.
    with ThreadPoolExecutor(8) as pool:
        mine = dict(zip(leaves, pool.map(add_up, leaves), strict=True))
    for name in (name for name, part in parts.items() if part is None):  # a collective: the same order on all hosts
        total = _sum_gathered(leaves[name])
        mine[name] = total if hosts.is_first() else 0
    return {name: f"{total:064x}" for name, total in zip(leaves, _over_hosts([*mine.values()]), strict=True)}


def tile_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape of a tile, which divides `shape`: one layer, then the longest even axis is halved until the tile is small.

    >>> tile_shape((12, 1024, 768), 4)
    (1, 64, 96)
    """
    lengths = [1] * (len(shape) - 2) + list(shape[-2:])
    while math.prod(lengths) * itemsize > TILE_BYTES:
        even = [axis for axis, length in enumerate(lengths) if length % 2 == 0]
        if not even:
            break
        lengths[max(even, key=lambda axis: lengths[axis])] //= 2
    return tuple(lengths)


def held_part(leaf: Any) -> Held | None:
    """The part of an array that this process holds; None on all hosts if some host's part is not a box of whole tiles."""
    pieces = _pieces_by_process(leaf)
    boxes = {process: _around(found) for process, found in pieces.items()}
    if any(sum(map(_size, found)) != _size(boxes[process]) for process, found in pieces.items()):
        return None  # the part of some process is no box
    if sum(map(_size, {*boxes.values()})) != leaf.size:
        return None  # boxes overlap
    lengths = tile_shape(leaf.shape, leaf.dtype.itemsize)
    sides = (pair for box in boxes.values() for pair in zip(box, lengths, strict=True))
    if any(length and (first % length or end % length) for (first, end), length in sides):
        return None
    mine = boxes[jax.process_index()]
    holders = [process for process, box in boxes.items() if box == mine]
    return Held(mine, len(holders), jax.process_index() == min(holders))


def _pieces_by_process(leaf: Any) -> dict[int, set[Box]]:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:  # each process has its own whole copy
        whole = tuple((0, length) for length in leaf.shape)
        return {process: {whole} for process in range(jax.process_count())}
    pieces: dict[int, set[Box]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        pieces.setdefault(device.process_index, set()).add(_box(index, leaf.shape))
    return pieces


def _box(index: Sequence[slice], shape: Sequence[int]) -> Box:
    return tuple(along.indices(length)[:2] for along, length in zip(index, shape, strict=True))


def _around(boxes: set[Box]) -> Box:
    return tuple((min(first for first, _ in ranges), max(end for _, end in ranges)) for ranges in zip(*boxes, strict=True))


def _size(box: Box) -> int:
    return math.prod(end - first for first, end in box)


def _sum(leaf: Any, part: Held, *, every_copy: bool) -> int:
    """The contribution of this process to the digest of `leaf`.

    With `every_copy` each of n copies adds 1/n, the inverse of n modulo the prime: n equal copies add up to the whole.
    """
    if not leaf.size or not (every_copy or part.is_first):
        return 0
    lengths = tile_shape(leaf.shape, leaf.dtype.itemsize)
    others = [begin for begin, _ in part.box[1:]]
    total = sum(_sum_of_chunk(chunk, [first, *others][: leaf.ndim], lengths) for first, chunk in _chunks(leaf, part))
    return total * pow(part.copies, -1, MODULUS) if every_copy else total


def _chunks(leaf: Any, part: Held) -> Iterator[tuple[int, np.ndarray]]:
    """(first, array): the held part in runs of whole tiles, each starting at `first` along the first axis."""
    if not leaf.ndim:
        yield 0, np.asarray(leaf)
        return
    (begin, end), *rest = part.box
    length = tile_shape(leaf.shape, leaf.dtype.itemsize)[0]
    run = max(1, CHUNK_BYTES * (end - begin) // (_size(part.box) * leaf.dtype.itemsize) // length) * length
    pieces = _pieces(leaf)
    for first in range(begin, end, run):
        last = min(first + run, end)
        if len(pieces) == 1:
            yield first, np.asarray(next(iter(pieces.values()))[first - begin : last - begin])
            continue
        chunk = np.empty((last - first, *(stop - start for start, stop in rest)), leaf.dtype)
        for ((low, high), *others), data in pieces.items():
            if (top := max(first, low)) < (bottom := min(last, high)):
                to = [slice(a - start, b - start) for (a, b), (start, _) in zip(others, rest, strict=True)]
                chunk[(slice(top - first, bottom - first), *to)] = data[top - low : bottom - low]
        yield first, chunk


def _pieces(leaf: Any) -> dict[Box, Any]:
    """The arrays that make up the part of this process."""
    if not isinstance(leaf, jax.Array):
        return {tuple((0, length) for length in leaf.shape): leaf}
    return {_box(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}


def _sum_of_chunk(array: np.ndarray, begin: Sequence[int], lengths: Sequence[int]) -> int:
    """The sum over an array of whole tiles at `begin`: SHA-256 of (place, row-major bytes), all little endian."""
    counts = [size // length for size, length in zip(array.shape, lengths, strict=True)]
    split = array.reshape([number for pair in zip(counts, lengths, strict=True) for number in pair])
    axes = [*range(0, split.ndim, 2), *range(1, split.ndim, 2)]
    tiles = np.ascontiguousarray(split.transpose(axes)).view(np.uint8).reshape(math.prod(counts), -1)
    places = np.array([*np.ndindex(*counts)], "<u8").reshape(len(tiles), -1)
    places = places * np.array(lengths, "<u8") + np.array(begin, "<u8")
    total = 0
    for place, tile in zip(places, tiles, strict=True):
        sha = hashlib.sha256(place.data)
        sha.update(tile.data)
        total += int.from_bytes(sha.digest(), "little")
    return total


def _sum_gathered(leaf: Any) -> int:
    """The sum over all tiles of an array that some process does not hold in whole tiles."""
    lengths = tile_shape(leaf.shape, leaf.dtype.itemsize)
    total, first = 0, 0
    for chunk in hosts.gathered_chunks(leaf, multiple_of=lengths[0]):
        total += _sum_of_chunk(chunk, [first, *(0 for _ in lengths[1:])], lengths)
        first += len(chunk)
    return total


def _over_hosts(mine: Sequence[int]) -> list[int]:
    """The sums over all hosts, modulo the prime."""
    if jax.process_count() == 1:
        return [total % MODULUS for total in mine]
    own = np.frombuffer(b"".join((total % MODULUS).to_bytes(32, "little") for total in mine), np.uint8)
    everyones = hosts.joined(own.reshape(1, len(mine), 32))
    return [sum(int.from_bytes(one.tobytes(), "little") for one in everyones[:, n]) % MODULUS for n in range(len(mine))]
