"""Compiles variants of a configuration: the nearest that fits, a ranking of meshes, and weak scaling."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.plan.one import Plan, plan
from dpo_jax.runtime.chips import Chip, slice_of
from dpo_jax.runtime.mesh_shape import MeshError, mesh_shape, mesh_words

TRIES = 8  # most programs compiled in search of one that fits


def _with(config: Config, *, mesh: dict[str, int], remat: str, microbatches: int, batch: int | None = None) -> Config:
    dpo = dataclasses.replace(config.dpo, microbatches=microbatches, batch=batch or config.dpo.batch)
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **mesh),
        model=dataclasses.replace(config.model, remat=remat),
        dpo=dpo,
    )


def _tried(config: Config, topology: str) -> Plan | None:
    """The plan, announced in a line; None if mesh, batch and model do not fit together."""
    sizes, section = dataclasses.asdict(config.mesh), config.dpo
    name = f"{mesh_words(sizes)}, remat {config.model.remat}, microbatches {section.microbatches}"
    try:
        one = plan(config, topology)
    except ConfigError as error:
        print(f"  {name}: not possible: {error}", flush=True)
        return None
    fits = f"peak {one.step.peak_bytes / 1e9:.1f} GB" + ("" if one.step.fits else f", does not fit: {one.step.problem}")
    rate = f", at least {one.pairs_per_second()[0]:.3g} pairs/s" if one.step.seconds else ""
    print(f"  {name}: {fits}{rate} ({one.step.compile_seconds:.0f} s to compile)", flush=True)
    return one


def nearest(config: Config, topology: str) -> list[Plan]:
    """Plans tried, up to the first that fits: more remat, then smaller microbatches, then more shards of the parameters."""
    print("it does not fit; trying nearby settings:", flush=True)
    tried: list[Plan] = []
    for candidate in itertools.islice(_nearby(config, slice_of(topology)), TRIES):
        one = _tried(candidate, topology)
        tried += [one] if one else []
        if one and one.step.fits:
            print("fits:", *(f"--mesh.{axis} {size}" for axis, size in one.mesh.items()), end=" ")
            print(f"--model.remat {one.remat} --dpo.microbatches {one.microbatches}")
            return tried
    print(f"none of {len(tried)} fits: use more chips, or chips with more memory")
    return tried


def _nearby(config: Config, place: tuple[Chip, int]) -> Iterator[Config]:
    devices = place[0].cores * place[1]
    asked = dataclasses.asdict(config.mesh)
    micro = config.dpo.microbatches
    try:
        mesh = dict(zip(asked, mesh_shape(devices, **asked), strict=True))
    except MeshError:  # after a sweep, which does not read it
        mesh = asked | {"data": 1, "fsdp": devices // (asked["expert"] * asked["context"]), "tensor": 1}
    kept = ("none", "save_attention", "full")
    for remat in kept[kept.index(config.model.remat) + 1 :]:
        yield _with(config, mesh=mesh, remat=remat, microbatches=micro)
    while 2 * micro in _fitting(config, devices, mesh, 2 * micro):
        micro *= 2
        yield _with(config, mesh=mesh, remat="full", microbatches=micro)
    context = mesh["context"]
    for tensor in (mesh["tensor"], *(n for n in (2, 4, 8) if n > mesh["tensor"])):
        copies = mesh["expert"] * context * tensor
        cut = {"data": 1, "fsdp": devices // copies, "expert": mesh["expert"], "context": context, "tensor": tensor}
        if cut != mesh and mesh["data"] * tensor > mesh["tensor"]:
            yield from (_with(config, mesh=cut, remat="full", microbatches=n) for n in _fitting(config, devices, cut, micro))


def _fitting(config: Config, devices: int, mesh: dict[str, int], most: int) -> list[int]:
    """The largest number of microbatches up to `most` that leaves every device a pair in each; none if there is none."""
    shards = devices // (mesh["context"] * mesh["tensor"])
    return [n for n in range(most, 0, -1) if config.dpo.batch % (shards * n) == 0][:1]


def sweep(config: Config, topology: str) -> list[Plan]:
    """Plans for meshes (at most four ways along data) and all remat policies, in one microbatch and in the configured
    number, best first. For a mixture of experts also every number of ways along expert that `_expert_ways` returns."""
    chip, chips = slice_of(topology)
    devices, context = chips * chip.cores, config.mesh.context
    model, _ = build.model_without_weights(config, platform=chip.platform)
    plans = []
    for expert, tensor, data in itertools.product(_expert_ways(config, model.config.experts), (1, 2, 4, 8), (1, 2, 4)):
        copies = data * expert * context * tensor
        if devices % copies:
            continue
        sizes = {"data": data, "fsdp": devices // copies, "expert": expert, "context": context, "tensor": tensor}
        micros = {n for most in (1, config.dpo.microbatches) for n in _fitting(config, devices, sizes, most)}
        for remat in ("none", "save_attention", "full"):
            for micro in sorted(micros):
                one = _tried(_with(config, mesh=sizes, remat=remat, microbatches=micro), topology)
                plans += [one] if one else []
    if not plans:
        raise ConfigError(
            f"dpo.batch: {config.dpo.batch} cannot be split over any mesh of {devices} devices; use a multiple of {devices}"
        )
    return sorted(plans, key=lambda one: (not one.step.fits, one.step.slowest, one.step.peak_bytes))


def _expert_ways(config: Config, experts: int) -> list[int]:
    """1, 4 and 8, if they divide the experts, and the configured number; for a dense model only the latter."""
    return sorted({config.mesh.expert, *(n for n in (1, 4, 8) if experts and experts % n == 0)})


def scale(config: Config, topology: str) -> list[Plan]:
    """Weak scaling: the same number of pairs per chip on 4 to 256 chips, or on 1 to 8 hosts of GPUs. Parameters stay sharded
    as on the smallest number of chips that holds them."""
    chip, chips = slice_of(topology)
    print("\nweak scaling, predicted and not measured:")
    plans: list[Plan] = []
    group = 0  # ways along fsdp
    for count, shape in _scaled_shapes(chip).items():
        devices, batch = count * chip.cores, max(1, config.dpo.batch * count // chips)
        expert, context, tensor = config.mesh.expert, config.mesh.context, config.mesh.tensor
        copies = expert * context * tensor
        if devices % copies:
            continue
        fsdp = group or devices // copies
        sizes = {"data": devices // (fsdp * copies), "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
        scaled = _with(config, mesh=sizes, remat=config.model.remat, microbatches=1, batch=batch)
        for micro in _fitting(scaled, devices, sizes, config.dpo.microbatches):
            scaled = _with(config, mesh=sizes, remat=config.model.remat, microbatches=micro, batch=batch)
            one = _tried(scaled, f"{chip.name}:{shape}")
            if one is not None:
                moved = sum(kind["moved_bytes"] for kind in one.step.collectives.values())
                print(f"    {count} chips, {batch} pairs a step: {moved / 1e9:.2f} GB sent per device", flush=True)
                plans.append(one)
                group = sizes["fsdp"] if one.step.fits else group
    return plans


def _scaled_shapes(chip: Chip) -> dict[int, str]:
    """{chips: shape} of the sizes for which `scale` plans."""
    if chip.gpu:
        return {8: "8", 16: "2x8", 32: "4x8", 64: "8x8"}
    if chip.slices[0].count("x") == 1:
        return {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
    return {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}
