"""Times the flash kernels with other tile sizes: `python -m dpo_jax.bench.kernel_tiles`, on a GPU.

`models.flash_kernels.tiles_of` holds the fastest tiles. Run this for a new chip, head size or compiler, and enter the winners
there. Each line is one kernel with one choice of tiles: microseconds, and FLOP/s of the matrix products of the visited blocks.
A choice whose result differs from that of the present tiles is reported instead of timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.checks.bench import hh_like_pairs
from dpo_jax.data.loader import plan_layout
from dpo_jax.models import flash_kernels
from dpo_jax.models.attention_gpu import flash_path
from dpo_jax.models.flash_kernels import BLOCK, Settings, Spans, Tiles, tiles_of
from dpo_jax.writing import write_text

PRODUCTS = {"forward": 2, "d_queries": 3, "d_keys": 4}  # matrix products per pair of tiles
CALLS = 20  # in a row, so that the device never waits for the host


class Shape(NamedTuple):
    """Sizes of one attention layer. `packed`: rows of many short pairs like those of Anthropic HH; else one text a row."""

    name: str
    length: int
    rows: int
    heads: int
    kv_heads: int
    head_size: int
    packed: bool = True


SHAPES = (
    Shape("Pythia-2.8B, packed HH", 1024, 12, 32, 32, 80),
    Shape("Llama-3-8B, packed HH", 2048, 6, 32, 8, 128),
    Shape("Llama-3-8B, texts of 4,096", 4096, 2, 32, 8, 128, packed=False),
    Shape("Pythia-1B, packed HH", 1024, 12, 8, 8, 256),
    Shape("SmolLM2-135M, packed HH", 1024, 12, 9, 3, 64),
)


def choices(kernel: str, head_size: int) -> Iterator[Tiles]:
    """The present tiles first, then their neighbors."""
    present = tiles_of(kernel, head_size, jnp.bfloat16)
    yield present
    for own, met, warps, stages in itertools.product((64, 128), (32, 64), (4, 8), (2, 3)):
        # The two accumulators of a long tile do not fit in the registers of few warps.
        if (tiles := Tiles(own, met, warps, stages)) != present and own * head_size <= 128 * 32 * warps:
            yield tiles


def main(args: list[str]) -> int:
    flags = argparse.ArgumentParser(
        prog="python -m dpo_jax.bench.kernel_tiles", description=(__doc__ or "").partition("\n\n")[2]
    )
    flags.add_argument("--seconds", type=float, default=300.0, metavar="N", help="stop after about this time (default: 300)")
    flags.add_argument("--shapes", default="", metavar="TEXT", help="only shapes whose name contains this")
    flags.add_argument("--kernels", default=",".join(PRODUCTS), metavar="NAME,...", help="only these (default: %(default)s)")
    flags.add_argument("--json", default="kernel_tiles.json", metavar="PATH", help="where to write all figures")
    asked = flags.parse_args(args)
    kernels = asked.kernels.split(",")
    if not {*kernels} <= {*PRODUCTS}:
        flags.error(f"--kernels {asked.kernels}: choose from {', '.join(PRODUCTS)}")
    shapes = [shape for shape in SHAPES if asked.shapes in shape.name]
    if not shapes:
        flags.error(f"--shapes {asked.shapes}: choose part of {', '.join(shape.name for shape in SHAPES)}")
    if jax.default_backend() != "gpu":
        flags.error("these kernels are for GPUs, and JAX sees none here")
    deadline, found = time.perf_counter() + asked.seconds, []
    for shape in shapes:
        for kernel, tiles, seconds, share in measure(shape, kernels, deadline=deadline):
            found.append({"shape": shape.name, "kernel": kernel, **tiles._asdict(), "seconds": seconds, "tflops": share})
            chosen = " ".join(f"{name}={value}" for name, value in tiles._asdict().items())
            print(f"{shape.name:28} {kernel:10} {chosen:36} {_told(seconds, share)}", flush=True)
            write_text(asked.json, json.dumps(found))
    return 0


def _told(seconds: float | str, rate: float | None) -> str:
    return seconds if isinstance(seconds, str) else f"{seconds * 1e6:8.1f} us  {(rate or 0) / 1e12:6.1f} TFLOP/s"


def measure(shape: Shape, kernels: list[str], *, deadline: float) -> Iterator[tuple[str, Tiles, float | str, float | None]]:
    """(kernel, tiles, seconds or why there are none, FLOP/s counted over the 64 x 64 blocks that are visited)."""
    spans = _spans(shape)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    rows, length = spans.start.shape
    q, k, v, d_out = (
        jax.random.normal(key, (rows, length, n, shape.head_size), jnp.bfloat16) for key, n in zip(keys, heads, strict=True)
    )
    settings = Settings(shape.head_size**-0.5, None, interpret=False)
    out, log_mass = jax.jit(functools.partial(flash_kernels.forward, settings=settings))(q, k, v, spans)
    pull = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    back: dict[str, Any] = {"settings": settings, "log_mass": log_mass, "pull": pull, "d_out": d_out}
    work: dict[str, Callable[[Tiles], Any]] = {
        "forward": lambda tiles: functools.partial(flash_kernels.forward, settings=settings, tiles=tiles),
        "d_queries": lambda tiles: functools.partial(flash_kernels.d_queries, **back, tiles=tiles),
        "d_keys": lambda tiles: functools.partial(flash_kernels.d_keys, **back, tiles=tiles),
    }
    visits = int(np.asarray(spans.key_last - spans.key_first).clip(0).sum())
    for kernel in kernels:
        make = work[kernel]
        flops = PRODUCTS[kernel] * 2.0 * visits * BLOCK * BLOCK * shape.head_size * shape.heads
        expected = None
        for tiles in choices(kernel, shape.head_size):
            if time.perf_counter() > deadline:
                return
            try:
                program = jax.jit(make(tiles)).lower(q, k, v, spans).compile()
                result = jax.device_get(program(q, k, v, spans))
                seconds = _seconds(lambda program=program: program(q, k, v, spans))
            except Exception as error:  # too many registers or too much shared memory: go on with the others
                yield kernel, tiles, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", None
                continue
            expected = expected if expected is not None else result
            if not all(
                np.allclose(a, b, rtol=0.05, atol=0.05)
                for a, b in zip(map(_float, jax.tree.leaves(result)), map(_float, jax.tree.leaves(expected)), strict=True)
            ):
                yield kernel, tiles, "a different result", None
                continue
            yield kernel, tiles, seconds, flops / seconds


def _float(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32)


def _seconds(call: Callable[[], Any]) -> float:
    """Median seconds per call, from series of `CALLS` calls."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(CALLS):
            done = call()
        jax.block_until_ready(done)
        times.append((time.perf_counter() - begin) / CALLS)
    return float(np.median(times))


def _spans(shape: Shape) -> Spans:
    if shape.packed:
        pairs = hh_like_pairs(1024, vocab_size=100, longest=shape.length)
        rows = plan_layout(pairs, kind="packed", batch=len(pairs), length=shape.length).rows(pairs)
        start, end = rows.k_start[: shape.rows], rows.k_end[: shape.rows]
    else:
        start = np.zeros((shape.rows, shape.length), np.int32)
        end = np.broadcast_to(np.arange(1, shape.length + 1, dtype=np.int32), start.shape)
    prepare = flash_path().prepare
    assert prepare is not None
    prepared = prepare(jnp.asarray(start), jnp.asarray(end), (None,))
    return jax.tree.map(lambda x: x[0], prepared.spans)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
