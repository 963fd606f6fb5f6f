"""What a step supplies to a loss that asks for it: the same in every layout, however the batch is cut into parts."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from test_groups import GROUPS, LAYOUTS
from test_groups import PAIRS as OF_GROUPS
from test_step import PAIRS, REF, layout, rows_of, toy_model

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import examples_to_rows, plain_rows, ranking_rows
from dpo_jax.dataset_logps import reference_logps_of
from dpo_jax.dpo import dpo_objective, dpo_step
from dpo_jax.logps import completion_logps
from dpo_jax.losses import named_loss, sum_of_losses, weighted_by_policy
from dpo_jax.step import init_state

MODEL = toy_model()
TX = optax.sgd(0.1)
scored = jax.jit(functools.partial(completion_logps, MODEL), static_argnames="ld_alpha")
LENGTHS = np.array([[len(pair.chosen), len(pair.rejected)] for pair in PAIRS], np.float32)


@pytest.fixture(scope="module")
def state():
    return init_state(MODEL.init(jax.random.key(0)), TX)


def metrics_of(loss, state, rows, **options):
    return jax.jit(functools.partial(dpo_step, model=MODEL, tx=TX, loss=loss, **options))(state, rows)[1]


def ones(logps):
    return logps[:, 0] * 0 + 1


# Losses of 1 whose rewards are what they asked for, so that metrics show its mean.
SHOWS = {
    "lengths": lambda logps, ref_logps, *, lengths: (ones(logps), lengths),
    "mean_lengths": lambda logps, ref_logps, *, mean_lengths: (ones(logps), mean_lengths),
    "aligned_logps": lambda logps, ref_logps, *, aligned_logps: (ones(logps), aligned_logps),
}


@pytest.mark.parametrize("kind", ["plain", "shared", "packed"])
@pytest.mark.parametrize("name", ["lengths", "mean_lengths"])
def test_lengths_are_those_of_real_pairs(name, kind, state):
    metrics = metrics_of(SHOWS[name], state, rows_of(kind))
    assert metrics["rewards/chosen"] == pytest.approx(LENGTHS[:, 0].mean())
    assert metrics["rewards/rejected"] == pytest.approx(LENGTHS[:, 1].mean())


def test_a_keyword_that_would_stay_none_is_refused(state):
    def loss(logps, ref_logps, *, lengths=None):
        return ones(logps), jnp.ones_like(logps) if lengths is None else lengths

    with pytest.raises(ValueError, match="lengths=None: the step supplies lengths to a loss only if that keyword has no"):
        metrics_of(loss, state, rows_of("shared"))
    assert metrics_of(functools.partial(loss, lengths=None), state, rows_of("shared"))["rewards/chosen"] == 1
    rows = rows_of("shared")
    column = rows.replace(extras={"lengths": np.full((len(rows.weight), 2), 3, np.float32)})
    assert metrics_of(loss, state, column)["rewards/chosen"] == pytest.approx(3)


@pytest.mark.parametrize("name", ["orpo", "cpo + 0.5*sigmoid_norm"])
def test_the_objective_alone_takes_the_means_of_its_rows(name, state):
    rows, loss = rows_of("shared"), named_loss(name, beta=0.5)
    losses, found = jax.jit(functools.partial(dpo_objective, model=MODEL, loss=loss))(state.variables, rows)
    expected = metrics_of(loss, state, rows)
    used = rows.weight / rows.weight.sum()
    assert float((losses * used).sum()) == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert float((found["rewards/margins"] * used).sum()) == pytest.approx(float(expected["rewards/margins"]), rel=1e-5)


@pytest.mark.parametrize("cut", ["microbatches", "devices"])
def test_a_likelihood_term_per_token_does_not_depend_on_how_the_batch_is_cut(cut, state):
    """Each part has another mean length, and one holds the padding example; the divisor is that of the whole batch."""
    loss = named_loss("cpo + 0.5*sigmoid_norm", beta=0.5)
    whole = metrics_of(loss, state, rows_of("shared"))
    if cut == "microbatches":
        parts = metrics_of(loss, state, rows_of("shared"), microbatches=4)
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        step = functools.partial(dpo_step, model=MODEL, tx=TX, loss=loss, axis_name="data")
        mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
        parts = mapped(state, rows_of("shared"))[1]
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    logps = np.asarray(scored(state.variables, plain_rows(PAIRS, length=32)))
    margins = 0.5 * (logps[:, 0] - logps[:, 1])
    normed = (logps - REF) / LENGTHS
    normed = 0.5 * (normed[:, 0] - normed[:, 1])
    likelihood = -logps[:, 0].sum() / LENGTHS[:, 0].sum()
    expected = np.log1p(np.exp(-margins)).mean() + likelihood + 0.5 * np.log1p(np.exp(-normed)).mean()
    assert whole["loss"] == pytest.approx(expected, rel=1e-5)


def decorrelated(logps, ref_logps, *, weight, aligned_logps, gap):
    """A loss across pairs of one's own. Each term depends on all pairs, and on every kind of input."""
    margins = (logps - ref_logps)[:, 0] - (logps - ref_logps)[:, 1]
    mean = (margins * weight).sum() / weight.sum()
    return (margins - mean - gap) ** 2 * jnp.exp(aligned_logps[:, 0]) + 0.1 * jnp.tanh(mean), logps - ref_logps


