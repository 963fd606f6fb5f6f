"""Losses of the margin: the chosen minus the rejected log-ratio, `u_w - u_l` with `u = log(pi / pi_ref)`.

`f_divergence` replaces the log-ratio u in these losses (f-DPO, Wang et al. 2023, arXiv 2309.16240). The constraint is then
another divergence than KL(pi || pi_ref), and the reward is `beta * f'(exp(u))`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses.inputs import check_beta, check_option, check_smoothing, implicit_rewards, lengths_of, pairs_of
from dpo_jax.types import Array

Result = tuple[jax.Array, jax.Array]


def dpo_loss(
    logps: Array,
    ref_logps: Array,
    *,
    beta: float | Array,
    label_smoothing: float | Array = 0.0,
    reference_free: bool = False,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Result:
    """Direct Preference Optimization: `-log sigmoid(beta * margin)` (Rafailov et al. 2023, eq. 7).

    Args:
      logps: float32[P, 2], log pi(y|x) in nats, chosen first; 16-bit floats are a TypeError.
      ref_logps: float32[P, 2], the same for the reference.
      beta: KL penalty coefficient, float or float[P]; a smaller beta lets the policy move further from the reference.
      label_smoothing: assumed share of flipped labels in [0, 0.5), float or float[P] (conservative DPO, Mitchell 2023).
      reference_free: the loss uses a uniform reference. Rewards are still measured against `ref_logps`, as in the original.
      f_divergence, f_alpha: the divergence from the reference, see `divergence_scores`.

    Returns `(losses float[P], rewards float[P, 2])`. ValueError: a wrong shape, `beta` not above 0, or `label_smoothing` out of
    its range.

    >>> logps = np.array([[-12.0, -15.0], [-40.0, -40.0]])
    >>> ref_logps = np.array([[-14.0, -13.0], [-40.0, -40.0]])
    >>> losses, rewards = dpo_loss(logps, ref_logps, beta=0.5)
    >>> print(losses, rewards[0])
    [0.126928  0.6931472] [ 1. -1.]
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    share = check_smoothing(label_smoothing, logps)
    reference = jnp.zeros_like(ref_logps) if reference_free else ref_logps
    margins = beta * _margins(divergence_scores(logps, reference, f_divergence=f_divergence, f_alpha=f_alpha))
    return log_loss(margins, share), implicit_rewards(logps, ref_logps, beta=beta)


def ipo_loss(
    logps: Array, ref_logps: Array, *, beta: float | Array, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> Result:
    """Identity Preference Optimization: `(margin - 1 / (2 beta))^2` (Azar et al. 2023, arXiv 2310.12036, eq. 17; tau = beta).

    `logps` and `ref_logps` are float[P, 2], nats, chosen first; returns `(losses float[P], rewards float[P, 2])`. The
    log-probabilities are sums over tokens, as in the paper's formula and the original implementation; `ipo_per_token_loss`
    uses means.

    >>> losses, rewards = ipo_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), beta=0.1)
    >>> print(losses)  # the margin is 4 nats, and 5 is wanted
    [1.]
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    margins = _margins(divergence_scores(logps, ref_logps, f_divergence=f_divergence, f_alpha=f_alpha))
    return _squared_error(margins, beta), implicit_rewards(logps, ref_logps, beta=beta)


def ipo_per_token_loss(
    logps: Array,
    ref_logps: Array,
    *,
    lengths: Array,
    beta: float | Array,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Result:
    """IPO with means per token: `(u_w / |y_w| - u_l / |y_l| - 1 / (2 beta))^2`; u is the log-ratio.

    TRL's `ipo`. The paper's formula (`ipo_loss`) has sums; TRL reports that the authors confirmed means. `logps`, `ref_logps`
    and `lengths` (scored tokens) are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> lengths = np.array([[4.0, 8.0]])
    >>> losses, _ = ipo_per_token_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), lengths=lengths, beta=0.5)
    >>> print(losses)  # 2 / 4 + 2 / 8 nats per token, and 1 is wanted
    [0.0625]
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    scores = divergence_scores(logps, ref_logps, f_divergence=f_divergence, f_alpha=f_alpha)
    margins = _margins(scores / lengths_of(lengths, logps))
    return _squared_error(margins, beta), implicit_rewards(logps, ref_logps, beta=beta)


