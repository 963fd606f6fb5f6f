"""What a chip of each TPU generation has, and the slices that can be named.

Source: the tables "System architecture" of docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. The rate of the
links there is the sum of both directions; here it is what a chip can send, over all its links together.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

GIB = 1 << 30


class TopologyError(ValueError):
    """A slice that does not exist, or that cannot be described here."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a whole chip. `cores`: how many devices JAX sees in it, each with its share."""

    name: str
    hbm_bytes: float
    flops: float  # bfloat16, a second
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second that leave the chip
    slices: tuple[str, ...]
    cores: int = 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9, _CUBES),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, _FLAT),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, _CUBES),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, _FLAT),
        Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 600e9, _CUBES, cores=2),
    )
}


def slice_of(topology: str) -> tuple[Chip, int]:
    """The chip, and how many of them, of a slice such as "v5e:4x4". Raises `TopologyError` with the slices there are."""
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise TopologyError(f"{topology!r} is no slice of TPUs; there are {known_slices()}")
    if shape.count("x") != chip.slices[0].count("x"):
        raise TopologyError(f"{topology!r}: slices of {name} are {', '.join(chip.slices)}")
    return chip, math.prod(int(size) for size in shape.split("x"))


def known_slices() -> str:
    return "; ".join(f"{chip.name}: {', '.join(chip.slices)}" for chip in CHIPS.values())


def slice_devices(topology: str) -> list[Any]:
    """Devices of a slice that need not be here, for which programs can be compiled. Needs libtpu, and no TPU.

    Raises `TopologyError` where libtpu is missing or knows no such slice.
    """
    chip, _ = slice_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError("compiling for TPUs needs libtpu: pip install 'dpo_jax[tpu]' (Linux, x86-64; no TPU is needed)")
    # libtpu asks the cloud's metadata server which TPU it is on, and wants to be the only one on the machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # The two cores of a v4 chip work as one device, as they do where JAX finds them.
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # of XLA, as whatever class it has today
        raise TopologyError(
            f"{topology!r}: libtpu does not know this slice ({str(error).splitlines()[0]}); slices of {chip.name} are "
            + ", ".join(chip.slices)
        ) from error
