"""Alignment via optimal transport (AOT): losses that sort all pairs of a batch, except padding examples (`weight` 0)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.inputs import check_beta, check_smoothing, implicit_rewards, pairs_of
from dpo_jax.losses.margin import log_loss
from dpo_jax.types import Array

Result = tuple[jax.Array, jax.Array]


def aot_loss(
    logps: Array, ref_logps: Array, *, weight: Array, beta: float | Array, label_smoothing: float | Array = 0.0
) -> Result:
    """Alignment via optimal transport, paired (Melnyk et al. 2024, arXiv 2406.05882): compares quantiles of the margins.

    The margins `log pi(y_w) - log pi(y_l)` of all pairs are sorted, for the policy and for the reference. The k-th smallest of
    each give one term `-log sigmoid(beta * difference)`. `logps` and `ref_logps` are float[P, 2], `weight` float[P] is 0 for
    padding examples. Returns `(losses float[P], rewards float[P, 2])`; a term has the index of the policy's pair. TRL's `aot`.

    >>> losses, _ = aot_loss(np.array([[1.0, 0], [4, 0]]), np.array([[2.0, 0], [0, 0]]), weight=np.ones(2), beta=1.0)
    >>> print(f"{losses[0]:.4f} {losses[1]:.4f}")  # -log sigmoid(1 - 0), -log sigmoid(4 - 2)
    0.3133 0.1269
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta, share = check_beta(beta, logps), check_smoothing(label_smoothing, logps)
    losses = _quantile_loss(logps[:, 0] - logps[:, 1], ref_logps[:, 0] - ref_logps[:, 1], weight, beta, share)
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def aot_unpaired_loss(
    logps: Array, ref_logps: Array, *, weight: Array, beta: float | Array, label_smoothing: float | Array = 0.0
) -> Result:
    """Alignment via optimal transport, unpaired: quantiles of the chosen log-ratios against those of the rejected ones.

    Melnyk et al. 2024, arXiv 2406.05882. Like `aot_loss`, for `log(pi / pi_ref)` of the chosen and of the rejected completions,
    each sorted separately. Returns `(losses float[P], rewards float[P, 2])`; a term has the index of the chosen one's pair.

    >>> losses, _ = aot_unpaired_loss(np.array([[1.0, 0], [0, 1]]), np.zeros((2, 2)), weight=np.ones(2), beta=1.0)
    >>> print(losses)  # both have the log-ratios 0 and 1
    [0.6931472 0.6931472]
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta, share = check_beta(beta, logps), check_smoothing(label_smoothing, logps)
    ratios = logps - ref_logps
    losses = _quantile_loss(ratios[:, 0], ratios[:, 1], weight, beta, share)
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def _quantile_loss(
    upper: jax.Array, lower: jax.Array, weight: Array, beta: float | Array, label_smoothing: float | Array
) -> jax.Array:
    """Log loss of the k-th smallest of `upper` against that of `lower`, at the index of the former. Padding sorts last."""
    real = jnp.asarray(weight) > 0
    places, others = (jnp.argsort(jnp.where(real, x, jnp.inf)) for x in jax.lax.stop_gradient((upper, lower)))
    opposite = jnp.zeros_like(lower).at[places].set(lower[others])
    return log_loss(beta * (upper - opposite), label_smoothing)
