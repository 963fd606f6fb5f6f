"""Memory of the C library between the steps of a program."""

import ctypes
import importlib.metadata
import subprocess
import sys

import pytest

from dpo_jax.runtime import host_memory

STEPS = """
import resource, sys
from dpo_jax.runtime.host_memory import reuse_buffers
if sys.argv[1] == "reuse":
    reuse_buffers()
import jax, jax.numpy as jnp

def several_products(x):
    for number in range(3):
        x = jax.lax.optimization_barrier(jnp.sin(x * number)).reshape(-1, 1024) @ jnp.ones((1024, 1024))
    return x.sum()

step, x, fresh = jax.jit(several_products), jnp.arange(4 << 20, dtype=jnp.float32), []
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    fresh.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
print(sorted(fresh[12:])[6])  # once settled, and whatever else the process does now and then
"""


def fresh_bytes_a_step(mode: str) -> float:
    return float(subprocess.run([sys.executable, "-c", STEPS, mode], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc only")
def test_a_step_takes_the_memory_that_the_last_one_has_left():
    if host_memory._for_accelerator():
        pytest.skip("jax was installed for an accelerator")
    assert fresh_bytes_a_step("as it is") > 16e6
    assert fresh_bytes_a_step("reuse") < 4e6


def test_with_an_accelerator_memory_is_given_back(monkeypatch):
    asked = []
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: type("C", (), {"mallopt": lambda self, *o: asked.append(o)})())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ("cuda13",))
    host_memory.reuse_buffers()
    assert asked == []
