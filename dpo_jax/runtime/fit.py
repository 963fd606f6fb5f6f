"""The one training loop. It knows nothing of the algorithm: `step` and `stream` are functions, the rest is bookkeeping."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import write_json
from dpo_jax.runtime.signals import ECHO_SECONDS, NUMBERS, Listener, exit_code
from dpo_jax.runtime.training_progress import Progress

EXIT_PREEMPTED = 143
"""Exit code of a process that saved and stopped because of SIGTERM. Run it again to continue. After SIGINT it is 130."""

SAVE = 1
"""What `agree` is asked for when it is time to save: less than the numbers of the signals, so that a stop prevails."""


class NonFinite(ArithmeticError):
    """A loss or gradient norm is NaN or infinite. `step`, `uids`: the batch. No state that has seen it was saved."""

    def __init__(self, message: str, *, step: int, uids: list[str]):
        super().__init__(message)
        self.step, self.uids = step, uids


class Preempted(RuntimeError):
    """Stopped by a signal, after `step` steps. End the process with `EXIT_PREEMPTED`, for launchers that start it again."""

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


class Interrupted(Preempted):
    """Stopped by SIGINT: by a person at the keyboard, whom no launcher should contradict. End the process with 130."""


def fit(
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    state: Any,
    stream: Callable[[int], Any],
    *,
    total_steps: int,
    lr: Callable[[int], Any] | None = None,
    checkpoints: Any = None,
    meta: Mapping[str, Any] | None = None,
    log: MetricsLog | None = None,
    progress: Progress | None = None,
    evaluate: Callable[[Any, int], Mapping[str, Any]] | None = None,
    eval_every: int = 0,
    save_every: int = 0,
    save_every_minutes: float = 0.0,
    check: Callable[[int, dict[str, float]], None] | None = None,
    unit: str = "pairs",
    shapes: int = 0,
    get_state: Callable[[Any], Any] = lambda tree: tree,
    agree: Callable[[int], int] = lambda number: number,
    clock: Callable[[], float] = time.monotonic,
) -> Any:
    """Takes steps `state.step` to `total_steps - 1` and returns the state after them. The given state is donated.

    step: compiled `step(state, rows) -> (state, metrics)` with float32[] metrics.
    stream: `stream(i)` is the batch of step `i`, with `.rows`, `.uids`, `.stats` (`pairs`, `scored_tokens`, `padding`, ...). A
        thread calls it, one batch ahead. It must be a pure function of `i`: then a resumed run equals the uninterrupted one.
    lr: the schedule, logged as `lr`.
    checkpoints: `runtime.checkpoint.Checkpoints`, saved to with `meta` every `save_every` steps, at the end, and on a signal.
    save_every_minutes: saves as well when the last save (or the start) is this long ago by `clock`, which gives seconds. Of
        several hosts one counts the minutes, and the others get 0: they hear of it by `agree`.
    evaluate: `evaluate(state, steps taken) -> metrics`, every `eval_every` steps and at the end, logged under `eval/`.
    check: `check(step, metrics)` may raise to stop the run, for instance when the loss of step 0 is not ln 2.
    unit: which of `stats` counts examples.
    shapes: how many shapes the rows of a batch can have, 0 if nobody knows: each is a program to compile.
    get_state: takes what `step` works on to what is saved; `Partitioner.get_state` where these differ.
    agree: `hosts.agreement()` where several hosts must save or stop after the same step.

    Metrics of a step are read while the device computes the next one, and before anything is saved.

    Raises NonFinite (and writes `bad_batch.json` beside the log), Preempted, and whatever stream, check and evaluate raise.
    """
    start = int(get_state(state.step))
    books = _Books(start, total_steps, log=log, progress=progress, checkpoints=checkpoints, check=check, unit=unit)
    compilations = _Compilations(shapes)
    timer = _Timer(save_every_minutes, clock)
    with books, _Signals() as signals, _Ahead(stream, start, total_steps) as batches:
        for index in range(start, total_steps):
            batch = batches.take(index)
            rate = {} if lr is None else {"lr": lr(index)}
            with compilations.of(batch.rows):
                state, metrics = step(state, batch.rows)
            books.settle()
            books.pending = _Pending(index, batch.uids, batch.stats, {**metrics, **rate})

            done, wish = index + 1, agree(signals.received or timer.ask())
            stop, end = _signal(wish), done == total_steps
            if evaluate is not None and not stop and (end or _due(done, eval_every)):
                books.settle()
                with reported("evaluating", brief=True):
                    found = evaluate(state, done)
                books.evaluated(done, found)
            if wish or end or _due(done, save_every):
                books.settle()
                with reported(f"saving step {done}"):
                    books.save(done, get_state(state), meta, wait=bool(stop or end))
                timer.restart()
            stop = stop or (end and _signal(agree(signals.received)))
            if stop:
                saved = "the state is saved" if checkpoints is not None else "nothing is saved, as no place was given"
                kind = Interrupted if stop == signal.SIGINT else Preempted
                raise kind(f"stopped by {signal.Signals(stop).name} after {done} steps; {saved}", step=done)
    return state


def _signal(wish: int) -> int:
    return 0 if wish == SAVE else wish


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class _Timer:
    """Tells when it is time to save. It asks once and then waits for the save: an agreement takes a step to arrive."""

    def __init__(self, minutes: float, clock: Callable[[], float]):
        self._seconds, self._clock = 60 * minutes, clock
        self.restart()

    def ask(self) -> int:
        if self._asked or self._seconds <= 0 or self._clock() - self._start < self._seconds:
            return 0
        self._asked = True
        return SAVE

    def restart(self) -> None:
        self._start, self._asked = self._clock(), False


@dataclasses.dataclass
class _Pending:
    """A step that has been dispatched; its metrics may not be computed yet."""

    step: int
    uids: list[str]
    stats: Mapping[str, float]
    metrics: dict[str, Any]


class _Books:
    """Everything that is written down about a step, in the order that makes a crash at any point harmless."""

    def __init__(self, start: int, total: int, *, log, progress, checkpoints, check, unit: str):
        self._log, self._progress, self._checkpoints, self._check, self._unit = log, progress, checkpoints, check, unit
        self._start, self._total = start, total
        self.pending: _Pending | None = None

    def __enter__(self) -> _Books:
        if self._log is not None:
            self._log.resume(self._start)
        if self._progress is not None:
            self._progress.start(self._start, self._total, unit=self._unit)
        self._clock = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.close()

    def settle(self) -> None:
        """Waits for the metrics of the pending step, judges them and writes them down."""
        taken, self.pending = self.pending, None
        if taken is None:
            return
        values = {name: float(value) for name, value in jax.device_get(taken.metrics).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if any(not math.isfinite(values.get(name, 0.0)) for name in ("loss", "grad_norm")):
            raise self._non_finite(taken, values)
        if self._check is not None:
            self._check(taken.step, values)
        row = {"step": taken.step, **values, **_throughput(taken.stats, self._unit, seconds)}
        if self._log is not None:
            self._log.write(row)
        if self._progress is not None:
            self._progress.step(row)
        if self._checkpoints is not None:
            self._checkpoints.check_errors()

    def evaluated(self, done: int, metrics: Mapping[str, Any]) -> None:
        row = {"step": done, **{f"eval/{name}": float(value) for name, value in metrics.items()}}
        if self._log is not None:
            self._log.write(row)
        if self._progress is not None:
            self._progress.evaluated(row)
        self._clock = time.perf_counter()

    def save(self, done: int, state: Any, meta: Mapping[str, Any] | None, *, wait: bool) -> None:
        # Rows first: a checkpoint of step n promises that the rows of all steps before n are on disk.
        if self._log is not None:
            self._log.sync()
        if self._checkpoints is not None:
            self._checkpoints.save(done, state, dict(meta or {}))
            if wait:
                self._checkpoints.wait()
        self._clock = time.perf_counter()

    def _non_finite(self, taken: _Pending, values: dict[str, float]) -> NonFinite:
        found = ", ".join(f"{name} = {values[name]}" for name in ("loss", "grad_norm") if name in values)
        message = f"step {taken.step}: {found}. Batch: {', '.join(taken.uids[:3])}{', ...' if len(taken.uids) > 3 else ''}"
        if self._log is not None:
            path = self._log.path.with_name("bad_batch.json")
            readable = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
            write_json(path, {"step": taken.step, "uids": taken.uids, "metrics": readable})
            message += f" (all {len(taken.uids)} in {path})"
        return NonFinite(message, step=taken.step, uids=taken.uids)


def _throughput(stats: Mapping[str, float], unit: str, seconds: float) -> dict[str, float]:
    counted = {name: stats[name] / seconds for name in (unit, "scored_tokens") if name in stats}
    rates = {f"{name}_per_second": value for name, value in counted.items()}
    return {**rates, **({"padding": stats["padding"]} if "padding" in stats else {})}


class _Compilations:
    """Names the compilation of each shape of rows when it is met for the first time."""

    def __init__(self, shapes: int):
        self._shapes, self._met = shapes, set()

    def of(self, rows: Any) -> contextlib.AbstractContextManager[Any]:
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(rows))
        if shapes in self._met:
            return contextlib.nullcontext()
        self._met.add(shapes)
        number, tokens = len(self._met), getattr(rows, "tokens", None)
        many = f" {number} of {self._shapes}" if self._shapes >= number else f" {number}"
        size = "" if tokens is None else " ({} rows of {} tokens)".format(*tokens.shape)
        return reported(f"compiling shape{many}{size}")


class _Ahead:
    """Prepares the batch of step i + 1 in one background thread while step i is computed; its errors surface in `take`."""

    def __init__(self, stream: Callable[[int], Any], start: int, total: int):
        self._stream, self._total = stream, total
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next = self._pool.submit(stream, start) if start < total else None

    def take(self, index: int) -> Any:
        assert self._next is not None
        batch = self._next.result()
        self._next = self._pool.submit(self._stream, index + 1) if index + 1 < self._total else None
        return batch

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Signals:
    """The first SIGTERM or SIGINT sets `received`, a second one ends the process at once. Restores the handlers afterwards."""

    def __init__(self) -> None:
        self.received, self._heard, self._since = 0, 0, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in NUMBERS}
            self._listener = Listener(self._hear)
            self._listener.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous:
            self._listener.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.received = self.received or number

    def _hear(self, number: int) -> None:
        """In a thread: a step that is being compiled hears of no signal."""
        if self._heard:
            if time.monotonic() - self._since > ECHO_SECONDS:
                os._exit(exit_code(number))
            return
        self._heard, self._since = number, time.monotonic()
        # Not print(): the signal may have interrupted a print, and buffered files are not re-entrant.
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving. A second signal stops at once.\n"
        os.write(2, text.encode())
