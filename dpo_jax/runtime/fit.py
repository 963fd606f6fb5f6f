"""The training loop for any step `(state, batch) -> (state, metrics)`, independent of the algorithm."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.pauses import pausing
from dpo_jax.runtime.prefetch import Prefetcher
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.signals import StopSignals
from dpo_jax.runtime.steplog import NonFinite as NonFinite
from dpo_jax.runtime.steplog import StepLog
from dpo_jax.runtime.training_progress import Progress

EXIT_PREEMPTED = 143
"""Exit code of a process that saved and stopped after SIGTERM. Run it again to continue. After SIGINT it is 130."""

SAVE = 1
"""The number by which hosts agree to save; smaller than signal numbers, which take precedence."""


class Preempted(RuntimeError):
    """Stopped by a signal after `step` steps. End the process with `EXIT_PREEMPTED`, so that launchers restart it."""

    agreed = True  # all hosts raise it after the same step

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


class Verdict(NamedTuple):
    """Decision after an evaluation: whether to save the state at once, and whether to end the run."""

    save: bool = False
    stop: bool = False


class Evaluation(NamedTuple):
    """Measurements of the state during a run.

    >>> def mean_logps(state, done):
    ...     chosen, rejected = reference_logps_of(decoder, state.variables, encoded, layout="packed").mean(axis=0)
    ...     return {"chosen": chosen, "rejected": rejected}
    >>> evaluation = Evaluation(mean_logps, every=100, first=True)
    """

    measure: Callable[[Any, int], Mapping[str, Any]]  # measure(state, steps taken) -> metrics, logged under `eval/`
    every: int = 0  # steps; whatever this is, the state after the last step is measured
    first: bool = False  # also the state before the first step
    watch: Callable[[int, Mapping[str, Any]], Verdict] | None = None  # watch(steps taken, metrics), after each of them


class Interrupted(Preempted):
    """Stopped by SIGINT, by a person at the keyboard. End the process with 130, so that no launcher restarts it."""


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
    evaluation: Evaluation | None = None,
    save_every: int = 0,
    save_every_minutes: float = 0.0,
    refresh: Callable[[Any, int], None] | None = None,
    refresh_every: int = 0,
    check: Callable[[int, dict[str, float]], None] | None = None,
    get_state: Callable[[Any], Any] = lambda tree: tree,
    agree: Callable[[int], int] = lambda number: number,
    clock: Callable[[], float] = time.monotonic,
) -> Any:
    """Run steps `state.step` to `total_steps - 1` and return the state after the last. The given state is donated.

    Args:
      step: compiled `step(state, batch) -> (state, metrics)`; metrics are float32[] by name. `state` is any tree of arrays with
        an attribute `step`, an integer.
      stream: `stream(i)` is the batch of step `i`: the input of `step`, or a `data.loader.Batch`, whose `rows` are the input;
        `uids` and `stats` (pairs or texts, tokens) are logged. A thread calls it, one batch ahead. It must be a pure function
        of `i`, so that a resumed run equals the uninterrupted one.
      lr: the schedule, logged as `lr`.
      checkpoints: `runtime.checkpoint.Checkpoints`. The state is saved with `meta` every `save_every` steps, at the end, and on
        a signal.
      save_every_minutes: also save if the last save (or the start) was this long ago by `clock` (in seconds). With several
        hosts, the first one keeps the time; the others get 0 and learn of it through `agree`.
      progress: the display, with the number of batch shapes, each of which is compiled once.
      evaluation: its `first` measures the given state, whose measurement a signal may have prevented; its `watch` decides
        whether to save and whether to end the run.
      refresh: `refresh(state, steps taken)`, called after every `refresh_every` steps once the state is saved, changes what
        `stream` reads; not called after the last step.
      check: `check(step, metrics)` may raise to stop the run, for instance when the loss of step 0 is not ln 2.
      get_state: converts the state from the form used by `step` to the form saved; `Partitioner.get_state` if they differ.
      agree: `hosts.agreement()`, if several hosts must save or stop after the same step.

    The metrics of a step are read while the device computes the next one, and always before anything is saved. `evaluation`
    and `refresh` should call `pauses.pause` regularly: a signal then ends them there. An evaluation that was interrupted is not
    logged; the state is saved without it, and also (by a single host) before an exception of the evaluation is re-raised.

    Raises NonFinite (and writes `bad_batch.json` beside the log), Preempted, and whatever stream, check and evaluation raise.
    """
    start, eval_every = int(get_state(state.step)), 0 if evaluation is None else evaluation.every
    evaluates_first = evaluation is not None and evaluation.first
    # The log's evaluation at `start` is dropped if it is made again, or if there was no checkpoint: that attempt may have had
    # other settings.
    kept = start > 0 and not evaluates_first
    rows = StepLog(start, total_steps, log=log, progress=progress, check=check, evaluated=kept)
    timer, compilations = _SaveTimer(save_every_minutes, clock), _Compilations(0 if progress is None else progress.shapes)

    def evaluate(done: int) -> tuple[Verdict, int]:
        """The decision after an evaluation, and 0; or the number of the signal that interrupted it."""
        assert evaluation is not None
        rows.flush()
        requests = []

        def pause() -> None:
            requests.append(agree(signals.received))
            if number := _signal_of(requests[-1]):
                raise _Interrupted(number)

        try:
            with reported("evaluating", brief=True), pausing(pause):
                found = evaluation.measure(state, done)
            rows.add_evaluation(done, found)
            rows.restart_clock()
            verdict = Verdict() if evaluation.watch is None else evaluation.watch(done, found)
        except _Interrupted as interrupted:
            return Verdict(), interrupted.number
        except NonFinite:  # the state may be to blame
            raise
        except Exception as error:
            # Several hosts would have to save together, but the error may be that of one.
            if done > start and checkpoints is not None and jax.process_count() == 1:
                told = "The state is saved."
                try:
                    save(done, wait=True)
                except Exception as failed:
                    told = f"The state could not be saved: {failed}"
                error.add_note(f"The evaluation after {done} steps failed. {told}")
            raise
        return verdict._replace(save=verdict.save or SAVE in requests), 0

    def save(done: int, *, wait: bool) -> None:
        rows.flush()
        rows.sync()  # a checkpoint of step n guarantees that the rows of all steps before n are on disk
        if checkpoints is not None:
            with reported(f"saving step {done}"):
                checkpoints.save(done, get_state(state), dict(meta or {}))
                if wait:
                    checkpoints.wait()
        timer.restart()
        rows.restart_clock()

    every = 0 if refresh is None else refresh_every
    with rows, StopSignals() as signals, Prefetcher(stream, start, total_steps, refresh_every=every) as prefetcher:

        def leave_if_told(done: int) -> None:
            if number := _signal_of(agree(signals.received)):
                raise _stopped(number, done, saved=checkpoints is not None)

        def end(done: int) -> None:
            agree(signals.received)  # with several hosts its result comes one call later
            leave_if_told(done)

        if evaluates_first:
            verdict, interrupted = evaluate(start)
            if interrupted:
                raise _stopped(interrupted, start, saved=checkpoints is not None and start > 0)
            if verdict.stop or start == total_steps:
                end(start)
                return state
        for index in range(start, total_steps):
            batch = _parts(prefetcher.get(index))
            with compilations.named(batch.inputs):
                state, metrics = step(state, batch.inputs)
            rows.flush()  # the metrics of the previous step, while this one is computed
            if checkpoints is not None:
                checkpoints.check_errors()
            rows.add(index, metrics if lr is None else {**metrics, "lr": lr(index)}, uids=batch.uids, stats=batch.stats)

            done = index + 1
            request = agree(signals.received or timer.request())  # 0, SAVE, or the number of a signal
            stop, last, verdict = _signal_of(request), done == total_steps, Verdict()
            if evaluation is not None and not stop and (last or _is_due(done, eval_every)):
                verdict, stop = evaluate(done)
                last = last or verdict.stop
            refreshing = _is_due(done, every) and not (stop or last)
            if request or stop or last or refreshing or verdict.save or _is_due(done, save_every):
                save(done, wait=bool(stop or last or refreshing))
            if stop:
                raise _stopped(stop, done, saved=checkpoints is not None)
            if last:
                end(done)  # a signal may have come during the last evaluation or save
                break
            if refresh is not None and refreshing:
                with pausing(functools.partial(leave_if_told, done)):
                    refresh(state, done)
                timer.restart()
                rows.restart_clock()
    return state


class _Interrupted(Exception):
    """An evaluation ends here, because of the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Parts(NamedTuple):
    """A batch: the input of the step, and its log entries."""

    inputs: Any
    uids: Sequence[str]
    stats: Mapping[str, float]


