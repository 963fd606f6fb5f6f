"""Losses of single completions labeled desirable or undesirable (KTO), instead of pairs.

An example has two columns: its completion, and a *mismatched* one, which answers another prompt (`data.unpaired`). From the
mismatched ones, which carry no gradient, KTO estimates the KL between policy and reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses.inputs import check_beta, check_option, implicit_rewards, label_accuracy, pairs_of
from dpo_jax.types import Array, Metrics

Result = tuple[jax.Array, jax.Array]


def kto_loss(
    logps: Array,
    ref_logps: Array,
    *,
    desirable: Array,
    weight: Array,
    beta: float | Array,
    desirable_weight: float | Array = 1.0,
    undesirable_weight: float | Array = 1.0,
) -> Result:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7): `w (1 - sigmoid(±beta (u - z0)))`.

    u = log pi / pi_ref of the completion, + for desirable ones and - for undesirable ones. z0 = max(0, mean of the mismatched
    log pi / pi_ref) over the batch, without gradient. `logps` and `ref_logps` are float[P, 2] in nats: the completion, and the
    mismatched one. `desirable` float[P] is 1 or 0, `weight` float[P] is 0 for padding examples. Returns `(losses float[P],
    rewards float[P, 2])`. TRL's `kto`.

    >>> logps, ref_logps = np.array([[-12.0, -9.0], [-15.0, -8.0]]), np.array([[-14.0, -9.0], [-13.0, -10.0]])
    >>> losses, _ = kto_loss(logps, ref_logps, desirable=np.array([1.0, 0]), weight=np.ones(2), beta=0.5)
    >>> print(f"{losses[0]:.4f} {losses[1]:.4f}")  # u are 2 and -2, z0 is 1: 1 - sigmoid(0.5), 1 - sigmoid(1.5)
    0.3775 0.1824
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta, real = check_beta(beta, logps), jnp.asarray(weight)
    mismatched = jax.lax.stop_gradient(logps[:, 1] - ref_logps[:, 1])
    total = real.sum()
    z0 = jnp.where(total > 0, jnp.maximum((mismatched * real).sum() / jnp.where(total > 0, total, 1), 0), 0.0)
    weights = _weights(desirable, desirable_weight, undesirable_weight, logps)
    return _value_loss(logps, ref_logps, desirable, z0, beta) * weights, implicit_rewards(logps, ref_logps, beta=beta)


def apo_zero_unpaired_loss(
    logps: Array,
    ref_logps: Array,
    *,
    desirable: Array,
    beta: float | Array,
    desirable_weight: float | Array = 1.0,
    undesirable_weight: float | Array = 1.0,
) -> Result:
    """Anchored preference optimization, zero, for single completions: KTO with z0 = 0 (arXiv 2408.06266, eq. 7).

    Arguments and results are those of `kto_loss`; the mismatched completions are not read. TRL's `apo_zero_unpaired`.

    >>> losses, _ = apo_zero_unpaired_loss(np.array([[-12.0, 0]]), np.array([[-14.0, 0]]), desirable=np.ones(1), beta=0.5)
    >>> print(f"{losses[0]:.4f}")  # 1 - sigmoid(1)
    0.2689
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    weights = _weights(desirable, desirable_weight, undesirable_weight, logps)
    return _value_loss(logps, ref_logps, desirable, 0.0, beta) * weights, implicit_rewards(logps, ref_logps, beta=beta)


def _value_loss(
    logps: jax.Array, ref_logps: jax.Array, desirable: Array, z0: float | jax.Array, beta: float | Array
) -> jax.Array:
    """1 - sigmoid(x), computed as sigmoid(-x), which is more accurate."""
    sign = 2 * jnp.asarray(desirable, logps.dtype) - 1
    return jax.nn.sigmoid(-sign * beta * (logps[:, 0] - ref_logps[:, 0] - z0))


def _weights(desirable: Array, of_desirable: float | Array, of_undesirable: float | Array, logps: jax.Array) -> jax.Array:
    if np.shape(desirable) != logps.shape[:1]:
        raise ValueError(f"desirable has shape {np.shape(desirable)}; one value for each of {len(logps)} examples is expected")
    for name, value in (("desirable_weight", of_desirable), ("undesirable_weight", of_undesirable)):
        check_option(name, value, logps, lambda x: (x >= 0) & np.isfinite(x), "a finite number that is not negative")
    return jnp.where(jnp.asarray(desirable) > 0, of_desirable, of_undesirable)


def unpaired_metrics(logps: jax.Array, ref_logps: Array, *, rewards: jax.Array, desirable: Array, share: Array) -> Metrics:
    """Metrics of single completions, {name: float[P]}, named as in `preference_metrics`: chosen means desirable.

    Values are scaled so that their mean over the batch is the mean over the desirable (chosen) or undesirable (rejected)
    completions, or 0 if the batch has none. An example counts as right if it is desirable and its reward is above 0, or
    undesirable and below. `kl` is the log-ratio of the mismatched completions: KTO's z0 is its mean, or 0 if that is negative.
    Arrays are float[P, 2] as in `kto_loss`, `desirable` is float[P], and `share`, its mean over the global batch, float[].

    >>> logps, ref_logps = jnp.array([[-12.0, -9.0], [-15.0, -8.0]]), jnp.array([[-14.0, -9.0], [-13.0, -10.0]])
    >>> labels = {"desirable": jnp.array([1.0, 0]), "share": jnp.float32(0.5)}
    >>> found = unpaired_metrics(logps, ref_logps, rewards=logps - ref_logps, **labels)
    >>> print({name: float(found[name].mean()) for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "kl")})
    {'rewards/chosen': 2.0, 'rewards/rejected': -2.0, 'rewards/accuracies': 1.0, 'kl': 1.0}
    """
    of_chosen = jnp.where(share > 0, desirable / jnp.where(share > 0, share, 1), 0)
    of_rejected = jnp.where(share < 1, (1 - desirable) / jnp.where(share < 1, 1 - share, 1), 0)
    log_ratios, reward = logps - ref_logps, rewards[:, 0]
    return {
        "rewards/chosen": reward * of_chosen,
        "rewards/rejected": reward * of_rejected,
        "rewards/margins": reward * (of_chosen - of_rejected),
        "rewards/accuracies": label_accuracy(logps, ref_logps, desirable),
        "logps/chosen": logps[:, 0] * of_chosen,
        "logps/rejected": logps[:, 0] * of_rejected,
        "displacement/chosen": log_ratios[:, 0] * of_chosen,
        "displacement/rejected": log_ratios[:, 0] * of_rejected,
        "kl_reference_policy": -log_ratios[:, 0],
        "kl": log_ratios[:, 1],
    }
