"""The named device mesh `data x fsdp x expert x context x tensor`, and the sharding of every array on it.

A model names the logical axes of its parameters (`Model.axes`); `models.logical_axes.RULES` maps each to a mesh axis. The rows
of a batch are sharded over data, fsdp and expert together. Parameters are replicated along `data`. Along `fsdp` each device
keeps a slice of each matrix and gathers it layer by layer (ZeRO-3). Along `expert` it keeps some experts and a full copy of the
rest (`models.expert_mixture`). Along `tensor` heads and MLP columns are sharded (Megatron). Along `context` the positions of
each row are sharded (`models.context`) and parameters are replicated: all devices along it receive the whole batch, a few
integers per token, and each computes its part of the positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax.models.checkpoint_stream import path_of
from dpo_jax.models.logical_axes import RULES
from dpo_jax.runtime.mesh_shape import MeshError, Units, mesh_shape, uneven, without_experts
from dpo_jax.types import ROW_AXES, TOKEN_AXES

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
FEW = 32  # largest size of a leaf replicated although it belongs to no parameter: counts and constants of an optimizer


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over `devices` (default: all of all hosts), fast links innermost. Pod slices are along `data`.

    Raises `MeshError` if the sizes do not fit the number of devices or slices.

    >>> make_mesh(fsdp=-1, devices=jax.devices()[:2]).shape["fsdp"]
    2
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(len(devices), data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # If a mesh axis is longer than every torus axis (8 on a 4 x 4 slice), two torus axes share it.
        grid = (
            mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            if devices[0].platform == "tpu"
            else np.array(devices)
        )
    elif shape[0] % slices:
        raise MeshError(f"mesh data {shape[0]}: must be a multiple of the {slices} slices; only data can span slices")
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:])), devices
        )
    return Mesh(grid.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def row_shards(mesh: Mesh) -> int:
    """Number of shards of the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def token_shards(mesh: Mesh) -> int:
    """Number of shards of the tokens of a batch."""
    return math.prod(mesh.shape[axis] for axis in TOKEN_AXES)


def host_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this host supplies the `index`-th of `count` equal parts of the rows of a batch.

    Hosts along the context and tensor axes supply the same part. It is (0, 1), the whole batch, on all hosts if the row shards
    of some host do not follow one another. That is common on TPUs, where the mesh follows the links of the torus: a host of
    2 x 2 chips in a v5e 4x4 slice has the row shards 0, 1, 6 and 15 of 16. The batch is a few integers per token, and the
    features of its images. Raises `MeshError` if the mesh has no device of this host.
    """
    shards: dict[int, list[int]] = {}
    for number, devices in enumerate(mesh.devices.reshape(row_shards(mesh), -1)):
        for process in {device.process_index for device in devices}:
            shards.setdefault(process, []).append(number)
    if jax.process_index() not in shards:
        raise MeshError(f"no device of host {jax.process_index()} is in the mesh")
    size = len(next(iter(shards.values())))
    runs = all(own == list(range(own[0], own[0] + size)) and own[0] % size == 0 for own in shards.values())
    if not runs or row_shards(mesh) % size:
        return 0, 1
    return shards[jax.process_index()][0] // size, row_shards(mesh) // size


def variable_shardings(variables: Any, axes: Any, mesh: Mesh, *, units: Units | None = None) -> dict[tuple[str, ...], Any]:
    """{path: NamedSharding} of all variables (arrays or `ShapeDtypeStruct`s), by their logical `axes`.

    Raises `MeshError`, naming parameter, axis and sizes, for a name without a rule, two axes of one parameter on the same mesh
    axis, a length that does not divide, and an expert axis for a model without experts.
    """
    specs = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, PartitionSpec))
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    if len(specs) != len(leaves):
        raise MeshError(f"the model names the axes of {len(specs)} parameters but has {len(leaves)}")
    if problem := without_experts({axis for spec in specs for axis in spec}, mesh.shape):
        raise MeshError(problem)
    return {
        path_of(path): NamedSharding(mesh, _spec(".".join(path_of(path)), leaf.shape, tuple(spec), mesh, units or {}))
        for (path, leaf), spec in zip(leaves, specs, strict=True)
    }


def _spec(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, units: Units) -> PartitionSpec:
    if len(axes) != len(shape):
        raise MeshError(f"{name}: {len(axes)} axes {axes} are named, but its shape is {shape}")
    taken: dict[str, str] = {}
    spec: list[str | None] = []
    for axis, length in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise MeshError(f"{name}: no rule places its axis {axis!r} (length {length}); RULES has {list(RULES)}")
        over = RULES[axis] if axis is not None else None
        spec.append(over)
        if axis is None or over is None:
            continue
        if over in taken:
            raise MeshError(f"{name} {shape}: its axes {taken[over]!r} and {axis!r} would both be sharded over {over}")
        taken[over] = axis
        unit = units.get(axis, 1)
        if problem := uneven(axis, length, over=over, size=mesh.shape[over], unit=unit, devices=mesh.size):
            raise MeshError(f"{name} {shape}: {problem}")
    return PartitionSpec(*spec)


def tree_shardings(tree: Any, variables: Mapping[tuple[str, ...], Any] | None, mesh: Mesh) -> Any:
    """Shardings of a state (or of variables) derived from those of its parameters, as a tree like `tree`; None: all replicated.

    A leaf whose path ends in the path of a parameter (gradients, moments, averages) is sharded like it. If it lacks one axis of
    the parameter (Adafactor's row and column means), it is sharded like the remaining axes. Small leaves are replicated. Raises
    `MeshError` for any other leaf.
    """
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}

    def of(path: Any, leaf: Any) -> NamedSharding:
        if variables is None:
            return NamedSharding(mesh, PartitionSpec())
        path = path_of(path)
        suffix = next((path[start:] for start in range(len(path)) if path[start:] in variables), None)
        if suffix is not None and shapes.setdefault(suffix, leaf.shape) == leaf.shape:
            return variables[suffix]
        if suffix is not None and (spec := _without_axis(variables[suffix].spec, shapes[suffix], leaf.shape)) is not None:
            return NamedSharding(mesh, spec)
        if math.prod(leaf.shape) <= FEW:
            return NamedSharding(mesh, PartitionSpec())
        raise MeshError(f"{'.'.join(path)} {leaf.shape}: belongs to no parameter, so its sharding is unknown")

    return jax.tree_util.tree_map_with_path(of, tree)


def _without_axis(spec: PartitionSpec, shape: tuple[int, ...], left: tuple[int, ...]) -> PartitionSpec | None:
    """The spec of an array with shape `left`, if that is `shape` without one axis (the last of equal ones); otherwise None."""
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    for axis in reversed(range(len(shape))):
        if (*shape[:axis], *shape[axis + 1 :]) == left:
            return PartitionSpec(*axes[:axis], *axes[axis + 1 :])
    return None


def mesh_sizes(tree: Any) -> dict[str, int]:
    """{axis: size} of the mesh of `tree`; {} if it has none."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    return next((dict(s.mesh.shape) for s in shardings if isinstance(s, NamedSharding)), {})
