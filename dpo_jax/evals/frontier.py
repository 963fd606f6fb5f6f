"""Reward-KL frontier: sequence KL of a policy, the optimal frontier (eq. 4), regret, and Best-of-N.

By eq. 4 of the paper the best policy is pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x). Samples of the reference, weighted
by exp(r / beta), therefore give the reward and the KL of pi*, for every beta and without training anything:

    reward(beta) = E_w[r]        KL(beta) = E_w[r] / beta - log Z        w = exp(r / beta), normalized over a prompt's samples

No policy of the same KL has a higher reward (eq. 3). Rewards are in their own unit, KL in nats per completion; means are over
prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.evals.intervals import Interval, student
from dpo_jax.head import CHUNK, at_least_float32
from dpo_jax.types import Array, Model, Rows, Variables

TRUSTED_SAMPLES = 30
"""Least effective sample size: the self-normalized mean is biased by about one over it, so by more than 3 % below this."""
RESAMPLES = 1000
TINY = float(np.finfo(np.float64).tiny)


def sequence_kl(
    model: Model, policy_variables: Variables, ref_variables: Variables, rows: Rows, *, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """KL(policy || reference) on completions that the policy drew: (exact, sampled), float32[R * slots] each, in nats.

    `exact` sums, over the tokens of a completion, the KL of the two next-token distributions over the whole vocabulary;
    `sampled` is log pi(y|x) - log pi_ref(y|x). Over completions drawn from the policy at temperature 1 the mean of both is the
    sequence KL. `exact` has less variance: it averages over each next token, and only the prefixes are random. A truncated
    completion counts up to its end. As in `logps`, the head is applied to at most `chunk` positions at a time.

    >>> exact, sampled = jax.jit(partial(sequence_kl, model))(variables, variables, rows)  # of a policy to itself
    >>> exact.shape, float(exact.sum()), float(sampled.sum())
    ((4,), 0.0, 0.0)
    """

    def scored(variables: Variables) -> jax.Array:
        hidden = jnp.take_along_axis(model.forward(variables, rows), rows.source[:, :, None], axis=1)
        return jnp.moveaxis(hidden, 1, 0)  # [S, R, D]

    def compare(at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        policy, ref, target = at
        logps, ref_logps = (
            jax.nn.log_softmax(at_least_float32(model.unembed(variables, hidden)), axis=-1)
            for variables, hidden in ((policy_variables, policy), (ref_variables, ref))
        )
        log_ratios = logps - ref_logps  # [R, V]
        exact = (jnp.exp(logps) * log_ratios).sum(axis=-1)
        return exact, jnp.take_along_axis(log_ratios, target[:, None], axis=-1)[:, 0]

    target = jnp.moveaxis(jnp.asarray(rows.target), 1, 0)
    positions = scored(policy_variables), scored(ref_variables), target
    in_slot = rows.slot[:, :, None] == jnp.arange(rows.slots, dtype=jnp.int32)[None, None, :]

    def summed(values: jax.Array) -> jax.Array:
        return jnp.where(in_slot, jnp.moveaxis(values, 0, 1)[:, :, None], 0.0).sum(axis=1).reshape(-1)

    exact, sampled = jax.lax.map(compare, positions, batch_size=max(1, chunk // len(target[0])))
    return summed(exact), summed(sampled)


class Point(NamedTuple):
    """One policy in the reward-KL plane. Intervals are 95 %, over prompts."""

    method: str  # "DPO"
    setting: str  # distinguishes the runs of a method: "0.1"
    kl: float  # nats per completion
    reward: float
    kl_interval: Interval | None = None
    reward_interval: Interval | None = None
    kl_bound: float | None = None  # for best-of-N: the analytic bound, in addition to the estimate
    seed: str = ""  # of one of several runs of a setting; "" for a single run, and for their mean


def measured(method: str, setting: str, *, rewards: Array, kls: Array, seed: int, kl_bound: float | None = None) -> Point:
    """The point of a policy from its mean reward and KL on each prompt, `[P]` each, with bootstrap intervals."""
    intervals = bootstrap_interval(kls, seed), bootstrap_interval(rewards, seed)
    return Point(method, setting, float(np.mean(kls)), float(np.mean(rewards)), *intervals, kl_bound)


def bootstrap_interval(values: Array, seed: int, *, resamples: int = RESAMPLES) -> Interval:
    """95 % interval of the mean of `values[P]` over resampled prompts (Efron 1979), widened for few prompts (`_ends`).

    Its width is 0 for a single prompt.

    Several completions of one prompt are not independent: pass their mean, one value per prompt.
    """
    values = _finite(values, "values", axes=1)
    low, high = _ends(_resampling(len(values), seed, resamples) @ values, values.mean(), len(values))
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The optimal frontier, with beta descending and so KL ascending: float64[B] each; 95 % intervals [2, B] over prompts."""

    beta: np.ndarray
    kl: np.ndarray
    reward: np.ndarray
    ess: np.ndarray  # effective share of the samples, in (0, 1]: harmonic mean over prompts, since the bias is inverse to it
    band: np.ndarray  # of the reward at this KL; there is none of KL or reward at this beta, where both estimates are biased
    samples: int  # M, per prompt
    reference: float  # mean reward of the reference itself
    prompt_kl: np.ndarray  # [P, B]
    prompt_reward: np.ndarray  # [P, B]
    prompt_reference: np.ndarray  # [P]
    beside: Beside | None = None  # another reward of pi*

    @property
    def trusted(self) -> np.ndarray:
        """bool[B]: where the effective sample size per prompt is at least `TRUSTED_SAMPLES`. Elsewhere the curve is too low."""
        return np.logical_and.accumulate(self.ess * self.samples >= TRUSTED_SAMPLES)

    @property
    def reach(self) -> float:
        """The largest KL up to which the curve can be trusted, in nats."""
        return float(self.kl[self.trusted].max(initial=0.0))

    def gain(self, at: float, *, seed: int = 0) -> tuple[float, Interval]:
        """The reward over the reference's at the KL `at`, on the same prompts, with its 95 % interval over prompts."""
        drawn = _resampling(len(self.prompt_kl), seed, RESAMPLES)
        means = zip(drawn @ self.prompt_kl, drawn @ self.prompt_reward, drawn @ self.prompt_reference, strict=True)
        gain = float(_reward_at(at, self.kl, self.reward, self.reference) - self.reference)
        low, high = _ends(np.array([_reward_at(at, *mean) - mean[2] for mean in means]), gain, len(self.prompt_kl))
        return gain, (float(low), float(high))


