"""Compile a training step for absent TPUs or GPUs, and report its memory, collectives and time.

The programs are the real ones, with the shardings of `runtime.parallel.mesh_partitioner`. Arguments are only shapes, so no
weights are allocated. Memory is as reported by the compiler. Times are bounds from the table of `runtime.chips`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.head import head_chunk
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.flops import PairFlops, layer_weights, layer_widths
from dpo_jax.models.grouped_product import MOST_ROWS
from dpo_jax.runtime.chips import Chip
from dpo_jax.runtime.hlo import Summary, shapes, summarize
from dpo_jax.runtime.mesh import Units, token_shards
from dpo_jax.runtime.parallel import abstract_state, jit_map, jit_step
from dpo_jax.types import Model, Rows, TrainState, Variables

# Usable share of the memory. The rest is for the next batch, differences between compiler versions, and on GPUs for CUDA, the
# buffers of NCCL (1 to 2 GB) and fragmentation: JAX reserves `check.GPU_MEMORY` of a GPU.
HEADROOM = 0.9
# libtpu's two messages. The second excludes the arguments: parameters and optimizer state come on top.
_OUT_OF_MEMORY = (
    r"Ran out of memory in memory space hbm. Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program. Bytes, operations and seconds are for one device and one call.

    `seconds` are separate lower bounds at peak rates: "compute" (matrix products found in the program, and those inside
    attention kernels by formula), "memory" (TPUs: weights, activations and optimizer state, by formula; GPUs: what every
    operation of the program reads and writes), "links" (bytes that the collectives send over all links of the chip, and for
    GPUs over the network between hosts).
    """

    fits: bool
    peak_bytes: float
    parameter_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    temporary_bytes: float = 0.0
    matmul_flops: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    logits_tokens: int = 0  # most tokens of a buffer with a number per vocabulary entry
    head_chunk: int = 0  # intended tokens per chunk of the head
    scored_tokens: int = 0  # on this device at a time; if `logits_tokens` equals this, all logits are in memory at once
    kernels: float = 0.0
    unknown_loops: int = 0
    traffic_bytes: float = 0.0  # see `hlo.Summary`; on TPUs an upper bound only, because fusions keep more on the chip
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    problem: str = ""

    @property
    def fastest(self) -> float:
        """Seconds, if all three overlap completely."""
        return max(self.seconds.values(), default=math.inf)

    @property
    def slowest(self) -> float:
        """Seconds, if nothing overlaps."""
        return sum(self.seconds.values()) if self.seconds else math.inf


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a mesh: one optimizer step, or one batch of the reference pass."""

    rows: Rows  # shapes are enough
    pairs: int
    flops: PairFlops
    microbatches: int = 1
    item_bytes: int = 2  # bytes per activation


def plan_step(
    step: Callable[..., Any],
    make: Callable[[Variables], TrainState],
    *,
    model: Model,
    mesh: Mesh,
    chip: Chip,
    work: Work,
    units: Units | None = None,
    host_devices: int | None = None,
) -> Program:
    """Plan the training step `step(state, rows)` with state `make(variables)`. Raises `MeshError` if a parameter does not fit
    the mesh."""
    state, rows = abstract_state(mesh, model, make, work.rows, units=units)
    where = _Where(model.config, mesh, chip, work, host_devices, backward=True)
    return _plan(jit_step(step, state, mesh), state, rows, where)


def plan_map(
    fn: Callable[..., Any],
    *,
    model: Model,
    mesh: Mesh,
    chip: Chip,
    work: Work,
    units: Units | None = None,
    host_devices: int | None = None,
) -> Program:
    """Plan a forward pass `fn(variables, rows)`."""
    state, rows = abstract_state(mesh, model, _only_variables, work.rows, units=units)
    where = _Where(model.config, mesh, chip, work, host_devices, backward=False)
    return _plan(jit_map(fn, mesh), state.variables, rows, where)


def _only_variables(variables: Variables) -> TrainState:
    return TrainState(step=jax.numpy.zeros((), jax.numpy.int32), params=variables, opt_state=())


@dataclasses.dataclass(frozen=True)
class _Where:
    """The work and hardware of a program. `host_devices`: GPUs per host; None: links cross hosts."""

    config: DecoderConfig
    mesh: Mesh
    chip: Chip
    work: Work
    host_devices: int | None
    backward: bool


def _plan(compiled: Any, first: Any, rows: Rows, where: _Where) -> Program:
    begin, chip, mesh = time.perf_counter(), where.chip, where.mesh
    scored = rows.source.shape[0] * rows.source.shape[1] // (token_shards(mesh) * where.work.microbatches)
    state = first if isinstance(first, TrainState) else TrainState(0, first, ())  # pyright: ignore[reportArgumentType]
    held = tree_bytes(state.variables), tree_bytes(state.opt_state)
    with jax.set_mesh(mesh):
        lowered = compiled.lower(first, rows)
        try:
            program = lowered.compile(compiler_options=chip.compiler_options)
        except Exception as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            seconds = time.perf_counter() - begin
            return Program(False, needed[0], *held, scored_tokens=scored, compile_seconds=seconds, problem=needed[1])
    seconds, memory, text = time.perf_counter() - begin, program.memory_analysis(), program.as_text()
    found, peak = summarize(text, host_devices=where.host_devices), float(memory.peak_memory_in_bytes)
    found = _with_experts(found, rows, where)
    problem = _problem(peak, chip.hbm_bytes / chip.cores)
    return Program(
        not problem,
        peak,
        *held,
        temporary_bytes=float(memory.temp_size_in_bytes),
        matmul_flops=found.matmul_flops,
        collectives={kind: dataclasses.asdict(one) for kind, one in sorted(found.collectives.items())},
        logits_tokens=logits_tokens(text, where.config, mesh),
        head_chunk=head_chunk(where.config.width),
        scored_tokens=scored,
        kernels=found.kernels,
        unknown_loops=found.unknown_loops,
        traffic_bytes=found.traffic_bytes,
        seconds=_seconds(found, first, rows, where),
        compile_seconds=seconds,
        problem=problem,
    )


def _with_experts(found: Summary, rows: Rows, where: _Where) -> Summary:
    """Adds the products whose length depends on routing, by formula, as if every expert had the same number of tokens; a
    block's matrix is read once for the rows of a block."""
    c, mesh, parts = where.config, where.mesh, token_shards(where.mesh) * where.work.microbatches
    tokens = rows.tokens.shape[0] * rows.tokens.shape[1] * c.experts_per_token / parts
    kernel = c.width * c.mlp_width / mesh.shape["tensor"]
    numbers = tokens * (c.width + c.mlp_width / mesh.shape["tensor"]) + max(1.0, tokens / MOST_ROWS) * kernel
    return dataclasses.replace(
        found,
        matmul_flops=found.matmul_flops + found.routed * 2 * tokens * kernel,
        traffic_bytes=found.traffic_bytes + found.routed * numbers * where.work.item_bytes,
    )


