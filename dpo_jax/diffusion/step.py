"""Training steps of Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908), and of the denoising training before it.

A denoiser is any function `predict(variables, x_t[B, ...], t int32[B], label int32[B]) -> noise[B, ...]`. Images may be arrays
of any shape: [8, 8], [H, W, C], latents, or a single number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.diffusion.schedule import Schedule, Weighting
from dpo_jax.losses import PreferenceLoss, pair_accuracy, required_inputs
from dpo_jax.step import train_step
from dpo_jax.types import Array, Metrics, TrainState, Variables

Denoiser = Callable[[Variables, jax.Array, jax.Array, jax.Array], jax.Array]
"""(variables, x_t [B, ...], t int32[B], label int32[B]) -> predicted noise [B, ...]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """A batch for `diffusion_sft_step`.

    images  float32[E, ...]
    label   int32[E]         class, or other condition
    uid     int32[E]         determines the noise, together with `epoch` (`image_uids`)
    epoch   int32[E]
    weight  float32[E]       1, or 0 for padding
    """

    images: Array
    label: Array
    uid: Array
    epoch: Array
    weight: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImagePairs:
    """A batch for `diffusion_dpo_step`. Both images of a pair share a label, and get the same noise and time.

    images      float32[P, 2, ...]  chosen first
    label       int32[P]
    uid         int32[P]            determines noise and time, together with `epoch` (`image_uids`)
    epoch       int32[P]
    weight      float32[P]          1, or 0 for padding
    ref_errors  float32[P, 2, K]    squared errors of the reference (`pair_errors`) at K draws of noise and time; or None
    """

    images: Array
    label: Array
    uid: Array
    epoch: Array
    weight: Array
    ref_errors: Array | None = None

    def replace(self, **changes: Any) -> ImagePairs:
        return dataclasses.replace(self, **changes)


