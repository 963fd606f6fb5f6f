"""Worlds of control against closed forms and the simulator; preferences; P-IQL; `dpo-jax control` from end to end."""

import csv
import doctest
import functools
import importlib.util
import json
import math

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import call

from dpo_jax.control import lqr, pendulum, rollouts
from dpo_jax.control.iql import Critics, Experience, iql_step
from dpo_jax.control.lqr import Lqr, LqrWorld, masses
from dpo_jax.control.methods import METHODS, Learner, Options
from dpo_jax.control.policies import gaussian_policy
from dpo_jax.control.rollouts import Rollouts, best_segments, preferences
from dpo_jax.control.summary import rows, summarized, tables
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.runtime.parallel import pmap_partitioner, single_device
from dpo_jax.step import init_state


@pytest.fixture(autouse=True)
def _programs_for_a_few_calls():
    """Compiled quickly. Optax's Adam needs the usual promotion of types."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("module", [lqr, rollouts])
def test_examples(module):
    found = doctest.testmod(module, extraglobs={"np": np})
    assert found.attempted
    assert not found.failed


# Linear-quadratic control


def test_the_policy_of_maximum_entropy_solves_the_soft_bellman_equation():
    """V(s) = alpha log integral exp(Q(s, a) / alpha) da, by quadrature in one dimension; A* = Q - V."""
    world = Lqr(*(np.array([[x]]) for x in (1.1, 0.7, 1.0, 0.4)), gamma=0.9, alpha=0.3, noise=0.2)
    P, K, M = (float(x[0, 0]) for x in world.optimum())
    actions = np.linspace(-12, 12, 20001)[:, None]
    # V = -P s^2 + c, with c of the fixed point, from Q's part that does not depend on s or a.
    log_det = world.alpha / 2 * math.log(math.pi * world.alpha / M)
    c = (-world.gamma * P * world.noise**2 + log_det) / (1 - world.gamma)
    for s in (0.0, 1.3, -2.0):
        after = 1.1 * s + 0.7 * actions[:, 0]
        q = -(s**2) - 0.4 * actions[:, 0] ** 2 + world.gamma * (c - P * (after**2 + world.noise**2))
        v = world.alpha * np.log(np.trapezoid(np.exp((q - q.max()) / world.alpha), actions[:, 0])) + q.max()
        assert v == pytest.approx(-P * s**2 + c, rel=1e-6)
        np.testing.assert_allclose(world.advantages(np.full((20001, 1), s), actions), q - v, atol=1e-6)


def discounted_sum(world, gain, offset, matrix):
    """sum_t gamma^t E[x_t' matrix x_t + ...] of z = (s, a) under actions `gain s + offset`: moments, step by step."""
    size = len(world.A)
    mean, second, total = np.zeros(size), world.start**2 * np.eye(size), 0.0
    for t in range(1500):
        cross = np.concatenate([np.eye(size), gain])
        shift = np.concatenate([np.zeros(size), offset])
        both = cross @ second @ cross.T + np.outer(cross @ mean, shift) + np.outer(shift, cross @ mean) + np.outer(shift, shift)
        total += world.gamma**t * np.trace(matrix @ both)
        flow = np.concatenate([world.A, world.B], axis=1)
        second, mean = flow @ both @ flow.T + world.noise**2 * np.eye(size), world.A @ mean + world.B @ (gain @ mean + offset)
    return total


def test_costs_and_regrets_of_a_linear_policy():
    world = masses()
    _, K, M = world.optimum()
    gain, offset = -0.7 * K, np.array([0.1, -0.2])
    costs = np.block([[world.Q, np.zeros((4, 2))], [np.zeros((2, 4)), world.R]])
    assert world.cost(gain, offset) == pytest.approx(discounted_sum(world, gain, offset, costs), rel=1e-9)
    # Its cost over the optimum is the sum of the regrets of its actions (Kakade and Langford 2002).
    apart = np.concatenate([K, np.eye(2)], axis=1)
    regret = discounted_sum(world, gain, offset, apart.T @ M @ apart)
    assert world.cost(gain, offset) - world.cost(-K) == pytest.approx(regret, rel=1e-9)
    assert world.cost(np.zeros((2, 4)) + 9.0) == math.inf


def learner(partitioner=None, **options):
    base = {"hidden": (), "std": None, "alpha": 0.1, "lam": 1.0, "lr": 3e-2, "sft_steps": 100, "steps": 250}
    return Learner(
        LqrWorld(masses()), Options(**{**base, "pairs": 256, "evaluations": 1, **options}), partitioner or single_device()
    )


def test_cpl_on_preferences_by_exact_regret_finds_the_optimum(tmp_path):
    found = learner()
    segments = found.world.collect(4000, 16, np.random.default_rng(0))
    options = {"gamma": found.world.gamma, "temperature": 1.0, "comparisons": 1}
    data = preferences(segments, "regret", rng=np.random.default_rng(1), **options)
    start, end = METHODS["cpl"](found, data, "regret", 0, tmp_path)
    assert start["excess"] > 0.1
    assert 0 <= end["excess"] < 0.02
    assert end["kl"] < 2 < start["kl"]


def test_a_learner_takes_all_devices(tmp_path):
    found = {}
    for name, partitioner in (("one", single_device()), ("pmap", pmap_partitioner())):
        here = learner(partitioner, transitions=jax.device_count())
        segments = here.world.collect(8, 4, np.random.default_rng(0))
        data = preferences(segments, "regret", gamma=0.9, temperature=0.0, comparisons=1, rng=np.random.default_rng(1))
        points = []
        variables = here.clone(data, data.order[:, 0], 0, tmp_path / f"{name}.jsonl", steps=2, points=points)
        found[name] = (variables, len(points))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found["pmap"], found["one"])


