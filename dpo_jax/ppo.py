"""Proximal Policy Optimization (Schulman et al. 2017) with a KL penalty to a reference: the baseline that DPO is compared with.

The setting is that of Ziegler et al. 2019 (arXiv 1909.08593): a token is an action, each token costs `kl_coef` times its
log pi/pi_ref, and the reward of the text is added at its last token. The optimum is the paper's eq. 4 with beta = `kl_coef`.

    collected = collect(model, (policy, reference), prompts, ...)   samples, with the statistics of each token
    scores = the reward of the texts, float[R]                      any function, on the host
    rollout, health = advantages(collected, scores, ...)            on the whole rollout at once: whitening is global
    state, metrics = ppo_step(state, part, ...)                     for `part` in `minibatches(rollout, ...)`, several epochs
    kl_coef = next_kl_coef(kl_coef, kl=health["kl"], ...)           if a target KL is set instead of a fixed coefficient

Policy and value function share the trunk; `model` comes from `reward_model.with_scalar_head`. In the arrays [R, S] below,
`mask` is 1 where position `s` scores a token and 0 after the completion's last token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.head import CHUNK, at_least_float32, token_logps
from dpo_jax.reward_model import scalar
from dpo_jax.sampling import Samples, generate, left_pad
from dpo_jax.step import train_step
from dpo_jax.types import Array, Metrics, Model, Rows, TrainState, Variables

KL_ERROR = 0.2
"""Clipping of the adaptive KL controller: a larger relative error of the KL counts as this much."""


class Prompts(NamedTuple):
    """Prompts for `collect` to continue; `prompt_batch` builds them."""

    tokens: Array  # int32[R, Lp], padded on the left
    lengths: Array  # int32[R]
    keys: Array  # uint32[R, 2]  random key data, one for each row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Collected:
    """Samples of a policy, with the policy's and the reference's statistics of each token before any update."""

    rows: Rows  # plain: one completion each, S = max_new_tokens
    logps: Array  # float32[R, S]  log pi(token | preceding tokens), in nats
    ref_logps: Array  # float32[R, S]  the same for the reference
    values: Array  # float32[R, S]  the value function before the token
    entropy: Array  # float32[R, S]  entropy of the policy's distribution of the token, in nats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Training data of `ppo_step`. A batch of tokens, not of rows: `weight` is [R, S], so means are over the batch's tokens."""

    rows: Rows
    logps: Array  # float32[R, S]  of the policy that sampled
    values: Array  # float32[R, S]  of the value function at that time
    advantages: Array  # float32[R, S]
    returns: Array  # float32[R, S]  what the value function is fitted to

    @property
    def weight(self) -> Array:
        return token_mask(self.rows)


def token_mask(rows: Rows) -> Array:
    """The row's weight where a token is scored, else 0: float32[R, S]."""
    return (rows.slot == 0).astype(rows.weight.dtype) * rows.weight[:, None]


def prompt_batch(prompts: Sequence[Sequence[int] | np.ndarray], key: jax.Array, *, length: int) -> Prompts:
    """Token ids as `Prompts`, padded on the left to `length` columns. ValueError for a longer prompt.

    A completion depends on its row's own key, that is on `key` and the row's number, not on the devices.

    >>> prompts = prompt_batch([[5, 6, 7], [8]], jax.random.key(0), length=4)
    >>> prompts.tokens.tolist(), prompts.keys.shape
    ([[0, 5, 6, 7], [0, 0, 0, 8]], (2, 2))
    """
    tokens, lengths = left_pad(prompts, multiple_of=length)
    if tokens.shape[1] > length:
        raise ValueError(f"prompt {int(np.argmax(lengths))} has {lengths.max()} tokens, but there is room for {length}")
    return Prompts(tokens, lengths, np.asarray(jax.random.key_data(jax.random.split(key, len(prompts)))))


