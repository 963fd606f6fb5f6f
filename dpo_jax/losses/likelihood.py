"""Losses without a reference: they use only the policy's log-probabilities. The reference serves only the returned rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.inputs import check_beta, check_option, check_smoothing, implicit_rewards, lengths_of, pairs_of
from dpo_jax.losses.margin import log_loss
from dpo_jax.types import Array

Result = tuple[jax.Array, jax.Array]


def unlikelihood_loss(logps: Array, ref_logps: Array, *, alpha: float | Array) -> Result:
    """Unlikelihood training: `-log pi(y_w) + alpha * log pi(y_l)` (section 6 and appendix D.3; Welleck et al. 2019).

    `logps` and `ref_logps` are float[P, 2], nats, chosen first; returns `(losses float[P], rewards float[P, 2])`.

    `alpha` in [0, 1] is the weight of the second term; with 0 the loss is the paper's Preferred-FT. Nothing holds the policy
    near its reference: the loss has no lower bound once a completion is rejected more than 1 / alpha times as often as it is
    chosen. There is no beta either, so the rewards are `log(pi / pi_ref)` in nats.

    >>> losses, rewards = unlikelihood_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), alpha=0.5)
    >>> print(losses, rewards)
    [4.5] [[ 2. -2.]]
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    alpha = check_option("alpha", alpha, logps, lambda x: (x >= 0) & (x <= 1), "a weight in [0, 1]")
    return -logps[:, 0] + alpha * logps[:, 1], implicit_rewards(logps, ref_logps, beta=1.0)


def preferred_ft_loss(logps: Array, ref_logps: Array) -> Result:
    """The paper's baseline Preferred-FT: maximum likelihood of the chosen completions, `-log pi(y_w)`.

    `logps` and `ref_logps` are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`, rewards in nats.

    >>> print(preferred_ft_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]))[0])
    [12.]
    """
    return unlikelihood_loss(logps, ref_logps, alpha=0.0)


def sft_loss(logps: Array, ref_logps: Array, *, mean_lengths: Array) -> Result:
    """Negative log-likelihood of the chosen completions per token: `-log pi(y_w) / (mean |y_w| of the batch)`.

    Its mean over a batch is the mean over all chosen tokens, as in TRL's `sft`. Add it to a preference loss to keep the chosen
    completions likely (RPO, Pang et al. 2024, arXiv 2404.19733; RPO divides every pair by its own length).

    `logps`, `ref_logps` and `mean_lengths` are float[P, 2]; all rows of `mean_lengths` are equal (`dpo_step` takes the mean
    over the whole batch, however it is split into microbatches and over devices). Returns
    `(losses float[P], rewards float[P, 2])`, rewards in nats.

    >>> losses, _ = sft_loss(np.array([[-12.0, -15.0]]), np.array([[-14.0, -13.0]]), mean_lengths=np.array([[4.0, 6.0]]))
    >>> print(losses)
    [3.]
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    return -logps[:, 0] / lengths_of(mean_lengths, logps)[:, 0], implicit_rewards(logps, ref_logps, beta=1.0)


def simpo_loss(
    logps: Array,
    ref_logps: Array,
    *,
    lengths: Array,
    beta: float | Array,
    gamma: float | Array = 0.5,
    label_smoothing: float | Array = 0.0,
) -> Result:
    """SimPO: `-log sigmoid(beta * (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)` (Meng et al. 2024, arXiv 2405.14734).

    `gamma` is the target margin. The paper uses beta 2 to 2.5 and gamma 0.5 to 1.6. `logps`, `ref_logps` and `lengths` (scored
    tokens) are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`; rewards are `beta * log(pi / pi_ref)`.

    >>> lengths = np.array([[4.0, 5.0]])
    >>> losses, _ = simpo_loss(np.array([[-12.0, -20.0]]), np.zeros((1, 2)), lengths=lengths, beta=2.0)
    >>> print(f"{losses[0]:.4f}")  # -log sigmoid(2 * (-3 + 4) - 0.5)
    0.2014
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta, share = check_beta(beta, logps), check_smoothing(label_smoothing, logps)
    means = logps / lengths_of(lengths, logps)
    return log_loss(beta * (means[:, 0] - means[:, 1]) - gamma, share), implicit_rewards(logps, ref_logps, beta=beta)


def cpo_loss(
    logps: Array,
    ref_logps: Array,
    *,
    mean_lengths: Array,
    beta: float | Array,
    cpo_alpha: float | Array = 1.0,
    label_smoothing: float | Array = 0.0,
) -> Result:
    """Contrastive preference optimization: DPO with a uniform reference, plus an SFT term (Xu et al. 2024, arXiv 2401.08417).

    `-log sigmoid(beta * (log pi(y_w) - log pi(y_l))) + cpo_alpha * sft`; the second term is `sft_loss`, as in TRL. Arguments
    and results are those of `sft_loss`, except that rewards are `beta * log(pi / pi_ref)`.

    >>> losses, _ = cpo_loss(np.array([[-12.0, -12.0]]), np.zeros((1, 2)), mean_lengths=np.array([[4.0, 4.0]]), beta=0.1)
    >>> print(f"{losses[0]:.4f}")  # log(2) + 3
    3.6931
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta, share = check_beta(beta, logps), check_smoothing(label_smoothing, logps)
    likelihood, _ = sft_loss(logps, ref_logps, mean_lengths=mean_lengths)
    losses = log_loss(beta * (logps[:, 0] - logps[:, 1]), share) + cpo_alpha * likelihood
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def orpo_loss(logps: Array, ref_logps: Array, *, lengths: Array, mean_lengths: Array, beta: float | Array) -> Result:
    """Odds ratio preference optimization: `sft - beta * log sigmoid(log(odds_w / odds_l))` (Hong et al. 2024, 2403.07691).

    odds = p / (1 - p), where log p is the mean log-probability per token; `beta` is the paper's lambda. The first term is
    `sft_loss` on the completion alone, as in the paper; TRL also counts the prompt's tokens. `logps`, `ref_logps`, `lengths`
    and `mean_lengths` are float[P, 2]; returns `(losses float[P], rewards float[P, 2])`, rewards `beta * log(pi / pi_ref)`.

    >>> lengths = np.array([[4.0, 4.0]])
    >>> same = np.array([[-12.0, -12.0]])
    >>> losses, _ = orpo_loss(same, np.zeros((1, 2)), lengths=lengths, mean_lengths=lengths, beta=0.1)
    >>> print(f"{losses[0]:.4f}")  # 3 + 0.1 * log(2)
    3.0693
    """
    logps, ref_logps = pairs_of(logps, ref_logps)
    beta = check_beta(beta, logps)
    likelihood, _ = sft_loss(logps, ref_logps, mean_lengths=mean_lengths)
    log_odds = _log_odds(logps / lengths_of(lengths, logps))
    losses = likelihood - beta * jax.nn.log_sigmoid(log_odds[:, 0] - log_odds[:, 1])
    return losses, implicit_rewards(logps, ref_logps, beta=beta)


def _log_odds(log_p: jax.Array) -> jax.Array:
    """log(p / (1 - p)) for log p < 0. At log p = 0, which padding examples have, p is taken as the largest number below 1."""
    log_p = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).eps)
    return log_p - jnp.log(-jnp.expm1(log_p))
