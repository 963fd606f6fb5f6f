"""Compilation: the persistent cache of programs, the compiler's host memory, and the message while it runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax.runtime.progress import BOARD

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
"""What JAX tells its listeners last before it compiles a program."""
COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX tells its listeners when a program is compiled, or read from the cache: before it runs."""


def keep_programs(folder: str | os.PathLike[str]) -> None:
    """Compiled programs are kept in `folder`, so that no other process compiles them again; and the compiler's memory is not.

    Where JAX_COMPILATION_CACHE_DIR names a folder, they are kept there. Small programs are kept, too: a run has a dozen.

    glibc holds on to what the compiler has freed, some 300 MB, while the program takes its own memory beside it.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.abspath(folder)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # JAX asks once whether there is a cache, and remembers the answer
    report_compiling()
    _return_memory()


@contextlib.contextmanager
def without_kept_programs() -> Iterator[None]:
    """Compiles anew, and keeps nothing: JAX cannot read a program for a chip that is not here back from its cache."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@functools.cache  # a listener stays, and one is enough
def report_compiling() -> None:
    """From now on `progress.BOARD` knows what is compiled: it can say so, and no speed is reckoned with that time."""

    def heard(event: str, duration_secs: float, **_: object) -> None:
        if event == LOWERED:
            BOARD.compile_began()
        elif event == COMPILED:
            BOARD.compile_ended(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)


@functools.cache
def _return_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # not glibc
        return

    def returned(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED and duration_secs > 0.1:  # it takes milliseconds itself
            trim(ctypes.c_size_t(0))

    jax.monitoring.register_event_duration_secs_listener(returned)
