"""Results of a sweep: every point of every run in one table, and each method's distance from the optimum at equal KL."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.terminal import csv_cell, json_text
from dpo_jax.evals.frontier import Optimum, Point, best_of_n, bootstrap_interval, envelope, regret
from dpo_jax.evals.intervals import Interval
from dpo_jax.lab.seeds import last_points, over_seeds
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.lab.world import LEARNED, SECOND
from dpo_jax.types import Array
from dpo_jax.writing import writing

EQUAL_KL = (1.0, 3.0, 6.0)  # KL in nats at which methods are compared
FAR = (9.0, 12.0)  # further ones, if any method reaches them
COLUMNS = (
    *("method", "label", "seed", "step", "kl", "kl_low", "kl_high", "kl_sampled", "reward", "reward_low", "reward_high"),
    *("regret", "trusted", "tokens", "seconds", "tokens_low", "tokens_high", "cut", "labels"),
    *(f"{name}{end}" for name in (SECOND, LEARNED) for end in ("", "_low", "_high")),
)
REFERENCE = "reference"
"""Method name of the result for the reference itself."""
BEST_OF = "best-of-n"
"""Beginning of the method names of Best-of-N, which is measured on the prompts of the optimum. The rest names the reward that
selects; results of earlier versions lack it, and are by the true reward."""


def base_of(results: Sequence[Result], optimum: Optimum, method: str = "") -> float:
    """Reward of the reference on the prompts on which `method` was measured: the test prompts, for Best-of-N those of the
    optimum. Without a result for the reference, always those of the optimum."""
    start = [result.points[-1]["reward"] for result in results if result.run.method == REFERENCE]
    return optimum.reference if method.startswith(BEST_OF) or not start else start[0]


def missed_share(reward: Array | float, kl: Array | float, optimum: Optimum, base: float) -> np.ndarray:
    """`regret` of a gain: of `reward` over the reference's reward `base` on the same prompts, where the optimum's gain is over
    `optimum.reference`. A difference of the two sets of prompts is then no gain of the policy."""
    return regret(np.asarray(reward) - base + optimum.reference, kl, optimum, optimum.reference)


def rows(results: Sequence[Result], optimum: Optimum) -> list[dict[str, Any]]:
    """One row per point: `COLUMNS`, where known. `regret` is the share of the possible gain that is missed at this KL. It is
    too low where `trusted` is false, because the optimum rests on few samples there."""
    found = []
    for result in results:
        base = base_of(results, optimum, result.run.method)
        run = {"method": result.run.method, "label": result.run.label, "seed": result.run.seed, "seconds": result.seconds}
        for point in result.points:
            missed = float(missed_share(point["reward"], point["kl"], optimum, base))
            trusted = point["kl"] <= optimum.reach
            found.append({**run, **point, "regret": None if math.isnan(missed) else missed, "trusted": trusted})
    return found


def write(folder: Path, table: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Writes `results.jsonl`, with everything in the rows, and `results.csv`, with `columns`."""
    with writing(folder / "results.jsonl") as file:
        file.writelines(json_text(row) + "\n" for row in table)
    with writing(folder / "results.csv", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in table)


def points(results: Sequence[Result], *, reward: str = "reward") -> list[Point]:
    """Points of the figure: every measured point of every run that has this `reward`; for a setting with several seeds, the
    mean of their last points. Preferred-FT has no setting that tells runs apart: its seeds are named, not averaged."""
    trained = [result for result in results if result.run.method != REFERENCE and reward in result.points[-1]]
    found = []
    for (method, label), runs in last_points(trained).items():
        several = len(runs) > 1
        apart = several and not label
        for run, its in ((result.run, result.points) for result in trained):
            if (run.method, run.label) == (method, label):
                setting = f"seed {run.seed}" if apart else label
                found += [
                    _point(method, setting, one, reward, seed=str(run.seed) if several and not apart else "") for one in its
                ]
        if several and not apart:
            mean = {name: over_seeds(list(runs.values()), name) for name in ("kl", reward)}
            found.append(_point(method, label, {f"{k}{end}": v for k, of in mean.items() for end, v in of.items()}, reward))
    return found


