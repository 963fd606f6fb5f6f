"""Attention checks: every path that can run here, compared with dense attention, forward and backward."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.checks.report import Result, Row, first_line, skipped
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout
from dpo_jax.models.attention import DENSE, AttentionPath, Scoring, VisibleKeys, attend
from dpo_jax.models.attention_paths import PATHS, path_name
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.types import Rows

FLOAT32_BAR = 1e-5  # largest error of an entry, relative to the largest entry or 1
BFLOAT16_BAR = 2.0  # times the root mean square error of dense attention in bfloat16,
BFLOAT16_LARGEST = 4.0  # and times its largest error
DENSE_BFLOAT16_BAR = 0.02  # of dense attention itself, relative to the size of its result
OUTPUTS = ("values", "grad q", "grad k", "grad v")


class Case(NamedTuple):
    """Rows with (prompt, chosen, rejected) lengths, plus rows of padding only, and the shape of a layer."""

    name: str
    kind: str
    sizes: tuple[tuple[int, int, int], ...]
    length: int
    rows_multiple: int
    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None
    softcap: float | None = None


_PLAIN = ((5, 30, 9), (40, 0, 50))
_SHARED = ((1, 60, 30), (20, 1, 71), (64, 33, 0))
_PACKED = ((20, 90, 100), (70, 60, 5), (9, 80, 40), (30, 1, 33), (60, 30, 90), (2, 45, 1))
SMALL = (  # also on a CPU
    Case("plain rows, head size 80", "plain", _PLAIN, 97, 5, 2, 2, 80),
    Case("shared prompt, soft cap, head size 64", "shared", _SHARED, 131, 4, 4, 2, 64, softcap=2.0),
    Case("packed, window, head size 128", "packed", _PACKED, 601, 2, 2, 1, 128, window=17),
)
LARGE = (
    Case("packed, window, soft cap, head size 256", "packed", _PACKED * 2, 777, 3, 4, 1, 256, window=64, softcap=50.0),
    Case("one long row, head size 128", "packed", _PACKED * 6, 4096, 1, 8, 2, 128),  # in chunks, if the path has them
)
LONGEST_EXACT = 1024  # tokens; numpy takes too long for more


def rows() -> Iterator[Row]:
    """float32 and bfloat16 checks of each path. The default path comes first after dense, the reference for all others."""
    platform = jax.default_backend()
    first = ("dense", path_name("auto", platform))
    for name in sorted(PATHS, key=lambda name: first.index(name) if name in first else len(first)):
        if PATHS[name].platform in (None, platform):
            for dtype in ("float32", "bfloat16"):
                yield Row(f"attention.{name}.{dtype}", _failure(name, dtype), functools.partial(_compare, name, dtype))


def _failure(name: str, dtype: str) -> str:
    if name == "dense":
        return "the definition itself is wrong here, and with it everything below: update jax and the driver, and report it"
    other = "dense" if name == "chunked" else "chunked"
    return (
        f"attention {name} in {dtype} differs from dense: do not train with it; use --model.attention {other} and report the "
        "case and the error"
    )


def _compare(name: str, dtype: str) -> Result:
    """The worst case of a path; cases that the path refuses are named."""
    cases = SMALL if jax.default_backend() == "cpu" else SMALL + LARGE
    cases = [case for case in cases if name != "dense" or case.length <= LONGEST_EXACT]
    refused = {case: "; ".join(PATHS[name].refusals(_config(case), jnp.dtype(dtype))) for case in cases}
    tried = [case for case in cases if not refused[case]]
    if not tried:
        return skipped(refused[cases[0]])
    with ThreadPoolExecutor(min(len(tried), os.cpu_count() or 1)) as pool:  # most of the time goes into compiling
        shares = list(pool.map(functools.partial(_share_or_error, name, dtype), tried))
    worst, where = _largest([(share, f"{case.name}: {what}") for case, (share, what) in zip(tried, shares, strict=True)])
    values: dict[str, Any] = {case.name: f"refused: {why}" for case, why in refused.items() if why}
    values |= {case.name: {"of_bar": share, "worst": what} for case, (share, what) in zip(tried, shares, strict=True)}
    figure = f"{len(tried)} of {len(cases)} cases, worst {where}"
    return Result(figure, bool(worst <= 1), bar=_bar(name, dtype), values=values)


def _share_or_error(name: str, dtype: str, case: Case) -> tuple[float, str]:
    try:
        return _share_of_bar(name, dtype, case)
    except Exception as error:  # the results of the other cases are still useful
        return float("inf"), f"{type(error).__name__}: {first_line(error)}"


def _bar(name: str, dtype: str) -> str:
    if dtype == "float32":
        return f"{FLOAT32_BAR:.0e} from " + ("numpy in float64" if name == "dense" else "dense")
    return f"{DENSE_BFLOAT16_BAR} from float32" if name == "dense" else f"{BFLOAT16_BAR:g} x the error of dense in bfloat16"


def _share_of_bar(name: str, dtype: str, case: Case) -> tuple[float, str]:
    """(error relative to the bar, which error it is): above 1 the path fails."""
    path = PATHS[name].make()
    ours, shares = attended(path, case, dtype), []
    if dtype == "float32":
        expected = _exact(case) if name == "dense" else _dense(case, "float32", "float32")
        for what, a, b in zip(OUTPUTS, ours, expected, strict=True):
            error = float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
            shares.append((error / FLOAT32_BAR, f"{what} {error:.1e}"))
        return _largest(shares)
    expected = _dense(case, "bfloat16", "float32")
    if name == "dense":
        errors = [_rms(a - b) / _rms(b) for a, b in zip(ours, expected, strict=True)]
        return _largest([(e / DENSE_BFLOAT16_BAR, f"{what} {e:.1e}") for what, e in zip(OUTPUTS, errors, strict=True)])
    for what, a, b, plain in zip(OUTPUTS, ours, expected, _dense(case, "bfloat16", "bfloat16"), strict=True):
        typical, largest = _rms(a - b) / _rms(plain - b), float(np.abs(a - b).max() / np.abs(plain - b).max())
        shares.append(
            (max(typical / BFLOAT16_BAR, largest / BFLOAT16_LARGEST), f"{what} {typical:.2f} x, largest {largest:.2f} x")
        )
    return _largest(shares)


def _largest(shares: list[tuple[float, str]]) -> tuple[float, str]:
    return max(shares, key=lambda share: np.inf if np.isnan(share[0]) else share[0])


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def attended(path: AttentionPath, case: Case, dtype: str, *, compute: str | None = None) -> list[np.ndarray]:
    """Mixed values of a case and gradients of q, k and v, float64. Inputs are rounded to `dtype`; `compute` is the type of
    the computation, by default the same."""
    rows, floats = inputs(case)
    compute = compute or dtype
    arrays = (jnp.asarray(x).astype(dtype).astype(compute) for x in floats)
    with float32_is_float32(compute):
        return [np.asarray(x, np.float64) for x in _program(path, case)(*arrays, jax.tree.map(jnp.asarray, rows))]


def float32_is_float32(dtype: str) -> Any:
    """A context for float32 comparisons. Our own products request float32; the TPU kernel needs this setting."""
    told = dtype == "float32" and jax.default_backend() == "tpu"
    return jax.default_matmul_precision("highest") if told else contextlib.nullcontext()


@functools.cache
def _program(path: AttentionPath, case: Case) -> Any:
    @jax.jit
    def work(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, rows: Rows) -> tuple[jax.Array, ...]:
        keys = VisibleKeys.of(rows, window=case.window)
        scoring = Scoring(case.head_size**-0.5, case.softcap)
        mix = functools.partial(attend, keys=keys, scoring=scoring, path=path)
        mixed, back = jax.vjp(mix, q, k, v)
        return mixed, *back(cotangent)

    return work


@functools.cache
def _dense(case: Case, dtype: str, compute: str) -> list[np.ndarray]:
    return attended(DENSE, case, dtype, compute=compute)


@functools.cache
def inputs(case: Case) -> tuple[Rows, list[np.ndarray]]:
    """Rows, and q, k, v and the cotangent."""
    rng = np.random.RandomState(0)
    pairs = [random_pair(rng, lengths, vocab_size=60) for lengths in case.sizes]
    layout = Layout(case.kind, length=case.length, scored=case.length, rows_multiple=case.rows_multiple)  # pyright: ignore[reportArgumentType]
    rows = dataclasses.replace(layout, per_row=64 if case.kind == "packed" else 1).rows(pairs)
    shape, heads = rows.tokens.shape, (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return rows, [rng.standard_normal((*shape, n, case.head_size)).astype(np.float32) for n in heads]


def random_pair(rng: np.random.RandomState, lengths: Sequence[int], *, vocab_size: int) -> Encoded:
    """A pair with (prompt, chosen, rejected) of the given lengths."""
    prompt, chosen, rejected = (rng.randint(1, vocab_size, n).astype(np.int32) for n in lengths)
    return Encoded(prompt, chosen, rejected)


def _config(case: Case) -> DecoderConfig:
    """A model with the case's layer, for a path to accept or refuse."""
    width = case.heads * case.head_size
    sizes: dict[str, Any] = {"vocab_size": 64, "width": width, "layers": 1, "heads": case.heads, "max_positions": case.length}
    config = decoder_config(hf_config("llama", kv_heads=case.kv_heads, eos_token_id=0, **sizes))
    windows = (case.window,) if case.window else ()
    return dataclasses.replace(config, attention_softcap=case.softcap, windows=windows)


