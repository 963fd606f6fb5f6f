"""Races our sampler against `transformers.generate`: same weights, prompts and number of new tokens, checked for agreement."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpo_jax.bench.gates import GateFailed
from dpo_jax.bench.race import Results, run_one
from dpo_jax.bench.report import QUIET
from dpo_jax.bench.work import SAMPLERS, SamplingWork, library, read_prompts

THEIRS, OURS = SAMPLERS
# Largest difference of two logits between which greedy decoding may choose either way.
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.1}
DEVIATIONS = 5.0  # standard errors between the mean log-probabilities of two batches from one distribution


def random_prompts(count: int, longest: int, *, vocab_size: int, seed: int) -> list[np.ndarray]:
    """Prompts of random tokens other than 0, from half of `longest` to `longest` long; one has exactly that length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(1, longest // 2), longest + 1, count)
    lengths[0] = longest
    return [rng.integers(1, vocab_size, length).astype(np.int32) for length in lengths]


def end_tokens(share: float, *, new_tokens: int, vocab_size: int) -> tuple[int, ...]:
    """End tokens, enough to end about `share` of the completions before token `new_tokens` if all tokens are equally likely."""
    each = 1 - (1 - share) ** (1 / max(1, new_tokens - 1))
    return tuple(range(1, 1 + max(1, round(each * vocab_size)))) if share else ()


def race(
    work: SamplingWork, *, rounds: int, python: str = sys.executable, say: Callable[[str], None] = print
) -> tuple[Results, dict[str, float]]:
    """Runs both samplers in turn, `rounds` times. As in `race.race`, the first round starts with empty compilation caches and
    ends with the gates, and `python` is the interpreter that has torch and transformers.
    """
    results: Results = {name: [] for name in SAMPLERS}
    shutil.rmtree(work.compiled(OURS), ignore_errors=True)
    differences: dict[str, float] = {}
    for number in range(rounds):
        for name in SAMPLERS:
            start = time.perf_counter()
            interpreter = python if library(name) == "torch" else sys.executable
            result = run_one(work, name, steps=0, round_number=number, python=interpreter)
            results[name].append(result)
            rate = statistics.median(tokens_per_second(result))
            say(f"round {number + 1}/{rounds}  {name:15} {rate:9.0f} tokens/s  ({time.perf_counter() - start:.0f} s)")
        found = check(results[OURS][number], results[THEIRS][number], precision=work.precision)
        differences = differences or found
    return results, differences


def check(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, precision: str) -> dict[str, float]:
    """Checks that both samplers draw from one distribution. Raises `GateFailed` naming the place where they do not.

    Greedy continuations must agree, or part at a near-tie where ours takes their second choice; what follows is not compared.
    All of our continuations of a prompt are compared with theirs. Sampled tokens must be equally likely on average: a sampler
    that truncates the distribution draws likelier tokens.
    """
    mine = np.asarray(ours["greedy"])
    times = max(1, len(mine) // len(theirs["greedy"]))
    other, second, gaps = (np.repeat(np.asarray(theirs[name]), times, axis=0) for name in ("greedy", "runner_up", "gap"))
    if mine.shape != other.shape:
        raise GateFailed(f"{OURS} made {mine.shape} tokens and {THEIRS} {other.shape}. No ratio is reported.")
    parted, largest = 0, 0.0
    for row, differs in enumerate(mine != other):
        if not differs.any():
            continue
        at = int(np.argmax(differs))
        gap = float(gaps[row, at])
        if mine[row, at] != second[row, at] or not gap <= NEAR_TIE[precision]:
            raise GateFailed(
                f"greedy continuations of prompt {row // times} part at token {at}: {OURS} takes {mine[row, at]}, {THEIRS} "
                f"{other[row, at]} by {gap:.3g} before its second choice {second[row, at]} (a near-tie is "
                f"{NEAR_TIE[precision]:g}). No ratio is reported."
            )
        parted, largest = parted + 1, max(largest, gap)
    nats = [np.asarray(result["nats"], np.float64) for result in (ours, theirs)]
    error = math.sqrt(sum(x.var() / len(x) for x in nats))
    difference = abs(nats[0].mean() - nats[1].mean())
    if not difference <= DEVIATIONS * error + 1e-3:
        raise GateFailed(
            f"{OURS} samples tokens of {nats[0].mean():.3f} nats on average and {THEIRS} of {nats[1].mean():.3f} (standard "
            f"error of the difference {error:.3f}): the distributions differ. No ratio is reported."
        )
    return {"rows": len(mine), "parted": parted, "gap": largest, "nats": float(difference), "nats_error": error}


def tokens_per_second(result: Mapping[str, Any]) -> list[float]:
    """New tokens of all rows per second, for each timed batch, with the pass over the prompts included."""
    return [drawn / seconds for drawn, seconds in zip(result["batch_tokens"], result["batch_seconds"], strict=True)]


def summarize(work: SamplingWork, results: Results, differences: Mapping[str, float]) -> dict[str, Any]:
    """All figures as one JSON value. Medians are over the rounds, of each round's median batch."""
    figures = {}
    for name, rounds in results.items():
        rates = [statistics.median(tokens_per_second(result)) for result in rounds]
        cold, *warm = [result["compile_seconds"] for result in rounds if "compile_seconds" in result] or [None]
        figures[name] = {
            "tokens_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
            "first_seconds": statistics.median(result["first_seconds"] for result in rounds),
            "compile_seconds": {"cold": cold, "warm": statistics.median(warm) if warm else None},
            "peak_bytes": max(result["peak_bytes"] for result in rounds),
        }
    prompts, lengths = read_prompts(work)
    mine, theirs = (figures[name]["tokens_per_second"] for name in (OURS, THEIRS))
    return {
        "work": {
            "prompts": len(prompts),
            "prompt_tokens": {"mean": float(lengths.mean()), "longest": int(lengths.max())},
            "completions": work.completions,
            "new_tokens": work.new_tokens,
            "mean_tokens": sum(sum(r["batch_tokens"]) / len(r["batch_tokens"]) for r in results[OURS])
            / (len(results[OURS]) * len(prompts) * work.completions),
            "precision": work.precision,
            "rounds": len(results[OURS]),
            "batches": work.batches,
        },
        "devices": sorted({rounds[0]["device"] for rounds in results.values()}),
        "versions": {k: v for rounds in results.values() for k, v in rounds[0]["versions"].items()},
        "neighbors": max(result["neighbors"] for rounds in results.values() for result in rounds),
        "variants": {name: sorted({result["variant"] for result in rounds}) for name, rounds in results.items()},
        "gates": dict(differences),
        "samplers": figures,
        "ratio": {
            "tokens_per_second": mine["median"] / theirs["median"],
            "at_least": mine["min"] / theirs["max"],
            "at_most": mine["max"] / theirs["min"],
        },
    }


def table(summary: Mapping[str, Any]) -> str:
    """The figures as a Markdown table with notes."""
    lines = ["| sampler | tokens/s | compile, cold / warm | first batch | peak memory |", "|---|---|---|---|---|"]
    for name, figures in summary["samplers"].items():
        rate, compiled = figures["tokens_per_second"], figures["compile_seconds"]
        cells = (
            f"`{name}`",
            f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})",
            " / ".join("-" if value is None else f"{value:.1f} s" for value in compiled.values()),
            f"{figures['first_seconds']:.2f} s",
            f"{figures['peak_bytes'] / 2**30:.2f} GiB",
        )
        lines.append("| " + " | ".join(cells) + " |")
    work, gates, ratio = summary["work"], summary["gates"], summary["ratio"]
    busy = ": TOO BUSY to rely on" if summary["neighbors"] > QUIET else ""
    apart = f", the others diverge between logits at most {gates['gap']:.1e} apart" if gates["parted"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"work         {work['prompts']} prompts of {work['prompt_tokens']['mean']:.0f} tokens (longest "
            f"{work['prompt_tokens']['longest']}), {work['completions']} completions each of up to {work['new_tokens']} tokens "
            f"(mean {work['mean_tokens']:.1f}) at temperature 1, {work['precision']}; {work['rounds']} rounds of "
            f"{work['batches']} batches; fastest of each: "
            + "; ".join(f"{name} {', '.join(variants)}" for name, variants in summary["variants"].items()),
            f"machine      {', '.join(summary['devices'])}; {versions}; others used up to {summary['neighbors']:.0%} of the "
            f"cores{busy}",
            f"gates        greedy continuations: {gates['rows'] - gates['parted']:.0f} of {gates['rows']:.0f} equal{apart}; "
            f"sampled tokens differ by {gates['nats']:.3f} nats on average (standard error {gates['nats_error']:.3f})",
            f"{OURS} against {THEIRS}: {ratio['tokens_per_second']:.2f}x the tokens/s ({ratio['at_least']:.2f} to "
            f"{ratio['at_most']:.2f})",
        ]
    )
