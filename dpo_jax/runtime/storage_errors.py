"""Distinguishes storage errors (a file cannot be read just now) from errors of a damaged file."""

from __future__ import annotations

import errno
import re

import jax

from dpo_jax.writing import with_causes

_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EILSEQ}
"""Numbers of system errors to which a damaged or half-deleted folder leads as well. Every other one is of the storage."""
_STATUS = re.compile(
    r"(UNAVAILABLE|RESOURCE_EXHAUSTED|PERMISSION_DENIED|DEADLINE_EXCEEDED|UNAUTHENTICATED|ABORTED|CANCELLED)\b"
)
_NUMBER = re.compile(r"os_error_code='(\d+)'")


def is_of_storage(error: BaseException) -> bool:
    """Whether `error`, or one that led to it, is a failure of storage, network, permissions or memory.

    TensorStore, which orbax reads with, raises plain `ValueError`s: their texts begin with a status, and may hold the number of
    a system error.
    """
    return any(_is_of_storage(one) for one in with_causes(error))


def is_of_absence(error: BaseException) -> bool:
    """Whether `error`, or one that led to it, is that a file is not there."""
    return any(isinstance(one, FileNotFoundError) or str(one).startswith("NOT_FOUND") for one in with_causes(error))


def _is_of_storage(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
        return True
    if isinstance(error, OSError):  # orbax raises a FileNotFoundError without a number
        return error.errno not in _DAMAGE and not isinstance(error, FileNotFoundError)
    text = str(error)
    if number := _NUMBER.search(text):
        return int(number[1]) not in _DAMAGE
    return _STATUS.match(text) is not None
