"""Training shared by `sft` and `dpo`: the plan of a run, the device summary, and the output files of a finished run."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import loss_table
from dpo_jax.cli import build, identity
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, SftConfig
from dpo_jax.cli.config.training import HIGHER
from dpo_jax.cli.images import Vision
from dpo_jax.cli.model_folders import saved_steps
from dpo_jax.cli.preflight.devices import empty_rows
from dpo_jax.cli.preflight.packages import check_bucket
from dpo_jax.cli.splits import truncation_note
from dpo_jax.cli.trained import Trained
from dpo_jax.data.encode import image_bytes
from dpo_jax.data.layout import Example, Layout, images_of, places_of
from dpo_jax.data.loader import batch_indices, few_shapes, plan_layout, skippable, total_steps, train_batches
from dpo_jax.data.pairs import DataReport
from dpo_jax.data.prepare import data_digest
from dpo_jax.data.terminal import printable
from dpo_jax.runtime import hosts
from dpo_jax.runtime.checkpoint import has_steps
from dpo_jax.runtime.fit import Evaluation
from dpo_jax.runtime.mesh import mesh_sizes
from dpo_jax.runtime.mesh_shape import mesh_words
from dpo_jax.runtime.metrics import Writer, read_metrics
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.runtime.seal import is_remote
from dpo_jax.runtime.training_progress import Progress
from dpo_jax.runtime.writers import AsTrl, Delivery, Place, TensorBoard, Trackio, Wandb
from dpo_jax.training import fingerprint
from dpo_jax.training.fingerprint import SavedRun
from dpo_jax.training.refresh import RefreshedReference
from dpo_jax.training.run import saved_run
from dpo_jax.training.run import train as train_in
from dpo_jax.training.stopping import EarlyStopping
from dpo_jax.types import Array, Model, Partitioner, TrainState, Variables
from dpo_jax.writing import same_place, write_text

PLAIN_TEXTS = (
    "the data are plain texts, so the chat template of the tokenizer is not used; for an instruct model set data.format: "
    "chat_texts, which makes turns of them"
)


class TrainingData(NamedTuple):
    """Token ids for training and evaluation, and the reports of the rows that were read."""

    train: Sequence[Any]  # pairs, or texts of `encode_targets`
    held_out: Sequence[Any]
    reports: Sequence[DataReport]
    uids: Sequence[str] | None = None  # for texts, which have none of their own
    vision: Vision | None = None  # reads images in prompts


class TrainingPlan(NamedTuple):
    """Facts of a run known before weights are read: data, batch shapes, length and identity."""

    data: TrainingData
    saved: SavedRun | None  # the run that is continued
    layout: Layout  # of training batches
    held_out_layout: Layout
    behind: int  # see `fingerprint.behind`
    steps: int
    epochs: float | None  # after which the stream ends; None if the length is given in steps
    digest: str  # of the training data
    record: Mapping[str, Any]  # everything that determines the data

    def read_by(self, step: int, *, batch: int, seed: int) -> np.ndarray:
        """The numbers of a step's examples; beyond the end of the run, those that a longer run would have."""
        return batch_indices(len(self.data.train), batch=batch, seed=seed, step=step, behind=self.behind)


def earlier_run(config: Config, task: str, section: SftConfig | DpoConfig) -> SavedRun | None:
    """The run to be continued; None for a new run.

    Raises `ConfigError` before any data are read: for a bucket that cannot be reached, an earlier run without run.resume, and
    one with other settings.
    """
    directory = config.checkpoints_of(task)
    check_bucket(directory)
    _refuse_own_export(config, task)
    if not config.run.resume and has_steps(directory):
        raise ConfigError(f"run.resume: is off, but {directory} holds checkpoints; turn it on, or choose another --run.dir")
    saved = saved_run(directory, place=f"{config.run.dir}/{task}")
    if saved is not None:
        with identity.refusing_mismatch():
            fingerprint.check_settings(saved.place, saved.fingerprint, identity.settings(config, section))
    return saved


def _refuse_own_export(config: Config, task: str) -> None:
    """Raises `ConfigError` if a run starts from the folder to which it will write its model."""
    named = {"model.path": config.model.path, "dpo.policy": config.dpo.policy, "dpo.reference": config.dpo.reference}
    export = Path(config.run.dir, task, "export")
    for option, path in named.items():
        if path is not None and same_place(path, export):
            raise ConfigError(f"{option}: {path} is where this run writes its own model; choose another --run.dir")


