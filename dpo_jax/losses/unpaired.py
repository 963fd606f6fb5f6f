"""Losses of single completions that are desirable or undesirable: no pair is compared.

An example has two columns: its completion, and a *mismatched* one, which answers another prompt (`data.unpaired`). KTO
estimates from the mismatched ones, which carry no gradient, how far the policy as a whole is from the reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses.inputs import check_beta, check_option, implicit_rewards, pairs_of
from dpo_jax.types import Array

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
    mismatched one. `desirable` float[P] is 1 or 0, `weight` float[P] is 0 for fillers. Returns `(losses float[P], rewards
    float[P, 2])`. TRL's `kto`.

    >>> logps, ref_logps = np.array([[-12.0, -9.0], [-15.0, -8.0]]), np.array([[-14.0, -9.0], [-13.0, -10.0]])
    >>> losses, _ = kto_loss(logps, ref_logps, desirable=np.array([1.0, 0]), weight=np.ones(2), beta=0.5)
    >>> print(f"{losses[0]:.4f} {losses[1]:.4f}")  # u are 2 and -2, z0 is 1: 1 - sigmoid(0.5), 1 - sigmoid(1.5)
    0.3775 0.1824
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta, real = check_beta(beta, logps), jnp.asarray(weight)
    mismatched = jax.lax.stop_gradient(logps[:, 1] - ref_logps[:, 1])
    z0 = jnp.maximum((mismatched * real).sum() / jnp.maximum(real.sum(), 1), 0)
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
    """Anchored preference optimization, zero, of single completions: KTO with z0 = 0 (arXiv 2408.06266, eq. 7).

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
    """1 - sigmoid(x) is sigmoid(-x), which keeps its digits."""
    sign = 2 * jnp.asarray(desirable, logps.dtype) - 1
    return jax.nn.sigmoid(-sign * beta * (logps[:, 0] - ref_logps[:, 0] - z0))


def _weights(desirable: Array, of_desirable: float | Array, of_undesirable: float | Array, logps: jax.Array) -> jax.Array:
    if np.shape(desirable) != logps.shape[:1]:
        raise ValueError(f"desirable has shape {np.shape(desirable)}; one value for each of {len(logps)} examples is expected")
    for name, value in (("desirable_weight", of_desirable), ("undesirable_weight", of_undesirable)):
        check_option(name, value, logps, lambda x: (x >= 0) & np.isfinite(x), "a finite number that is not negative")
    return jnp.where(jnp.asarray(desirable) > 0, of_desirable, of_undesirable)
