"""Memory after compiling."""

import ctypes
import os
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax.runtime.compiling import COMPILED, keep_programs, without_kept_programs

CONFIG = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def kept_programs(tmp_path):
    before = {option: getattr(jax.config, option) for option in CONFIG}
    jax.jit(lambda x: x - 1).lower(jnp.ones(3)).compile()  # JAX has asked whether there is a cache: there was none
    keep_programs(tmp_path / "compiled")
    yield
    for option, value in before.items():
        jax.config.update(option, value)
    compilation_cache.reset_cache()


def test_jax_says_when_a_program_is_compiled():
    """It is no documented name, and we listen for it."""
    heard = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: heard.append(event))
    jax.jit(lambda x: x * 3 + 1).lower(jnp.ones(3)).compile()
    assert COMPILED in heard


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc only")
def test_what_the_compiler_has_freed_goes_back_to_the_system(kept_programs):
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    pieces = [libc.malloc(4000) for _ in range(40_000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 4000)
    *freed, last = pieces  # the last one keeps glibc from returning the rest by itself
    for piece in freed:
        libc.free(piece)
    held = _resident()
    jax.monitoring.record_event_duration_secs(COMPILED, 5.0)
    assert _resident() < held - 120e6
    libc.free(last)


def _resident() -> float:
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


def test_programs_for_other_chips_are_not_kept(kept_programs, tmp_path):
    def compiled(number):
        jax.jit(lambda x: x * number + 7).lower(jnp.ones(3)).compile()
        return len(list((tmp_path / "compiled").glob("*-cache")))

    before = compiled(3.5)
    with without_kept_programs():
        assert compiled(4.5) == before
    assert compiled(5.5) == before + 1 > 1


def test_a_program_that_was_cut_short_is_replaced(kept_programs, tmp_path):
    """A kill while JAX wrote it: otherwise each start would warn and compile it again."""

    def compiled():
        jax.clear_caches()
        jax.jit(lambda x: x * 6.5 + 7).lower(jnp.ones(3)).compile()

    compiled()
    files = sorted((tmp_path / "compiled").glob("*lambda*-cache"))
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled()
    assert sorted((tmp_path / "compiled").glob("*lambda*-cache")) == files != []
