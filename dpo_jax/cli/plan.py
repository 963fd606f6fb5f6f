"""`dpo-jax plan`: what training would take on a slice of TPUs. Nothing is trained, and neither weights nor data are read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.data.encode import Encoded
from dpo_jax.dpo import dpo_step
from dpo_jax.logps import CHUNK
from dpo_jax.models.flops import PairFlops, pair_flops
from dpo_jax.reference import reference_logps
from dpo_jax.runtime.chips import Chip, slice_devices, slice_of
from dpo_jax.runtime.mesh import MeshError, make_mesh, row_shards
from dpo_jax.runtime.plan import HEADROOM, Program, Work, plan_map, plan_step
from dpo_jax.runtime.rundir import write_json
from dpo_jax.step import init_state

TRIES = 8  # programs compiled at most in search of one that fits


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration on a slice: its training step and, where it was asked for, its reference pass."""

    topology: str
    chips: int
    mesh: dict[str, int]
    remat: str
    microbatches: int
    pairs: int  # a step
    row_shape: tuple[int, ...]  # rows, tokens and scored positions of each
    parameters: int
    flops_per_pair: PairFlops
    step: Program
    refs: Program | None = None

    def pairs_per_second(self) -> tuple[float, float]:
        """(nothing overlaps, everything overlaps)."""
        return self.pairs / self.step.slowest, self.pairs / self.step.fastest

    def mfu(self) -> tuple[float, float]:
        """Needed operations over what the chips could do in that time: the shared prompt once, nothing computed again."""
        peak = self.chips * slice_of(self.topology)[0].flops
        low, high = (rate * self.flops_per_pair.training / peak for rate in self.pairs_per_second())
        return low, high

    def to_json(self) -> dict[str, Any]:
        low, high = self.pairs_per_second()
        rates = {"pairs_per_second": [low, high], "mfu": list(self.mfu())} if self.step.seconds else {}
        return {**dataclasses.asdict(self), "label": "predicted, not measured", **rates}


def run(config: Config) -> int:
    jax.config.update("jax_platforms", "cpu")  # constants; what is planned for is never touched
    topology = _topology(config)
    chip, chips = slice_of(topology)
    model, source = build.model_without_weights(config, platform="tpu")
    slice_devices(topology)
    print(f"{topology}: {chips} chips of {chip.hbm_bytes / 1e9:.0f} GB; model: {source}", flush=True)
    if config.run.devices != "mesh":
        print(f"run.devices is {config.run.devices}; planned is mesh, which a pod needs")
    plans = _sweep(config, topology) if config.plan.sweep else [plan(config, topology, refs=True)]
    if config.plan.sweep:
        _print_ranking(plans)
    else:
        print(report(plans[0], chip), flush=True)
    if not any(one.step.fits for one in plans):
        plans += _nearest(config, topology)
    if config.plan.scale:
        plans += _scale(config, topology)
    out = Path(config.plan.json or f"{config.run.dir}/plan/plan.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"plans": [one.to_json() for one in plans]})
    print(f"figures: {out}")
    return 0 if plans[0].step.fits or config.plan.sweep else 2


def _topology(config: Config) -> str:
    assert config.plan.topology is not None  # checked with the configuration
    return config.plan.topology


def plan(config: Config, topology: str, *, refs: bool = False) -> Plan:
    """Compiles the step of a configuration for a slice. Raises `ConfigError` where mesh, slice, batch and model do not fit."""
    chip, chips = slice_of(topology)
    model, _ = build.model_without_weights(config, platform="tpu")
    section, sizes = config.dpo, dataclasses.asdict(config.mesh)
    prompt, completion = _lengths(config)
    flops = pair_flops(model.config, prompt=prompt, chosen=completion, rejected=completion)
    try:
        mesh = make_mesh(**sizes, devices=slice_devices(topology))
        shards = row_shards(mesh)
        parts = build.batch_parts(section, shards, layout=config.data.layout)
        work = _work(config, flops, batch=section.batch, parts=parts, microbatches=section.microbatches)
        tx = build.make_tx(section)
        step = functools.partial(dpo_step, model=model, tx=tx, loss=build.make_loss(section), microbatches=section.microbatches)
        where: dict[str, Any] = {"model": model, "mesh": mesh, "chip": chip, "units": build.whole_heads(model)}
        program = plan_step(step, functools.partial(init_state, tx=tx), work=work, **where)
        forward = None
        if refs:
            batch = _work(config, flops, batch=config.refs.batch, parts=shards, microbatches=1)
            forward = plan_map(functools.partial(reference_logps, model), work=batch, **where)
    except MeshError as error:
        raise ConfigError(f"mesh: {error}") from error
    return Plan(
        topology=topology,
        chips=chips,
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        microbatches=section.microbatches,
        pairs=section.batch,
        row_shape=tuple(work.rows.tokens.shape + work.rows.source.shape[1:]),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))),
        flops_per_pair=flops,
        step=program,
        refs=forward,
    )


