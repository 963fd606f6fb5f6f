"""Costs of a compiled program, read from its text: collectives, matrix products, kernels and memory traffic.

Each instruction is counted as often as its enclosing loops run it.
"""

from __future__ import annotations

import dataclasses
import re

from dpo_jax.runtime.hlo_collectives import COLLECTIVES, Collective, add, kind_of
from dpo_jax.runtime.hlo_products import product_of, products
from dpo_jax.runtime.hlo_text import Execution, executions, parse, shapes
from dpo_jax.runtime.hlo_traffic import traffic

__all__ = ["Collective", "Summary", "products", "shapes", "summarize"]
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "__cudnn$fmha")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Costs of one device and one call of the program. `unknown_loops` have an unknown trip count and are counted once."""

    collectives: dict[str, Collective]
    matmul_flops: float  # without FLOPs inside custom kernels
    unknown_loops: int
    kernels: float  # executions of custom kernels: Pallas, and cuDNN's attention
    routed: float  # executions of expert products whose length depends on routing; excluded from all other numbers
    traffic_bytes: float  # memory traffic if each operation reads its operands and writes its results


def summarize(text: str, *, host_devices: int | None = None) -> Summary:
    """Summarize `compiled.as_text()`, of one device after partitioning. `host_devices`: devices per host, if the network
    between hosts matters."""
    computations, entry = parse(text)
    found: dict[str, Collective] = {}
    flops = kernels = moved = routed = 0.0
    unknown = 0
    seen: dict[tuple[str, str], int] = {}
    for execution in executions(computations, entry):
        one, kind, times = execution.one, kind_of(execution), execution.times
        if kind in COLLECTIVES:
            key = _transfer(execution)
            if times > seen.get(key, 0):
                total = found.setdefault(kind, Collective(kind))
                add(total, one, execution.body, times - seen.get(key, 0), host_devices=host_devices)
                seen[key] = times
        product = product_of(execution)
        flops += times * product.flops if product else 0.0
        routed += times if execution.routed else 0
        if execution.routed or one.name.startswith("ragged-dot"):
            continue
        kernels += times if one.target.startswith(_KERNELS) else 0
        unknown += execution.endless
        moved += 0.0 if execution.fused else times * traffic(one, execution.body, computations)
    return Summary(found, flops, unknown, kernels, routed, moved)


def _transfer(execution: Execution) -> tuple[str, str]:
    """Key of a transfer: its parts, spread over several fusions to overlap with them, share a channel."""
    channel = re.search(r"channel_id=(\d+)", execution.one.attributes)
    name = channel[1] if channel and execution.fused else f"{execution.computation}/{execution.one.name}"
    return execution.caller, name
