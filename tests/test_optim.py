"""Optimizer against torch's numbers, partitioners against each other, the run directory's lock."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN

from dpo_jax.runtime import optim, parallel, rundir
from dpo_jax.types import Rows, TrainState


def test_rmsprop_with_warmup_and_clipping_is_torchs():
    golden = json.loads((GOLDEN / "optim.json").read_text())
    settings = golden["settings"]
    schedule = optim.linear_warmup(settings["peak"], warmup_steps=settings["warmup_steps"])
    tx = optim.make_optimizer(schedule, max_grad_norm=settings["max_grad_norm"])
    params = {name: jnp.array(value) for name, value in golden["start"].items()}
    curvature = {name: jnp.array(value) for name, value in golden["curvature"].items()}
    state = tx.init(params)
    norms = [step["grad_norm"] for step in golden["steps"]]
    assert min(norms) < settings["max_grad_norm"] < max(norms)
    for step, (expected, scale) in enumerate(zip(golden["steps"], golden["scale"], strict=True)):
        grads = jax.tree.map(lambda c, p, s=scale: s * c * p, curvature, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(schedule(step), expected["lr"], rtol=1e-6)
        for name, value in expected["params"].items():
            np.testing.assert_allclose(params[name], value, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("decay_steps", [None, 1, 41])
@pytest.mark.parametrize(("peak", "warmup_steps"), [(1e-6, 0), (5e-4, 7), (3.3e-5, 150)])
def test_the_logged_rate_is_that_of_the_step_and_compiles_nothing(peak, warmup_steps, decay_steps):
    schedule = optim.linear_warmup(peak, warmup_steps=warmup_steps, decay_steps=decay_steps)
    compiled = jax.jit(schedule)
    for step in (0, 1, 6, 7, 8, 40, 41, 149, 150, 1000):
        logged = schedule(step)
        assert not isinstance(logged, jax.Array)
        np.testing.assert_allclose(logged, compiled(jnp.int32(step)), rtol=5e-6, atol=2e-7 * peak)


def test_warmup_values():
    schedule = optim.linear_warmup(1.0, warmup_steps=3)
    np.testing.assert_allclose([schedule(step) for step in range(6)], [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert schedule(jnp.int32(0)).dtype == jnp.float32
    assert optim.linear_warmup(2.0, warmup_steps=0)(0) == 2.0
    schedule = optim.linear_warmup(1.0, warmup_steps=1, decay_steps=4)
    np.testing.assert_allclose([schedule(step) for step in range(6)], [0.5, 0.75, 0.5, 0.25, 0.0, 0.0])


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.1}, {"max_grad_norm": 0.01}, {"name": "adamw"}, {"name": "adamw", "b1": 0.5}]
)
def test_every_option_changes_the_result(change):
    def after_two_steps(**options):
        tx = optim.make_optimizer(1e-2, **options)
        params = jnp.array([1.0, -2.0])
        state = tx.init(params)
        for scale in (1.0, 0.3):
            updates, state = tx.update(scale * params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    base = {"name": "adamw"} if "b1" in change else {}
    assert not np.allclose(after_two_steps(**base), after_two_steps(**change), rtol=1e-6)


def test_settings_without_a_meaning_are_refused():
    for options in ({"name": "sdg"}, {"max_grad_norm": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError):
            optim.make_optimizer(1e-3, **options)
    with pytest.raises(ValueError):
        optim.linear_warmup(1e-3, warmup_steps=-1)
    with pytest.raises(ValueError):
        optim.linear_warmup(1e-3, warmup_steps=0, decay_steps=0)


def small_rows(count=8):
    tokens = np.arange(count * 3, dtype=np.int32).reshape(count, 3)
    none = np.zeros((count, 2), np.int32)
    weight = np.ones(count // 2, np.float32)
    weight[-1] = 0
    index = np.arange(count // 2, dtype=np.int32)
    refs = np.arange(count, dtype=np.float32).reshape(-1, 2)
    return Rows(tokens, tokens, tokens, tokens, none, none, none, weight, index, refs)


def step_of(axis_name):
    """A step with every kind of leaf: parameters, optimizer state, a counter, a metric."""

    def step(state, rows):
        total = (rows.tokens.sum(axis=1).astype(jnp.float32).reshape(-1, 2).sum(axis=1) * rows.weight).sum()
        total = total if axis_name is None else jax.lax.psum(total, axis_name)
        params = {"w": state.params["w"] + total}
        return state.replace(step=state.step + 1, params=params), {"total": total}

    return step


def partitioners():
    return {
        "single": parallel.single_device(),
        "pmap": parallel.pmap_partitioner(),
        "pmap2": parallel.pmap_partitioner(jax.devices()[2:]),
    }


@pytest.mark.parametrize("name", ["single", "pmap", "pmap2"])
def test_partitioners_agree(name):
    partitioner = partitioners()[name]
    params = {"w": jnp.zeros((2, 3))}
    state = TrainState(jnp.int32(0), params, (jnp.ones(2), jnp.int32(7)))
    step = partitioner.compile_step(step_of(partitioner.axis_name))
    placed = partitioner.put_state(state)
    for _ in range(2):
        placed, metrics = step(placed, small_rows())
    result = partitioner.get_state(placed)
    expected = float(np.arange(18).sum())  # the last pair weighs nothing
    assert metrics["total"].shape == ()
    assert float(metrics["total"]) == expected
    assert isinstance(result.params["w"], np.ndarray)
    assert isinstance(result.step, np.ndarray)
    np.testing.assert_array_equal(result.params["w"], np.full((2, 3), 2 * expected))
    assert int(result.step) == 2
    assert int(result.opt_state[1]) == 7
    assert not params["w"].is_deleted(), "what was put must survive the donation of its copy"
    assert partitioner.row_shards == {"single": 1, "pmap": 4, "pmap2": 2}[name]


@pytest.mark.parametrize("name", ["single", "pmap", "pmap2"])
def test_maps_agree(name):
    partitioner = partitioners()[name]
    logps = partitioner.compile_map(lambda variables, rows: variables["w"] * rows.tokens.astype(jnp.float32))
    result = logps(partitioner.put_variables({"w": jnp.float32(2)}), small_rows())
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result, 2 * small_rows().tokens)


def test_rows_that_devices_cannot_share_are_refused():
    with pytest.raises(ValueError, match="tokens has length 6, which cannot be split equally over 4 devices"):
        parallel.split_rows(small_rows(6), 4)
    with pytest.raises(ValueError, match="weight has length 2, which cannot be split equally over 4 devices"):
        parallel.split_rows(small_rows(4), 4)


def test_second_run_in_a_directory_is_refused(tmp_path):
    with rundir.RunDir(tmp_path / "run"):
        with pytest.raises(rundir.RunLocked, match=f"pid {os.getpid()}, host"):
            rundir.RunDir(tmp_path / "run")
        code = f"from dpo_jax.runtime.rundir import RunDir; RunDir({str(tmp_path / 'run')!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert f"another run (pid {os.getpid()}" in other.stderr
    with rundir.RunDir(tmp_path / "run") as again:
        again.write_env()
        record = json.loads(again.env.read_text())
    assert record["packages"]["jax"] == jax.__version__
    assert len(record["devices"]) == 4
    assert sorted(path.name for path in again.path.iterdir()) == ["env.json", "run.lock"]


def test_lock_goes_with_a_killed_process(tmp_path):
    code = f"import os; from dpo_jax.runtime.rundir import RunDir; run = RunDir({str(tmp_path)!r}); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    rundir.RunDir(tmp_path).close()


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf"), np.float32(-1)])
def test_learning_rates_that_climb_are_refused(rate):
    with pytest.raises(ValueError, match="learning_rate must be a finite number, at least 0"):
        optim.make_optimizer(rate)
    with pytest.raises(ValueError, match="peak must be a finite learning rate, at least 0"):
        optim.linear_warmup(rate, warmup_steps=3)


@pytest.mark.parametrize("options", [{"b1": 1.0}, {"b2": -0.1}, {"weight_decay": float("nan")}])
def test_impossible_moments_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        optim.make_optimizer(1e-3, name="adamw", **options)
