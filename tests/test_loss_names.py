"""Losses by name: equal to TRL's, not changed by padding, and documented by the table that the program is configured from."""

import doctest
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

import dpo_jax
from dpo_jax import loss_table, losses
from dpo_jax.cli.commands.dpo import loss_at_reference
from dpo_jax.cli.config import DpoConfig
from dpo_jax.logps import pair_sums
from dpo_jax.losses import named_loss, required_inputs, sum_of_losses, weighted_by_policy
from dpo_jax.types import Rows

STORED = json.loads((GOLDEN / "losses.json").read_text())
NAMES = list(loss_table.LOSSES)
NEEDED = {"exo_pair": {"label_smoothing": 0.01}, "unlikelihood": {"alpha": 0.3}}
NOT_IN_TRL = {
    "plackett_luce": "no; equal to the paper's formula in test_losses.py",
    "length_regularized": "no",
    "dpo": "there it is sigmoid",
    "ipo": "only with means per token; equal to the original in test_losses.py",
    "unlikelihood": "a baseline of the paper",
    "preferred_ft": "a baseline of the paper",
}


def named(setting):
    return f"{setting['loss']} {setting['options']}"


def of_trl(setting, cases):
    """Our losses of TRL's cases: means over the pairs float64[cases], and their gradients by the first token of completions."""
    options = dict(setting["options"])
    ld_alpha = options.pop("ld_alpha", 1.0)
    loss = named_loss(setting["loss"], **options)
    names = required_inputs(loss)

    def mean(tokens, case):
        lengths = case["lengths"]
        slot = (jnp.arange(12, dtype=float)[None] >= lengths.reshape(-1, 1)).astype(jnp.int32)
        rows = Rows(*[jnp.zeros_like(slot)] * 6, slot=slot, weight=jnp.ones(4), index=jnp.arange(4))
        signals = {
            "lengths": lengths,
            "mean_lengths": jnp.broadcast_to(lengths.mean(axis=0), lengths.shape),
            "weight": jnp.ones(4),
            "aligned_logps": case["aligned_logps"],
            "desirable": case["desirable"],
        }
        logps = pair_sums(tokens, rows, ld_alpha=ld_alpha)
        return loss(logps, case["ref_logps"], **{name: signals[name] for name in names})[0].mean()

    arrays = {name: np.array([case[name] for case in cases], np.float64) for name in cases[0]}
    tokens = arrays.pop("tokens").reshape(-1, 2, 4, 12).swapaxes(1, 2).reshape(-1, 8, 12)  # TRL has all chosen ones first
    losses, gradients = jax.vmap(jax.value_and_grad(mean))(tokens, arrays)
    return losses, gradients[:, :, 0].reshape(-1, 4, 2)


def assert_equal_to_trl(stored):
    with jax.enable_x64(True):
        results = jax.jit(lambda: [of_trl(setting, stored["cases"]) for setting in stored["settings"]])()
        for setting, result in zip(stored["settings"], results, strict=True):
            for found, expected in zip(result, (setting["losses"], setting["gradients"]), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=named(setting))


def test_loss_and_gradient_are_trls():
    """Five batches of four pairs, kept from TRL's own trainers by golden/make_losses.py."""
    assert_equal_to_trl(STORED)
    compared = {term.name for setting in STORED["settings"] for term in loss_table.terms(setting["loss"])}
    assert compared | set(NOT_IN_TRL) == set(NAMES)


