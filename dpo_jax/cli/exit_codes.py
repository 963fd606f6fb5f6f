"""Expected errors of commands: the exit code and the one-line message of each."""

from __future__ import annotations

import errno
import os
import sys

from dpo_jax.data.terminal import printable
from dpo_jax.writing import FULL, error_number, with_causes

EXIT_CODES = (
    ("dpo_jax.cli.config.file", "ConfigError", 2),
    ("dpo_jax.training.start_check", "WrongStart", 2),
    ("dpo_jax.runtime.chips", "TopologyError", 2),
    ("dpo_jax.reference", "ForeignCache", 2),
    ("dpo_jax.runtime.checkpoint", "StateMismatch", 2),
    ("dpo_jax.judge.verdicts", "ForeignVerdicts", 2),
    ("dpo_jax.data.pairs", "BadRow", 65),
    ("dpo_jax.data.pairs", "DataError", 65),
    ("dpo_jax.bench.gates", "GateFailed", 70),
    ("dpo_jax.bench.race", "ContenderFailed", 70),
    ("dpo_jax.cli.memory_remedies", "OutOfMemory", 71),
    ("dpo_jax.runtime.rundir", "RunLocked", 73),
    ("dpo_jax.runtime.checkpoint", "CheckpointDamaged", 74),
    ("dpo_jax.untrusted", "Unreadable", 74),
    ("dpo_jax.judge.asking", "Unfinished", 75),
    ("dpo_jax.runtime.fit", "NonFinite", 76),
    ("dpo_jax.reference", "BrokenReference", 76),
    ("dpo_jax.evals.preference", "NonFiniteLogps", 76),
    ("dpo_jax.runtime.fit", "Interrupted", 130),
    ("dpo_jax.runtime.fit", "Preempted", 143),
)


def exit_code(error: BaseException) -> int:
    """The documented exit code of an exception; 1 for an unexpected one."""
    for module, name, code in EXIT_CODES:
        # A class whose module was never imported cannot have been raised; importing it now would load JAX needlessly.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return code
    return 74 if _os_error(error) else 1


def _os_error(error: BaseException) -> OSError | None:
    """The file error behind an exception."""
    chain = [*with_causes(error)]
    name = next((link.filename for link in chain if isinstance(link, OSError) and link.filename), None)
    for link in chain:
        number = getattr(link, "errno", None) or error_number(str(link))
        if number in FULL:
            return OSError(number, FULL[number], name)
    return error if isinstance(error, OSError) else None


def message(error: Exception) -> str:
    """The message of an expected error, made printable, because it may quote data or a file name."""
    cause = _os_error(error)
    if cause is None or exit_code(error) != 74:
        return printable(str(error))
    if not cause.strerror:
        return printable(str(cause))
    full = "; free some space, then run the same command again: it continues" if cause.errno == errno.ENOSPC else ""
    where = f"{os.fsdecode(cause.filename)}: " if cause.filename else ""
    return printable(f"{where}{cause.strerror}{full}")
