import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from dpo_jax.losses import dpo_loss, implicit_rewards, ipo_loss, pair_accuracy, plackett_luce_loss, unlikelihood_loss

CASES = json.loads((GOLDEN / "preference_loss.json").read_text())
LOGPS = np.array([[-12.0, -15.0], [-80.5, -3.25], [-40.0, -40.0]])
REF = np.array([[-14.0, -13.0], [-75.0, -4.0], [-40.0, -40.0]])
RANKED = np.array([[-12.0, -15.0, -11.5, -20.0], [-80.5, -3.25, -30.0, -30.0], [-40.0, -40.0, -40.0, -40.0]])
RANKED_REF = np.array([[-14.0, -13.0, -9.0, -20.5], [-75.0, -4.0, -33.0, -31.0], [-40.0, -40.0, -40.0, -40.0]])


def run_case(case, rounded_to, computed_in):
    def stack(who):
        return jnp.stack([np.asarray(case[f"{who}_{side}"], rounded_to) for side in ("chosen", "rejected")], axis=1)

    policy, reference = (stack(who).astype(computed_in) for who in ("policy", "reference"))
    args = dict(case["args"])
    if args.pop("ipo", False):
        return ipo_loss(policy, reference, beta=args["beta"])
    return dpo_loss(policy, reference, **args)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["args"]))
def test_equal_to_the_original_in_float64(case):
    with jax.enable_x64(True):
        losses, rewards = run_case(case, np.float64, np.float64)
    np.testing.assert_allclose(losses, case["losses"], rtol=1e-12)
    np.testing.assert_allclose(rewards, np.stack([case["chosen_rewards"], case["rejected_rewards"]], axis=1), rtol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["args"]))
def test_float32_is_as_good_as_its_inputs(case):
    """Against float64 on the same rounded inputs: rounding them alone already moves the golden values by up to 5e-5 relative,
    since a reward is a small difference of large numbers. A loss below 1e-9 is exp(-margin): only the exponent is accurate."""
    with jax.enable_x64(True):
        exact, exact_rewards = run_case(case, np.float32, np.float64)
        losses, rewards = run_case(case, np.float32, np.float32)
    assert losses.dtype == rewards.dtype == np.float32
    np.testing.assert_allclose(losses, exact, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(rewards, exact_rewards, rtol=1e-6)


def test_policy_equal_to_reference_gives_ln_2():
    losses, rewards = dpo_loss(LOGPS, LOGPS, beta=0.1)
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-7)
    np.testing.assert_array_equal(rewards, 0.0)


def test_swapping_the_pair_negates_the_margin():
    with jax.enable_x64(True):
        rewards = dpo_loss(LOGPS, REF, beta=0.3)[1]
        swapped = dpo_loss(LOGPS[:, ::-1], REF[:, ::-1], beta=0.3)[1]
        np.testing.assert_allclose(np.subtract(*swapped.T), -np.subtract(*rewards.T), rtol=1e-12)


def test_a_constant_added_to_both_sides_changes_nothing():
    """The partition function of eq. 5 cancels in eq. 6."""
    with jax.enable_x64(True):
        for loss in (dpo_loss, ipo_loss):
            shifted = loss(LOGPS + np.array([[3.0], [-1.0], [7.0]]), REF, beta=0.2)[0]
            np.testing.assert_allclose(shifted, loss(LOGPS, REF, beta=0.2)[0], rtol=1e-12)


def test_gradient_is_the_one_of_the_paper():
    """Section 4: `-beta * sigmoid(-margin)` pushes the chosen up and, with the other sign, the rejected down."""
    with jax.enable_x64(True):
        beta = 0.1
        grads = jax.jit(jax.grad(lambda logps: dpo_loss(logps, REF, beta=beta)[0].sum()))(jnp.asarray(LOGPS))
        margin = beta * ((LOGPS - REF)[:, 0] - (LOGPS - REF)[:, 1])
        push = -beta / (1 + np.exp(margin))
        np.testing.assert_allclose(grads, np.stack([push, -push], axis=1), rtol=1e-12)