def collect(
    model: Model, variables: tuple[Variables, Variables], prompts: Prompts, *, max_new_tokens: int, eos_id: int | Sequence[int]
) -> Collected:
    """Sample a completion of each prompt and score its tokens. Pure: jit it, or `Partitioner.compile_map` it.

    `variables` are those of the policy and of its reference. `eos_id`: as in `generate`. Samples are drawn from the policy
    itself (temperature 1, no top-k or top-p): otherwise the ratio of `ppo_step` and the KL estimate would be wrong.

    >>> decoder, weights = load_hf(folder)
    >>> actor = with_scalar_head(decoder)
    >>> policy = {**jax.jit(actor.init)(jax.random.key(0)), **weights}
    >>> prompts = prompt_batch([pair.prompt for pair in encoded], jax.random.key(0), length=32)
    >>> run = jax.jit(partial(collect, actor, max_new_tokens=4, eos_id=0))
    >>> run.eval_shape((policy, weights), prompts).logps.shape  # and `run(...)` samples
    (2, 4)
    """
    policy, reference = variables
    keys = jax.random.wrap_key_data(jnp.asarray(prompts.keys))
    samples = generate(model, policy, prompts.tokens, prompts.lengths, keys, max_new_tokens=max_new_tokens, eos_id=eos_id)
    rows = sampled_rows(prompts.tokens, prompts.lengths, samples=samples)
    logps, values, entropy = policy_and_values(model, policy, rows)
    ref_logps = token_logps(model, reference, _scored(model, reference, rows), rows.target)
    return Collected(rows, logps, ref_logps, values, entropy)


def sampled_rows(prompts: Array, lengths: Array, *, samples: Samples) -> Rows:
    """`generate`'s input and output as plain rows, each completion scored (its EOS too): L = Lp + T, S = T. Works under jit.

    The prompts stay padded on the left, so that column Lp - 1 + s predicts completion token s in every row.
    """
    (rows, columns), new = prompts.shape, samples.tokens.shape[1]
    column = jnp.broadcast_to(jnp.arange(columns + new, dtype=jnp.int32), (rows, columns + new))
    step = jnp.broadcast_to(jnp.arange(new, dtype=jnp.int32), (rows, new))
    start, end = columns - lengths[:, None], columns + samples.lengths[:, None]
    inside = (column >= start) & (column < end)
    return Rows(
        tokens=jnp.concatenate([jnp.asarray(prompts, jnp.int32), samples.tokens], axis=1),
        positions=jnp.where(inside, column - start, 0),
        k_start=jnp.where(inside, start, column),
        k_end=column + 1,
        source=columns - 1 + step,
        target=samples.tokens,
        slot=jnp.where(step < samples.lengths[:, None], 0, 1),
        weight=jnp.ones(rows, jnp.float32),
        index=jnp.arange(rows, dtype=jnp.int32),
    )


def completion_ids(rows: Rows) -> list[np.ndarray]:
    """The completion's token ids in each plain row, EOS included, for a tokenizer to decode."""
    return [target[slot == 0] for target, slot in zip(np.asarray(rows.target), np.asarray(rows.slot), strict=True)]


