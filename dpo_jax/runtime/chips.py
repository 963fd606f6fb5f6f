"""Hardware data of TPU chips and GPUs, and parsing of topologies such as v5e:4x4, h100:8, h100:4x8.

Sources. TPUs: the tables "System architecture" of docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. Link rates
there are the sum of both directions; here the rate is what a chip can send over all its links.

GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200: dense bfloat16 without sparsity, NVLink in one
direction (half of the printed value). Memory is what CUDA reports (H200: what is printed on it). The rest of the description
for the compiler is from openxla/xla, xla/backends/gpu/target_config/specs. The network is that of NVIDIA's DGX systems: one
card per GPU, 400 Gb/s (DGX A100: 200 Gb/s).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from dpo_jax.extras import install_command
from dpo_jax.runtime.gpu_target import COMPILER_OPTIONS, GpuTarget, gpu_devices, plugin_is_here

GIB = 1 << 30


class TopologyError(ValueError):
    """A slice or set of hosts that does not exist or cannot be described here."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a whole chip. `cores` is the number of JAX devices in it, each with its share.

    `link_bandwidth` is the send rate to the other chips of a TPU slice, or over NVLink to GPUs of the same host; `network` is a
    GPU's rate to other hosts.
    """

    name: str
    hbm_bytes: float
    flops: float  # bfloat16, per second
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float
    slices: tuple[str, ...]
    cores: int = 1
    network: float = math.inf
    gpu: GpuTarget | None = None

    @property
    def platform(self) -> str:
        return "gpu" if self.gpu else "tpu"

    @property
    def compiler_options(self) -> dict[str, bool | int]:
        return COMPILER_OPTIONS if self.gpu else {}


def _gpu(name: str, target: GpuTarget, *, flops: float, nvlink: float, network: float) -> Chip:
    memory, bandwidth = float(target.memory), float(target.memory_bandwidth)
    return Chip(name, memory, flops, bandwidth, nvlink, _HOSTS, network=network, gpu=target)


def _hopper(name: str, memory: int, bandwidth: int) -> GpuTarget:
    return GpuTarget(name, (9, 0), 132, 128, 1.98, memory, bandwidth, 50 << 20, 233472, 232448)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_HOSTS = ("1", "2", "4", "8", "2x8", "4x8", "HOSTSx8")
_A100 = GpuTarget("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 40 << 20, 167936, 166912)
_H100 = _hopper("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000)
_H200 = _hopper("NVIDIA H200", 141_000_000_000, 4_800_000_000_000)
_B200 = GpuTarget("NVIDIA B200", (10, 0), 148, 128, 1.965, 191_514_411_008, 7_672_320_000_000, 132644864, 233472, 232448)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9, _CUBES),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, _FLAT),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, _CUBES),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, _FLAT),
        Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 600e9, _CUBES, cores=2),
        _gpu("a100", _A100, flops=312e12, nvlink=300e9, network=25e9),
        _gpu("h100", _H100, flops=989e12, nvlink=450e9, network=50e9),
        _gpu("h200", _H200, flops=989e12, nvlink=450e9, network=50e9),
        _gpu("b200", _B200, flops=2250e12, nvlink=900e9, network=50e9),
    )
}


def slice_of(topology: str) -> tuple[Chip, int]:
    """(chip, number of chips) of a topology such as "v5e:4x4" or "h100:8". Raises `TopologyError`, listing the known ones."""
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise TopologyError(f"{topology!r} is neither a TPU slice nor a set of GPUs; there are {known_slices()}")
    sizes = [int(size) for size in shape.split("x")]
    if chip.gpu and (len(sizes) > 2 or not 1 <= sizes[-1] <= 8 or not all(sizes)):
        raise TopologyError(f"{topology!r}: {name} is 1 to 8 GPUs of a host, or HOSTSxGPUS: {', '.join(chip.slices)}")
    if not chip.gpu and not _is_slice(chip, sizes):
        raise TopologyError(f"{topology!r}: slices of {name} are {', '.join(chip.slices)}")
    return chip, math.prod(sizes)


def _is_slice(chip: Chip, sizes: list[int]) -> bool:
    """Whether these TPUs exist in this shape. In three dimensions there are more shapes than listed, built of 2 x 2 hosts."""
    if chip.slices == _FLAT:
        return "x".join(map(str, sizes)) in _FLAT
    return len(sizes) == 3 and all(sizes) and not (sizes[0] % 2 or sizes[1] % 2)


def known_slices() -> str:
    return "; ".join(f"{chip.name}: {', '.join(chip.slices)}" for chip in CHIPS.values())


def host_devices(topology: str) -> int | None:
    """GPUs per host; None for TPUs, whose links cross hosts."""
    chip, _ = slice_of(topology)
    return int(topology.rpartition(":")[2].split("x")[-1]) if chip.gpu else None


def check_compiler(chip: Chip) -> str:
    """The compiler for `chip`: libtpu or JAX's CUDA plugin. Raises `TopologyError` if it is not installed."""
    needed, found = ("JAX's CUDA plugin", plugin_is_here()) if chip.gpu else ("libtpu", importlib.util.find_spec("libtpu"))
    if not found:
        extra = "cuda13" if chip.gpu else "tpu"
        raise TopologyError(
            f"compiling for {chip.name} needs {needed}: {install_command(extra)} "
            f"(Linux, x86-64; no {chip.platform.upper()} is needed)"
        )
    return needed


def slice_devices(topology: str) -> list[Any]:
    """Virtual devices for which programs can be compiled. Needs libtpu or JAX's CUDA plugin, but no chip.

    Raises `TopologyError` if that is missing or does not know the slice. For GPUs `jax_platforms` must be "cpu".
    """
    chip, count = slice_of(topology)
    needed = check_compiler(chip)
    try:
        if chip.gpu:
            per_host = host_devices(topology) or 1
            return gpu_devices(chip.gpu, hosts=count // per_host, per_host=per_host)
        return _tpu_devices(chip, topology)
    except Exception as error:  # XLA's, of whatever class
        raise TopologyError(
            f"{topology!r}: {needed} does not know this slice ({str(error).splitlines()[0]}); there are {known_slices()}"
        ) from error


def _tpu_devices(chip: Chip, topology: str) -> list[Any]:
    # libtpu asks the cloud's metadata server for the TPU type, and wants to be the only one on the machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Otherwise it prints six lines about the missing machine. The plan does not depend on this.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    # The two cores of a v4 chip form one device, as on real hardware.
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
