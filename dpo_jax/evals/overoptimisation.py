"""Over-optimisation: where the true reward of a training run peaks and falls as KL grows.

A policy that follows its implicit reward, or a learned one, moves ever further from the reference; beyond some KL the true
reward may fall (Gao et al. 2023 for reward models; Rafailov et al. 2024, arXiv 2406.02900, for DPO). That shows only where the
true reward is known, as in the experiments of `dpo-jax frontier`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dpo_jax.evals.preference import Interval

RunName = tuple[str, str, str]  # method, setting, seed
Measured = dict[str, float]


class Decline(NamedTuple):
    """From the best point of a run to its last. Rewards in their own unit; KL(policy || reference) in nats per completion."""

    method: str
    setting: str
    seed: str
    points: int
    best_kl: float
    best_reward: float
    last_kl: float
    last_reward: float
    fall: float  # of the reward; 0 where the last point is the best
    interval: Interval  # 95 %
    overoptimised: bool  # further out, and worse beyond what the prompts' scatter explains


def declines(rows: Iterable[Mapping[str, Any]]) -> list[Decline]:
    """One `Decline` for each run of a `results.csv` of `frontier` that was measured more than once.

    The rows of a run (same method, label and seed) are in the order of training, with kl, reward, reward_low and reward_high.
    The interval takes the two points as independent, though they share their prompts: it is rather too wide. The best of
    several points is chosen for its height, which makes a small fall look real: only one that its interval bears out counts.
    """
    return [_decline(key, points) for key, points in trajectories(rows).items()]


def trajectories(rows: Iterable[Mapping[str, Any]]) -> dict[RunName, list[Measured]]:
    """The points of each run that was measured more than once, in the order of training: kl, reward and its bounds."""
    runs: dict[RunName, list[Measured]] = {}
    for row in rows:
        point = {name: float(row[name]) for name in ("kl", "reward", "reward_low", "reward_high")}
        runs.setdefault((str(row["method"]), str(row["label"]), str(row["seed"])), []).append(point)
    return {key: points for key, points in runs.items() if len(points) > 1}


def _decline(key: RunName, numbers: list[Measured]) -> Decline:
    best, last = max(numbers, key=lambda point: point["reward"]), numbers[-1]
    fall = best["reward"] - last["reward"]
    below = math.hypot(best["reward"] - best["reward_low"], last["reward_high"] - last["reward"])
    above = math.hypot(best["reward_high"] - best["reward"], last["reward"] - last["reward_low"])
    return Decline(
        *key,
        points=len(numbers),
        best_kl=best["kl"],
        best_reward=best["reward"],
        last_kl=last["kl"],
        last_reward=last["reward"],
        fall=fall,
        interval=(fall - below, fall + above),
        overoptimised=last["kl"] > best["kl"] and fall > below,
    )