class Beside(NamedTuple):
    """Another reward of the policies on the optimal frontier of the first: the effect of maximizing the first on this one."""

    reward: np.ndarray  # float64[B]
    band: np.ndarray  # [2, B], 95 %, over prompts
    reference: float  # its mean for the reference itself


def optimum(
    rewards: Array,
    betas: Sequence[float],
    *,
    seed: int,
    log_ratios: Array | None = None,
    beside: Array | None = None,
    resamples: int = RESAMPLES,
) -> Optimum:
    """The curve of pi* (eq. 4) from `rewards[P, M]` of M completions of each of P prompts, with self-normalized weights.

    By default the completions are the reference's own, which reach about log M nats. To go further, draw them from any
    distribution q that covers the reference, such as a mixture of it with trained policies, and pass `log_ratios[P, M]` = log
    pi_ref - log q (`mixture_log_ratios`). `betas` are positive, and may include `math.inf` (the reference itself). `beside[P,
    M]` is another reward of the same completions.

    >>> rewards = np.random.default_rng(0).normal(size=(100, 256))  # of the reference's samples, standard normal
    >>> best = optimum(rewards, [math.inf, 1.0], seed=0)
    >>> best.kl.round(2), best.reward.round(2)  # at beta 1 they are 1/2 and 1
    (array([0.  , 0.48]), array([0.  , 0.98]))
    """
    rewards = _finite(rewards, "rewards", axes=2)
    log_ratios = np.zeros_like(rewards) if log_ratios is None else _finite(log_ratios, "log_ratios", axes=2)
    if log_ratios.shape != rewards.shape:
        raise ValueError(f"log_ratios has shape {log_ratios.shape}, but rewards {rewards.shape}")
    beside = rewards if beside is None else _finite(beside, "beside", axes=2)
    if beside.shape != rewards.shape:
        raise ValueError(f"beside has shape {beside.shape}, but rewards {rewards.shape}")
    if not len(betas) or not all(beta > 0 for beta in betas):
        raise ValueError(f"betas must be positive, and at least one, got {list(betas)}")
    beta = np.array(sorted(betas, reverse=True), np.float64)
    tilted = zip(*(_tilted(rewards, log_ratios, b, beside) for b in beta), strict=True)
    reward, kl, inverse_ess, other = (np.stack(x, axis=1) for x in tilted)
    reference, _, _, other_reference = _tilted(rewards, log_ratios, math.inf, beside)

    drawn = _resampling(len(rewards), seed, resamples)
    another, prompts = None, len(rewards)
    if beside is not rewards:
        center = other.mean(axis=0)
        another = Beside(center, _ends(drawn @ other, center, prompts), float(other_reference.mean()))
    curve = kl.mean(axis=0), reward.mean(axis=0), reference.mean()
    means = zip(drawn @ kl, drawn @ reward, drawn @ reference, strict=True)
    at_equal_kl = np.array([_reward_at(curve[0], *resampled) for resampled in means])
    return Optimum(
        beta=beta,
        kl=curve[0],
        reward=curve[1],
        ess=1 / (inverse_ess.mean(axis=0) * rewards.shape[1]),
        band=_ends(at_equal_kl, curve[1], prompts),
        samples=rewards.shape[1],
        reference=float(curve[2]),
        prompt_kl=kl,
        prompt_reward=reward,
        prompt_reference=reference,
        beside=another,
    )


