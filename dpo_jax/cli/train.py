"""Training shared by `sft` and `dpo`: from the options of a command to the arguments of `training.run.train`."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax.cli import build, identity
from dpo_jax.cli.announcement import announce
from dpo_jax.cli.config import Config, DpoConfig, SftConfig
from dpo_jax.cli.config.training import HIGHER
from dpo_jax.cli.metrics_writers import metrics_writers
from dpo_jax.cli.trainable import Trainable
from dpo_jax.cli.training_plan import TrainingPlan
from dpo_jax.data.loader import train_batches
from dpo_jax.runtime import hosts
from dpo_jax.runtime.fit import Evaluation
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.runtime.training_progress import Progress
from dpo_jax.training import fingerprint
from dpo_jax.training.refresh import RefreshedReference
from dpo_jax.training.run import train as train_in
from dpo_jax.training.stopping import EarlyStopping
from dpo_jax.types import Array, Partitioner, TrainState, Variables


def train(
    config: Config,
    run: RunDir,
    section: SftConfig | DpoConfig,
    plan: TrainingPlan,
    *,
    step: Callable[..., Any],
    trainable: Trainable,
    variables: Variables,
    weights: Mapping[str, str],
    partitioner: Partitioner,
    evaluate: Callable[[TrainState, int], Mapping[str, float]],
    ref_logps: Array | None = None,
    check: Callable[[int, dict[str, float]], None] | None = None,
    refresh: RefreshedReference | None = None,
) -> TrainState:
    """Trains from `variables` (consumed) or from the newest good checkpoint. Returns the final state, on the devices.

    `step` is `dpo_step` or `sft_step` without optimizer, microbatches and axis. `weights` are digests of the starting weights
    (`start`, `base`, `reference`), which must be the same when a run continues.
    """
    data, tx = plan.data, build.make_tx(section, steps=plan.steps, seed=config.run.seed)
    step = functools.partial(step, tx=tx, microbatches=section.microbatches, axis_name=partitioner.axis_name)
    lr = build.make_schedule(section, steps=plan.steps)
    state = trainable.begin(partitioner, variables, tx)
    announce(config, run, section, plan, state, partitioner)
    facts = {
        **identity.settings(config, section),
        **weights,
        **({} if data.vision is None else {"encoder": data.vision.digest}),
        "data": plan.digest,
        "architecture": fingerprint.architecture(trainable.base),
        "behind": plan.behind,
    }

    stopping = early_stopping(section)

    def begin() -> None:
        build.describe(run, config, *data.reports)
        stopped = stopping is not None and stopping.stopped  # known once the run is resumed, and then its export is right
        if hosts.is_first() and not stopped and (plan.saved is None or plan.saved.step < plan.steps):
            run.card.unlink(missing_ok=True)  # it describes the weights of fewer steps
            _set_export_aside(run)

    with identity.refusing_mismatch():
        return train_in(
            partitioner.compile_step(step),
            state,
            train_batches(
                data.train,
                layout=plan.layout,
                batch=section.batch,
                seed=config.run.seed,
                epochs=plan.epochs,
                behind=plan.behind,
                ref_logps=ref_logps,
                uids=data.uids,
                part=partitioner.host_part,
            ),
            folder=run,
            total_steps=plan.steps,
            fingerprint=facts,
            data=plan.record,
            saved=plan.saved,
            partitioner=partitioner,
            saving=build.saving(config, run.path.name),
            evaluation=Evaluation(
                evaluate, every=math.ceil(config.run.eval_every_examples / section.batch), first=config.run.eval_at_start
            ),
            stopping=stopping,
            refresh=refresh,
            lr=lr,
            check=check,
            begin=begin,
            writers=functools.partial(metrics_writers, config, run, facts),
            progress=Progress(
                epochs=plan.epochs or plan.steps * section.batch / len(data.train), shapes=max(1, len(plan.layout.row_counts))
            ),
        )


def _set_export_aside(run: RunDir) -> None:
    """Renames the model that fewer steps gave: until this run ends, no later command may take it for the run's result."""
    if not run.export.is_dir():
        return
    names = (run.export.with_name(f"{run.export.name}-before-{number}") for number in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    run.export.rename(aside)
    print(f"note: the model of fewer steps in {run.export} is now {aside}", flush=True)


def early_stopping(section: SftConfig | DpoConfig) -> EarlyStopping | None:
    """What a new run does with its best evaluation; None without `patience` and `keep_best`."""
    if not section.keeps_best():
        return None
    return EarlyStopping(section.stop_on, patience=section.patience or None, higher=section.stop_on in HIGHER)