def test_every_option_changes_the_loss():
    plain = dpo_loss(LOGPS, REF, beta=0.1)[0]
    for options in ({"beta": 0.2}, {"beta": 0.1, "label_smoothing": 0.1}, {"beta": 0.1, "reference_free": True}):
        assert not np.allclose(dpo_loss(LOGPS, REF, **options)[0][:2], plain[:2])


def test_rewards_carry_no_gradient():
    grads = jax.jit(jax.grad(lambda logps: dpo_loss(logps, REF, beta=0.1)[1].sum()))(jnp.asarray(LOGPS))
    np.testing.assert_array_equal(grads, 0.0)


def test_label_smoothing_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="label_smoothing=0.5: a share in"):
        dpo_loss(LOGPS, REF, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="label_smoothing="):
        dpo_loss(LOGPS, REF, beta=0.1, label_smoothing=np.array([0.1, 0.2, 0.5]))


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, plackett_luce_loss])
@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf"), np.array([0.1, -0.1, 0.1])])
def test_a_beta_that_is_not_positive_is_refused(loss, beta):
    with pytest.raises(ValueError, match="beta=.*: a positive finite number is expected"):
        loss(LOGPS, REF, beta=beta)


# Options that are data of a program: swept by vmap, or one for each example

OPTIONS = [
    (dpo_loss, "label_smoothing", {"beta": 0.1}),
    (dpo_loss, "beta", {"label_smoothing": 0.1}),
    (ipo_loss, "beta", {}),
    (unlikelihood_loss, "alpha", {}),
    (plackett_luce_loss, "beta", {}),
]
VALUES = np.array([0.1, 0.3, 0.45])


@pytest.mark.parametrize(("loss", "option", "others"), OPTIONS)
def test_an_option_is_a_number_or_one_for_each_example_and_can_be_swept(loss, option, others):
    with jax.enable_x64(True):
        one_by_one = [loss(LOGPS, REF, **{option: float(value)}, **others) for value in VALUES]
        swept = jax.jit(jax.vmap(lambda value: loss(LOGPS, REF, **{option: value}, **others)))(VALUES)
        each = loss(LOGPS, REF, **{option: VALUES}, **others)
    for part, found in enumerate(swept):
        np.testing.assert_allclose(found, np.stack([result[part] for result in one_by_one]), rtol=1e-12)
        diagonal = np.stack([one_by_one[i][part][i] for i in range(3)])
        np.testing.assert_allclose(each[part], diagonal, rtol=1e-12)
    with pytest.raises(ValueError, match=rf"{option} has shape \(2,\); give one number, or one for each of the 3 examples"):
        loss(LOGPS, REF, **{option: VALUES[:2]}, **others)


@pytest.mark.parametrize(("loss", "option", "others"), OPTIONS)
def test_log_probabilities_of_another_shape_are_refused(loss, option, others):
    run = functools.partial(loss, **{option: 0.1}, **others)
    with pytest.raises(ValueError, match=r"logps has shape \(3,\).*\[P, 2\].*jnp.stack\(\[chosen, rejected\], axis=1\)"):
        run(LOGPS[:, 0], REF[:, 0])
    for ref in (REF[:, :1], REF[0], REF[:2], 0.0):  # all of which would broadcast, or fail in the depths
        with pytest.raises(ValueError, match="ref_logps has shape .* and logps .* must be equal"):
            run(LOGPS, ref)


# Unlikelihood


def test_unlikelihood_with_alpha_0_is_preferred_ft():
    """Loss and gradient are those of maximum likelihood on the chosen completion; the rejected one gets none at all."""
    with jax.enable_x64(True):
        loss = functools.partial(unlikelihood_loss, ref_logps=REF, alpha=0.0)
        np.testing.assert_array_equal(loss(LOGPS)[0], -LOGPS[:, 0])
        grads = jax.grad(lambda logps: loss(logps)[0].sum())(jnp.asarray(LOGPS))
        np.testing.assert_array_equal(grads, np.broadcast_to([-1.0, 0.0], LOGPS.shape))


