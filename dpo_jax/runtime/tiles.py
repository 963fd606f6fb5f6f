"""Digests of sharded arrays, computed by each host on its own part without gathering.

An array is divided into tiles by a grid that depends only on its shape and dtype. Its digest is the sum, modulo a prime, of the
SHA-256 of each tile with its place. So it does not depend on which process holds which tiles or on the order of addition (the
incremental hash of Bellare and Micciancio 1997): each process adds the tiles it holds, and exchanges 32 bytes per array.

Mesh axes are usually powers of two, and tiles are made by halving. So what a process holds consists of whole tiles: one box, or
on the torus of a TPU slice, several. Otherwise (three hosts, or shards smaller than a tile) the array is gathered in chunks;
its digest is the same.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.runtime import hosts

TILE_BYTES = 32 << 10
"""Largest tile: a matrix of 2 MB can be on 64 hosts."""
MOST_THREADS = 32  # a host of GPUs or TPUs has 100 cores or more
CHUNK_BYTES = (256 << 20) // MOST_THREADS  # per thread, on the device and on the host
MODULUS = 2**256 - 189  # a prime, so that fractions of a tile can be added: see `tile_digests`
Box = tuple[tuple[int, int], ...]
"""(first, end) along each axis."""


class Held(NamedTuple):
    """A box of an array that this process holds."""

    box: Box
    copies: int  # the number of processes that hold it
    is_first: bool  # this is the first of them


class Job(NamedTuple):
    """A part of a box, of whole tiles and small enough for memory."""

    name: str
    held: Held
    part: Box


def tile_digests(leaves: Mapping[str, Any], *, every_copy: bool) -> dict[str, str]:
    """The hexadecimal digest of each array, in the order of `leaves`. All hosts must call it.

    If several hosts hold the same part, `every_copy` includes all copies, so that a differing one changes the digest. Otherwise
    only the first host that holds the part reads it.
    """
    parts = {name: held_parts(leaf) for name, leaf in leaves.items()}
    jobs = [
        Job(name, held, part)
        for name, found in parts.items()
        for held in found or ()
        if every_copy or held.is_first
        for part in _parts(leaves[name], held.box)
    ]

    def add_up(job: Job) -> int:
        total = _sum_of_part(leaves[job.name], job)
        # Each of n copies adds 1/n, the inverse of n modulo the prime: n equal copies add up to the whole.
        return total * pow(job.held.copies, -1, MODULUS) if every_copy else total

    mine = dict.fromkeys(leaves, 0)
    # hashlib releases the interpreter lock, so threads hash in parallel.
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for job, total in zip(jobs, pool.map(add_up, jobs), strict=True):
            mine[job.name] += total
    for name in (name for name, found in parts.items() if found is None):  # a collective: the same order on all hosts
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


def held_parts(leaf: Any) -> list[Held] | None:
    """The boxes of an array that this process holds; None on all hosts if some host's boxes are not made of whole tiles."""
    lengths = tile_shape(leaf.shape, leaf.dtype.itemsize)
    pieces = _pieces_by_process(leaf)
    # Joined shards are whole tiles where single ones may be smaller, but those of two hosts may overlap.
    for boxes in ({process: _joined(found) for process, found in pieces.items()}, pieces):
        distinct = set().union(*boxes.values())
        sides = (side for box in distinct for side in zip(box, lengths, strict=True))
        if sum(map(_size, distinct)) == leaf.size and not any(
            length and (first % length or end % length) for (first, end), length in sides
        ):
            mine, found = jax.process_index(), []
            for box in sorted(boxes[mine]):
                holders = [process for process, own in boxes.items() if box in own]
                found.append(Held(box, len(holders), mine == min(holders)))
            return found
    return None


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


def _joined(boxes: set[Box]) -> set[Box]:
    """The same places in fewer boxes: two that touch along one axis, and are equal along the others, become one."""
    joined = set(boxes)
    for axis in range(len(next(iter(boxes), ()))):
        lines: dict[Any, list[tuple[int, int]]] = {}
        for box in sorted(joined):
            line = lines.setdefault((box[:axis], box[axis + 1 :]), [])
            if line and line[-1][1] == box[axis][0]:
                line[-1] = line[-1][0], box[axis][1]
            else:
                line.append(box[axis])
        joined = {(*before, side, *after) for (before, after), line in lines.items() for side in line}
    return joined


def _size(box: Box) -> int:
    return math.prod(end - first for first, end in box)


def _parts(leaf: Any, box: Box) -> list[Box]:
    """The parts in which a box is read: whole tiles, of `CHUNK_BYTES` at most if a tile is not larger."""
    if not leaf.size:
        return []
    steps: list[int] = []
    for axis, length in enumerate(tile_shape(leaf.shape, leaf.dtype.itemsize)):
        across = math.prod(steps) * _size(box[axis + 1 :]) * leaf.dtype.itemsize  # bytes of one entry along this axis
        steps.append(max(1, CHUNK_BYTES // (across * length)) * length)
    sides = [
        [(first, min(first + step, end)) for first in range(begin, end, step)]
        for (begin, end), step in zip(box, steps, strict=True)
    ]
    return list(itertools.product(*sides))


def _sum_of_part(leaf: Any, job: Job) -> int:
    """The sum over the tiles of a part."""
    return _sum_of_chunk(_read(leaf, job), [begin for begin, _ in job.part], tile_shape(leaf.shape, leaf.dtype.itemsize))


def _read(leaf: Any, job: Job) -> np.ndarray:
    """The numbers of a part, from the shards of this process."""
    pieces = {box: data for box, data in _pieces(leaf).items() if _within(box, job.held.box)}
    if len(pieces) == 1:
        return np.asarray(next(iter(pieces.values()))[_places(job.part, job.held.box)])
    found = np.empty([end - first for first, end in job.part], leaf.dtype)
    for box, data in pieces.items():
        shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, job.part, strict=True))
        if all(first < end for first, end in shared):
            found[_places(shared, job.part)] = data[_places(shared, box)]
    return found


def _places(box: Box, within: Box) -> tuple[slice, ...]:
    """The index of a box in an array that begins where `within` does."""
    return tuple(slice(first - origin, end - origin) for (first, end), (origin, _) in zip(box, within, strict=True))


def _within(box: Box, outer: Box) -> bool:
    return all(first <= a and b <= end for (a, b), (first, end) in zip(box, outer, strict=True))


def _pieces(leaf: Any) -> dict[Box, Any]:
    """The shards of this process."""
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
    everyones = hosts.all_gather(own.reshape(1, len(mine), 32))
    return [sum(int.from_bytes(one.tobytes(), "little") for one in everyones[:, n]) % MODULUS for n in range(len(mine))]