def _lengths(config: Config) -> tuple[int, int]:
    """Tokens of the prompt and of each completion of the pairs that are planned for."""
    prompt = config.plan.prompt or config.data.max_prompt_length
    completion = config.plan.completion or config.data.max_length - prompt
    if completion < 1 or prompt + completion > config.data.max_length:
        raise ConfigError(
            f"plan.prompt: {prompt} and {completion} tokens of a completion do not fit data.max_length {config.data.max_length}"
        )
    return prompt, completion


def _work(config: Config, flops: PairFlops, *, batch: int, parts: int, microbatches: int) -> Work:
    prompt, completion = (np.zeros(length, np.int32) for length in _lengths(config))
    pairs = [Encoded(prompt, completion, completion, uid=str(number)) for number in range(batch)]
    layout = build.pair_layout(config, pairs, batch=batch, parts=parts)
    rows = layout.rows(pairs, ref_logps=np.zeros((batch, 2), np.float32))
    return Work(rows, batch, flops, microbatches, item_bytes=np.dtype(build.PRECISIONS[config.run.precision]).itemsize)


def _with(config: Config, *, mesh: dict[str, int], remat: str, microbatches: int, batch: int | None = None) -> Config:
    dpo = dataclasses.replace(config.dpo, microbatches=microbatches, batch=batch or config.dpo.batch)
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **mesh),
        model=dataclasses.replace(config.model, remat=remat),
        dpo=dpo,
    )


def _tried(config: Config, topology: str) -> Plan | None:
    """The plan, announced in a line; None where mesh, batch and model do not go together."""
    sizes, section = dataclasses.asdict(config.mesh), config.dpo
    name = f"{_mesh_name(sizes)}, remat {config.model.remat}, microbatches {section.microbatches}"
    try:
        one = plan(config, topology)
    except ConfigError as error:
        print(f"  {name}: not possible: {error}", flush=True)
        return None
    fits = f"peak {one.step.peak_bytes / 1e9:.1f} GB" + ("" if one.step.fits else f", does not fit: {one.step.problem}")
    rate = f", at least {one.pairs_per_second()[0]:.3g} pairs/s" if one.step.seconds else ""
    print(f"  {name}: {fits}{rate} ({one.step.compile_seconds:.0f} s to compile)", flush=True)
    return one


def _nearest(config: Config, topology: str) -> list[Plan]:
    """Plans tried, up to the first that fits: keep less, then smaller microbatches, then more cuts of the parameters."""
    print("it does not fit; trying what is near:", flush=True)
    tried: list[Plan] = []
    for candidate in itertools.islice(_nearby(config, slice_of(topology)), TRIES):
        one = _tried(candidate, topology)
        tried += [one] if one else []
        if one and one.step.fits:
            print(
                f"fits: --mesh.data {one.mesh['data']} --mesh.fsdp {one.mesh['fsdp']} --mesh.tensor {one.mesh['tensor']}",
                end=" ",
            )
            print(f"--model.remat {one.remat} --dpo.microbatches {one.microbatches}")
            return tried
    print(f"none of {len(tried)} fits: take more chips, or chips with more memory")
    return tried