def plan_training(
    config: Config,
    section: SftConfig | DpoConfig,
    data: TrainingData,
    *,
    tokenizer: Any,
    partitioner: Partitioner,
    saved: SavedRun | None,
) -> TrainingPlan:
    """Batch shapes and length of the run. Raises `ConfigError` if its data or length do not fit the run that it continues.

    Features of images are computed here, because their width determines the shape of batches.
    """
    if data.vision is not None:
        with identity.refusing_mismatch():
            fingerprint.check_weights(saved, encoder=data.vision.digest)
        data.vision.compute(config)
    pairs = isinstance(section, DpoConfig)
    # A single completion shares its prompt with no other.
    kind = "plain" if config.data.layout == "shared" and not pairs else config.data.layout
    rows_each = places_of(data.train[0]) if kind == "plain" and pairs else 1

    def plan(count: int, *, parts: int, microbatches: int = 1) -> Layout:
        """`parts`: number of parts into which a batch is split; rows divide into them without splitting a pair."""
        layout = plan_layout(
            [*data.train, *data.held_out],
            kind=kind,
            batch=section.batch,
            length=config.data.row_length,
            multiple=parts * rows_each,
            microbatches=microbatches,
            pieces=config.mesh.context,
        )
        return few_shapes(layout, examples=count, batch=section.batch)

    with reported("planning the rows"):
        shards = partitioner.row_shards
        parts = build.batch_parts(section, shards, layout=kind)
        layout = plan(len(data.train), parts=parts, microbatches=skippable(section.microbatches, shards))
        held_out_layout = plan(len(data.held_out), parts=shards)
    record = identity.data_record(config, tokenizer, data.reports, held_out=data_digest(data.held_out))
    record |= _images_record(data.train)
    digest = data_digest(data.train)
    behind = fingerprint.behind(saved, examples=len(data.train), batch=section.batch)
    epochs = None if section.steps else section.epochs
    steps = section.steps or total_steps(len(data.train), batch=section.batch, epochs=section.epochs, behind=behind)
    with identity.refusing_mismatch():
        fingerprint.check_data(saved, digest, record)
        fingerprint.check_held_out(saved, record)
    with identity.refusing_mismatch(identity.LONGER):
        fingerprint.check_length(saved, steps=steps)
        fingerprint.check_epochs(saved, epochs=epochs, examples=len(data.train), batch=section.batch)
    return TrainingPlan(data, saved, layout, held_out_layout, behind, steps, epochs, digest, record)


def _images_record(examples: Sequence[Example]) -> dict[str, str]:
    """A digest of the images in prompts, in order, for a data record; empty if there are none."""
    shown = b"\0".join(image_bytes(images) for example in examples if (images := images_of(example)) is not None)
    return {"images": hashlib.sha256(shown).hexdigest()} if shown else {}


def train(
    config: Config,
    run: RunDir,
    section: SftConfig | DpoConfig,
    plan: TrainingPlan,
    *,
    step: Callable[..., Any],
    part: Trained,
    variables: Variables,
    weights: Mapping[str, str],
    partitioner: Partitioner,
    evaluate: Callable[[TrainState, int], Mapping[str, float]],
    ref_logps: Array | None = None,
    check: Callable[[int, dict[str, float]], None] | None = None,
    refresh: RefreshedReference | None = None,
) -> TrainState:
    """Trains `part` from `variables` (consumed) or from the newest good checkpoint. Returns the final state on the devices.

    `step` is `dpo_step` or `sft_step` without optimizer, microbatches and axis. `weights` are digests of the starting weights
    (`start`, `base`, `reference`), which must be the same when a run continues.
    """
    data, tx = plan.data, build.make_tx(section, steps=plan.steps, seed=config.run.seed)
    step = functools.partial(step, tx=tx, microbatches=section.microbatches, axis_name=partitioner.axis_name)
    lr = build.make_schedule(section, steps=plan.steps)
    state = part.begin(partitioner, variables, tx)
    examples = loss_table.example_word(section.loss) if isinstance(section, DpoConfig) else "texts"
    print(
        f"{len(data.train):,} {examples} to train on, {len(data.held_out):,} held out; "
        f"rows of {plan.layout.length} tokens\n{_device_summary(config, section, state, partitioner)}",
        flush=True,
    )
    for line in filter(None, (truncation_note(config, report) for report in data.reports)):
        print(f"note: {printable(line)}", flush=True)
    _note_long_warmup(section, plan.steps, lr)
    if warning := empty_rows(section, partitioner.row_shards):
        print(f"note: {run.path.name}.{warning}", flush=True)
    _note_full_disk(config, run, state)
    rendered = config.data.rendered or any(report.chat for report in data.reports)
    if isinstance(section, DpoConfig) and plan.record["chat template"] and not rendered:
        print(f"note: {PLAIN_TEXTS}", flush=True)
    facts = {
        **identity.settings(config, section),
        **weights,
        **({} if data.vision is None else {"encoder": data.vision.digest}),
        "data": plan.digest,
        "architecture": fingerprint.architecture(part.base),
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


def _note_long_warmup(section: SftConfig | DpoConfig, steps: int, lr: Callable[[int], Any]) -> None:
    warmup, option = section.warmup(steps), "warmup_steps" if section.warmup_ratio is None else "warmup_ratio"
    if 0 < steps <= warmup:
        reached = float(lr(steps - 1)) / section.lr
        print(
            f"note: warm-up takes {warmup} steps, and the run has {steps}: the learning rate reaches only "
            f"{reached:.0%} of {section.lr:g} ({option})",
            flush=True,
        )


def _note_full_disk(config: Config, run: RunDir, state: TrainState) -> None:
    """Prints a note if the checkpoints still to be written do not fit on the disk."""
    if is_remote(place := config.checkpoints_of(run.path.name)) or not hosts.is_first():
        return
    directory = Path(place)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.replace(frozen={})))
    size //= jax.local_device_count() if config.run.devices == "pmap" else 1
    disk = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    # One more than is kept: the oldest is deleted only after the next one is written.
    missing = max(1, config.run.max_to_keep + 1 - len(saved_steps(place)))
    needed, free = size * missing, shutil.disk_usage(disk).free
    if needed > free:
        print(
            f"note: there must be room for {missing} more checkpoints of {size / 1e9:,.1f} GB, {needed / 1e9:,.1f} GB in all, "
            f"but {disk} has {free / 1e9:,.1f} GB free (run.checkpoints, run.max_to_keep)",
            flush=True,
        )


