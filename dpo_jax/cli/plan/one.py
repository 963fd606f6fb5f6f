"""Compile one configuration for one slice of TPUs or set of GPUs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from dpo_jax import loss_table
from dpo_jax.cli import build
from dpo_jax.cli.balancing import router_aux_loss
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.trainable import planned_trainable
from dpo_jax.data.encode import Encoded
from dpo_jax.dpo import dpo_step
from dpo_jax.models.attention_paths import path_name
from dpo_jax.models.flops import PairFlops, pair_flops
from dpo_jax.models.logical_axes import whole_heads
from dpo_jax.reference import reference_logps
from dpo_jax.runtime.chips import host_devices, slice_devices, slice_of
from dpo_jax.runtime.compiling import without_kept_programs
from dpo_jax.runtime.mesh import MeshError, make_mesh, row_shards
from dpo_jax.runtime.plan import Program, Work, plan_map, plan_step
from dpo_jax.runtime.progress import reported


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration on a TPU slice or GPU hosts: its training step and, if requested, its reference pass."""

    topology: str
    chips: int
    mesh: dict[str, int]
    attention: str
    remat: str
    microbatches: int
    pairs: int  # per step
    row_shape: tuple[int, ...]  # rows, tokens and scored positions of each
    parameters: int
    flops_per_pair: PairFlops
    step: Program
    refs: Program | None = None

    def pairs_per_second(self) -> tuple[float, float]:
        """(if nothing overlaps, if everything overlaps)."""
        return self.pairs / self.step.slowest, self.pairs / self.step.fastest

    def mfu(self) -> tuple[float, float]:
        """Necessary operations relative to what the chips could do in that time: shared prompt once, no recomputation."""
        peak = self.chips * slice_of(self.topology)[0].flops
        low, high = (rate * self.flops_per_pair.training / peak for rate in self.pairs_per_second())
        return low, high

    def to_json(self) -> dict[str, Any]:
        low, high = self.pairs_per_second()
        rates = {"pairs_per_second": [low, high], "mfu": list(self.mfu())} if self.step.seconds else {}
        return {**dataclasses.asdict(self), "label": "predicted, not measured", **rates}


def plan(config: Config, topology: str, *, refs: bool = False) -> Plan:
    """Compiles the step of a configuration. Raises `ConfigError` if mesh, topology, batch and model do not fit together."""
    chip, chips = slice_of(topology)
    model, _ = build.model_without_weights(config, platform=chip.platform)
    section, sizes = config.dpo, dataclasses.asdict(config.mesh)
    prompt, completion = _lengths(config)
    flops = pair_flops(model.config, prompt=prompt, chosen=completion, rejected=completion)
    try:
        mesh = make_mesh(**sizes, devices=slice_devices(topology))
        shards = row_shards(mesh)
        parts = build.batch_parts(section, shards, layout=config.data.layout)
        work = _work(config, flops, batch=section.batch, parts=parts, microbatches=section.microbatches)
        trainable, tx = planned_trainable(config, section, model), build.make_tx(section)
        flops = flops._replace(frozen=trainable.lora is not None)
        step = functools.partial(
            dpo_step,
            model=trainable.model,
            tx=tx,
            loss=build.make_loss(section),
            ld_alpha=section.ld_alpha,
            router_aux_loss=router_aux_loss(section, model),
            microbatches=section.microbatches,
        )
        where: dict[str, Any] = {"mesh": mesh, "chip": chip, "units": whole_heads(model.config)}
        where["host_devices"] = host_devices(topology)
        with reported(f"compiling the step for {topology}", brief=True), without_kept_programs():
            program = plan_step(step, functools.partial(trainable.state, tx=tx), model=trainable.model, work=work, **where)
        forward = None
        if refs:
            batch = _work(config, flops, batch=config.refs.batch, parts=shards, microbatches=1)
            with reported(f"compiling the reference pass for {topology}", brief=True), without_kept_programs():
                forward = plan_map(functools.partial(reference_logps, model), model=trainable.stored(), work=batch, **where)
    except MeshError as error:
        raise ConfigError(f"mesh: {error}") from error
    return Plan(
        topology=topology,
        chips=chips,
        mesh=dict(mesh.shape),
        attention=path_name(config.model.attention, chip.platform),
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
    """Tokens of the prompt and of each completion of the planned pairs."""
    prompt = config.plan.prompt or config.data.max_prompt_length
    completion = config.plan.completion or config.data.max_length - prompt
    if completion < 1 or prompt + completion > config.data.max_length:
        raise ConfigError(
            f"plan.prompt: {prompt} tokens and a completion of {completion} do not fit data.max_length {config.data.max_length}"
        )
    sides, row = 1 if loss_table.rows_of(config.dpo.loss) == "unpaired" else 2, config.data.row_length
    if config.data.layout != "plain" and row is not None and (needed := prompt + sides * completion) > row:
        raise ConfigError(
            f"data.row_length: a row of {row} tokens cannot hold an example of {needed} (a prompt of {prompt}, completions of "
            f"{completion}); set it to {needed} or more, or set plan.prompt and plan.completion"
        )
    return prompt, completion


def _work(config: Config, flops: PairFlops, *, batch: int, parts: int, microbatches: int) -> Work:
    prompt, completion = (np.zeros(length, np.int32) for length in _lengths(config))
    kind = loss_table.rows_of(config.dpo.loss)
    if kind == "rankings":
        raise ConfigError(f"dpo.loss: plan counts two completions an example, but {config.dpo.loss} has more; use dpo")
    label = True if kind == "unpaired" else None
    pairs = [Encoded(prompt, completion, completion, uid=str(number), desirable=label) for number in range(batch)]
    layout = build.row_layout(config, pairs, batch=batch, parts=parts)
    rows = layout.rows(pairs, ref_logps=np.zeros((batch, 2), np.float32))
    return Work(rows, batch, flops, microbatches, item_bytes=np.dtype(build.PRECISIONS[config.run.precision]).itemsize)
