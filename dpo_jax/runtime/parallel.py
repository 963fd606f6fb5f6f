"""Placement of arrays and compilation of pure functions: one `Partitioner` (see `dpo_jax.types`) per form of parallelism."""

from __future__ import annotations

import collections
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.models.checkpoint_stream import Part, assemble, assemble_parts, path_of
from dpo_jax.runtime.hosts import all_gather, whole
from dpo_jax.runtime.mesh import (
    Units,
    host_part,
    row_sharding,
    row_shards,
    tree_shardings,
    variable_shardings,
)
from dpo_jax.runtime.placement import is_committed, is_on, told_of_state, told_of_variables
from dpo_jax.types import Model, Partitioner, Rows, TrainState, Variables, init_shapes


def single_device(device: Any = None) -> Partitioner:
    """Everything on one device (default: the first). `put_*` copies, so the original survives when a step donates its state.

    >>> partitioner = single_device()
    >>> partitioner.compile_map(partial(reference_logps, model))(partitioner.put_variables(variables), rows).shape
    (2, 2)
    """
    target = jax.local_devices()[0] if device is None else device

    def put(tree):
        return jax.device_put(tree, target, may_alias=False)

    def placed(leaf):
        return not is_committed(leaf) or leaf.sharding.device_set == {target}

    def compile_map(fn):
        compiled = jax.jit(fn, compiler_options=_map_options(target))
        return told_of_variables(
            lambda variables, rows: jax.device_get(compiled(variables, jax.device_put(rows, target))), placed
        )

    def compile_step(step):
        compiled = jax.jit(step, donate_argnums=0)
        return told_of_state(lambda state, rows: compiled(state, jax.device_put(rows, target)), placed)

    return Partitioner(
        axis_name=None,
        row_shards=1,
        compile_step=compile_step,
        compile_map=compile_map,
        init_state=lambda make, variables: jax.jit(make, donate_argnums=0)(variables),
        put_state=put,
        get_state=jax.device_get,
        saved_shapes=functools.partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)),
        load_variables=functools.partial(assemble, put=put),
        make_variables=lambda make: jax.device_put(jax.jit(make)(), target),
        put_variables=put,
        to_host=jax.device_get,
    )


def pmap_partitioner(devices: Sequence[Any] | None = None) -> Partitioner:
    """Data parallelism by `jax.pmap` over `devices` (default: all of all hosts): rows are split, the rest is replicated.

    Each device holds all parameters and the whole optimizer state, so the model must fit on one. A step needs
    `axis_name="data"` (`dpo_step(..., axis_name=partitioner.axis_name)`) and sums gradients and metrics over that axis itself.
    State and variables on the devices have a leading axis of length `devices`; `get_state` removes it.

    >>> partitioner = pmap_partitioner(jax.devices()[:2])
    >>> step = partial(dpo_step, model=model, tx=tx, loss=partial(dpo_loss, beta=0.1), axis_name=partitioner.axis_name)
    >>> state = partitioner.init_state(partial(init_state, tx=tx), partitioner.put_variables(variables))
    >>> state, metrics = partitioner.compile_step(step)(state, rows)
    >>> print(f"{metrics['loss']:.4f}")
    0.6931
    """
    part = (jax.process_index(), jax.process_count()) if devices is None else (0, 1)
    mine = jax.local_devices() if devices is None else list(devices)
    count = len(mine)
    replicated = NamedSharding(Mesh(np.array(mine), ("data",)), PartitionSpec("data"))

    def replicate(leaf):
        host = np.asarray(leaf)
        return jax.device_put(np.broadcast_to(host, (count, *host.shape)), replicated)

    def put(tree):
        return jax.tree.map(replicate, tree)

    def get(tree):
        return jax.tree.map(lambda leaf: np.asarray(_first_shard(leaf)), tree)

    def placed(leaf):
        return np.shape(leaf)[:1] == (count,)

    def compile_step(step):
        _check_axis_name(step)
        compiled = jax.pmap(step, axis_name="data", devices=devices, donate_argnums=0)

        def run(state, rows):
            state, metrics = compiled(state, split_rows(rows, count))
            return state, jax.tree.map(_first_shard, metrics)

        return told_of_state(run, placed)

    def compile_map(fn):
        compiled = jax.pmap(fn, axis_name="data", devices=devices)

        def run(variables, rows):
            mine = jax.tree.map(_join, jax.device_get(compiled(variables, split_rows(rows, count))))
            return mine if part[1] == 1 else jax.tree.map(all_gather, mine)

        return told_of_variables(run, placed)

    def init_state(make, variables):
        return told_of_variables(jax.pmap(make, axis_name="data", devices=devices, donate_argnums=0), placed)(variables)

    return Partitioner(
        axis_name="data",
        row_shards=count * part[1],
        compile_step=compile_step,
        compile_map=compile_map,
        init_state=init_state,
        put_state=put,
        get_state=get,
        saved_shapes=functools.partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)),
        load_variables=functools.partial(assemble, put=replicate),
        make_variables=lambda make: put(jax.jit(make)()),
        put_variables=put,
        to_host=get,
        host_part=part,
    )