def _point(method: str, setting: str, point: Mapping[str, float], reward: str, *, seed: str = "") -> Point:
    kl_interval, interval = ((point[f"{name}_low"], point[f"{name}_high"]) for name in ("kl", reward))
    return Point(method, setting, point["kl"], point[reward], kl_interval, interval, point.get("kl_bound"), seed)


def best_of(
    rewards: np.ndarray, n: int, *, seed: int, by: np.ndarray | None = None, beside: np.ndarray | None = None
) -> dict[str, float]:
    """Best-of-`n` as a point, with its estimated KL and the analytic bound. `by`: the reward that selects (default: `rewards`);
    `beside`: a second reward. All are float64[P, M] of the same completions."""
    judge = rewards if by is None else by
    found = best_of_n(judge, n)
    values = {"kl": found.kl}
    for name, of in (("reward", rewards), (SECOND, beside)):
        taken = None if of is None else best_of_n(judge, n, beside=of).beside
        if taken is not None:
            values[name] = taken
    point = {"step": float(n), "kl_bound": found.kl_bound}
    for name, value in values.items():
        low, high = bootstrap_interval(value, seed)
        point |= {name: float(value.mean()), f"{name}_low": low, f"{name}_high": high}
    return point


def best_of_results(
    rewards: np.ndarray,
    several: Sequence[float],
    *,
    seed: int,
    by: np.ndarray | None = None,
    beside: np.ndarray | None = None,
) -> list[Result]:
    """Best-of-N from the reference's `rewards[P, M]`, for each N of `several` that is at most M, chosen `by` a learned reward,
    or by the true one (None)."""
    method = f"{BEST_OF}, {'true' if by is None else 'learned'} reward"
    points = {int(n): best_of(rewards, int(n), seed=seed, by=by, beside=beside) for n in several if n <= rewards.shape[1]}
    return [Result(Run(method, f"N {n}", {"n": n}, seed), [point], 0.0) for n, point in points.items()]


def _kls(results: Sequence[Result]) -> tuple[float, ...]:
    """KLs at which `results` are compared."""
    reached = max((point["kl"] for result in results for point in result.points), default=0.0)
    return (*EQUAL_KL, *(at for at in FAR if at <= reached))


def at_equal_kl(results: Sequence[Result], optimum: Optimum) -> list[dict[str, Any]]:
    """For each method and KL (`EQUAL_KL`, `FAR`): reward of the best policy, or mixture of two, within that KL, and its gain as
    a share of the optimum's. Each gain is over the reference on the same prompts (`base_of`). As the best within a KL,
    these rewards never fall with it; the figure shows policies whose reward does.

    `_low` and `_high`: the same with all rewards at that end of their 95 % intervals. With several seeds, each seed mixes its
    own policies, and these are the mean and the interval of `over_seeds`. Ends of a share also cover the optimum's gain, which
    is estimated from few prompts; KLs and the reference's reward are taken as exact. `seeds`: how many seeds have a policy that
    reaches this KL. Values are None where no seed reaches it, or where the optimum cannot be trusted."""
    found, best = [], {at: optimum.gain(at) for at in _kls(results)}
    for method in dict.fromkeys(result.run.method for result in results if result.run.method != REFERENCE):
        base = base_of(results, optimum, method)
        seeds = dict.fromkeys(result.run.seed for result in results if result.run.method == method)
        mine = [[p for r in results if (r.run.method, r.run.seed) == (method, seed) for p in r.points] for seed in seeds]
        for at in _kls(results):
            mixed = [_mixed(points, at, base) for points in mine if at <= max(point["kl"] for point in points)]
            rewards = over_seeds(mixed, "reward") if mixed else dict.fromkeys(("", "_low", "_high"), math.nan)
            missed = missed_share(np.array([*rewards.values()]), at, optimum, base) if at <= optimum.reach else [math.nan] * 3
            share, low, high = (1 - float(x) for x in missed)
            shares = _with_optimum(share, low, high, *best[at])
            row: dict[str, Any] = {"method": method, "kl": at, "seeds": len(mixed)}
            for (end, reward), share in zip(rewards.items(), shares, strict=True):
                row |= {f"reward{end}": _known(reward), f"share_of_gain{end}": _known(share)}
            found.append(row)
    return found


