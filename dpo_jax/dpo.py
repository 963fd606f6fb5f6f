"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290): the training step. Start reading here."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax

from dpo_jax.head import aligned_log_probability
from dpo_jax.logps import completion_lengths, hidden_logps, pair_sums, scored_hidden
from dpo_jax.losses import PreferenceLoss, pair_accuracy, required_inputs, unpaired_metrics
from dpo_jax.routing import with_router
from dpo_jax.step import train_step
from dpo_jax.types import Array, Metrics, Model, Rows, TrainState, Variables
from dpo_jax.whole_batch import BatchMeans, batch_means, linear_loss, with_logp_gradients


def dpo_step(
    state: TrainState,
    rows: Rows,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    loss: PreferenceLoss,
    ld_alpha: float = 1.0,
    router_aux_loss: float = 0.0,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of DPO (eq. 7), for instance with `loss=partial(dpo_loss, beta=0.1)`. Pure: jit, pmap or shard_map it.

    The step needs no reference model: the batch carries its log-probabilities, `rows.ref_logps[P, 2]`. Metrics are float32
    scalars: means over the pairs of the global batch, for the policy *before* the update. Rankings (`ranking_rows`) work the
    same way, as [P, K] with `loss=partial(plackett_luce_loss, beta=0.1)`; so do single completions with a label
    (`Encoded.desirable`), with `loss=partial(kto_loss, beta=0.1)`. Under pmap, pass `axis_name`, or devices drift apart.
    `ld_alpha` below 1 is LD-DPO of pairs (`pair_sums`); compute `rows.ref_logps` with the same one. `router_aux_loss`: see
    `routing.with_router`.

    >>> step = jax.jit(partial(dpo_step, model=model, tx=tx, loss=partial(dpo_loss, beta=0.1)))
    >>> after, metrics = step(state, rows)
    >>> print(f"{metrics['loss']:.4f} {metrics['rewards/margins']:.1f}")  # the policy still is its reference
    0.6931 0.0

    A custom loss is a function of arrays. Its keyword arguments name what it needs besides log-probabilities: `lengths`, the
    scored tokens float32[P, K], or others of `losses.SIGNALS`. Give these no default. A loss with the keyword `weight` looks
    across pairs; with microbatches or mapped devices it costs one more forward pass (`whole_batch`). Columns of the data go
    into `rows.extras` by name, through `examples_to_rows`. Padding examples have length 0, so divide by at least 1: their
    weight of 0 does not undo a NaN. A loss with lengths and a gap:

    >>> def loss(logps, ref_logps, *, lengths, gap):
    ...     ratios = (logps - ref_logps) / jnp.maximum(lengths, 1)
    ...     return (ratios[:, 0] - ratios[:, 1] - gap) ** 2, ratios
    >>> mine = rows.replace(extras={"gap": examples_to_rows(np.float32([0.5, 2.0]), rows)})
    >>> _, metrics = jax.jit(partial(dpo_step, model=model, tx=tx, loss=loss))(state, mine)
    >>> print(f"{metrics['loss']:.3f}")  # (0.25 + 4) / 2
    2.125
    """
    means = batch_means(rows, axis_name)  # before the batch is split
    if "weight" in _signals(loss, rows) and (microbatches > 1 or axis_name is not None):
        inputs = partial(_loss_inputs, state.variables, model=model, loss=loss, ld_alpha=ld_alpha, means=means)
        rows = with_logp_gradients(rows, inputs, loss=loss, microbatches=microbatches, axis_name=axis_name)
        loss = linear_loss
    objective = partial(dpo_objective, loss=loss, ld_alpha=ld_alpha, means=means)
    objective = with_router(objective, model, coefficient=router_aux_loss, axis_name=axis_name)
    return train_step(state, rows, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)


def dpo_objective(
    variables: Variables,
    rows: Rows,
    *,
    model: Model,
    loss: PreferenceLoss,
    ld_alpha: float = 1.0,
    means: BatchMeans | None = None,
) -> tuple[jax.Array, Metrics]:
    """The DPO objective: losses float32[P] and metrics of the pairs. `dpo_step` takes their mean and its gradient.

    If `rows` are a part of a batch, give `means` of all of it (`batch_means`); by default they are those of `rows`.

    >>> losses, metrics = jax.jit(partial(dpo_objective, model=model, loss=partial(dpo_loss, beta=0.1)))(variables, rows)
    >>> losses.shape, metrics["rewards/margins"].shape
    ((2,), (2,))
    """
    means = batch_means(rows) if means is None else means
    logps, ref_logps, extras = _loss_inputs(variables, rows, model=model, loss=loss, ld_alpha=ld_alpha, means=means)
    found = loss(logps, ref_logps, **extras)
    if not (isinstance(found, tuple) and len(found) == 2 and jnp.shape(found[1]) == logps.shape):
        raise TypeError(f"a loss returns (losses [P], rewards {list(logps.shape)}), not {jax.tree.map(jnp.shape, found)}")
    losses, rewards = found
    if means.desirable is not None:
        labels = (rows.extras or {})["desirable"]
        return losses, unpaired_metrics(logps, ref_logps, rewards=rewards, desirable=labels, share=means.desirable)
    return losses, preference_metrics(logps, ref_logps, rewards=rewards)


def _loss_inputs(
    variables: Variables, rows: Rows, *, model: Model, loss: PreferenceLoss, ld_alpha: float, means: BatchMeans
) -> tuple[jax.Array, Array, dict[str, Array]]:
    """The log-probabilities of policy and reference, float32[P, K] each, and what else the loss takes, by keyword."""
    if rows.ref_logps is None:
        raise ValueError("no reference log-probabilities: give the layout `ref_logps` (zeros, if the loss reads none)")
    hidden = scored_hidden(model, variables, rows)
    supplied = {
        "lengths": lambda: completion_lengths(rows),
        "mean_lengths": lambda: jnp.broadcast_to(means.lengths, (len(rows.weight), *means.lengths.shape)),
        "weight": lambda: rows.weight,
        "aligned_logps": lambda: _aligned_logps(model, variables, hidden, rows),
    }
    signals = _signals(loss, rows)
    if "desirable" in signals:
        raise ValueError("this loss reads single completions with labels, but the batch has none (Encoded.desirable)")
    extras = {name: make() for name, make in supplied.items() if name in signals}
    logps = pair_sums(hidden_logps(model, variables, hidden, rows), rows, ld_alpha=ld_alpha)
    return logps, rows.ref_logps, {**extras, **(rows.extras or {})}


def _signals(loss: PreferenceLoss, rows: Rows) -> frozenset[str]:
    """Keywords of a loss that name `SIGNALS` and are not columns of the batch (`Rows.extras`)."""
    return required_inputs(loss, columns=rows.extras or {})


def _aligned_logps(model: Model, variables: Variables, hidden: jax.Array, rows: Rows) -> jax.Array:
    """WPO's log-weight of each completion (`losses.SIGNALS`): float32[P, K]. A second pass through the head, forward only."""
    variables, hidden = jax.lax.stop_gradient((variables, hidden))
    sums = pair_sums(hidden_logps(model, variables, hidden, rows, read=aligned_log_probability), rows)
    return sums / jnp.maximum(completion_lengths(rows), 1)


def preference_metrics(logps: jax.Array, ref_logps: Array, *, rewards: jax.Array) -> Metrics:
    """Metrics per pair, {name: float[P]}, under TRL's usual names. For a ranking they compare its best and worst completions.

    `displacement/*` is log pi - log pi_ref in nats. DPO trains only the difference between chosen and rejected, so both may
    fall. `kl_reference_policy` is minus their mean over all completions: an estimate of KL(pi_ref || pi), if the completions
    came from the reference. KL(pi || pi_ref) needs samples of the policy; evaluations report it as `kl`.

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
        "rewards/accuracies": pair_accuracy(rewards, logps, ref_logps),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, -1],
        "displacement/chosen": log_ratios[:, 0],
        "displacement/rejected": log_ratios[:, -1],
        "kl_reference_policy": -log_ratios.mean(axis=1),
    }
