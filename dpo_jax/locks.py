"""Lock files: the kernel's lock (flock) on a file with the lock's name. The kernel releases it whenever its process ends."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from dpo_jax.untrusted import Unreadable
from dpo_jax.writing import naming


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


def _message(path: Path) -> str:
    kind = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "no regular file"
    return f"{path}: is {kind}, but a lock must be a file that nothing else uses; remove it, or choose another folder"