# The Pendulum


def test_the_equations_are_those_of_the_simulator():
    environment = gymnasium.make("Pendulum-v1")
    shown, _ = environment.reset(seed=3)
    angle, speed = np.arctan2(shown[1], shown[0]), shown[2]
    rng = np.random.default_rng(0)
    for torque in 2.5 * rng.uniform(-1, 1, size=50):
        shown, reward, *_ = environment.step(np.array([torque]))
        angle, speed, ours = pendulum.advance(angle, speed, np.clip(torque, -2, 2))
        np.testing.assert_allclose([np.cos(angle), np.sin(angle), speed], shown, atol=1e-4)
        assert float(reward) == pytest.approx(float(ours), abs=1e-3)


@pytest.fixture(scope="module")
def world():
    return pendulum.PendulumWorld(gamma=0.97, episodes=10)


def test_the_expert_swings_up_and_its_own_actions_have_no_regret(world):
    assert world.optimal > -250  # doing nothing has about -1200
    angle, speed = np.array([3.0, -2.0, 0.3]), np.array([0.0, 1.0, -1.0])
    first, total = world.expert.value(angle, speed), np.zeros(3)
    for t in range(20):
        torque = world.expert.torque(angle, speed)
        angle, speed, reward = pendulum.advance(angle, speed, torque)
        total += 0.97**t * reward
    np.testing.assert_allclose(total + 0.97**20 * world.expert.value(angle, speed), first, atol=0.05)


def test_segments_of_the_simulator(world):
    found = world.collect(24, 50, np.random.default_rng(0))
    assert found.states.shape == (24, 51, 3)
    angle, speed = pendulum.angle_and_speed(found.states)
    _, after, rewards = pendulum.advance(angle[:, :-1], speed[:, :-1], 2 * found.actions[..., 0])
    np.testing.assert_allclose(after, speed[:, 1:], atol=1e-4)
    np.testing.assert_allclose(rewards, found.rewards, atol=1e-2)
    assert (found.advantages < 1).all()
    assert found.advantages.min() < -10
    still = world.measure(lambda variables, states: 0 * states[:, :1], {})
    assert still["return"] == pytest.approx(np.mean(still["episodes"]))
    assert len(still["episodes"]) == 10
    assert still["return_low"] < still["return"] < still["return_high"] < -800