def policy_and_values(
    model: Model, variables: Variables, rows: Rows, *, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities, values and entropies at every scored position of plain rows: float32[R, S] each.

    They are the log-probability of the token (nats), the value function before it, and the entropy of the distribution it was
    drawn from (nats, without gradient). As in `token_logps`, logits exist for about `chunk` positions at a time.
    """
    hidden = _scored(model, variables, rows)

    def score(column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, target = column
        logps = jax.nn.log_softmax(at_least_float32(model.unembed(variables, hidden)))
        picked = jnp.take_along_axis(logps, target[:, None], axis=-1)[:, 0]
        return picked, -(jnp.exp(logps) * logps).sum(axis=-1)

    rows_here, scored = rows.target.shape
    width = max(1, chunk // rows_here)
    columns = jnp.moveaxis(hidden, 1, 0), jnp.asarray(rows.target).T
    if width >= scored:
        logps, entropy = jax.vmap(score)(columns)
    else:
        logps, entropy = jax.lax.map(jax.checkpoint(score), columns, batch_size=width)
    return logps.T, scalar(variables, hidden), jax.lax.stop_gradient(entropy).T


def _scored(model: Model, variables: Variables, rows: Rows) -> jax.Array:
    """The hidden states that predict the scored tokens: [R, S, D]."""
    if rows.slots != 1:
        raise ValueError(f"tokens are scored in rows of one completion each, but these hold {rows.slots}: use the layout plain")
    return jnp.take_along_axis(model.forward(variables, rows), rows.source[:, :, None], axis=1)


def advantages(
    collected: Collected, scores: Array, *, kl_coef: float | Array, gamma: float, lam: float
) -> tuple[Rollout, Metrics]:
    """Advantages and returns of a rollout, from the rewards `scores[R]` of its completions, and rollout metrics. Pure.

    Advantages are whitened over all tokens of `collected`. Pass the whole rollout, so that they are the same on any number of
    devices. Metrics are means over completions: `score`; `kl`, log pi/pi_ref summed over the completion, in nats, an estimate
    of the sequence KL; `penalized_score`, the objective of PPO: score - kl_coef * kl; `tokens`; `sequence_entropy`.

    >>> rollout, health = advantages(collected, np.float32([1.0, -1.0]), kl_coef=0.1, gamma=1.0, lam=0.95)
    >>> rollout.advantages.shape, float(health["score"]), float(health["kl"])  # the policy is its reference
    ((2, 4), 0.0, 0.0)
    """
    c, mask = collected, jnp.asarray(token_mask(collected.rows))
    scores = jnp.asarray(scores, c.logps.dtype)
    rewards = penalized_rewards(scores, c.logps, c.ref_logps, mask, kl_coef=kl_coef)
    gains, returns = gae(rewards, c.values, mask, gamma=gamma, lam=lam)
    per_row = {
        "score": scores,
        "kl": ((c.logps - c.ref_logps) * mask).sum(axis=1),
        "penalized_score": rewards.sum(axis=1),
        "tokens": mask.sum(axis=1),
        "sequence_entropy": (c.entropy * mask).sum(axis=1),
    }
    share = c.rows.weight / c.rows.weight.sum()
    health = {name: (x * share).sum() for name, x in per_row.items()}
    return Rollout(c.rows, c.logps, c.values, whiten(gains, mask), returns), health


def penalized_rewards(scores: Array, logps: Array, ref_logps: Array, mask: Array, *, kl_coef: float | Array) -> jax.Array:
    """The reward of each token: `-kl_coef * log pi/pi_ref`, plus `scores[R]` at the last token: float32[R, S].

    Its sum over a completion is R(x, y) of Ziegler et al. 2019, section 2.2.
    """
    mask = jnp.asarray(mask)
    last = mask * (1 - jnp.pad(mask[:, 1:], ((0, 0), (0, 1))))
    return last * scores[:, None] - kl_coef * (logps - ref_logps) * mask


def gae(rewards: Array, values: Array, mask: Array, *, gamma: float, lam: float) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16): (advantages, returns), float32[R, S] each.

    `returns = advantages + values` are the targets of the value function. After a completion's last token the value is 0, even
    if the completion was cut off at the maximum length.
    """
    rewards, values = jnp.where(mask > 0, rewards, 0), jnp.where(mask > 0, values, 0)
    deltas = rewards + gamma * jnp.pad(values[:, 1:], ((0, 0), (0, 1))) - values

    def back(later: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = delta + gamma * lam * later
        return advantage, advantage

    _, columns = jax.lax.scan(back, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    return columns.T, columns.T + values


def whiten(x: Array, mask: Array) -> jax.Array:
    """`x` shifted and scaled to mean 0 and variance 1 where `mask` is 1; 0 elsewhere."""
    share = mask / mask.sum()
    deviation = jnp.asarray(x) - (x * share).sum()
    return deviation * jax.lax.rsqrt((deviation**2 * share).sum() + 1e-8) * mask


def minibatches(rollout: Rollout, *, size: int, rng: np.random.Generator, part: tuple[int, int] = (0, 1)) -> Iterator[Rollout]:
    """Minibatches of one epoch: all rows in random order, `size` at a time. ValueError if rows are left over.

    `part=(index, count)` (`Partitioner.host_part`) takes the `index`-th of `count` equal parts of each minibatch, as one of
    several hosts that all have the whole rollout and an equal `rng`.

    >>> parts = list(minibatches(rollout, size=1, rng=np.random.default_rng(0)))
    >>> len(parts), parts[0].advantages.shape
    (2, (1, 4))
    """
    whole = jax.device_get(rollout)
    rows = len(whole.logps)
    if rows % size or size % part[1]:
        raise ValueError(f"a rollout of {rows} rows cannot be split into minibatches of {size} rows for {part[1]} hosts")
    order = rng.permutation(rows).reshape(-1, part[1], size // part[1])[:, part[0]]
    for members in order:
        yield jax.tree.map(lambda x, members=members: x[members], whole)


def ppo_step(
    state: TrainState,
    rollout: Rollout,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    clip: float,
    value_clip: float,
    value_weight: float,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of PPO (Schulman et al. 2017, eq. 7 and 9, without entropy bonus). Pure: jit, pmap or shard_map it.

    `clip`: the ratio pi/pi_old is clipped to 1 +- clip. `value_clip`: values are clipped to this distance from their old ones
    (`math.inf`: not at all). `value_weight`: weight of half the squared error of the values.

    Metrics are means over the tokens of the global batch before the update: `ratio`; `clip_share` and `value_clip_share`, the
    fraction of tokens where clipping took effect; `approx_kl`, (ratio - 1) - log ratio, an estimate of KL(pi_old || pi) per
    token that is never negative (Schulman 2020's k3); `entropy`; and `explained_variance`,
    1 - Var(returns - values) / Var(returns).

    >>> actor = with_scalar_head(model)
    >>> state = init_state(actor.init(jax.random.key(0)), tx)
    >>> step = partial(ppo_step, model=actor, tx=tx, clip=0.2, value_clip=math.inf, value_weight=0.5)
    >>> state, metrics = jax.jit(step)(state, rollout)
    >>> int(state.step), metrics["clip_share"].shape
    (1, ())
    """

    def objective(variables: Variables, rollout: Rollout) -> tuple[jax.Array, Metrics]:
        logps, values, entropy = policy_and_values(model, variables, rollout.rows)
        gains, old_values, returns = (jnp.asarray(x) for x in (rollout.advantages, rollout.values, rollout.returns))
        # Values at padding are arbitrary, and infinity times weight 0 is NaN.
        log_ratio = jnp.where(rollout.weight > 0, logps - rollout.logps, 0)
        ratio = jnp.exp(log_ratio)
        surrogate, clipped = ratio * gains, jnp.clip(ratio, 1 - clip, 1 + clip) * gains
        policy_loss = -jnp.minimum(surrogate, clipped)
        error, near = returns - values, jnp.clip(values, old_values - value_clip, old_values + value_clip)
        value_loss = 0.5 * jnp.maximum(error**2, (returns - near) ** 2)
        return policy_loss + value_weight * value_loss, {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "ratio": ratio,
            "clip_share": (clipped < surrogate).astype(ratio.dtype),
            "value_clip_share": ((returns - near) ** 2 > error**2).astype(ratio.dtype),
            "approx_kl": jnp.expm1(log_ratio) - log_ratio,
            "entropy": entropy,
            "returns": returns,
            "squared_returns": returns**2,
            "errors": error,
            "squared_errors": error**2,
        }

    state, metrics = train_step(state, rollout, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)
    unexplained = metrics.pop("squared_errors") - metrics.pop("errors") ** 2
    variance = metrics.pop("squared_returns") - metrics["returns"] ** 2
    metrics["explained_variance"] = 1 - unexplained / jnp.maximum(variance, 1e-8)
    return state, metrics


def next_kl_coef(coef: float, *, kl: float, target: float, horizon: int, samples: int) -> float:
    """The KL coefficient after a rollout of `samples` completions of mean sequence KL `kl` (Ziegler et al. 2019, section 2.2).

    It rises if the KL is above `target` (nats) and falls if it is below, by at most a fifth within `horizon` completions.

    >>> next_kl_coef(0.1, kl=6.0, target=3.0, horizon=1000, samples=100)  # 0.1 * (1 + 0.2 * 100 / 1000)
    0.10200000000000001
    """
    if not (target > 0 and 0 < samples * KL_ERROR < horizon):
        raise ValueError(
            f"target={target} must be positive and horizon={horizon} more than {KL_ERROR} x samples={samples}: "
            "a rollout that moves the coefficient further would make it negative"
        )
    error = min(max(float(kl) / target - 1, -KL_ERROR), KL_ERROR)
    return float(coef) * (1 + error * samples / horizon)


class ScoreStats(NamedTuple):
    """Running mean and deviation of all scores so far: a reward model's scale is arbitrary, and the value head starts at 0."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean


def observe(stats: ScoreStats, scores: Array) -> ScoreStats:
    """`stats` updated with `scores[n]`; the result does not depend on how scores are split (Chan, Golub, LeVeque 1979)."""
    scores = np.asarray(scores, np.float64)
    count, mean = len(scores), float(scores.mean())
    total, gap = stats.count + count, mean - stats.mean
    squares = stats.squares + float(((scores - mean) ** 2).sum()) + gap**2 * stats.count * count / total
    return ScoreStats(total, stats.mean + gap * count / total, squares)


def normalize_scores(stats: ScoreStats, scores: Array) -> np.ndarray:
    """`scores` minus the running mean, over the running standard deviation: float64[n]. `kl_coef` then has these units too."""
    deviation = math.sqrt(stats.squares / stats.count) if stats.count else 0.0
    return (np.asarray(scores, np.float64) - stats.mean) / max(deviation, 1e-8)