def _nearby(config: Config, place: tuple[Chip, int]) -> Iterator[Config]:
    devices = place[0].cores * place[1]
    mesh, micro = dataclasses.asdict(config.mesh), config.dpo.microbatches
    kept = ("none", "save_attention", "full")
    for remat in kept[kept.index(config.model.remat) + 1 :]:
        yield _with(config, mesh=mesh, remat=remat, microbatches=micro)
    while config.dpo.batch % (2 * micro) == 0 and len(_fitting(config, devices, mesh, 2 * micro)):
        micro *= 2
        yield _with(config, mesh=mesh, remat="full", microbatches=micro)
    for tensor in (mesh["tensor"], *(n for n in (2, 4, 8) if n > mesh["tensor"])):
        cut = {"data": 1, "fsdp": devices // tensor, "tensor": tensor}
        if cut != mesh and mesh["data"] * tensor > mesh["tensor"]:
            yield from (_with(config, mesh=cut, remat="full", microbatches=n) for n in _fitting(config, devices, cut, micro))


def _fitting(config: Config, devices: int, mesh: dict[str, int], most: int) -> list[int]:
    """The largest number of microbatches up to `most` that leaves every device a pair in each; none if there is no such."""
    shards = devices // mesh["tensor"]
    return [n for n in (most, most // 2, 1) if n and config.dpo.batch % (shards * n) == 0][:1]


def _sweep(config: Config, topology: str) -> list[Plan]:
    """Every mesh with at most four ways along data, and every remat policy, best first."""
    chip, chips = slice_of(topology)
    devices = chips * chip.cores
    plans = []
    for tensor, data in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        if devices % (tensor * data):
            continue
        sizes = {"data": data, "fsdp": devices // (tensor * data), "tensor": tensor}
        for remat in ("none", "save_attention", "full"):
            for micro in _fitting(config, devices, sizes, config.dpo.microbatches):
                one = _tried(_with(config, mesh=sizes, remat=remat, microbatches=micro), topology)
                plans += [one] if one else []
    if not plans:
        raise ConfigError(
            f"dpo.batch: {config.dpo.batch} divides among no mesh of {devices} devices; use a multiple of {devices}"
        )
    return sorted(plans, key=lambda one: (not one.step.fits, one.step.slowest, one.step.peak_bytes))


def _print_ranking(plans: list[Plan]) -> None:
    print("\nranked, predicted and not measured:")
    for number, one in enumerate(plans, 1):
        low, high = one.pairs_per_second()
        rate = f"{low:8.3g} to {high:8.3g} pairs/s" if one.step.fits else "does not fit"
        print(
            f"{number:3}  {_mesh_name(one.mesh):28} remat {one.remat:14} microbatches {one.microbatches:<3} "
            f"peak {one.step.peak_bytes / 1e9:6.1f} GB  {rate}"
        )


def _scale(config: Config, topology: str) -> list[Plan]:
    """Weak scaling: as many pairs a chip on 4 to 256 chips. Parameters stay cut as on the smallest slice that holds them."""
    chip, chips = slice_of(topology)
    flat = chip.slices[0].count("x") == 1
    shapes = {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"} if flat else {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}
    print("\nweak scaling, predicted and not measured:")
    plans: list[Plan] = []
    group = 0  # ways along fsdp
    for count, shape in shapes.items():
        devices, tensor, batch = count * chip.cores, config.mesh.tensor, max(1, config.dpo.batch * count // chips)
        if devices % tensor:
            continue
        sizes = {
            "data": devices // ((group or devices // tensor) * tensor),
            "fsdp": group or devices // tensor,
            "tensor": tensor,
        }
        scaled = _with(config, mesh=sizes, remat=config.model.remat, microbatches=1, batch=batch)
        for micro in _fitting(scaled, devices, sizes, config.dpo.microbatches):
            scaled = _with(config, mesh=sizes, remat=config.model.remat, microbatches=micro, batch=batch)
            one = _tried(scaled, f"{chip.name}:{shape}")
            if one is not None:
                moved = sum(kind["moved_bytes"] for kind in one.step.collectives.values())
                print(f"    {count} chips, {batch} pairs a step: {moved / 1e9:.2f} GB sent by a device", flush=True)
                plans.append(one)
                group = sizes["fsdp"] if one.step.fits else group
    return plans


def _mesh_name(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def report(one: Plan, chip: Chip) -> str:
    """The plan as text. GB are 10^9 bytes; a device is a chip, or one of the cores that JAX sees in it."""
    step, flops, gb = one.step, one.flops_per_pair, 1e9
    memory, temporary = chip.hbm_bytes / chip.cores, step.temporary_bytes / gb
    rows, length, scored = one.row_shape
    lines = {
        "mesh": f"{_mesh_name(one.mesh)}, remat {one.remat}, {one.pairs} pairs a step in {one.microbatches} microbatches",
        "rows": f"{rows} of {length} tokens, {scored} of them scored",
        "parameters": f"{one.parameters:,}",
        "fits": "yes" if step.fits else f"NO: {step.problem}",
        "peak": f"{step.peak_bytes / gb:.2f} GB a device, {step.peak_bytes / memory:.0%} of {memory / gb:.1f} "
        f"(limit {HEADROOM:.0%})",
        "of it": f"parameters {step.parameter_bytes / gb:.2f}, optimizer {step.optimizer_bytes / gb:.2f}; "
        f"activations, gradients, buffers {temporary:.2f} GB, not all at the same time",
        "operations": f"{flops.training:.3e} a pair: trunk {3 * flops.trunk:.2e}, attention {3 * flops.attention:.2e}, "
        f"head {3 * flops.head:.2e}",
    }
    if step.seconds:
        lines |= _program_lines(one)
    if one.refs is not None:
        fits = "fits" if one.refs.fits else f"DOES NOT FIT: {one.refs.problem}"
        lines["refs"] = f"{fits}, peak {one.refs.peak_bytes / gb:.2f} GB"
    return "\n".join(f"{name:11} {text}" for name, text in lines.items())


def _program_lines(one: Plan) -> dict[str, str]:
    step, seconds = one.step, one.step.seconds
    (low, high), (mfu_low, mfu_high) = one.pairs_per_second(), one.mfu()
    lines = {"computed": f"{step.matmul_flops:.3e} a device and step in matrix products, padding and repetition included"}
    for kind, found in step.collectives.items():
        count, held, sent = found["count"], found["operand_bytes"] / 1e9, found["moved_bytes"] / 1e9
        lines[kind] = f"{count:,.0f} a step of {held:.2f} GB in all, {sent:.2f} GB sent by a device"
    if step.unknown_loops:
        lines["loops"] = f"{step.unknown_loops} say nowhere how often they run; what is in them counts once"
    whole = f": MORE THAN {CHUNK:,} AT ONCE" if step.logits_tokens > CHUNK else ""
    lines["logits"] = (
        f"largest buffer {step.logits_tokens:,} tokens x vocabulary; a device scores {step.scored_tokens:,} at a time{whole}"
    )
    lines["seconds"] = f"compute {seconds['compute']:.3f}, memory {seconds['memory']:.3f}, links {seconds['links']:.3f} at peak"
    lines["predicted"] = (
        f"{low:.3g} to {high:.3g} pairs/s, MFU {mfu_low:.0%} to {mfu_high:.0%}, if these three overlap not at all, or fully; "
        "not measured"
    )
    lines["compiled in"] = f"{step.compile_seconds:.0f} s"
    return lines