def _check_axis_name(step: Callable[..., Any]) -> None:
    """Raises ValueError if a step, a `partial`, takes an `axis_name` but was not given it: devices would drift apart."""
    parameter = inspect.signature(step).parameters.get("axis_name")
    if parameter is not None and parameter.default != "data":
        raise ValueError('under pmap, a step needs axis_name="data": partial(step, axis_name=partitioner.axis_name)')


def mesh_partitioner(mesh: Mesh, model: Model | None = None, *, units: Units | None = None) -> Partitioner:
    """`jit` over a mesh of `runtime.mesh.make_mesh`: data, FSDP and tensor parallelism by the model's logical axes.

    Rows are sharded over data, fsdp and expert, parameters by `models.logical_axes.RULES`, the optimizer state like its
    parameters. The step itself is unchanged: arrays are global, and XLA inserts the collectives. Compiled steps have
    `lower(state, rows)`. Without a model, or with one that names no axes (`Model.axes`), every device holds all parameters:
    plain data parallelism.

    >>> partitioner = mesh_partitioner(make_mesh(fsdp=-1, devices=jax.devices()[:2]), model)
    >>> step = partial(dpo_step, model=model, tx=tx, loss=partial(dpo_loss, beta=0.1))
    >>> state = partitioner.init_state(partial(init_state, tx=tx), partitioner.put_variables(variables))
    >>> state, metrics = partitioner.compile_step(step)(state, rows)
    >>> print(f"{metrics['loss']:.4f}")
    0.6931

    Raises `MeshError`, before anything is computed, if a parameter does not fit the mesh. `units`: see `mesh_shape.Units`.
    """
    _, of_variables = ({}, None) if model is None else _variables_on(mesh, model, units)
    by_row, shards, part = row_sharding(mesh), row_shards(mesh), host_part(mesh)

    def put(tree):
        return jax.tree.map(_place, tree, tree_shardings(tree, of_variables, mesh))

    def put_state(tree):
        left = collections.Counter(map(id, jax.tree.leaves(tree)))  # the same array may be in several places of a state

        def move(leaf, sharding):
            placed = _place(leaf, sharding)
            left[id(leaf)] -= 1
            if isinstance(leaf, jax.Array) and leaf.sharding == sharding and not left[id(leaf)]:
                placed.block_until_ready()
                leaf.delete()  # so that devices hold one leaf twice, not all
            return placed

        return jax.tree.map(move, tree, tree_shardings(tree, of_variables, mesh))

    def init_state(make, variables):
        # Under jit, so that no device holds a whole moment and the parameters are reused without a copy.
        shardings = tree_shardings(jax.eval_shape(make, variables), of_variables, mesh)
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)(variables)

    def make_variables(make):
        return jax.jit(make, out_shardings=tree_shardings(jax.eval_shape(make), of_variables, mesh))()

    def load_variables(shapes, pieces):
        if of_variables is None:
            return assemble(shapes, pieces, put=lambda leaf: _place(leaf, NamedSharding(mesh, PartitionSpec())))
        shardings = of_variables
        shape_of = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
        return assemble_parts(
            shapes,
            pieces,
            parts=lambda path, shape: set(_local_parts(shardings[path], shape).values()),
            place=lambda path, parts: _from_parts(shardings[path], shape_of[path], parts),
        )

    def put_rows(rows):
        _check_rows(rows, shards // part[1])
        if jax.process_count() == 1:
            return jax.device_put(rows, by_row)
        if part[1] == 1:  # every host has the whole batch
            return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, by_row, lambda index: x[index]), rows)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(by_row, x, (x.shape[0] * part[1], *x.shape[1:])), rows
        )

    def compile_map(fn):
        compiled = jit_map(fn, mesh)

        def run(variables, rows):
            with jax.set_mesh(mesh):
                return jax.device_get(compiled(variables, put_rows(rows)))

        return told_of_variables(run, lambda leaf: not is_committed(leaf) or is_on(mesh, leaf))

    return Partitioner(
        axis_name=None,
        row_shards=shards,
        compile_step=lambda step: _MeshStep(step, mesh, put_rows),
        compile_map=compile_map,
        init_state=init_state,
        put_state=put_state,
        get_state=lambda state: state,
        saved_shapes=functools.partial(
            jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        ),
        load_variables=load_variables,
        make_variables=make_variables,
        put_variables=put,
        to_host=lambda tree: jax.tree.map(whole, tree),
        host_part=part,
    )


def jit_step(step: Callable[..., Any], state: Any, mesh: Mesh) -> Any:
    """`jax.jit` of a step that donates its state and shards the new one like `state` (arrays or their shapes)."""
    out = jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=_overlapping(mesh))


def jit_map(fn: Callable[..., Any], mesh: Mesh) -> Any:
    """`jax.jit` of `fn(variables, rows)` with the whole result on every device."""
    options = (_overlapping(mesh) or {}) | (_map_options(mesh.devices.flat[0]) or {})
    return jax.jit(fn, out_shardings=NamedSharding(mesh, PartitionSpec()), compiler_options=options or None)


