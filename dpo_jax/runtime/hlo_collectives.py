"""Collectives of a compiled program: counts, bytes, and the bytes that leave the host."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from dpo_jax.runtime.hlo_text import Body, Execution, Instruction, array_bytes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass
class Collective:
    """`count` executions per step; `operand_bytes` that a device contributes, `moved_bytes` that it sends on a ring.

    `crossing_bytes` are the `moved_bytes` of groups with devices of several hosts. A ring leaves each host once, and NCCL makes
    as many rings as a group has devices on a host, each through a different network card. So `network_bytes`, through the card
    of one device, are `crossing_bytes` divided by the group's devices per host.
    """

    kind: str
    count: int = 0
    operand_bytes: float = 0.0
    moved_bytes: float = 0.0
    crossing_bytes: float = 0.0
    network_bytes: float = 0.0


def kind_of(execution: Execution) -> str:
    """The operation without its asynchronous form. TPUs run a reduce-scatter as a fusion of an all-reduce and a slice."""
    kind = execution.one.kind
    scattered = kind == "all-reduce" and execution.computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if scattered else kind


def add(total: Collective, one: Instruction, body: Body, times: int, *, host_devices: int | None) -> None:
    """Adds a collective that runs `times`. `host_devices`: consecutively numbered devices per host; None: one host."""
    operand = sum(array_bytes(body[name].type) for name in one.operands if name in body)
    size = _group_size(one.attributes)
    ring = (size - 1) / size
    factor = {"all-gather": size - 1, "all-reduce": 2 * ring, "reduce-scatter": ring, "all-to-all": ring}
    moved = times * operand * factor.get(total.kind, 1.0)
    total.count += times
    total.operand_bytes += times * operand
    total.moved_bytes += moved
    rings = _rings(one.attributes, host_devices) if host_devices else None
    if rings:
        total.crossing_bytes += moved
        total.network_bytes += moved / rings


def _rings(attributes: str, host_devices: int) -> int | None:
    """Devices of a group on one of its hosts, if some group spans several hosts; otherwise None."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        sent = re.findall(r"\{(\d+),(\d+)", pairs[1])
        return 1 if any(int(a) // host_devices != int(b) // host_devices for a, b in sent) else None
    groups = device_groups(attributes)
    if groups is None:
        return None
    counts = [np.unique(group // host_devices, return_counts=True)[1] for group in groups]
    crossing = [int(count.min()) for count in counts if len(count) > 1]
    return min(crossing, default=None)


def device_groups(attributes: str) -> np.ndarray | None:
    """Device numbers [groups, devices of a group] of `replica_groups`, in each of XLA's notations; None if there are none."""
    mesh = _mesh(attributes)
    if mesh is not None:
        sizes, chosen = mesh
        grid = np.arange(math.prod(sizes)).reshape(sizes)
        return np.moveaxis(grid, chosen, range(-len(chosen), 0)).reshape(-1, math.prod(sizes[axis] for axis in chosen))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        dims = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else range(len(dims))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(int(iota[1]), int(iota[2]))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", attributes)
    return (
        np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]) if listed else None
    )


def _mesh(attributes: str) -> tuple[list[int], list[int]] | None:
    """(sizes, axes of the group) of the notation mesh['data'=2,'fsdp'=4] {'fsdp'}. 'fsdp':(2)2 is part of an axis: 2 places,
    after 2 in front of it; the axis is then split into three."""
    found = re.search(r"replica_groups=\S*?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if not found:
        return None
    chosen = {name: part for name, part in re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", found[2])}
    sizes: list[int] = []
    axes: list[int] = []
    for name, size in re.findall(r"'([^']+)'=(\d+)", found[1]):
        part = re.fullmatch(r"\((\d+)\)(\d+)", chosen.get(name, ""))
        before, here = (int(part[1]), int(part[2])) if part else (1, int(size))
        axes += [len(sizes) + 1] if name in chosen else []
        sizes += [before, here, int(size) // (before * here)]
    return sizes, axes


def _group_size(attributes: str) -> int:
    groups = device_groups(attributes)
    return 1 if groups is None else groups.shape[1]
