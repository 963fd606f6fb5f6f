"""Compilation: the persistent cache of programs, the compiler's host memory, and the message while it runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax.runtime.progress import BOARD
from dpo_jax.writing import writing

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
"""The last event that JAX reports before it compiles a program."""
COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event that JAX reports when a program has been compiled or read from the cache, before it runs."""


def keep_programs(folder: str | os.PathLike[str]) -> None:
    """Cache compiled programs in `folder` for other processes, and return the compiler's memory to the system.

    JAX_COMPILATION_CACHE_DIR takes precedence. Small programs are cached too: a run has a dozen. Without the trimming, glibc
    keeps the memory that the compiler has freed, some 300 MB, in addition to that of the program.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.abspath(folder)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # JAX checks once whether there is a cache and remembers the answer
    _write_programs_whole()
    report_compiling()
    _return_memory()


@contextlib.contextmanager
def without_kept_programs() -> Iterator[None]:
    """Context manager that disables the cache: JAX cannot read programs for absent chips back from it."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@functools.cache  # a listener is permanent, and one is enough
def report_compiling() -> None:
    """Report compilations to `progress.BOARD` from now on, so that it can show them and leave their time out of speeds."""

    def heard(event: str, duration_secs: float, **_: object) -> None:
        if event == LOWERED:
            BOARD.compile_began()
        elif event == COMPILED:
            BOARD.compile_ended(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)


@functools.cache
def _write_programs_whole() -> None:
    """Let programs appear in a local cache only once they are whole, and replace a file that is there.

    JAX writes in place and keeps any file of that name: after a kill in that write, every start would warn and compile again.
    It calls `put` only for a program that it could not read.
    """
    try:
        from jax._src.lru_cache import LRUCache  # it has no public name
    except ImportError:
        return
    in_place = LRUCache.put

    def put(self: Any, key: str, value: bytes) -> None:
        if self.eviction_enabled or "://" in str(self.path):
            return in_place(self, key, value)
        with writing(f"{self.path}/{key}-cache", "wb") as file:
            file.write(value)

    LRUCache.put = put


@functools.cache
def _return_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # not glibc
        return

    def returned(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED and duration_secs > 0.1:  # trimming itself takes milliseconds
            trim(ctypes.c_size_t(0))

    jax.monitoring.register_event_duration_secs_listener(returned)
