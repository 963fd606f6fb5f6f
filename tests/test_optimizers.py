"""Optimizers and schedules by name: against optax and formulas, on a mesh, and the options that they read."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from dpo_jax import optimizer_table
from dpo_jax.cli import build
from dpo_jax.cli.config import Config, DpoConfig, SftConfig, load_config
from dpo_jax.cli.config.file import ConfigError
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.runtime import optim
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.parallel import mesh_partitioner, single_device
from dpo_jax.step import apply_gradients, init_state

NAMES = list(optimizer_table.OPTIMIZERS)
RATE = 0.01


def params_and_gradients():
    """Two layers of one matrix, stacked as the decoder has them, with everything that is no matrix of a layer."""
    shapes = {
        "final_norm": {"scale": (4,)},
        "head_kernel": (8, 4),
        "layers": {"mlp": {"kernel": (2, 4, 6), "bias": (2, 6)}, "mlp_norm": {"scale": (2, 4)}},
        "token_embedding": (8, 4),
    }
    rng = np.random.default_rng(0)
    draw = functools.partial(jax.tree.map, lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), is_leaf=_is_shape)
    return {"params": draw(shapes)}, {"params": draw(shapes)}


def _is_shape(x):
    return isinstance(x, tuple)


MATRICES = ("head_kernel", "layers.mlp.kernel", "token_embedding")


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree["params"])
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def updates_of(tx, steps=1):
    params, grads = params_and_gradients()
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for step, scale in enumerate((1.0, 0.3, 2.0)[:steps]):
            here = jax.tree.map(lambda x, step=step, scale=scale: scale * jnp.roll(x, step), grads)
            updates, state = tx.update(here, state, params)
            params = optax.apply_updates(params, updates)
    return by_name(params)


PLAIN = {
    "rmsprop": optax.rmsprop(RATE, decay=0.99, eps=1e-8, eps_in_sqrt=False),
    "adamw": optax.adamw(RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0),
    "adafactor": optax.adafactor(RATE, multiply_by_parameter_scale=False),
    "lion": optax.lion(RATE, b1=0.9, b2=0.99, weight_decay=0),
    "sgd": optax.sgd(RATE, momentum=0.9),
}


@pytest.mark.parametrize("name", PLAIN)
def test_without_options_it_is_optaxs(name):
    ours, theirs = (updates_of(tx, 3) for tx in (optim.make_optimizer(RATE, name=name, max_grad_norm=None), PLAIN[name]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, theirs)


def test_first_updates_are_those_of_the_formulas():
    params, grads = map(by_name, params_and_gradients())
    for name, formula in {
        "rmsprop": lambda g: g / np.sqrt(0.01 * g**2),
        "adamw": lambda g: g / (np.abs(g) + 1e-8),
        "lion": np.sign,
        "sgd": lambda g: g,
    }.items():
        after = updates_of(optim.make_optimizer(RATE, name=name, max_grad_norm=None))
        for leaf in params:
            np.testing.assert_allclose(params[leaf] - after[leaf], RATE * formula(grads[leaf]), rtol=1e-4, atol=1e-7)


def test_muon_takes_each_layers_matrix_by_itself_and_adam_the_rest():
    after = updates_of(optim.make_optimizer(RATE, name="muon", max_grad_norm=None))
    params, grads = map(by_name, params_and_gradients())
    for layer in range(2):
        gradient = {"w": jnp.asarray(grads["layers.mlp.kernel"][layer])}
        alone = optax.contrib.muon(RATE, consistent_rms=0.2)
        with jax.numpy_dtype_promotion("standard"):
            expected, _ = alone.update(gradient, alone.init(gradient), gradient)
        got = after["layers.mlp.kernel"][layer] - params["layers.mlp.kernel"][layer]
        np.testing.assert_allclose(got, expected["w"], rtol=1e-3, atol=1e-6)
        singular = np.linalg.svd(got, compute_uv=False) / (RATE * 0.2 * np.sqrt(6))
        assert 0.6 < singular.min() < singular.max() < 1.3  # Newton-Schulz comes this near to 1
    for leaf in set(params) - {"layers.mlp.kernel"}:
        # With Nesterov's momentum: b1 times the next mean, and the gradient.
        np.testing.assert_allclose(np.abs(after[leaf] - params[leaf]), RATE * (0.9 * 0.1 / 0.19 + 1), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("embeddings", [True, False])
def test_weight_decay_is_of_matrices(name, embeddings):
    if name == "muon" and not embeddings:
        pytest.skip("does not read decay_embeddings")
    options = {"name": name, "max_grad_norm": None}
    schedule = lambda step: jnp.float32(RATE)  # noqa: E731
    steps = 2 if name == "rmsprop" else 1  # whose first update is a sign
    without = updates_of(optim.make_optimizer(schedule, **options), steps)
    after = updates_of(optim.make_optimizer(schedule, weight_decay=0.5, decay_embeddings=embeddings, **options), steps)
    params, _ = map(by_name, params_and_gradients())
    decay_mask = {"layers.mlp.kernel"} if name == "muon" else {*MATRICES} - (set() if embeddings else {"token_embedding"})
    for leaf in params:
        if leaf not in decay_mask:
            np.testing.assert_array_equal(after[leaf], without[leaf])
        elif name == "rmsprop":  # the term is in the gradient
            assert np.abs(after[leaf] - without[leaf]).max() > 1e-4
        else:
            np.testing.assert_allclose(without[leaf] - after[leaf], RATE * 0.5 * params[leaf], rtol=1e-3, atol=1e-7)


CHANGED = {"weight_decay": 0.3, "decay_embeddings": False, "b1": 0.5, "b2": 0.6, "eps": 0.1, "momentum": 0.3}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_that_is_read_changes_the_result_and_no_other_is_taken(name):
    assert CHANGED.keys() == optimizer_table.OPTIONS.keys()
    base = {"weight_decay": 0.1} if name != "muon" else {}
    plain = updates_of(optim.make_optimizer(RATE, name=name, **base), 3)
    for option, value in CHANGED.items():
        if option in optimizer_table.OPTIMIZERS[name].options:
            other = updates_of(optim.make_optimizer(RATE, name=name, **{**base, option: value}), 3)
            assert any(not np.allclose(plain[leaf], other[leaf], rtol=1e-5) for leaf in plain), option
        else:
            with pytest.raises(ValueError, match=f"{option}: optimizer {name} does not read it"):
                optim.make_optimizer(RATE, name=name, **{option: value})


# On devices

SIZES = {"vocab_size": 128, "width": 128, "layers": 2, "heads": 4, "max_positions": 32, "eos_token_id": 0}
MODEL = make_model(decoder_config(hf_config("llama", kv_heads=4, **SIZES)))


@pytest.fixture(scope="module")
def variables():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0)))


@pytest.mark.parametrize("name", NAMES)
def test_on_a_mesh_it_is_the_same_and_its_state_is_cut_and_saved(name, variables, tmp_path):
    """Adafactor's means by row and column and Muon's momentum lie like their parameters."""
    schedule = optim.make_schedule("cosine", 1e-2, warmup_steps=1, total_steps=4)
    tx = optim.make_optimizer(schedule, name=name, max_grad_norm=1.0, weight_decay=0.1)

    def step(state, rows):
        # Gradients that every device finds alike: only the optimizer is compared.
        grads = jax.tree.map(lambda x: jnp.cos(300 * x + state.step.astype(x.dtype)), state.params)
        return apply_gradients(state, grads, {}, tx=tx)

    def three(partitioner):
        state = partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.put_variables(variables))
        compiled = partitioner.compile_step(step)
        for _ in range(3):
            state, _ = compiled(state, np.zeros(4, np.float32))
        return state

    alone, state = jax.device_get(three(single_device())), three(mesh_partitioner(make_mesh(fsdp=2, tensor=2), MODEL))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(close, jax.device_get(state.params), alone.params)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (alone.params, variables)), strict=True)) > 1e-4
    cut = {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if not leaf.sharding.is_fully_replicated}
    assert {"adafactor": (2, 128)}.get(name, (2, 128, 128)) in cut
    whole = {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.sharding.is_fully_replicated}
    assert whole <= {(), (1,), (3,), (128,), (2, 128)}, "norms, counts and constants"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored, _ = checkpoints.restore_latest(like)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


# Schedules

HALF = 0.5 * (1 + np.cos(np.pi / 4))
VALUES = {
    ("constant", 1, 5): [0.5, 1, 1, 1, 1],
    ("linear", 1, 4): [0.5, 0.75, 0.5, 0.25],
    ("cosine", 0, 4): [1, HALF, 0.5, 1 - HALF, 0],
    ("cosine", 3, 7): [0.25, 0.5, 0.75, 1, HALF, 0.5, 1 - HALF, 0],
    ("wsd", 1, 10): [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0],
    ("wsd", 6, 4): [1 / 7, 2 / 7, 3 / 7, 4 / 7],
    ("cosine", 6, 4): [1 / 7, 2 / 7, 3 / 7, 4 / 7],
}


@pytest.mark.parametrize(("name", "warmup", "total"), VALUES)
def test_rates_at_known_steps(name, warmup, total):
    options = {"decay_ratio": 0.5} if name == "wsd" else {}
    rate = optim.make_schedule(name, 2.0, warmup_steps=warmup, total_steps=total, **options)
    expected = [2 * value for value in VALUES[name, warmup, total]]
    traced = jax.jit(rate)
    for step, value in enumerate(expected):
        np.testing.assert_allclose(rate(step), value, atol=2e-6)
        np.testing.assert_allclose(traced(jnp.int32(step)), value, atol=2e-6)
        assert not isinstance(rate(step), jax.Array)


def test_schedules_can_end_above_zero():
    for name in ("cosine", "wsd"):
        rate = optim.make_schedule(name, 2.0, warmup_steps=2, total_steps=10, min_lr_ratio=0.1)
        assert float(rate(10)) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="min_lr_ratio: schedule linear does not read it: leave it out, or use one"):
        optim.make_schedule("linear", 2.0, warmup_steps=2, total_steps=10, min_lr_ratio=0.1)


def test_warmup_as_a_share_of_the_run():
    assert DpoConfig(warmup_ratio=0.1).warmup(41) == 5
    assert DpoConfig(warmup_steps=7).warmup(41) == 7
    rate = build.make_schedule(DpoConfig(lr=1.0, warmup_ratio=0.5, schedule="cosine"), steps=6)
    assert [float(rate(step)) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


# The configuration


@pytest.mark.parametrize("name", NAMES)
def test_options_of_the_configuration_reach_the_optimizer(name):
    options = {option: CHANGED[option] for option in optimizer_table.OPTIMIZERS[name].options} | {"max_grad_norm": 0.5}
    section = DpoConfig(optimizer=name, lr=RATE, warmup_steps=0, **options)
    found, expected = (updates_of(tx, 2) for tx in (build.make_tx(section), optim.make_optimizer(RATE, name=name, **options)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


def test_options_of_the_configuration_reach_the_schedule():
    for name, options, last in (
        ("cosine", {"min_lr_ratio": 0.25}, 0.25 + 0.75 * 0.5 * (1 + np.cos(np.pi * 7 / 8))),
        ("wsd", {"min_lr_ratio": 0.2, "decay_ratio": 0.5}, 0.2 + 0.8 / 5),
    ):
        rate = build.make_schedule(DpoConfig(schedule=name, lr=2.0, warmup_steps=2, **options), steps=10)
        assert float(rate(9)) == pytest.approx(2 * last), name


REFUSED = [
    (
        {"optimizer": "lion", "eps": 1e-6},
        "eps: optimizer lion does not read it: leave it out, or use one that does (adamw, muon)",
    ),
    ({"optimizer": "adamw", "momentum": 0.5}, "momentum: optimizer adamw does not read it"),
    ({"optimizer": "muon", "decay_embeddings": False}, "decay_embeddings: optimizer muon does not read it"),
    ({"optimizer": "adamw", "b1": 1.0}, "b1: must be at least 0 and below 1, got 1.0"),
    ({"weight_decay": -1.0}, "weight_decay: must not be negative"),
    (
        {"schedule": "cosine", "decay_ratio": 0.2},
        "decay_ratio: schedule cosine does not read it: leave it out, or use one that",
    ),
    ({"schedule": "wsd", "decay_ratio": 0.0}, "decay_ratio: must be above 0"),
    ({"steps": 5, "epochs": 2}, "steps: set steps or epochs, not both"),
    ({"steps": 0}, "steps: must be greater than 0"),
    ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio: set warmup_ratio or warmup_steps, not both"),
    ({"warmup_ratio": 1.5}, "warmup_ratio: must be between 0 and 1"),
    ({"patience": -1}, "patience: must not be negative"),
    ({"max_grad_norm": 0.0}, "max_grad_norm: must be greater than 0, or null for no clipping, got 0"),
    ({"stop_on": "rewards/margins"}, "stop_on: is read only with patience or keep_best"),
    ({"patience": 1, "stop_on": "nll_per_token"}, "stop_on: must be one of loss, rewards/accuracies, rewards/margins"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_not_read_is_refused_with_the_remedy(options, message):
    assert any(f"{field}: {words}".startswith(message) for field, words in DpoConfig(**options).check())


def test_defaults_are_the_papers():
    section = Config().dpo
    assert (section.optimizer, section.schedule, section.warmup(99), section.weight_decay) == ("rmsprop", "constant", 150, 0.0)
    assert not list(SftConfig().check())


def test_patience_needs_evaluations(tmp_path):
    file = tmp_path / "a.yaml"
    for option in ("patience: 2", "keep_best: true"):
        file.write_text(f"dpo:\n  {option}\n")
        with pytest.raises(ConfigError, match=rf"a.yaml:2: dpo.{option.partition(':')[0]}: .* set run.eval_every_examples"):
            load_config(file)
    file.write_text("dpo:\n  patience: 2\nrun:\n  eval_every_examples: 64\n")
    load_config(file)


def test_the_documentation_has_the_table():
    assert optimizer_table.markdown() in (Path(__file__).parent.parent / "configs" / "README.md").read_text()
