"""Where arrays live and how a pure function is compiled: one `Partitioner` (see `dpo_jax.types`) per form of parallelism."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.types import Partitioner, Rows


def single_device(device: Any = None) -> Partitioner:
    """Everything on one device (default: the first). `put_*` copy: what they were given survives when a step donates it."""
    target = jax.local_devices()[0] if device is None else device

    def put(tree):
        return jax.device_put(tree, target, may_alias=False)

    def compile_map(fn):
        compiled = jax.jit(fn)
        return lambda variables, rows: jax.device_get(compiled(variables, jax.device_put(rows, target)))

    def compile_step(step):
        compiled = jax.jit(step, donate_argnums=0)
        return lambda state, rows: compiled(state, jax.device_put(rows, target))

    return Partitioner(
        axis_name=None,
        devices=1,
        compile_step=compile_step,
        compile_map=compile_map,
        put_state=put,
        get_state=jax.device_get,
        put_variables=put,
    )


def pmap_partitioner(devices: Sequence[Any] | None = None) -> Partitioner:
    """Data parallel through `jax.pmap` over the devices of this host: whole rows are split, state and variables replicated.

    Each device holds all parameters and all optimizer state, so the model must fit into one. A step must be written with
    `axis_name="data"` (`dpo_step(..., axis_name=partitioner.axis_name)`): it sums gradients and metrics over that axis itself.
    State and variables on the devices have a leading axis of length `devices`; `get_state` takes it off again.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    count = len(devices)
    replicated = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))

    def replicate(leaf):
        host = np.asarray(leaf)
        return jax.device_put(np.broadcast_to(host, (count, *host.shape)), replicated)

    def put(tree):
        return jax.tree.map(replicate, tree)

    def compile_step(step):
        compiled = jax.pmap(step, axis_name="data", devices=devices, donate_argnums=0)

        def run(state, rows):
            state, metrics = compiled(state, split_rows(rows, count))
            return state, jax.tree.map(_first_shard, metrics)

        return run

    def compile_map(fn):
        compiled = jax.pmap(fn, axis_name="data", devices=devices)
        return lambda variables, rows: jax.tree.map(_join, jax.device_get(compiled(variables, split_rows(rows, count))))

    return Partitioner(
        axis_name="data",
        devices=count,
        compile_step=compile_step,
        compile_map=compile_map,
        put_state=put,
        get_state=lambda tree: jax.tree.map(lambda leaf: np.asarray(_first_shard(leaf)), tree),
        put_variables=put,
    )


def split_rows(rows: Rows, parts: int) -> Rows:
    """Leaves `[n, ...]` to `[parts, n / parts, ...]`: part `i` holds the `i`-th run of rows with their examples.

    Raises ValueError, naming the field and both numbers, where `n` is no multiple of `parts`.
    """
    for field in dataclasses.fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, (np.ndarray, jax.Array)) and value.shape[0] % parts:
            raise ValueError(f"rows.{field.name} has length {value.shape[0]}, which {parts} devices cannot share equally")
    return jax.tree.map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), rows)


def _first_shard(leaf: jax.Array) -> Any:
    # Replicas are equal. Indexing `leaf[0]` would be a computation over all devices, and across hosts an error.
    shard = leaf.addressable_shards[0].data
    return shard.reshape(shard.shape[1:])


def _join(leaf: np.ndarray) -> np.ndarray:
    return leaf.reshape(-1, *leaf.shape[2:])
