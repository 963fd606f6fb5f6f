"""Parser of the text of a compiled program, with the execution count of each instruction.

XLA's own `cost_analysis` counts a loop body once, but layers, microbatches and chunks of the head are all loops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from dpo_jax.models.grouped_product import ROUTED_LOOP

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)[a-z0-9]*\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")
# The scalar function of a reduction or all-reduce is not worth counting.
_CALLING = ("fusion", "call", "conditional", "async")


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def kind(self) -> str:
        """The operation without its asynchronous form."""
        return self.op.removesuffix("-start")

    @property
    def target(self) -> str:
        """The library function or kernel that a custom call runs; "" for other operations."""
        found = re.search(r'custom_call_target="([^"]+)"', self.attributes) if self.kind == "custom-call" else None
        return found[1] if found else ""


Body = dict[str, Instruction]
Computations = dict[str, Body]


class Execution(NamedTuple):
    """An instruction that runs `times` in one call of the program.

    `caller`: the innermost enclosing computation that is not a fusion. `endless`: a loop with unknown trip count; its body
    counts once. `routed`: a product whose length depends on the routing of tokens: a loop or a kernel of ragged products. The
    body of such a loop is left out.
    """

    one: Instruction
    body: Body
    computation: str
    times: int
    caller: str
    fused: bool
    endless: bool = False
    routed: bool = False


def executions(computations: Computations, entry: str) -> Iterator[Execution]:
    """All executed instructions, including those inside loops, calls, branches and fusions."""
    yield from _visit(computations, entry, 1, entry, False)


def _visit(computations: Computations, name: str, times: int, caller: str, fused: bool) -> Iterator[Execution]:
    body = computations.get(name, {})
    for one in body.values():
        if one.op == "while":
            condition, loop = (re.search(rf"{word}=%?([\w.\-]+)", one.attributes) for word in ("condition", "body"))
            trips = None
            if condition and loop:
                trips = _trips(one, body, computations.get(condition[1], {}), computations.get(loop[1], {}))
            routed = trips is None and ROUTED_LOOP in one.attributes
            yield Execution(one, body, name, times, caller, fused, bool(loop) and trips is None and not routed, routed)
            if loop and not routed:
                yield from _visit(computations, loop[1], times * (1 if trips is None else trips), loop[1], False)
            continue
        routed = one.name.startswith("ragged-dot") and one.target == "tpu_custom_call"
        yield Execution(one, body, name, times, caller, fused, routed=routed and "metadata" not in one.name)
        for called in called_by(one):
            fusion = one.kind == "fusion"
            yield from _visit(computations, called, times, caller if fusion else called, fusion)


def parse(text: str) -> tuple[Computations, str]:
    """({computation: {name: instruction}}, the entry computation)."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        found = _INSTRUCTION.match(line) if current is not None else None
        if found and current is not None:
            inside, rest = _until_closed(line, found.end())
            operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(name.strip() for name in inside.split(","))
            current[found[2]] = Instruction(found[2], found[3], found[4], operands, rest, bool(found[1]))
    return computations, entry


def _until_closed(line: str, start: int) -> tuple[str, str]:
    depth = 1
    for place in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return line[start:place], line[place + 1 :]
    return line[start:], ""


def called_by(one: Instruction) -> Iterator[str]:
    """The computations that an instruction runs once, loops excluded."""
    if one.kind in _CALLING:
        for names in _CALLS.findall(one.attributes):
            yield from (name.strip().lstrip("%") for name in names.split(",") if name.strip())
        yield from re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.attributes)


def shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, shape) of every array in the text of a type."""
    return [(name, tuple(int(n) for n in dims.split(",") if n)) for name, dims in _SHAPE.findall(type_)]


def array_bytes(type_: str) -> float:
    """Bytes of all arrays of a type."""
    return sum(math.prod(dims) * _item_bytes(name) for name, dims in shapes(type_))


def _item_bytes(name: str) -> float:
    bits = re.search(r"\d+", name)
    return 1.0 if bits is None else int(bits[0]) / 8  # pred, else f32, bf16, s32, f8


def _trips(loop: Instruction, around: Body, condition: Body, body: Body) -> int | None:
    """Trip count of a loop; None if unknown."""
    known = re.search(r'known_trip_count"?[:=]\s*\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    test = next((one for one in condition.values() if one.root and one.op == "compare"), None)
    if test is None or "direction=LT" not in test.attributes:
        return None
    counter, limit = (condition.get(name) for name in test.operands)
    end = _constant(limit)
    if counter is None or counter.op != "get-tuple-element" or end is None:
        return None
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])  # pyright: ignore[reportOptionalSubscript]
    start = _constant(_element(around.get(loop.operands[0]), index, around)) or 0
    stride = _stride(_element(next((one for one in body.values() if one.root), None), index, body), body)
    return max(0, -(-(end - start) // stride))


def _element(tuple_: Instruction | None, index: int, body: Body) -> Instruction | None:
    if tuple_ is None or tuple_.op != "tuple":
        return None
    one = body.get(tuple_.operands[index])
    while one is not None and one.op in ("copy", "bitcast"):
        one = body.get(one.operands[0])
    return one


def _stride(update: Instruction | None, body: Body) -> int:
    if update is None or update.op != "add":
        return 1
    return next((n for n in (_constant(body.get(name)) for name in update.operands) if n), 1)


def _constant(one: Instruction | None) -> int | None:
    return int(one.operands[0]) if one and one.op == "constant" and re.fullmatch(r"-?\d+", one.operands[0]) else None