def _exact(case: Case) -> list[np.ndarray]:
    """The result of `attended` in float64, straight from the definition: one row and one head at a time, in numpy."""
    rows, floats = inputs(case)
    q, k, v, cotangent = (x.astype(np.float64) for x in floats)
    out = [np.zeros_like(x) for x in (q, q, k, v)]
    column = np.arange(case.length)
    for r in range(len(q)):
        start, end, position = (np.asarray(x[r]) for x in (rows.k_start, rows.k_end, rows.positions))
        visible = (start[:, None] <= column) & (column < end[:, None])
        if case.window is not None:
            visible &= position[:, None] - position[None, :] < case.window
        for n in range(case.heads):
            g = n * case.kv_heads // case.heads
            mixed, d_q, d_k, d_v = _one_head(case, q[r, :, n], k[r, :, g], v[r, :, g], cotangent[r, :, n], visible)
            out[0][r, :, n], out[1][r, :, n] = mixed, d_q
            out[2][r, :, g] += d_k
            out[3][r, :, g] += d_v
    return out


def _one_head(case: Case, q: Any, k: Any, v: Any, cotangent: Any, visible: np.ndarray) -> tuple[np.ndarray, ...]:
    scale, slope = case.head_size**-0.5, 1.0
    scores = q @ k.T * scale
    if case.softcap is not None:
        bent = np.tanh(scores / case.softcap)
        scores, slope = case.softcap * bent, 1.0 - bent**2
    weights = np.where(visible, np.exp(scores - scores.max(axis=1, where=visible, initial=-np.inf, keepdims=True)), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    d_weights = cotangent @ v.T
    d_scores = weights * (d_weights - (d_weights * weights).sum(axis=1, keepdims=True)) * slope * scale
    return weights @ v, d_scores @ k, d_scores.T @ q, weights.T @ cotangent