def diffusion_dpo_step(
    state: TrainState,
    pairs: ImagePairs,
    *,
    predict: Denoiser,
    schedule: Schedule,
    tx: optax.GradientTransformation,
    loss: PreferenceLoss,
    seed: int = 0,
    weighting: Weighting = "constant",
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of Diffusion-DPO (eq. 14), for instance with `loss=partial(dpo_loss, beta=0.01)`. Pure: jit or map it.

        -log sigmoid(-beta T w(t) [(|e - e_w|^2 - |e - e_w,ref|^2) - (|e - e_l|^2 - |e - e_l,ref|^2)])

    e is the noise; e_w and e_l are the policy's predictions of it from the noisy chosen and rejected image, at one time t,
    uniform over the T steps. Squares are summed over the image. The reference's weights are not needed: its errors come with
    the batch. `dpo_loss` can be replaced by any loss of `dpo_jax.losses` that needs only the policy's and the reference's
    log-probability of each image: it gets `-T w(t) |e - e_theta|^2` as log-probability. With `weighting="elbo"` that is an
    unbiased estimate of the ELBO in nats. K draws are averaged before the loss: the paper has K = 1; more make its bound
    tighter (dpo_jax/diffusion/README.md).

    >>> schedule = cosine_schedule(20)
    >>> predict = lambda variables, x, t, label: variables["scale"] * x
    >>> images, label = np.ones((4, 2, 8, 8), np.float32), np.zeros(4, np.int32)
    >>> pairs = ImagePairs(images, label, image_uids(images, label), np.zeros(4, np.int32), np.ones(4, np.float32))
    >>> given = {"predict": predict, "schedule": schedule}
    >>> pairs = pairs.replace(ref_errors=jax.jit(partial(pair_errors, **given))({"scale": jnp.float32(0.5)}, pairs))
    >>> state = init_state({"scale": jnp.float32(0.5)}, optax.sgd(1.0))
    >>> loss = partial(dpo_loss, beta=0.01)
    >>> after, metrics = jax.jit(partial(diffusion_dpo_step, tx=optax.sgd(1.0), loss=loss, **given))(state, pairs)
    >>> print(f"{metrics['loss']:.4f}")  # the policy still is its reference
    0.6931
    """
    objective = functools.partial(
        diffusion_dpo_objective, predict=predict, schedule=schedule, loss=loss, seed=seed, weighting=weighting
    )
    return train_step(state, pairs, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)


def diffusion_dpo_objective(
    variables: Variables,
    pairs: ImagePairs,
    *,
    predict: Denoiser,
    schedule: Schedule,
    loss: PreferenceLoss,
    seed: int = 0,
    weighting: Weighting = "constant",
) -> tuple[jax.Array, Metrics]:
    """Losses of the pairs, float32[P], and metrics of each; `diffusion_dpo_step` takes their mean and its gradient."""
    if pairs.ref_errors is None:
        raise ValueError("the batch carries no errors of the reference: pair_errors computes them, with the same seed")
    if names := sorted(required_inputs(loss)):
        raise ValueError(f"this loss reads {', '.join(names)}, which images do not have: use one such as dpo, ipo or hinge")
    draws = pairs.ref_errors.shape[2]
    noise, times = draw(pairs.uid, pairs.epoch, shape=pairs.images.shape[2:], steps=schedule.steps, draws=draws, seed=seed)
    errors = _errors(variables, pairs.images, pairs.label, noise, times, predict=predict, schedule=schedule)
    scale = jnp.asarray(schedule.steps * schedule.weights(weighting), errors.dtype)[times][:, None, :]
    logps, ref_logps = (-(scale * found).mean(axis=2) for found in (errors, jnp.asarray(pairs.ref_errors)))
    losses, rewards = loss(logps, ref_logps)
    apart = (errors - pairs.ref_errors).mean(axis=2)
    return losses, {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "rewards/accuracies": pair_accuracy(rewards, logps, ref_logps),
        "errors/chosen": errors[:, 0].mean(axis=1),
        "errors/rejected": errors[:, 1].mean(axis=1),
        "errors/chosen_over_reference": apart[:, 0],  # both may rise, as both log-probabilities may fall in DPO
        "errors/rejected_over_reference": apart[:, 1],
    }


def pair_errors(
    variables: Variables,
    pairs: ImagePairs,
    *,
    predict: Denoiser,
    schedule: Schedule,
    seed: int = 0,
    draws: int = 1,
) -> jax.Array:
    """|e - e_theta(x_t, t)|^2, summed over the image, for both images of each pair at `draws` draws: float32[P, 2, draws].

    With the reference's variables this is the reference pass; `DiffusionReferences` keeps its results. No gradient.
    """
    noise, times = draw(pairs.uid, pairs.epoch, shape=pairs.images.shape[2:], steps=schedule.steps, draws=draws, seed=seed)
    return jax.lax.stop_gradient(
        _errors(variables, pairs.images, pairs.label, noise, times, predict=predict, schedule=schedule)
    )


def diffusion_sft_step(
    state: TrainState,
    batch: Images,
    *,
    predict: Denoiser,
    schedule: Schedule,
    tx: optax.GradientTransformation,
    seed: int = 0,
    null: int = 0,
    dropout: float = 0.0,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of denoising training on the mean squared noise error at a random time (Ho et al. 2020, eq. 14). Pure.

    It trains the reference; on chosen images it is Preferred-FT. For classifier-free guidance (Ho and Salimans 2022, arXiv
    2207.12598) a share `dropout` of the labels is replaced by `null`. The loss is a mean over the elements of an image.
    """

    def objective(variables: Variables, batch: Images) -> tuple[jax.Array, Metrics]:
        shape = batch.images.shape[1:]
        noise, times = draw(batch.uid, batch.epoch, shape=shape, steps=schedule.steps, seed=seed)
        label = drop_labels(batch.label, batch.uid, batch.epoch, null=null, dropout=dropout, seed=seed)
        errors = _errors(variables, batch.images[:, None], label, noise, times, predict=predict, schedule=schedule)
        return errors[:, 0, 0] / max(1, batch.images[0].size), {}

    return train_step(state, batch, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)


def draw(
    uid: Array, epoch: Array, *, shape: tuple[int, ...], steps: int, draws: int = 1, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Noise float32[P, draws, *shape] and times int32[P, draws]: a pure function of (seed, uid, epoch) only.

    The reference's errors can therefore be computed once, in any order and batch, and kept. Several draws of a pair are
    antithetic in noise (e and -e at one time) and systematic in time (a random start, then equal spacing around the T steps).
    Each single draw is normal and uniform, so their mean has the expectation of independent draws, with less variance.
    """
    own = -(-draws // 2)  # number of times, each with its own noise
    apart = (np.arange(own) * steps // own).astype(np.int32)

    def one(uid: jax.Array, epoch: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise, times, _ = jax.random.split(_key(seed, uid, epoch), 3)
        values = jax.random.normal(noise, (own, *shape), jnp.float32)
        both = jnp.stack([values, -values], axis=1).reshape(2 * own, *shape)
        start = jax.random.randint(times, (1,), 0, steps, jnp.int32)
        return both[:draws], jnp.repeat((start + apart) % steps, 2)[:draws]

    return jax.vmap(one)(jnp.asarray(uid), jnp.asarray(epoch))


def drop_labels(label: Array, uid: Array, epoch: Array, *, null: int, dropout: float, seed: int = 0) -> jax.Array:
    """Labels with a share `dropout` replaced by `null`: int32[E], a pure function of (seed, uid, epoch)."""
    if dropout == 0:
        return jnp.asarray(label)
    chance = jax.vmap(lambda uid, epoch: jax.random.uniform(jax.random.split(_key(seed, uid, epoch), 3)[2]))
    return jnp.where(chance(jnp.asarray(uid), jnp.asarray(epoch)) < dropout, null, label)


def _key(seed: int, uid: jax.Array, epoch: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), uid), epoch)


def _errors(
    variables: Variables,
    images: Array,
    label: Array,
    noise: jax.Array,
    times: jax.Array,
    *,
    predict: Denoiser,
    schedule: Schedule,
) -> jax.Array:
    """Squared noise errors [P, N, K] for `images` [P, N, ...] at noise [P, K, ...] and times [P, K]."""
    images = jnp.asarray(images)
    shape = (images.shape[0], images.shape[1], times.shape[1])
    tail = images.shape[2:]
    noise = jnp.broadcast_to(noise.astype(images.dtype)[:, None], (*shape, *tail))
    each = jnp.broadcast_to(times[:, None], shape)
    levels = (jnp.asarray(table, images.dtype)[each] for table in (schedule.signal, schedule.noise))
    signal, sigma = (level.reshape(*shape, *(1 for _ in tail)) for level in levels)
    noisy = (signal * images[:, :, None] + sigma * noise).reshape(-1, *tail)
    labels = jnp.broadcast_to(jnp.asarray(label)[:, None, None], shape).reshape(-1)
    found = predict(variables, noisy, each.reshape(-1), labels).reshape(noise.shape)
    return jnp.square(found - noise).reshape(*shape, -1).sum(axis=-1)
