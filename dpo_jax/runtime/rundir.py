"""Run directory: its lock, the names of its files, and the record of the environment."""

from __future__ import annotations

import datetime
import errno
import fcntl
import importlib.metadata
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.data.terminal import json_text
from dpo_jax.locks import open_lock
from dpo_jax.writing import naming, write_whole

PACKAGES = (
    "dpo_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
)
PACKAGE = Path(__file__).parent.parent


OUTPUTS = (
    *("optimum", "pairs.json", "second_reward.png"),
    *("config.yaml", "data_report.json", "finished.json", "metrics.jsonl", "resumes.jsonl", "README.md", "tensorboard"),
    *("checkpoints", "export", "plots", "policy", "report.json", "result.json", "results.json", "results.jsonl", "results.csv"),
    *("summary.json", "samples.jsonl", "rewards.jsonl", "reliability.png", "displacement.png", "pairs.jsonl", "win_rates.csv"),
    *("win_rates.png", "verdicts.jsonl", "study.html", "key.json", "agreement.json", "train.jsonl", "test.jsonl"),
    *("optimum.json", "optimum.png", "frontier.png", "race.png", "sampling.json", "reward_model", "runs", "references"),
    *("robust.png", "control.png", "pairs", "reward_models"),
    *("scenes.png", "encoder", "features", "sft"),
    *("digits.png", "diffusion.png", "pretrained", "reference_errors"),
    *("rounds.jsonl", "labels.jsonl"),
)
"""Names that runs write in their folders."""


class RunLocked(RuntimeError):
    """Another live process writes to this run directory."""


class RunDir:
    """Creates `path` and holds its lock until `close`, the end of the `with` block, or the end of the process, even by a kill.

    Raises RunLocked, naming the other process, if another one holds the lock, and FileExistsError for a folder that no run
    created but that has a file named in `writes`, which a run would replace. With `lock=False` there is no lock, only names:
    for the other hosts of a run.
    """

    def __init__(self, path: str | os.PathLike[str], *, lock: bool = True, writes: Sequence[str] = OUTPUTS):
        self.path = Path(path)
        if lock:
            _refuse_foreign(self.path, writes)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _acquire(self.path / "run.lock") if lock else None

    config = property(lambda self: self.path / "config.yaml")
    env = property(lambda self: self.path / "env.json")
    data_report = property(lambda self: self.path / "data_report.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    resumes = property(lambda self: self.path / "resumes.jsonl")
    plots = property(lambda self: self.path / "plots")
    export = property(lambda self: self.path / "export")
    card = property(lambda self: self.path / "README.md")

    def write_env(self) -> None:
        write_json(self.env, environment())

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _refuse_foreign(path: Path, writes: Sequence[str]) -> None:
    if any(os.path.lexists(path / mark) for mark in ("run.lock", "env.json")):
        return
    if any(step.name.isdigit() for step in (path / "checkpoints").glob("*/")):  # a copied run, to be continued
        return
    if foreign := [path / name for name in writes if os.path.lexists(path / name)]:
        words = "already exists in a folder that is not a run; move it away, or choose another folder"
        raise FileExistsError(errno.EEXIST, words, str(foreign[0]))


def check_unlocked(path: str | os.PathLike[str]) -> None:
    """Raises RunLocked if another process uses the run directory `path`. Writes nothing and keeps no lock."""
    lock = Path(path) / "run.lock"
    if os.path.lexists(lock):
        os.close(_hold(lock, open_lock(lock, create=False), fcntl.LOCK_SH))


def _locked(lock: Path, holder: bytes) -> RunLocked:
    who = holder.decode(errors="replace").strip() or "not known"
    gone = f"if its host is gone for good, delete {lock}"  # the next run then locks a new file
    return RunLocked(f"another run ({who}) uses {lock.parent}: wait for it, or choose another directory; {gone}")


def _acquire(path: Path) -> int:
    # The lock is the kernel's (flock), not the file. It ends with its process, so a kill leaves no stale lock.
    descriptor = _hold(path, open_lock(path), fcntl.LOCK_EX)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"pid {os.getpid()}, host {socket.gethostname()}, since {started}\n".encode())
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _hold(path: Path, descriptor: int, kind: int) -> int:
    """Takes the lock, or closes the file and raises RunLocked, or OSError if the file system has no locks."""
    try:
        with naming(path):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000)
        os.close(descriptor)
        raise _locked(path, holder) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def environment() -> dict[str, Any]:
    """The environment on which a run's numbers depend: versions, devices, platform, command line, XLA flags.

    `git` is `checkout` of this package: null for an installed package.
    """
    import jax  # imported here: locks and finished runs do not need it

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": packages(),
        "git": checkout(PACKAGE),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in devices],
        "processes": jax.process_count(),
        "flags": {name: value for name, value in os.environ.items() if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "argv": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def checkout(package: Path) -> dict[str, Any] | None:
    """The commit of the git checkout that tracks `package`, and whether files of the package differ from it (`dirty`).

    None without git, and for a package installed inside another project's checkout, whose commit is unrelated.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # the hosts of a run query the same checkout at once
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20, env=quiet).stdout.strip()

    try:
        if not git("ls-files", f"{package.name}/__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", package.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def packages() -> dict[str, str | None]:
    """{package: installed version} of the packages that affect a run's numbers."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: readers never see a partial file, even after a machine crash.

    NaN and infinity, which JSON lacks, are written as null.
    """
    write_whole(path, (json_text(_finite(content), indent=2) + "\n").encode())


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value
