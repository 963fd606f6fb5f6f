"""Diffusion-DPO: the loss against the paper's formula, noise as a function of the pair, the reference's cache, samplers."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_jax.diffusion.gaussian
import dpo_jax.diffusion.samplers
import dpo_jax.diffusion.schedule
import dpo_jax.diffusion.step
from dpo_jax.diffusion.gaussian import Normal, Reward, bound_optimum, denoise, sampled, tilted, train_gaussian
from dpo_jax.diffusion.network import DitConfig, make_dit
from dpo_jax.diffusion.reference import DiffusionReferences, image_uids
from dpo_jax.diffusion.samplers import ddim, ddpm, ddpm_path, guided
from dpo_jax.diffusion.schedule import cosine_schedule, linear_schedule
from dpo_jax.diffusion.step import (
    ImagePairs,
    Images,
    diffusion_dpo_objective,
    diffusion_dpo_step,
    diffusion_sft_step,
    draw,
    drop_labels,
    pair_errors,
)
from dpo_jax.losses import dpo_loss, ipo_loss
from dpo_jax.reference import ForeignCache
from dpo_jax.runtime import parallel
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.optim import make_optimizer, make_schedule
from dpo_jax.step import init_state
from dpo_jax.training.run import train

SCHEDULE = cosine_schedule(20)


def predict(variables, x, t, label):
    scale = variables["scale"][label] + variables["slope"] * t.astype(x.dtype)
    return scale[:, None, None] * jnp.sin(x)


def variables_of(scale, dtype=np.float32):
    return {"scale": np.asarray(scale, dtype), "slope": np.asarray(0.01, dtype)}


POLICY, REFERENCE = variables_of([0.3, 0.6]), variables_of([0.5, 0.5])


def pairs_of(count, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    images, label = rng.normal(size=(count, 2, 3, 3)).astype(dtype), (np.arange(count) % 2).astype(np.int32)
    return ImagePairs(images, label, image_uids(images, label), np.arange(count, dtype=np.int32) % 3, np.ones(count, dtype))


@functools.partial(jax.jit, static_argnames="draws")
def errors(variables, pairs, *, draws=1):
    return pair_errors(variables, pairs, predict=predict, schedule=SCHEDULE, draws=draws)


drawn = jax.jit(draw, static_argnames=("shape", "steps", "draws", "seed"))


def with_errors(pairs, draws=1, variables=REFERENCE):
    return pairs.replace(ref_errors=errors(variables, pairs, draws=draws))


def published(pairs, weight, *, beta, draws):
    """Eq. 14 of Wallace et al., a pair after the other, in numpy; the mean over draws is inside."""
    noise, times = (np.asarray(part) for part in drawn(pairs.uid, pairs.epoch, shape=(3, 3), steps=20, draws=draws))

    def error(variables, x, e, t, label):
        x_t = SCHEDULE.signal[t] * x + SCHEDULE.noise[t] * np.float64(e)
        return np.sum((e - (variables["scale"][label] + variables["slope"] * t) * np.sin(x_t)) ** 2)

    losses = []
    for number in range(len(pairs.uid)):
        inside = 0.0
        for e, t in zip(noise[number], times[number], strict=True):
            chosen, rejected = (
                error(POLICY64, x, e, t, pairs.label[number]) - error(REFERENCE64, x, e, t, pairs.label[number])
                for x in pairs.images[number]
            )
            inside += 20 * weight[t] * (chosen - rejected) / draws
        losses.append(np.log1p(np.exp(beta * inside)))
    return np.array(losses)


POLICY64, REFERENCE64 = variables_of([0.3, 0.6], np.float64), variables_of([0.5, 0.5], np.float64)


@pytest.mark.parametrize(("weighting", "draws"), [("constant", 1), ("elbo", 3)])
def test_the_loss_is_the_papers_in_float64(weighting, draws):
    with jax.enable_x64(True):
        pairs = with_errors(pairs_of(6, dtype=np.float64), draws, REFERENCE64)
        options = {
            "predict": predict,
            "schedule": SCHEDULE,
            "weighting": weighting,
            "loss": functools.partial(dpo_loss, beta=0.02),
        }
        losses, metrics = jax.jit(functools.partial(diffusion_dpo_objective, **options))(POLICY64, pairs)
        weight = np.ones(20) if weighting == "constant" else SCHEDULE.elbo
        expected = published(pairs, weight, beta=0.02, draws=draws)
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
        np.testing.assert_allclose(metrics["rewards/margins"], -np.log(np.expm1(expected)), rtol=1e-9)

        @jax.jit
        @jax.value_and_grad
        def mean(scale):
            return diffusion_dpo_objective({**POLICY64, "scale": scale}, pairs, **options)[0].mean()

        there = POLICY64["scale"]
        slope = mean(there)[1]
        for number, direction in enumerate(np.eye(2)):
            by_hand = (mean(there + 1e-6 * direction)[0] - mean(there - 1e-6 * direction)[0]) / 2e-6
            np.testing.assert_allclose(slope[number], by_hand, rtol=1e-6)


def test_the_policy_starts_at_its_reference():
    pairs = with_errors(pairs_of(4))

    def taken(loss, pairs=pairs):
        options = {"predict": predict, "schedule": SCHEDULE, "tx": optax.sgd(0.0), "loss": loss}
        return jax.jit(functools.partial(diffusion_dpo_step, **options))(init_state(REFERENCE, optax.sgd(0.0)), pairs)[1]

    metrics = taken(functools.partial(dpo_loss, beta=1.0))
    np.testing.assert_allclose([metrics["loss"], metrics["rewards/accuracies"]], [np.log(2), 0.5], rtol=1e-5)
    np.testing.assert_allclose(taken(functools.partial(ipo_loss, beta=0.5))["loss"], 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="reads lengths"):
        taken(lambda logps, ref_logps, *, lengths: (lengths, lengths))
    with pytest.raises(ValueError, match="no errors of the reference"):
        taken(dpo_loss, pairs_of(4))


def test_noise_depends_on_seed_pair_and_epoch_alone():
    pairs = pairs_of(5)
    noise, times = drawn(pairs.uid, pairs.epoch, shape=(3, 3), steps=20, draws=2)
    other, _ = drawn(pairs.uid[::-1], pairs.epoch[::-1], shape=(3, 3), steps=20, draws=2)
    np.testing.assert_array_equal(other[::-1], noise)  # in another order
    for changed in ({"epoch": pairs.epoch + 1}, {"uid": pairs.uid + 1}, {"seed": 1}):
        again, _ = drawn(**{"uid": pairs.uid, "epoch": pairs.epoch, **changed}, shape=(3, 3), steps=20, draws=2)
        assert not np.isclose(again, noise).any()
    _, times = drawn(np.arange(4000), np.zeros(4000, np.int32), shape=(), steps=4)
    np.testing.assert_allclose(np.bincount(times[:, 0]) / 4000, 0.25, atol=0.03)
    many = np.arange(4000, dtype=np.int32)
    dropped = drop_labels(many * 0 + 1, many, many * 0, null=7, dropout=0.3)
    assert set(np.unique(dropped)) == {1, 7}
    np.testing.assert_allclose((dropped == 7).mean(), 0.3, atol=0.03)


def test_errors_of_the_reference_are_kept_and_never_stale(tmp_path):
    asked = []

    def compute(pairs):
        asked.append(int(np.sum(pairs.weight)))
        return errors(REFERENCE, pairs, draws=2)

    pairs, expected = pairs_of(5), with_errors(pairs_of(5), 2).ref_errors
    options = {"draws": 2, "batch": 4}
    references = DiffusionReferences(tmp_path, {"weights": "a"}, compute, **options)
    np.testing.assert_array_equal(references.of(pairs).ref_errors, expected)
    assert asked == [4, 1]
    again = DiffusionReferences(tmp_path, {"weights": "a"}, compute, **options)
    np.testing.assert_array_equal(again.of(pairs).ref_errors, expected)
    assert asked == [4, 1]
    again.of(pairs.replace(epoch=pairs.epoch + 9))  # other noise
    again.of(pairs.replace(images=pairs.images[:, ::-1]))  # the other image is preferred
    assert asked == [4, 1] * 3
    with pytest.raises(ForeignCache, match="weights: cached with 'a', now 'b'"):
        DiffusionReferences(tmp_path, {"weights": "b"}, compute, **options)
    (file,) = tmp_path.glob("logps-*.bin")
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    np.testing.assert_array_equal(
        DiffusionReferences(tmp_path, {"weights": "a"}, compute, **options).of(pairs).ref_errors, expected
    )
    assert asked[6:] == [1]
    assert DiffusionReferences(None, {}, compute, **options).of(pairs).ref_errors.shape == (5, 2, 2)


@pytest.mark.parametrize("way", ["pmap", "mesh"])
def test_devices_and_microbatches_change_nothing(way):
    loss, tx = functools.partial(dpo_loss, beta=0.05), optax.sgd(0.01)
    pairs = with_errors(pairs_of(8, seed=1))
    pairs = pairs.replace(weight=np.float32([1] * 7 + [0]))

    def taken(partitioner, microbatches):
        options = {"predict": predict, "schedule": SCHEDULE, "tx": tx, "loss": loss, "microbatches": microbatches}
        step = functools.partial(diffusion_dpo_step, axis_name=partitioner.axis_name, **options)
        state = partitioner.put_state(init_state(POLICY, tx))
        state, metrics = partitioner.compile_step(step)(state, jax.device_get(pairs))
        return partitioner.get_state(state).params["scale"], float(metrics["loss"])

    ways = {
        "pmap": lambda: parallel.pmap_partitioner(jax.devices()[:4]),
        "mesh": lambda: parallel.mesh_partitioner(make_mesh(data=4, devices=jax.devices()[:4])),
    }
    one, several = taken(parallel.single_device(), 1), taken(ways[way](), 2)
    np.testing.assert_allclose(several[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(several[1], one[1], rtol=1e-5)


def test_denoising_training_continues_with_the_same_bits(tmp_path):
    pairs, tx = pairs_of(8), optax.sgd(0.1, momentum=0.9)

    def batch(step):
        return Images(pairs.images[:, 0], pairs.label, pairs.uid, pairs.epoch + step, pairs.weight)

    def trained(folder, steps):
        step = functools.partial(diffusion_sft_step, predict=predict, schedule=SCHEDULE, tx=tx, null=0, dropout=0.2)
        partitioner = parallel.single_device()
        state = partitioner.put_state(init_state(POLICY, tx))
        state = train(partitioner.compile_step(step), state, batch, folder=folder, total_steps=steps, fingerprint={})
        return jax.device_get(state)

    trained(tmp_path / "cut", 3)
    jax.tree.map(np.testing.assert_array_equal, trained(tmp_path / "cut", 6), trained(tmp_path / "whole", 6))


@pytest.mark.parametrize("schedule", [cosine_schedule(30), linear_schedule(30)], ids=["cosine", "linear"])
def test_weights_of_the_bound_are_half_the_steps_of_snr(schedule):
    np.testing.assert_allclose(schedule.signal**2 + schedule.noise**2, 1)
    snr = (schedule.signal / schedule.noise) ** 2
    np.testing.assert_allclose(schedule.elbo[1:], (snr[:-1] / snr[1:] - 1) / 2, rtol=1e-9)  # Kingma et al. 2021, eq. 14


def gaussian_noise(schedule, normal):
    return lambda x, t: denoise(schedule, normal.variables(), x, jnp.full(len(x), t, jnp.int32), jnp.zeros(len(x), jnp.int32))


def test_samplers_of_a_gaussian():
    schedule, one, other = cosine_schedule(40), Normal(0.5, 0.8), Normal(0.9, 0.7)
    noise_of, key, shape = gaussian_noise(schedule, one), jax.random.key(0), (20000, 1)
    drawn = jax.jit(lambda key: ddpm(noise_of, schedule, key, shape))(key)
    known = sampled(schedule, one)
    np.testing.assert_allclose([drawn.mean(), drawn.std()], known, atol=0.02)
    same, kl = jax.jit(lambda key: ddpm_path(noise_of, gaussian_noise(schedule, other), schedule, key, shape))(key)
    np.testing.assert_allclose(same, drawn, atol=1e-5)  # two programs, rounded in their own ways
    ancestral = jax.jit(lambda key: ddim(noise_of, schedule, key, shape, eta=1.0))(key)
    last = jax.random.normal(jax.random.fold_in(jax.random.split(key)[1], 0), shape)
    np.testing.assert_allclose(drawn, ancestral + np.sqrt(schedule.variance[0]) * last, atol=1e-4)
    few = jax.jit(lambda key: ddim(noise_of, schedule, key, shape, steps=20))(key)
    np.testing.assert_allclose([few.mean(), few.std()], one, atol=0.06)
    exact = np.log(0.7 / 0.8) + (0.8**2 + 0.4**2) / (2 * 0.7**2) - 0.5  # KL of what both describe
    assert exact < kl.mean() < 1.25 * exact  # that of paths is above, and near for many steps
    with pytest.raises(ValueError, match="between 1 and the 40"):
        ddim(noise_of, schedule, key, shape, steps=41)


def test_guidance_mixes_two_predictions():
    label, x = np.int32([1, 1]), jnp.ones((2, 3, 3))
    found = {g: guided(predict, POLICY, label, null=0, guidance=g)(x, jnp.int32(3)) for g in (0.0, 1.0, 2.5)}
    np.testing.assert_allclose(found[0.0], predict(POLICY, x, np.int32([3, 3]), np.int32([0, 0])), rtol=1e-6)
    np.testing.assert_allclose(found[2.5], found[0.0] + 2.5 * (found[1.0] - found[0.0]), rtol=1e-5)


def test_the_network_starts_at_the_scaled_image_and_reads_labels():
    schedule, config = cosine_schedule(10), DitConfig(width=16, layers=1, heads=2)
    init, predict = make_dit(config, schedule)
    predict = jax.jit(predict)
    variables, x = jax.jit(init)(jax.random.key(0)), jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8)), jnp.float32)
    t, label = np.int32([0, 5, 9]), np.int32([1, 2, config.null])
    np.testing.assert_allclose(predict(variables, x, t, label), schedule.noise[t][:, None, None] * np.asarray(x), rtol=1e-5)
    rng = np.random.default_rng(1)
    filled = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32), variables)
    found = predict(filled, x, t, label)
    assert found.shape == x.shape
    assert not np.isclose(found[:2], predict(filled, x, t, np.int32([3, 3, 3]))[:2]).any(axis=(1, 2)).all()
    with pytest.raises(ValueError, match="patch=3"):
        DitConfig(patch=3)


def test_training_ends_at_the_optimum_of_its_bound():
    data, reward, schedule = Normal(0.5, 0.8), Reward(1.0, -0.8), cosine_schedule(40)
    options = {"beta": 1.0, "schedule": schedule}
    expected = bound_optimum(data, reward, nodes=10, iterations=20, **options)
    tx = make_optimizer(
        make_schedule("cosine", 0.04, warmup_steps=0, total_steps=500), name="adamw", max_grad_norm=None, b2=0.99
    )
    found = train_gaussian(data, reward, tx=tx, steps=500, batch=1024, **options)
    np.testing.assert_allclose([found.mean, found.std**2], [expected.mean, expected.std**2], rtol=0.02)
    aim = tilted(data, reward, beta=1.0)
    assert expected.std > 1.15 * aim.std  # the bound of one draw hardly moves the variance


def test_with_eight_draws_training_ends_within_two_percent_of_the_tilted_optimum():
    data, reward = Normal(0.5, 0.8), Reward(1.0, -0.8)
    rate = make_schedule("cosine", 0.02, warmup_steps=0, total_steps=1500)
    tx = make_optimizer(rate, name="adamw", max_grad_norm=None, b2=0.99)
    found = train_gaussian(data, reward, beta=1.0, schedule=cosine_schedule(500), tx=tx, draws=8, steps=1500, batch=1024)
    aim = tilted(data, reward, beta=1.0)
    np.testing.assert_allclose([found.mean, found.std**2], [aim.mean, aim.std**2], rtol=0.02)


def test_the_bound_of_many_draws_nears_the_tilted_optimum():
    data, reward = Normal(0.5, 0.8), Reward(1.0, -0.8)
    aim = tilted(data, reward, beta=1.0)
    for steps, draws, within in ((20, 40, 0.08), (120, 8, 0.015), (120, 240, 0.015)):
        found = bound_optimum(data, reward, beta=1.0, schedule=cosine_schedule(steps), draws=draws, nodes=10)
        np.testing.assert_allclose(found, aim, rtol=within)
    assert abs(found.std / aim.std - 1) > 1e-3  # 120 steps are no integral yet
    with pytest.raises(ValueError, match="no variance"):
        tilted(data, Reward(0.0, 2.0), beta=1.0)


def test_draws_of_a_pair_are_antithetic_in_noise_and_systematic_in_time():
    uid, epoch = np.arange(4000, dtype=np.int32), np.zeros(4000, np.int32)
    noise, times = (np.asarray(part) for part in drawn(uid, epoch, shape=(2,), steps=10, draws=5))
    np.testing.assert_array_equal(noise[:, :4:2], -noise[:, 1::2])
    np.testing.assert_array_equal((times - times[:, :1]) % 10, np.tile([0, 0, 3, 3, 6], (4000, 1)))
    for each in times.T:  # so the mean over draws has no bias
        np.testing.assert_allclose(np.bincount(each, minlength=10) / 4000, 0.1, atol=0.02)
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)


def test_draws_at_all_times_leave_nothing_to_chance():
    schedule, policy, data = cosine_schedule(12), Normal(0.9, 0.6), Normal(0.5, 0.8)
    images, zeros = np.random.default_rng(0).normal(0.5, 0.8, (6, 2, 1)).astype(np.float32), np.zeros(6, np.int32)
    pairs = ImagePairs(images, zeros, np.arange(6, dtype=np.int32), zeros, np.ones(6, np.float32))
    options = {"predict": functools.partial(denoise, schedule), "schedule": schedule}

    @functools.partial(jax.jit, static_argnames="draws")
    def margins(epoch, draws):
        given = pairs.replace(epoch=pairs.epoch + epoch)
        given = given.replace(ref_errors=pair_errors(data.variables(), given, draws=draws, **options))
        loss = functools.partial(dpo_loss, beta=1.0)
        found = diffusion_dpo_objective(policy.variables(), given, loss=loss, weighting="elbo", **options)
        return found[1]["rewards/margins"]

    np.testing.assert_allclose(margins(0, 24), margins(1, 24), atol=1e-4)
    assert not np.isclose(margins(0, 2), margins(1, 2), atol=1e-3).any()
    with pytest.raises(ValueError, match="1 or an even number"):
        bound_optimum(data, Reward(1.0), beta=1.0, schedule=schedule, draws=3)


MODULES = [getattr(dpo_jax.diffusion, name) for name in ("gaussian", "samplers", "schedule", "step")]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    from dpo_jax.diffusion.schedule import cosine_schedule

    names = {"np": np, "jnp": jnp, "optax": optax, "partial": functools.partial, "init_state": init_state}
    names |= {"jax": jax, "dpo_loss": dpo_loss, "image_uids": image_uids, "cosine_schedule": cosine_schedule}
    found = doctest.testmod(module, extraglobs=names)
    assert (found.failed, found.attempted > 0) == (0, True)
