"""Summary of `dpo-jax control`: returns over seeds, and CPL's lead over each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.lab.robust import Grid
from dpo_jax.lab.seeds import last_points, over_seeds, student
from dpo_jax.lab.sweep import Result

COLUMNS = ("method", "preferences", "seed", "step", "return", "return_low", "return_high", "excess", "kl", "seconds")
POINT = {name: float for name in ("step", "return", "return_low", "return_high")}


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per measured point: `COLUMNS`."""
    return [
        {
            "method": r.run.method,
            "preferences": r.run.settings["preferences"],
            "seed": r.run.seed,
            "seconds": r.seconds,
            **point,
        }
        for r in results
        for point in r.points
    ]


def summarized(results: Sequence[Result], optimal: float) -> dict[str, Any]:
    """Summary with `returns` of each method and kind of preferences (mean of the last points over seeds, 95 % interval,
    standard error over seeds) and `ahead`, CPL's return minus that of each other method, paired by seed, with the 95 %
    interval (Student's t; none for one seed).
    """
    by_run = {key: [of[seed] for seed in sorted(of)] for key, of in last_points(results).items()}
    kinds = {r.run.label: r.run.settings["preferences"] for r in results}
    returns, ahead = [], []
    for (method, label), points in by_run.items():
        found = over_seeds(points, "return")
        values = np.array([point["return"] for point in points])
        row = {"method": method, "preferences": kinds[label], "seeds": len(points)}
        row |= {f"return{end}": value for end, value in found.items()}
        row["standard_error"] = _error(values)
        for name in ("excess", "kl"):
            if name in points[0]:
                row[name] = float(np.mean([point[name] for point in points]))
        returns.append(row)
        if method != "cpl" and ("cpl", label) in by_run:
            apart = np.array([point["return"] for point in by_run["cpl", label]]) - values
            error, mean = _error(apart), float(apart.mean())
            low, high = (None, None) if error is None else (mean - (half := student(len(apart)) * error), mean + half)
            ahead.append(
                {
                    "of": method,
                    "preferences": kinds[label],
                    "return": mean,
                    "return_low": low,
                    "return_high": high,
                }
            )
    return {"optimal": optimal, "returns": returns, "ahead": ahead}


def _error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def tables(summary: Mapping[str, Any]) -> list[Grid]:
    """The printed tables: returns, and CPL's lead."""
    kinds = list(dict.fromkeys(row["preferences"] for row in summary["returns"]))
    methods = list(dict.fromkeys(row["method"] for row in summary["returns"]))
    returns = {(row["method"], row["preferences"]): row for row in summary["returns"]}
    ahead = {(row["of"], row["preferences"]): row for row in summary["ahead"]}
    body = [[method, *(_cell(returns.get((method, kind))) for kind in kinds)] for method in methods]
    if any("excess" in row for row in summary["returns"]):
        body = [[*row, *(f"{100 * returns[row[0], kind]['excess']:.2f} %" for kind in kinds)] for row in body]
        extra = [f"cost over the optimal one, by {kind}" for kind in kinds]
    else:
        extra = []
    note = f"mean and 95 % interval over seeds; the optimum or expert has {summary['optimal']:.2f}"
    found = [Grid("return", [f"by {kind}" for kind in kinds] + extra, body, note)]
    others = [method for method in methods if any((method, kind) in ahead for kind in kinds)]
    if others:
        body = [[method, *(_cell(ahead.get((method, kind))) for kind in kinds)] for method in others]
        found.append(Grid("CPL is ahead of", [f"by {kind}" for kind in kinds], body, "difference of returns by seeds"))
    return found


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = row["return_low"], row["return_high"]
    return f"{row['return']:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")