def test_without_gymnasium_it_is_said_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gymnasium" else find(name, *rest))
    file = tmp_path / "c.yaml"
    file.write_text(f"run: {{dir: {tmp_path}/run}}\ncontrol: {{world: pendulum}}\n")
    for flags in ([], ["--check"]):
        code, _, err = call("control", file, *flags)
        assert code == 2
        assert "[control]" in err
        assert "gymnasium" in err


# Preferences and P-IQL


def test_how_often_the_better_segment_is_preferred():
    scores = np.tile([0.0, 1.5], 4000)
    segments = Rollouts(np.zeros((8000, 2, 1)), np.zeros((8000, 1, 1)), scores[:, None], -scores)
    options = {"gamma": 0.9, "comparisons": 2, "rng": np.random.default_rng(0)}
    for kind, sign in (("return", 1), ("regret", -1)):
        order = preferences(segments, kind, temperature=0.5, **options).order
        apart = sign * (scores[order[:, 0]] - scores[order[:, 1]])
        won = (apart > 0).sum() / (apart != 0).sum()
        assert won == pytest.approx(1 / (1 + math.exp(-3)), abs=0.01)
    assert set(best_segments(segments, "return", gamma=0.9, share=0.5)) == set(range(1, 8000, 2))


def test_losses_of_implicit_q_learning():
    rng = np.random.default_rng(0)
    critics, policy = Critics(3, 2, [4]), gaussian_policy([3], 2, hidden=[4], std=1.0)
    made = jax.device_get(jax.jit(lambda key: critics.init(key, policy))(jax.random.key(0)))
    variables = jax.tree.map(lambda x: x + np.float32(0.3 * rng.normal(size=x.shape)), made)
    states, after, actions = (np.float32(rng.normal(size=(6, size))) for size in (3, 3, 2))
    batch = Experience(states, actions, after, np.float32(rng.normal(size=6)), np.ones(6, np.float32))
    tx = optax.sgd(0.1)
    step = functools.partial(iql_step, critics=critics, log_prob=policy.log_prob, tx=tx, gamma=0.9, target_rate=0.25)
    state, metrics = jax.jit(step)(init_state(variables, tx), batch)

    def dense(name, x):
        if name in ("q", "target"):  # two networks, one after the other
            return np.concatenate(
                [layers_of(jax.tree.map(lambda leaf, i=i: leaf[i], variables[name]), x) for i in range(2)], axis=1
            )
        return layers_of(variables[name], x)

    def layers_of(network, x):
        layers = jax.tree.map(np.float64, network["params"])
        hidden = np.maximum(x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], 0)
        return hidden @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]

    pair = np.concatenate([states, actions], axis=1)
    u = dense("target", pair).min(axis=1) - dense("value", states)[:, 0]
    expected = {"loss/value": np.where(u < 0, 0.3, 0.7) * u**2}
    aim = batch.rewards + 0.9 * dense("value", after)[:, 0]
    expected["loss/q"] = ((dense("q", pair) - aim[:, None]) ** 2).sum(axis=1)
    logps = np.asarray(policy.log_prob(variables["policy"], states, actions))
    expected["loss/policy"] = -np.minimum(np.exp(3 * u), 100) * logps
    for name, values in expected.items():
        assert float(metrics[name]) == pytest.approx(values.mean(), rel=1e-4), name
    target = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, variables["target"], state.params["q"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.params["target"], target)
    # V learns nothing from the aim of Q, nor the policy's weights from the policy.
    assert not jnp.allclose(state.params["value"]["params"]["Dense_1"]["bias"], variables["value"]["params"]["Dense_1"]["bias"])


def test_the_two_q_share_nothing():
    """min(Q1, Q2) is of use only if the two err apart."""
    critics = Critics(3, 2, [4])
    policy, pairs = gaussian_policy([3], 2, hidden=[4], std=1.0), np.float32(np.random.default_rng(0).normal(size=(6, 5)))
    variables = jax.jit(lambda key: critics.init(key, policy)["q"])(jax.random.key(0))
    slopes = jax.jit(jax.jacobian(lambda v: critics.q_of(v, pairs).sum(axis=0)))(variables)
    for leaf in map(np.asarray, jax.tree.leaves(slopes)):  # [Q, network, ...]
        assert not leaf[0, 1].any()
        assert not leaf[1, 0].any()
    values = critics.q_of(variables, pairs)
    assert not np.allclose(values[:, 0], values[:, 1])


