"""Matrix product rate of each library on this machine; dividing a ratio by it leaves the contribution of the trainer alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_jax.bench.work import LIBRARIES, Work

SECONDS = 0.5  # of measuring per shape, after two warm-up products


def run(work: Work, name: str) -> dict[str, Any]:
    """FLOP/s over the products `work.matmuls`, each at its median time. Inputs are random: zeros multiply faster."""
    make = _torch if name == LIBRARIES["torch"] else _jax
    rng = np.random.default_rng(0)
    flops, seconds = 0.0, 0.0
    for m, k, n in work.matmuls:
        a, b = (rng.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
        flops += 2.0 * m * k * n
        seconds += _median_seconds(make(a, b, work.precision))
    return {"flops_per_second": flops / seconds}


def _median_seconds(multiply: Callable[[], object]) -> float:
    multiply()
    multiply()
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _jax(a: np.ndarray, b: np.ndarray, precision: str) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    x, y = (jax.device_put(z).astype(jnp.dtype(precision)) for z in (a, b))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(x, y))


def _torch(a: np.ndarray, b: np.ndarray, precision: str) -> Callable[[], object]:
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.from_numpy(z).to(device, getattr(torch, precision)) for z in (a, b))

    def multiply() -> None:
        torch.matmul(x, y)
        if device == "cuda":
            torch.cuda.synchronize()

    return multiply
