"""Sweep of many short runs, one or a few at a time. Finished runs are read from disk, interrupted ones start again."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax

from dpo_jax.data.splits import listed
from dpo_jax.runtime import hosts
from dpo_jax.runtime.rundir import write_json
from dpo_jax.shapes import check_shape
from dpo_jax.untrusted import Unreadable, read_object
from dpo_jax.writing import empty_folder

RESULT = "result.json"
POINT = {"step": float, **{name: float for value in ("reward", "kl") for name in (value, f"{value}_low", f"{value}_high")}}


def reward_at_kl(point: Mapping[str, float]) -> str:
    return f"reward {point['reward']:6.2f} at KL {point['kl']:6.2f} nats"


@dataclasses.dataclass(frozen=True)
class Run:
    """One point or curve of the figure. `settings` is everything that its result depends on, except what all runs share."""

    method: str
    label: str  # "beta 0.1"
    settings: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        return "-".join([self.method, *self.label.split(), f"seed{self.seed}"]).replace("/", "_")


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a run. `points` are its measurements in order; each has `step`, `reward`, `kl` and their intervals, or the
    fields given to `sweep` as `point`."""

    run: Run
    points: list[dict[str, float]]
    seconds: float


def sweep(
    runs: Iterable[Run],
    folder: Path,
    *,
    shared: Mapping[str, Any],
    perform: Callable[[Run, Path], list[dict[str, float]]],
    jobs: int = 1,
    point: Mapping[str, Any] = POINT,
    words: Callable[[Mapping[str, float]], str] = reward_at_kl,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """Calls `perform(run, its folder)` for every run without a result in `folder`. Returns results in the order of `runs`.

    `shared` is what all runs depend on. A result made with other settings or another `shared` is replaced. A result is written
    atomically, after everything else of its run: a killed sweep continues with the runs that were in progress.

    `point`: the shape of a measured point (`dpo_jax.shapes`). `words` describes the last point on a finished run's progress
    line.

    `jobs` threads perform runs at the same time, because a small model leaves most of a processor idle. When a run fails, the
    runs in progress finish, no other starts, and its exception is raised. With several hosts all call this and share `folder`.
    Each run then uses all hosts, one run at a time, because threads would meet in different orders on different hosts; the
    first one writes.
    """
    runs = list(runs)
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        raise ValueError(f"two runs of a sweep have one name: {sorted(name for name in names if names.count(name) > 1)}")
    jobs = 1 if jax.process_count() > 1 else jobs
    others: collections.Counter[str] = collections.Counter()
    kept = hosts.run_on_first(lambda: [_finished(folder / run.name, run, shared, point, say, others) for run in runs])
    for settings, count in others.items():
        say(f"{count} of {len(runs)} results are of other settings, and are replaced: {settings}")
    results = {run.name: None if one is None else Result(run, *one) for run, one in zip(runs, kept, strict=True)}
    left = [run for run in runs if results[run.name] is None]
    if len(left) < len(runs):
        say(f"{len(runs) - len(left)} of {len(runs)} runs are finished already")

    def one(run: Run) -> Result:
        here = folder / run.name
        with hosts.first_goes_first("sweep"):
            if hosts.is_first():
                empty_folder(here, ours=(RESULT, "metrics.jsonl"))
        begin = clock()
        points = perform(run, here)
        seconds = clock() - begin
        measured = hosts.run_on_first(lambda: {"points": points, "seconds": seconds})
        if hosts.is_first():
            write_json(here / RESULT, {**_identity(run, shared), "measured": measured, "digest": _digest(measured)})
        return Result(run, **measured)

    begin = clock()
    for number, done in enumerate(_at_a_time(one, left, jobs), start=1):
        results[done.run.name] = done
        seconds_left = (clock() - begin) / number * (len(left) - number)
        say(_line(len(runs) - len(left) + number, len(runs), done, words(done.points[-1]), seconds_left))
    return [result for result in results.values() if result is not None]


def _at_a_time(one: Callable[[Run], Result], runs: Sequence[Run], jobs: int) -> Iterator[Result]:
    """Yields `one(run)` for all runs, in the order in which they end."""
    if jobs == 1:  # in the main thread, which receives signals
        yield from map(one, runs)
        return
    ahead = iter(runs)
    with ThreadPoolExecutor(jobs) as pool:
        # Only as many runs are submitted as are performed, so none that has not started needs canceling.
        going = {pool.submit(one, run) for run in itertools.islice(ahead, jobs)}
        while going:
            ended, going = wait(going, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
                going |= {pool.submit(one, run) for run in itertools.islice(ahead, 1)}


def _identity(run: Run, shared: Mapping[str, Any]) -> dict[str, Any]:
    # In the form it has after a round trip through the file.
    return json.loads(json.dumps({"run": dataclasses.asdict(run), "shared": dict(shared)}))


def _differing(one: Any, other: Any, name: str = "") -> list[str]:
    """The dotted names of the settings in which two identities differ."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [name]
    below = ((key, f"{name}.{key}".removeprefix(".").removeprefix("shared.")) for key in {**one, **other})
    return [found for key, inner in below for found in _differing(one.get(key), other.get(key), inner)]


def _digest(measured: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def _finished(
    folder: Path,
    run: Run,
    shared: Mapping[str, Any],
    point: Mapping[str, Any],
    say: Callable[[str], None],
    others: collections.Counter[str],
) -> tuple[list[dict[str, float]], float] | None:
    """Points and seconds of the result in a folder; None if it is missing, of other settings (whose names are counted in
    `others`), or damaged (which is reported)."""
    try:
        found = read_object(folder / RESULT)
        if differing := _differing({name: found.get(name) for name in ("run", "shared")}, _identity(run, shared)):
            others[listed(differing)] += 1
            return None
        measured = found.get("measured", found)  # earlier versions had no digest, and stored these keys next to `run`
        check_shape(measured, {"points": [{**point, str: (float, None)}], "seconds": float}, str(folder / RESULT))
        if not measured["points"] or ("measured" in found and found.get("digest") != _digest(measured)):
            raise Unreadable(f"{folder / RESULT}: what was measured differs from its digest")
    except FileNotFoundError:
        return None
    except Unreadable as error:
        say(f"{run.name} is run again, as its result is damaged: {error}")
        return None
    return measured["points"], measured["seconds"]


def _line(number: int, count: int, done: Result, words: str, seconds_left: float) -> str:
    left = f"; about {max(1, round(seconds_left / 60))} min left" if seconds_left else ""
    run = f"{done.run.method:14} {done.run.label:14} seed {done.run.seed}"
    return f"{number:3}/{count}  {run}  {words}  ({done.seconds:.0f} s{left})"
