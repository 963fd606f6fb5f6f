"""A training run in a folder: resumed from its newest checkpoint, logged, evaluated and saved. It needs no configuration."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from dpo_jax.runtime import hosts
from dpo_jax.runtime.checkpoint import CheckpointDamaged, Checkpoints, newest_meta
from dpo_jax.runtime.checkpoint_record import named
from dpo_jax.runtime.fit import Evaluation, fit
from dpo_jax.runtime.metrics import MetricsLog, Writer, read_metrics
from dpo_jax.runtime.parallel import single_device
from dpo_jax.runtime.progress import SAY, reported
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.runtime.seal import is_remote
from dpo_jax.runtime.training_progress import Progress
from dpo_jax.training.evaluation import evaluate_last, evaluates_first, finite_evaluation, is_other_data
from dpo_jax.training.fingerprint import (
    SavedRun,
    check_data,
    check_held_out,
    check_length,
    check_settings,
    data_changes,
    json_values,
    other_held_out,
    run_length,
)
from dpo_jax.training.refresh import Refresh
from dpo_jax.training.stopping import EarlyStopping
from dpo_jax.types import Partitioner, Variables
from dpo_jax.writing import appending


@runtime_checkable
class PartlyFrozen(Protocol):
    """A state with a part that is only read, such as `TrainState`."""

    @property
    def frozen(self) -> Variables: ...
    def replace(self, *, frozen: Variables) -> Any: ...


class Saving(NamedTuple):
    """When and where a run saves its state. It also saves after the last step, and when a signal ends it.

    >>> saving = Saving(every=500, every_minutes=30, folder="gs://bucket/run")
    """

    every: int = 0  # steps
    every_minutes: float = 0.0
    keep: int = 2  # newest checkpoints; older ones are deleted
    folder: str | os.PathLike[str] | None = (
        None  # instead of `checkpoints/` in the folder of the run; may be a bucket (gs://...)
    )


def train(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    stream: Callable[[int], Any],
    *,
    folder: str | os.PathLike[str] | RunDir,
    total_steps: int,
    fingerprint: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    saved: SavedRun | None = None,
    partitioner: Partitioner | None = None,
    saving: Saving | None = None,
    evaluation: Evaluation | None = None,
    stopping: EarlyStopping | None = None,
    refresh: Refresh | None = None,
    lr: Callable[[int], Any] | None = None,
    check: Callable[[int, dict[str, float]], None] | None = None,
    begin: Callable[[], None] = lambda: None,
    writers: Callable[[], Sequence[Writer]] = lambda: (),
    progress: Progress | None = None,
    say: Callable[[str], None] = SAY,
) -> Any:
    """Trains from `state` (consumed), or from the newest good checkpoint in `folder`, to `total_steps`. Returns the last state.

    The returned state is on the devices; `Partitioner.get_state` gives its form on the host. The same call resumes a killed
    run, which ends bit for bit like an uninterrupted one. SIGTERM and SIGINT save, then raise `Preempted`. `checkpoints/`,
    `metrics.jsonl` (one row per step) and `resumes.jsonl` are written to `folder`, which is locked meanwhile.

    A whole run of DPO over all devices, with a cached reference pass. Run it again after a kill, on any number of devices:

    >>> model, weights = load_hf(folder)
    >>> partitioner = mesh_partitioner(make_mesh(fsdp=-1), model)
    >>> variables = partitioner.put_variables(weights)
    >>> ref_logps = cached_reference_logps(model, variables, encoded, cache="run/refs", partitioner=partitioner)
    >>> layout = plan_layout(encoded, kind="packed", batch=2, multiple=partitioner.row_shards)
    >>> order = {"batch": 2, "seed": 0, "epochs": 4}
    >>> batches = train_batches(encoded, layout=layout, ref_logps=ref_logps, part=partitioner.host_part, **order)
    >>> step = partial(dpo_step, model=model, tx=tx, loss=partial(dpo_loss, beta=0.1), axis_name=partitioner.axis_name)
    >>> state = train(
    ...     partitioner.compile_step(step), partitioner.init_state(partial(init_state, tx=tx), variables), batches,
    ...     folder="run", total_steps=total_steps(len(encoded), batch=2, epochs=4), partitioner=partitioner,
    ...     saving=Saving(every=100), fingerprint={"beta": 0.1, **order, "data": data_digest(encoded)},
    ...     check=partial(starts_at_reference, expected_loss=0.693147),  # ln 2, or the log-probabilities are of other weights
    ... )
    >>> print(save_hf("run/export", model, state.variables))
    run/export

    Args:
      step: compiled `step(state, batch) -> (state, metrics)`, from `Partitioner.compile_step`.
      state: any tree of arrays with an integer `step`, placed by `partitioner`. If it is `PartlyFrozen`, checkpoints leave out
        its `frozen` part: pass it again to resume, and include its digest in `fingerprint`.
      stream: `stream(i)` is the batch of step `i`, a pure function of `i`; see `runtime.fit.fit`.
      fingerprint: JSON values that must not change when the run is resumed: settings, and as `data` a digest of the data. A
        difference raises `RunMismatch`, which names it; a value that JSON does not have TypeError. See
        `dpo_jax.training.fingerprint`.
      data: JSON values that describe the sources of the data (files, limits, ...), so that a message can name what changed.
      saved: the result of `saved_run`, if other arguments depend on it (`behind`).
      partitioner: one of `runtime.parallel`; by default `single_device()`.
      evaluation: a value that is not finite raises `NonFinite`. `stopping` takes the place of its `watch`.
      stopping: ends the run early, based on `evaluation`. The returned state is then the best one, not the last. The initial
        weights are not a candidate.
      refresh: every N steps, saves the state and then computes anew what `stream` reads from it: reference log-probabilities
        (`RefreshedReference`), or a round of samples (`online.Rounds`). The checkpoint is kept until the next such step.
      begin: called once the run is known to be new, or to match the one being resumed.
      writers: creates further metrics destinations, on the first host (`runtime.metrics`).

    The other arguments are those of `fit`.
    """
    if stopping is not None and evaluation is None:
        raise ValueError("stopping needs evaluation, which measures the metric to stop on")
    named(_without_frozen(state))  # what cannot be saved is refused now, not after the first steps
    partitioner, saving = partitioner or single_device(), saving or Saving()
    meta = _meta(fingerprint, data, stopping, refresh)
    with contextlib.ExitStack() as held:
        with hosts.first_goes_first("run directory"):  # other hosts must not write there before its check
            run = folder if isinstance(folder, RunDir) else held.enter_context(RunDir(folder, lock=hosts.is_first()))
        kept = {"max_to_keep": saving.keep} | ({} if refresh is None else {"origin": refresh.origin})
        store = held.enter_context(_checkpoints(run, saving.folder, **kept))
        found = {"saved": saved, "total_steps": total_steps, "stopping": stopping, "refresh": refresh}
        state = _resume(run, state, store, meta, partitioner, **found, say=say)
        if stopping is not None and stopping.stopped:
            begin()
            return _best(state, store, partitioner, stopping, say)
        start = steps_of(state, partitioner)
        begin()
        if refresh is not None and start < total_steps:
            state = _at_its_reference(state, start, refresh, store, partitioner)
        log = held.enter_context(MetricsLog(run.metrics, writers=writers())) if hosts.is_first() else None
        if evaluation is not None:
            due = {"stopping": stopping, "log": log, "other_data": is_other_data(saved, meta["data"], total_steps)}
            evaluation = evaluation._replace(
                measure=functools.partial(finite_evaluation, evaluation),
                first=evaluates_first(start, total_steps, evaluation, **due),
                watch=evaluation.watch if stopping is None else stopping.watching(store),
            )
        state = fit(
            step,
            state,
            stream,
            total_steps=total_steps,
            lr=lr,
            checkpoints=store,
            meta=meta,
            log=log,
            progress=progress if hosts.is_first() else None,
            evaluation=evaluation,
            save_every=saving.every,
            save_every_minutes=saving.every_minutes if hosts.is_first() else 0.0,
            refresh=None if refresh is None else functools.partial(_refresh, refresh, store),
            refresh_every=0 if refresh is None else refresh.every,
            check=check,
            get_state=lambda state: partitioner.get_state(_without_frozen(state)),
            agree=hosts.agreement(),
        )
        if stopping is not None:
            state = _best(state, store, partitioner, stopping, say)
        elif evaluation is not None:
            evaluate_last(evaluation, state, total_steps, log=log)
    return state


def _meta(
    fingerprint: Mapping[str, Any], data: Mapping[str, Any] | None, stopping: EarlyStopping | None, refresh: Refresh | None
) -> dict[str, Any]:
    """What each checkpoint records of its run. The records of `stopping` and `refresh` change as it goes on."""
    meta: dict[str, Any] = {"fingerprint": json_values(fingerprint, name="fingerprint")}
    meta["data"] = json_values(data or {}, name="data")
    meta["versions"] = {package: importlib.metadata.version(package) for package in ("jax", "flax", "optax")}
    meta |= {} if stopping is None else {"early_stopping": stopping.record}
    return meta | ({} if refresh is None else {"reference": refresh.record})


def saved_run(checkpoints: str | os.PathLike[str], *, place: str) -> SavedRun | None:
    """The run saved in `checkpoints`, read without its arrays; None if there is none. `place` names it in messages."""
    found = newest_meta(checkpoints)
    return None if found is None else SavedRun(place, *found)


@contextlib.contextmanager
def _checkpoints(run: RunDir, elsewhere: str | os.PathLike[str] | None, **kept: Any) -> Iterator[Checkpoints]:
    with contextlib.ExitStack() as held:
        if elsewhere is not None and not is_remote(elsewhere):
            held.enter_context(RunDir(elsewhere, lock=hosts.is_first()))  # locked: other runs may name it, too
        yield held.enter_context(Checkpoints(elsewhere or run.path / "checkpoints", **kept))


def steps_of(state: Any, partitioner: Partitioner) -> int:
    """The number of steps that a state on the devices has taken."""
    step: Any = partitioner.get_state(state.step)
    return int(step)


def _best(state: Any, store: Checkpoints, partitioner: Partitioner, stopping: EarlyStopping, say: Callable[[str], None]) -> Any:
    """The state with the best evaluation, on the devices, in place of the last one."""
    done, best = steps_of(state, partitioner), stopping.best
    if best is None:
        return state
    say(stopping.words(done))
    if best == done:
        return state
    try:
        found = _read(store, state, partitioner, only=best)
    except LookupError as error:
        raise CheckpointDamaged(f"the checkpoint of the best step is gone; another run would start over: {error}") from error
    assert found is not None
    return _in_place_of(state, found[0], partitioner)


def _resume(
    run: RunDir,
    state: Any,
    checkpoints: Checkpoints,
    meta: Mapping[str, Any],
    partitioner: Partitioner,
    *,
    saved: SavedRun | None,
    total_steps: int,
    stopping: EarlyStopping | None,
    refresh: Refresh | None,
    say: Callable[[str], None],
) -> Any:
    """The state of the newest good checkpoint on the devices; `state` itself if there is none."""
    if not hosts.run_on_first(lambda: checkpoints.latest_step() is not None or bool(checkpoints.quarantined())):
        return state  # without a copy of the state, whose form reading needs
    saves = hosts.run_on_first(checkpoints.has_files)  # a kill may leave an empty folder, which reading removes
    found = _read(checkpoints, state, partitioner, release=saves)
    if found is None:
        if saves:
            raise CheckpointDamaged(f"the checkpoints of {run.path} disappeared while they were read")
        return state
    restored, meta_of_saved = found
    is_now, here = meta["fingerprint"], SavedRun(str(run.path), int(restored.step), meta_of_saved)
    check_settings(here.place, here.fingerprint, is_now)
    if "data" in is_now:
        check_data(here, is_now["data"], meta["data"])
    if stopping is not None:
        check_held_out(here, meta["data"])
    check_length(here, steps=total_steps)
    if is_now.get("behind", 0) != here.fingerprint.get("behind", 0) and (saved is None or saved.step != here.step):
        raise CheckpointDamaged(f"the newest checkpoint of {run.path} was damaged and set aside; run the same command again")
    if stopping is not None and not other_held_out(here, meta["data"]):
        stopping.resume(meta_of_saved.get("early_stopping", {}), place=here.place)
        stopping.catch_up(hosts.run_on_first(lambda: _evaluations(run, stopping.metric)), until=here.step)
        if stopping.best is not None:
            checkpoints.pin(stopping.best)
    if refresh is not None:
        refresh.resume(meta_of_saved.get("reference", {}))
    _say_what_changed(here, meta, say)
    say(f"continuing {run.path} after {here.step} steps")
    if run_length(here.fingerprint) == run_length(is_now):  # otherwise it was extended, not interrupted
        _note_resumption(run, here.step, total_steps)
    return _in_place_of(state, restored, partitioner)


def _evaluations(run: RunDir, metric: str) -> list[dict[str, Any]]:
    """Rows of the log with an evaluation of `metric`: that of the newest checkpoint may have come after it was saved."""
    name = f"eval/{metric}"
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    return [{"step": row["step"], name: row[name]} for row in rows if name in row]


def _at_its_reference(state: Any, done: int, refresh: Refresh, store: Checkpoints, partitioner: Partitioner) -> Any:
    """The state after `done` steps, with the reference of the next step in `refresh`.

    If its log-probabilities are incomplete, the checkpoint of the step that defines them is read in between.
    """
    made = refresh.origin(done)
    if made == 0:
        return state
    try:
        weights = refresh.record["weights"] if refresh.record.get("step") == made else _weights_of(store, made)
        complete = made == done or not refresh.lacks(made, weights)
        found = None if complete else _read(store, state, partitioner, only=made)
    except LookupError as error:
        raise CheckpointDamaged(f"the output of step {made} is incomplete, and its weights are gone: {error}") from error
    if found is not None:
        state = _in_place_of(state, found[0], partitioner)
    refresh.update(made, state.variables, weights, steps=store.steps())
    if found is None:
        return state
    again = _read(store, state, partitioner, only=done)
    assert again is not None
    return _in_place_of(state, again[0], partitioner)


def _refresh(refresh: Refresh, store: Checkpoints, state: Any, done: int) -> None:
    refresh.update(done, state.variables, _weights_of(store, done), steps=store.steps())


def _weights_of(store: Checkpoints, step: int) -> str:
    """`Checkpoints.params_digest`, read by the first host: another one may not see the new step on a shared disk yet."""

    def read() -> tuple[str | None, str]:
        try:
            return store.params_digest(step), ""
        except LookupError as error:
            return None, str(error)

    found, why = hosts.run_on_first(read)
    if found is None:
        raise LookupError(why)
    return found


def _in_place_of(state: Any, restored: Any, partitioner: Partitioner) -> Any:
    """The restored state on the devices, with the frozen part of `state`, whose rest `_read` has released."""
    placed = partitioner.put_state(restored)
    return placed.replace(frozen=state.frozen) if isinstance(state, PartlyFrozen) else placed


def _without_frozen(state: Any) -> Any:
    """The part of a state that is saved."""
    return state.replace(frozen={}) if isinstance(state, PartlyFrozen) else state


def _read(
    store: Checkpoints, state: Any, partitioner: Partitioner, *, only: int | None = None, release: bool = True
) -> tuple[Any, Any] | None:
    """(state in saved form, meta) of the newest good checkpoint, or of step `only`, structured like `state`.

    `state` is released first, but for its frozen part: devices may have no room for two states.
    """
    saved = _without_frozen(state)
    shapes = partitioner.saved_shapes(saved)
    if release:
        free(saved)
    with reported("reading the checkpoint"):
        return store.restore_latest(shapes, only=only)


def _say_what_changed(saved: SavedRun, meta: Mapping[str, Any], say: Callable[[str], None]) -> None:
    before, now = run_length(saved.fingerprint), run_length(meta["fingerprint"])
    if before != now:
        say(f"the length of the run is now {now}; it was {before}")
    if other_held_out(saved, meta["data"]):
        lines = "\n".join(data_changes(saved.data, meta["data"]))
        say(f"note: the held-out pairs changed; evaluations before and after cannot be compared\n{lines}")


def _note_resumption(run: RunDir, step: int, total_steps: int) -> None:
    """Records in `resumes.jsonl` that an interrupted run resumes after `step` steps."""
    if hosts.is_first() and 0 < step < total_steps:
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with appending(run.resumes) as file:
            file.write(json.dumps({"step": step, "time": time}) + "\n")


def free(tree: Any) -> None:
    """Releases the device memory of arrays that are no longer needed."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.delete()
