"""Parameters in bfloat16 with stochastic rounding: unbiased, the same everywhere, and half the memory."""

import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, DpoConfig, LoraConfig
from dpo_jax.cli.config.loading import problems
from dpo_jax.cli.trainable import planned_trainable
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import plain_rows
from dpo_jax.dpo import dpo_step
from dpo_jax.losses import dpo_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.products import take_rows
from dpo_jax.rounding import round_to_bfloat16, stochastic_rounding
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.step import apply_gradients, init_state

VALUES = [1.001, -1.001, 0.9990234, 3e-5, -7e-39, 1e-42, 65535.7, -3.3895e38, 0.1]


def neighbors(value):
    """The two numbers of bfloat16 around a float32: what is cut off, and one more in the last place."""
    low = np.array([np.float32(value)]).view(np.uint32) & np.uint32(0xFFFF0000)
    return low.view(np.float32)[0], (low + np.uint32(0x10000)).view(np.float32)[0]


@pytest.mark.parametrize("value", VALUES)
def test_the_mean_of_many_roundings_is_the_value(value):
    count = 40_000
    rounded = jax.jit(round_to_bfloat16)(jnp.full(count, value, jnp.float32), jax.random.key(7))
    assert rounded.dtype == jnp.bfloat16
    low, high = neighbors(value)
    found = np.asarray(rounded).astype(np.float32)
    assert set(found.tolist()) == {float(low), float(high)}
    up = Fraction(float(np.float32(value))) - Fraction(float(low))
    expected = float(up / (Fraction(float(high)) - Fraction(float(low))))
    error = np.sqrt(expected * (1 - expected) / count)
    assert abs(float((found == high).mean()) - expected) < 4 * error


def test_what_bfloat16_holds_stays_and_what_it_does_not_hold_is_no_other_number():
    kept = np.array([0.0, -0.0, 1.0, -2.5, 2.0**-133, 3.3895313892515355e38, np.inf, -np.inf, np.nan], np.float32)
    for seed in range(20):
        rounded = np.asarray(round_to_bfloat16(jnp.asarray(kept), jax.random.key(seed)))
        np.testing.assert_array_equal(rounded.view(np.uint16)[:-1], kept.astype(ml_dtypes.bfloat16).view(np.uint16)[:-1])
        assert np.isnan(rounded[-1].astype(np.float32))
        lower = np.array([0x7F800001], np.uint32).view(np.float32)  # a NaN by bits that are cut off
        assert jnp.isnan(round_to_bfloat16(jnp.asarray(lower), jax.random.key(seed))).all()


def updated(tx, params, grads, steps):
    state = init_state(params, tx)
    step = jax.jit(lambda state: apply_gradients(state, grads, {}, tx=tx)[0])
    for _ in range(steps):
        state = step(state)
    return state


def test_a_looked_up_row_has_a_gradient_summed_in_float32():
    """In bfloat16 the sum of 10,000 ones ends at 256."""
    table, index = jnp.zeros((3, 2), jnp.bfloat16), jnp.array([1] * 10_000 + [2])
    gradient = jax.grad(lambda table: take_rows(table, index).astype(jnp.float32).sum())(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradient, np.float32)[:, 0], [0, 10_000, 1], rtol=4e-3)
    assert np.isnan(np.asarray(take_rows(table, jnp.array([3])), np.float32)).all()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_float32_parameters_are_rounded_in_microbatches(family):
    """Rounded kernels beside norms and biases that stay float32: JAX 0.10 took one for the other when it traced the gradient.

    `test_layouts_and_microbatches_agree` compares numbers, in float32.
    """
    sizes = {"vocab_size": 64, "width": 16, "layers": 2, "heads": 2, "max_positions": 32, "eos_token_id": 0}
    model, tx = make_model(decoder_config(hf_config(family, **sizes)), dtype=jnp.bfloat16), optax.sgd(0.1)
    pairs = [Encoded([1, 2, 3], [4, 5, 0], [6, 0]) for _ in range(4)]
    rows = plain_rows(pairs, length=12, ref_logps=np.zeros((4, 2)))
    state = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), tx))
    step = functools.partial(dpo_step, model=model, tx=tx, loss=functools.partial(dpo_loss, beta=0.1), microbatches=4)
    after, _ = jax.eval_shape(step, state, rows)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_training_in_bfloat16_follows_that_in_float32():
    """Computed in it and with parameters in it. Whole runs: `test_cli_runs.py`."""
    random, sizes = np.random.default_rng(0), {"vocab_size": 64, "width": 32, "layers": 1, "heads": 2, "max_positions": 32}
    config = decoder_config(hf_config("llama", **sizes, eos_token_id=0))
    pairs = [Encoded(*random.integers(1, 64, size=(3, 5)).astype(np.int32)) for _ in range(8)]
    model, tx = make_model(config), make_optimizer(1e-3)
    variables = jax.jit(model.init)(jax.random.key(0))
    rows = plain_rows(pairs, length=12, ref_logps=np.zeros((8, 2)))

    def losses(model, tx, params):
        step = jax.jit(functools.partial(dpo_step, model=model, tx=tx, loss=functools.partial(dpo_loss, beta=0.1)))
        state, found = init_state(params, tx), []
        for _ in range(8):
            state, metrics = step(state, rows)
            found.append(float(metrics["loss"]))
        return found

    exact = losses(model, tx, variables)
    half = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), variables)
    found = losses(make_model(config, dtype=jnp.bfloat16), stochastic_rounding(tx), half)
    assert exact[-1] < 0.6 < exact[0]
    assert found != exact
    assert found == pytest.approx(exact, abs=0.004)


