"""The reward model: eq. 2, read at the right token, and the same however it is run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.data.encode import Encoded, prompt_key
from dpo_jax.data.layout import Layout, completion_rows, plain_rows, shared_rows
from dpo_jax.evals.intervals import by_prompt, score_interval
from dpo_jax.lab.reward_model import HELD_OUT, RewardModel, accuracy_words, fit_reward_model, judged
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.reward_model import center_rewards, completion_rewards, reward_step, scalar, scalar_head, with_scalar_head
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.step import init_state
from dpo_jax.training.fingerprint import RunMismatch
from dpo_jax.training.run import Saving
from dpo_jax.types import Model, RowImages

SIZES = {"vocab_size": 64, "width": 32, "layers": 1, "heads": 4, "max_positions": 64, "eos_token_id": 0}
BASE = make_model(decoder_config(hf_config("llama", **SIZES)))
MODEL = with_scalar_head(BASE)
LENGTH = 16
EOS = 0


def random_pairs(count, seed, *, separable=False):
    """Prompt, chosen and rejected. Separable: words of the chosen are below 32, of the rejected above; all texts end alike."""
    rng = np.random.default_rng(seed)
    ranges = [(1, 64), (1, 32), (32, 64)] if separable else [(1, 64)] * 3
    return [
        Encoded(*(np.append(rng.integers(low, high, rng.integers(2, 6)), EOS).astype(np.int32) for low, high in ranges), uid="")
        for _ in range(count)
    ]


def with_random_head(variables):
    kernel, bias = jax.random.key(1), jax.random.key(2)
    return {**variables, "head": {"kernel": jax.random.normal(kernel, (32,)), "bias": jax.random.normal(bias, ())}}


TX = make_optimizer(1e-3, max_grad_norm=1.0)
STEP = jax.jit(functools.partial(reward_step, model=MODEL, tx=TX))
REWARDS = jax.jit(functools.partial(completion_rewards, MODEL))
LAYOUT = Layout("plain", length=LENGTH, scored=LENGTH, rows_multiple=16)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0))


def test_the_head_begins_as_zero_and_nothing_else_changes(variables):
    expected = jax.jit(BASE.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected["params"])
    jax.tree.map(np.testing.assert_array_equal, variables["head"], scalar_head(32))
    rows = plain_rows(random_pairs(2, 0), length=LENGTH)
    hidden = jax.jit(BASE.forward)(expected, rows)
    np.testing.assert_array_equal(jax.jit(MODEL.forward)(with_random_head(variables), rows), hidden)
    logits = jax.jit(BASE.unembed)(expected, hidden)
    np.testing.assert_array_equal(jax.jit(MODEL.unembed)(with_random_head(variables), hidden), logits)
    cached, _ = jax.jit(MODEL.decode)(with_random_head(variables), rows, MODEL.init_cache(4, LENGTH))
    np.testing.assert_allclose(cached, hidden, atol=1e-5)
    axes = jax.tree.structure(MODEL.axes(), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    assert axes == jax.tree.structure(variables)


def test_the_loss_of_a_zero_head_is_ln_2(variables):
    _, metrics = STEP(init_state(variables, TX), LAYOUT.rows(random_pairs(3, 0)))
    assert float(metrics["loss"]) == pytest.approx(np.log(2), rel=1e-6)
    assert [float(metrics[name]) for name in ("accuracy", "margin", "rewards/chosen", "rewards/rejected")] == [0.5, 0, 0, 0]
    assert float(metrics["grad_norm"]) > 0


def toy_model(width=8):
    """Each position sees the mean of the embeddings in its key interval."""

    def forward(variables, rows):
        keys = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None, None, :]
        seen = (keys >= rows.k_start[:, :, None]) & (keys < rows.k_end[:, :, None])
        embedded = variables["params"]["embed"][rows.tokens]
        return jnp.tanh(seen.astype(embedded.dtype) @ embedded / seen.sum(axis=-1, keepdims=True).astype(embedded.dtype))

    return with_scalar_head(
        Model(
            init=lambda key: {"params": {"embed": jax.random.normal(key, (64, width))}},
            forward=forward,
            unembed=lambda variables, hidden: hidden @ variables["params"]["embed"].T,
        )
    )


def test_the_gradient_is_that_of_eq_2():
    """`-sigmoid(r_l - r_w) (grad r_w - grad r_l)`, averaged over pairs, in float64."""
    with jax.enable_x64(True):
        model = toy_model()
        variables = model.init(jax.random.key(0))
        assert variables["head"]["kernel"].shape == (8,)
        variables = {**variables, "head": {"kernel": jax.random.normal(jax.random.key(1), (8,)), "bias": jnp.zeros(())}}
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)
        rows = plain_rows(random_pairs(3, 0), length=LENGTH)
        rows = rows.replace(weight=rows.weight.astype(np.float64))
        tx = optax.sgd(1.0)
        after, metrics = jax.jit(functools.partial(reward_step, model=model, tx=tx))(init_state(variables, tx), rows)
        score = jax.jit(functools.partial(completion_rewards, model))
        rewards = np.asarray(score(variables, rows)).reshape(-1, 2)
        push = -1 / (1 + np.exp(rewards[:, 0] - rewards[:, 1])) / 3
        coefficients = np.stack([push, -push], axis=1).reshape(-1)
        expected = jax.jit(jax.grad(lambda v: (completion_rewards(model, v, rows) * coefficients).sum()))(variables)
        moved = jax.tree.map(jnp.subtract, variables, after.params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), moved, expected)
        np.testing.assert_allclose(metrics["loss"], -np.log1p(3 * push).mean(), rtol=1e-12)
        np.testing.assert_allclose(metrics["margin"], (rewards[:, 0] - rewards[:, 1]).mean(), rtol=1e-12)
        assert float(metrics["accuracy"]) == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())


def test_the_reward_is_read_at_the_last_token_of_the_completion(variables):
    variables = with_random_head(variables)
    prompt, completion = np.array([5, 6, 7], np.int32), np.array([8, 9, 10], np.int32)
    other_end = np.array([8, 9, 11], np.int32)
    rows = completion_rows([(prompt, completion), (prompt, other_end), (prompt, completion[:2])], length=LENGTH)
    found = REWARDS(variables, rows)
    hidden = jax.jit(MODEL.forward)(variables, rows)
    expected = [scalar(variables, hidden[row, last]) for row, last in enumerate([5, 5, 4])]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6)
    assert abs(float(found[0] - found[1])) > 1e-3
    padding = rows.replace(tokens=np.where(np.arange(LENGTH) >= [[6], [6], [5]], 63, rows.tokens).astype(np.int32))
    assert (padding.tokens != rows.tokens).sum() == 2 * (LENGTH - 6) + LENGTH - 5
    np.testing.assert_array_equal(REWARDS(variables, padding), found)


def test_a_separable_preference_is_learned(variables):
    state = init_state(variables, TX)
    for number in range(60):
        state, metrics = STEP(state, LAYOUT.rows(random_pairs(8, number, separable=True)))
    assert float(metrics["loss"]) < 0.2
    rows = LAYOUT.rows(random_pairs(64, 1000, separable=True))
    found = np.asarray(REWARDS(state.variables, rows))
    assert (found[::2] > found[1::2]).mean() > 0.95
    assert abs(found.mean()) > 1e-3
    shifted = np.asarray(REWARDS(center_rewards(state.variables, found), rows))
    assert shifted.mean() == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(shifted[::2] - shifted[1::2], found[::2] - found[1::2], atol=1e-5)


@pytest.mark.parametrize("way", ["pmap", "mesh"])
def test_however_it_is_run_it_is_one_step(way, variables):
    """Seven pairs and a padding example, in two microbatches on several devices, against all at once on one."""
    variables = with_random_head(variables)
    rows = LAYOUT.rows(random_pairs(7, 0))
    assert rows.weight.tolist() == [1] * 7 + [0]
    # Not RMSprop, whose first step is the sign of a gradient, also of one that is hardly more than rounding.
    tx = optax.sgd(1.0)
    expected_state, expected = jax.jit(functools.partial(reward_step, model=MODEL, tx=tx))(init_state(variables, tx), rows)
    mesh = functools.partial(mesh_partitioner, model=MODEL, units={"heads": 8, "kv_heads": 8})
    partitioner = pmap_partitioner() if way == "pmap" else mesh(make_mesh(fsdp=2, tensor=2))
    state = partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.put_variables(variables))
    step = functools.partial(reward_step, model=MODEL, tx=tx, microbatches=2, axis_name=partitioner.axis_name)
    state, metrics = partitioner.compile_step(step)(state, rows)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    params = jax.device_get(partitioner.get_state(state)).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=5e-6), params, expected_state.params)


def test_images_are_not_taken_for_completions_stored_backwards(variables):
    """Tokens of an image see each other both ways."""
    rows = plain_rows(random_pairs(2, 0), length=32)
    index = np.full(rows.tokens.shape, -1, np.int32)
    index[0, :2] = range(2)
    shown = rows.replace(
        images=RowImages(np.zeros((len(index), 2, 4), np.float32), index), k_end=np.where(index >= 0, 2, rows.k_end)
    )
    blind = MODEL._replace(forward=lambda v, rows: MODEL.forward(v, rows.replace(images=None)))
    rewards = completion_rewards(blind, variables, shown)
    np.testing.assert_allclose(rewards[1:], completion_rewards(MODEL, variables, rows)[1:], rtol=1e-6)
    assert np.isfinite(rewards).all()
    assert np.isnan(completion_rewards(MODEL, variables, shown.replace(images=None))).all()


def test_rows_from_which_no_reward_can_be_read_are_refused(variables):
    state = init_state(variables, optax.sgd(0.1))
    with pytest.raises(ValueError, match="not from pairs that share a prompt: use the layout plain"):
        completion_rewards(MODEL, variables, shared_rows(random_pairs(2, 0), length=32))
    texts = [(pair.prompt, pair.chosen) for pair in random_pairs(2, 0)]
    with pytest.raises(ValueError, match="2 rows with 2 examples are not plain rows of pairs"):
        reward_step(state, completion_rows(texts, length=LENGTH), model=MODEL, tx=optax.sgd(0.1))


def test_the_best_evaluation_is_kept(tmp_path, variables):
    """Preferences at random: what is learned of them makes the validation loss rise."""
    judge, pairs = RewardModel(single_device(), BASE), random_pairs(24, 5)
    options = {"make_tx": lambda steps: optax.sgd(0.3), "batch": 4, "epochs": 3, "evaluations": 4, "seed": 0}
    start = {"params": jax.tree.map(jnp.copy, variables["params"])}
    found, figures = fit_reward_model(judge, start, pairs, tmp_path, fingerprint={}, say=lambda line: None, **options)
    losses = {row["step"]: row["eval/loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if is_evaluation(row)}
    best = min(losses, key=losses.get)
    assert (len(losses), figures["step"]) == (4, best)
    assert best < max(losses)
    assert figures["loss"] == losses[best] < losses[max(losses)]
    held_out = pairs[::HELD_OUT]
    rewards = judge.of_pairs(judge.partitioner.put_variables(found), held_out, batch=4)
    assert judged(rewards)["loss"] == pytest.approx(losses[best], abs=1e-6)
    expected = score_interval(*by_prompt(rewards[:, 0] > rewards[:, 1], [prompt_key(pair) for pair in held_out]))
    assert (figures["accuracy_low"], figures["accuracy_high"]) == pytest.approx(expected)
    ends = " to ".join(f"{end:.3f}" for end in expected)
    assert f" ({ends}) on the 3 held-out pairs that chose the checkpoint" in accuracy_words(figures)


def test_a_run_that_was_killed_continues_and_ends_with_the_same_bits(tmp_path, variables):
    """Also where the best evaluation was before the kill; and another run is not continued."""
    judge = RewardModel(single_device(), BASE)
    pairs = random_pairs(24, 5, separable=True)
    options = {"make_tx": lambda steps: optax.sgd(0.3), "batch": 4, "epochs": 2, "evaluations": 3, "seed": 0}
    options |= {"say": lambda line: None, "saving": Saving(every=1)}

    def learn(folder, *, killed_at=-1, **other):
        def check(step, metrics):
            if step == killed_at:
                raise ZeroDivisionError

        start = {"params": jax.tree.map(jnp.copy, variables["params"])}
        return fit_reward_model(judge, start, pairs, folder, fingerprint={"start": "0"}, check=check, **options | other)

    expected, figures = learn(tmp_path / "whole")
    assert figures["loss"] < np.log(2)
    for killed_at in (4, 8):
        with pytest.raises(ZeroDivisionError):
            learn(tmp_path / "cut", killed_at=killed_at)
    found, again = learn(tmp_path / "cut")
    assert again == figures
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert len([row for row in read_metrics(tmp_path / "cut" / "metrics.jsonl") if is_evaluation(row)]) == 3
    with pytest.raises(RunMismatch, match="seed: was 0, is 1"):
        learn(tmp_path / "cut", seed=1)