def _overlapping(mesh: Mesh) -> dict[str, Any] | None:
    """Compiler options with which several GPUs compute while they exchange parameters and gradients. XLA has this off, because
    it takes memory; for TPUs it is on."""
    several_gpus = mesh.size > 1 and _is_gpu(mesh.devices.flat[0])
    return {"xla_gpu_enable_latency_hiding_scheduler": True} if several_gpus else None


def _map_options(device: Any) -> dict[str, Any] | None:
    """Compiler options of programs that may sample. XLA would join the kernels of queries, keys and values into one matrix, and
    do so again for each token."""
    return {"xla_gpu_dot_merger_threshold_mb": 0} if _is_gpu(device) else None


def _is_gpu(device: Any) -> bool:
    return device.platform in ("gpu", "cuda")


def abstract_state(
    mesh: Mesh, model: Model, make: Callable[[Variables], TrainState], rows: Rows, *, units: Units | None = None
) -> tuple[TrainState, Rows]:
    """State `make(variables)` and rows as `ShapeDtypeStruct`s sharded as by `mesh_partitioner`. Nothing is computed.

    The devices of `mesh` may be virtual. Raises `MeshError` if a parameter does not fit the mesh, and `ValueError` if the rows
    do not divide.
    """
    shapes, of_variables = _variables_on(mesh, model, units)
    state = jax.eval_shape(make, shapes)
    _check_rows(rows, row_shards(mesh))
    shardings = tree_shardings(state, of_variables, mesh), jax.tree.map(lambda _: row_sharding(mesh), rows)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), (state, rows), shardings)


def _variables_on(mesh: Mesh, model: Model, units: Units | None) -> tuple[Variables, dict[tuple[str, ...], Any] | None]:
    """Shapes of the variables, and {path: sharding}; None if the model names no axes, so that all are replicated."""
    shapes = init_shapes(model)
    if model.axes is None:
        return shapes, None
    return shapes, variable_shardings(shapes, model.axes(), mesh, units=units)


class _MeshStep:
    """A step compiled for a mesh: the new state has the old one's sharding and reuses its memory."""

    def __init__(self, step: Callable[..., Any], mesh: Mesh, put_rows: Callable[[Any], Any]):
        self._step, self._mesh, self._put_rows, self._jit = step, mesh, put_rows, None
        self._checked = told_of_state(self._run, functools.partial(is_on, mesh))

    def __call__(self, state: Any, rows: Any) -> Any:
        return self._checked(state, rows)

    def _run(self, state: Any, rows: Any) -> Any:
        with jax.set_mesh(self._mesh):
            compiled = self._compiled(state)
            result = compiled(state, self._put_rows(rows))
        self._jit = compiled  # not before: it is that of a state placed as this mesh needs it
        return result

    def lower(self, state: Any, rows: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._compiled(state).lower(state, self._put_rows(rows))

    def _compiled(self, state: Any) -> Any:
        return jit_step(self._step, state, self._mesh) if self._jit is None else self._jit


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    on_devices = isinstance(leaf, jax.Array)
    if jax.process_count() > 1 and not (on_devices and not leaf.is_fully_addressable):
        # Every host has the whole array and takes its shards; device_put would first compare the copies of all hosts.
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index]).copy()
    if on_devices and not leaf.sharding.device_set.isdisjoint(sharding.device_set):
        # device_put reuses the buffer of a device that already has the shard, whatever may_alias says (jax 0.10.2).
        return jax.device_put(leaf, sharding).copy()
    return jax.device_put(leaf, sharding, may_alias=False)


def _local_parts(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[Any, Part]:
    """{device of this host: its box of the array}."""
    indices = sharding.addressable_devices_indices_map(shape)
    return {
        device: tuple(range_.indices(length)[:2] for range_, length in zip(index or (), shape, strict=True))
        for device, index in indices.items()
    }


def _from_parts(sharding: NamedSharding, shape: tuple[int, ...], parts: Mapping[Part, np.ndarray]) -> jax.Array:
    on_devices = []
    for device, part in _local_parts(sharding, shape).items():
        # The host also holds it until it has arrived.
        on_devices.append(jax.block_until_ready(jax.device_put(parts[part], device, may_alias=False)))
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


def split_rows(rows: Rows, parts: int) -> Rows:
    """Reshape leaves `[n, ...]` to `[parts, n / parts, ...]`: part `i` holds the `i`-th run of rows with their examples.

    Raises ValueError, naming the field and both numbers, if `n` is not a multiple of `parts`.
    """
    _check_rows(rows, parts)
    return jax.tree.map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), rows)


def _check_rows(rows: Any, parts: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows):
        if leaf.shape[0] % parts:
            field = jax.tree_util.keystr(path, simple=True)
            raise ValueError(f"rows.{field} has length {leaf.shape[0]}, which cannot be split equally over {parts} devices")


def _first_shard(leaf: jax.Array) -> Any:
    # Replicas are equal. `leaf[0]` would be a computation over all devices, and an error across hosts.
    shard = leaf.addressable_shards[0].data
    return shard.reshape(shard.shape[1:])


def _join(leaf: np.ndarray) -> np.ndarray:
    return leaf.reshape(-1, *leaf.shape[2:])
