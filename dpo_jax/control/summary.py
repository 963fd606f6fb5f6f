"""Summary of `dpo-jax control`: returns over seeds, and CPL's lead over each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.lab.paired import mean_gain
from dpo_jax.lab.robust import Grid
from dpo_jax.lab.seeds import last_points, over_seeds
from dpo_jax.lab.sweep import Result

COLUMNS = ("method", "preferences", "seed", "step", "return", "return_low", "return_high", "excess", "kl", "seconds")
POINT = {**{name: float for name in ("step", "return", "return_low", "return_high")}, "episodes?": [float]}
SEEDS, BOTH = "seeds alone", "episodes and seeds"  # what an interval is over


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per measured point: `COLUMNS`. Returns of single episodes stay in the results of the runs."""
    return [
        {
            "method": r.run.method,
            "preferences": r.run.settings["preferences"],
            "seed": r.run.seed,
            "seconds": r.seconds,
            **{name: value for name, value in point.items() if name != "episodes"},
        }
        for r in results
        for point in r.points
    ]


def summarized(results: Sequence[Result], optimal: float) -> dict[str, Any]:
    """Summary with `returns` of each method and kind of preferences (mean of the last points over seeds, 95 % interval,
    standard error over seeds) and `ahead`, CPL's return minus that of each other method (`_lead`). `over` says what an
    interval is over.
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
        row["over"] = BOTH if any(point["return_low"] < point["return"] for point in points) else SEEDS
        for name in ("excess", "kl"):
            if name in points[0]:
                row[name] = float(np.mean([point[name] for point in points]))
        returns.append(row)
        if method != "cpl" and ("cpl", label) in by_run:
            ahead.append({"of": method, "preferences": kinds[label], **_lead(by_run["cpl", label], points)})
    return {"optimal": optimal, "returns": returns, "ahead": ahead}


def _lead(cpl: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """CPL's return minus the other's, paired by seed and, as all policies start from the same states, by episode: its mean and
    its 95 % interval over episodes and seeds. Exact returns, and results of earlier versions, have no episodes: then it is over
    seeds alone (Student's t), and None for one seed."""
    pairs = list(zip(cpl, others, strict=True))
    if all("episodes" in point for pair in pairs for point in pair):
        gains = {n: np.array(one["episodes"]) - np.array(other["episodes"]) for n, (one, other) in enumerate(pairs)}
        found = mean_gain(gains, seed=0) or {}
        return {f"return{end}": found[end] for end in ("", "_low", "_high")} | {"over": BOTH}
    apart = [float(one["return"] - other["return"]) for one, other in pairs]
    points = [{"x": value, "x_low": value, "x_high": value} for value in apart]
    found = {**over_seeds(points, "x"), **(dict.fromkeys(("_low", "_high")) if len(points) == 1 else {})}
    return {f"return{end}": value for end, value in found.items()} | {"over": SEEDS}


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
    note = f"mean and 95 % interval over {_over(summary['returns'])}; the optimum or expert has {summary['optimal']:.2f}"
    found = [Grid("return", [f"by {kind}" for kind in kinds] + extra, body, note)]
    others = [method for method in methods if any((method, kind) in ahead for kind in kinds)]
    if others:
        body = [[method, *(_cell(ahead.get((method, kind))) for kind in kinds)] for method in others]
        note = f"difference of returns, with its 95 % interval over {_over(summary['ahead'])}"
        found.append(Grid("CPL is ahead of", [f"by {kind}" for kind in kinds], body, note))
    return found


def _over(rows: Sequence[Mapping[str, Any]]) -> str:
    return " or ".join(dict.fromkeys(row["over"] for row in rows))


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = row["return_low"], row["return_high"]
    return f"{row['return']:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")
