"""Errors of calls whose arrays were not placed by the partitioner: those from inside JAX do not say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding


def is_committed(leaf: Any) -> bool:
    """Whether an array must stay on its devices. JAX moves others, such as those of the host."""
    return isinstance(leaf, jax.Array) and leaf.committed


def is_on(mesh: Mesh, leaf: Any) -> bool:
    """Whether an array is on the devices of `mesh`, and not sharded over another one."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or sharding.device_set != {*mesh.devices.flat}:
        return False
    return not isinstance(sharding, NamedSharding) or sharding.mesh == mesh


def _told(expected: str, call: Callable[..., Any], placed: Callable[[Any], bool]) -> Callable[..., Any]:
    def run(tree: Any, *rows: Any) -> Any:
        try:
            return call(tree, *rows)
        except Exception as error:  # looked at only now, so that a step costs nothing
            if all(map(placed, jax.tree.leaves(tree))):
                raise
            raise ValueError(f"{expected}, got arrays placed in another way") from error

    return run


# `call(tree, ...)`, which raises ValueError in place of any other error if a leaf of `tree` is not `placed`.
told_of_state = functools.partial(
    _told, "state: expected partitioner.init_state(partial(init_state, tx=tx), partitioner.put_variables(variables))"
)
told_of_variables = functools.partial(_told, "variables: expected partitioner.put_variables(variables)")
