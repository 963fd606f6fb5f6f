"""Checkpoints of training state, verified by digests: restored bit for bit, or set aside.

Orbax writes asynchronously and atomically, but it silently restores a flipped bit or an array of another dtype, and takes an
empty folder for the latest step (seen with orbax 0.12.8). So each step also has a record: shape, dtype and digest of every
leaf, and a digest of the record itself. The digests are of the logical arrays, not of files. They do not depend on the devices
a state is saved from or restored to, and each host computes its part locally (`runtime.tiles`). Once orbax has committed a
step, it is sealed: the seal also finds damage in files of orbax that a restore does not read.

    directory/120/state       orbax arrays, one flat dict: {"params.params.wte": ..., "opt_state.1.0.nu...": ..., "step": ...}
    directory/120/record      JSON: leaves, the caller's `meta`, digest
    directory/120/files.json  the seal (`runtime.seal`)
    directory/unsealed        the number of the step being saved: after a kill between its commit and its seal it needs
                              no seal, because its leaves verify it. Any other step without a seal is damaged.
    directory/quarantine      steps that did not verify; nothing is deleted from here
    directory/deleting        steps being deleted: orbax renames them here, which a kill cannot leave half done

`directory` may be in a bucket (`gs://...`, with the package gcsfs); orbax then deletes old steps immediately.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # comes with orbax; pathlib that also reads gs://

from dpo_jax.runtime import hosts
from dpo_jax.runtime.checkpoint_record import (
    READ,
    Leaves,
    check_leaves,
    check_target,
    make_record,
    named,
    read_record,
    record_digest,
)
from dpo_jax.runtime.checkpoint_record import StateMismatch as StateMismatch
from dpo_jax.runtime.seal import check_seal, digest, is_remote, is_sealed, write_seal, write_whole
from dpo_jax.runtime.storage_errors import is_of_absence, is_of_storage
from dpo_jax.types import Array
from dpo_jax.untrusted import check_name

logger = logging.getLogger(__name__)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks that orbax logs, one per thread: it also raises them, and they are caught here."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


DELETING, QUARANTINE, UNSEALED = "deleting", "quarantine", "unsealed"


class CheckpointDamaged(RuntimeError):
    """There were checkpoints, but all are damaged. They were moved to `quarantine/`; delete that folder to start over."""


_TO_START_OVER = "restore their files and move them back, or delete them to train from the beginning"


class CheckpointWriteError(OSError):
    """A save did not reach the disk. Older steps are intact. `filename` is the directory."""

    def __init__(self, message: str, *, filename: str):
        super().__init__(message)
        self.filename = filename

    def __str__(self) -> str:
        return self.args[0]


def _steps_in(folder: epath.Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [int(name) for name in names if name.isascii() and name.isdecimal()]


def has_steps(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` contains any saved step, complete or not."""
    return bool(_steps_in(epath.Path(directory)))


