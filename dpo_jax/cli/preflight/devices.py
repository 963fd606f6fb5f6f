"""`--check` of devices: whether mesh, batch and model divide among them. Needs no JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from dpo_jax.cli.config import Config, ConfigError, DpoConfig, SftConfig, TrainingConfig
from dpo_jax.cli.model_folders import planned_hf_config
from dpo_jax.cli.preflight.inputs import Check
from dpo_jax.models.families import decoder_config
from dpo_jax.models.logical_axes import axis_lengths, whole_heads
from dpo_jax.runtime.mesh_shape import MeshError, check_lengths, mesh_shape, mesh_words

MOST_OF_A_HOST = 8  # most devices of any TPU or GPU machine on the market


def batch_parts(section: TrainingConfig, row_shards: int, *, layout: str) -> int:
    """Number of parts into which the rows of a batch are split. Raises `ConfigError` if the batch does not divide."""
    parts = row_shards * section.microbatches
    if layout != "packed" and section.batch % parts:
        raise ConfigError(
            f"{section.name}.batch: {section.batch} cannot be split over {row_shards} devices x {section.microbatches} "
            f"microbatches; the nearest batch that can is {max(1, round(section.batch / parts)) * parts}"
        )
    return parts


def empty_rows(section: TrainingConfig, row_shards: int) -> str | None:
    """A warning, beginning with the option, if a step computes rows without any example."""
    parts = row_shards * section.microbatches
    if section.batch < row_shards:
        idle = f"at least {row_shards - section.batch} of the {row_shards} devices are idle"
        return f"batch: with {section.batch} examples a step, {idle}"
    if section.batch < parts and row_shards > 1:
        return (
            f"microbatches: {section.microbatches} x {row_shards} devices make {parts} rows a step, of which {section.batch} "
            f"examples fill at most {section.batch}: with {section.batch // row_shards} or less, none is empty"
        )
    return None


def devices(check: Check) -> None:
    config, count = check.config, check.scope.devices
    if check.scope.elsewhere is None and (half := config.run.half_given()) is not None:
        raise ConfigError(f"run.distributed: {half}: give all three or none")
    if config.run.devices == "single":
        if config.run.distributed == "auto" and count is not None and count > MOST_OF_A_HOST:
            raise ConfigError(f"run.devices: single uses one device, but {count} are on several hosts; use mesh or pmap")
        unused = f" of {count}: run.devices mesh or pmap takes all" if count is not None and count > 1 else ""
        check.tell("devices", f"one{unused}")
    elif config.run.devices == "pmap":
        check.tell("devices", f"pmap over {count or 'all'}")
    else:
        sizes = dataclasses.asdict(config.mesh)
        if count is not None:
            sizes = _mesh(config, count)
        check.tell("devices", mesh_words({axis: size if size > 0 else "the rest" for axis, size in sizes.items()}))
        _refuse_uneven(check, sizes)


def _mesh(config: Config, count: int) -> dict[str, int]:
    """{axis: size} of the mesh over `count` devices. Raises `ConfigError` if they do not divide."""
    asked = dataclasses.asdict(config.mesh)
    try:
        return dict(zip(asked, mesh_shape(count, **asked), strict=True))
    except MeshError as error:
        raise ConfigError(f"mesh: {error}") from error


def _refuse_uneven(check: Check, sizes: Mapping[str, int]) -> None:
    """Raises `ConfigError` if a model does not divide among the devices. Sizes below 1 are unknown, and pass."""
    for path, decoder in check.decoders.items():
        lengths = axis_lengths(decoder)
        if decoder.vocab_size == 1:  # for a tokenizer that does not exist yet
            del lengths["vocab"]
        try:
            check_lengths(lengths, {axis: max(size, 1) for axis, size in sizes.items()}, units=whole_heads(decoder))
        except MeshError as error:
            raise ConfigError(f"mesh: {path}: {error}") from error


def row_shards(config: Config, count: int | None) -> int | None:
    """Number of parts into which the rows of a batch are sharded over `count` devices; None if that depends on their unknown
    number."""
    if config.run.devices == "single":
        return 1
    if config.run.devices == "pmap":
        return count
    mesh = config.mesh
    if -1 not in (mesh.data, mesh.fsdp, mesh.expert):
        return mesh.data * mesh.fsdp * mesh.expert
    fixed = mesh.data * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor
    return None if count is None or count % fixed else count // (mesh.context * mesh.tensor)


def training(task: str) -> Callable[[Check], None]:
    def look(check: Check) -> None:
        config = check.config
        section: SftConfig | DpoConfig = getattr(config, task)
        if (shards := row_shards(check.config, check.scope.devices)) is not None:
            layout = "plain" if task == "sft" and config.data.layout == "shared" else config.data.layout
            batch_parts(section, shards, layout=layout)
            if warning := empty_rows(section, shards):
                check.warn(f"{task}.{warning}")
        steps = ""
        if section.steps is not None:
            check.tell("training", f"batches of {section.batch}, {section.steps:,} steps")
            return
        if check.rows is not None:
            steps = f", at most {math.ceil(check.rows * section.epochs / section.batch):,} steps"
        check.tell("training", f"batches of {section.batch}, {section.epochs:g} epochs{steps}")

    return look


def plan(check: Check) -> None:
    """The target of `plan`: the chips, and one mesh over them, unless it tries many."""
    from dpo_jax.runtime.chips import slice_of

    config = check.config
    chip, chips = slice_of(config.plan.topology or "")
    check.tell("devices", f"{chips} of {chip.name}")
    hf, source = planned_hf_config(config)
    check.decoders[source] = decoder_config(hf, where=source)
    if not config.plan.sweep:
        sizes = _mesh(config, chips * chip.cores)
        batch_parts(config.dpo, sizes["data"] * sizes["fsdp"] * sizes["expert"], layout=config.data.layout)
        _refuse_uneven(check, sizes)


def compiler(check: Check) -> None:
    """The compiler that `plan` uses."""
    from dpo_jax.runtime.chips import check_compiler, slice_of

    check_compiler(slice_of(check.config.plan.topology or "")[0])
