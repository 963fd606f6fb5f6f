"""Digests of tiles do not depend on how an array lies on devices, and change with every bit, place, shape and type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.runtime import hosts, tiles
from dpo_jax.runtime.tiles import tile_digests, tile_shape

ARRAY = np.random.default_rng(0).standard_normal((3, 128, 96)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 2048)


def digest(array):
    return tile_digests({"x": array})["x"]


def laid_out(shape, spec, array=ARRAY):
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("a", "b"))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def as_of_several_hosts(monkeypatch):
    """Arrays on several devices look as if other processes held some of their pieces: what is not local is told by pieces."""
    monkeypatch.setattr(tiles, "_addressable", lambda leaf: len(leaf.sharding.device_set) == 1)


@pytest.mark.parametrize(
    ("shape", "spec"), [((1, 1), ()), ((4, 1), (None, "a")), ((2, 2), (None, "a", "b")), ((2, 2), (None, "b")), ((2, 2), ())]
)
def test_the_layout_does_not_matter(shape, spec, monkeypatch):
    expected = digest(ARRAY)
    assert digest(laid_out(shape, spec)) == expected
    as_of_several_hosts(monkeypatch)
    monkeypatch.setattr(hosts, "gathered_chunks", None)  # would raise
    assert digest(laid_out(shape, spec)) == expected


def test_pieces_that_are_no_whole_tiles_are_gathered(monkeypatch):
    expected, calls = digest(ARRAY), []
    as_of_several_hosts(monkeypatch)
    chunks = hosts.gathered_chunks
    monkeypatch.setattr(hosts, "gathered_chunks", lambda *of, **more: calls.append(of) or chunks(*of, **more, max_bytes=50_000))
    assert digest(laid_out((3, 1), (None, None, "a"))) == expected
    assert len(calls) == 1


def test_chunks_do_not_matter(monkeypatch):
    flat = ARRAY.reshape(-1, 96)
    expected = digest(ARRAY), digest(flat)
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 40_000)
    assert (digest(ARRAY), digest(flat)) == expected


def test_every_kind_of_damage_changes_it():
    lengths = tile_shape(ARRAY.shape, 4)
    assert np.prod(lengths) * 4 <= tiles.TILE_BYTES < ARRAY[0].nbytes
    damaged = []
    for place in np.ndindex(3, 4, 3):
        flipped = ARRAY.copy()
        flipped.view(np.uint32)[tuple(np.array(place) * [1, 32, 32])] ^= 1
        damaged.append(flipped)
    swapped = ARRAY.copy()  # two tiles in each other's place
    swapped[0, : lengths[1], : lengths[2]], swapped[1, : lengths[1], : lengths[2]] = (
        ARRAY[1, : lengths[1], : lengths[2]],
        ARRAY[0, : lengths[1], : lengths[2]],
    )
    damaged += [swapped, ARRAY[::-1], ARRAY.reshape(3, 96, 128), ARRAY[:2], np.zeros_like(ARRAY), -ARRAY]
    found = {digest(array) for array in (ARRAY, *damaged)}
    assert len(found) == 1 + len(damaged)


@pytest.mark.parametrize("shape", [(), (0, 4), (5,), (5, 1), (7, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_any_shape_and_type(shape, dtype):
    array = jnp.ones(shape, dtype)
    assert digest(array) == digest(np.asarray(array))
    assert (digest(array) == digest(np.zeros_like(array))) == (array.size == 0)


def test_the_order_of_names_stays():
    found = tile_digests({"b": np.ones(3), "a": np.zeros(3)})
    assert list(found) == ["b", "a"]
    assert found["a"] != found["b"]


def test_halving_ends(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 16 << 10)
    assert tile_shape((), 4) == ()
    assert tile_shape((30_001,), 4) == (30_001,)  # odd: it stays whole
    assert tile_shape((80, 8192, 28672), 4) == (1, 64, 56)
