"""The runs of `dpo-jax frontier`, and the settings on which their results depend."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import optimizer_table
from dpo_jax.cli.config import Config, DpoConfig, OnlineConfig
from dpo_jax.cli.config.lab import ONLINE, FrontierConfig, numbers
from dpo_jax.data.encode import with_bos
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.evals.reward_functions import LinearReward
from dpo_jax.lab.report import REFERENCE
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.lab.world import World
from dpo_jax.losses import dpo_loss, ipo_loss, length_regularized_loss, unlikelihood_loss
from dpo_jax.training.fingerprint import architecture

TO_MIX = ("dpo", "ppo-gt", "online")  # methods whose policies help to estimate the optimum,
MIX_AT = (1.5, 3.0, 6.0, 9.0)  # and KLs in nats near which their policies are chosen


def runs_of(section: FrontierConfig, *, seed: int, online: Mapping[str, Any] | None = None) -> list[Run]:
    """The runs: the reference itself, and every setting of every method but Best-of-N, which needs no training.

    `online` are the settings of the online runs (`online_settings`)."""
    seeds = range(seed, seed + section.seeds)
    of_preferred_ft = 1 if section.fast else max(3, section.seeds)

    def of(method: str, name: str, text: str, **others: Any) -> list[Run]:
        return [Run(method, f"{name} {value:g}", {name: value, **others}, s) for value in numbers(text) for s in seeds]

    of_ppo = {k: v for k, v in dataclasses.asdict(section).items() if k.startswith("ppo_") and k != "ppo_kls"}

    settings = {
        "preferred-ft": [Run("preferred-ft", "", {"alpha": 0.0}, s) for s in range(seed, seed + of_preferred_ft)],
        "unlikelihood": of("unlikelihood", "alpha", section.unlikelihood_alphas),
        **{method: of(method, "beta", section.dpo_betas) for method in ("dpo", "ipo", "cdpo")},
        "rdpo": of("rdpo", "beta", section.dpo_betas, length_penalty=section.length_penalty),
        **{method: of(method, "KL", section.ppo_kls, **of_ppo) for method in ("ppo", "ppo-gt")},
        **{
            method: [
                Run(method, f"beta {beta:g}", _of_online(online or {}, beta, how), s)
                for beta in numbers(section.online_betas)
                for s in seeds
            ]
            for method, how in ONLINE.items()
        },
    }
    return [Run(REFERENCE, "", {}, seed), *(run for method in section.chosen() for run in settings.get(method, []))]


def _of_online(settings: Mapping[str, Any], beta: float, elicitation: str) -> dict[str, Any]:
    unread = ("candidates",) if elicitation == "uniform" else ()
    return {
        **{k: v for k, v in settings.items() if k not in unread},
        "beta": beta,
        "beta_last": beta,
        "elicitation": elicitation,
    }


AS_SAMPLED = {"samples": "without EOS after those that were cut"}
"""A setting of results that rest on labeled samples. Earlier versions appended EOS to all of them."""


def shared_settings(config: Config, digest: str, world: World) -> dict[str, Any]:
    """Settings on which all results depend; a change repeats all runs. Settings of PPO alone are listed with its runs."""
    sweeps = {
        "methods",
        "dpo_betas",
        "online_betas",
        "unlikelihood_alphas",
        "length_penalty",
        "best_of",
        "seeds",
        "fast",
        "jobs",
    }
    others = {"optimum_prompts", "optimum_samples", *(k for k in dataclasses.asdict(config.frontier) if k.startswith("ppo_"))}
    options = {k: v for k, v in dataclasses.asdict(config.frontier).items() if k not in sweeps | others}
    if config.frontier.second_reward is None:  # included only if there is one, so that results without it stay valid
        del options["second_reward"]
    if config.frontier.classifier is not None:
        options["classifier"] = classifier_name(config.frontier.classifier)
    training = {
        name: getattr(config.dpo, name)
        for name in ("batch", "epochs", "lr", "optimizer", "warmup_steps", "schedule", "max_grad_norm")
    }
    # Included only if set, so that results without them stay valid.
    others = ("warmup_ratio", "trainable", *optimizer_table.OPTIONS, *optimizer_table.SCHEDULE_OPTIONS)
    training |= {name: value for name in others if (value := getattr(config.dpo, name)) != getattr(DpoConfig, name)}
    lora = {"lora": dataclasses.asdict(config.lora)} if config.lora.rank is not None else {}
    # Included only if prompts begin with BOS, so that results without it stay valid.
    bos = {"bos": True} if len(with_bos(np.zeros(0, np.int32), world.tokenizer, bos=config.data.bos)) else {}
    # Included only if it may cut samples. For whole prompts (data.truncation) it is the only limit.
    whole = config.data.max_prompt_length + config.frontier.max_new_tokens + 1 <= config.data.max_length
    whole = whole and config.data.cut != "completions"
    limit = {} if whole else {"max_length": config.data.max_length}
    limit |= {} if config.data.truncation == "keep_end" else {"truncation": config.data.truncation}
    return {
        "reference": digest,
        "architecture": architecture(world.model),
        "tokenizer": tokenizer_digest(world.tokenizer),
        "data": {
            "source": config.data.source,
            "max_prompt_length": config.data.max_prompt_length,
            **AS_SAMPLED,
            **limit,
            **bos,
            **digests_of_data(config, world),
        },
        "frontier": options,
        "training": training,
        **lora,
        "seed": config.run.seed,
        "precision": config.run.precision,
    }


def digests_of_data(config: Config, world: World) -> dict[str, str]:
    """Digests of the prompts of `world`, and of a reward that was fitted on the data. None for generated reviews, which their
    source and the seed determine."""
    if config.data.source == "reviews":
        return {}
    found = {"train prompts": world.train.digest(), "test prompts": world.test.digest()}
    if isinstance(world.reward, LinearReward):
        weights = json.dumps(world.reward, sort_keys=True)
        found["linear reward"] = hashlib.sha256(weights.encode()).hexdigest()
    return found


def classifier_name(classifier: str) -> str:
    """A machine-independent name of a classifier: its Hub id, or the SHA-256 of a folder's files."""
    folder = Path(classifier)
    if not folder.is_dir():
        return classifier
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt", ".model")):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256 {digest.hexdigest()}"


