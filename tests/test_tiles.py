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
    return tile_digests({"x": array}, every_copy=True)["x"]


def laid_out(shape, spec, array=ARRAY):
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("a", "b"))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def over_hosts(array, count, *, every_copy=True, damaged=None, torus=False):
    """The digest as `count` hosts make it, each of which holds an equal run of the devices of `array`.

    With `torus` each host holds every `count`-th device. On host `damaged` one number is another.
    """
    devices = len(array.sharding.device_set)
    process = {device: n % count if torus else n * count // devices for n, device in enumerate(jax.devices())}
    cut = array.sharding.devices_indices_map(array.shape)
    boxes = {
        number: {tiles._box(index, array.shape) for device, index in cut.items() if process[device] == number}
        for number in range(count)
    }
    pieces, added = tiles._pieces, []
    for number in range(count):
        mine = {box: np.array(data) for box, data in pieces(array).items() if box in boxes[number]}
        if number == damaged:
            next(iter(mine.values())).flat[0] += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "process_index", lambda number=number: number)
            patch.setattr(tiles, "_pieces_by_process", lambda _: boxes)
            patch.setattr(tiles, "_pieces", lambda _, mine=mine: mine)
            patch.setattr(hosts, "whole", lambda leaf: pytest.fail("gathered"))
            patch.setattr(tiles, "_over_hosts", lambda sums: added.append(sums[0]) or sums)
            tile_digests({"x": array}, every_copy=every_copy)
    return f"{sum(added) % tiles.MODULUS:064x}"


LAYOUTS = [
    ((1, 1), ()),
    ((4, 1), (None, "a")),
    ((2, 2), (None, "a", "b")),
    ((2, 2), (None, "b")),
    ((2, 2), ()),
    ((2, 2), (None, "b", "a")),
]


@pytest.mark.parametrize(("shape", "spec"), LAYOUTS)
def test_the_layout_does_not_matter(shape, spec):
    assert digest(laid_out(shape, spec)) == digest(ARRAY)


@pytest.mark.parametrize("every_copy", [True, False])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("shape", "spec"), LAYOUTS[1:])
def test_hosts_add_up_their_own_parts(shape, spec, count, every_copy):
    assert over_hosts(laid_out(shape, spec), count, every_copy=every_copy) == digest(ARRAY)


@pytest.mark.parametrize("every_copy", [True, False])
@pytest.mark.parametrize(("shape", "spec"), LAYOUTS[1:])
def test_hosts_whose_devices_are_no_neighbors_in_the_mesh_gather_nothing(shape, spec, every_copy):
    """As on a TPU slice: its mesh follows the links of the torus."""
    array = laid_out(shape, spec)
    assert over_hosts(array, 2, every_copy=every_copy, torus=True) == digest(ARRAY)
    assert over_hosts(array, 2, torus=True, damaged=1) != digest(ARRAY)


@pytest.mark.parametrize("damaged", [0, 1, 2, 3])
@pytest.mark.parametrize(("shape", "spec"), LAYOUTS[1:])
def test_damage_on_any_host_is_found_also_in_a_copy(shape, spec, damaged):
    assert over_hosts(laid_out(shape, spec), 4, damaged=damaged) != digest(ARRAY)


def test_what_is_written_is_digested_also_where_another_copy_differs():
    """The first host that holds a part writes it; a record of anything else would never verify."""
    array = laid_out((2, 2), ())
    assert over_hosts(array, 2, every_copy=False, damaged=1) == digest(ARRAY)
    assert over_hosts(array, 2, every_copy=False, damaged=0) != digest(ARRAY)


@pytest.mark.parametrize(
    "boxes",
    [
        {0: {((0, 3), (0, 128), (0, 31))}, 1: {((0, 3), (0, 128), (31, 96))}},  # through tiles
        {0: {((0, 3), (0, 128), (0, 96))}, 1: {((0, 3), (0, 128), (0, 48))}},  # one within the other
        {
            0: {((0, 3), (0, 60), (0, 48)), ((0, 3), (60, 128), (48, 96))},
            1: {((0, 3), (0, 60), (48, 96)), ((0, 3), (60, 128), (0, 48))},
        },
    ],
)
def test_parts_that_are_no_boxes_of_whole_tiles_are_gathered(boxes, monkeypatch):
    expected, seen, chunks = digest(ARRAY), [], hosts.gathered_chunks
    monkeypatch.setattr(tiles, "_pieces_by_process", lambda _: boxes)
    monkeypatch.setattr(hosts, "gathered_chunks", lambda *of, **more: seen.append(of) or chunks(*of, **more, max_bytes=50_000))
    assert digest(ARRAY) == expected
    assert len(seen) == 1


def test_chunks_do_not_matter_and_are_small_also_in_a_large_layer(monkeypatch):
    flat, read, sizes = ARRAY.reshape(-1, 96), tiles._read, []
    expected = digest(ARRAY), digest(flat)
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 40_000)
    monkeypatch.setattr(tiles, "_read", lambda *of: sizes.append(read(*of).nbytes) or read(*of))
    assert (digest(ARRAY), digest(flat)) == expected
    assert max(sizes) <= 40_000 < ARRAY[0].nbytes
    assert sum(sizes) == 2 * ARRAY.nbytes


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


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0), (5,), (5, 1), (7, 3), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_any_shape_and_type(shape, dtype):
    array = jnp.ones(shape, dtype)
    assert digest(array) == digest(np.asarray(array))
    assert (digest(array) == digest(np.zeros_like(array))) == (array.size == 0)


def test_the_order_of_names_stays():
    found = tile_digests({"b": np.ones(3), "a": np.zeros(3)}, every_copy=False)
    assert list(found) == ["b", "a"]
    assert found["a"] != found["b"]


def test_halving_ends(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 32 << 10)
    assert tile_shape((), 4) == ()
    assert tile_shape((30_001,), 4) == (30_001,)  # odd: it stays whole
    assert tile_shape((80, 8192, 28672), 4) == (1, 64, 112)
