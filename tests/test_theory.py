"""What Rafailov et al. 2023 prove, measured where everything can be counted: `dpo_step` is run to its end in the world of
`tabular.py`, and what it arrives at is compared with the optimum of eq. 4, known in closed form.

The data is exact, too: every pair of completions in both orders, weighted with its Bradley-Terry probability.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabular import (
    EOS,
    kl,
    log_partition,
    make_world,
    orders,
    pair_rows,
    preference_chance,
    projected,
    rows_of_rankings,
    total_variation,
)

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import completion_rows, packed_rows, plain_rows, shared_rows
from dpo_jax.dpo import dpo_step
from dpo_jax.logps import completion_logps, sequence_logps
from dpo_jax.losses import dpo_loss, implicit_rewards, ipo_loss, plackett_luce_loss, unlikelihood_loss
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.step import init_state

BETA = 0.5
WORLD = make_world(vocab=3, length=4, beta=BETA)  # 31 completions for each of 2 prompts
SMALL = make_world(vocab=3, length=2, beta=BETA, seed=1)  # 7: few enough to rank every four of them in every order
DPO = functools.partial(dpo_loss, beta=BETA)
PLACKETT_LUCE = functools.partial(plackett_luce_loss, beta=BETA)
UNLIKELIHOOD = {alpha: functools.partial(unlikelihood_loss, alpha=alpha) for alpha in (0.0, 0.05, 1.0)}
STEPS = 700


def adam(schedule):
    return make_optimizer(schedule, name="adamw", max_grad_norm=None)


SETTLING = adam(lambda step: 0.1 * (1 - step / STEPS))
STEADY = adam(0.1)


@functools.partial(jax.jit, static_argnames=("model", "loss", "tx"))
def trained(variables, rows, *, model, loss, tx=SETTLING):
    """`STEPS` steps of `dpo_step` from `variables` with the same rows: the variables at the end, and metrics float32[STEPS]."""

    def step(state, _):
        return dpo_step(state, rows, model=model, tx=tx, loss=loss)

    state, metrics = jax.lax.scan(step, init_state(variables, tx), length=STEPS)
    return state.params, metrics


@functools.cache
def dpo_policy(asked):
    """(log-probabilities float64[X, Y] of every completion, metrics) of DPO in WORLD."""
    variables, metrics = trained(WORLD.reference, pair_rows(WORLD, asked=asked), model=WORLD.model, loss=DPO)
    return WORLD.logps(variables), metrics


def regularized_reward(logps, rewards, ref_logps):
    """Eq. 3 for each prompt: E_pi[r] - beta KL(pi || pi_ref)."""
    return (np.exp(logps) * rewards).sum(axis=1) - BETA * kl(logps, ref_logps)


def spread(rewards):
    """How far rewards [X, Y] are from a function of the prompt alone: the largest difference within a prompt."""
    return np.ptp(rewards, axis=1).max()


# The world


@pytest.mark.parametrize(("world", "completions"), [(WORLD, 1 + 2 + 4 + 8 + 16), (SMALL, 1 + 2 + 4)])
def test_every_completion_is_counted_once(world, completions):
    assert len({tuple(text) for text in world.completions}) == len(world.completions) == completions
    assert world.ref_logps.shape == (2, completions)
    for logps in (world.ref_logps, world.logps(world.model.init(jax.random.key(7)))):
        np.testing.assert_allclose(np.exp(logps).sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.exp(world.optimal_logps).sum(axis=1), 1.0, rtol=1e-6)


def test_the_log_probability_of_a_completion_is_that_of_its_steps():
    """By hand, from the table: the policy of this world is what it is said to be."""
    logits = np.asarray(WORLD.reference["params"]["logits"], np.float64)
    steps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    number = next(i for i, text in enumerate(WORLD.completions) if tuple(text) == (2, 1, EOS))
    expected = steps[1, 2] + steps[1 + 3 * 2, 1] + steps[1 + 3 * 2 + 9 * 1, EOS]
    assert WORLD.ref_logps[0, number] == pytest.approx(expected, abs=1e-5)


def test_every_layout_reads_the_table_alike():
    pairs = [Encoded(WORLD.prompts[i % 2], WORLD.completions[i], WORLD.completions[-i]) for i in range(1, 9)]
    plain, *others = (rows(pairs, length=length) for rows, length in ((plain_rows, 5), (shared_rows, 9), (packed_rows, 27)))
    logps = jax.jit(functools.partial(completion_logps, WORLD.model))
    expected = logps(WORLD.reference, plain)
    for rows in others:
        found = logps(WORLD.reference, rows)
        np.testing.assert_allclose(found[rows.index >= 0], expected[rows.index[rows.index >= 0]], rtol=1e-6)


def test_a_table_can_be_any_distribution():
    logps = np.log(np.random.default_rng(0).dirichlet(np.ones(31), size=2))
    np.testing.assert_allclose(WORLD.logps(WORLD.table_of(logps)), logps, rtol=1e-5, atol=1e-5)


# Eq. 3 and 4: the optimum


def test_no_policy_beats_the_optimum():
    """Appendix A.1: eq. 3 is beta log Z - beta KL(pi || pi*) for every policy, so that pi* is its only maximum."""
    best = BETA * log_partition(WORLD.rewards, WORLD.ref_logps, beta=BETA)[:, 0]
    policies = [WORLD.logps(WORLD.model.init(jax.random.key(seed))) for seed in range(5)] + [WORLD.ref_logps]
    for logps in [*policies, WORLD.optimal_logps]:
        behind = BETA * kl(logps, WORLD.optimal_logps)
        np.testing.assert_allclose(regularized_reward(logps, WORLD.rewards, WORLD.ref_logps), best - behind, atol=1e-5)
    assert min(BETA * kl(logps, WORLD.optimal_logps).min() for logps in policies) > 0.1


@functools.partial(jax.jit, static_argnames="world")
def ascended(rewards, ref_logps, *, world):
    """The policy after gradient ascent on eq. 3 itself, over all completions."""
    texts = [(prompt, completion) for prompt in world.prompts for completion in world.completions]
    rows = completion_rows(texts, length=1 + world.length)

    def objective(variables):
        logps = sequence_logps(world.model, variables, rows).reshape(ref_logps.shape)
        return -(jnp.exp(logps) * (rewards - BETA * (logps - ref_logps))).sum()

    def step(state, _):
        updates, opt_state = SETTLING.update(jax.grad(objective)(state.params), state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return state.replace(params=params, opt_state=opt_state), None

    return jax.lax.scan(step, init_state(world.reference, SETTLING), length=STEPS)[0].params


@pytest.mark.parametrize("shift", [np.zeros((2, 1)), np.array([[4.0], [-7.0]])], ids=["r", "r + f(x)"])
def test_maximizing_eq_3_leads_to_eq_4_whatever_is_added_to_the_prompt(shift):
    """Lemma 2, by ascent on rewards that differ by a function of the prompt: one optimal policy, that of r."""
    rewards = np.float32(WORLD.rewards + shift)
    logps = WORLD.logps(ascended(rewards, np.float32(WORLD.ref_logps), world=WORLD))
    assert total_variation(logps, WORLD.optimal_logps) < 0.01
    np.testing.assert_allclose(WORLD.with_rewards(WORLD.rewards + shift).optimal_logps, WORLD.optimal_logps, atol=1e-12)


# DPO arrives there


@pytest.mark.parametrize("asked", ["evenly", "reference"])
def test_dpo_converges_to_the_optimum(asked):
    logps, _ = dpo_policy(asked)
    assert total_variation(logps, WORLD.optimal_logps) < 0.01
    assert total_variation(WORLD.ref_logps, WORLD.optimal_logps) > 0.3  # the way it has come
    best = BETA * log_partition(WORLD.rewards, WORLD.ref_logps, beta=BETA)[:, 0]
    np.testing.assert_allclose(regularized_reward(logps, WORLD.rewards, WORLD.ref_logps), best, atol=1e-4)


@pytest.mark.parametrize("asked", ["evenly", "reference"])
def test_the_implicit_reward_is_the_true_one_up_to_a_function_of_the_prompt(asked):
    """Theorem 1. The function is -beta log Z (eq. 5), so that the implicit reward is the projection of eq. 8."""
    implicit = np.asarray(implicit_rewards(np.float32(dpo_policy(asked)[0]), np.float32(WORLD.ref_logps), beta=BETA))
    assert spread(implicit - WORLD.rewards) < 0.01
    assert spread(WORLD.rewards) > 2  # what a policy that learned nothing would show
    np.testing.assert_allclose(implicit, projected(WORLD.rewards, WORLD.ref_logps, beta=BETA), atol=0.01)


def test_the_loss_of_dpo_ends_at_the_entropy_of_the_preferences():
    """The least that any reward can have on such data: a preference is as uncertain as it is."""
    chance = preference_chance(WORLD.rewards[orders(WORLD, 2)])
    entropy = -(chance * np.log(chance)).sum() / chance.sum()
    losses = dpo_policy("evenly")[1]["loss"]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] == pytest.approx(entropy, abs=1e-5)
    assert entropy < np.log(2) - 0.1


def test_the_gradient_vanishes_at_the_optimum_and_nowhere_else_on_the_way():
    """One step of `dpo_step` from the table of pi* itself, from the reference, and from pi* of another beta or of -r."""
    rows = pair_rows(WORLD)
    step = jax.jit(functools.partial(dpo_step, model=WORLD.model, tx=SETTLING, loss=DPO))

    def norm_at(logps):
        return float(step(init_state(WORLD.table_of(logps), SETTLING), rows)[1]["grad_norm"])

    elsewhere = [projected(WORLD.rewards, WORLD.ref_logps, beta=2 * BETA) / (2 * BETA), 0.0]
    elsewhere += [projected(-WORLD.rewards, WORLD.ref_logps, beta=BETA) / BETA]
    assert norm_at(WORLD.optimal_logps) < 1e-6
    assert min(norm_at(WORLD.ref_logps + log_ratio) for log_ratio in elsewhere) > 1e-3


def test_ipo_goes_elsewhere():
    """The identities above are DPO's: the optimum of another loss on the same data is another policy."""
    loss = functools.partial(ipo_loss, beta=BETA)
    variables, metrics = trained(WORLD.reference, pair_rows(WORLD), model=WORLD.model, loss=loss)
    logps = WORLD.logps(variables)
    assert total_variation(logps, WORLD.optimal_logps) > 0.05
    assert metrics["loss"][-1] < metrics["loss"][0] - 0.1


