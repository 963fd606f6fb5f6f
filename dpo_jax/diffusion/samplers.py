"""DDPM and DDIM samplers with classifier-free guidance, and the KL between the paths of two models. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.schedule import Schedule
from dpo_jax.diffusion.step import Denoiser
from dpo_jax.types import Array, Variables

NoiseOf = Callable[[jax.Array, jax.Array], jax.Array]
"""(x_t [B, ...], t int32[]) -> predicted noise [B, ...]."""


def guided(predict: Denoiser, variables: Variables, label: Array, *, null: int = 0, guidance: float = 1.0) -> NoiseOf:
    """The denoiser at labels int32[B], with classifier-free guidance: `e(null) + guidance * (e(label) - e(null))`.

    `guidance` 1 is the conditional model alone, at half the cost (Ho and Salimans 2022, arXiv 2207.12598).
    """
    label = jnp.asarray(label)

    def noise_of(x: jax.Array, t: jax.Array) -> jax.Array:
        times = jnp.full(len(label), t, jnp.int32)
        if guidance == 1:
            return predict(variables, x, times, label)
        both = jnp.concatenate([label, jnp.full_like(label, null)])
        with_label, without = jnp.split(
            predict(variables, jnp.tile(x, (2, *(1 for _ in x.shape[1:]))), jnp.tile(times, 2), both), 2
        )
        return without + guidance * (with_label - without)

    return noise_of


def ddpm(noise_of: NoiseOf, schedule: Schedule, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Ancestral samples [B, ...] with all T steps (Ho et al. 2020, algorithm 2). `shape` is that of the samples.

    The last step also adds noise, of variance `schedule.variance[0]`, so that samples have a density.

    >>> schedule = cosine_schedule(100)
    >>> normal = lambda x, t: jnp.asarray(schedule.noise)[t] * x  # exact for data N(0, 1)
    >>> drawn = ddpm(normal, schedule, jax.random.key(0), (4000, 1))
    >>> print(f"{drawn.std():.1f}")
    1.0
    """
    return ddpm_path(noise_of, noise_of, schedule, key, shape, measure=False)[0]


def ddpm_path(
    noise_of: NoiseOf, reference: NoiseOf, schedule: Schedule, key: jax.Array, shape: tuple[int, ...], *, measure: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Samples [B, ...] of DDPM, and the path KL of each, float32[B], in nats. Its mean estimates the path KL to the reference.

    Both models have Gaussian transitions of the same variance, so along a path of the policy
    `KL = sum over t of |mean - mean_ref|^2 / (2 variance[t])`, exact given x_t. It is the KL between the joint distributions of
    x_0 to x_{T-1}, an upper bound of the KL between images.
    """
    tables = [jnp.asarray(table, jnp.float32) for table in (schedule.beta, schedule.noise, schedule.variance, schedule.elbo)]
    start, walk = jax.random.split(key)

    def step(state: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, kl = state
        beta, sigma, variance, weight = (table[t] for table in tables)
        found = noise_of(x, t)
        if measure:
            apart = jnp.square(found - reference(x, t)).reshape(shape[0], -1).sum(axis=1)
            kl = kl + weight * apart  # the means differ by beta / (sqrt(1 - beta) noise[t]) times the predictions' difference
        mean = (x - beta / sigma * found) / jnp.sqrt(1 - beta)
        return (mean + jnp.sqrt(variance) * jax.random.normal(jax.random.fold_in(walk, t), shape), kl), None

    first = (jax.random.normal(start, shape), jnp.zeros(shape[0]))
    return jax.lax.scan(step, first, jnp.arange(schedule.steps)[::-1])[0]


def ddim(
    noise_of: NoiseOf, schedule: Schedule, key: jax.Array, shape: tuple[int, ...], *, steps: int | None = None, eta: float = 0.0
) -> jax.Array:
    """DDIM samples [B, ...] in `steps` of the T steps, by default all (Song et al. 2020, arXiv 2010.02502, eq. 12).

    `eta` 0 is deterministic given the initial noise; `eta` 1 with all steps is DDPM without the noise of the last step.
    """
    steps = schedule.steps if steps is None else steps
    if not 1 <= steps <= schedule.steps:
        raise ValueError(f"steps must be between 1 and the {schedule.steps} of the schedule, got {steps}")
    times = np.unique(np.linspace(schedule.steps - 1, 0, steps).round().astype(np.int32))[::-1]
    signal, noise = schedule.signal[times], schedule.noise[times]
    to_signal, to_noise = np.append(signal[1:], 1.0), np.append(noise[1:], 0.0)
    fresh = eta * to_noise / noise * np.sqrt(np.maximum(0.0, 1 - (signal / to_signal) ** 2))
    along = np.sqrt(np.maximum(0.0, to_noise**2 - fresh**2))
    numbers = [jnp.asarray(values, jnp.float32) for values in (signal, noise, to_signal, along, fresh)]
    start, walk = jax.random.split(key)

    def step(x: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, signal, noise, to_signal, along, fresh = now
        found = noise_of(x, t)
        clean = (x - noise * found) / signal
        return to_signal * clean + along * found + fresh * jax.random.normal(jax.random.fold_in(walk, t), shape), None

    return jax.lax.scan(step, jax.random.normal(start, shape), (jnp.asarray(times), *numbers))[0]