def _problem(peak: float, memory: float) -> str:
    """Why a program does not fit; "" if it does. The compiler for GPUs never runs out of memory itself."""
    if peak > memory:
        return f"needs {peak / 1e9:.1f} GB, but the device has {memory / 1e9:.1f} GB"
    return "" if peak <= HEADROOM * memory else f"less than {1 - HEADROOM:.0%} of the memory is free"


def out_of_memory(message: str) -> tuple[float, str] | None:
    """(bytes needed on one device, one sentence) from the compiler's error; None for any other error."""
    for pattern in _OUT_OF_MEMORY:
        found = re.search(pattern, message)
        if found is not None:
            used, has = _size(found[1], found[2]), _size(found[3], found[4])
            return used, f"needs {used / 1e9:.1f} GB, but the device has {has / 1e9:.1f} GB"
    return None


def _size(number: str, unit: str) -> float:
    return float(number) * 1024.0 ** " KMGT".index(unit or " ")


def logits_tokens(text: str, config: DecoderConfig, mesh: Mesh) -> int:
    """Tokens of the largest buffer with a number per token and vocabulary entry, parameters excluded."""
    vocab = {config.vocab_size, -(-config.vocab_size // mesh.shape["tensor"])}
    widths = {config.width, -(-config.width // mesh.shape["fsdp"])}
    most = 0
    for _, lengths in set(shapes(text)):
        others = [n for n in lengths if n != 1]
        here = next((n for n in others if n in vocab), None)
        if here is not None:
            others.remove(here)
            tokens = math.prod(others)
            most = max(most, 0 if tokens in widths else tokens)
    return most


def _seconds(found: Summary, first: Any, rows: Rows, where: _Where) -> dict[str, float]:
    """Lower bounds in seconds; see `Program`."""
    chip, config, work = where.chip, where.config, where.work
    # Along a context axis each call is one turn of the ring, with a part of the keys.
    calls = found.kernels / (config.layers * work.microbatches * where.mesh.shape["context"])
    # The forward kernel has two matrix products, the backward ones have seven, because each recomputes the scores.
    again = 0.0 if not calls else calls - 2 + 3.5 if where.backward else calls
    flops = found.matmul_flops + again * work.pairs * work.flops.attention / where.mesh.size
    moved = found.traffic_bytes if chip.gpu else _moved(first, rows, where)
    collectives = found.collectives.values()
    near = sum(one.moved_bytes - one.crossing_bytes for one in collectives)
    return {
        "compute": flops / (chip.flops / chip.cores),
        "memory": moved / (chip.hbm_bandwidth / chip.cores),
        "links": near / (chip.link_bandwidth / chip.cores) + sum(one.network_bytes for one in collectives) / chip.network,
    }


def _moved(first: Any, rows: Rows, where: _Where) -> float:
    """Memory traffic in bytes by formula: the layers' gathered weights, once forward and twice backward per microbatch; inputs
    and outputs of matrix products, likewise; parameters, gradients and optimizer state, each read and written once."""
    config, work, passes, tensor = where.config, where.work, 3 if where.backward else 1, where.mesh.shape["tensor"]
    weights = config.layers * layer_weights(config) / tensor * work.microbatches
    tokens = rows.tokens.shape[0] * rows.tokens.shape[1] / token_shards(where.mesh)
    activations = tokens * config.layers * layer_widths(config) / tensor
    return passes * (work.item_bytes * (weights + activations) + tree_bytes(first))


def tree_bytes(tree: Any) -> float:
    """Bytes of one device's part of a tree of sharded arrays or their shapes."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