def test_the_gradient_of_unlikelihood_knows_neither_margin_nor_reference():
    """Where DPO's sigmoid lets go of a pair that is told apart, this pushes on with the same force: why it degenerates."""
    with jax.enable_x64(True):
        for logps, ref in ((LOGPS, REF), (LOGPS - np.array([[0.0, 1e4]]), REF), (LOGPS, REF[::-1])):
            grads = jax.grad(lambda x, ref=ref: unlikelihood_loss(x, ref, alpha=0.3)[0].sum())(jnp.asarray(logps))
            np.testing.assert_allclose(grads, np.broadcast_to([-1.0, 0.3], LOGPS.shape), rtol=1e-15)
            np.testing.assert_allclose(unlikelihood_loss(logps, ref, alpha=0.3)[0], -logps[:, 0] + 0.3 * logps[:, 1])
            np.testing.assert_array_equal(unlikelihood_loss(logps, ref, alpha=0.3)[1], logps - ref)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        unlikelihood_loss(LOGPS, REF, alpha=alpha)


# Plackett-Luce


ranked_loss = jax.jit(plackett_luce_loss, static_argnames="beta")


def rankings_of(logps):
    """The same completions in every order: float[P * K!, K], the orders of a prompt together."""
    orders = np.array(list(itertools.permutations(range(logps.shape[1]))))
    return logps[:, orders].reshape(-1, logps.shape[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_plackett_luce_of_two_is_dpo_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        # Margins of up to 300 nats, on both sides: where one form of the loss would lose its digits, both must keep them.
        logps, ref = (rng.normal(-100, 30, size=(500, 2)).astype(dtype) for _ in range(2))
        for beta in (0.1, 0.5, 5.0):
            both = [loss(logps, ref, beta=beta) for loss in (plackett_luce_loss, dpo_loss)]
            assert both[0][0].dtype == dtype
            jax.tree.map(np.testing.assert_array_equal, *both)
            gradients = [
                jax.grad(lambda x, loss=loss, beta=beta: loss(x, ref, beta=beta)[0].sum())(jnp.asarray(logps))
                for loss in (plackett_luce_loss, dpo_loss)
            ]
            np.testing.assert_allclose(*gradients, rtol=4 * np.finfo(dtype).eps)


def test_plackett_luce_is_a_distribution_over_rankings():
    """Eq. 18: the probabilities of all K! orders of the same completions sum to 1, and equal completions make them equal."""
    with jax.enable_x64(True):
        losses = ranked_loss(rankings_of(RANKED), rankings_of(RANKED_REF), beta=0.3)[0]
    chances = np.exp(-np.asarray(losses)).reshape(3, 24)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(chances[2], 1 / 24, rtol=1e-12)
    assert np.ptp(chances[0]) > 0.1


def test_plackett_luce_is_the_product_of_the_paper():
    """Eq. 20 as it is written: each completion against itself and all that are ranked behind it."""
    with jax.enable_x64(True):
        losses, rewards = ranked_loss(RANKED, RANKED_REF, beta=0.3)
    exp = np.exp(0.3 * (RANKED - RANKED_REF))
    product = np.prod([exp[:, k] / exp[:, k:].sum(axis=1) for k in range(4)], axis=0)
    np.testing.assert_allclose(losses, -np.log(product), rtol=1e-12)
    np.testing.assert_allclose(rewards, 0.3 * (RANKED - RANKED_REF), rtol=1e-15)


def test_the_first_choice_of_many_rankings_is_a_softmax():
    """What Plackett-Luce means, and what sums over who comes first: P(y is best) is proportional to exp(reward)."""
    with jax.enable_x64(True):
        losses = ranked_loss(rankings_of(RANKED), rankings_of(RANKED_REF), beta=0.3)[0]
    first = np.exp(-np.asarray(losses)).reshape(3, 4, 6).sum(axis=2)  # permutations come sorted by who is first
    exp = np.exp(0.3 * (RANKED - RANKED_REF))
    np.testing.assert_allclose(first, exp / exp.sum(axis=1, keepdims=True), rtol=1e-12)


def test_permuting_completions_permutes_the_gradient_of_the_expected_loss():
    """The loss itself depends on the order; averaged over all orders it does not, and what moves takes its gradient along."""

    def expected(logps, ref):
        return ranked_loss(rankings_of(logps), rankings_of(ref), beta=0.3)[0].mean()

    with jax.enable_x64(True):
        moved = [2, 0, 3, 1]
        with_gradient = jax.jit(jax.value_and_grad(expected))
        value, grads = with_gradient(jnp.asarray(RANKED), RANKED_REF)
        again, moved_grads = with_gradient(jnp.asarray(RANKED[:, moved]), RANKED_REF[:, moved])
        one, other = (ranked_loss(RANKED[:, order], RANKED_REF[:, order], beta=0.3)[0] for order in (range(4), moved))
    np.testing.assert_allclose(again, value, rtol=1e-12)
    np.testing.assert_allclose(moved_grads, np.asarray(grads)[:, moved], rtol=1e-11, atol=1e-15)
    assert abs(np.asarray(one)[0] - np.asarray(other)[0]) > 0.1


def test_gradient_of_plackett_luce():
    """By hand: each choice pushes its completion up by 1 - p, and those still unplaced down by their share p of it."""
    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(lambda x: ranked_loss(x, RANKED_REF, beta=0.3)[0].sum()))
        grads = np.asarray(slope(jnp.asarray(RANKED)))
    rewards, expected = 0.3 * (RANKED - RANKED_REF), np.zeros_like(RANKED)
    for k in range(3):
        shares = np.exp(rewards[:, k:])
        expected[:, k:] += 0.3 * shares / shares.sum(axis=1, keepdims=True)
        expected[:, k] -= 0.3
    np.testing.assert_allclose(grads, expected, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(grads.sum(axis=1), 0.0, atol=1e-15)  # and a constant added to all changes nothing


def test_a_ranking_that_is_all_but_certain_keeps_its_digits():
    """In float32, where log(1 + exp(-30)) is 0: the loss is exp(-30) for each of the two choices."""
    logps = np.float32([[0.0, -30.0, -60.0]])
    losses = ranked_loss(logps, np.zeros_like(logps), beta=1.0)[0]
    np.testing.assert_allclose(losses, 2 * np.exp(-30.0), rtol=1e-6)


def test_a_loss_takes_the_completions_it_is_for():
    for loss in (dpo_loss, ipo_loss):
        with pytest.raises(ValueError, match="each example has 4 completions: use plackett_luce_loss"):
            loss(RANKED, RANKED_REF, beta=0.1)
    with pytest.raises(ValueError, match="each example has 4 completions"):
        unlikelihood_loss(RANKED, RANKED_REF, alpha=0.1)
    with pytest.raises(ValueError, match="at least two completions, got 1"):
        plackett_luce_loss(RANKED[:, :1], RANKED_REF[:, :1], beta=0.1)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_ties_count_half_and_rounding_is_a_tie(array):
    """Log-probabilities of some 300 nats have steps of 3e-5 in float32: a step up or down is nobody's preference."""
    ref = np.full((6, 2), -300.0, np.float32)
    moved = np.array([[0, 0], [3e-5, 0], [0, 6e-5], [0.01, 0], [0, 0.01], [-5, -7]], np.float32)
    logps, ref = array(ref + moved), array(ref)
    _, rewards = dpo_loss(logps, ref, beta=0.1)
    found = pair_accuracy(array(np.asarray(rewards)), logps, ref)
    assert found.dtype == np.float32
    assert found.tolist() == [0.5, 0.5, 0.5, 1, 0, 1]
    swapped = pair_accuracy(rewards[:, ::-1], logps[:, ::-1], ref[:, ::-1])
    assert (found + swapped == 1).all(), "who swaps the sides has the other share"


def test_a_ranking_is_right_where_its_best_is_above_its_worst():
    _, rewards = ranked_loss(RANKED, RANKED_REF, beta=0.1)
    assert pair_accuracy(rewards, RANKED, RANKED_REF).tolist() == [1, 0, 0.5]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, implicit_rewards, plackett_luce_loss])
def test_sums_of_log_probabilities_in_16_bits_are_refused(loss, dtype):
    """In bfloat16 both of these numbers are -402."""
    logps = np.float32([[-401.3, -402.1]])
    for name, given in (("logps", (logps.astype(dtype), logps)), ("ref_logps", (logps, jnp.asarray(logps, dtype)))):
        with pytest.raises(TypeError, match=f"^{name}: expected float32, got {np.dtype(dtype).name}: sum"):
            loss(*given, beta=0.1)