@pytest.mark.parity
def test_loss_and_gradient_are_trls_in_a_thousand_cases(tmp_path):
    """Set DPO_JAX_TORCH_PYTHON to a Python with torch and trl if this one has none."""
    python = os.environ.get("DPO_JAX_TORCH_PYTHON") or (sys.executable if importlib.util.find_spec("trl") else None)
    if python is None:
        pytest.skip("no trl here and DPO_JAX_TORCH_PYTHON is not set")
    out = tmp_path / "losses.json"
    done = subprocess.run([python, GOLDEN / "make_losses.py", "1000", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_to_trl(json.loads(out.read_text()))


def drawn(pairs, seed=0):
    """Log-probabilities, the reference's, and everything a loss may ask for, of random pairs."""
    rng = np.random.default_rng(seed)
    logps = rng.normal(-30, 5, size=(pairs, 2))
    ref = logps + rng.normal(0, 3, size=(pairs, 2))
    lengths = rng.integers(3, 20, size=(pairs, 2)).astype(np.float64)
    signals = {
        "lengths": lengths,
        "mean_lengths": np.broadcast_to(lengths.mean(axis=0), lengths.shape),
        "weight": np.ones(pairs),
        "aligned_logps": rng.normal(-1, 0.3, size=(pairs, 2)),
        "desirable": (np.arange(pairs) % 2).astype(np.float64),
    }
    return logps, ref, signals


def bound(name, signals, **options):
    """The loss `name` with everything it asks for: a function of two arrays."""
    loss = named_loss(name, **NEEDED.get(name, {}), **options)
    return functools.partial(loss, **{signal: signals[signal] for signal in required_inputs(loss)})


@pytest.mark.parametrize("name", NOT_IN_TRL)
def test_the_gradient_is_the_slope(name):
    logps, ref, signals = drawn(3)
    with jax.enable_x64(True):

        def total(logps):
            return bound(name, signals)(logps, ref)[0].sum()

        def total_of_rewards(logps):
            return bound(name, signals)(logps, ref)[1].sum()

        steps = 1e-5 * np.eye(logps.size).reshape(-1, *logps.shape)
        above, below = (jax.jit(jax.vmap(total))(at) for at in (logps + steps, logps - steps))
        gradient, rewards = jax.jit(lambda logps: (jax.grad(total)(logps), jax.grad(total_of_rewards)(logps)))(logps)
        slope = (np.asarray(above) - np.asarray(below)) / 2e-5
        np.testing.assert_allclose(gradient, slope.reshape(logps.shape), rtol=1e-6, atol=1e-8)
        assert np.abs(gradient).max() > 1e-3
        np.testing.assert_array_equal(rewards, 0.0)


@pytest.mark.parametrize("name", [*NAMES, "0.5*aot + 0.1*sft"])
def test_padding_examples_change_nothing(name):
    """Padding has weight 0, no tokens and log-probability 0; its weight would not undo a NaN, in the loss or its gradient."""
    logps, ref, signals = drawn(7)
    places = [1, 2, 4, 5, 6, 7, 8]

    def spread(values):
        wide = np.zeros((9, *values.shape[1:]), np.float32)
        wide[places] = values
        return wide

    wide = {signal: spread(values) for signal, values in signals.items()}
    wide["mean_lengths"] = np.broadcast_to(wide["mean_lengths"][1], (9, 2))

    def weighted(logps, ref, signals):
        losses, _ = bound(name, signals)(logps, ref)
        return (losses * signals["weight"]).sum(), losses

    narrow = jax.tree.map(np.float32, (logps, ref, signals))
    both = jax.jit(lambda *cases: [jax.grad(weighted, has_aux=True)(*case) for case in cases])
    (slope, losses), (wide_slope, wide_losses) = both(narrow, (spread(logps), spread(ref), wide))
    assert np.isfinite(wide_losses).all()
    np.testing.assert_allclose(np.asarray(wide_losses)[places], losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(wide_slope)[places], slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(wide_slope)[[0, 3]], 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_lists_what_a_function_reads(name):
    loss = loss_table.LOSSES[name]
    module, _, function = loss.function.partition(".")
    assert getattr(losses, function) is getattr(importlib.import_module(f"dpo_jax.losses.{module}"), function)
    parameters = list(inspect.signature(getattr(losses, function)).parameters)
    assert [p for p in parameters if p not in ("logps", "ref_logps", *losses.SIGNALS)] == list(loss.options)
    assert loss.whole_batch == ("weight" in parameters)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_the_loss_and_others_are_refused(name):
    logps, ref, signals = drawn(6)
    changed = {
        **{"beta": 0.3, "alpha": 0.6, "label_smoothing": 0.2, "reference_free": True, "f_divergence": "js_divergence"},
        **{"f_alpha": 0.7, "discopop_tau": 0.5, "length_penalty": 0.2, "gamma": 1.0, "cpo_alpha": 0.3, "wpo": True},
        **{"desirable_weight": 1.3, "undesirable_weight": 0.7},
    }
    assert changed.keys() == loss_table.OPTIONS.keys()
    read = loss_table.reads(name)
    for option, value in changed.items():
        needed = NEEDED.get(name, {})
        if option in read:
            along = {"f_divergence": "alpha_divergence"} if option == "f_alpha" else {}
            loss = named_loss(name, **{**needed, **along, option: value})
            before = named_loss(name, **needed, **along)
            found, plain = (
                x(logps, ref, **{signal: signals[signal] for signal in required_inputs(x)})[0] for x in (loss, before)
            )
            assert not np.allclose(found, plain), option
        else:
            with pytest.raises(
                ValueError, match=f"^{option}: loss {name} does not read it: leave it at .*, or use one that does"
            ):
                named_loss(name, **needed, **{option: value})


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_policy_that_is_its_reference(name):
    """The table's formula is what the guard of step 0 expects, and where there is none the loss depends on the data."""
    section = DpoConfig(loss=name, **NEEDED.get(name, {}))
    logps, _, signals = drawn(4)
    values = np.asarray(bound(name, signals)(logps, logps)[0])
    if formula := loss_table.LOSSES[name].at_reference:
        expected = eval(formula, {"log": math.log, "factorial": math.factorial, "K": 2, **section.loss_options()})
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert loss_at_reference(section) == pytest.approx(expected, rel=1e-6)
    else:
        assert np.ptp(values) > 1e-3
        assert loss_at_reference(section) is None


def test_a_preference_that_length_explains_asks_less_of_the_policy():
    """Of two pairs with equal log-probabilities that with the longer chosen completion has the smaller gradient."""
    logps, lengths = np.zeros((2, 2)), np.array([[20.0, 10.0], [10.0, 20.0]])
    loss = named_loss("length_regularized", length_penalty=0.1)
    slope = jax.grad(lambda logps: loss(logps, np.zeros((2, 2)), lengths=lengths)[0].sum())(logps)
    assert abs(slope[0, 0]) < 0.05 < abs(slope[1, 0])
    np.testing.assert_allclose(
        named_loss("length_regularized", length_penalty=0.0)(logps, logps, lengths=lengths)[0], np.log(2)
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", [name for name in NAMES if "f_divergence" in loss_table.LOSSES[name].options])
def test_far_from_the_reference_losses_and_gradients_stay_finite(name, divergence):
    """exp(89) is infinite in float32, and so is the square of exp(45): one such pair would make all parameters NaN."""
    ratios = np.float32([1, -1, 50, -50, 100, -100, 1000, -1000])
    reference = np.full((64, 2), -2000, np.float32)
    logps = reference + np.stack(np.meshgrid(ratios, ratios), axis=-1).reshape(-1, 2)
    signals = {signal: np.ones_like(logps) for signal in ("lengths", "mean_lengths")} | {"weight": np.ones(64, np.float32)}
    for alpha in (0.0, 0.5, 3.0):
        options = {"f_divergence": divergence} | ({"f_alpha": alpha} if divergence == "alpha_divergence" else {})
        options |= {"discopop_tau": 5.0 if alpha == 3.0 else 0.05} if name == "discopop" else {}
        loss = bound(name, signals, beta=0.5, **options)
        losses, back = jax.vjp(lambda logps, loss=loss: loss(logps, reference)[0], logps)
        assert np.isfinite(losses).all(), options
        assert np.isfinite(back(jnp.ones_like(losses))[0]).all(), options


def test_forward_kl_is_the_divergence_of_alpha_0():
    logps = np.float32([[-5.0, -1.0], [-60.0, 3.0], [-95.0, -2.0], [0.0, -95.0]])

    def measured(**options):
        loss = named_loss("hinge", beta=0.1, **options)
        return jax.value_and_grad(lambda logps: loss(logps, 0 * logps)[0].sum())(logps)

    forward, alpha = measured(f_divergence="forward_kl"), measured(f_divergence="alpha_divergence", f_alpha=0.0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), forward, alpha)


def test_a_sum_of_losses_is_checked_at_step_0_where_all_its_parts_are():
    assert loss_at_reference(DpoConfig(loss="0.5*dpo + 2*hinge")) == pytest.approx(math.log(2) / 2 + 2)
    assert loss_at_reference(DpoConfig(loss="dpo + 0.1*sft")) is None
    assert loss_at_reference(DpoConfig(wpo=True)) is None


def test_a_sum_asks_for_what_its_parts_ask_for():
    loss = named_loss("dpo + 0.5*orpo + sft")
    assert required_inputs(loss) == {"lengths", "mean_lengths"}
    logps, ref, signals = drawn(4)
    parts = [bound(name, signals)(logps, ref)[0] for name in ("dpo", "orpo", "sft")]
    np.testing.assert_allclose(bound("dpo + 0.5*orpo + sft", signals)(logps, ref)[0], parts[0] + 0.5 * parts[1] + parts[2])
    rewards = sum_of_losses([(2.0, named_loss("sft")), (1.0, named_loss("dpo"))])(
        logps, ref, mean_lengths=signals["mean_lengths"]
    )[1]
    np.testing.assert_allclose(rewards, logps - ref, rtol=1e-4)


@pytest.mark.parametrize("needed", [True, False])
def test_columns_of_the_data_reach_the_parts_of_a_loss(needed):
    def with_default(logps, ref_logps, *, gap=0.0):
        return (logps[:, 0] - logps[:, 1] - gap) ** 2, logps

    def without(logps, ref_logps, *, gap):
        return with_default(logps, ref_logps, gap=gap)

    def of_all(logps, ref_logps, **signals):
        return with_default(logps, ref_logps, gap=signals["gap"])

    zeros, expected = np.zeros((1, 2), np.float32), 9 / 2 + 2 * math.log(2)
    total = sum_of_losses([(0.5, without if needed else with_default), (2.0, named_loss("dpo"))])
    assert total(zeros, zeros, gap=3.0)[0] == pytest.approx(expected)
    nested = sum_of_losses([(4.0, weighted_by_policy(total)), (1.0, of_all)])
    assert required_inputs(nested) == {"aligned_logps"}
    found = nested(zeros, zeros, gap=3.0, aligned_logps=np.log(np.float32([[0.5, 0.5]])))[0]
    assert found == pytest.approx(expected + 9)
    with pytest.raises(TypeError, match="none of these losses reads hap"):
        total(zeros, zeros, gap=3.0, hap=3.0)


def test_what_has_a_value_is_not_asked_for():
    def loss(logps, ref_logps, *, lengths, weight=1.0):
        return logps[:, 0] * lengths[:, 0], logps

    assert required_inputs(loss) == {"lengths"}
    assert required_inputs(functools.partial(loss, lengths=1)) == set()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dpoo", "expected one of dpo, .*got the text 'dpoo'; did you mean \"dpo\"?"),
        ("", "got the text ''"),
        ("0*dpo", "the weight of dpo must be a number above 0"),
        ("x*dpo", "the weight of dpo must be a number above 0, .* got 'x'"),
    ],
)
def test_what_is_no_loss_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        named_loss(text)
    with pytest.raises(ValueError, match="betta: unknown option; losses have beta"):
        named_loss("dpo", betta=1)


EXAMPLES = [name for name in vars(losses) if name.endswith("_loss")] + [
    "required_inputs",
    "sum_of_losses",
    "weighted_by_policy",
    "unpaired_metrics",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_losses_do_what_they_show(name):
    value, scope = getattr(losses, name), {**vars(losses), "np": np, "jnp": jnp, "partial": functools.partial}
    found = doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", scope, name, None, 0)
    assert found.examples
    told, report = [], doctest.DocTestRunner()
    report.run(found, out=told.append)
    assert not report.failures, "".join(told)


def test_the_documentation_has_the_table():
    text = (Path(dpo_jax.__file__).parent / "losses" / "README.md").read_text()
    assert loss_table.markdown() in text
