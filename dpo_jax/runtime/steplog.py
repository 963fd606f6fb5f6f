"""Metrics rows of a training loop: read from the device one step late, checked, and written before any checkpoint.

A step is dispatched and runs in the background. Reading its metrics at once would block, and the device would then wait for the
next batch. So `StepLog` keeps the metrics of the last step, and `flush` reads them while the next one runs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.rundir import write_json
from dpo_jax.runtime.spikes import Spikes
from dpo_jax.runtime.training_progress import UNITS, Progress

logger = logging.getLogger(__name__)


class NonFinite(ArithmeticError):
    """A loss or gradient norm is NaN or infinite. `step`, `uids`: the batch. No state after it was saved."""

    agreed = True  # all hosts see the same loss

    def __init__(self, message: str, *, step: int, uids: Sequence[str]):
        super().__init__(message)
        self.step, self.uids = step, uids


class _Step(NamedTuple):
    """A step whose metrics are still on the device, possibly not computed yet."""

    index: int
    uids: Sequence[str]
    stats: Mapping[str, float]
    metrics: Mapping[str, Any]


def measured(metrics: Any) -> dict[str, float]:
    """What `Evaluation.measure` returned, as floats. TypeError, naming the metric, unless it is {name: number}."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"evaluation.measure: expected {{name: number}}, got {type(metrics).__name__}")
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError) as error:
            shape = f" of shape {list(np.shape(value))}" if np.ndim(value) else ""
            kind = f"{type(value).__name__}{shape}"
            raise TypeError(f"evaluation.measure: expected {{name: number}}, got {kind} for {name!r}") from error
    return numbers


class StepLog:
    """Writes the rows of steps and evaluations to log and display. A context manager, for steps `start` to `stop`.

    `check(step, metrics)` sees each row first, and may raise. Without `evaluated`, the log's evaluation of the state at `start`
    is dropped.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        *,
        log: MetricsLog | None = None,
        progress: Progress | None = None,
        check: Callable[[int, dict[str, float]], None] | None = None,
        evaluated: bool = True,
    ) -> None:
        self._start, self._stop, self._evaluated = start, stop, evaluated
        self._log, self._progress, self._check = log, progress, check
        self._last: _Step | None = None
        self._spikes = Spikes("loss", "grad_norm")

    def __enter__(self) -> StepLog:
        if self._log is not None:
            self._log.resume(self._start, evaluated=self._evaluated)
        if self._progress is not None:
            self._progress.start(self._start, self._stop)
        self._clock = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.close()

    def add(self, index: int, metrics: Mapping[str, Any], *, uids: Sequence[str], stats: Mapping[str, float]) -> None:
        """Takes the metrics of step `index`, still on the device; call `flush` before the next `add`."""
        assert self._last is None
        self._last = _Step(index, uids, stats, metrics)

    def flush(self) -> None:
        """Waits for the metrics of the last step, checks them and writes their row. Raises `NonFinite`, and exceptions of
        `check`."""
        step, self._last = self._last, None
        if step is None:
            return
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if any(not math.isfinite(values.get(name, 0.0)) for name in ("loss", "grad_norm")):
            raise self._non_finite(step, values)
        if self._check is not None:
            self._check(step.index, values)
        if self._log is not None:
            for words in self._spikes.of(values):
                logger.warning("step %d: %s", step.index, words)
        row = {"step": step.index, **values, **_throughput(step.stats, seconds)}
        if self._log is not None:
            self._log.write(row)
        if self._progress is not None:
            self._progress.step(row)

    def add_evaluation(self, done: int, metrics: Mapping[str, Any]) -> None:
        """Writes the row of an evaluation after `done` steps, with the prefix `eval/`. TypeError: see `measured`."""
        row = {"step": done, **{f"eval/{name}": value for name, value in measured(metrics).items()}}
        if self._log is not None:
            self._log.write(row)
        if self._progress is not None:
            self._progress.evaluated(row)

    def sync(self) -> None:
        """Returns once all rows are on disk."""
        if self._log is not None:
            self._log.sync()

    def restart_clock(self) -> None:
        """Excludes the time since the last row from the next step."""
        self._clock = time.perf_counter()

    def _non_finite(self, step: _Step, values: dict[str, float]) -> NonFinite:
        uids = list(step.uids)
        found = ", ".join(f"{name} = {values[name]}" for name in ("loss", "grad_norm") if name in values)
        message = f"step {step.index}: {found}"
        if uids:
            message += f". Batch: {', '.join(uids[:3])}{', ...' if len(uids) > 3 else ''}"
        if self._log is not None:
            path = self._log.path.with_name("bad_batch.json")
            readable = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
            write_json(path, {"step": step.index, "uids": uids, "metrics": readable})
            message += f" (all {len(uids)} in {path})"
        return NonFinite(message, step=step.index, uids=uids)


def _throughput(stats: Mapping[str, float], seconds: float) -> dict[str, float]:
    counted = (*UNITS, "scored_tokens")
    rates = {f"{name}_per_second": stats[name] / seconds for name in counted if name in stats}
    return {**rates, **({"padding": stats["padding"]} if "padding" in stats else {})}