def metrics_writers(config: Config, run: RunDir, facts: Mapping[str, Any]) -> list[Writer]:
    """Additional metrics writers of the configuration, which get its sections and `facts`, the fingerprint of the run."""
    section, shown = config.run, {**identity.settings_shown(config, run.path.name), **facts}
    options = {"directory": run.path, "config": shown}
    places: dict[str, Callable[[], Place]] = {}
    if section.tensorboard:
        places["TensorBoard"] = lambda: TensorBoard(run.path / "tensorboard")
    if section.wandb is not None:
        places["wandb"] = functools.partial(Wandb, section.wandb, **options)
    if section.trackio is not None:
        places["Trackio"] = functools.partial(Trackio, section.trackio, **options)
    if section.metric_names == "trl":
        places = {name: lambda make=make: AsTrl(make()) for name, make in places.items()}
    folder = run.path / "writers"
    return [
        Delivery(
            name, make, record=folder / f"{name.lower()}.json", forgets=name == "TensorBoard", samples=run.path / "samples"
        )
        for name, make in places.items()
    ]


def _device_summary(config: Config, section: SftConfig | DpoConfig, state: TrainState, partitioner: Partitioner) -> str:
    """A table of hosts, devices, how they are used, and the memory that one of them needs."""
    devices, kind = jax.devices(), jax.devices()[0].device_kind
    pieces = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(state)]
    of_device = sum(math.prod(shape) * dtype.itemsize for shape, dtype in pieces)
    mesh = mesh_words(mesh_sizes(state))
    copies = jax.local_device_count() if config.run.devices == "pmap" else 1
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(part)) // copies for part in (state.params, state.frozen))
    used = {"single": "one device", "pmap": f"pmap over {partitioner.row_shards}", "mesh": mesh}[config.run.devices]
    share = section.batch / partitioner.row_shards
    unused = config.run.devices == "single" and len(devices) > 1
    slow = config.run.precision == "float32" and devices[0].platform != "cpu"
    table = {
        "hosts": f"{jax.process_count()}",
        "devices": f"{len(devices)} x {kind}, {jax.local_device_count()} on this host",
        "layout": used + f" of {len(devices)}; --run.devices mesh takes all" * unused,
        "attention": build.attention_name(config),
        "parameters": f"{trained:,}" + (f" trained, {frozen:,} frozen" if frozen else ""),
        "per device": f"{of_device / 2**20:,.1f} MiB of parameters and optimizer, {share:g} of {section.batch} examples a step",
        "microbatches": f"{section.microbatches}, remat {config.model.remat}",
        "precision": config.run.precision + "; --run.precision bfloat16 is faster here, and TRL's default" * slow,
    }
    return "\n".join(f"{name:>14}  {value}" for name, value in table.items())


def write_outputs(
    run: RunDir,
    model: Model,
    variables: Variables,
    tokenizer: Any,
    *,
    card: Callable[[], str],
    write: Callable[..., tuple[Path, str]],
) -> None:
    """Writes the plots, the model card, and by `write` (of `export`) the model or adapter as a Hugging Face folder.

    All hosts call it, with `variables` as returned by `Trained.written`.
    """
    text = card() if hosts.is_first() else None
    with reported("exporting the policy"):
        folder, dtype = write(run.export, model, variables, tokenizer, card=text)
    if text is None:
        return
    from dpo_jax.plotting.training_curves import plot_training  # matplotlib: 0.4 s that need not delay the first step

    with reported("drawing plots"):
        plot_training(read_metrics(run.metrics), run.plots)
    write_text(run.card, (folder / "README.md").read_text(encoding="utf-8"))  # with the digest of the weights
    print(f"the policy is in {folder}, in {dtype}")
