"""Runs the contenders alternately, each in its own process, and checks that they agree before it compares speeds."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dpo_jax
from dpo_jax.bench import gates, updates
from dpo_jax.bench.profile import TRACEABLE
from dpo_jax.bench.work import CONTENDERS, LIBRARIES, SAMPLERS, SamplingWork, Work, library
from dpo_jax.runtime.progress import reported

Results = dict[str, list[dict[str, Any]]]
"""Measurements of each contender (and of each library's matrix product), one entry per round."""


_REMEDY = "Leave it out with --bench.contenders, or divide its batches (--bench.torch-microbatches, --dpo.microbatches)."


class ContenderFailed(RuntimeError):
    """A contender's process ended with an error."""


def race(
    work: Work,
    names: Sequence[str],
    *,
    rounds: int,
    python: str = sys.executable,
    say: Callable[[str], None] = print,
) -> tuple[Results, dict[str, Any]]:
    """Runs all contenders in turn, `rounds` times. Returns their measurements, and how far they differ (`gates.check`).

    The first round is longer (loss curves and updated weights), starts with empty compilation caches, and ends with the gates,
    so that `GateFailed` is raised before the hours of the other rounds. `python` is the interpreter of the PyTorch contenders.
    Raises `ContenderFailed` with the end of a contender's error output.
    """
    order = [LIBRARIES[kind] for kind in LIBRARIES if any(library(name) == kind for name in names)] + list(names)
    results: Results = {name: [] for name in order}
    for name in names:
        shutil.rmtree(work.compiled(name), ignore_errors=True)
    differences: dict[str, Any] = {}
    compared = names if len(names) > 1 else []  # by their weights
    try:
        for number in range(rounds):
            for name in order:
                steps = work.longest_run if number == 0 else work.steps + 1
                start = time.perf_counter()
                interpreter = python if library(name) == "torch" else sys.executable
                weights = number == 0 and name in compared
                result = run_one(work, name, steps=steps, round_number=number, python=interpreter, weights=weights)
                results[name].append(result)
                say(f"round {number + 1}/{rounds}  {name:13} {_headline(work, result)}  ({time.perf_counter() - start:.0f} s)")
            if number == 0:
                differences = _judge(work, {name: results[name][0] for name in names}, compared)
    finally:
        shutil.rmtree(work.all_weights, ignore_errors=True)
    for number in range(1, rounds):
        gates.check({name: results[name][number] for name in names}, precision=work.precision)
    return results, differences


def _judge(work: Work, results: dict[str, dict[str, Any]], compared: Sequence[str]) -> dict[str, Any]:
    """Checks the gates of the first round, then deletes the weights it left: one model per contender."""
    found = updates.compare(work.model, {name: work.weights(name) for name in compared}) if compared else None
    shutil.rmtree(work.all_weights, ignore_errors=True)
    return gates.check(results, precision=work.precision, updates=found)


def run_one(
    work: Work | SamplingWork,
    name: str,
    *,
    steps: int,
    round_number: int = 0,
    python: str = sys.executable,
    trace: str | None = None,
    weights: bool = False,
) -> dict[str, Any]:
    """Runs one contender once, in a new process. Keeps its output in `<folder>/logs`, and with `weights` its final model."""
    folder = Path(work.folder)
    out = folder / "rounds" / f"{name}-{round_number}.json"
    log = folder / "logs" / f"{name}-{round_number}.log"
    for path in (out, log):
        path.parent.mkdir(exist_ok=True)
    out.unlink(missing_ok=True)
    package = str(Path(dpo_jax.__file__).parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",  # the model is a local folder; no network traffic while a clock runs
        "TOKENIZERS_PARALLELISM": "false",
    }
    if trace is not None:
        environment["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), TRACEABLE]))
    command = [python, "-m", "dpo_jax.bench.contender", work.folder, name, str(steps), repr(time.time()), str(out)]
    command += [] if trace is None else ["--trace", trace]
    command += ["--weights", str(work.weights(name))] if weights and isinstance(work, Work) else []
    said = reported(f"{name}, round {round_number + 1}", brief=True)
    with open(log, "wb") as output, _stopped_by_signals(), said, _Neighbors() as neighbors:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if done.returncode or not out.is_file():
        tail = log.read_text(errors="replace").strip().splitlines()[-8:]
        killed = ", killed: out of memory?" if done.returncode == -signal.SIGKILL else ""
        raise ContenderFailed(
            f"{name} ended with exit code {done.returncode}{killed}; all of its output is in {log}, the end of it:\n"
            + "\n".join(f"    {line}" for line in tail)
            + f"\n{_REMEDY if name not in SAMPLERS else 'If memory is short, name fewer prompts in --bench.sampling.'}"
        )
    return json.loads(out.read_text()) | {"neighbors": neighbors.share}


def pairs_per_second(work: Work, result: dict[str, Any]) -> float:
    """Pairs per second over the timed steps: all but the first, which fills caches. They are the same in every round."""
    return work.steps * work.batch / sum(result["step_seconds"][1 : work.steps + 1])


def _headline(work: Work, result: dict[str, Any]) -> str:
    if "flops_per_second" in result:
        return f"{result['flops_per_second'] / 1e9:8.0f} GFLOP/s"
    return f"{pairs_per_second(work, result):8.2f} pairs/s, {result['peak_bytes'] / 2**30:.2f} GiB"


class _Neighbors:
    """Share of the cores that other processes used during the race, 0 to 1; always 0 outside Linux. It should be small."""

    share = 0.0

    def __enter__(self) -> _Neighbors:
        self._start = self._read()
        return self

    def __exit__(self, *exception: object) -> None:
        busy, total, mine = (late - early for early, late in zip(self._start, self._read(), strict=True))
        self.share = max(0.0, busy - mine) / total if total else 0.0

    def _read(self) -> tuple[float, float, float]:
        """CPU seconds since the start of the machine: in use, altogether, and of this process and the contenders that ended."""
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        mine = sum(used.ru_utime + used.ru_stime for used in usage)
        stat = Path("/proc/stat")
        if not stat.is_file():
            return 0.0, 0.0, mine
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user
        ticks = [int(count) for count in stat.read_text().split("\n")[0].split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        return (sum(ticks) - sum(ticks[3:5])) / second, sum(ticks) / second, mine


@contextmanager
def _stopped_by_signals():
    """Makes SIGTERM end this process as Ctrl-C does, so that `subprocess.run` ends the contender too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def installed(packages: Sequence[str], *, python: str = sys.executable) -> bool:
    """Whether all of `packages` are installed for the interpreter `python`. Raises OSError if there is no such interpreter."""
    code = "import sys, importlib.util as u; sys.exit(any(u.find_spec(p) is None for p in sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *packages], check=False).returncode == 0


def check_names(text: str | None) -> list[str]:
    """The contenders in a comma-separated list, in the order of the race; None: all. Raises ValueError for an unknown one."""
    asked = list(CONTENDERS) if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in asked if name not in CONTENDERS]
    if unknown or not asked:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(CONTENDERS)}")
    return [name for name in CONTENDERS if name in asked]