def newest_meta(directory: str | os.PathLike[str]) -> tuple[int, dict[str, Any]] | None:
    """(step, meta) of the newest complete checkpoint, read without its arrays; None if there is none."""
    folder = epath.Path(directory)
    for step in sorted(_steps_in(folder), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return step, read_record(folder / str(step))["meta"]
    return None


class Checkpoints:
    """The checkpoints of one run in `directory`; the newest `max_to_keep` are kept. A context manager.

    Several hosts share the directory, and all of them make every call. For each of the newest steps, step `origin(step)` is
    kept as well. If the context ends with an error and `agreed` is not true, a host does not wait for the others, which may
    not have failed: a save in progress is then lost.

    Without `read_only` it must be the only user of the directory (`RunDir` holds the lock), and leftovers of a killed process
    are removed at the start. With `read_only` nothing is changed, and a run may be writing at the same time.

    >>> with Checkpoints("checkpoints") as checkpoints:
    ...     checkpoints.save(state.step, state, {"beta": 0.1})
    ...     checkpoints.wait()
    ...     restored, meta = checkpoints.restore_latest(jax.eval_shape(lambda: state))
    >>> int(restored.step), meta
    (0, {'beta': 0.1})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int = 2,
        read_only: bool = False,
        origin: Callable[[int], int] = lambda step: step,
    ):
        logging.getLogger("absl").addFilter(_is_news)  # orbax's logger; a filter that is there is not added again
        self._read_only = read_only
        self.directory = epath.Path(directory)
        self._unsealed: int | None = None
        self._pinned: list[int] = []
        if not is_remote(directory):
            self.directory = self.directory.resolve()  # orbax refuses relative paths
            check_name(self.directory)  # or every step would seem damaged
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._purge()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(max_to_keep, self._pinned, origin),
                todelete_subdir=DELETING,
                cleanup_tmp_directories=True,
            )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(self, step: int | Array, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving a tree of arrays, and returns once the arrays may be donated. `meta` is JSON: config, versions, ...

        A save counts only if `wait` or a later `check_errors` did not raise. Raises CheckpointWriteError if this save or the
        one before it failed, and ValueError if the directory already has `step` or a later one.
        """
        step = int(step)  # `state.step` is an array, which orbax and JSON reject
        leaves = named(state)
        record = make_record(step, leaves, meta)
        self.wait()
        if not self._manager.should_save(step):
            latest = self._manager.latest_step()
            raise ValueError(f"step {step} was not saved: {self.directory} is read only, or already holds step {latest}")
        with _writing(self.directory):
            self._purge()
            if hosts.is_first():
                write_whole(self.directory / UNSEALED, str(step))
            arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), record=ocp.args.JsonSave(record))
            self._manager.save(step, args=arguments)
            self._unsealed = step

    def pin(self, step: int) -> None:
        """Keeps `step` regardless of later ones, and unpins the step pinned before."""
        self._pinned[:] = [step]

    def restore_latest(self, abstract_state: Any, *, only: int | None = None) -> tuple[Any, dict[str, Any]] | None:
        """(state, meta) of the newest step that verifies, or None in a directory without checkpoints.

        abstract_state: the tree to fill, as from `jax.eval_shape`. A leaf with a sharding becomes a `jax.Array` laid out that
            way, any other a numpy array.

        A damaged step is moved to `quarantine/` with a warning, and the next older one is tried. An error of the storage, such
        as too many open files or a lost network, is raised, and nothing is moved. Raises CheckpointDamaged if none is left, and
        StateMismatch, before any array is read, naming each leaf that differs in the checkpoint. With `only`, just that step is
        tried; LookupError if it does not exist.
        """
        self.wait()
        wanted = named(abstract_state)
        damaged: list[int] = []
        unfinished = self._last_begun()  # read before any seal: a running process seals a step and then clears this
        # A folder that hosts share over a network need not look the same to all of them at once.
        steps: list[int] = hosts.run_on_first(lambda: sorted(self._manager.all_steps(), reverse=True))
        if only is not None and only not in steps:
            raise LookupError(f"{self.directory} has no step {only}, but {', '.join(map(str, steps[::-1])) or 'none'}")
        for step in steps if only is None else [only]:
            sealed = step != unfinished
            record, error = _attempt(lambda step=step, seal=sealed: self._read_record(step, needs_seal=seal), sealed=sealed)
            if error is not None:
                damaged += self._set_aside(step, error)
                continue
            check_target(record, wanted, f"{self.directory / str(step)}")
            leaves, error = _attempt(lambda step=step, record=record: self._read_leaves(step, record, wanted), sealed=sealed)
            if error is not None:
                damaged += self._set_aside(step, error)
                continue
            logger.info("restored step %d from %s", step, self.directory)
            self._unsealed = step if step == unfinished and not self._read_only else None
            self.wait()
            return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in wanted]), record["meta"]
        if damaged:
            if self._read_only:
                raise CheckpointDamaged(f"{self.directory}: no checkpoint verifies (steps {damaged})")
            where = self.directory / QUARANTINE
            raise CheckpointDamaged(f"no checkpoint verifies (steps {damaged}, now in {where}); {_TO_START_OVER}")
        if not self._read_only and (lost := hosts.run_on_first(self.quarantined)):
            where = self.directory / QUARANTINE
            raise CheckpointDamaged(f"there are only steps {lost} in {where}, which did not verify; {_TO_START_OVER}")
        return None

    def steps(self) -> list[int]:
        """All steps in the directory, verified or not."""
        return sorted(self._manager.all_steps())

    def params_digest(self, step: int) -> str:
        """A digest of the trained parameters after `step` steps, from the record alone. Raises LookupError if there is none."""
        try:
            leaves = read_record(self.directory / str(step))["leaves"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LookupError(f"{self.directory} has no intact step {step}: {error}") from error
        return digest({name: leaf for name, leaf in leaves.items() if name.startswith("params.")})

    def latest_step(self) -> int | None:
        """The newest step in the directory, verified or not."""
        return self._manager.latest_step()

    def has_files(self) -> bool:
        """Whether any step, verified or not, is more than an empty folder."""
        return any(next(iter((self.directory / str(step)).iterdir()), None) is not None for step in self.steps())

    def quarantined(self) -> list[int]:
        """The steps that did not verify and were moved to quarantine."""
        folder = self.directory / QUARANTINE
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted({int(found[1]) for name in names if (found := re.fullmatch(r"([0-9]+)(-[0-9]+)?", name))})

    def wait(self) -> None:
        """Returns once everything saved is on disk and sealed. Raises CheckpointWriteError otherwise."""
        with _writing(self.directory):
            step, self._unsealed = self._unsealed, None
            self._manager.wait_until_finished()
            if step is None or not hosts.is_first():
                return
            if not is_sealed(self.directory / str(step)):
                write_seal(self.directory / str(step))
            (self.directory / UNSEALED).unlink(missing_ok=True)

    def check_errors(self) -> None:
        """Raises CheckpointWriteError if a background save has failed so far. Does not wait."""
        # Not manager.check_for_errors(): orbax's finishing thread takes the error first, and only waiting raises it.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits for running saves, then releases the directory."""
        self.wait()
        with _writing(self.directory):
            self._manager.close()
        if not self._read_only:
            self._purge()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and jax.process_count() > 1 and not getattr(error, "agreed", False):
            return  # close() waits for all hosts. Those without this error would not come, and it would never be reported
        try:
            self.close()
        except CheckpointWriteError as second:
            if error is None:
                raise
            if not isinstance(error, OSError):  # on a full disk nothing can be written, and one message is enough
                logger.error("%s", second)  # and let the first error propagate

    def _last_begun(self) -> int | None:
        """The step whose save was not finished when the directory was last written to, if any."""
        try:
            return int((self.directory / UNSEALED).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _read_record(self, step: int, *, needs_seal: bool) -> dict[str, Any]:
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        if record["digest"] != record_digest(record):
            raise ValueError("the record differs from its digest")
        if record["step"] != step:
            raise ValueError(f"the record is of step {record['step']}")
        folder = self.directory / str(step)
        if record["format"] in READ and hosts.is_first() and (needs_seal or is_sealed(folder)):
            check_seal(folder)
        return record

    def _read_leaves(self, step: int, record: Mapping[str, Any], wanted: Leaves) -> Leaves:
        # Check stored shapes first: damaged metadata could request more memory than there is.
        stored = self._manager.item_metadata(step)["state"]
        found = {name: (list(stored[name].shape), str(np.dtype(stored[name].dtype))) for name in stored}
        if found != {name: (leaf["shape"], leaf["dtype"]) for name, leaf in record["leaves"].items()}:
            raise ValueError("shapes or dtypes of the stored arrays differ from the record")
        how = {name: _restore_args(leaf) for name, leaf in wanted.items()}
        arguments = ocp.args.PyTreeRestore(item={name: 0 for name in wanted}, restore_args=how)
        leaves = self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        check_leaves(record, leaves)
        return leaves

    def _set_aside(self, step: int, error: Exception) -> list[int]:
        """Moves a step that did not verify to quarantine, and returns [step]. An empty folder is deleted, no loss: []."""
        source = self.directory / str(step)
        lost: list[int] = hosts.run_on_first(lambda: [step] if source.exists() and any(source.iterdir()) else [])
        done = "left where it is"
        if not self._read_only:
            if hosts.is_first() and lost:
                source.rename(_free_name(self.directory / QUARANTINE, str(step)))
            elif hosts.is_first() and source.exists():
                source.rmdir()
            hosts.barrier("quarantine")
            self._manager.reload()
            done = f"moved to {self.directory / QUARANTINE}" if lost else "its folder was empty, and is deleted"
        reason = [*str(error).strip().splitlines(), ""][0]
        logger.warning("checkpoint of step %d does not verify (%s: %.200s); %s", step, type(error).__name__, reason, done)
        return lost

    def _purge(self) -> None:
        leftovers = self.directory / DELETING
        if hosts.is_first() and leftovers.is_dir():
            for folder in leftovers.iterdir():
                if re.match(r"\d", folder.name) and folder.is_dir():  # orbax names it after its step; else it is foreign
                    folder.rmtree()
            if leftovers.is_dir() and not any(leftovers.iterdir()):  # in a bucket, a folder disappears with its last file
                leftovers.rmdir()
        hosts.barrier("purge")


class _Keep:
    """Preservation policy for orbax: keeps the newest `count` steps, their origins, and those in `pinned`, a mutable list."""

    def __init__(self, count: int, pinned: Sequence[int], origin: Callable[[int], int]):
        self._count, self._pinned, self._origin = count, pinned, origin

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = {found.step for found in checkpoints[-self._count :]}
        kept = newest | {self._origin(step) for step in newest} | {*self._pinned}
        return [found.step in kept for found in checkpoints]


@contextlib.contextmanager
def _writing(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointWriteError(f"saving to {directory} failed: {error}", filename=str(directory)) from error


def _attempt(read: Any, *, sealed: bool) -> tuple[Any, Exception | None]:
    """(result, None), or (None, error) on all hosts if a file is damaged: each host reads different parts of the files.

    Raises on all hosts if the storage, the network or the memory of one of them failed: the files may be intact. So may a file
    of a `sealed` step that only another host than the first does not find: a network disk may show it the folder of a minute
    ago, and the first one has just seen all files.
    """
    result, error = None, None
    try:
        result = read()
    except Exception as caught:
        error = caught
    stale = hosts.run_on_first(lambda: error is None) and sealed and error is not None and is_of_absence(error)
    failed = error if error is not None and (stale or is_of_storage(error)) else None
    if hosts.anywhere(failed is not None):
        raise failed or OSError("another host could not read the checkpoint; nothing was moved")
    if hosts.anywhere(error is not None):
        return None, error or ValueError("another host could not read its part")
    return result, None


def _free_name(folder: epath.Path, name: str) -> epath.Path:
    folder.mkdir(parents=True, exist_ok=True)
    if is_remote(folder):  # in a bucket a folder exists if it contains something
        write_whole(folder / "README", "Steps that did not verify. Nothing reads them.\n")
    count = 0
    while (folder / f"{name}-{count}").exists():
        count += 1
    return folder / f"{name}-{count}"


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype)