def _tilted(rewards: np.ndarray, log_ratios: np.ndarray, beta: float, beside: np.ndarray) -> tuple[np.ndarray, ...]:
    """Reward, KL, inverse effective sample size and second reward `beside` of pi* on each prompt: float64[P] each."""
    scores = rewards / beta + log_ratios
    log_z = _logsumexp(scores) - _logsumexp(log_ratios)
    weights = np.exp(scores - _logsumexp(scores)[:, None])
    reward = (weights * rewards).sum(axis=1)
    return reward, np.maximum(reward / beta - log_z, 0.0), (weights**2).sum(axis=1), (weights * beside).sum(axis=1)


def mixture_log_ratios(logps: Array, shares: Sequence[float]) -> np.ndarray:
    """log pi_ref - log q of samples from a mixture q: `logps[..., C]` under each of its C policies -> float64[...].

    The reference is policy 0, policy c contributed `shares[c]` of each prompt's samples, and every sample is scored under all
    of them: the balance heuristic (Veach and Guibas 1995). Weights then never exceed 1 / shares[0].
    """
    logps, shares = np.asarray(logps, np.float64), list(shares)
    if logps.shape[-1] != len(shares) or not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1):
        raise ValueError(f"shares must be positive, sum to 1, and be as many as policies ({logps.shape[-1]}), got {shares}")
    return logps[..., 0] - _logsumexp(logps + np.log(shares))


def regret(point_reward: Array | float, point_kl: Array | float, optimum: Optimum, ref_reward: float) -> np.ndarray:
    """Regret: the missed share of the possible gain at the policy's KL, 0 on the optimum, 1 at the reference's reward.

    Above 1 the policy is worse than its reference; below 0 the curve is too low (see `Optimum.reach`) or the estimates are
    noisy. NaN if no gain is possible (KL 0), and if the policy lies beyond the end of the curve. Broadcasts over arrays.

    >>> best = optimum(np.random.default_rng(0).normal(size=(100, 256)), [math.inf, 2.0, 1.0], seed=0)
    >>> print(regret(best.reward[1], best.kl[1], best, best.reference))
    0.0
    """
    best = _reward_at(point_kl, optimum.kl, optimum.reward, ref_reward)
    missed = _share_missed(np.asarray(point_reward), best, ref_reward)
    return np.where(np.asarray(point_kl) > optimum.kl[-1], np.nan, missed)


def _reward_at(kl: Array | float, curve_kl: np.ndarray, curve_reward: np.ndarray, ref_reward: float) -> np.ndarray:
    """The curve's reward at `kl`, interpolated linearly in sqrt(KL), in which it is linear near the reference."""
    x, y = np.sqrt(curve_kl), curve_reward
    if curve_kl[0] > 0:
        x, y = np.append(0.0, x), np.append(ref_reward, y)
    return np.interp(np.sqrt(np.maximum(kl, 0.0)), x, y)


def _share_missed(reward: np.ndarray, best: np.ndarray, ref_reward: float) -> np.ndarray:
    gain = best - ref_reward
    return np.where(gain > 0, (best - reward) / np.where(gain > 0, gain, 1.0), np.nan)


def envelope(kls: Array, rewards: Array, at: float) -> float:
    """The highest reward of a mixture of policies with `kls[n]`, `rewards[n]` at a KL of at most `at`; NaN if all lie beyond.

    Drawing each completion from one of two policies, by a coin flip, gives the mean of their rewards and at most the mean of
    their KLs (KL is convex): everything below a line between two points can be reached. Include the reference, with KL 0.
    """
    kls, rewards = _finite(kls, "kls", axes=1), _finite(rewards, "rewards", axes=1)
    return float(best_mixture(kls, rewards, at) @ rewards) if (kls <= at).any() else math.nan


def best_mixture(kls: Array, rewards: Array, at: float) -> np.ndarray:
    """Shares of the policies in the mixture of `envelope`, one or two of them not 0: float64[n].

    Raises ValueError where all `kls` lie beyond `at`.

    >>> best_mixture([0.0, 1.0, 3.0], [0.0, 2.0, 4.0], 2.0)
    array([0. , 0.5, 0.5])
    """
    kls, rewards = _finite(kls, "kls", axes=1), _finite(rewards, "rewards", axes=1)
    near, far = np.flatnonzero(kls <= at), np.flatnonzero(kls > at)
    found = np.eye(len(kls))[near[np.argmax(rewards[near])]]
    for one in near:
        for other in far:
            shares = np.zeros(len(kls))
            shares[other] = (at - kls[one]) / (kls[other] - kls[one])
            shares[one] = 1 - shares[other]
            found = max(found, shares, key=lambda mixed: float(mixed @ rewards))
    return found