def _with_optimum(share: float, low: float, high: float, gain: float, of: Interval) -> tuple[float, float, float]:
    """A share of the optimum's `gain` and its interval, with the part of the gain's own interval `of` in quadrature."""
    if math.isnan(share) or gain <= 0:
        return share, low, high
    less, more = abs(share) * (gain - of[0]) / gain, abs(share) * (of[1] - gain) / gain
    less, more = (more, less) if share >= 0 else (less, more)  # of a larger gain it is a smaller share
    return share, share - math.hypot(share - low, less), share + math.hypot(high - share, more)


def _mixed(points: Sequence[Mapping[str, float]], at: float, base: float) -> dict[str, float]:
    """Reward of the best mixture of two of `points`, or of one and the reference (reward `base`), within a KL of `at`."""
    kls = np.array([0.0, *(p["kl"] for p in points)])
    ends = [f"reward{end}" for end in ("", "_low", "_high")]
    return {end: envelope(kls, np.array([base, *(p[end] for p in points)]), at) for end in ends}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


NAME, CELL = 30, 30  # characters of the first column, and of the others


def summary(results: Sequence[Result], optimum: Optimum) -> str:
    """Table of methods by KL as text: reward, and share of the possible gain."""
    table, kls = at_equal_kl(results, optimum), _kls(results)
    mine = {row["method"]: [r for r in results if r.run.method == row["method"]] for row in table}
    seeds = {method: len({r.run.seed for r in found}) for method, found in mine.items()}
    policies = {method: sum(len(r.points) for r in found) / seeds[method] for method, found in mine.items()}
    lines = [f"{'at equal KL (nats):':{NAME}}" + "".join(f"{at:>{CELL}g}" for at in kls)]
    best = [float(np.interp(at, optimum.kl, optimum.reward)) for at in kls]
    trusted = [at <= optimum.reach for at in kls]
    cells = [f"{value:.2f}" + ("" if sure else " (few samples)") for value, sure in zip(best, trusted, strict=True)]
    lines.append(f"{'the optimum':{NAME}}" + "".join(f"{cell:>{CELL}}" for cell in cells))
    for method in dict.fromkeys(row["method"] for row in table):
        cells = []
        for row in (row for row in table if row["method"] == method):
            low, share, high = (row[f"share_of_gain{end}"] for end in ("_low", "", "_high"))
            percent = "" if share is None else f" ({share:.0%}, {100 * low:.0f} to {100 * high:.0f})"
            few = f" [{row['seeds']} of {seeds[method]}]" if row["seeds"] < seeds[method] else ""
            cells.append("-" if row["reward"] is None else f"{row['reward']:.2f}{percent}{few}")
        lines.append(f"{f'{method}, {policies[method]:.0f}':{NAME}}" + "".join(f"{cell:>{CELL}}" for cell in cells))
    several = ", ".join(f"{method} {count}" for method, count in seeds.items() if count > 1)
    brackets = "in brackets: share of the optimum's gain over the reference, with its 95 % interval over prompts"
    brackets += f" and seeds (Student's t; seeds: {several})" if several else ""
    brackets += "; it covers the error of the optimum, and takes KLs and the reference as exact"
    counts = "beside a method: policies measured per seed, of which the table takes the best; with more, luck counts for more"
    return "\n".join([*lines, brackets, counts, *_shifted(results, optimum)])


def _shifted(results: Sequence[Result], optimum: Optimum) -> list[str]:
    """A line of the summary if the prompts of the optimum differ from the test prompts by more than chance."""
    found = next((result.points[-1] for result in results if result.run.method == REFERENCE), None)
    if found is None or found["reward_low"] <= optimum.reference <= found["reward_high"]:
        return []
    reward, low, high = (found[f"reward{end}"] for end in ("", "_low", "_high"))
    return [
        f"the reference has a reward of {reward:.2f} ({low:.2f} to {high:.2f}) on the test prompts, but of "
        f"{optimum.reference:.2f} on those of the optimum: each gain is over the reference on its own prompts, but rewards of "
        "policies and of the optimum cannot be compared (raise frontier.optimum_prompts)"
    ]
