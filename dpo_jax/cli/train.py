"""What training commands share: resume, the loop with its writers, and what a finished run leaves behind."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dpo_jax.cli import build, identity
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, SftConfig
from dpo_jax.cli.preflight_packages import check_bucket
from dpo_jax.data.loader import Batch
from dpo_jax.data.pairs import DataReport
from dpo_jax.runtime import hosts
from dpo_jax.runtime.checkpoint import CheckpointDamaged, Checkpoints, has_steps, newest_meta
from dpo_jax.runtime.fit import NonFinite, fit
from dpo_jax.runtime.mesh import mesh_sizes
from dpo_jax.runtime.metrics import MetricsLog, TensorBoardWriter, WandbWriter, is_evaluation, read_metrics
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.runtime.seal import is_remote
from dpo_jax.runtime.training_progress import Progress
from dpo_jax.types import Model, Partitioner, TrainState, Variables
from dpo_jax.writing import appending, write_text

Evaluate = Callable[[TrainState, int], Mapping[str, Any]]


def train(
    config: Config,
    run: RunDir,
    section: SftConfig | DpoConfig,
    *,
    step: Callable[..., Any],
    state: TrainState,
    stream: Callable[[int], Batch],
    total_steps: int,
    lr: Callable[[int], Any],
    fingerprint: Mapping[str, Any],
    data: Mapping[str, Any],
    earlier: identity.Earlier | None,
    reports: Sequence[DataReport],
    partitioner: Partitioner,
    evaluate: Evaluate,
    check: Callable[[int, dict[str, float]], None] | None = None,
    unit: str = "pairs",
    shapes: int = 0,
) -> TrainState:
    """Trains from `state` (consumed) or from the newest good checkpoint. Returns the final state as it lies on the devices.

    Checkpoints hold what is trained. What `state.frozen` holds is read again by whoever continues, and its digest is part of
    `fingerprint`.

    `reports` say what became of the data, and are written beside the configuration once the run is known to be the same.
    `fingerprint` is what a resumed run must have in common with the one that wrote the checkpoint; a difference is a
    `ConfigError` that names it, with the help of `data` (`identity.data_record`). All other states are as they lie on the
    devices. `earlier`: what `earlier_run` has found.
    """
    versions = {package: importlib.metadata.version(package) for package in ("jax", "flax", "optax")}
    meta = {"fingerprint": dict(fingerprint), "data": dict(data), "versions": versions}
    print(_what_runs_where(config, section, state, partitioner), flush=True)
    if 0 < total_steps <= section.warmup_steps:
        reached = float(lr(total_steps - 1)) / section.lr
        print(
            f"note: warm-up takes {section.warmup_steps} steps, and the run has {total_steps}: the learning rate reaches only "
            f"{reached:.0%} of {section.lr:g} (warmup_steps)",
            flush=True,
        )
    with _checkpoints(config, run) as checkpoints:
        state = _resume(run, state, checkpoints, meta, partitioner, earlier=earlier, total_steps=total_steps)
        build.describe(run, config, *reports)
        evaluate = functools.partial(_finite, evaluate)
        with _metrics_log(config, run, fingerprint) as log:
            state = fit(
                partitioner.compile_step(step),
                state,
                stream,
                total_steps=total_steps,
                lr=lr,
                checkpoints=checkpoints,
                meta=meta,
                log=log,
                progress=Progress(epochs=section.epochs) if hosts.is_first() else None,
                evaluate=evaluate,
                eval_every=math.ceil(config.run.eval_every_examples / section.batch),
                save_every=config.run.save_every_steps,
                save_every_minutes=config.run.save_every_minutes if hosts.is_first() else 0.0,
                check=check,
                unit=unit,
                shapes=shapes,
                get_state=functools.partial(_saved, partitioner),
                agree=hosts.agreement(),
            )
            # A signal during the last step saves the state without judging it, and other pairs judge it anew.
            judged = log is not None and any(is_evaluation(r) and r["step"] == total_steps for r in read_metrics(run.metrics))
            judged = judged and not (
                identity.other_held_out(earlier, data) and earlier is not None and earlier.step == total_steps
            )
            if not hosts.anywhere(judged):
                with reported("evaluating", brief=True):
                    metrics = evaluate(state, total_steps)
                if log is not None:
                    log.write({"step": total_steps} | {f"eval/{k}": v for k, v in metrics.items()})
    return state


def _saved(partitioner: Partitioner, state: Any) -> Any:
    """A state in the form that is saved, without what is frozen; or a part of it."""
    return partitioner.get_state(state.replace(frozen={}) if isinstance(state, TrainState) else state)


def earlier_run(config: Config, task: str, section: SftConfig | DpoConfig) -> identity.Earlier | None:
    """The run that this one continues; None for a new run.

    Raises `ConfigError` before any data are read: for a bucket that cannot be reached, an old run not to resume, and one with
    other settings.
    """
    directory = config.checkpoints_of(task)
    check_bucket(config, directory)
    if not config.run.resume and has_steps(directory):
        raise ConfigError(f"run.resume: is off, and {directory} holds checkpoints; turn it on, or choose another --run.dir")
    found = newest_meta(directory)
    if found is None:
        return None
    earlier = identity.Earlier(f"{config.run.dir}/{task}", *found)
    identity.refuse_other_settings(earlier.place, earlier.fingerprint, identity.settings(config, section))
    return earlier


@contextlib.contextmanager
def _checkpoints(config: Config, run: RunDir) -> Iterator[Checkpoints]:
    directory = config.checkpoints_of(run.path.name)
    with contextlib.ExitStack() as held:
        if config.run.checkpoints is not None and not is_remote(directory):
            held.enter_context(RunDir(directory, lock=hosts.is_first()))  # for its lock: runs elsewhere may name it, too
        yield held.enter_context(Checkpoints(directory, max_to_keep=config.run.max_to_keep))


@contextlib.contextmanager
def _metrics_log(config: Config, run: RunDir, fingerprint: Mapping[str, Any]) -> Iterator[MetricsLog | None]:
    """The log and its writers; None on all hosts but the first."""
    if not hosts.is_first():
        yield None
        return
    writers = []
    if config.run.tensorboard:
        writers.append(TensorBoardWriter(run.path / "tensorboard"))
    if config.run.wandb is not None:
        writers.append(WandbWriter(config.run.wandb, directory=run.path, config=fingerprint))
    with MetricsLog(run.metrics, writers=writers) as log:
        yield log


def _what_runs_where(config: Config, section: SftConfig | DpoConfig, state: TrainState, partitioner: Partitioner) -> str:
    """A table of hosts, devices, how they are used, and what one of them holds."""
    devices, kind = jax.devices(), jax.devices()[0].device_kind
    pieces = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(state)]
    of_device = sum(math.prod(shape) * dtype.itemsize for shape, dtype in pieces)
    mesh = " x ".join(f"{axis} {size}" for axis, size in mesh_sizes(state).items())
    copies = jax.local_device_count() if config.run.devices == "pmap" else 1
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(part)) // copies for part in (state.params, state.frozen))
    used = {"single": "one device", "pmap": f"pmap over {partitioner.row_shards}", "mesh": mesh}[config.run.devices]
    share = section.batch / partitioner.row_shards
    table = {
        "hosts": f"{jax.process_count()}",
        "devices": f"{len(devices)} x {kind}, {jax.local_device_count()} on this host",
        "layout": used,
        "attention": build.attention_name(config),
        "parameters": f"{trained:,}" + (f" trained, {frozen:,} frozen" if frozen else ""),
        "per device": f"{of_device / 2**20:,.1f} MiB of parameters and optimizer, {share:g} of {section.batch} examples a step",
        "microbatches": f"{section.microbatches}, remat {config.model.remat}, {config.run.precision}",
    }
    return "\n".join(f"{name:>14}  {value}" for name, value in table.items())


def _finite(evaluate: Evaluate, state: TrainState, done: int) -> Mapping[str, Any]:
    """Raises `NonFinite`. The loss of a step judges the weights before its update; only this judges those after the last."""
    metrics = evaluate(state, done)
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFinite(
                f"held-out {name} is {value} after {done} steps; the last good checkpoint is kept", step=done, uids=[]
            )
    return metrics


def _resume(
    run: RunDir,
    state: TrainState,
    checkpoints: Checkpoints,
    meta: Mapping[str, Any],
    partitioner: Partitioner,
    *,
    earlier: identity.Earlier | None,
    total_steps: int,
) -> TrainState:
    if checkpoints.latest_step() is None:
        return state
    with reported("reading the checkpoint"):
        found = checkpoints.restore_latest(jax.tree.map(_as_saved, _saved(partitioner, state)))
    if found is None:
        return state
    restored, saved = found
    is_now, here = meta["fingerprint"], identity.Earlier(str(run.path), int(restored.step), saved)
    identity.refuse_other_settings(here.place, here.fingerprint, is_now)
    identity.check_data(here, is_now["data"], meta["data"])
    if is_now["behind"] != here.fingerprint.get("behind", 0) and (earlier is None or earlier.step != here.step):
        raise CheckpointDamaged(f"the newest checkpoint of {run.path} was damaged and set aside; run the same command again")
    _say_what_changed(here, meta)
    print(f"continuing {run.path} after {here.step} steps", flush=True)
    if here.fingerprint["epochs"] == is_now["epochs"]:  # otherwise it was lengthened, which is no interruption
        _note_resumption(run, here.step, total_steps)
    build.free(state.replace(frozen={}))
    return partitioner.put_state(restored).replace(frozen=state.frozen)


def _say_what_changed(earlier: identity.Earlier, meta: Mapping[str, Any]) -> None:
    before, now = earlier.fingerprint["epochs"], meta["fingerprint"]["epochs"]
    if before != now:
        print(f"the run is of {now} epochs now; it was of {before}", flush=True)
    if identity.other_held_out(earlier, meta["data"]):
        lines = "\n".join(identity.other_data(earlier.data, meta["data"]))
        print(f"note: the held-out pairs changed; evaluations before and after cannot be compared\n{lines}", flush=True)


def _note_resumption(run: RunDir, step: int, total_steps: int) -> None:
    """Adds to `resumes.jsonl` that an interrupted run goes on after `step` steps, for whoever reads the run later."""
    if hosts.is_first() and 0 < step < total_steps:
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with appending(run.resumes) as file:
            file.write(json.dumps({"step": step, "time": time}) + "\n")


def _as_saved(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf in pieces is read in pieces: a host never holds all of it."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def leave_results(
    run: RunDir,
    model: Model,
    variables: Variables,
    tokenizer: Any,
    *,
    card: Callable[[], str],
    write: Callable[..., tuple[Path, str]],
) -> None:
    """Writes the plots, the model card, and by `write` (of `export`) the model or adapter as a Hugging Face folder.

    All hosts call it, with `variables` as `Trained.written` gives them.
    """
    text = card() if hosts.is_first() else None
    with reported("exporting the policy"):
        folder, dtype = write(run.export, model, variables, tokenizer, card=text)
    if text is None:
        return
    from dpo_jax.evals.plots import plot_training  # matplotlib: 0.4 s that the first step need not wait for

    with reported("drawing plots"):
        plot_training(read_metrics(run.metrics), run.plots)
    write_text(run.card, text)
    print(f"the policy is in {folder}, in {dtype}")