def test_one_seed_says_nothing_about_others():
    run = lambda method, value: Result(  # noqa: E731
        Run(method, "regret", {"preferences": "regret"}, 0),
        [{"return": value, "return_low": value - 9, "return_high": value + 9}],
        1.0,
    )
    summary = summarized([run("cpl", -100.0), run("sft", -124.0)], -80.0)
    assert [(row["return"], row["return_low"]) for row in summary["ahead"]] == [(24.0, None)]
    assert tables(summary)[1].rows == [["sft", "24.00"]]
    assert tables(summary)[1].note.endswith("over seeds alone")


def test_the_lead_is_paired_by_episode_and_over_episodes_and_seeds():
    """Seeds share their initial states: a lead in one episode of ten, alike in all seeds, is no certain lead."""
    luck = np.zeros(10)
    luck[3] = 200.0

    def run(method, seed, episodes):
        value = episodes.mean()
        point = {"step": 1.0, "return": value, "return_low": value - 60, "return_high": value + 60}
        return Result(Run(method, "regret", {"preferences": "regret"}, seed), [point | {"episodes": [*episodes]}], 1.0)

    starts = np.linspace(-400.0, -100.0, 10)
    results = [run(method, seed, starts + lead) for seed in (0, 1) for method, lead in (("cpl", luck), ("sft", 0), ("iql", -5))]
    summary = summarized(results, -80.0)
    ahead = {row["of"]: row for row in summary["ahead"]}
    assert ahead["sft"]["return"] == pytest.approx(20)
    assert ahead["sft"]["return_low"] < 1
    assert ahead["sft"]["return_high"] > 40
    assert tables(summary)[1].note.endswith("over episodes and seeds")
    assert "episodes" not in rows(results)[0]
    # The results of earlier versions have no episodes: seeds that agree seem certain.
    for result in results[:1]:
        del result.points[-1]["episodes"]
    old = summarized(results, -80.0)["ahead"][0]
    assert (old["return_low"], old["over"]) == (pytest.approx(old["return"]), "seeds alone")


# The command


def test_the_command(tmp_path):
    (tmp_path / "toy.yaml").write_text(
        f"run: {{dir: {tmp_path}/run}}\n"
        "control: {segments: 64, length: 4, sft_steps: 2, steps: 4, reward_steps: 2, batch: 8, transitions: 8, seeds: 2,\n"
        "  evaluations: 1, jobs: 1, methods: 'cpl,p-iql', preferences: regret}\n"
    )
    code, out, err = call("control", tmp_path / "toy.yaml")
    assert code == 0, err
    folder = tmp_path / "run" / "control"
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    ended = {(row["method"], row["preferences"], row["seed"]) for row in rows if row["step"] == "6.0"}
    assert len(ended) == 2 * 2
    assert (folder / "control.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    by = {(row["method"], row["preferences"]): row for row in summary["returns"]}
    cpl = [float(row["return"]) for row in rows if (row["method"], row["preferences"], row["step"]) == ("cpl", "regret", "6.0")]
    assert by["cpl", "regret"]["return"] == pytest.approx(np.mean(cpl))
    assert by["cpl", "regret"]["standard_error"] == pytest.approx(abs(cpl[0] - cpl[1]) / 2)
    assert "CPL is ahead of" in out
    code, out, _ = call("control", tmp_path / "toy.yaml", "--control.methods", "cpl")
    assert "2 of 2 runs are finished already" in out


def test_options_that_do_not_go_together(tmp_path):
    (tmp_path / "toy.yaml").write_text(f"run: {{dir: {tmp_path}/run}}\n")
    for flags, words in (
        (["--control.hidden", "8"], "control.hidden: must be null in the world lqr"),
        (["--control.lam", "0"], "control.lam: must be above 0 and at most 1"),
        (["--control.methods", "dpo"], "control.methods: must be some of sft, cpl"),
    ):
        code, _, err = call("control", tmp_path / "toy.yaml", *flags)
        assert code == 2
        assert words in err