LOSSES_ACROSS = {"aot": named_loss("aot + 0.1*sft", beta=0.3), "custom": decorrelated}


def rows_across(name, kind):
    rows = rows_of(kind)
    gap = examples_to_rows(np.linspace(-1, 1, 8, dtype=np.float32), rows)
    return rows.replace(extras={"gap": gap}) if name == "custom" else rows


@pytest.fixture(scope="module")
def of_the_whole_batch(state):
    """Step on the whole batch, by loss and kind of rows: compiled once for all ways to cut it."""

    @functools.cache
    def taken(name, kind):
        step = functools.partial(dpo_step, model=MODEL, tx=TX, loss=LOSSES_ACROSS[name])
        return jax.jit(step)(state, rows_across(name, kind))

    return taken


# What rows hold does not depend on the loss, so one loss sees all kinds.
@pytest.mark.parametrize(("name", "kind"), [("aot", "packed"), *(("custom", kind) for kind in ("plain", "shared", "packed"))])
@pytest.mark.parametrize(
    "cut",
    [{"microbatches": 4}, {"devices": 4}, {"devices": 2, "microbatches": 2}, {"mesh": 2, "microbatches": 2}],
    ids=lambda cut: " ".join(f"{count} {name}" for name, count in cut.items()),
)
def test_a_loss_across_pairs_is_that_of_the_whole_batch_where_it_is_cut(name, cut, kind, state, of_the_whole_batch):
    """Update and metrics. `test_a_loss_across_pairs_sorts_the_whole_of_a_sharded_batch` has the numbers."""
    rows, (after, expected) = rows_across(name, kind), of_the_whole_batch(name, kind)
    step = functools.partial(dpo_step, model=MODEL, tx=TX, loss=LOSSES_ACROSS[name])
    parts = functools.partial(step, microbatches=cut.get("microbatches", 1))
    if devices := cut.get("devices"):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        parts = functools.partial(parts, axis_name="data")
        parts = jax.shard_map(parts, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with contextlib.ExitStack() as held:
        if devices := cut.get("mesh"):
            mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            held.enter_context(jax.set_mesh(mesh))
            rows = jax.device_put(rows, jax.sharding.NamedSharding(mesh, P("data")))
        found, metrics = jax.jit(parts)(state, rows)
    assert {*metrics} == {*expected}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found.params, after.params)


def test_a_loss_across_pairs_sorts_the_whole_of_a_sharded_batch(state):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.device_put(rows_of("shared"), jax.sharding.NamedSharding(mesh, P("data")))
    found, expected = (metrics_of(named_loss("aot", beta=0.3), state, part) for part in (rows, rows_of("shared")))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    logps = np.asarray(scored(state.variables, plain_rows(PAIRS, length=32)))
    margins = 0.3 * (np.sort(logps[:, 0] - logps[:, 1]) - np.sort(REF[:, 0] - REF[:, 1]))
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)


def test_columns_of_the_data_come_before_what_a_step_would_supply(state):
    rows = rows_of("shared")
    rows = rows.replace(extras={"lengths": np.full((8, 2), 3.0, np.float32)})
    assert metrics_of(SHOWS["lengths"], state, rows)["rewards/chosen"] == pytest.approx(3)


def test_a_loss_made_of_others_passes_columns_of_the_data_on(state):
    def shows(logps, ref_logps, *, gap=0.0):
        return ones(logps) * gap, logps

    rows = rows_of("shared")
    rows = rows.replace(extras={"gap": np.full(8, 3.0, np.float32)})
    total = sum_of_losses([(0.5, shows), (1.0, weighted_by_policy(sum_of_losses([(0.0, shows), (0.0, named_loss("dpo"))])))])
    assert metrics_of(total, state, rows)["loss"] == pytest.approx(1.5)


