import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from dpo_jax.losses import dpo_loss, ipo_loss

CASES = json.loads((GOLDEN / "preference_loss.json").read_text())
LOGPS = np.array([[-12.0, -15.0], [-80.5, -3.25], [-40.0, -40.0]])
REF = np.array([[-14.0, -13.0], [-75.0, -4.0], [-40.0, -40.0]])


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
        grads = jax.grad(lambda logps: dpo_loss(logps, REF, beta=beta)[0].sum())(jnp.asarray(LOGPS))
        margin = beta * ((LOGPS - REF)[:, 0] - (LOGPS - REF)[:, 1])
        push = -beta / (1 + np.exp(margin))
        np.testing.assert_allclose(grads, np.stack([push, -push], axis=1), rtol=1e-12)


def test_every_option_changes_the_loss():
    plain = dpo_loss(LOGPS, REF, beta=0.1)[0]
    for options in ({"beta": 0.2}, {"beta": 0.1, "label_smoothing": 0.1}, {"beta": 0.1, "reference_free": True}):
        assert not np.allclose(dpo_loss(LOGPS, REF, **options)[0][:2], plain[:2])


def test_rewards_carry_no_gradient():
    grads = jax.grad(lambda logps: dpo_loss(logps, REF, beta=0.1)[1].sum())(jnp.asarray(LOGPS))
    np.testing.assert_array_equal(grads, 0.0)


def test_label_smoothing_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="label_smoothing=0.5"):
        dpo_loss(LOGPS, REF, beta=0.1, label_smoothing=0.5)
