"""Step time by operation, as a text table from a JAX trace."""

from __future__ import annotations

import collections
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

OPERATIONS = 12  # listed one by one
TRACEABLE = "--xla_gpu_enable_command_buffer="
"""XLA flag that turns CUDA graphs off, so that a trace names single operations and not only whole graphs."""
_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{op_name="([^"]*)"', re.MULTILINE)


def slowest_operations(folder: Path) -> str:
    """Milliseconds by part of the model and direction, then the slowest operations of the compiled step.

    `folder` holds the output of `jax.profiler.trace` (the newest, if there are several) and the compiled programs
    (`hlo-*.txt`), which tell the part of the model that an operation comes from. An operation's time excludes the operations
    nested in it. If several shapes ran, operations of the same name are added up.
    """
    origin = {name: scope for text in sorted(folder.glob("hlo-*.txt")) for name, scope in _NAMED.findall(text.read_text())}
    files = sorted(folder.rglob("*.trace.json.gz"))  # in a folder named after the time, for each call of the profiler
    traces = [json.loads(gzip.decompress(file.read_bytes())) for file in files if file.parent == files[-1].parent]
    events = (event for trace in traces for event in trace["traceEvents"] if event.get("ph") == "X")
    spent = own_times(event for event in events if "hlo_op" in event.get("args", {}))
    total = sum(spent.values()) or 1.0
    parts: dict[tuple[str, str], float] = collections.defaultdict(float)
    for name, microseconds in spent.items():
        parts[part_of(origin.get(name, ""))] += microseconds

    def lines(rows: Iterable[tuple[float, str]]) -> list[str]:
        return [f"{us / 1e3:12,.1f} ms {us / total:6.1%}  {what}" for us, what in rows]

    by_part = sorted(((us, f"{direction:10} {part}") for (part, direction), us in parts.items()), reverse=True)
    slowest = sorted(((us, f"{name:32} {origin.get(name, '')}") for name, us in spent.items()), reverse=True)[:OPERATIONS]
    return "\n".join(["where the time went:", *lines(by_part), "", "slowest operations:", *lines(slowest)])


def own_times(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Microseconds of each operation, excluding nested operations: trace events of one thread nest."""
    threads: dict[Any, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    spent: dict[str, float] = collections.defaultdict(float)
    for found in threads.values():
        open_: list[tuple[float, str]] = []  # (end, operation) of the operations that enclose the current one
        for event in sorted(found, key=lambda event: (event["ts"], -event["dur"])):
            while open_ and open_[-1][0] <= event["ts"]:
                open_.pop()
            name = event["args"]["hlo_op"]
            if open_:
                spent[open_[-1][1]] -= event["dur"]
            spent[name] += event["dur"]
            open_.append((event["ts"] + event["dur"], name))
    return dict(spent)


def part_of(scope: str) -> tuple[str, str]:
    """(part of the model, direction) of an operation, from its name in the program such as `.../layers/mlp/up/dot_general`."""
    if "rematted_computation" in scope:
        direction = "recomputed"
    elif "transpose(" in scope:
        direction = "backward"
    else:
        direction = "forward" if "jvp(" in scope else "update"
    inside = re.search(r"layers/(\w+)", scope)
    if inside:
        return f"layers/{inside[1]}", direction
    for mark, part in (("unembed", "head"), ("while", "layers, between them"), ("final_norm", "final_norm")):
        if mark in scope:
            return part, direction
    return ("optimizer", direction) if direction == "update" and scope else ("rest", direction)
