"""The best frontier there is, estimated on the prompts of a world from completions of the reference and of trained policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dpo_jax.evals.frontier import Optimum, mixture_log_ratios, optimum
from dpo_jax.lab.world import Prompts, World
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Variables

BETAS = tuple(float(beta) for beta in np.geomspace(100.0, 0.05, 118))


def estimate(
    world: World, prompts: Prompts, *, samples: int, policies: Sequence[Variables], seed: int
) -> tuple[Optimum, np.ndarray]:
    """The optimum, and the rewards float64[P, M] of the reference's own completions, for Best-of-N.

    Half of the completions are the reference's, the others come in equal parts from `policies`: the reference alone reaches
    about log M nats. Each is weighed by what the reference would have drawn.
    """
    drawn_from = [world.reference, *policies]
    counts = [samples, *[max(1, samples // len(policies))] * len(policies)] if policies else [samples]
    rewards, logps = [], []
    for number, (variables, count) in enumerate(zip(drawn_from, counts, strict=True)):
        repeated = prompts.repeated(count)
        scored = world.sample(variables, repeated, jax.random.fold_in(jax.random.key(seed), number))
        rewards.append(scored.rewards.reshape(len(prompts.ids), count))
        drawn = scored.completions  # what drew them knows their log-probabilities already
        under = [
            drawn.logps.astype(np.float64) if policy is variables else world.logps(policy, repeated.ids, drawn.ids)
            for policy in drawn_from
        ]
        logps.append(np.stack(under, axis=-1).reshape(len(prompts.ids), count, len(drawn_from)))
    shares = np.array(counts) / sum(counts)
    log_ratios = mixture_log_ratios(np.concatenate(logps, axis=1), list(shares))
    with reported("estimating the optimum", brief=True):
        return optimum(np.concatenate(rewards, axis=1), BETAS, seed=seed, log_ratios=log_ratios), rewards[0]


def to_json(found: Optimum) -> Mapping[str, object]:
    return {
        "beta": found.beta.tolist(),
        "kl": found.kl.tolist(),
        "reward": found.reward.tolist(),
        "reward_low": found.band[0].tolist(),
        "reward_high": found.band[1].tolist(),
        "effective_share": found.ess.tolist(),
        "trusted": found.trusted.tolist(),
        "samples": found.samples,
        "reference": found.reference,
    }
