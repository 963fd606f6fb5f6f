"""Panels of training curves: which metrics of `metrics.jsonl` share an image, and running means. Nothing here draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.plotting.palette import CHOSEN, NEUTRAL, REJECTED, Style

EVAL = "eval/"
SMOOTHED = 20  # a running mean takes one twentieth of the steps
ROWS = Sequence[Mapping[str, Any]]


class Line(NamedTuple):
    """A metric of training rows, and `eval/<metric>` of evaluation rows beside it.

    `smooth=False`: a schedule or a controller, drawn as it is. `batches=False`: only what was evaluated is drawn.
    """

    metric: str
    label: str
    style: Style = CHOSEN
    smooth: bool = True
    batches: bool = True


class Panel(NamedTuple):
    """One image. `guide`: a horizontal line (value, label) to read the curves against, drawn for preference training only."""

    file: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    guide: tuple[float, str] | None = None


KL_OF_SAMPLES = "KL(policy || reference)"
KL_ON_PAIRS = "KL(reference || policy)"
PANELS = (
    Panel("loss", "Loss", "nats per example", (Line("loss", "loss"),), (math.log(2), "ln 2")),
    Panel("nll", "Negative log-likelihood", "nats per scored token", (Line("nll_per_token", "NLL"),)),
    Panel(
        "rewards",
        "Implicit rewards",
        "beta x log(policy / reference), nats",
        (
            Line("rewards/chosen", "chosen", CHOSEN),
            Line("rewards/rejected", "rejected", REJECTED),
            Line("rewards/margins", "margin", NEUTRAL),
        ),
        (0.0, "reference"),
    ),
    Panel(
        "accuracies",
        "Preference accuracy",
        "share of pairs with chosen above rejected",
        (Line("rewards/accuracies", "accuracy"),),
        (0.5, "chance"),
    ),
    Panel(
        "displacement",
        "Displacement from the reference",
        "log(policy / reference), nats per completion",
        (Line("displacement/chosen", "chosen", CHOSEN), Line("displacement/rejected", "rejected", REJECTED)),
        (0.0, "reference"),
    ),
    Panel("reward", "Reward on held-out prompts", "mean over prompts, in its own unit", (Line("reward", "reward"),)),
    Panel(
        "kl",
        KL_OF_SAMPLES,
        "from samples of the policy, nats per completion",
        (Line("kl", "held out", batches=False), Line("rollout/kl", "rollouts", REJECTED)),
        (0.0, "reference"),
    ),
    Panel(
        "kl_reference_policy",
        KL_ON_PAIRS,
        "estimated on the pairs, nats per completion",
        (Line("kl_reference_policy", "estimate"),),
        (0.0, "reference"),
    ),
    Panel("rollouts", "Reward of PPO's rollouts", "mean, in its own unit", (Line("rollout/reward", "reward"),)),
    Panel(
        "kl_coef",
        "KL coefficient",
        "standard deviations of the reward per nat",
        (Line("kl_coef", "coefficient", smooth=False),),
    ),
    Panel("ratio", "Ratio to the policy that sampled", "mean over tokens", (Line("ratio", "ratio"),)),
    Panel(
        "clipped",
        "Where clipping took effect",
        "share of tokens",
        (Line("clip_share", "ratio", CHOSEN), Line("value_clip_share", "value", REJECTED)),
    ),
    Panel("approx_kl", "KL to the policy that sampled", "estimate, nats per token", (Line("approx_kl", "KL"),)),
    Panel("entropy", "Entropy of the policy", "nats per token", (Line("entropy", "entropy"),)),
    Panel(
        "explained_variance",
        "Explained variance of the value function",
        "share of the variance of the returns",
        (Line("explained_variance", "explained"),),
    ),
    Panel("grad_norm", "Gradient norm", "global L2 norm before clipping", (Line("grad_norm", "norm"),)),
    Panel("lr", "Learning rate", "of each step, as scheduled", (Line("lr", "rate", smooth=False),)),
)
COMPARED = (
    ("loss", "Loss", "nats per example"),
    ("eval/rewards/accuracies", "Preference accuracy, held out", "share of pairs"),
    ("rewards/margins", "Reward margin", "nats"),
    ("displacement/chosen", "Displacement of the chosen", "log(policy / reference), nats per completion"),
    ("eval/kl", f"{KL_OF_SAMPLES}, held out", "from samples of the policy, nats per completion"),
    ("kl_reference_policy", KL_ON_PAIRS, "estimated on the pairs, nats per completion"),
    ("eval/nll_per_token", "Negative log-likelihood, held out", "nats per token"),
    ("eval/reward", "Reward on held-out prompts", "in its own unit"),
    ("grad_norm", "Gradient norm", "before clipping"),
)


def guide_of(panel: Panel, rows: ROWS) -> tuple[float, str] | None:
    """The guide of a panel, if these rows are of preference training; ln 2 is none for a loss that begins elsewhere."""
    preferences = any(name.endswith("rewards/margins") for row in rows for name in row)
    first = next((row["loss"] for row in rows if row.get("loss") is not None), math.nan)
    if panel.guide is None or not preferences or (panel.file == "loss" and not abs(first - panel.guide[0]) < 0.2):
        return None
    return panel.guide


def series(rows: ROWS, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `metric`; None becomes NaN, which matplotlib leaves out."""
    found = [(row["step"], math.nan if row[metric] is None else row[metric]) for row in rows if metric in row]
    steps, values = np.array(found, np.float64).reshape(-1, 2).T
    return steps, values


def window_of(count: int) -> int:
    """How many of `count` values a running mean takes: an odd number, 1 where there are too few to smooth."""
    return 2 * (count // SMOOTHED // 2) + 1 if count >= 2 * SMOOTHED else 1


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of `window` values around each; near the start of fewer, as many on either side.

    The first value stays, and so does every straight line: a curve does not begin late or elsewhere. The last half window is
    NaN, as there is nothing to average with. A NaN among the values is left out of the means.
    """
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    place = np.arange(len(values))
    half = np.minimum(window // 2, place)
    first, last = place - half, np.minimum(place + half + 1, len(values))
    number = counts[last] - counts[first]
    means = (sums[last] - sums[first]) / np.maximum(number, 1)
    return np.where((number > 0) & (place + window // 2 < len(values)), means, np.nan)
