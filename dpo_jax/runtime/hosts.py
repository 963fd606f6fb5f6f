"""Multi-host helpers: every process runs the same program, and the first one writes shared files.

A host here is a process of `jax.distributed`. With a single one, everything below is a no-op.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.models.digest import WeightsDigest
from dpo_jax.runtime.metrics import MetricsLog

# The first host may still be exporting the model when the others are done.
SHUTDOWN_SECONDS = 3600
# Hosts pull images, install and check before they join. JAX gives up after 5 minutes. DPO_JAX_JOIN_SECONDS takes precedence.
JOIN_SECONDS = 1800


logger = logging.getLogger(__name__)


class HostsError(ValueError):
    """The hosts cannot connect with these settings."""


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins `jax.distributed`. Call it before anything that queries JAX's devices.

    Arguments that are None come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. If these are unset too, JAX
    detects TPU pods, SLURM, Kubernetes and Open MPI; on any other machine there is one process. If a host sends no heartbeat
    for `heartbeat_seconds`, the others end. DPO_JAX_JOIN_SECONDS is how long hosts wait for each other at the start.

    Raises `HostsError` if only some of the three are set.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _from_environment("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _from_environment("JAX_PROCESS_ID") if process_id is None else process_id
    join_seconds = JOIN_SECONDS
    if os.environ.get("DPO_JAX_JOIN_SECONDS"):
        join_seconds = _from_environment("DPO_JAX_JOIN_SECONDS") or JOIN_SECONDS
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise HostsError(f"{', '.join(missing)} not given, but {', '.join(given.keys() - missing)}: give all three or none")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise HostsError(f"process_id {process_id} is not one of the {num_processes} processes 0 to {num_processes - 1}")
    # `agreement` spreads a signal to all hosts. JAX's own service would intercept the signal.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=join_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if missing and "coordinator_address should be defined" in str(error):
            logger.warning("no other hosts found: running as a single process")
            return
        raise HostsError(f"jax.distributed does not start: {error}") from error


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise HostsError(f"{name} must be a number, got {text!r}")
    return int(text)


def is_first() -> bool:
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every host has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def first_goes_first(name: str) -> Iterator[None]:
    """Context in which the first host runs first. The others start when it is done, and see its files if they share a disk."""
    if not is_first():
        barrier(name)
    try:
        yield
    finally:
        if is_first():
            barrier(name)


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any host."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_first(array: np.ndarray) -> np.ndarray:
    """The first host's array, bit for bit. The others pass one of the same shape and dtype."""
    if jax.process_count() == 1:
        return array
    as_bytes = np.ascontiguousarray(array).view(np.uint8)  # a sum of floats would lose the sign of zero
    return np.asarray(multihost_utils.broadcast_one_to_all(as_bytes)).view(array.dtype)


def run_on_first(make: Callable[[], Any]) -> Any:
    """The result of `make()`, called on the first host only and sent to all: JSON values."""
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make()).encode() if is_first() else b""
    # Padded with blanks to a power of two, because each length compiles a program of its own.
    length = int(from_first(np.array([1 << len(text).bit_length()]))[0])
    return json.loads(from_first(np.frombuffer(text.ljust(length), np.uint8)).tobytes())


def whole(leaf: Any) -> np.ndarray:
    """A sharded array as one numpy array on every host."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def gathered_chunks(leaf: Any, *, max_bytes: int = 256 << 20, multiple_of: int = 1) -> Iterator[np.ndarray]:
    """Successive chunks of the whole array along its first axis, each of about `max_bytes` at most, on every host.

    The length of all but the last is a multiple of `multiple_of`. A host should not have to hold all layers of a large
    parameter.
    """
    if not leaf.ndim or leaf.nbytes <= max_bytes:
        yield whole(leaf)
        return
    run = max(1, leaf.shape[0] * max_bytes // leaf.nbytes // multiple_of) * multiple_of
    for first in range(0, leaf.shape[0], run):
        yield whole(leaf[first : first + run])


def all_gather(mine: np.ndarray) -> np.ndarray:
    """The equally shaped arrays of all hosts, concatenated."""
    return np.asarray(multihost_utils.process_allgather(mine, tiled=True))


def metrics_log(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[MetricsLog | None]:
    """`MetricsLog` on the first host; None on the others, whose metrics are the same."""
    return MetricsLog(path) if is_first() else contextlib.nullcontext()


def shared_digest() -> WeightsDigest:
    """A digest of weights, computed by the hosts in shares of the parameters. All hosts read the same weights."""
    if jax.process_count() == 1:
        return WeightsDigest()
    return WeightsDigest(share=(jax.process_index(), jax.process_count()), joined=all_gather)


def agreement() -> Callable[[int], int]:
    """`agree(number)`: the largest number passed by any host, so that all hosts act on a signal in the same step.

    With several hosts it returns the result of the previous call, exchanged while the device was computing.
    """
    if jax.process_count() == 1:
        return lambda number: number
    mesh = Mesh(np.array(jax.devices()), ("hosts",))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    pending = None

    def agree(number: int) -> int:
        nonlocal pending
        mine = np.full(jax.local_device_count(), number, np.int32)
        everyones = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("hosts")), mine)
        before, pending = pending, largest(everyones)
        return 0 if before is None else int(before)

    return agree
