"""Preference losses: from log-probabilities of pairs to one loss per pair.

All take `logps` and `ref_logps`, float[P, 2]: log pi(y|x) and log pi_ref(y|x), natural logarithm, summed over the completion's
tokens, chosen first. All return `(losses[P], rewards[P, 2])`; the rewards are the implicit rewards of Rafailov et al. 2023
(arXiv 2305.18290), eq. 5, up to the prompt's partition function, and carry no gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

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


def implicit_rewards(logps: Array, ref_logps: Array, *, beta: float) -> jax.Array:
    """`beta * log(pi / pi_ref)` for each completion: float[P, 2], without gradient (eq. 5)."""
    return jax.lax.stop_gradient(beta * (jnp.asarray(logps) - ref_logps))


def _margins(logps: Array, ref_logps: Array) -> jax.Array:
    """How much more than the reference the policy prefers the chosen completion: float[P], in nats."""
    log_ratios = jnp.asarray(logps) - ref_logps
    return log_ratios[:, 0] - log_ratios[:, 1]
