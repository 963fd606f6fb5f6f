"""The C library's memory, as XLA on a CPU needs it. Where that library is not glibc, nothing here does anything."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util

KEPT = 256 << 20  # bytes of free memory that stay with the process
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of malloc.h


def reuse_buffers() -> None:
    """Memory that one step of training has used serves the next. To be called before JAX starts its threads.

    XLA asks for the buffers of a step anew in each, and glibc takes such large ones from the system and gives them back: on a
    CPU the zeroed pages of a small model cost a quarter of its step. Not where JAX was installed for an accelerator: its
    buffers are not here, and what its host has used for a checkpoint is better given back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or _for_accelerator():
        return
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT)):
        mallopt(option, value)


def _for_accelerator() -> bool:
    """Whether JAX can use one. Whether it finds one, it knows only when it has started."""
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None