# LD-DPO


def expected_ld(pairs, variables, alpha):
    """From whole completions, and from completions cut to the length of the shorter one."""
    shortest = [min(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    cut = [Encoded(pair.prompt, pair.chosen[:n], pair.rejected[:n]) for pair, n in zip(pairs, shortest, strict=True)]
    whole, shared = (scored(variables, plain_rows(which, length=32)) for which in (pairs, cut))
    return np.asarray(alpha * whole + (1 - alpha) * shared)


def test_a_data_set_is_scored_with_the_weight_of_the_step(state):
    found = reference_logps_of(MODEL, state.variables, PAIRS, ld_alpha=0.3)
    np.testing.assert_allclose(found, expected_ld(PAIRS, state.variables, 0.3), rtol=1e-5)


def test_single_completions_have_no_shorter_partner(state):
    rows = rows_of("plain")
    rows = rows.replace(extras={"desirable": np.ones(len(PAIRS), np.float32)})
    with pytest.raises(ValueError, match="leave it at 1 for rankings and single completions"):
        scored(state.variables, rows, ld_alpha=0.5)


@pytest.mark.parametrize("kind", ["plain", "shared", "packed"])
def test_tokens_beyond_the_shorter_completion_count_less(kind, state):
    rows = layout(kind).rows(PAIRS)
    found = np.asarray(scored(state.variables, rows, ld_alpha=0.3))
    expected = expected_ld(PAIRS, state.variables, 0.3)
    for place, number in enumerate(rows.index):
        if number >= 0:
            np.testing.assert_allclose(found[place], expected[number], rtol=1e-5)
    assert np.isfinite(found).all()


def test_a_completion_shared_by_pairs_is_cut_for_each(state):
    layout = LAYOUTS["packed"]
    rows = layout.rows(GROUPS)
    found = np.asarray(scored(state.variables, rows, ld_alpha=0.3))
    expected = expected_ld(OF_GROUPS, state.variables, 0.3)
    seen = 0
    for place in np.flatnonzero(rows.index >= 0):
        group, member = divmod(int(rows.index[place]), layout.pairs)
        np.testing.assert_allclose(found[place], expected[GROUPS[group].members[member]], rtol=1e-5)
        seen += 1
    assert seen == len(OF_GROUPS)


def test_a_step_of_ld_dpo_trains_on_these(state):
    ref = expected_ld(PAIRS, state.variables, 0.3)
    rows = layout("shared").rows(PAIRS, ref_logps=ref)
    metrics = metrics_of(named_loss("dpo"), state, rows, ld_alpha=0.3)
    assert metrics["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert abs(metrics["displacement/chosen"]) < 1e-4
    assert metrics["logps/chosen"] == pytest.approx(ref[:, 0].mean(), rel=1e-5)


def test_it_compares_pairs_alone():
    """The weight of a ranking's tokens would depend on all its completions, and the key of a cached value covers two."""
    rankings = ranking_rows([(pair.prompt, [pair.chosen, pair.rejected, pair.chosen]) for pair in PAIRS], length=32)
    with pytest.raises(ValueError, match="compares lengths within a pair: leave it at 1 for rankings"):
        scored(MODEL.init(jax.random.key(0)), rankings, ld_alpha=0.5)


# WPO


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_the_weight_of_a_pair_is_how_likely_the_policy_writes_it(kind, state):
    pair = PAIRS[3]
    metrics = metrics_of(SHOWS["aligned_logps"], state, layout(kind).rows([pair], ref_logps=REF[:1]))
    for side in ("chosen", "rejected"):
        completion = getattr(pair, side)
        text = np.concatenate([pair.prompt, completion])
        total = 0.0
        for place in range(len(pair.prompt), len(text)):
            embedded = np.asarray(state.params["params"]["embed"], np.float64)[text[:place]]
            logits = np.tanh(embedded.mean(axis=0)) @ np.asarray(state.params["params"]["head"], np.float64)
            chances = np.exp(logits) / np.exp(logits).sum()
            total += np.log(chances[text[place]]) - np.log((chances**2).sum())
        assert metrics[f"rewards/{side}"] == pytest.approx(total / len(completion), rel=1e-5)


def test_the_weights_carry_no_gradient(state):
    """A loss of its weight alone leaves the parameters where they are."""

    def loss(logps, ref_logps, *, aligned_logps):
        return aligned_logps.sum(axis=1), jnp.zeros_like(logps)

    assert metrics_of(loss, state, rows_of("shared"))["grad_norm"] == 0
