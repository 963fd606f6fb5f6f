"""What a compiled program does, read from its text: collectives and matrix products, each as often as its loops run it.

XLA's own `cost_analysis` counts the body of a loop once, and layers, microbatches and chunks of the head are all loops.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)[a-z0-9]*\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


@dataclasses.dataclass
class Collective:
    """`count` executions a step; `operand_bytes` that a device puts in, `moved_bytes` that leave it on a ring."""

    kind: str
    count: int = 0
    operand_bytes: float = 0.0
    moved_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of one device and one call of the program. `unknown_loops` counted once: nothing says how often they run."""

    collectives: dict[str, Collective]
    matmul_flops: float  # without those inside custom kernels
    unknown_loops: int
    kernels: float  # executions of custom TPU kernels


Computations = dict[str, dict[str, Instruction]]


def summarize(text: str) -> Summary:
    """Reads `compiled.as_text()`, of one device after partitioning."""
    computations, entry = parse(text)
    found: dict[str, Collective] = {}
    flops = kernels = 0.0
    unknown = 0
    seen: dict[tuple[str, str], int] = {}

    def visit(name: str, times: int, caller: str, fused: bool) -> None:
        nonlocal flops, kernels, unknown
        body = computations.get(name, {})
        for one in body.values():
            kind = _kind(one, name)
            if kind in COLLECTIVES:
                # Pieces of one transfer, spread over several fusions so that it overlaps them, share a channel.
                channel = re.search(r"channel_id=(\d+)", one.attributes)
                key = (caller, channel[1] if channel and fused else f"{name}/{one.name}")
                if times > seen.get(key, 0):
                    _add(found.setdefault(kind, Collective(kind)), one, body, times - seen.get(key, 0))
                    seen[key] = times
            elif one.op in ("dot", "convolution"):
                flops += times * _flops(one, body)
            elif one.op == "custom-call" and "tpu_custom_call" in one.attributes:
                kernels += times
            if one.op == "while":
                condition, loop = (re.search(rf"{word}=%?([\w.\-]+)", one.attributes) for word in ("condition", "body"))
                if condition and loop:
                    trips = _trips(one, body, computations.get(condition[1], {}), computations.get(loop[1], {}))
                    unknown += trips is None
                    visit(loop[1], times * (1 if trips is None else trips), loop[1], False)
            elif not one.op.endswith(("-done", "-update")):
                for called in _called(one):
                    fusion = one.op == "fusion"
                    visit(called, times, caller if fusion else called, fusion)

    visit(entry, 1, entry, False)
    return Summary(found, flops, unknown, kernels)


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


def _called(one: Instruction) -> Iterator[str]:
    # The scalar function of a reduction, and of the sum of an all-reduce, is no work worth counting.
    if one.op in ("fusion", "call", "conditional", "async-start"):
        for names in _CALLS.findall(one.attributes):
            yield from (name.strip().lstrip("%") for name in names.split(",") if name.strip())
        yield from re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.attributes)


def shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, lengths) of every array in the text of a type."""
    return [(name, tuple(int(n) for n in dims.split(",") if n)) for name, dims in _SHAPE.findall(type_)]


def _bytes(type_: str) -> float:
    return sum(math.prod(dims) * _item_bytes(name) for name, dims in shapes(type_))


def _item_bytes(name: str) -> float:
    bits = re.search(r"\d+", name)
    return 1.0 if bits is None else int(bits[0]) / 8  # pred, else f32, bf16, s32, f8


def _kind(one: Instruction, computation: str) -> str:
    """The operation without its asynchronous form. TPUs run a reduce-scatter as a fusion of an all-reduce and a slice of it."""
    kind = one.op.removesuffix("-start")
    return "reduce-scatter" if kind == "all-reduce" and computation.startswith("all-reduce-scatter") else kind


def _add(total: Collective, one: Instruction, body: dict[str, Instruction], times: int) -> None:
    operand = sum(_bytes(body[name].type) for name in one.operands if name in body)
    size = _group(one.attributes)
    ring = (size - 1) / size
    factor = {"all-gather": size - 1, "all-reduce": 2 * ring, "reduce-scatter": ring, "all-to-all": ring}
    total.count += times
    total.operand_bytes += times * operand
    total.moved_bytes += times * operand * factor.get(total.kind, 1.0)


def _group(attributes: str) -> int:
    """How many devices exchange, in each of XLA's notations."""
    mesh = re.search(r"replica_groups=\S*?mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]) if axis in sizes) or 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed[1].split(",")) if listed else 1


def _trips(loop: Instruction, around: dict[str, Instruction], condition: dict[str, Instruction], body: dict[str, Instruction]):
    """How often a loop runs; None where that is not written down."""
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


def _element(tuple_: Instruction | None, index: int, body: dict[str, Instruction]) -> Instruction | None:
    if tuple_ is None or tuple_.op != "tuple":
        return None
    one = body.get(tuple_.operands[index])
    while one is not None and one.op in ("copy", "bitcast"):
        one = body.get(one.operands[0])
    return one


def _stride(update: Instruction | None, body: dict[str, Instruction]) -> int:
    if update is None or update.op != "add":
        return 1
    return next((n for n in (_constant(body.get(name)) for name in update.operands) if n), 1)


def _constant(one: Instruction | None) -> int | None:
    return int(one.operands[0]) if one and one.op == "constant" and re.fullmatch(r"-?\d+", one.operands[0]) else None


def _flops(one: Instruction, body: dict[str, Instruction]) -> float:
    """Two for each multiplication with an addition. A convolution with padding does not count what lies outside."""
    result = shapes(one.type)[0][1]
    left, right = (shapes(body[name].type)[0][1] if name in body else () for name in one.operands[:2])
    if one.op == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        return 2.0 * math.prod(result) * math.prod(left[int(d)] for d in (dims[1] if dims else "").split(",") if d)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None or not left or not right:
        return 0.0
    lhs, rhs, out = labels[1], labels[2], labels[3]
    flops = 2.0 * right[rhs.index("i")] * result[out.index("b")] * result[out.index("f")]
    window = {word: text.split("x") for word, text in re.findall(r"(\w+)=([\dx_\-]+)", _braces(one.attributes, "window="))}
    for axis in (label for label in rhs if label.isdigit()):
        flops *= _valid(left[lhs.index(axis)], result[out.index(axis)], right[rhs.index(axis)], window, int(axis))
    return flops


def _braces(attributes: str, word: str) -> str:
    found = re.search(re.escape(word) + r"\{([^}]*)\}", attributes)
    return found[1] if found else ""


def _valid(length: int, outputs: int, size: int, window: dict[str, list[str]], axis: int) -> int:
    """Pairs of an output and a kernel position that meet an input along one spatial axis."""

    def of(word: str, default: str) -> str:
        return window.get(word, [default] * (axis + 1))[axis]

    stride, dilate, grow = int(of("stride", "1")), int(of("rhs_dilate", "1")), int(of("lhs_dilate", "1"))
    low = int(of("pad", "0_0").split("_")[0])
    places = (out * stride + at * dilate - low for out in range(outputs) for at in range(size))
    return sum(0 <= place <= (length - 1) * grow and place % grow == 0 for place in places)
