"""Over-optimization check: gains in the optimized reward compared with gains in a second reward that no policy trains on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from dpo_jax.evals.frontier import Optimum
from dpo_jax.lab.report import BEST_OF, REFERENCE
from dpo_jax.lab.seeds import last_points, over_seeds
from dpo_jax.lab.sweep import Result
from dpo_jax.lab.world import SECOND

BOTH, ONE, FALLS, NONE = "both rise", "only the first rises", "the first rises, the second falls", "no gain beyond scatter"
ENDS = ("", "_low", "_high")
CHOSEN = "Each method is at the best of its settings, chosen by the reward of the same prompts: its gain is optimistic."


def gains(results: Sequence[Result], optimum: Optimum) -> list[dict[str, Any]]:
    """For each method, its setting with the highest final true reward: `gain` over the reference and `second_gain`, the gain in
    the second reward, with 95 % intervals (`_low`, `_high`), and `reading`.

    The intervals treat policy and reference as independent, though they share their prompts, so they are rather too wide.
    The setting is chosen on the same prompts: the more settings a method has, the more optimistic is its gain.
    `turned` names the method's setting of smaller KL whose second reward was higher by more than these intervals, or is "".
    The optimum is read at the largest KL at which it can be trusted.
    """
    ended = {key: list(seeds.values()) for key, seeds in last_points(results).items()}
    (start,) = ended.get((REFERENCE, ""), [None])
    if start is None or SECOND not in start:
        return []
    rows = []
    for method in dict.fromkeys(method for method, _ in ended if method != REFERENCE):
        settings = {
            label: {name: over_seeds(points, name) for name in ("kl", "reward", SECOND)}
            for (its, label), points in ended.items()
            if its == method and all(SECOND in point for point in points)
        }
        if settings:
            label = max(settings, key=lambda label: settings[label]["reward"][""])
            own = not method.startswith(BEST_OF)  # measured on other prompts, with its own reference value
            before = start if own else _reference_of(optimum)
            rows.append(_row(method, label, settings[label], before) | {"turned": _turned(settings, label)})
    if optimum.beside is not None and optimum.trusted.any():
        last = int(np.flatnonzero(optimum.trusted)[-1])
        reward = dict(zip(ENDS, (optimum.reward[last], *optimum.band[:, last]), strict=True))
        second = dict(zip(ENDS, (optimum.beside.reward[last], *optimum.beside.band[:, last]), strict=True))
        best = {"kl": {"": float(optimum.kl[last])}, "reward": reward, SECOND: second}
        rows.append(_row("optimum", f"beta {optimum.beta[last]:.2g}", best, _reference_of(optimum)) | {"turned": ""})
    return rows


def _reference_of(optimum: Optimum) -> dict[str, float]:
    assert optimum.beside is not None
    values = {"reward": optimum.reference, SECOND: optimum.beside.reference}
    return {f"{name}{end}": value for name, value in values.items() for end in ENDS}


def _row(method: str, label: str, found: Mapping[str, Mapping[str, float]], start: Mapping[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "label": label, "kl": float(found["kl"][""])}
    for name, gain in (("reward", "gain"), (SECOND, "second_gain")):
        value, low, high = (float(found[name][end]) for end in ENDS)
        rise = value - start[name]
        row |= {
            gain: rise,
            f"{gain}_low": rise - math.hypot(value - low, start[f"{name}_high"] - start[name]),
            f"{gain}_high": rise + math.hypot(high - value, start[name] - start[f"{name}_low"]),
        }
    risen = row["gain_low"] > 0
    second = BOTH if row["second_gain_low"] > 0 else FALLS if row["second_gain_high"] < 0 else ONE
    return row | {"reading": second if risen else NONE}


def _turned(settings: Mapping[str, Mapping[str, Mapping[str, float]]], label: str) -> str:
    """The setting closer to the reference whose second reward exceeds that of `label` by more than their intervals.

    It is the best of k such settings, so these are at 1 - 0.05 / k (Bonferroni), by quantiles of a normal."""
    here = settings[label]
    nearer = [other for other, its in settings.items() if its["kl"][""] < here["kl"][""]]
    best = max(nearer, key=lambda other: settings[other][SECOND][""], default=label)
    there = settings[best][SECOND]
    apart = math.hypot(there[""] - there["_low"], here[SECOND]["_high"] - here[SECOND][""])
    wider = NormalDist().inv_cdf(1 - 0.025 / max(1, len(nearer))) / NormalDist().inv_cdf(0.975)
    return best if there[""] - here[SECOND][""] > apart * wider else ""


def over_optimized(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Methods whose second reward falls while the first rises, and methods that show no gain in the second."""
    falls = [row["method"] for row in rows if row["reading"] == FALLS or row["turned"]]
    return falls, [row["method"] for row in rows if row["reading"] == ONE and not row["turned"]]


def summary(rows: Sequence[Mapping[str, Any]], *, name: str) -> str:
    """`gains` as text, with an interpretation in words."""
    lines = [f"{f'beside {name}:':26}{'at':>16}{'KL':>8}{'gain in reward':>26}{f'in {name}':>28}  "]
    for row in rows:
        cells = [f"{row[g]:.2f} ({row[f'{g}_low']:.2f} to {row[f'{g}_high']:.2f})" for g in ("gain", "second_gain")]
        turned = f"; the second was higher at {row['turned']}" if row["turned"] else ""
        lines.append(
            f"{row['method']:26}{row['label']:>16}{row['kl']:>8.2f}{cells[0]:>26}{cells[1]:>28}  {row['reading']}{turned}"
        )
    return "\n".join([*lines, CHOSEN, words(rows, name=name)])


def words(rows: Sequence[Mapping[str, Any]], *, name: str) -> str:
    """Interpretation of the two rewards in a few sentences."""
    said = [
        f"No policy was trained on {name}.",
        "What a policy gains in the trained-on reward but not in the second is over-optimization of the scorer.",
    ]
    falls, unseen = over_optimized(rows)
    if falls:
        said.append(f"It shows here for {', '.join(falls)}: the second reward falls while the first rises.")
    if unseen:
        no_gain = f"For {', '.join(unseen)} no gain in {name} is seen beyond scatter"
        said.append(f"{no_gain}: over-optimization, or too few prompts to tell.")
    if not falls and not unseen:
        rose = any(row["reading"] == BOTH for row in rows)
        said.append(
            "There is no sign of it here: the second reward rises with the first."
            if rose
            else "No policy gained enough to tell."
        )
    return " ".join(said)
