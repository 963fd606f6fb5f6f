"""Ablation ladder of our DPO step, from the literal step to that of `dpo-jax dpo`: each rung removes one kind of wasted work.

The last rung is the product's code and settings. The rungs below it undo optimizations here, on top of the same public
functions: a live reference calls `reference_logps` in the step, and a head over all positions comes from rows that score all
positions.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.bench.work import Work, by_length, longer_side, pairs_of_step, peak_memory, read_pairs
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout
from dpo_jax.data.loader import Batch, make_batch, round_up
from dpo_jax.dpo import PreferenceLoss, dpo_objective, dpo_step
from dpo_jax.losses import dpo_loss
from dpo_jax.models.hf import load_hf, save_hf
from dpo_jax.reference import reference_logps
from dpo_jax.runtime.compiling import keep_programs
from dpo_jax.runtime.fit import fit
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.step import apply_gradients, init_state, mean_grads
from dpo_jax.types import Metrics, Model, Rows, TrainState, Variables
from dpo_jax.writing import write_text

BUCKET = 64  # row lengths of length-grouped microbatches are rounded up to this


class Rung(NamedTuple):
    kind: str
    live: bool = False
    grouped: bool = False
    whole_head: bool = True
    attention: str = "dense"


RUNGS = {
    "jax-live": Rung("plain", live=True),
    "jax-cached": Rung("plain"),
    "jax-buckets": Rung("plain", grouped=True),
    "jax-shared": Rung("shared", grouped=True),
    "jax-packed": Rung("packed"),
    "jax-head": Rung("packed", whole_head=False),
    "jax-attention": Rung("packed", whole_head=False, attention="auto"),
}


class Compiled:
    """`jax.jit` that compiles each shape ahead of time, so that compilation is timed and no timed step pays for it.

    `last` are arguments appended to every call.
    """

    def __init__(self, function: Callable[..., Any], *, donate: tuple[int, ...] = (), last: tuple[Any, ...] = ()) -> None:
        self._jit, self._last = jax.jit(function, donate_argnums=donate), last
        self.programs: dict[Any, Any] = {}
        self.seconds = 0.0

    def prepare(self, *args: Any) -> Callable[..., Any]:
        shapes = jax.tree.structure(args), *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        if shapes not in self.programs:
            start = time.perf_counter()
            self.programs[shapes] = self._jit.lower(*args, *self._last).compile()
            self.seconds += time.perf_counter() - start
        return self.programs[shapes]

    def __call__(self, *args: Any) -> Any:
        return self.prepare(*args)(*args, *self._last)


def run(work: Work, name: str, *, steps: int, trace: str | None = None, weights: Path | None = None) -> dict[str, Any]:
    """Takes `steps` optimizer steps with `runtime.fit.fit`, the product's loop. Returns the same as `torch_loop.run`, plus
    compile seconds, the number of compiled shapes, and the loader's seconds per batch when nothing else runs.
    """
    keep_programs(work.compiled(name))
    rung, pairs = RUNGS[name], read_pairs(work)
    model, variables = load_hf(work.model, dtype=jnp.dtype(work.precision), remat=work.remat, attention=rung.attention)
    layouts = {kind: Layout(**fields) for kind, fields in work.layouts.items()}
    make = functools.partial(step_batch, work, pairs, rung=rung, layouts=layouts)
    tx = make_optimizer(linear_warmup(work.lr, warmup_steps=work.warmup_steps), max_grad_norm=work.max_grad_norm)
    loss = functools.partial(dpo_loss, beta=work.beta)

    scored = range(1 if rung.live else steps)
    reference = Compiled(functools.partial(reference_logps, model))
    forward = functools.partial(make, layouts=layouts | {"packed": layouts["reference"]})
    cached, reference_seconds = reference_pass(reference, variables, [forward(step) for step in scored])
    refs = np.concatenate(cached)

    def stream(step: int) -> Batch:
        return make(step, ref_logps=None if rung.live else refs)

    step_function = make_step(rung, model=model, tx=tx, loss=loss, work=work, reference=variables)
    # The step donates its state, so a live reference needs a copy of the starting weights.
    state = init_state(jax.tree.map(jnp.copy, variables) if rung.live else variables, tx)
    # All shapes of the frozen pairs, including those of steps that this round does not take: every round compiles the same.
    placeholder = np.zeros((len(pairs), 2), np.float32)
    for step in range(work.longest_run):
        step_function.prepare(state, make(step, ref_logps=None if rung.live else placeholder).rows)

    losses, norms, times, first_step_at = [], [], [time.perf_counter()], 0.0

    def settled(step: int, metrics: dict[str, float]) -> None:
        nonlocal first_step_at
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
        times.append(time.perf_counter())
        first_step_at = first_step_at or time.time()

    with _traced(step_function, trace) if trace else nullcontext():
        params = fit(step_function, state, stream, total_steps=steps, check=settled).params
    batches, loader_seconds = [], []
    for step in range(1, work.steps + 1):
        start = time.perf_counter()
        batches.append(stream(step) if not rung.live else make(step))
        loader_seconds.append(time.perf_counter() - start)
    described = describe()
    if weights is not None:
        save_hf(weights, model, params)
    return {
        "losses": losses,
        "grad_norms": norms,
        "step_seconds": [late - early for early, late in zip(times, times[1:], strict=False)],
        "first_step_at": first_step_at,
        "first_logps": cached[0].tolist(),
        "reference_seconds": None if rung.live else reference_seconds,
        "positions": sum(int(batch.stats["positions"]) for batch in batches),
        "real_positions": sum(int(batch.stats["tokens"]) for batch in batches),
        "compile_seconds": step_function.seconds,
        "shapes": len(step_function.programs),
        "loader_seconds": statistics.median(loader_seconds),
        **described,
    }


def step_batch(
    work: Work,
    pairs: Sequence[Encoded],
    step: int,
    *,
    rung: Rung,
    layouts: dict[str, Layout],
    ref_logps: np.ndarray | None = None,
) -> Batch:
    """The batch of optimizer step `step` in the rung's layout. `ref_logps` is in the order of `pairs`.

    For a rung that groups by length, `rows` is a tuple with one entry per microbatch. `index` counts within the step's pairs.
    """
    first = step * work.batch
    groups = by_length(work, pairs_of_step(work, pairs, step)) if rung.grouped else [list(range(work.batch))]
    made = []
    for numbers in groups:
        indices = np.array(numbers) + first
        layout = _bucket(rung, [pairs[i] for i in indices]) if rung.grouped else layouts[rung.kind]
        batch = make_batch(pairs, indices, layout=layout, batch=len(indices), ref_logps=ref_logps)
        rows = score_all_positions(batch.rows, pairs_per_row=layout.per_row) if rung.whole_head else batch.rows
        made.append(batch._replace(rows=rows, index=np.where(batch.index < 0, -1, np.array(numbers)[batch.index])))
    stats = {key: sum(batch.stats[key] for batch in made) for key in ("pairs", "tokens", "positions")}
    rows = tuple(batch.rows for batch in made) if rung.grouped else made[0].rows
    return Batch(rows, np.concatenate([b.index for b in made]), [uid for b in made for uid in b.uids], stats)  # pyright: ignore[reportArgumentType]


def _bucket(rung: Rung, pairs: Sequence[Encoded]) -> Layout:
    """Rows as long as the longest of these pairs, rounded up so that few lengths are ever compiled."""
    if rung.kind == "plain":
        length = round_up(max(longer_side(pair) for pair in pairs), BUCKET)
    else:
        length = round_up(max(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs), BUCKET)
    return Layout(rung.kind, length=length, scored=length)  # pyright: ignore[reportArgumentType]


def score_all_positions(rows: Rows, *, pairs_per_row: int) -> Rows:
    """The same rows with the head applied at every position, as in trainers that score first and mask afterwards.

    Positions without a label are added as padding of the read-out. The last prompt token of a pair may be read twice.
    """
    count, length = rows.tokens.shape
    width = length + (pairs_per_row if rows.slots > 1 else 0)
    source, target = np.zeros((count, width), np.int32), np.zeros((count, width), np.int32)
    slot = np.full((count, width), rows.slots, np.int32)
    for row in range(count):
        real = np.flatnonzero(np.asarray(rows.slot[row]) < rows.slots)
        unread = np.setdiff1d(np.arange(length), rows.source[row][real])
        both = np.concatenate([np.asarray(rows.source[row])[real], unread])
        source[row, : len(both)] = both
        target[row, : len(real)] = rows.target[row][real]
        slot[row, : len(real)] = rows.slot[row][real]
    return rows.replace(source=source, target=target, slot=slot)


def reference_pass(reference: Compiled, variables: Variables, batches: Sequence[Batch]) -> tuple[list[np.ndarray], list[float]]:
    """log pi_ref [pairs, 2] of each batch in the order of its pairs, and seconds per batch, compilation excluded."""
    for batch in batches:
        for rows in _parts(batch.rows):
            reference.prepare(variables, rows)
    values, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        placed = np.concatenate([np.asarray(reference(variables, rows)) for rows in _parts(batch.rows)])
        seconds.append(time.perf_counter() - start)
        ordered, (numbers, found) = np.zeros((int(batch.stats["pairs"]), 2), np.float32), batch.of_examples(placed)
        ordered[numbers] = found
        values.append(ordered)
    return values, seconds


def make_step(rung: Rung, *, model: Model, tx: Any, loss: PreferenceLoss, work: Work, reference: Variables) -> Any:
    """`step(state, rows) -> (state, metrics)` with `prepare`, `seconds` and `programs` of `Compiled`."""
    if rung.grouped:
        return GroupedStep(model=model, tx=tx, loss=loss)
    step = functools.partial(dpo_step, model=model, tx=tx, loss=loss, microbatches=work.microbatches)
    if not rung.live:
        return Compiled(step, donate=(0,))

    # The reference weights are an argument: captured by closure, they would be constants of the program.
    def live(state: TrainState, rows: Rows, reference: Variables) -> tuple[TrainState, Metrics]:
        return step(state, rows.replace(ref_logps=reference_logps(model, reference, rows)))

    return Compiled(live, donate=(0,), last=(reference,))


class GroupedStep:
    """An optimizer step over microbatches of different lengths: a compiled gradient per length, added up, then one update."""

    def __init__(self, *, model: Model, tx: Any, loss: PreferenceLoss) -> None:
        objective = functools.partial(dpo_objective, model=model, loss=loss)

        def update(state: TrainState, sums: tuple[Variables, Metrics], count: jax.Array) -> tuple[TrainState, Metrics]:
            grads, metrics = jax.tree.map(lambda x: x / count, sums)
            return apply_gradients(state, grads, metrics, tx=tx)

        self._part = Compiled(lambda params, rows: mean_grads(objective, params, rows))
        self._add = Compiled(lambda one, other: jax.tree.map(jnp.add, one, other), donate=(0,))
        self._update = Compiled(update, donate=(0,))

    seconds = property(lambda self: sum(part.seconds for part in (self._part, self._add, self._update)))
    programs = property(lambda self: self._part.programs)

    def prepare(self, state: TrainState, parts: tuple[Rows, ...]) -> None:
        for rows in parts:
            self._part.prepare(state.params, rows)

    def __call__(self, state: TrainState, parts: tuple[Rows, ...]) -> tuple[TrainState, Metrics]:
        sums = self._part(state.params, parts[0])
        for rows in parts[1:]:
            sums = self._add(sums, self._part(state.params, rows))
        return self._update(state, sums, jnp.float32(len(parts)))


def describe() -> dict[str, Any]:
    """Peak memory (of the process on a CPU, of the device elsewhere), device and versions."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return {
        "peak_bytes": stats["peak_bytes_in_use"] if stats else peak_memory(),
        "device": device.device_kind,
        "versions": {"jax": jax.__version__},
    }


@contextmanager
def _traced(step: Any, folder: str) -> Iterator[None]:
    """Writes a trace to `folder`, with the compiled programs that map its operations to parts of the model."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, program in enumerate(step.programs.values()):
        write_text(Path(folder) / f"hlo-{number}.txt", program.as_text())
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield


def _parts(rows: Any) -> Sequence[Rows]:
    return rows if isinstance(rows, tuple) else (rows,)
