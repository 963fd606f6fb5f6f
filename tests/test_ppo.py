"""PPO: its pieces against plain loops and known limits, and the whole against a world small enough to count."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tabular_model import CONTEXTS, NEW, WORDS, tabular_model

from dpo_jax.data.layout import Layout, completion_rows
from dpo_jax.logps import sequence_logps
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.ppo import (
    Rollout,
    ScoreStats,
    advantages,
    collect,
    completion_ids,
    gae,
    minibatches,
    next_kl_coef,
    normalize_scores,
    observe,
    penalized_rewards,
    policy_and_values,
    ppo_step,
    prompt_batch,
    token_mask,
    whiten,
)
from dpo_jax.reward_model import scalar, with_scalar_head
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.sampling import generate
from dpo_jax.step import init_state

SIZES = {"vocab_size": 32, "width": 32, "layers": 1, "heads": 4, "max_positions": 64, "eos_token_id": 0}
MODEL = with_scalar_head(make_model(decoder_config(hf_config("llama", **SIZES))))
EOS = 0
STOP = 12  # ends what the decoder samples here: a token that it likes
CLIPS = {"clip": 0.2, "value_clip": 0.3, "value_weight": 0.5}


# ---- a world that can be counted: two prompts, three words and EOS, at most two tokens

COMPLETIONS = [[EOS], *([a, b] for a, b in itertools.product(range(1, WORDS), range(WORDS)))]
REWARDS = np.random.default_rng(5).normal(0, 1, size=(2, len(COMPLETIONS)))
REWARD_OF = {(p + 1, tuple(y)): r for p, row in enumerate(REWARDS) for y, r in zip(COMPLETIONS, row, strict=True)}
ALL = completion_rows([(np.array([p]), np.array(y)) for p in (1, 2) for y in COMPLETIONS], length=1 + NEW)


TABULAR = with_scalar_head(tabular_model())
LOGPS = jax.jit(functools.partial(sequence_logps, TABULAR))


def distribution(variables):
    """log pi(y|x) of every completion of both prompts: float64[2, 13]."""
    return np.asarray(LOGPS(variables, ALL), np.float64).reshape(2, -1)


@pytest.fixture(scope="module")
def table():
    variables = TABULAR.init(jax.random.key(3))
    return {**variables, "head": {**variables["head"], "kernel": jax.random.normal(jax.random.key(4), (CONTEXTS,))}}


@pytest.fixture(scope="module")
def variables():
    return spread(jax.jit(MODEL.init)(jax.random.key(0)))


def spread(variables):
    """Predictions and values far from uniform: initial weights are small."""
    kernel = jax.random.normal(jax.random.key(1), variables["head"]["kernel"].shape)
    head = {"kernel": 0.05 * kernel, "bias": jnp.float32(0.3)}
    return {"params": jax.tree.map(lambda x: 4 * x, variables["params"]), "head": head}


# ---- the pieces, in float64 where they are compared with plain loops

LENGTHS = np.array([4, 1, 3, 5])
MASK = (np.arange(5) < LENGTHS[:, None]).astype(np.float64)


def random_arrays(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *MASK.shape))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_advantages_are_those_of_a_plain_loop(gamma, lam):
    rewards, values = random_arrays(2)
    expected = np.zeros_like(values)
    for row, length in enumerate(LENGTHS):
        later = 0.0
        for t in reversed(range(length)):
            following = values[row, t + 1] if t + 1 < length else 0.0
            later = rewards[row, t] + gamma * following - values[row, t] + gamma * lam * later
            expected[row, t] = later
    with jax.enable_x64(True):
        found, returns = gae(rewards, values, MASK, gamma=gamma, lam=lam)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(returns, (expected + values) * MASK, rtol=1e-12)


def test_limits_of_the_advantages():
    rewards, values = random_arrays(2)
    with jax.enable_x64(True):
        monte_carlo, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
        difference, _ = gae(rewards, values, MASK, gamma=0.9, lam=0.0)
    to_come = np.cumsum((rewards * MASK)[:, ::-1], axis=1)[:, ::-1] * MASK
    np.testing.assert_allclose(returns, to_come, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(monte_carlo, (to_come - values) * MASK, rtol=1e-10, atol=1e-12)
    following = np.pad((values * MASK)[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(difference, (rewards + 0.9 * following - values) * MASK, rtol=1e-12)


def test_the_score_comes_last_and_every_token_pays_for_its_kl():
    logps, ref_logps = random_arrays(2)
    scores = np.array([1.0, -2.0, 3.0, 0.5])
    with jax.enable_x64(True):
        rewards = np.asarray(penalized_rewards(scores, logps, ref_logps, MASK, kl_coef=0.7))
    price = -0.7 * (logps - ref_logps) * MASK
    np.testing.assert_allclose(rewards.sum(axis=1), scores + price.sum(axis=1), rtol=1e-12)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(rewards[row, : length - 1], price[row, : length - 1], rtol=1e-12)
        np.testing.assert_array_equal(rewards[row, length:], 0)


def test_whitening():
    (x,) = random_arrays(1)
    with jax.enable_x64(True):
        white = np.asarray(whiten(7 + 3 * x, MASK))
        np.testing.assert_allclose(whiten(np.where(MASK == 0, 1e6, 7 + 3 * x), MASK), white, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(whiten(np.ones_like(x), MASK), 0, atol=1e-9)
    inside = white[MASK > 0]
    assert inside.mean() == pytest.approx(0, abs=1e-12)
    assert inside.std() == pytest.approx(1, rel=1e-6)
    np.testing.assert_array_equal(white[MASK == 0], 0)
    np.testing.assert_allclose(np.corrcoef(inside, x[MASK > 0])[0, 1], 1, rtol=1e-12)


def test_the_adaptive_coefficient():
    move = functools.partial(next_kl_coef, target=6.0, horizon=1000, samples=100)
    assert move(0.5, kl=6.0) == 0.5
    assert move(0.5, kl=6.6) == pytest.approx(0.5 * (1 + 0.1 * 0.1))
    assert move(0.5, kl=5.4) == pytest.approx(0.5 * (1 - 0.1 * 0.1))
    assert move(0.5, kl=600.0) == move(0.5, kl=7.3) == pytest.approx(0.5 * 1.02)  # an error counts a fifth at most
    assert move(0.5, kl=-1.0) == move(0.5, kl=4.7) == pytest.approx(0.5 * 0.98)
    with pytest.raises(ValueError, match=r"horizon=10 more than 0.2 x samples=100"):
        next_kl_coef(0.5, kl=1.0, target=6.0, horizon=10, samples=100)
    with pytest.raises(ValueError, match="target=0 must be positive"):
        next_kl_coef(0.5, kl=1.0, target=0, horizon=1000, samples=100)


def test_score_statistics_are_those_of_all_scores():
    scores = np.random.default_rng(0).normal(50, 3, size=40)
    stats = ScoreStats()
    for part in np.split(scores, [1, 5, 30]):
        stats = observe(stats, part)
    np.testing.assert_allclose(normalize_scores(stats, scores), (scores - scores.mean()) / scores.std(), rtol=1e-10)
    np.testing.assert_array_equal(normalize_scores(observe(ScoreStats(), [2.0, 2.0]), [2.0]), 0)


# ---- collecting

PROMPTS = [[5], [7, 8, 9], [1, 2], [30, 3, 11, 4], [6, 6], [9], [12, 2, 2], [17]]


@pytest.fixture(scope="module")
def collected(variables):
    reference = jax.tree.map(lambda x: 0.9 * x, variables)
    prompts = prompt_batch(PROMPTS, jax.random.key(2), length=4)
    draw = functools.partial(collect, MODEL, max_new_tokens=6, eos_id=STOP)
    return jax.device_get(jax.jit(draw)((variables, reference), prompts))


def test_what_is_collected_is_what_the_sampler_drew(variables, collected):
    """The same completions, laid out on the host, have the log-probabilities of the sampler and of both models."""
    prompts = prompt_batch(PROMPTS, jax.random.key(2), length=4)
    draw = functools.partial(generate, MODEL, max_new_tokens=6, eos_id=STOP)
    samples = jax.jit(draw)(variables, prompts.tokens, prompts.lengths, jax.random.split(jax.random.key(2), 8))
    completions = completion_ids(collected.rows)
    for row, ids in enumerate(completions):
        np.testing.assert_array_equal(ids, samples.tokens[row, : samples.lengths[row]])
    assert {len(ids) for ids in completions} > {6}  # some end early
    mask = token_mask(collected.rows)
    np.testing.assert_array_equal(mask.sum(axis=1), samples.lengths)
    np.testing.assert_allclose((collected.logps * mask).sum(axis=1), samples.logps, rtol=1e-4, atol=1e-4)
    on_host = completion_rows([(np.array(p), ids) for p, ids in zip(PROMPTS, completions, strict=True)], length=10)
    logps = jax.jit(functools.partial(sequence_logps, MODEL))
    np.testing.assert_allclose(logps(variables, on_host), samples.logps, rtol=1e-4, atol=1e-4)
    reference = jax.tree.map(lambda x: 0.9 * x, variables)
    np.testing.assert_allclose((collected.ref_logps * mask).sum(axis=1), logps(reference, on_host), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [32, 1000])
def test_values_and_entropy_are_those_of_the_dense_head(chunk, variables, collected):
    score = jax.jit(functools.partial(policy_and_values, MODEL, chunk=chunk))
    logps, values, entropy = score(variables, collected.rows)
    hidden = jax.jit(MODEL.forward)(variables, collected.rows)[:, 3:-1]  # of the last prompt token and all but the last new one
    all_logps = np.asarray(jax.nn.log_softmax(MODEL.unembed(variables, hidden)), np.float64)
    picked = np.take_along_axis(all_logps, np.asarray(collected.rows.target)[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(logps, picked, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(values, scalar(variables, hidden), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(all_logps) * all_logps).sum(axis=-1), rtol=1e-5, atol=1e-5)
    assert np.ptp(entropy) > 0.1


def test_the_chunked_head_has_the_gradient_of_the_dense_one(table):
    def total(variables, chunk):
        logps, values, _ = policy_and_values(TABULAR, variables, ALL, chunk=chunk)
        return (logps * jnp.cos(logps) + values).sum()

    grad = jax.jit(jax.grad(total), static_argnums=1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grad(table, 60), grad(table, 1000))


@pytest.mark.parametrize("way", ["pmap", "mesh"])
def test_collecting_does_not_depend_on_devices(way, table):
    reference, prompts = TABULAR.init(jax.random.key(7)), prompt_batch([[1], [2]] * 6, jax.random.key(2), length=1)

    def by(partitioner):
        compiled = partitioner.compile_map(functools.partial(collect, TABULAR, max_new_tokens=NEW, eos_id=EOS))
        return compiled((partitioner.put_variables(table), partitioner.put_variables(reference)), prompts)

    partitioner = pmap_partitioner() if way == "pmap" else mesh_partitioner(make_mesh(data=4), TABULAR)
    found, expected = by(partitioner), by(single_device())
    np.testing.assert_array_equal(found.rows.tokens, expected.rows.tokens)
    assert len({tuple(ids) for ids in completion_ids(expected.rows)}) > 4
    for name in ("logps", "ref_logps", "values", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_prompts_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="prompt 1 has 5 tokens, but there is room for 4"):
        prompt_batch([[1], [1, 2, 3, 4, 5]], jax.random.key(0), length=4)


# ---- the step


@pytest.fixture(scope="module")
def rollout(table):
    """Every completion and two padding examples, from a policy that was another one: ratios on both sides of the clip."""
    texts = [(np.array([p]), np.array(y)) for p in (1, 2) for y in COMPLETIONS]
    rows = Layout("plain", length=1 + NEW, scored=1 + NEW, rows_multiple=4).rows(texts)
    assert rows.weight.tolist() == [1] * 26 + [0] * 2
    logps, values, _ = policy_and_values(TABULAR, table, rows)
    noise = np.random.default_rng(0).normal(0, 0.4, size=(4, *logps.shape)).astype(np.float32)
    return jax.device_get(Rollout(rows, logps + noise[0], values + noise[1], noise[2], values + noise[3]))


TX = make_optimizer(1e-3, max_grad_norm=1.0)
STEP = functools.partial(ppo_step, model=TABULAR, tx=TX)


@pytest.fixture(scope="module")
def expected(table, rollout):
    return jax.jit(functools.partial(STEP, **CLIPS))(init_state(table, TX), rollout)


def test_metrics_are_means_over_the_tokens_of_the_batch(table, rollout, expected):
    """Against numpy, token by token."""
    state, metrics = expected
    inside = np.asarray(rollout.weight) > 0
    assert 0 < inside.sum() < inside[:26].size
    now = [np.asarray(x, np.float64)[inside] for x in policy_and_values(TABULAR, table, rollout.rows)]
    then = [np.asarray(x, np.float64)[inside] for x in (rollout.logps, rollout.values, rollout.advantages, rollout.returns)]
    (logps, values, entropy), (old_logps, old_values, gains, returns) = now, then
    ratio = np.exp(logps - old_logps)
    surrogate = np.minimum(ratio * gains, np.clip(ratio, 0.8, 1.2) * gains)
    near = old_values + np.clip(values - old_values, -0.3, 0.3)
    value_loss = 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)
    clipped = np.where(gains > 0, ratio > 1.2, ratio < 0.8)
    by_hand = {
        "loss": 0.5 * value_loss.mean() - surrogate.mean(),
        "policy_loss": -surrogate.mean(),
        "value_loss": value_loss.mean(),
        "ratio": ratio.mean(),
        "clip_share": clipped.mean(),
        "value_clip_share": ((near - returns) ** 2 > (values - returns) ** 2).mean(),
        "approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "entropy": entropy.mean(),
        "returns": returns.mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
    }
    assert metrics.keys() == by_hand.keys() | {"grad_norm"}
    for name, value in by_hand.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert 0.1 < float(metrics["clip_share"]) < 0.9
    assert 0.05 < float(metrics["value_clip_share"]) < 0.9
    assert int(state.step) == 1


@pytest.mark.parametrize("way", ["microbatches", "pmap", "mesh"])
def test_however_it_is_run_it_is_one_step(way, table, rollout, expected):
    make = {
        "microbatches": single_device,
        "pmap": pmap_partitioner,
        "mesh": lambda: mesh_partitioner(make_mesh(data=4), TABULAR),
    }
    partitioner = make[way]()
    state = partitioner.init_state(functools.partial(init_state, tx=TX), partitioner.put_variables(table))
    split = 4 if way == "microbatches" else 1
    step = functools.partial(STEP, **CLIPS, axis_name=partitioner.axis_name, microbatches=split)
    state, metrics = partitioner.compile_step(step)(state, rollout)
    assert metrics.keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    params = jax.device_get(partitioner.get_state(state)).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-5), params, expected[0].params)


@pytest.mark.parametrize("option", [{"clip": 0.05}, {"value_clip": math.inf}, {"value_weight": 0.1}], ids=str)
def test_every_option_of_the_step_changes_it(option, table, rollout, expected):
    metrics = jax.jit(functools.partial(STEP, **CLIPS | option))(init_state(table, TX), rollout)[1]
    assert abs(float(metrics["loss"]) - float(expected[1]["loss"])) > 1e-3


def test_padding_of_any_size_changes_nothing(table, rollout, expected):
    """A ratio at a position that is not scored may be infinite; times weight 0 that would be NaN."""
    inside = np.asarray(rollout.weight) > 0
    odd = dataclasses.replace(rollout, logps=np.where(inside, rollout.logps, np.float32(-1e4)))
    state, metrics = jax.jit(functools.partial(STEP, **CLIPS))(init_state(table, TX), odd)
    jax.tree.map(np.testing.assert_array_equal, (state.params, metrics), (expected[0].params, expected[1]))


def test_an_epoch_visits_every_row_once(rollout):
    def visited(**options):
        parts = minibatches(rollout, size=14, rng=np.random.default_rng(3), **options)
        return np.concatenate([part.rows.index for part in parts]).tolist()

    assert sorted(visited()) == sorted(rollout.rows.index.tolist())
    assert visited() != rollout.rows.index.tolist()
    halves = [np.reshape(visited(part=(index, 2)), (2, 7)) for index in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1).reshape(-1), visited())
    with pytest.raises(ValueError, match="28 rows cannot be split into minibatches of 3 rows for 1 hosts"):
        next(minibatches(rollout, size=3, rng=np.random.default_rng(0)))


def train(*, iterations, kl_coef, target=None, seed=0):
    """PPO as a program would run it: (final variables, reference variables, the last coefficient, health of each iteration)."""
    reference = TABULAR.init(jax.random.key(7))
    steps = 4 * iterations
    tx = make_optimizer(lambda step: 0.05 * (1 - step / steps), name="adamw", max_grad_norm=1.0)
    state = init_state(reference, tx)
    collecting = jax.jit(functools.partial(collect, TABULAR, max_new_tokens=NEW, eos_id=EOS))
    weighing = jax.jit(functools.partial(advantages, gamma=1.0, lam=0.95))
    step = jax.jit(functools.partial(ppo_step, model=TABULAR, tx=tx, clip=0.2, value_clip=math.inf, value_weight=0.5))
    rng, prompts, log = np.random.default_rng(seed), [[1], [2]] * 256, []
    for number in range(iterations):
        batch = prompt_batch(prompts, jax.random.fold_in(jax.random.key(seed), number), length=1)
        collected = jax.device_get(collecting((state.variables, reference), batch))
        texts = zip(prompts, completion_ids(collected.rows), strict=True)
        scores = np.array([REWARD_OF[p[0], tuple(ids.tolist())] for p, ids in texts])
        rollout, health = weighing(collected, scores, kl_coef=kl_coef)
        for part in itertools.chain(*(minibatches(rollout, size=256, rng=rng) for _ in range(2))):
            state, metrics = step(state, part)
        log.append({name: float(value) for name, value in {**health, **metrics}.items()})
        if target is not None:
            kl_coef = next_kl_coef(kl_coef, kl=log[-1]["kl"], target=target, horizon=1000, samples=len(prompts))
    return state.variables, reference, kl_coef, log


def test_the_world_is_complete():
    np.testing.assert_allclose(np.exp(distribution(TABULAR.init(jax.random.key(7)))).sum(axis=1), 1, rtol=1e-5)


def test_ppo_finds_the_optimum_of_eq_4():
    """pi* = pi_ref exp(r / beta) / Z, and `E[r] - beta KL` is at most `beta log Z`."""
    beta = 0.5
    variables, reference, _, log = train(iterations=60, kl_coef=beta)
    logp, ref_logp = distribution(variables), distribution(reference)
    unnormalized = ref_logp + REWARDS / beta
    log_z = np.log(np.exp(unnormalized).sum(axis=1))
    start = (np.exp(ref_logp) * REWARDS).sum(axis=1)
    objective = (np.exp(logp) * (REWARDS - beta * (logp - ref_logp))).sum(axis=1)
    assert ((beta * log_z - start) > 0.3).all()  # there is something to gain
    share = (objective - start) / (beta * log_z - start)
    assert (share > 0.999).all(), share
    assert (share <= 1 + 1e-6).all()
    total_variation = 0.5 * np.abs(np.exp(logp) - np.exp(unnormalized - log_z[:, None])).sum(axis=1)
    assert (total_variation < 0.01).all(), total_variation
    # The estimates of the last rollout are those of the final policy, up to 512 samples.
    assert log[-1]["penalized_score"] == pytest.approx(objective.mean(), abs=0.1)
    assert log[-1]["kl"] == pytest.approx((np.exp(logp) * (logp - ref_logp)).sum(axis=1).mean(), abs=0.1)
    assert log[-1]["score"] - beta * log[-1]["kl"] == pytest.approx(log[-1]["penalized_score"], abs=1e-5)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_adaptive_coefficient_holds_the_kl_at_its_target():
    variables, reference, kl_coef, _ = train(iterations=60, kl_coef=0.5, target=0.25)
    logp, ref_logp = distribution(variables), distribution(reference)
    kl = (np.exp(logp) * (logp - ref_logp)).sum(axis=1).mean()
    assert kl == pytest.approx(0.25, abs=0.06)
    assert kl_coef > 0.6  # at 0.5 the KL would be higher


def test_the_first_step_is_reinforce():
    """Old policy = policy: every ratio is 1, nothing is clipped, and the gradient is the mean of -advantage grad log pi."""
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), TABULAR.init(jax.random.key(3)))
        rows = ALL.replace(weight=np.linspace(0, 1, len(ALL.weight)).round())
        logps, values, _ = jax.jit(functools.partial(policy_and_values, TABULAR))(variables, rows)
        gains, returns = np.random.default_rng(0).normal(size=(2, *logps.shape))
        rollout = Rollout(rows, logps, values, gains, returns)
        step = functools.partial(ppo_step, model=TABULAR, tx=optax.sgd(1.0), clip=0.2, value_clip=0.2, value_weight=0.0)
        after, metrics = jax.jit(step)(init_state(variables, optax.sgd(1.0)), rollout)
        share = rollout.weight / rollout.weight.sum()

        def reinforce(variables):
            return -(policy_and_values(TABULAR, variables, rows)[0] * gains * share).sum()

        moved = jax.tree.map(jnp.subtract, variables, after.params)
        expected = jax.jit(jax.grad(reinforce))(variables)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-13), moved, expected)
        assert float(metrics["grad_norm"]) > 0.01
    assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-12)
    assert float(metrics["clip_share"]) == float(metrics["value_clip_share"]) == 0
    assert float(metrics["approx_kl"]) == pytest.approx(0, abs=1e-12)