# Lemma 1, eq. 8 and 9


def test_a_function_of_the_prompt_changes_no_preference():
    """Lemma 1, through the losses: exp(-loss) is the probability of a ranking, with r as log-ratio and beta 1."""
    shift = np.array([[4.0], [-7.0]])
    for size, losses in ((2, (dpo_loss, plackett_luce_loss)), (4, (plackett_luce_loss,))):
        rewards, shifted = ((SMALL.rewards + added)[orders(SMALL, size)] for added in (0.0, shift))
        assert not np.allclose(rewards, shifted)
        for loss in losses:
            with jax.enable_x64(True):
                chances = [np.exp(-loss(r, np.zeros_like(r), beta=1.0)[0]) for r in (rewards, shifted)]
            np.testing.assert_allclose(chances[1], chances[0], rtol=1e-12)
            np.testing.assert_allclose(chances[0], preference_chance(rewards), rtol=1e-12)
    other = SMALL.rewards + np.arange(7.0)  # a function of the completion does
    assert not np.allclose(preference_chance(other[orders(SMALL, 4)]), chances[0], rtol=0.1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_the_projection_is_the_one_reward_of_its_class_that_a_policy_has(beta):
    """Eq. 8 gives eq. 9, a normalized policy, whose implicit reward it is; and it is the same from anywhere in the class."""
    reward = np.random.default_rng(3).normal(size=WORLD.rewards.shape) + np.array([[50.0], [-20.0]])
    projection = projected(reward, WORLD.ref_logps, beta=beta)
    np.testing.assert_allclose((np.exp(WORLD.ref_logps) * np.exp(projection / beta)).sum(axis=1), 1.0, rtol=1e-10)
    assert spread(projection - reward) < 1e-12
    for same in (projection, reward + np.array([[7.0], [11.0]])):
        np.testing.assert_allclose(projected(same, WORLD.ref_logps, beta=beta), projection, atol=1e-12)
    # As a policy of the package: eq. 5 gives the reward back.
    logps = WORLD.logps(WORLD.table_of(WORLD.ref_logps + projection / beta))
    np.testing.assert_allclose(np.exp(logps).sum(axis=1), 1.0, rtol=1e-5)
    implicit = implicit_rewards(np.float32(logps), np.float32(WORLD.ref_logps), beta=beta)
    np.testing.assert_allclose(implicit, projection, atol=1e-4 * max(1.0, beta))
    # The reward as it came belongs to no policy: eq. 9 does not hold for it.
    assert abs(np.log((np.exp(WORLD.ref_logps + reward / beta)).sum(axis=1))).min() > 5


# Plackett-Luce


def test_plackett_luce_of_four_converges_to_the_same_optimum():
    results = []
    for loss, rows in ((PLACKETT_LUCE, rows_of_rankings(SMALL, 4)), (DPO, pair_rows(SMALL))):
        logps = SMALL.logps(trained(SMALL.reference, rows, model=SMALL.model, loss=loss)[0])
        assert total_variation(logps, SMALL.optimal_logps) < 0.01
        implicit = np.asarray(implicit_rewards(np.float32(logps), np.float32(SMALL.ref_logps), beta=BETA))
        assert spread(implicit - SMALL.rewards) < 0.01
        results.append(logps)
    assert total_variation(*results) < 0.01
    assert total_variation(SMALL.ref_logps, SMALL.optimal_logps) > 0.2


# Unlikelihood


def pull():
    """How often each completion is chosen and rejected, over all preferences of a prompt: float64[X, Y] each, by hand."""
    chance = 1 / (1 + np.exp(WORLD.rewards[:, None, :] - WORLD.rewards[:, :, None]))  # [X, winner, loser]
    chance[:, np.arange(31), np.arange(31)] = 0
    return chance.sum(axis=2), chance.sum(axis=1)


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_unlikelihood_of_small_alpha_forgets_reference_and_reward(alpha):
    """Its optimum, where it has one, is chosen - alpha * rejected: with alpha 0, Preferred-FT, the share among the chosen."""
    chosen, rejected = pull()
    expected = chosen - alpha * rejected
    assert expected.min() > 0
    expected = np.log(expected / expected.sum(axis=1, keepdims=True))
    variables, _ = trained(WORLD.reference, pair_rows(WORLD), model=WORLD.model, loss=UNLIKELIHOOD[alpha])
    logps = WORLD.logps(variables)
    assert total_variation(logps, expected) < 0.01
    assert total_variation(logps, WORLD.optimal_logps) > 0.2


def test_unlikelihood_degenerates():
    """With alpha 1 the loss falls for ever, by emptying all that is rejected more often than chosen; DPO, with the same pairs,
    optimizer and number of steps, stays where its reference has support."""
    rows = pair_rows(WORLD)
    (policy, metrics), (dpo, dpo_metrics) = (
        trained(WORLD.reference, rows, model=WORLD.model, loss=loss, tx=STEADY) for loss in (UNLIKELIHOOD[1.0], DPO)
    )
    logps, dpo_logps = WORLD.logps(policy), WORLD.logps(dpo)
    thirds = np.linspace(0, STEPS - 1, 4).astype(int)

    def falls(metrics, name):
        return -np.diff(np.asarray(metrics[name])[thirds])

    for name in ("loss", "logps/rejected"):
        first, _, last = falls(metrics, name)
        assert last > 5
        assert last > 0.5 * first  # no floor in sight
        assert abs(falls(dpo_metrics, name)[-1]) < 0.01

    chosen, rejected = pull()
    unwanted = chosen < rejected
    log_ratios, dpo_log_ratios = logps - WORLD.ref_logps, dpo_logps - WORLD.ref_logps
    assert log_ratios[unwanted].max() < -10  # each and every one of them
    for of_prompt, unwanted_here, ref, best in zip(logps, unwanted, WORLD.ref_logps, WORLD.optimal_logps, strict=True):
        assert np.exp(of_prompt[unwanted_here]).sum() < 1e-4
        assert np.exp(ref[unwanted_here]).sum() > 0.05
        assert np.exp(best[unwanted_here]).sum() > 0.01
    bound = np.ptp(WORLD.rewards, axis=1, keepdims=True) / BETA
    assert (np.abs(dpo_log_ratios) < bound + 0.1).all()
    assert kl(WORLD.ref_logps, logps).min() > 5 * kl(WORLD.ref_logps, dpo_logps).max()
