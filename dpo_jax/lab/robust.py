"""Tables of the robustness experiments: gains in true reward at equal KL, with the values they are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.evals.frontier import envelope
from dpo_jax.lab.seeds import over_seeds
from dpo_jax.lab.sweep import Result
from dpo_jax.lab.world import Points

EQUAL_KL = (1.0, 3.0)  # nats
ENDS = ("", "_low", "_high")
Value = dict[str, float]
"""`{"": mean, "_low": ..., "_high": ...}`, a 95 % interval over prompts and seeds."""

COLUMNS = (
    *("method", "label", "seed", "step", "kl", "kl_low", "kl_high", "kl_sampled", "reward", "reward_low", "reward_high"),
    *("proxy", "proxy_low", "proxy_high", "tokens", "seconds", "flipped", "pairs", "tested"),
)


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Every measured point, with the settings of its run."""
    return [
        {"method": r.run.method, "label": r.run.label, "seed": r.run.seed, "seconds": r.seconds, **r.run.settings, **point}
        for r in results
        for point in r.points
    ]


def gain_at_kl(by_seed: Iterable[Points], at: float, *, reference: float) -> Value | None:
    """Gain in true reward over the `reference` by the best policy, or mixture of two, within a KL of `at`.

    `by_seed`: the policies of each seed. A seed without a policy that reaches this KL is left out; None if all seeds are. The
    value says how many of the "seeds" are in it, out of those "of". The reference counts as exact; where rewards were kept for
    every prompt, `paired.gains_at_kl` includes its scatter.
    """
    mixed, several = [], [*by_seed]
    for points in several:
        kls = np.array([0.0, *(point["kl"] for point in points)])
        if at <= kls.max():
            gains = {end: np.array([0.0, *(p[f"reward{end}"] - reference for p in points)]) for end in ENDS}
            mixed.append({f"gain{end}": envelope(kls, gains[end], at) for end in ENDS})
    return over_seeds(mixed, "gain") | {"seeds": len(mixed), "of": len(several)} if mixed else None


def by_seed(results: Iterable[Result]) -> list[Points]:
    """All points of each seed."""
    found: dict[int, Points] = {}
    for result in results:
        found.setdefault(result.run.seed, []).extend(result.points)
    return list(found.values())


def difference(one: Value, other: Value) -> Value:
    """`one - other`. The intervals add in quadrature, as if the two were independent, so the result is rather too wide."""
    mean = one[""] - other[""]
    below = math.hypot(one[""] - one["_low"], other["_high"] - other[""])
    above = math.hypot(one["_high"] - one[""], other[""] - other["_low"])
    return {"": mean, "_low": mean - below, "_high": mean + above}


def curve_at(kl: np.ndarray, reward: np.ndarray, at: float) -> float | None:
    """Reward at a KL of a curve that begins at KL 0, interpolated linearly in sqrt(KL); None beyond its end."""
    return float(np.interp(math.sqrt(at), np.sqrt(kl), reward)) if at <= kl.max() else None


def cell(value: Value | None, *, beside: float | None = None) -> str:
    """A value with its interval for a printed table, and the value it is compared with in square brackets."""
    words = "-" if value is None else f"{value['']:.2f} ({value['_low']:.2f} to {value['_high']:.2f})"
    if value is not None and value.get("seeds", 0) < value.get("of", 0):
        words += f", {value['seeds']} of {value['of']} seeds"
    return words if beside is None else f"{words} [{beside:.2f}]"


class Grid(NamedTuple):
    """A printable table, stored in `summary.json` and shown by `dpo-jax report`. The first cell of a row is its name."""

    caption: str
    columns: list[str]  # headings of all cells but the first
    rows: list[list[str]]
    note: str = ""

    def text(self) -> str:
        first, *others = (max(map(len, column)) for column in zip([self.caption, *self.columns], *self.rows, strict=True))
        lines = [
            f"{row[0]:{first}}" + "".join(f"  {one:>{width}}" for one, width in zip(row[1:], others, strict=True))
            for row in ([self.caption, *self.columns], *self.rows)
        ]
        return "\n".join([*lines, *filter(None, [self.note])])
