"""Evaluations of a training run: when the first one is due, and values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dpo_jax.runtime import hosts
from dpo_jax.runtime.fit import Evaluation, NonFinite
from dpo_jax.runtime.metrics import MetricsLog, is_evaluation, read_metrics
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.steplog import measured
from dpo_jax.training.fingerprint import SavedRun, other_held_out
from dpo_jax.training.stopping import EarlyStopping


def evaluates_first(
    start: int,
    total_steps: int,
    evaluation: Evaluation,
    *,
    stopping: EarlyStopping | None,
    log: MetricsLog | None,
    other_data: bool,
) -> bool:
    """Whether the state that training begins or continues with, after `start` steps, is evaluated. All hosts must call it.

    An evaluation may be missing because a signal came before it. `other_data`: a finished run has other held-out data than it
    was evaluated on.
    """
    if start == 0:
        return evaluation.first and total_steps > 0
    if stopping is not None:
        return _is_due(start, evaluation.every, total_steps) and stopping.last < start
    if start == total_steps:
        return other_data
    return _is_due(start, evaluation.every, total_steps) and not _is_evaluated(log, start)


def _is_due(done: int, eval_every: int, total_steps: int) -> bool:
    """Whether the state after `done` steps is to be evaluated. A signal takes precedence and saves without evaluation."""
    return done > 0 and (done == total_steps or (eval_every > 0 and done % eval_every == 0))


def finite_evaluation(evaluation: Evaluation, state: Any, done: int) -> Mapping[str, Any]:
    """Calls `evaluation.measure`. Raises `NonFinite` for a value that is not finite.

    Only this checks the last update: the loss of a step is that of the weights before it.
    """
    metrics = measured(evaluation.measure(state, done))
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFinite(
                f"held-out {name} is {value} after {done} steps; the last good checkpoint is kept", step=done, uids=[]
            )
    return metrics


def is_other_data(saved: SavedRun | None, data: Mapping[str, Any], total_steps: int) -> bool:
    """Whether a finished run has other held-out data than it was evaluated on."""
    return other_held_out(saved, data) and saved is not None and saved.step == total_steps


def _is_evaluated(log: MetricsLog | None, done: int) -> bool:
    """Whether the log, held by the first host, has an evaluation after `done` steps. All hosts must call it."""
    found = log is not None and any(is_evaluation(row) and row["step"] == done for row in read_metrics(log.path))
    return hosts.anywhere(found)


def evaluate_last(evaluation: Evaluation, state: Any, done: int, *, log: MetricsLog | None) -> None:
    """Evaluates the final state if the log has no such row yet: a signal during the last step saves it without."""
    if _is_evaluated(log, done):
        return
    with reported("evaluating", brief=True):
        metrics = evaluation.measure(state, done)
    if log is not None:
        log.write({"step": done} | {f"eval/{name}": value for name, value in metrics.items()})
