"""The Plackett-Luce loss, DPO on rankings of K completions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.inputs import arrays_of, check_beta, column, implicit_rewards
from dpo_jax.types import Array


def plackett_luce_loss(logps: Array, ref_logps: Array, *, beta: float | Array) -> tuple[jax.Array, jax.Array]:
    """DPO on rankings: the negative log-likelihood of float[P, K], best first, under Plackett-Luce (appendix A.3, eq. 20).

    Each completion in turn is the first choice among those not yet placed. K = 2 equals `dpo_loss` bit for bit. Returns
    `(losses float[P], rewards float[P, K])`.

    >>> losses, _ = plackett_luce_loss(np.zeros((1, 3)), np.zeros((1, 3)), beta=0.1)
    >>> print(f"{losses[0]:.4f} {np.log(6):.4f}")  # six orders of three, all as likely
    1.7918 1.7918
    """
    logps, ref_logps = arrays_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    log_ratios = logps - ref_logps
    completions = log_ratios.shape[1]
    if completions < 2:
        raise ValueError(f"a ranking has at least two completions, got {completions}")
    losses = []
    for k in range(completions - 1):
        rest = jax.nn.logsumexp(column(beta) * (log_ratios[:, k + 1 :] - log_ratios[:, k, None]), axis=1)
        # log(1 + exp(rest)) is -log(exp(r_k) / sum_{j >= k} exp(r_j)), and stays accurate where the choice is near certain.
        losses.append(jax.nn.softplus(rest))
    return jnp.stack(losses).sum(axis=0), implicit_rewards(logps, ref_logps, beta=beta)
