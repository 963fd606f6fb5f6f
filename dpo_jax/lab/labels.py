"""Label efficiency of a method: the share of the possible gain against the number of labels used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.evals.frontier import Optimum, envelope
from dpo_jax.lab.report import base_of, missed_share
from dpo_jax.lab.seeds import over_seeds
from dpo_jax.lab.sweep import Result

SHARE, WITHIN = 0.85, 3.0  # of the possible gain, within this KL in nats


def shares_by_labels(
    points: Sequence[Mapping[str, float]], at: float, optimum: Optimum, base: float
) -> tuple[np.ndarray, np.ndarray]:
    """(labels, share of the optimum's gain at KL `at`) after each of `points`, where the reference has the reward `base` on the
    prompts of `points`.

    The share is that of the best policy so far within that KL, or of the best mixture of two, one of which may be the
    reference. Labels and shares ascend. Shares are NaN beyond the optimum's reach."""
    ordered = sorted(points, key=lambda point: point["labels"])
    kls, rewards = np.array([[0.0, base], *([p["kl"], p["reward"]] for p in ordered)]).T
    best = [envelope(kls[: n + 1], rewards[: n + 1], at) for n in range(1, len(kls))]
    shares = 1 - missed_share(np.array(best), at, optimum, base)
    return np.array([p["labels"] for p in ordered]), shares if at <= optimum.reach else np.full(len(best), math.nan)


def labels_needed(labels: np.ndarray, shares: np.ndarray, share: float) -> float:
    """Number of labels after which `share` is reached, interpolated linearly; infinity if it is not reached.

    >>> labels_needed(np.array([100.0, 200.0]), np.array([0.4, 0.8]), 0.6)
    150.0
    """
    reached = np.flatnonzero(shares >= share)
    if not len(reached):
        return math.inf
    labels, shares = np.append(0.0, labels), np.append(0.0, shares)
    last = int(reached[0]) + 1
    return float(np.interp(share, shares[last - 1 : last + 1], labels[last - 1 : last + 1]))


def label_table(
    results: Sequence[Result], optimum: Optimum, *, share: float = SHARE, at: float = WITHIN
) -> list[dict[str, Any]]:
    """A row for each setting whose points have `labels`: the labels each seed needs to reach `share` at KL `at`, their mean,
    and its 95 % interval over seeds (Student's t; None of one seed), with the optimum taken as exact. `labels` is None where a
    seed does not reach it.

    Settings (betas) stay apart: one that ends at a smaller KL does not reach the share, and is no seed of another."""
    spent = [result for result in results if "labels" in result.points[-1]]
    rows, base = [], base_of(results, optimum)
    for method, label in dict.fromkeys((result.run.method, result.run.label) for result in spent):
        mine = [result for result in spent if (result.run.method, result.run.label) == (method, label)]
        needed = [labels_needed(*shares_by_labels(result.points, at, optimum, base), share) for result in mine]
        row: dict[str, Any] = {
            "method": method,
            "label": label,
            "share": share,
            "kl": at,
            "each": [x if x < math.inf else None for x in needed],
        }
        if all(x < math.inf for x in needed):
            found = over_seeds([dict.fromkeys(("x", "x_low", "x_high"), x) for x in needed], "x")
            found |= {"_low": None, "_high": None} if len(needed) == 1 else {}  # one seed says nothing about others
        else:
            found = dict.fromkeys(("", "_low", "_high"))
        rows.append(row | {f"labels{end}": value for end, value in found.items()})
    return rows


def label_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text."""
    title = f"labels for {rows[0]['share']:.0%} of the possible gain at KL {rows[0]['kl']:g}"
    lines = [f"{title} (95 % over seeds, the optimum taken as exact):"]
    for row in rows:
        some = ", ".join("not reached" if x is None else f"{x:,.0f}" for x in row["each"])
        known = row["labels_low"] is not None
        mean = f"{row['labels']:,.0f} ({row['labels_low']:,.0f} to {row['labels_high']:,.0f}); " if known else ""
        lines.append(f"{row['method']:22}{row['label']:12}{mean}each seed: {some}")
    return "\n".join(lines)
