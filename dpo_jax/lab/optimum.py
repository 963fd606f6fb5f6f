"""The optimal reward-KL frontier, estimated on a world's prompts from completions of the reference and of trained policies."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.evals.frontier import Optimum, mixture_log_ratios, optimum
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.world import SECOND, Prompts, World
from dpo_jax.runtime import hosts
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Variables
from dpo_jax.untrusted import Unreadable, reading
from dpo_jax.writing import write_whole

BETAS = tuple(float(beta) for beta in np.geomspace(100.0, 0.05, 118))


class Drawn(NamedTuple):
    """Scores of completions drawn from one policy, M for each of P prompts."""

    rewards: np.ndarray  # float64[P, M]
    logps: np.ndarray  # float64[P, M, C], nats, under each policy of the mixture
    beside: np.ndarray | None  # float64[P, M], the second reward, if any
    learned: np.ndarray | None = None  # float64[P, M], a learned reward of the reference's own, if any


Keep = Callable[[int, Callable[[], Drawn]], Drawn]
"""(number of the policy, function that draws and scores its completions) -> the result, new or kept from before."""


def estimate(
    world: World,
    prompts: Prompts,
    *,
    samples: int,
    policies: Sequence[Variables],
    seed: int,
    learned: Reward | None = None,
    keep: Keep = lambda number, draw: draw(),
) -> tuple[Optimum, Drawn]:
    """The optimum, and the scores of the reference's own completions, for Best-of-N.

    Half of the completions come from the reference, the others in equal parts from `policies`: the reference alone reaches only
    about log M nats. Importance weights correct for the mixture. `learned` also scores the reference's own completions, for
    Best-of-N. `keep`: see `kept_in`.
    """
    drawn_from = [world.reference, *policies]
    counts = [samples, *[max(1, samples // len(policies))] * len(policies)] if policies else [samples]
    second = world.beside.get(SECOND)

    def draw(number: int) -> Drawn:
        variables, count = drawn_from[number], counts[number]
        repeated = prompts.repeated(count)
        scored = world.sample(variables, repeated, jax.random.fold_in(jax.random.key(seed), number))
        drawn, shape = scored.completions, (len(prompts.ids), count)
        under = [  # the policy that drew them already gave their log-probabilities
            drawn.logps.astype(np.float64) if policy is variables else world.logps(policy, repeated.ids, drawn.ids)
            for policy in drawn_from
        ]
        beside = None if second is None else second(repeated.texts, drawn.texts).reshape(shape)
        judged = None if learned is None or number else learned(repeated.texts, drawn.texts).reshape(shape)
        return Drawn(scored.rewards.reshape(shape), np.stack(under, axis=-1).reshape(*shape, len(drawn_from)), beside, judged)

    found = [keep(number, lambda number=number: draw(number)) for number in range(len(drawn_from))]
    shares = np.array(counts) / sum(counts)
    log_ratios = mixture_log_ratios(np.concatenate([one.logps for one in found], axis=1), list(shares))
    others = [one.beside for one in found if one.beside is not None]
    beside = np.concatenate(others, axis=1) if others else None
    rewards = np.concatenate([one.rewards for one in found], axis=1)
    with reported("estimating the optimum", brief=True):
        return optimum(rewards, BETAS, seed=seed, log_ratios=log_ratios, beside=beside), found[0]


def kept_in(folder: Path, identity: Mapping[str, Any], *, say: Callable[[str], None], learned: bool = False) -> Keep:
    """A `Keep` with a file for each policy in `folder`. Files with another `identity` or with damage (reported) are made again,
    and the reference's if it lacks a `learned` reward.

    With several hosts, which share the folder, the first one writes; if any host cannot read a file, all draw again.
    """
    known = json.dumps(identity, sort_keys=True)

    def earlier(file: Path, number: int) -> Drawn | None:
        try:
            with reading(file), np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
                if str(found["identity"]) == known and ("learned" in found or number or not learned):
                    beside = found.get("beside"), found.get("learned") if learned else None
                    return Drawn(found["rewards"], found["logps"], *beside)
        except FileNotFoundError:
            pass
        except Unreadable as error:
            say(f"sampled again, as it is damaged: {error}")
        return None

    def keep(number: int, draw: Callable[[], Drawn]) -> Drawn:
        file = folder / f"{number}.npz"
        found = earlier(file, number)
        if not hosts.anywhere(found is None) and found is not None:
            return found
        drawn, buffer = draw(), io.BytesIO()
        if hosts.is_first():
            arrays = {name: array for name, array in drawn._asdict().items() if array is not None}
            np.savez(buffer, identity=np.array(known), **arrays)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, buffer.getvalue())
        return drawn

    return keep


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
        **_second(found),
    }


def _second(found: Optimum) -> Mapping[str, object]:
    if found.beside is None:
        return {}
    low, high = found.beside.band
    values = {"": found.beside.reward, "_low": low, "_high": high}
    return {f"{SECOND}{end}": value.tolist() for end, value in values.items()} | {f"{SECOND}_reference": found.beside.reference}
