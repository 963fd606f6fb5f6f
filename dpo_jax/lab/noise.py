"""Label noise: flipped preferences, and what they do to DPO, conservative DPO, robust DPO and IPO in theory.

Two completions of one prompt differ by r in their true rewards, and the first is preferred with the chance sigmoid(r) (eq. 1).
When a share e of the labels is flipped, that chance becomes

    p_e(r) = (1 - e) sigmoid(r) + e sigmoid(-r) = (1 - 2 e) sigmoid(r) + e.

A loss sees the pair through m = beta (u_1 - u_2), where u = log(pi / pi_ref). Let l(m) = -log sigmoid(m), and a the rate that a
method assumes. The expected loss of the pair, and the m that minimises it, the difference of rewards that the policy implies:

    DPO            p_e l(m) + (1 - p_e) l(-m), whose slope in m is sigmoid(m) - p_e.         m = logit p_e(r)
    conservative   A label counts as 1 - a of one and a of its opposite. That is DPO
                   with c = e + a - 2 e a: it adds a to the noise.                           m = logit p_c(r)
    robust         A label counts as (1 - a) / (1 - 2 a) of one and -a / (1 - 2 a) of its
                   opposite. That is DPO with c = (e - a) / (1 - 2 a): none where a = e.     m = logit p_c(r), or r
    IPO            p_e (m / beta - 1 / (2 beta))^2 + (1 - p_e) (m / beta + 1 / (2 beta))^2.  m = (1 - 2 e) tanh(r / 2) / 2

So flips bound the rewards that DPO implies: they stay within logit(1 - e), 2.2 points where e = 0.1. Those of IPO shrink by one
factor, as if beta were beta / (1 - 2 e): its policies at equal KL are the same at every rate. All of this is about the expected
loss: in a sample, flips also make the estimates scatter, and robust DPO scatters most, by about 1 / (1 - 2 e).

With more than two completions the differences m are those of one score per completion, s = beta u. logit p_e is no such
difference, so `implied_scores` minimises the mean over all pairs. The policy is then pi_ref exp(s / beta) / Z, as in eq. 4.
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
    """Which of so many pairs are flipped: bool[pairs], True for the nearest whole number to `rate * pairs` of them.

    With one `seed`, those of a lower rate are among those of a higher one.

    >>> [int(flips(10, rate, seed=0).sum()) for rate in (0.0, 0.2, 0.3)]
    [0, 2, 3]
    """
    if not 0 <= rate < 0.5:
        raise ValueError(f"rate={rate}: a share of flipped labels in [0, 0.5) is expected")
    found = np.zeros(pairs, bool)
    found[np.random.default_rng(seed).permutation(pairs)[: round(rate * pairs)]] = True
    return found


def flipped(data: PairData, rate: float, *, seed: int) -> tuple[PairData, int]:
    """`data` with a share of its labels flipped, and how many those are. Shapes stay, so compiled steps serve both."""
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
    """p_e(r), the chance that a label prefers the first of two completions, whose true rewards differ by `r`."""
    return (1 - 2 * rate) * _sigmoid(np.asarray(r, np.float64)) + rate


def implied_margin(method: str, r: Array | float, *, rate: float, assumed: float | None = None) -> np.ndarray:
    """beta (u_1 - u_2) of the policy of least expected loss, for two completions whose true rewards differ by `r`: float64.

    `rate` is the share of flipped labels, `assumed` what conservative and robust DPO take it for (default: the truth). Raises
    ValueError for another method, and where robust DPO has no minimiser: it assumed more flips than the labels can hold.

    >>> [float(implied_margin(method, 4.0, rate=0.2).round(2)) for method in METHODS]
    [1.32, 0.72, 4.0, 0.29]
    """
    if method == "ipo":
        return (1 - 2 * rate) * np.tanh(np.asarray(r, np.float64) / 2) / 2
    net = net_rate(method, rate=rate, assumed=assumed)
    if net == 0:  # also where the chance rounds to 1
        return np.asarray(r, np.float64)
    chance = flipped_chance(r, net)
    if not ((chance > 0) & (chance < 1)).all():
        raise ValueError(
            f"{method} has no minimum: it assumes {assumed:.0%} of flips, and of some pairs fewer labels contradict the reward"
        )
    return np.log(chance) - np.log1p(-chance)


def net_rate(method: str, *, rate: float, assumed: float | None = None) -> float:
    """The share of flips at which DPO implies the same rewards; below 0 where robust DPO assumes too many."""
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

    Pairs of equal rewards are in no data. Scores have mean 0: the policy is unchanged by a constant.

    >>> implied_scores("robust", [0.0, 1.0, 5.0], rate=0.3).round(6)
    array([-2., -1.,  3.])
    """
    values, of, counts = np.unique(np.asarray(rewards, np.float64), return_inverse=True, return_counts=True)
    margins = implied_margin(method, values[:, None] - values[None, :], rate=rate, assumed=assumed)
    if method == "ipo":  # least squares over a complete graph: the mean of each one's margins
        return (margins @ counts / counts.sum())[of]
    mean = values @ counts / counts.sum()
    scores = implied_margin(method, values - mean, rate=rate, assumed=assumed)
    weights = np.outer(counts, counts) * (1.0 - np.eye(len(values))) / counts.sum() ** 2
    wanted = _sigmoid(margins)
    for _ in range(NEWTON_STEPS):
        found = _sigmoid(scores[:, None] - scores[None, :])
        slope = (weights * (found - wanted)).sum(axis=1)
        curvature = weights * found * (1 - found)
        # The loss does not change with the mean, which the last term holds still.
        hessian = np.diag(curvature.sum(axis=1)) - curvature + curvature.sum() / len(values) ** 2 + 1e-300
        step = np.linalg.lstsq(hessian, slope, rcond=None)[0]
        step *= min(1.0, 1.0 / max(np.abs(step).max(), 1e-300))
        scores = scores - step
        if np.abs(step).max() < 1e-10:
            break
    return (scores - scores @ counts / counts.sum())[of]


def predicted_curve(
    method: str, rewards: Array, betas: Sequence[float] | Array, *, rate: float, assumed: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(KL in nats, mean true reward) of the policy of least expected loss at each beta: float64[B] each.

    `rewards[P, M]` are the true ones of M completions by the reference of each of P prompts, which stand for all completions:
    the curve can be trusted as far as that of `evals.frontier.optimum` on them, about log M nats.
    """
    rewards = np.asarray(rewards, np.float64)
    scores = np.stack([implied_scores(method, row, rate=rate, assumed=assumed) for row in rewards])
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