def length_normalized_loss(
    logps: Array,
    ref_logps: Array,
    *,
    lengths: Array,
    beta: float | Array,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Result:
    """Length-normalized DPO: `-log sigmoid(beta * (u_w / |y_w| - u_l / |y_l|))` (Tulu 3, arXiv 2411.15124, eq. 6).

    u is the log-ratio. TRL's `sigmoid_norm`. Means per token are small, so beta must be larger: Tulu 3 uses 5. `logps`,
    `ref_logps` and `lengths` (scored tokens) are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`. Rewards are
    `beta * u`, not normalized.

    >>> lengths = np.array([[4.0, 8.0]])
    >>> losses, _ = length_normalized_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), lengths=lengths, beta=4.0)
    >>> print(f"{losses[0]:.4f}")  # -log sigmoid(4 * 0.75)
    0.0486
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    scores = divergence_scores(logps, ref_logps, f_divergence=f_divergence, f_alpha=f_alpha)
    margins = beta * _margins(scores / lengths_of(lengths, logps))
    return -jax.nn.log_sigmoid(margins), implicit_rewards(logps, ref_logps, beta=beta)


def length_regularized_loss(
    logps: Array, ref_logps: Array, *, lengths: Array, beta: float | Array, length_penalty: float | Array = 0.01
) -> Result:
    """Length-regularized DPO: `-log sigmoid(beta * margin + length_penalty * (|y_w| - |y_l|))` (Park et al. 2024, 2403.19159).

    DPO for the reward `r - length_penalty * |y|`: the policy need not learn the part of a preference that length explains.
    `logps`, `ref_logps` and `lengths` (scored tokens) are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> lengths = np.array([[9.0, 4.0]])
    >>> losses, _ = length_regularized_loss(np.zeros((1, 2)), np.zeros((1, 2)), lengths=lengths, beta=0.1, length_penalty=0.2)
    >>> print(f"{losses[0]:.4f}")  # -log sigmoid(0.2 * 5)
    0.3133
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    margins = beta * _margins(logps - ref_logps) + length_penalty * _margins(jnp.asarray(lengths, logps.dtype))
    return -jax.nn.log_sigmoid(margins), implicit_rewards(logps, ref_logps, beta=beta)


def hinge_loss(
    logps: Array, ref_logps: Array, *, beta: float | Array, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> Result:
    """Hinge loss of the margin: `max(0, 1 - beta * margin)` (SLiC-HF, Zhao et al. 2023, arXiv 2305.10425; RSO, 2309.06657).

    `logps` and `ref_logps` are float[P, 2], nats, chosen first; returns `(losses float[P], rewards float[P, 2])`. This is RSO's
    form, as in TRL: SLiC compares without a reference.

    >>> losses, _ = hinge_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), beta=0.1)
    >>> print(losses)
    [0.6]
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    margins = beta * _margins(divergence_scores(logps, ref_logps, f_divergence=f_divergence, f_alpha=f_alpha))
    return jax.nn.relu(1 - margins), implicit_rewards(logps, ref_logps, beta=beta)


def exo_pair_loss(
    logps: Array,
    ref_logps: Array,
    *,
    beta: float | Array,
    label_smoothing: float | Array,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Result:
    """Efficient Exact Optimization: KL from the pair's probabilities to smoothed labels (Ji et al. 2024, 2402.00856, eq. 16).

    With q = sigmoid(beta * margin) and e = `label_smoothing`: `q log(q / (1 - e)) + (1 - q) log((1 - q) / e)`. e must be above
    0; the paper uses 1e-3. `logps` and `ref_logps` are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> losses, _ = exo_pair_loss(np.zeros((1, 2)), np.zeros((1, 2)), beta=0.1, label_smoothing=0.001)
    >>> print(f"{losses[0]:.4f}")  # -log(2) - log(0.999 * 0.001) / 2
    2.7612
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    share = check_option("label_smoothing", label_smoothing, logps, lambda x: (x > 0) & (x < 0.5), "a share in (0, 0.5)")
    margins = beta * _margins(divergence_scores(logps, ref_logps, f_divergence=f_divergence, f_alpha=f_alpha))
    first, second = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    losses = jnp.exp(first) * (first - jnp.log1p(-share)) + jnp.exp(second) * (second - jnp.log(share))
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def robust_loss(
    logps: Array,
    ref_logps: Array,
    *,
    beta: float | Array,
    label_smoothing: float | Array = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Result:
    """Robust DPO: an unbiased DPO loss for labels flipped at a known rate (Chowdhury et al. 2024, arXiv 2403.00409).

    `(-(1 - e) log sigmoid(beta * margin) + e log sigmoid(-beta * margin)) / (1 - 2 e)`, e = `label_smoothing`. It is not
    bounded below. `logps` and `ref_logps` are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> losses, _ = robust_loss(np.zeros((1, 2)), np.zeros((1, 2)), beta=0.1, label_smoothing=0.1)
    >>> print(f"{losses[0]:.4f}")
    0.6931
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    share = check_smoothing(label_smoothing, logps)
    margins = beta * _margins(divergence_scores(logps, ref_logps, f_divergence=f_divergence, f_alpha=f_alpha))
    flipped = -jax.nn.log_sigmoid(-margins)
    losses = (-(1 - share) * jax.nn.log_sigmoid(margins) - share * flipped) / (1 - 2 * share)
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def discopop_loss(
    logps: Array,
    ref_logps: Array,
    *,
    beta: float | Array,
    discopop_tau: float | Array = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Result:
    """DiscoPOP's log-ratio modulated loss, found by a language model (Lu et al. 2024, arXiv 2406.08414, eq. 5).

    With m = beta * margin and s = sigmoid(m / tau): `-(1 - s) log sigmoid(m) + s exp(-m)`. `logps` and `ref_logps` are
    float[P, 2]; returns `(losses float[P], rewards float[P, 2])`.

    >>> losses, _ = discopop_loss(np.zeros((1, 2)), np.zeros((1, 2)), beta=0.1)
    >>> print(f"{losses[0]:.4f}")  # (log(2) + 1) / 2
    0.8466
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    tau = check_option("discopop_tau", discopop_tau, logps, lambda x: x > 0, "a number above 0")
    margins = beta * _margins(divergence_scores(logps, ref_logps, f_divergence=f_divergence, f_alpha=f_alpha))
    logistic = -jax.nn.sigmoid(-margins / tau) * jax.nn.log_sigmoid(margins)
    # One exponent, as 0 times infinity is no number; limited as in `divergence_scores`, for tau above 1.
    exponential = jnp.exp(jnp.minimum(jax.nn.log_sigmoid(margins / tau) - margins, 80.0))
    losses = logistic + exponential
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def divergence_scores(
    logps: jax.Array, ref_logps: jax.Array, *, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> jax.Array:
    """f'(pi / pi_ref) of every completion, up to a constant: float[P, 2].

    With u = log(pi / pi_ref): `reverse_kl` gives u, which is DPO; `forward_kl` 1 - exp(-u); `js_divergence`
    log(2 e^u / (1 + e^u)); `alpha_divergence` (e^((a - 1) u) - 1) / (a - 1) with a = `f_alpha`, where a = 1 is reverse_kl and
    a = 0 forward_kl. Exponents are limited to 80, as in TRL's alpha_divergence.
    """
    ratios = logps - ref_logps
    if f_divergence == "reverse_kl" or (f_divergence == "alpha_divergence" and abs(f_alpha - 1) < 1e-6):
        return ratios
    if f_divergence == "forward_kl":
        return -jnp.expm1(jnp.minimum(-ratios, 80.0))
    if f_divergence == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(ratios)
    if f_divergence == "alpha_divergence":
        return jnp.divide(jnp.expm1(jnp.minimum((f_alpha - 1) * ratios, 80.0)), f_alpha - 1)
    raise ValueError(f"f_divergence={f_divergence}: one of reverse_kl, forward_kl, js_divergence, alpha_divergence is expected")


def log_loss(margins: Any, label_smoothing: Any) -> jax.Array:
    """`-log sigmoid(margins)` with label smoothing: a share `label_smoothing` of the labels counts as flipped."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margins) - label_smoothing * jax.nn.log_sigmoid(-margins)


def _squared_error(margins: jax.Array, beta: float | Array) -> jax.Array:
    """IPO's `(margin - 1 / (2 beta))^2`, with margins limited to 1e18: their squares fit in float32."""
    return (jnp.clip(margins, -1e18, 1e18) - 1 / (2 * beta)) ** 2


def _margins(scores: jax.Array) -> jax.Array:
    return scores[:, 0] - scores[:, 1]
