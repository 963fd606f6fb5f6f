"""Multi-device checks: all device setups match single-device steps; a sharded state is saved and restored."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dpo_jax.checks.report import Result, Row, skipped
from dpo_jax.checks.training import (
    SIZES,
    STEPS,
    TX,
    apart,
    on_one_device,
    relative,
    small_model,
    small_variables,
    take_steps,
)
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner
from dpo_jax.step import init_state
from dpo_jax.types import Model, Partitioner

RUN_BAR = 1e-5  # losses and margins in nats, gradient norms relative
PARAMETERS_BAR = 1e-3  # relative to the distance that the parameters have moved
UNITS = {"heads": SIZES["head_size"], "kv_heads": SIZES["head_size"]}


def ways(count: int) -> dict[str, dict[str, int]]:
    """{name: sizes of the mesh} over `count` devices. The two key/value heads allow at most two tensor shards."""
    if count == 1:
        return {"mesh": {"data": 1}}
    found = {"data": {"data": count}, "fsdp": {"data": 1, "fsdp": count}}
    if count % 2 == 0:
        found["tensor"] = {"fsdp": count // 2, "tensor": 2}
    return {name: sizes for name, sizes in found.items() if SIZES["width"] % sizes.get("fsdp", 1) == 0}


def rows() -> Iterator[Row]:
    count = jax.local_device_count()
    made: dict[str, Callable[[Model], Partitioner]] = {"pmap": lambda _: pmap_partitioner(jax.local_devices())}
    made |= {name: functools.partial(_on_mesh, sizes=sizes) for name, sizes in ways(count).items()}
    what = {name: " x ".join(f"{axis} {size}" for axis, size in sizes.items()) for name, sizes in ways(count).items()}
    for name, make in made.items():
        told = what.get(name, f"pmap {count}") + (": only one device here, so nothing was split" if count == 1 else "")
        yield Row(
            f"parallel.{name}",
            f"{name} over several devices gives a different model from one device: check the links between the devices (NCCL, "
            "ICI), train with another --run.devices or mesh, and report it",
            functools.partial(_same_run, make, told),
        )
    yield Row(
        "checkpoint",
        "restored values differ from the saved ones: do not start a long run; check the disk (df, dmesg) and the orbax version",
        _saved_and_restored,
    )


def _on_mesh(model: Model, *, sizes: dict[str, int]) -> Partitioner:
    return mesh_partitioner(make_mesh(**{"fsdp": 1, **sizes}, devices=jax.local_devices()), model, units=UNITS)


def _same_run(make: Callable[[Model], Partitioner], told: str) -> Result:
    model = small_model("float32")[0]
    seen, params = take_steps(make(model), "float32")
    expected, expected_params = on_one_device("float32")
    difference = apart(seen, expected)
    gone = relative(expected_params, small_variables())
    way = relative(params, expected_params) / gone
    figure = f"{told}; {STEPS} steps apart {difference:.1e}, parameters {way:.1e} of their way"
    good = difference <= RUN_BAR and way <= PARAMETERS_BAR
    return Result(figure, good, bar=f"{RUN_BAR:g}, {PARAMETERS_BAR:g}", values={"steps": difference, "parameters": way})


def _saved_and_restored() -> Result:
    """Saves and restores a state sharded over all local devices, in a folder that is deleted afterwards."""
    if importlib.util.find_spec("orbax") is None:
        return skipped("orbax is missing: pip install orbax-checkpoint")
    if jax.process_count() > 1:
        return skipped("several processes, which share no folder here")
    from dpo_jax.runtime.checkpoint import Checkpoints

    count, model = jax.local_device_count(), small_model("float32")[0]
    partitioner = _on_mesh(model, sizes=ways(count).get("fsdp", {"data": count}))
    rng = np.random.RandomState(3)
    state = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype) if leaf.ndim else leaf,
        init_state(small_variables(), TX),
    )
    state = partitioner.put_state(state)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with tempfile.TemporaryDirectory(prefix="dpo-jax-check-") as folder:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, partitioner.get_state(state), {"made by": "dpo_jax.check"})
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore_latest(wanted)
    assert found is not None
    leaves = list(zip(jax.tree.leaves(found[0]), jax.tree.leaves(state), strict=True))
    other = sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() or a.sharding != b.sharding for a, b in leaves)
    size = sum(leaf.nbytes for _, leaf in leaves) / 1e6
    figure = f"{len(leaves)} arrays ({size:.1f} MB) in {count} part{'s' * (count > 1)}, {other} of them differ"
    return Result(figure, other == 0, bar="bit for bit", values={"arrays": len(leaves), "differ": other})
