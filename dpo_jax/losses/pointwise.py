"""Pointwise losses: they depend on each completion's log-ratio `u = log(pi / pi_ref)`, not only on the margin."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.inputs import check_beta, implicit_rewards, pairs_of
from dpo_jax.types import Array

Result = tuple[jax.Array, jax.Array]


def nca_pair_loss(logps: Array, ref_logps: Array, *, beta: float | Array) -> Result:
    """Noise contrastive alignment of a pair (Chen et al. 2024, arXiv 2402.05369, eq. 11).

    With r = beta * u: `-log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2`. `logps` and `ref_logps` are
    float[P, 2], nats, chosen first; returns `(losses float[P], rewards float[P, 2])`.

    >>> losses, _ = nca_pair_loss(np.zeros((1, 2)), np.zeros((1, 2)), beta=0.1)
    >>> print(f"{losses[0]:.4f}")  # 2 log(2)
    1.3863
    """
    ratios, beta = _ratios(logps, ref_logps, beta)
    chosen, rejected = beta * ratios[:, 0], beta * ratios[:, 1]
    losses = -jax.nn.log_sigmoid(chosen) - (jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)) / 2
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def bco_pair_loss(logps: Array, ref_logps: Array, *, beta: float | Array) -> Result:
    """Binary classifier optimization of a pair: `-log sigmoid(r_w) - log sigmoid(-r_l)`, r = beta * u.

    Jung et al. 2024, arXiv 2404.04656. The paper shifts both rewards by a running mean; like TRL's `bco_pair`, this loss leaves
    the shift out. `logps` and `ref_logps` are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> losses, _ = bco_pair_loss(np.zeros((1, 2)), np.zeros((1, 2)), beta=0.1)
    >>> print(f"{losses[0]:.4f}")  # 2 log(2)
    1.3863
    """
    ratios, beta = _ratios(logps, ref_logps, beta)
    losses = -jax.nn.log_sigmoid(beta * ratios[:, 0]) - jax.nn.log_sigmoid(-beta * ratios[:, 1])
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def sppo_hard_loss(logps: Array, ref_logps: Array, *, beta: float | Array) -> Result:
    """Self-play preference optimization with hard labels: `(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2`.

    Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with win probabilities of 1 and 0; the paper estimates them with a preference
    model. `logps` and `ref_logps` are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> losses, _ = sppo_hard_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), beta=0.1)
    >>> print(losses)  # 5 and -5 are wanted, and found are 2 and -2
    [18.]
    """
    ratios, beta = _ratios(logps, ref_logps, beta)
    losses = (ratios[:, 0] - 0.5 / beta) ** 2 + (ratios[:, 1] + 0.5 / beta) ** 2
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def apo_zero_loss(logps: Array, ref_logps: Array, *, beta: float | Array) -> Result:
    """Anchored preference optimization, zero: `1 - sigmoid(r_w) + sigmoid(r_l)`, r = beta * u (arXiv 2408.06266, eq. 7).

    D'Oosterlinck et al. 2024: for chosen completions that are better than the model's own. `logps` and `ref_logps` are
    float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> losses, _ = apo_zero_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), beta=0.5)
    >>> print(f"{losses[0]:.4f}")  # 2 sigmoid(-1)
    0.5379
    """
    ratios, beta = _ratios(logps, ref_logps, beta)
    losses = jax.nn.sigmoid(-beta * ratios[:, 0]) + jax.nn.sigmoid(beta * ratios[:, 1])
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def apo_down_loss(logps: Array, ref_logps: Array, *, beta: float | Array) -> Result:
    """Anchored preference optimization, down: `sigmoid(r_w) + 1 - sigmoid(r_w - r_l)`, r = beta * u (arXiv 2408.06266, eq. 8).

    For chosen completions that are worse than the model's own: both become less likely, the rejected one more so.
    `logps` and `ref_logps` are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> losses, _ = apo_down_loss(np.zeros((1, 2)), np.zeros((1, 2)), beta=0.1)
    >>> print(losses)
    [1.]
    """
    ratios, beta = _ratios(logps, ref_logps, beta)
    losses = jax.nn.sigmoid(beta * ratios[:, 0]) + jax.nn.sigmoid(-beta * (ratios[:, 0] - ratios[:, 1]))
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def _ratios(logps: Array, ref_logps: Array, beta: float | Array) -> tuple[jax.Array, float | Array]:
    logps, ref_logps = pairs_of(logps, ref_logps)
    return jnp.subtract(logps, ref_logps), check_beta(beta, logps)