class Kept(NamedTuple):
    """A policy that a sweep has kept: `runs/<run.name>/<folder>`."""

    run: Run
    folder: str
    point: Mapping[str, float]


def to_mix(results: Sequence[Result]) -> list[Kept]:
    """Kept policies, without repeats, which with the reference cover the optimum up to the last of `MIX_AT`. An online run
    keeps some along the way: points that have `kept`."""
    ended = [result for result in results if result.run.method in TO_MIX]
    there = [Kept(r.run, "policy", r.points[-1]) for r in ended]
    there += [Kept(r.run, f"policy-{point['kept']:g}", point) for r in ended for point in r.points if "kept" in point]
    nearest = [min(there, key=lambda kept: abs(kept.point["kl"] - at)) for at in MIX_AT if there]
    return [kept for kept in there if any(kept is one for one in nearest)]


def online_settings(config: Config) -> dict[str, Any]:
    """Settings of an online run besides the shared ones, its beta, its elicitation and its seed."""
    names = ("rounds", "prompts", "completions", "pairs", "candidates")
    options = {name: getattr(config.online, name) for name in names}
    steps, batch = config.online.steps_each(config.dpo.batch), config.online.batch(config.dpo.batch)
    # Included only if set, so that results without it stay valid.
    others = ("reward_scale", "replay")
    others = {name: value for name in others if (value := getattr(config.online, name)) != getattr(OnlineConfig, name)}
    return {**options, **others, "steps": steps, "batch": batch, "row_length": config.data.row_length}


def loss_of(name: str, section: FrontierConfig) -> Callable[..., Any]:
    """The loss of a method, with its settings as keywords. Preferred-FT is unlikelihood training with alpha 0."""
    match name:
        case "dpo":
            return dpo_loss
        case "cdpo":
            return functools.partial(dpo_loss, label_smoothing=section.label_smoothing)
        case "rdpo":
            return length_regularized_loss
        case "ipo":
            return ipo_loss
        case _:
            return unlikelihood_loss
