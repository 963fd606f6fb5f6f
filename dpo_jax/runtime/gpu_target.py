"""GPU descriptions for XLA, to compile without a GPU. Needs the wheels of JAX's CUDA plugin, but no driver."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

# Nothing can be timed here, so XLA chooses kernels by rules. Triton products are off: choosing their tiles needs cuBLAS's list
# of candidates, which requires a GPU. A run on a GPU may choose other kernels.
COMPILER_OPTIONS: dict[str, bool | int] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """GPU properties that XLA needs. Sizes in bytes, of one GPU or of one of its `cores` (streaming multiprocessors)."""

    name: str  # as reported by the driver: JAX's device_kind
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory: int
    memory_bandwidth: int
    l2_cache: int
    shared_memory_per_core: int
    shared_memory_per_block: int  # the most that a kernel can request

    def textproto(self) -> str:
        """`stream_executor.GpuTargetConfigProto`. Values common to all of these GPUs are constants here."""
        major, minor = self.capability
        # "sm_90a": tensor core instructions specific to one generation (wgmma, tcgen05).
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  shared_memory_per_core: {self.shared_memory_per_core}
  core_count: {self.cores}
  fpus_per_core: {self.fpus_per_core}
  clock_rate_ghz: {self.clock_ghz}
  l2_cache_size: {self.l2_cache}
  device_memory_size: {self.memory}
  memory_bandwidth: {self.memory_bandwidth}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{self.name}"
"""


def plugin_is_here() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in PLUGINS)


def gpu_devices(target: GpuTarget, *, hosts: int, per_host: int) -> list[Any]:
    """Virtual devices of such GPUs, numbered host by host. JAX must be set to run on the CPU (`jax_platforms`); otherwise the
    plugin looks for a driver, and JAX drops the plugin if there is none."""
    from jax.experimental import topologies

    # XLA warns of every program that uses more than 80 % of the memory. JAX enables warnings by default.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    shape = f"1x{hosts}x{per_host}"  # slices (groups of hosts with NVLink between them), hosts, GPUs
    return list(topologies.get_topology_desc(platform="cuda", target_config=target.textproto(), topology=shape).devices)
