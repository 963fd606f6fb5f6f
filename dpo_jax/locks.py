"""Lock files: the kernel's lock (flock) on a file with the lock's name. The kernel releases it whenever its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
from pathlib import Path

from dpo_jax.untrusted import Unreadable
from dpo_jax.writing import naming

logger = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds until a wait for a lock is logged."""


def open_lock(path: str | os.PathLike[str], *, create: bool = True) -> int:
    """The descriptor of a lock file, open for reading and writing; not yet locked.

    Raises `Unreadable` for anything but a regular file: a link could lead to another file, whose content the lock would
    overwrite.
    """
    path = Path(path)
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        with naming(path):
            descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket, a folder
            raise
        raise Unreadable(_message(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable(_message(path))
    return descriptor


def wait_for_lock(descriptor: int, path: str | os.PathLike[str], kind: int = fcntl.LOCK_EX) -> None:
    """Takes the lock of an open lock file, however long another process holds it. A long wait is logged.

    A file server may keep the lock of a lost host until that host starts again.
    """
    with contextlib.suppress(BlockingIOError):
        return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    words = "%s: another process has held this lock for %g s; if its host is gone for good, stop, delete it and start again"
    note = threading.Timer(PATIENCE, logger.warning, (words, path, PATIENCE))
    note.daemon = True
    note.start()
    try:
        fcntl.flock(descriptor, kind)
    finally:
        note.cancel()


def _message(path: Path) -> str:
    kind = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "no regular file"
    return f"{path}: is {kind}, but a lock must be a file that nothing else uses; remove it, or choose another folder"
