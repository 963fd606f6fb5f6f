"""Contrastive Preference Learning as a step: the published loss in float64, its gradient, devices, resuming, policies."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import multivariate_normal

from dpo_jax.control.policies import gaussian_policy
from dpo_jax.cpl import SegmentPairs, Transitions, bc_step, cpl_loss, cpl_step
from dpo_jax.runtime import parallel
from dpo_jax.runtime.fit import Preempted
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.step import init_state
from dpo_jax.training.run import Saving, train

OPTIONS = {"alpha": 0.3, "gamma": 0.9, "lam": 0.6}


def linear(variables, states, actions, *, std=1.0):
    return -jnp.square(actions - states @ variables["gain"]).sum(-1) / (2 * std**2)


def pairs(seed=0, count=8, padded=True):
    rng = np.random.default_rng(seed)
    states, actions = (rng.normal(size=(count, 2, 5, size)).astype(np.float32) for size in (3, 2))
    weight = np.ones(count, np.float32)
    weight[-1] = not padded
    return SegmentPairs(states, actions, weight)


def published(gain, batch, *, alpha, gamma, lam, std=1.0):
    """Eq. 5 of the paper with lambda of section 3.3, in float64, segment by segment and step by step."""
    losses = []
    for states, actions, weight in zip(batch.states, batch.actions, batch.weight, strict=True):
        score = [0.0, 0.0]
        for side in (0, 1):
            for t, (s, a) in enumerate(zip(np.float64(states[side]), np.float64(actions[side]), strict=True)):
                score[side] += gamma**t * alpha * -((a - s @ gain) ** 2).sum() / (2 * std**2)
        better, worse = np.exp(score[0]), np.exp(lam * score[1])
        losses.append(-np.log(better / (better + worse)) if weight else 0.0)
    return sum(losses) / batch.weight.sum()


GAIN = np.random.default_rng(5).normal(size=(3, 2))


def one_step(batch, *, step=cpl_step, tx=None, **options):
    tx = tx or optax.sgd(1.0)
    state = init_state({"gain": jnp.float32(GAIN)}, tx)
    after, metrics = jax.jit(functools.partial(step, log_prob=linear, tx=tx, **options))(state, batch)
    return np.asarray(after.params["gain"]), metrics


def test_loss_and_gradient_are_those_of_the_paper():
    batch = pairs()
    after, metrics = one_step(batch, **OPTIONS)
    assert float(metrics["loss"]) == pytest.approx(published(GAIN, batch, **OPTIONS), rel=1e-6)
    gradient, h = np.zeros_like(GAIN), 1e-5
    for place in np.ndindex(*GAIN.shape):
        moved = np.zeros_like(GAIN)
        moved[place] = h
        gradient[place] = (published(GAIN + moved, batch, **OPTIONS) - published(GAIN - moved, batch, **OPTIONS)) / (2 * h)
    np.testing.assert_allclose(GAIN - after, gradient, rtol=1e-4, atol=1e-6)


def test_microbatches_change_nothing():
    whole, parts = (one_step(pairs(), microbatches=count, **OPTIONS) for count in (1, 4))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    for name, value in whole[1].items():
        assert float(parts[1][name]) == pytest.approx(float(value), rel=1e-5), name


def test_only_lambda_below_one_minds_how_likely_both_segments_are():
    scores = jnp.array([[-1.0, -3.0]])
    assert cpl_loss(scores + 2.0)[0] == pytest.approx(float(cpl_loss(scores)[0]))
    assert cpl_loss(scores + 2.0, lam=0.5)[0] < cpl_loss(scores, lam=0.5)[0]
    for lam in (0.0, 1.5):
        with pytest.raises(ValueError, match="lambda"):
            cpl_loss(scores, lam=lam)


def test_behavior_cloning_is_a_regression():
    batch = pairs()
    flat = Transitions(batch.states.reshape(-1, 3), batch.actions.reshape(-1, 2), np.ones(80, np.float32))
    after, metrics = one_step(flat, step=bc_step)
    errors = flat.actions - flat.states @ GAIN
    assert float(metrics["loss"]) == pytest.approx((errors**2).sum() / 160, rel=1e-5)
    np.testing.assert_allclose(after - GAIN, flat.states.T @ errors / 80, rtol=1e-4, atol=1e-6)


WAYS = {"pmap": parallel.pmap_partitioner}
WAYS["a mesh"] = lambda: parallel.mesh_partitioner(make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]))


@pytest.mark.parametrize("way", WAYS)
def test_devices_change_nothing(way):
    partitioner, tx = WAYS[way](), optax.sgd(1.0)
    options = {"tx": tx, "axis_name": partitioner.axis_name, **OPTIONS}
    step = partitioner.compile_step(functools.partial(cpl_step, log_prob=linear, **options))
    state, metrics = step(partitioner.put_state(init_state({"gain": jnp.float32(GAIN)}, tx)), pairs())
    expected = one_step(pairs(), **OPTIONS)
    np.testing.assert_allclose(partitioner.get_state(state).params["gain"], expected[0], rtol=1e-5)
    assert float(np.mean(partitioner.to_host(metrics["loss"]))) == pytest.approx(float(expected[1]["loss"]), rel=1e-5)


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    tx = optax.sgd(0.1, momentum=0.9)
    compiled = parallel.single_device().compile_step(functools.partial(cpl_step, log_prob=linear, tx=tx, **OPTIONS))

    def run(name, killed_at=None):
        def step(state, batch):
            if killed_at is not None and int(state.step) == killed_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return compiled(state, batch)

        state, options = init_state({"gain": jnp.float32(GAIN)}, tx), {"total_steps": 12, "fingerprint": OPTIONS}
        return train(step, state, pairs, folder=tmp_path / name, saving=Saving(every=5), **options)

    whole = run("whole")
    with pytest.raises(Preempted, match="SIGTERM after 8 steps"):
        run("killed", killed_at=7)
    jax.tree.map(np.testing.assert_array_equal, run("killed"), whole)


def test_the_density_of_a_gaussian_policy():
    policy = gaussian_policy([3], 2, hidden=[])
    variables = policy.init(jax.random.key(0))
    variables["params"]["factor"] = jnp.array([[0.3, 0.7], [9.0, -0.2]])  # what is below the diagonal is not read
    states = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    actions = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)
    covariance = np.linalg.inv(policy.precision(variables))
    expected = [
        multivariate_normal(mean, covariance).logpdf(action)
        for mean, action in zip(policy.act(variables, states), actions, strict=True)
    ]
    np.testing.assert_allclose(policy.log_prob(variables, states, actions), expected, rtol=1e-4)


def test_a_fixed_deviation_is_the_squared_error_of_the_paper():
    policy = gaussian_policy([3], 2, hidden=[4], bound=1.0, std=0.5**0.5)
    variables = policy.init(jax.random.key(0))
    batch = pairs()
    found = policy.log_prob(variables, batch.states, batch.actions)
    squared = jnp.square(batch.actions - policy.act(variables, batch.states)).sum(-1)
    np.testing.assert_allclose(found + squared, np.broadcast_to(-np.log(np.pi), squared.shape), rtol=1e-5)
    assert np.abs(policy.act(variables, 100 * batch.states)).max() <= 1


def test_cpl_learns_from_images():
    """The action is to be where the bright column is; segments are preferred whose actions were nearer."""
    rng, count = np.random.default_rng(0), 128
    column = rng.integers(0, 8, size=(count, 2, 3))
    images = np.broadcast_to(np.eye(8, dtype=np.float32)[column][..., None, :, None], (count, 2, 3, 8, 8, 1))
    aim = column[..., None] / 4 - 1
    noise = rng.normal(size=aim.shape) * np.array([0.1, 1.0])[:, None, None]
    batch = SegmentPairs(np.ascontiguousarray(images), (aim + noise).astype(np.float32), np.ones(count, np.float32))
    policy, tx = gaussian_policy([8, 8, 1], 1, hidden=[16], filters=[4], bound=1.5, std=0.5), optax.rmsprop(2e-2)
    state = init_state(policy.init(jax.random.key(0)), tx)
    assert policy.act(state.params, batch.states).shape == (count, 2, 3, 1)
    step = jax.jit(functools.partial(cpl_step, log_prob=policy.log_prob, tx=tx, alpha=1.0))
    before = float(np.square(policy.act(state.params, batch.states) - aim).mean())
    for _ in range(80):
        state, metrics = step(state, batch)
    assert float(metrics["accuracy"]) > 0.95
    assert np.square(policy.act(state.params, batch.states) - aim).mean() < before / 2