def _parts(batch: Any) -> _Parts:
    return _Parts(batch.rows, batch.uids, batch.stats) if hasattr(batch, "uids") else _Parts(batch, (), {})


def _signal_of(request: int) -> int:
    return 0 if request == SAVE else request


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _stopped(number: int, done: int, *, saved: bool) -> Preempted:
    kind = Interrupted if number == signal.SIGINT else Preempted
    where = "the state is saved" if saved else "nothing is saved"
    return kind(f"stopped by {signal.Signals(number).name} after {done} steps; {where}", step=done)


class _SaveTimer:
    """Requests a save once `minutes` have passed, then none until `restart`, because hosts may agree one step later."""

    def __init__(self, minutes: float, clock: Callable[[], float]):
        self._seconds, self._clock = 60 * minutes, clock
        self.restart()

    def request(self) -> int:
        if self._requested or self._seconds <= 0 or self._clock() - self._start < self._seconds:
            return 0
        self._requested = True
        return SAVE

    def restart(self) -> None:
        self._start, self._requested = self._clock(), False


class _Compilations:
    """Reports the compilation of each new batch shape as progress."""

    def __init__(self, shapes: int):
        self._shapes, self._known = shapes, set()

    def named(self, batch: Any) -> contextlib.AbstractContextManager[Any]:
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        if shapes in self._known:
            return contextlib.nullcontext()
        self._known.add(shapes)
        number, tokens = len(self._known), getattr(batch, "tokens", None)
        many = f" {number} of {self._shapes}" if self._shapes >= number else f" {number}"
        size = "" if tokens is None else " ({} rows of {} tokens)".format(*tokens.shape)
        return reported(f"compiling shape{many}{size}")
