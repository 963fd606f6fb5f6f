"""Mesh sizes, and checks that they fit the devices and the axes of a model. Needs no JAX and no device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping

from dpo_jax.models.logical_axes import RULES

Units = Mapping[str, int]
"""Granularity of logical axes: `{"heads": 64}` shards only at multiples of 64, which keeps heads whole."""


class MeshError(ValueError):
    """The mesh does not fit the devices, or the parameters do not fit the mesh."""


def mesh_words(sizes: Mapping[str, int | str]) -> str:
    """A mesh in words. The expert and context axes are named only if larger than 1.

    >>> mesh_words({"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1})
    'data 2 x fsdp 4 x tensor 1'
    """
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if name not in ("expert", "context") or size != 1)


def mesh_shape(
    devices: int, *, data: int = 1, fsdp: int = -1, expert: int = 1, context: int = 1, tensor: int = 1
) -> tuple[int, ...]:
    """Sizes of the axes, with one -1 filled in. Raises `MeshError` unless their product is `devices`."""
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    asked = mesh_words(sizes)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(f"mesh {asked}: sizes are at least 1, and one of them may be -1 (the rest)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        nearest = mesh_words(dict(zip(sizes, _nearest_shape(devices, sizes), strict=True)))
        raise MeshError(
            f"mesh {asked}: {fixed} does not {'divide' if free else 'equal'} the {devices} devices; "
            f"the nearest mesh is {nearest}"
        )
    return tuple(sizes.values())


def _nearest_shape(devices: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with `devices` devices that is the fewest doublings and halvings from `sizes`, where -1 is any size."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    choices = ([1] if name in ("expert", "context") and size == 1 else divisors for name, size in sizes.items())
    shapes = [shape for shape in itertools.product(*choices) if math.prod(shape) == devices]
    wanted = [(axis, size) for axis, size in enumerate(sizes.values()) if size != -1]

    def distance(shape: tuple[int, ...]) -> tuple[float, ...]:
        return (round(sum(abs(math.log2(shape[axis] / size)) for axis, size in wanted), 6), *reversed(shape))

    return min(shapes, key=distance)


def uneven(axis: str, length: int, *, over: str, size: int, unit: int, devices: int) -> str | None:
    """Message on a logical axis that does not divide among `size` devices along `over`; None if it does."""
    count = length // unit
    if count % size == 0:
        return None
    nearest = next(smaller for smaller in range(size, 0, -1) if count % smaller == 0 and devices % smaller == 0)
    what = f"axis {axis!r} of {count}" + (f" x {unit}" if unit > 1 else "")
    return f"{what} cannot be split over {over} {size}; the nearest size that can is {nearest}"


def check_lengths(lengths: Mapping[str, int], sizes: Mapping[str, int], *, units: Units) -> None:
    """Raises `MeshError` for logical axes of these `lengths` that do not divide along their mesh axis of these `sizes`."""
    devices = math.prod(sizes.values())
    cut = [(axis, length, over) for axis, length in lengths.items() if (over := RULES[axis]) is not None]
    found = (uneven(a, n, over=over, size=sizes[over], unit=units.get(a, 1), devices=devices) for a, n, over in cut)
    if problems := [problem for problem in (without_experts(lengths, sizes), *found) if problem]:
        raise MeshError("; ".join(problems))


def without_experts(axes: Container[str], sizes: Mapping[str, int]) -> str | None:
    """Message on a mesh with an expert axis for a model without experts; None if all is well."""
    if sizes["expert"] == 1 or "experts" in axes:
        return None
    return (
        f"expert {sizes['expert']} shards the experts of a mixture, but this model has none: leave it 1, and use data or fsdp"
    )
