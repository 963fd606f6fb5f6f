"""Diffusion of a one-dimensional Gaussian, with exact denoiser, tilted optimum and optimum of the bound.

Data are N(mean, std^2), rewards `r(x) = linear * x + curved * x^2 / 2`, and a policy is the exact denoiser of another Gaussian.
DPO aims at the tilted optimum, proportional to `N(x; mean, std^2) exp(r(x) / beta)`, which is Gaussian as well. Diffusion-DPO
minimizes a bound (`bound_loss`), whose minimum (`bound_optimum`) is a different policy.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.diffusion.schedule import Schedule, Weighting
from dpo_jax.diffusion.step import ImagePairs, diffusion_dpo_step, pair_errors
from dpo_jax.losses import dpo_loss
from dpo_jax.step import init_state
from dpo_jax.types import Array, TrainState, Variables


class Normal(NamedTuple):
    """N(mean, std^2)."""

    mean: float
    std: float

    def variables(self) -> Variables:
        """The exact denoiser of this distribution, as variables of `denoise`: float32[] each."""
        return {"params": {"mean": jnp.float32(self.mean), "log_std": jnp.float32(math.log(self.std))}}


class Reward(NamedTuple):
    """r(x) = linear * x + curved * x^2 / 2."""

    linear: float
    curved: float = 0.0


def denoise(schedule: Schedule, variables: Variables, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
    """E[e | x_t] for data N(mean, std^2), linear in x_t [B, 1]: `noise (x - signal mean) / (signal^2 std^2 + noise^2)`."""
    del label
    signal, noise = (jnp.asarray(table, x.dtype)[t][:, None] for table in (schedule.signal, schedule.noise))
    slope, offset = _line(signal, noise, variables["params"]["mean"], variables["params"]["log_std"])
    return jnp.asarray(slope * x + offset)


def normal_of(variables: Variables) -> Normal:
    return Normal(float(variables["params"]["mean"]), math.exp(float(variables["params"]["log_std"])))


def tilted(data: Normal, reward: Reward, *, beta: float) -> Normal:
    """The optimum of reward under a KL constraint, proportional to p(x) exp(r(x) / beta) (eq. 4 of DPO).

    >>> tilted(Normal(0.0, 1.0), Reward(1.0), beta=2.0)
    Normal(mean=0.5, std=1.0)
    """
    precision = 1 / data.std**2 - reward.curved / beta
    if precision <= 0:
        raise ValueError("the tilted distribution has no variance: the reward grows faster than the data's density falls")
    return Normal((data.mean / data.std**2 + reward.linear / beta) / precision, precision**-0.5)


def sampled(schedule: Schedule, policy: Normal) -> Normal:
    """Exact distribution of DDPM samples from a policy's denoiser: the T steps are linear. Close to `policy` for large T."""
    signal, noise = schedule.signal, schedule.noise
    slope, offset = (np.asarray(part, np.float64) for part in _line(signal, noise, policy.mean, math.log(policy.std)))
    mean, variance = 0.0, 1.0
    for t in range(schedule.steps - 1, -1, -1):
        kept = math.sqrt(1 - schedule.beta[t])
        factor = (1 - schedule.beta[t] / noise[t] * slope[t]) / kept
        mean = factor * mean - schedule.beta[t] / noise[t] * offset[t] / kept
        variance = factor**2 * variance + schedule.variance[t]
    return Normal(float(mean), float(math.sqrt(variance)))