class BestOfN(NamedTuple):
    """The best of `n` samples by the true reward, from M samples of each of P prompts."""

    n: int
    reward: np.ndarray  # float64[P]  expected reward, unbiased
    kl: np.ndarray  # float64[P]  estimated, in nats; below the bound if there are ties
    kl_bound: float  # log n - (n - 1) / n
    beside: np.ndarray | None = None  # float64[P]  expected second reward of the sample that is best by the first


def best_of_n(rewards: Array, n: int, *, beside: Array | None = None) -> BestOfN:
    """Best-of-n by `rewards[P, M]` of the reference's samples, for n at most M.

    The reward is the mean over all subsets of n samples, by order statistics: of M sorted values, the i-th (from 1) is the
    best of C(i-1, n-1) of the C(M, n) subsets. The KL is that of best-of-n on the distribution of the M samples: equal rewards
    count as one outcome, with a random choice among them. It never exceeds the bound (Beirami et al. 2024), which is exact
    without ties, and it is too low unless n is small compared with M. `beside[P, M]` is another reward of the samples, which
    is not used for selection.

    >>> best = best_of_n(np.array([[1.0, 2.0, 3.0]]), 2)  # the best of two is 3, 3 or 2
    >>> best.reward.round(3), round(best.kl_bound, 3)
    (array([2.667]), 0.193)
    """
    rewards = _finite(rewards, "rewards", axes=2)
    ordered = np.sort(rewards, axis=1)
    prompts, samples = ordered.shape
    if not 1 <= n <= samples:
        raise ValueError(f"best of n={n} needs 1 <= n <= {samples}, the samples of each prompt")
    # Downwards from the largest value: C(i-2, n-1) / C(i-1, n-1) = (i - n) / (i - 1).
    i = np.arange(samples, n, -1, dtype=np.float64)
    chances = n / samples * np.append(1.0, np.cumprod((i - n) / (i - 1)))
    kl = np.empty(prompts)
    for prompt, row in enumerate(ordered):
        _, counts = np.unique(row, return_counts=True)
        below = np.append(0, np.cumsum(counts)) / samples
        wins = np.diff(below**n)
        kl[prompt] = (wins * np.log(np.maximum(wins, TINY) * samples / counts)).sum()
    reward, bound = ordered[:, ::-1][:, : len(chances)] @ chances, math.log(n) - (n - 1) / n
    if beside is None:
        return BestOfN(n, reward, kl, bound)
    beside = _finite(beside, "beside", axes=2)
    if beside.shape != rewards.shape:
        raise ValueError(f"beside has shape {beside.shape}, but rewards {rewards.shape}")
    chance = np.append(np.zeros(samples - len(chances)), chances[::-1])  # of each rank, the largest last
    return BestOfN(n, reward, kl, bound, np.array([_of_the_best(*both, chance) for both in zip(rewards, beside, strict=True)]))


def _of_the_best(rewards: np.ndarray, beside: np.ndarray, chance: np.ndarray) -> float:
    """The mean of `beside[M]` if the sample of i-th smallest reward is chosen with probability `chance[i]`; ties at random."""
    _, ranks, counts = np.unique(rewards, return_inverse=True, return_counts=True)
    of_rank = np.add.reduceat(chance, np.append(0, np.cumsum(counts)[:-1])) / counts
    return float(of_rank[ranks] @ beside)


def _finite(values: Array, name: str, *, axes: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != axes or not values.size:
        raise ValueError(f"{name} must have {axes} axes and at least one value, got the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}{np.argwhere(~np.isfinite(values))[0].tolist()} is not finite")
    return values


def _resampling(prompts: int, seed: int, resamples: int) -> np.ndarray:
    """Weights of the prompts in each resample: float64[resamples, P]; rows sum to 1."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts


def _ends(resampled: np.ndarray, center: np.ndarray | float, prompts: int) -> np.ndarray:
    """95 % percentile interval of estimates `[resamples, ...]` by the bootstrap, stretched about `center`: [2, ...].

    The bootstrap's spread is too small by sqrt((P - 1) / P), and its quantiles are those of a normal instead of Student's t.
    For the mean of 4, 16 and 48 normal values, the percentile interval covers 80, 92 and 93 %.
    """
    ends = np.quantile(resampled, [0.025, 0.975], axis=0)
    return ends if prompts < 2 else center + (ends - center) * student(prompts) / 1.959964 * math.sqrt(prompts / (prompts - 1))


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=-1, keepdims=True)
    return np.log(np.exp(values - top).sum(axis=-1)) + top[..., 0]
