"""Matrix products of a compiled program: `dot`, convolutions on TPUs, and cuBLAS calls on GPUs."""

from __future__ import annotations

import dataclasses
import math
import re

from dpo_jax.runtime.hlo_text import Body, Execution, Instruction, executions, parse, shapes


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product of one device, run `times` in a call of the program. Types are XLA's: bf16, f32.

    `how` is "dot", "convolution" or the cuBLAS function. `operands` are the types that XLA multiplies: a `dot` in a fusion may
    convert its operands first. `source` is the place in the model, from JAX's name stack.
    """

    how: str
    operands: tuple[str, str]
    result: str
    shape: tuple[int, ...]
    flops: float  # of one execution
    times: int
    source: str


def products(text: str) -> list[Product]:
    """Every matrix product in `compiled.as_text()`. Products inside custom kernels (Pallas, cuDNN) are not visible."""
    found = (product_of(execution) for execution in executions(*parse(text)))
    return [one for one in found if one is not None]


def product_of(execution: Execution) -> Product | None:
    one, body = execution.one, execution.body
    cublas = one.target.startswith("__cublas")
    if not cublas and one.op not in ("dot", "convolution"):
        return None
    left, right = ((shapes(body[name].type) or [("", ())])[0] if name in body else ("", ()) for name in one.operands[:2])
    name, shape = shapes(one.type)[_operand_arrays(one, body) if one.op.endswith("-start") else 0]
    source = re.search(r'op_name="([^"]*)"', one.attributes)
    return Product(
        how=one.target if cublas else one.op,
        operands=(left[0], right[0]),
        result=name,
        shape=shape,
        flops=_convolution(one, left[1], right[1], shape) if one.op == "convolution" else _dot(one, left[1], shape),
        times=execution.times,
        source=source[1] if source else "",
    )


def _operand_arrays(one: Instruction, body: Body) -> int:
    """Number of arrays in the type of an asynchronous operation that are operands; they precede the results."""
    return sum(len(shapes(body[name].type)) for name in one.operands if name in body)


def _dot(one: Instruction, left: tuple[int, ...], result: tuple[int, ...]) -> float:
    """FLOPs: two per multiply-add."""
    plain = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    cublas = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', one.attributes)
    dims = (plain or cublas or ("", ""))[1].replace('"', "")
    return 2.0 * math.prod(result) * math.prod(left[int(d)] for d in dims.split(",") if d)


def _convolution(one: Instruction, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]) -> float:
    """FLOPs as for a product, without positions in the padding."""
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
    """Number of (output, kernel position) pairs that hit an input along one spatial axis."""

    def of(word: str, default: str) -> str:
        return window.get(word, [default] * (axis + 1))[axis]

    stride, dilate, grow = int(of("stride", "1")), int(of("rhs_dilate", "1")), int(of("lhs_dilate", "1"))
    low = int(of("pad", "0_0").split("_")[0])
    places = (out * stride + at * dilate - low for out in range(outputs) for at in range(size))
    return sum(0 <= place <= (length - 1) * grow and place % grow == 0 for place in places)
