"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290): the training step. Start reading here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import optax

from dpo_jax.logps import completion_logps
from dpo_jax.losses import right
from dpo_jax.step import train_step
from dpo_jax.types import Array, Metrics, Model, Rows, TrainState, Variables

PreferenceLoss = Callable[..., tuple[jax.Array, jax.Array]]
"""(logps[P, K], ref_logps[P, K], **extras) -> (losses[P], rewards[P, K]): a function of `dpo_jax.losses`, its options bound. K
is 2, or the length of a ranking; `extras` is what the batch carries besides (`Rows.extras`), often nothing."""


def dpo_step(
    state: TrainState,
    rows: Rows,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    loss: PreferenceLoss,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of DPO (eq. 7), for instance with `loss=partial(dpo_loss, beta=0.1)`. Pure: jit, pmap or shard_map it.

    The reference model is not here: its log-probabilities come with the batch, `rows.ref_logps[P, 2]`. Metrics are float32
    scalars, means over the pairs of the global batch as the policy was *before* the update. Rankings (`ranking_rows`) go the
    same way, as [P, K] with `loss=partial(plackett_luce_loss, beta=0.1)`. Under pmap or shard_map name the mapped axis,
    `axis_name`: without it each device takes a step of its own, and parameters drift apart without an error.

    >>> step = jax.jit(partial(dpo_step, model=model, tx=tx, loss=partial(dpo_loss, beta=0.1)))
    >>> after, metrics = step(state, rows)
    >>> print(f"{metrics['loss']:.4f} {metrics['rewards/margins']:.1f}")  # the policy still is its reference
    0.6931 0.0

    A loss of one's own is a function of arrays. What it needs besides log-probabilities, `rows.extras` brings, by name: columns
    of the data through `examples_to_rows`, or what the rows themselves say. Fillers of a batch have length 0, so divide by
    at least 1: their weight of 0 does not undo a NaN. Here the quality gap and lengths:

    >>> def loss(logps, ref_logps, gap, lengths):
    ...     ratios = (logps - ref_logps) / jnp.maximum(lengths, 1)
    ...     return (ratios[:, 0] - ratios[:, 1] - gap) ** 2, ratios
    >>> gap = examples_to_rows(np.float32([0.5, 2.0]), rows)
    >>> mine = rows.replace(extras={"gap": gap, "lengths": completion_lengths(rows)})
    >>> _, metrics = jax.jit(partial(dpo_step, model=model, tx=tx, loss=loss))(state, mine)
    >>> print(f"{metrics['loss']:.3f}")  # (0.25 + 4) / 2
    2.125
    """
    objective = partial(dpo_objective, model=model, loss=loss)
    return train_step(state, rows, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)


def dpo_objective(variables: Variables, rows: Rows, *, model: Model, loss: PreferenceLoss) -> tuple[jax.Array, Metrics]:
    """Losses of the pairs, float32[P], and the metrics of each: what `dpo_step` takes the mean and the gradient of.

    >>> losses, metrics = jax.jit(partial(dpo_objective, model=model, loss=partial(dpo_loss, beta=0.1)))(variables, rows)
    >>> losses.shape, metrics["rewards/margins"].shape
    ((2,), (2,))
    """
    if rows.ref_logps is None:
        raise ValueError("the batch carries no reference log-probabilities: give the layout `ref_logps`")
    logps = completion_logps(model, variables, rows)
    found = loss(logps, rows.ref_logps, **(rows.extras or {}))
    if not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError(f"a loss returns (losses [P], rewards [P, K]), this one {type(found).__name__}")
    losses, rewards = found
    return losses, preference_metrics(logps, rows.ref_logps, rewards=rewards)


def preference_metrics(logps: jax.Array, ref_logps: Array, *, rewards: jax.Array) -> Metrics:
    """What to watch, per pair: {name: float[P]}, under the names TRL made common. Of a ranking: its best and its worst.

    `displacement/*` is log pi - log pi_ref in nats: DPO trains the difference of the two, and both may fall.
    `kl_reference_policy` is their mean over all completions with the sign turned: an estimate of KL(pi_ref || pi), if the
    completions came from the reference. KL(pi || pi_ref), which needs samples of the policy, is `kl` in evaluations.

    `logps`, `ref_logps` and `rewards` are float[P, K], as a loss takes and returns them.

    >>> logps, ref_logps = jnp.array([[-12.0, -15.0]]), jnp.array([[-14.0, -13.0]])
    >>> metrics = preference_metrics(logps, ref_logps, rewards=dpo_loss(logps, ref_logps, beta=0.5)[1])
    >>> print(metrics["rewards/margins"], metrics["displacement/rejected"])
    [2.] [-2.]
    """
    log_ratios = logps - ref_logps
    return {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, -1],
        "rewards/margins": rewards[:, 0] - rewards[:, -1],
        "rewards/accuracies": right(rewards, logps, ref_logps),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, -1],
        "displacement/chosen": log_ratios[:, 0],
        "displacement/rejected": log_ratios[:, -1],
        "kl_reference_policy": -log_ratios.mean(axis=1),
    }
