"""Preference losses: from log-probabilities of pairs, or of rankings, to one loss each.

All take `logps` and `ref_logps`, float[P, 2]: log pi(y|x) and log pi_ref(y|x), natural logarithm, summed over the completion's
tokens, chosen first; `plackett_luce_loss` takes rankings, float[P, K], best first. All return `(losses[P], rewards[P, K])`; the
rewards are the implicit rewards of Rafailov et al. 2023 (arXiv 2305.18290), eq. 5, up to the prompt's partition function, and
carry no gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.types import Array


def dpo_loss(
    logps: Array, ref_logps: Array, *, beta: float, label_smoothing: float = 0.0, reference_free: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Direct Preference Optimization: `-log sigmoid(beta * margin)` (Rafailov et al. 2023, eq. 7).

    `beta` weighs the KL constraint: the smaller, the further the policy may leave the reference. `label_smoothing` in [0, 0.5)
    is the assumed share of flipped labels (conservative DPO, Mitchell 2023); `reference_free` replaces the reference by the
    uniform distribution in the loss, while rewards are still measured against the real one, as the original does.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: a share of flipped labels lies in [0, 0.5)")
    margins = beta * _margins(logps, jnp.zeros_like(ref_logps) if reference_free else ref_logps)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margins) - label_smoothing * jax.nn.log_sigmoid(-margins)
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def ipo_loss(logps: Array, ref_logps: Array, *, beta: float) -> tuple[jax.Array, jax.Array]:
    """Identity Preference Optimization: `(margin - 1 / (2 beta))^2` (Azar et al. 2023, arXiv 2310.12036, eq. 17; tau = beta).

    On summed log-probabilities, as the original implementation has it; other libraries divide by the completion's length.
    """
    losses = (_margins(logps, ref_logps) - 1 / (2 * beta)) ** 2
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def unlikelihood_loss(logps: Array, ref_logps: Array, *, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Unlikelihood training: `-log pi(y_w) + alpha * log pi(y_l)` (section 6 and appendix D.3; Welleck et al. 2019).

    `alpha` in [0, 1] weighs the second term; with 0 the loss is the paper's Preferred-FT. Nothing holds the policy to its
    reference: the loss has no lower bound once a completion is rejected more than 1 / alpha times as often as it is chosen.
    There is no beta either, and the rewards are `log(pi / pi_ref)` in nats.
    """
    if not isinstance(alpha, jax.Array) and not 0.0 <= alpha <= 1.0:  # one that is data of a program cannot be asked
        raise ValueError(f"alpha={alpha}: the weight of the rejected completion lies in [0, 1]")
    logps = _of_pairs(logps)
    return -logps[:, 0] + alpha * logps[:, 1], implicit_rewards(logps, ref_logps, beta=1.0)


def plackett_luce_loss(logps: Array, ref_logps: Array, *, beta: float) -> tuple[jax.Array, jax.Array]:
    """DPO on rankings: the negative log-likelihood of float[P, K], best first, under Plackett-Luce (appendix A.3, eq. 20).

    In turn each completion is the first choice among those not placed yet. K = 2 is `dpo_loss`, bit for bit.
    """
    log_ratios = jnp.asarray(logps) - ref_logps
    completions = log_ratios.shape[1]
    if completions < 2:
        raise ValueError(f"a ranking has at least two completions, got {completions}")
    losses = []
    for k in range(completions - 1):
        rest = jax.nn.logsumexp(beta * (log_ratios[:, k + 1 :] - log_ratios[:, k, None]), axis=1)
        # log(1 + exp(rest)) is -log(exp(r_k) / sum_{j >= k} exp(r_j)), and keeps its digits where the choice is near certain.
        losses.append(jax.nn.softplus(rest))
    return jnp.stack(losses).sum(axis=0), implicit_rewards(logps, ref_logps, beta=beta)


def implicit_rewards(logps: Array, ref_logps: Array, *, beta: float) -> jax.Array:
    """`beta * log(pi / pi_ref)` for each completion: float[P, K], without gradient (eq. 5)."""
    return jax.lax.stop_gradient(beta * (jnp.asarray(logps) - ref_logps))


def right(rewards: Array, logps: Array, ref_logps: Array) -> Any:
    """1 where the chosen completion has the higher reward, 0 where it has the lower one, 1/2 in a tie: float[P].

    Of `[P, K]` the first and the last column are compared. A tie is also where the four log-probabilities differ by no more
    than their rounding. So a policy that still is its reference has accuracy 1/2, also where the cached log-probabilities come
    from rows of another shape; computed in bfloat16 they may differ by more, and then the side is chance. numpy or JAX.
    """
    margins, ratios = rewards[:, 0] - rewards[:, -1], logps - ref_logps
    rounding = 2 * float(np.finfo(ratios.dtype).eps) * sum(abs(x[:, 0]) + abs(x[:, -1]) for x in (logps, ref_logps))
    tie = ((abs(ratios[:, 0] - ratios[:, -1]) <= rounding) | (margins == 0)).astype(margins.dtype)
    return (1 - tie) * (margins > 0).astype(margins.dtype) + tie / 2


def _margins(logps: Array, ref_logps: Array) -> jax.Array:
    """How much more than the reference the policy prefers the chosen completion: float[P], in nats."""
    log_ratios = _of_pairs(logps) - ref_logps
    return log_ratios[:, 0] - log_ratios[:, 1]


def _of_pairs(logps: Array) -> jax.Array:
    if logps.shape[1] != 2:
        raise ValueError(f"this loss is for pairs, and each example has {logps.shape[1]} completions: use plackett_luce_loss")
    return jnp.asarray(logps)
