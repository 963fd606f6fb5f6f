"""A step that is not about tokens: `fit`, checkpoints, metrics and devices take any `(state, batch) -> (state, metrics)`."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.runtime import metrics as records
from dpo_jax.runtime import parallel
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.fit import Preempted, fit
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.step import init_state, train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Points:
    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray


def squared_errors(variables, points):
    errors = (points.x @ variables["slope"] - points.y) ** 2
    return errors, {"root": jnp.sqrt(errors)}


def points(index):
    x = np.random.default_rng(index).normal(size=(8, 3)).astype(np.float32)
    return Points(x, x @ np.float32([1, -2, 3]), np.ones(8, np.float32))


WAYS = {"one device": parallel.single_device, "pmap": parallel.pmap_partitioner}
WAYS["a mesh"] = lambda: parallel.mesh_partitioner(make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]))
TX = optax.sgd(0.1, momentum=0.9)


@functools.cache
def compiled_step(way):
    """(partitioner, its step), which all runs of a test share."""
    partitioner = WAYS[way]()
    step = functools.partial(train_step, objective=squared_errors, tx=TX, axis_name=partitioner.axis_name)
    return partitioner, partitioner.compile_step(step)


def linear_model(way, folder, *, killed_at=None):
    """Thirty steps of a linear model, from the newest checkpoint in `folder` if there is one."""
    partitioner, compiled = compiled_step(way)

    def killed(state, batch):
        if killed_at is not None and int(partitioner.get_state(state).step) == killed_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return compiled(state, batch)

    with Checkpoints(folder / "checkpoints") as checkpoints, records.MetricsLog(folder / "metrics.jsonl") as log:
        state = init_state({"slope": jnp.zeros(3)}, TX)
        state, _ = checkpoints.restore_latest(state) or (state, {})
        options = {"checkpoints": checkpoints, "save_every": 15, "log": log, "get_state": partitioner.get_state}
        return partitioner.get_state(fit(killed, partitioner.put_state(state), points, total_steps=30, **options))


@pytest.mark.parametrize("way", WAYS)
def test_a_linear_model_is_killed_and_resumed(tmp_path, way):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = linear_model(way, tmp_path / "whole")
    np.testing.assert_allclose(whole.params["slope"], [1, -2, 3], atol=0.5)
    with pytest.raises(Preempted, match="SIGTERM after 18 steps"):
        linear_model(way, tmp_path / "killed", killed_at=17)
    resumed = linear_model(way, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    one, other = (records.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert one == other
    assert [row["step"] for row in one] == list(range(30))
    assert one[-1]["root"] < one[0]["root"] / 5