def test_updates_too_small_for_bfloat16_add_up():
    """A hundred updates of a fortieth of the last place: all are lost when each is rounded to the nearest."""
    params, grads = {"w": jnp.ones(20_000, jnp.bfloat16)}, {"w": jnp.ones(20_000)}
    state = updated(stochastic_rounding(optax.sgd(1e-4), seed=3), params, grads, 100)
    found = np.asarray(state.params["w"]).astype(np.float64)
    assert state.params["w"].dtype == jnp.bfloat16
    assert abs(found.mean() - 0.99) < 4 * found.std() / np.sqrt(len(found))
    assert found.std() < 0.008  # a random walk in steps of 1/256
    with jax.numpy_dtype_promotion("standard"), pytest.warns(UserWarning, match="most updates are smaller"):
        nearest = updated(optax.sgd(1e-4), params, grads, 100)
    assert (nearest.params["w"] == 1).all()


def test_the_optimizer_sees_float32_and_other_types_are_updated_as_always():
    params = {"w": jnp.linspace(-1, 1, 64).astype(jnp.bfloat16).reshape(8, 8), "head": jnp.ones(4)}
    grads = jax.tree.map(lambda x: jnp.cos(3 * x.astype(jnp.float32)), params)
    tx = make_optimizer(1e-2, name="adamw", weight_decay=0.1)
    state = init_state(params, stochastic_rounding(tx))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected = init_state(wide, tx)
    after, _ = apply_gradients(state, grads, {}, tx=stochastic_rounding(tx))
    exact, _ = apply_gradients(expected, grads, {}, tx=tx)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, exact.opt_state)
    np.testing.assert_array_equal(after.params["head"], exact.params["head"])
    wrong = np.abs(np.asarray(after.params["w"]).astype(np.float32) - exact.params["w"])
    assert (wrong <= 2**-7 * np.abs(exact.params["w"])).all()


SIZES: dict[str, Any] = {"vocab_size": 64, "width": 16, "layers": 2, "heads": 2, "max_positions": 8, "eos_token_id": 0}
MODEL = make_model(decoder_config(hf_config("llama", **SIZES)))


def step_of(tx):
    def step(state, rows):
        grads = jax.tree.map(lambda x: jnp.full_like(x, 0.3, jnp.float32), state.params)
        return apply_gradients(state, grads, {}, tx=tx)

    return step


ROWS = {"x": np.zeros(4, np.float32)}


def test_it_is_the_same_on_one_device_with_pmap_and_on_a_mesh():
    params = jax.tree.map(lambda x: np.ones(x.shape, ml_dtypes.bfloat16), jax.eval_shape(MODEL.init, jax.random.key(0)))
    tx, found = stochastic_rounding(optax.sgd(1e-3), seed=1), []
    for partitioner in (single_device(), pmap_partitioner(), mesh_partitioner(make_mesh(fsdp=2, tensor=2), MODEL)):
        step = partitioner.compile_step(step_of(tx))
        state = partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.put_variables(params))
        for _ in range(2):
            state, _ = step(state, ROWS)
        found.append(partitioner.to_host(state.params))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
    assert all((leaf != 1).any() and leaf.dtype == ml_dtypes.bfloat16 for leaf in jax.tree.leaves(found[0]) if leaf.size > 99)


def test_bits_depend_on_seed_step_and_name_alone(tmp_path):
    """So a run that was saved in between ends with the same."""
    params = {"a": jnp.ones(512, jnp.bfloat16), "b": jnp.ones(512, jnp.bfloat16)}
    tx = stochastic_rounding(optax.sgd(1e-3), seed=1)
    step = jax.jit(step_of(tx))
    first, _ = step(init_state(params, tx), ROWS)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_get(first), {})
        found = checkpoints.restore_latest(jax.device_get(first))
    assert found is not None
    whole, _ = step(first, ROWS)
    resumed, _ = step(jax.device_put(found[0]), ROWS)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    later, _ = step(init_state(params, tx).replace(step=jnp.int32(5)), ROWS)
    other, _ = jax.jit(step_of(stochastic_rounding(optax.sgd(1e-3), seed=2)))(init_state(params, tx), ROWS)
    for different in (first.params["b"], later.params["a"], other.params["a"]):
        assert (first.params["a"] != different).any()


def test_parameters_take_half_and_the_optimizers_state_stays():
    def state_of(section):
        trainable = planned_trainable(Config(dpo=section), section, MODEL)
        return jax.eval_shape(lambda: trainable.state(MODEL.init(jax.random.key(0)), tx=build.make_tx(section)))

    half, whole = state_of(DpoConfig(param_dtype="bfloat16")), state_of(DpoConfig())
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(half.params) == size(whole.params) / 2
    assert size(half.opt_state) == size(whole.opt_state)


def test_it_is_of_training_all_weights():
    for config in (
        Config(dpo=DpoConfig(param_dtype="bfloat16", trainable="last_layer")),
        Config(dpo=DpoConfig(param_dtype="bfloat16"), lora=LoraConfig(rank=4)),
    ):
        assert "applies only if all weights are trained" in dict(problems(config))["dpo.param_dtype"]
    assert "dpo.param_dtype" not in dict(problems(Config(dpo=DpoConfig(param_dtype="bfloat16"))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_updates_that_rounding_would_lose_are_warned_of(dtype):
    params, tx = {"w": jnp.ones(2, dtype), "b": jnp.ones(2)}, optax.sgd(1e-3)
    with pytest.warns(UserWarning, match=rf"trained parameters are {np.dtype(dtype).name}: .*stochastic_rounding\(tx\)"):
        init_state(params, tx)
    init_state(params, stochastic_rounding(tx))  # a warning would be an error
    init_state({"w": jnp.ones(2)}, tx, frozen={"base": params})
