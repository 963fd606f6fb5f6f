"""What a sweep found: every point of every run in one table, and how far each method is from the optimum at equal KL."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.terminal import csv_cell, json_text
from dpo_jax.evals.frontier import Optimum, Point, best_of_n, bootstrap_interval, envelope, regret
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.writing import writing

EQUAL_KL = (1.0, 3.0, 6.0)  # nats, at which methods are compared
COLUMNS = (
    *("method", "label", "seed", "step", "kl", "kl_low", "kl_high", "kl_sampled", "reward", "reward_low", "reward_high"),
    *("regret", "trusted", "tokens", "seconds"),
)


def rows(results: Sequence[Result], optimum: Optimum) -> list[dict[str, Any]]:
    """One row a point: `COLUMNS`, where known. `regret` is the share of the possible gain that is missed at this KL; it is too
    low where `trusted` is false, as few samples carry the optimum there."""
    found = []
    for result in results:
        run = {"method": result.run.method, "label": result.run.label, "seed": result.run.seed, "seconds": result.seconds}
        for point in result.points:
            missed = float(regret(point["reward"], point["kl"], optimum, optimum.reference))
            trusted = point["kl"] <= optimum.reach
            found.append({**run, **point, "regret": None if math.isnan(missed) else missed, "trusted": trusted})
    return found


def write(folder: Path, table: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """`results.jsonl`, with all that the rows hold, and `results.csv`, with `columns`."""
    with writing(folder / "results.jsonl") as file:
        file.writelines(json_text(row) + "\n" for row in table)
    with writing(folder / "results.csv", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in table)


def points(results: Sequence[Result]) -> list[Point]:
    """What the figure shows: every measured point. Several seeds of one setting are runs of their own, and are named."""
    names = [(result.run.method, result.run.label) for result in results]

    def setting(run: Run) -> str:
        several = names.count((run.method, run.label)) > 1
        return f"{run.label} seed {run.seed}".strip() if several else run.label

    return [
        Point(
            result.run.method,
            setting(result.run),
            point["kl"],
            point["reward"],
            (point["kl_low"], point["kl_high"]),
            (point["reward_low"], point["reward_high"]),
            point.get("kl_bound"),
        )
        for result in results
        for point in result.points
    ]


def best_of(rewards: np.ndarray, n: int, *, seed: int) -> dict[str, float]:
    """Best-of-`n` as a point. Its KL is the estimate, with the bound beside it."""
    found = best_of_n(rewards, n)
    values = {"reward": found.reward, "kl": found.kl}
    point = {"step": float(n), "kl_bound": found.kl_bound}
    for name, value in values.items():
        low, high = bootstrap_interval(value, seed)
        point |= {name: float(value.mean()), f"{name}_low": low, f"{name}_high": high}
    return point


def best_of_results(rewards: np.ndarray, several: Sequence[float], *, seed: int) -> list[Result]:
    """Best-of-N from `rewards[P, M]` of the reference for each N of `several` up to M: there is no best of more than M."""
    points = {int(n): best_of(rewards, int(n), seed=seed) for n in several if n <= rewards.shape[1]}
    return [Result(Run("best-of-n", f"N {n}", {"n": n}, seed), [point], 0.0) for n, point in points.items()]


def at_equal_kl(results: Sequence[Result], optimum: Optimum) -> list[dict[str, Any]]:
    """For each method and KL of `EQUAL_KL`: the reward of the best policy, or mixture of two, within that KL, and what share it
    is of what the optimum gains there. `_low` and `_high`: had all its rewards been at that end of their 95 % intervals. None
    where a method has no policy that near, or the optimum cannot be trusted that far."""
    found = []
    for method in dict.fromkeys(result.run.method for result in results):
        mine = [point for result in results if result.run.method == method for point in result.points]
        kls = np.array([0.0, *(p["kl"] for p in mine)])
        for at in EQUAL_KL:
            row: dict[str, Any] = {"method": method, "kl": at}
            for end in ("", "_low", "_high"):
                rewards = np.array([optimum.reference, *(p[f"reward{end}"] for p in mine)])
                reward = envelope(kls, rewards, at) if at <= kls.max() else math.nan
                missed = float(regret(reward, at, optimum, optimum.reference)) if at <= optimum.reach else math.nan
                row |= {f"reward{end}": _known(reward), f"share_of_gain{end}": _known(1 - missed)}
            found.append(row)
    return found


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def summary(results: Sequence[Result], optimum: Optimum) -> str:
    """Methods by KL, as text: reward, and the share of the possible gain."""
    table = at_equal_kl(results, optimum)
    lines = [f"{'at equal KL (nats):':22}" + "".join(f"{at:>24g}" for at in EQUAL_KL)]
    best = [float(np.interp(at, optimum.kl, optimum.reward)) for at in EQUAL_KL]
    trusted = [at <= optimum.reach for at in EQUAL_KL]
    cells = [f"{value:.2f}" + ("" if sure else " (few samples)") for value, sure in zip(best, trusted, strict=True)]
    lines.append(f"{'the optimum':22}" + "".join(f"{cell:>24}" for cell in cells))
    for method in dict.fromkeys(row["method"] for row in table):
        cells = []
        for row in (row for row in table if row["method"] == method):
            low, share, high = (row[f"share_of_gain{end}"] for end in ("_low", "", "_high"))
            percent = "" if share is None else f" ({share:.0%}, {100 * low:.0f} to {100 * high:.0f})"
            cells.append("-" if row["reward"] is None else f"{row['reward']:.2f}{percent}")
        lines.append(f"{method:22}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(
        [
            *lines,
            f"in brackets: share of the optimum's gain over the reference, whose reward is {optimum.reference:.2f}, and 95 %",
        ]
    )
