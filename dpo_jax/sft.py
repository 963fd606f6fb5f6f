"""Supervised fine-tuning: the training step of the reference (and of Preferred-FT, on chosen completions)."""

from __future__ import annotations

import jax
import optax

from dpo_jax.logps import scored_tokens, sequence_logps_and_hits
from dpo_jax.routing import with_router
from dpo_jax.step import train_step
from dpo_jax.types import Metrics, Model, Rows, TrainState, Variables
from dpo_jax.whole_batch import mean_of_examples


def sft_step(
    state: TrainState,
    rows: Rows,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    per_token: bool = False,
    router_aux_loss: float = 0.0,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of maximum likelihood on completions. Pure, like `dpo_step`; one completion slot is one example.

    The loss is that of the original code: the negative log-probability *summed* over a completion, averaged over completions.
    `nll_per_token` is the same per scored token of the global batch, in nats; `mean_token_accuracy` is the share of those
    tokens that are the model's most likely ones. With `per_token` the loss is `nll_per_token`, as in TRL: the gradient is
    smaller by the mean number of scored tokens. `router_aux_loss`: see `routing.with_router`.

    >>> texts = completion_rows([(pair.prompt, pair.chosen) for pair in encoded], length=64)
    >>> after, metrics = jax.jit(partial(sft_step, model=model, tx=tx))(state, texts)
    >>> int(after.step), sorted(metrics)
    (1, ['grad_norm', 'logps/chosen', 'loss', 'mean_token_accuracy', 'nll_per_token', 'tokens'])
    """

    divisor = mean_of_examples(scored_tokens(rows), rows.weight, axis_name) if per_token else 1.0  # before the batch is split

    def of_texts(variables: Variables, rows: Rows, *, model: Model) -> tuple[jax.Array, Metrics]:
        logps, hits = sequence_logps_and_hits(model, variables, rows)
        return -logps / divisor, {"logps/chosen": logps, "tokens": scored_tokens(rows), "hits": hits}

    objective = with_router(of_texts, model, coefficient=router_aux_loss, axis_name=axis_name)
    state, metrics = train_step(state, rows, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)
    means = {"nll_per_token": -metrics["logps/chosen"], "mean_token_accuracy": metrics.pop("hits")}
    return state, {**metrics, **{name: value / metrics["tokens"] for name, value in means.items()}}