def bound_loss(
    params: jax.Array,
    data: Normal,
    reward: Reward,
    *,
    beta: float,
    schedule: Schedule,
    weighting: Weighting = "elbo",
    draws: int = 1,
    nodes: int = 24,
) -> jax.Array:
    """The expected loss of Diffusion-DPO at a policy `params` = (mean, log std), by Gauss-Hermite quadrature. float[].

    Pairs are two draws of the data with a Bradley-Terry label. `draws` is 1 or even, as in `dpo_jax.diffusion.step.draw`. 2 T
    draws cover all T times: then nothing is random, and the whole mean is inside the log-sigmoid.
    """
    if draws != 1 and draws % 2:
        raise ValueError(f"draws={draws}: 1 or an even number is expected, so that the noise cancels")
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    first, second = (data.mean + data.std * grid for grid in np.meshgrid(points, points, indexing="ij"))
    signal, noise = schedule.signal, schedule.noise
    slope, offset = _line(signal, noise, data.mean, math.log(data.std))
    own_slope, own_offset = _line(signal, noise, params[0], params[1])

    def apart(x: np.ndarray) -> jax.Array:  # squared error minus that of the reference, [T, noise, first, second]
        x_t = _wide(signal) * x[None, None] + _wide(noise) * points[None, :, None, None]
        e = jnp.asarray(points)[None, :, None, None]
        return jnp.square(_wide(own_slope) * x_t + _wide(own_offset) - e) - jnp.square(_wide(slope) * x_t + _wide(offset) - e)

    scale = _wide(schedule.steps * schedule.weights(weighting))
    margins = -beta * scale * (apart(first) - apart(second))
    if draws > 1:  # the mean over e and -e is free of e: the part even in e is the same for both images
        free = (margins * weights[None, :, None, None]).sum(axis=1)
        margins = jnp.tensordot(_spaced(schedule.steps, draws // 2), free, axes=1)[:, None]
    wins = jax.nn.sigmoid(jnp.asarray(_value(reward, first) - _value(reward, second)))[None, None]
    losses = -wins * jax.nn.log_sigmoid(margins) - (1 - wins) * jax.nn.log_sigmoid(-margins)
    over_pairs = (losses * (weights[:, None] * weights[None])[None, None]).sum(axis=(2, 3)).mean(axis=0)
    return over_pairs[0] if draws > 1 else (over_pairs * weights).sum()


def bound_optimum(
    data: Normal,
    reward: Reward,
    *,
    beta: float,
    schedule: Schedule,
    weighting: Weighting = "elbo",
    draws: int = 1,
    nodes: int = 24,
    iterations: int = 60,
) -> Normal:
    """The policy that minimizes `bound_loss`, by damped Newton steps in float64."""
    with jax.enable_x64(True):
        options = {"beta": beta, "schedule": schedule, "weighting": weighting, "draws": draws, "nodes": nodes}
        value = jax.jit(functools.partial(bound_loss, data=data, reward=reward, **options))
        gradient, curvature = jax.jit(jax.grad(value)), jax.jit(jax.hessian(value))
        params = np.array([data.mean, math.log(data.std)])
        for _ in range(iterations):
            slope, matrix = np.asarray(gradient(params)), np.asarray(curvature(params))
            values, vectors = np.linalg.eigh(matrix)
            move = -vectors @ ((vectors.T @ slope) / np.maximum(np.abs(values), 1e-8))
            size, now = min(1.0, 0.5 / float(np.abs(move).max() + 1e-30)), float(value(params))
            while size > 1e-6 and not float(value(params + size * move)) <= now:
                size /= 2
            params = params + size * move
            if np.abs(size * move).max() < 1e-9:
                break
    return Normal(float(params[0]), math.exp(float(params[1])))


def draw_pairs(data: Normal, reward: Reward, count: int, key: jax.Array) -> jax.Array:
    """Pairs of draws of the data, the one preferred by a Bradley-Terry label first: float32[count, 2, 1]."""
    values, luck = jax.random.split(key)
    x = data.mean + data.std * jax.random.normal(values, (count, 2))
    rewards = _value(reward, x)
    first = jax.random.uniform(luck, (count,)) < jax.nn.sigmoid(rewards[:, 0] - rewards[:, 1])
    return jnp.where(first[:, None], x, x[:, ::-1])[:, :, None]


def train_gaussian(
    data: Normal,
    reward: Reward,
    *,
    beta: float,
    schedule: Schedule,
    tx: optax.GradientTransformation,
    weighting: Weighting = "elbo",
    draws: int = 1,
    steps: int = 2000,
    batch: int = 1024,
    seed: int = 0,
) -> Normal:
    """Trains the data's own denoiser with `diffusion_dpo_step`, on fresh pairs in each step, and returns the final policy.

    `tx` should decay its learning rate to 0 and not clip: clipped gradients have a different mean, and so a different optimum.
    """
    predict = functools.partial(denoise, schedule)
    loss = functools.partial(dpo_loss, beta=beta)
    reference = data.variables()

    def step(state: TrainState, number: jax.Array) -> tuple[TrainState, None]:
        images = draw_pairs(data, reward, batch, jax.random.fold_in(jax.random.key(seed), number))
        zeros = jnp.zeros(batch, jnp.int32)
        pairs = ImagePairs(images, zeros, jnp.arange(batch), zeros + number, jnp.ones(batch))
        errors = pair_errors(reference, pairs, predict=predict, schedule=schedule, seed=seed, draws=draws)
        options = {"predict": predict, "schedule": schedule, "loss": loss, "seed": seed, "weighting": weighting}
        return diffusion_dpo_step(state, pairs.replace(ref_errors=errors), tx=tx, **options)[0], None

    walk = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps))[0])
    return normal_of(walk(init_state(reference, tx)).params)


def _value(reward: Reward, x: Any) -> Any:
    return reward.linear * x + reward.curved * x**2 / 2


def _line(signal: Array, noise: Array, mean: Array | float, log_std: Array | float) -> tuple[Array, Array]:
    """Slope and offset of the exact denoiser."""
    slope = noise / (signal**2 * jnp.exp(2 * log_std) + noise**2)
    return slope, -slope * signal * mean


def _spaced(steps: int, count: int) -> np.ndarray:
    """Matrix that averages over `count` equally spaced times, from each start: float64[steps, steps]."""
    means = np.zeros((steps, steps))
    for apart in np.arange(count) * steps // count:
        means[np.arange(steps), (np.arange(steps) + apart) % steps] += 1 / count
    return means


def _wide(values: Array) -> jax.Array:
    return jnp.asarray(values)[:, None, None, None]
