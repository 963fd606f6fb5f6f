"""Machine checks: devices, versions, memory, and the speed and precision of matrix products."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.bench.flops import device_peak
from dpo_jax.checks.report import Result, Row

OLDEST = {"jax": "0.10.1", "flax": "0.12.8", "optax": "0.2.8", "numpy": "2.0", "orbax-checkpoint": "0.12.4"}  # pyproject.toml's
OPTIONAL = ("orbax-checkpoint",)  # only the row that saves needs it
LEAST_SHARE = 0.4  # of the data sheet's bfloat16 rate; below it a chip is shared, throttled, or not what it claims to be
SIZES = {"bfloat16": (8192, 512), "float32": (4096, 512)}  # side of the timed matrices: on accelerators, on a CPU
EXACT_SIDE = 1024  # side of the matrices that are compared with float64

# Largest relative error (root mean square) of a product of normal numbers in each arithmetic.
ARITHMETIC = ((2e-6, "float32"), (5e-5, "three bfloat16 passes"), (1e-3, "TF32"), (1e-2, "one bfloat16 pass"))


def rows() -> Iterator[Row]:
    yield Row(
        "devices", "JAX sees no working device: check the driver and the jax extra (cuda13, tpu), and JAX_PLATFORMS", _devices
    )
    yield Row("versions", "a package is older than dpo_jax was tested with: pip install -U the packages named", _versions)
    yield Row("memory", "the memory could not be read", _memory)
    for dtype in ("bfloat16", "float32"):
        yield Row(
            f"matmul.{dtype}",
            "products are wrong or far too slow: look for another program on the chip, for a power cap, and for a wrong "
            "driver; do not compare timings from here",
            functools.partial(_matmul, dtype),
        )


def _devices() -> Result:
    devices = jax.local_devices()
    wrong = []
    for device in devices:
        total = jax.jit(jnp.sum)(jax.device_put(np.arange(1000, dtype=np.int32), device))
        wrong += [] if int(total) == 499_500 else [str(device)]
    kinds = sorted({device.device_kind for device in devices})
    several = f", process {jax.process_index()} of {jax.process_count()}" if jax.process_count() > 1 else ""
    figure = f"{len(devices)} x {', '.join(kinds)} ({devices[0].platform}){several}"
    if wrong:
        figure += f"; wrong sums on {', '.join(wrong)}"
    return Result(figure, not wrong, values={"count": len(devices), "kinds": kinds, "platform": devices[0].platform})


def _versions() -> Result:
    found, old = {"python": platform.python_version()}, []
    for package, oldest in OLDEST.items():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
            old += [] if package in OPTIONAL else [f"{package} is missing"]
            continue
        if _numbers(found[package]) < _numbers(oldest):
            old.append(f"{package} is older than {oldest}")
    backend = jax.local_devices()[0].client.platform_version.splitlines()
    found["backend"] = " ".join(backend)
    figure = ", ".join(f"{name} {version}" for name, version in found.items() if name != "backend")
    return Result("; ".join([figure, *old]), not old, values=found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _memory() -> Result:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [entry["bytes_limit"] for entry in stats if "bytes_limit" in entry]
    host = host_memory()
    told = [f"{min(limits) / 2**30:.1f} GiB a device for JAX"] if limits else []
    told += [f"{host / 2**30:.1f} GiB of the host"] if host else []
    return Result(", ".join(told) or "unknown", None, values={"device_bytes": limits, "host_bytes": host})


def host_memory() -> int | None:
    try:
        return int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


def _matmul(dtype: str) -> Result:
    """Rate of large products, and the error of smaller ones against float64."""
    rate, peak = matmul_rate(dtype), device_peak(jax.local_devices()[0].device_kind)
    told = f"{rate / 1e12:.3g} TFLOP/s" if rate > 1e11 else f"{rate / 1e9:.3g} GFLOP/s"
    values: dict[str, Any] = {"flops_per_second": rate, "peak": peak}
    if dtype == "float32":
        errors = {precision: matmul_error(jnp.float32, precision) for precision in ("default", "highest")}
        default, highest = arithmetic(errors["default"]), arithmetic(errors["highest"])
        told = f"{told} at highest precision, which is {highest} (error {errors['highest']:.0e})"
        if default != "float32":
            told += f"; by default float32 here means {default} (error {errors['default']:.0e}): "
            told += "dpo_jax requests the highest, and so must your own code"
        return Result(told, highest == "float32", bar=f"error {ARITHMETIC[0][0]:.0e}", values=values | {"errors": errors})
    share = rate / peak if peak else None
    error = matmul_error(jnp.bfloat16, "default")
    told += f", {share:.0%} of {peak / 1e12:,.0f} on the data sheet" if peak and share else ", data sheet not known"
    bar = f"{LEAST_SHARE:.0%} of the data sheet" if peak else ""
    # bfloat16 inputs, float32 sums: only the rounding of the result remains.
    good = error < 4e-3 and (share is None or share >= LEAST_SHARE)
    return Result(f"{told}, error {error:.0e}", good, bar=bar, values=values | {"share": share, "error": error})


@functools.cache
def matmul_rate(dtype: str) -> float:
    """FLOP/s of one device in a square product, float32 at the highest precision."""
    on_cpu = jax.default_backend() == "cpu"
    side = SIZES[dtype][on_cpu]
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (jax.random.normal(key, (side, side), jnp.dtype(dtype)) for key in keys)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest" if dtype == "float32" else None))
    calls = 1 if on_cpu else 10  # several in a row, so that the host's overhead is not counted as the chip's time

    def several() -> None:
        jax.block_until_ready([product(x, y) for _ in range(calls)])

    return calls * 2.0 * side**3 / median_seconds(several, limit=0.5)


def median_seconds(work: Callable[[], object], *, limit: float, least: int = 3, most: int = 20) -> float:
    """The median of repeated calls that take about `limit` seconds together, after two untimed ones."""
    work()
    work()
    times, end = [], time.perf_counter() + limit
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def matmul_error(dtype: Any, precision: str) -> float:
    """Root mean square error of a product of normal numbers, relative to its size, against numpy in float64."""
    rng = np.random.RandomState(0)
    x, y = (jnp.asarray(rng.standard_normal((EXACT_SIDE, EXACT_SIDE)), dtype) for _ in range(2))
    ours = np.asarray(jax.jit(functools.partial(jnp.matmul, precision=precision))(x, y), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    return float(np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)))


def arithmetic(error: float) -> str:
    """The arithmetic in which a product of float32 matrices was computed, inferred from its error."""
    return next((name for bound, name in ARITHMETIC if error < bound), "less than one bfloat16 pass")
