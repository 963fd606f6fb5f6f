"""Memory traffic of a compiled program: bytes read and written per operation, assuming no caching between operations.

On GPUs an operation of the outer computations is one kernel, and its operands and results are in memory. A fusion reads only
the slice that it uses of a large array (the weights of a layer), and writes only the part of a large array that it updates.
"""

from __future__ import annotations

from dpo_jax.runtime.hlo_text import Body, Computations, Instruction, array_bytes, called_by, shapes

# Operations without traffic of their own, and those whose parts are counted separately.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "async", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "reshape", "copy", "convert")  # allowed between a parameter and the operation that slices it


def traffic(one: Instruction, body: Body, computations: Computations) -> float:
    """Bytes read and written by one execution of an instruction outside fusions."""
    if one.op.endswith(("-done", "-update")) or one.kind in _FREE:
        return 0.0
    if one.kind == "fusion":
        inside = computations.get(next(called_by(one), ""), {})
        return _read_by_fusion(inside) + sum(_written(root, inside) for root in _roots(inside))
    if one.op in _SLICES:
        return 2 * array_bytes(one.type)
    if one.op in ("dynamic-update-slice", "scatter"):
        return 2 * _written(one, body)
    read = sum(array_bytes(body[name].type) for name in dict.fromkeys(one.operands) if name in body)
    written = array_bytes(one.type) - (_scratch(one.type) if one.kind == "custom-call" else 0.0)
    return read + (max(0.0, written - read) if one.op.endswith("-start") else written)  # its type repeats the operands


def _scratch(type_: str) -> float:
    """Bytes of scratch memory among the results of a library call, which it may not use."""
    return float(sum(dims[0] for name, dims in shapes(type_) if name == "s8" and len(dims) == 1))


def _roots(inside: Body) -> list[Instruction]:
    root = next((one for one in inside.values() if one.root), None)
    if root is None:
        return []
    return [inside[name] for name in root.operands if name in inside] if root.op == "tuple" else [root]


def _written(root: Instruction, inside: Body) -> float:
    while root.op in _SAME and root.operands[0] in inside:
        inner = inside[root.operands[0]]
        if inner.op not in (*_SAME, "dynamic-update-slice", "scatter"):
            break
        root = inner
    source = inside.get(root.operands[0]) if root.op == "get-tuple-element" else None
    if root.op == "parameter" or (source and source.kind == "custom-call" and _scratch(root.type)):
        return 0.0
    if root.op in ("dynamic-update-slice", "scatter"):
        update = inside.get(root.operands[1 if root.op == "dynamic-update-slice" else -1])
        return array_bytes(update.type) if update else 0.0
    return array_bytes(root.type) - (_scratch(root.type) if root.kind == "custom-call" else 0.0)


def _read_by_fusion(inside: Body) -> float:
    users: dict[str, list[Instruction]] = {}
    for one in inside.values():
        for name in dict.fromkeys(one.operands):
            users.setdefault(name, []).append(one)
    return sum(min(array_bytes(one.type), _read(one, users)) for one in inside.values() if one.op == "parameter")


def _read(source: Instruction, users: dict[str, list[Instruction]]) -> float:
    total = 0.0
    for user in users.get(source.name, ()):
        if user.op in _SLICES and user.operands[0] == source.name:
            total += array_bytes(user.type)
        elif user.op in ("dynamic-update-slice", "scatter") and user.operands[0] == source.name:
            continue  # updated in place
        elif user.op in _SAME and not user.root:
            total += _read(user, users)
        else:
            return array_bytes(source.type)
    return total
