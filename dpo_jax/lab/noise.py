"""Label noise: flipped preferences, and their effect on DPO, conservative DPO, robust DPO and IPO in theory.

Two completions of one prompt differ by r in their true rewards, and the first is preferred with probability sigmoid(r) (eq. 1).
When a share e of the labels is flipped, that probability becomes

    p_e(r) = (1 - e) sigmoid(r) + e sigmoid(-r) = (1 - 2 e) sigmoid(r) + e.

A loss depends on the pair through m = beta (u_1 - u_2), where u = log(pi / pi_ref). Let l(m) = -log sigmoid(m), and a the flip
rate that a method assumes. The expected loss of the pair, and its minimizer m, which is the policy's implied difference of
rewards:

    DPO            p_e l(m) + (1 - p_e) l(-m), whose slope in m is sigmoid(m) - p_e.         m = logit p_e(r)
    conservative   A label counts as 1 - a of one and a of its opposite. That is DPO
                   with c = e + a - 2 e a: it adds a to the noise.                           m = logit p_c(r)
    robust         A label counts as (1 - a) / (1 - 2 a) of one and -a / (1 - 2 a) of its
                   opposite. That is DPO with c = (e - a) / (1 - 2 a): none where a = e.     m = logit p_c(r), or r
    IPO            p_e (m / beta - 1 / (2 beta))^2 + (1 - p_e) (m / beta + 1 / (2 beta))^2.  m = (1 - 2 e) tanh(r / 2) / 2

Flips therefore bound the rewards that DPO implies to logit(1 - e), 2.2 points where e = 0.1. Those of IPO shrink by a constant
factor, as if beta were beta / (1 - 2 e): its policies at equal KL are the same at every rate. All of this holds for the
expected loss. In a sample, flips also add variance, most for robust DPO, by about 1 / (1 - 2 e).

With more than two completions the differences m come from one score per completion, s = beta u. logit p_e is not such a
difference, so `implied_scores` minimizes the mean over all pairs. The policy is then pi_ref exp(s / beta) / Z, as in eq. 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpo_jax.lab.methods import PairData
from dpo_jax.types import Array

METHODS = ("dpo", "cdpo", "robust", "ipo")
NEWTON_STEPS = 200


def flips(pairs: int, rate: float, *, seed: int) -> np.ndarray:
    """Mask of flipped pairs: bool[pairs], True for `rate * pairs` of them, rounded to the nearest whole number.

    With the same `seed`, the flips of a lower rate are a subset of those of a higher one.

    >>> [int(flips(10, rate, seed=0).sum()) for rate in (0.0, 0.2, 0.3)]
    [0, 2, 3]
    """
    if not 0 <= rate < 0.5:
        raise ValueError(f"rate={rate}: a share of flipped labels in [0, 0.5) is expected")
    found = np.zeros(pairs, bool)
    found[np.random.default_rng(seed).permutation(pairs)[: round(rate * pairs)]] = True
    return found


def flipped(data: PairData, rate: float, *, seed: int) -> tuple[PairData, int]:
    """`data` with a share of its labels flipped, and the number of flips. Shapes do not change, so compiled steps fit both."""
    chosen = flips(sum(len(group.pairs) for group in data.groups), rate, seed=seed)
    groups, ref_logps, done = [], data.ref_logps.copy(), 0
    for number, group in enumerate(data.groups):
        mine = chosen[done : done + len(group.pairs)]
        done += len(mine)
        turned = np.where(mine[:, None], group.pairs[:, ::-1], group.pairs)
        ref_logps[number, : len(mine)] = np.where(
            mine[:, None], ref_logps[number, : len(mine), ::-1], ref_logps[number, : len(mine)]
        )
        groups.append(dataclasses.replace(group, pairs=turned))
    return data._replace(groups=groups, ref_logps=ref_logps), int(chosen.sum())


def flipped_chance(r: Array | float, rate: float) -> np.ndarray:
    """p_e(r), the probability that a label prefers the first of two completions whose true rewards differ by `r`."""
    return (1 - 2 * rate) * _sigmoid(np.asarray(r, np.float64)) + rate


def implied_margin(method: str, r: Array | float, *, rate: float, assumed: float | None = None) -> np.ndarray:
    """beta (u_1 - u_2) of the policy of least expected loss, for two completions whose true rewards differ by `r`: float64.

    `rate` is the share of flipped labels, `assumed` the rate that conservative and robust DPO assume (default: the true one).
    Raises ValueError for another method, and where robust DPO has no minimizer because it assumes more flips than there can be.

    >>> [float(implied_margin(method, 4.0, rate=0.2).round(2)) for method in METHODS]
    [1.32, 0.72, 4.0, 0.29]
    """
    if method == "ipo":
        return (1 - 2 * rate) * np.tanh(np.asarray(r, np.float64) / 2) / 2
    net = net_rate(method, rate=rate, assumed=assumed)
    if net == 0:  # exact even where the probability rounds to 1
        return np.asarray(r, np.float64)
    chance = flipped_chance(r, net)
    if not ((chance > 0) & (chance < 1)).all():
        raise ValueError(
            f"{method} has no minimum: it assumes {assumed:.0%} of flips, and of some pairs fewer labels contradict the reward"
        )
    return np.log(chance) - np.log1p(-chance)


def net_rate(method: str, *, rate: float, assumed: float | None = None) -> float:
    """The flip rate at which DPO implies the same rewards; below 0 where robust DPO assumes too high a rate."""
    assumed = rate if assumed is None else assumed
    match method:
        case "dpo":
            return rate
        case "cdpo":
            return rate + assumed - 2 * rate * assumed
        case "robust":
            return (rate - assumed) / (1 - 2 * assumed)
    raise ValueError(f"method={method!r}: one of {', '.join(METHODS)} is expected")


def implied_scores(method: str, rewards: Array, *, rate: float, assumed: float | None = None) -> np.ndarray:
    """beta u of the policy of least expected loss over all pairs of completions with these true `rewards[M]`: float64[M].

    Pairs of equal rewards are left out. Scores are centered to mean 0: a constant does not change the policy.

    >>> implied_scores("robust", [0.0, 1.0, 5.0], rate=0.3).round(6)
    array([-2., -1.,  3.])
    """
    values, of, counts = np.unique(np.asarray(rewards, np.float64), return_inverse=True, return_counts=True)
    margins = implied_margin(method, values[:, None] - values[None, :], rate=rate, assumed=assumed)
    if method == "ipo":  # least squares over a complete graph: the mean margin of each completion
        return (margins @ counts / counts.sum())[of]
    mean = values @ counts / counts.sum()
    scores = implied_margin(method, values - mean, rate=rate, assumed=assumed)
    weights = np.outer(counts, counts) * (1.0 - np.eye(len(values))) / counts.sum() ** 2
    wanted = _sigmoid(margins)
    for _ in range(NEWTON_STEPS):
        found = _sigmoid(scores[:, None] - scores[None, :])
        slope = (weights * (found - wanted)).sum(axis=1)
        curvature = weights * found * (1 - found)
        # The loss does not depend on the mean of the scores; the last term keeps it fixed.
        hessian = np.diag(curvature.sum(axis=1)) - curvature + curvature.sum() / len(values) ** 2 + 1e-300
        step = np.linalg.lstsq(hessian, slope, rcond=None)[0]
        step *= min(1.0, 1.0 / max(np.abs(step).max(), 1e-300))
        scores = scores - step
        if np.abs(step).max() < 1e-10:
            break
    return (scores - scores @ counts / counts.sum())[of]


def predicted_curve(
    method: str, rewards: Array, betas: Sequence[float] | Array, *, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """(KL in nats, mean true reward) of the policy of least expected loss at each beta: float64[B] each.

    `rewards[P, M]` are the true rewards of M completions, drawn from the reference, of each of P prompts. The curve can be
    trusted as far as that of `evals.frontier.optimum` on the same completions, about log M nats.
    """
    rewards = np.asarray(rewards, np.float64)
    scores = np.stack([implied_scores(method, row, rate=rate) for row in rewards])
    kls, means = [], []
    for beta in betas:
        exponents = scores / beta
        exponents -= exponents.max(axis=1, keepdims=True)
        weights = np.exp(exponents)
        weights /= weights.sum(axis=1, keepdims=True)
        kl = (weights * np.log(np.maximum(weights, 1e-300) * rewards.shape[1])).sum(axis=1)
        kls.append(kl.mean())
        means.append((weights * rewards).sum(axis=1).mean())
    return np.array(kls), np.array(means)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2
