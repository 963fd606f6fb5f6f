"""Messages of a training command before its first step: sizes, devices, and notes on settings that are often wrong."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import jax

from dpo_jax import loss_table
from dpo_jax.cli import build
from dpo_jax.cli.config import Config, DpoConfig, SftConfig
from dpo_jax.cli.model_folders import saved_steps
from dpo_jax.cli.preflight.devices import empty_rows
from dpo_jax.cli.splits import truncation_note
from dpo_jax.cli.training_plan import TrainingPlan
from dpo_jax.data.terminal import printable
from dpo_jax.runtime import hosts
from dpo_jax.runtime.mesh import mesh_sizes
from dpo_jax.runtime.mesh_shape import mesh_words
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.runtime.seal import is_remote
from dpo_jax.types import Partitioner, TrainState

PLAIN_TEXTS = (
    "the data are plain texts, so the chat template of the tokenizer is not used; for an instruct model set data.format: "
    "chat_texts, which renders them as chat turns"
)


def announce(
    config: Config,
    run: RunDir,
    section: SftConfig | DpoConfig,
    plan: TrainingPlan,
    state: TrainState,
    partitioner: Partitioner,
) -> None:
    """Prints the sizes of data, model and devices, and the notes that apply. `state` is on the devices."""
    data = plan.data
    examples = loss_table.example_word(section.loss) if isinstance(section, DpoConfig) else "texts"
    print(
        f"{len(data.train):,} {examples} to train on, {len(data.held_out):,} held out; "
        f"rows of {plan.layout.length} tokens\n{_device_summary(config, section, state, partitioner)}",
        flush=True,
    )
    rendered = config.data.rendered or any(report.chat for report in data.reports)
    unused_template = isinstance(section, DpoConfig) and plan.record["chat template"] and not rendered
    rows = empty_rows(section, partitioner.row_shards)
    notes = [
        *(printable(line) for line in (truncation_note(config, report) for report in data.reports) if line),
        _long_warmup(section, plan.steps),
        f"{run.path.name}.{rows}" if rows else None,
        _full_disk(config, run, state),
        PLAIN_TEXTS if unused_template else None,
    ]
    for note in filter(None, notes):
        print(f"note: {note}", flush=True)


def _long_warmup(section: SftConfig | DpoConfig, steps: int) -> str | None:
    warmup, option = section.warmup(steps), "warmup_steps" if section.warmup_ratio is None else "warmup_ratio"
    if not 0 < steps <= warmup:
        return None
    reached = float(build.make_schedule(section, steps=steps)(steps - 1)) / section.lr
    return (
        f"warm-up takes {warmup} steps, and the run has {steps}: the learning rate reaches only {reached:.0%} of "
        f"{section.lr:g} ({option})"
    )


def _full_disk(config: Config, run: RunDir, state: TrainState) -> str | None:
    """A note if the checkpoints still to be written do not fit on the disk."""
    if is_remote(place := config.checkpoints_of(run.path.name)) or not hosts.is_first():
        return None
    directory = Path(place)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.replace(frozen={})))
    size //= jax.local_device_count() if config.run.devices == "pmap" else 1
    disk = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    # One more than is kept: the oldest is deleted only after the next one is written.
    missing = max(1, config.run.max_to_keep + 1 - len(saved_steps(place)))
    needed, free = size * missing, shutil.disk_usage(disk).free
    if needed <= free:
        return None
    return (
        f"the run needs space for {missing} more checkpoints of {size / 1e9:,.1f} GB, {needed / 1e9:,.1f} GB in all, but "
        f"{disk} has {free / 1e9:,.1f} GB free (run.checkpoints, run.max_to_keep)"
    )


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
        "per device": f"{of_device / 2**20:,.1f} MiB of parameters and optimizer, {share:g} of {section.batch} examples/step",
        "microbatches": f"{section.microbatches}, remat {config.model.remat}",
        "precision": config.run.precision + "; --run.precision bfloat16 is faster here, and TRL's default" * slow,
    }
    return "\n".join(f"{name:>14}  {value}" for name, value in table.items())
