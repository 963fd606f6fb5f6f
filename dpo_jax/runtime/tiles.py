"""Digests of arrays that are cut over devices and hosts, of the pieces where they lie: nothing is gathered.

An array is divided into tiles by a grid that depends on its shape and type alone. Its digest is the sum, modulo 2^256, of the
SHA-256 of each tile and its place. So it does not depend on who holds which tiles, nor on the order in which they are added
(the incremental hash of Bellare and Micciancio 1997): each process adds up those it holds, and 32 bytes an array travel.

The axes of a mesh are powers of two as a rule, and tiles come from halving, so pieces are made of whole tiles. Where they are
not (a mesh of 3 devices, a piece smaller than a tile), an array is gathered instead, chunk by chunk; its digest is the same.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dpo_jax.runtime import hosts

TILE_BYTES = 16 << 10
"""Tiles are halved until they have at most so many: a matrix of 1 MB may lie in 64 pieces."""
CHUNK_BYTES = 64 << 20
Box = tuple[tuple[int, int], ...]
"""(first, end) along each axis."""


def tile_digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each array, hexadecimal, in the order of `leaves`. Of several hosts all make this call."""
    together = [name for name, leaf in leaves.items() if not _in_whole_tiles(leaf)]
    # hashlib lets go of the interpreter lock: eight threads hash several GB a second.
    with ThreadPoolExecutor(8) as pool:
        mine = dict(zip(leaves, pool.map(lambda name: 0 if name in together else _local(leaves[name]), leaves), strict=True))
    for name in together:  # a collective: array by array, in the same order everywhere
        total = _gathered(leaves[name])
        mine[name] = total if hosts.is_first() else 0
    return {name: f"{total:064x}" for name, total in zip(leaves, _added_up([*mine.values()]), strict=True)}


def tile_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The lengths of a tile along each axis: layers apart, then the longest even axis halved until a tile is small.

    >>> tile_shape((12, 1024, 768), 4)
    (1, 64, 48)
    """
    lengths = [1] * (len(shape) - 2) + list(shape[-2:])
    while math.prod(lengths) * itemsize > TILE_BYTES:
        even = [axis for axis, length in enumerate(lengths) if length % 2 == 0]
        if not even:
            break
        axis = max(even, key=lambda axis: lengths[axis])
        lengths[axis] //= 2
    return tuple(lengths)


def _in_whole_tiles(leaf: Any) -> bool:
    """Whether each process can digest what it holds. An array of one process needs no collective, however it is cut."""
    if _addressable(leaf):
        return True
    tile, piece = tile_shape(leaf.shape, leaf.dtype.itemsize), leaf.sharding.shard_shape(leaf.shape)
    return all(length == whole or length % part == 0 for length, whole, part in zip(piece, leaf.shape, tile, strict=True))


def _addressable(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _local(leaf: Any) -> int:
    """The sum over the tiles that this process is the first to hold."""
    if not _addressable(leaf):
        mine = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        return sum(_sum(shard.data, _box(shard.index, leaf.shape), leaf.shape) for shard in mine)
    return _sum(leaf, [(0, length) for length in leaf.shape], leaf.shape) if hosts.is_first() else 0


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [along.indices(length)[:2] for along, length in zip(index, shape, strict=True)]


def _sum(array: Any, box: list[tuple[int, int]], shape: tuple[int, ...]) -> int:
    """The sum over the tiles in `box` of an array of `shape`, of which `array` is that part. It is copied in chunks."""
    lengths = tile_shape(tuple(shape), array.dtype.itemsize)
    if not array.size or not shape:
        return _sum_of_chunk(np.asarray(array), box, lengths)
    run = max(1, CHUNK_BYTES * len(array) // max(1, array.nbytes) // lengths[0]) * lengths[0]
    total = 0
    for first in range(0, len(array), run):
        chunk = np.asarray(array if run >= len(array) else array[first : first + run])
        total += _sum_of_chunk(chunk, [(box[0][0] + first, box[0][0] + first + len(chunk)), *box[1:]], lengths)
    return total


def _sum_of_chunk(array: np.ndarray, box: list[tuple[int, int]], lengths: tuple[int, ...]) -> int:
    total = 0
    for part in _tiles(box, lengths):
        here = tuple(slice(first - begin, end - begin) for (first, end), (begin, _) in zip(part, box, strict=True))
        tile = np.ascontiguousarray(array[here])
        sha = hashlib.sha256(np.array([first for first, _ in part], "<u8").tobytes())
        sha.update(tile.view(np.uint8).reshape(-1).data if tile.size else b"")
        total += int.from_bytes(sha.digest(), "little")
    return total


def _tiles(box: list[tuple[int, int]], lengths: tuple[int, ...]) -> Iterator[Box]:
    along = [
        [(first, min(first + length, end)) for first in range(begin, end, max(1, length))]
        for (begin, end), length in zip(box, lengths, strict=True)
    ]
    return itertools.product(*along)


def _gathered(leaf: Any) -> int:
    """The sum over all tiles of an array whose pieces are no whole tiles."""
    total, first = 0, 0
    for chunk in hosts.gathered_chunks(leaf, multiple_of=tile_shape(leaf.shape, leaf.dtype.itemsize)[0]):
        box = [(first, first + len(chunk)), *((0, length) for length in leaf.shape[1:])]
        total += _sum_of_chunk(chunk, box, tile_shape(leaf.shape, leaf.dtype.itemsize))
        first += len(chunk)
    return total


def _added_up(mine: list[int]) -> list[int]:
    """The sums over all hosts, modulo 2^256."""
    if jax.process_count() == 1:
        return [total % 2**256 for total in mine]
    own = np.frombuffer(b"".join((total % 2**256).to_bytes(32, "little") for total in mine), np.uint8)
    everyones = hosts.joined(own.reshape(1, len(mine), 32))
    return [sum(int.from_bytes(one.tobytes(), "little") for one in everyones[:, n]) % 2**256 for n in range(len(mine))]
