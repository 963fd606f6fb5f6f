"""Setup of the robustness experiments: prompts, labeled pairs, learned rewards, and training methods."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import Config
from dpo_jax.cli.experiment import encode_samples, labeled_samples, make_world, of_training, prompts_of
from dpo_jax.cli.frontier_runs import AS_SAMPLED, classifier_name, digests_of_data
from dpo_jax.cli.ppo_setup import first_kl_coef, ppo_method
from dpo_jax.cli.robust.runs import families
from dpo_jax.data.encode import Encoded
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.methods import PairData, PairMethod, pair_data
from dpo_jax.lab.ppo import PpoMethod
from dpo_jax.lab.reward_model import accuracy_words, learn_reward
from dpo_jax.lab.sweep import Run
from dpo_jax.lab.world import Points, Prompts, Scored, World
from dpo_jax.training.fingerprint import architecture
from dpo_jax.types import Variables

Measure = Callable[[Variables], dict[str, float]]
_SHARED = (
    *("reward", "classifier", "prompts", "completions", "labels", "test_prompts", "max_new_tokens"),
    *("reward_model_epochs", "evaluations"),
)
_SHARED_DATA = ("source", "max_length", "max_prompt_length", "truncation", "bos")


class Setup:
    """A world and its experiment's `folder`. Results shared by several runs are made once, under `making`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder, self.making = config, folder, threading.RLock()
        self.world, digests = make_world(config, train="prompts", test="test_prompts")
        self.shared = shared_settings(config, digests["start"], self.world)

    def labeled(self, world: World, name: str) -> Sequence[Encoded]:
        """Labeled pairs of the reference's completions of the training prompts, also written to `pairs/<name>.jsonl`."""
        file = self.folder / "pairs" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        preferences, _ = labeled_samples(self.config, world, world.train, file, key=of_training(self.config))
        return encode_samples(self.config, preferences, world.tokenizer)

    def data(self, world: World, pairs: Sequence[Encoded]) -> PairData:
        training = self.config.dpo
        return pair_data(world, pairs, batch=training.batch, microbatches=training.microbatches)

    def method(self, world: World, data: PairData, loss: Callable[..., Any], *, passes: float = 1.0) -> PairMethod:
        """Training on pairs for `passes` times the epochs of section dpo."""
        training = self.config.dpo
        epochs = passes * training.epochs
        return PairMethod(world, data, loss=loss, tx=build.make_tx(training, steps=data.steps(epochs)), epochs=epochs)

    def reward_model(self, world: World, pairs: Sequence[Encoded], name: str, *, passes: float = 1.0) -> Reward:
        """A reward learned from pairs in `passes` times `frontier.reward_model_epochs`, kept in
        `reward_models/<name>-<digest>`. An interrupted training continues."""
        section = self.config.frontier
        # Included only if there are others, so that results of one stay valid.
        fingerprint = {**self.shared, "pairs": name} | ({} if passes == 1 else {"passes": passes})
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        reward, figures = learn_reward(
            world,
            pairs,
            self.folder / "reward_models" / f"{name}-{digest[:8]}",
            make_tx=functools.partial(build.make_tx, self.config.dpo),
            batch=self.config.dpo.batch,
            epochs=passes * section.reward_model_epochs,
            evaluations=section.evaluations,
            seed=self.config.run.seed,
            fingerprint=fingerprint,
            make_state=world.begin,
            microbatches=self.config.dpo.microbatches,
            bos=self.config.data.bos,
        )
        print(f"reward model of {name}: {accuracy_words(figures)}", flush=True)
        return reward

    def ppo(self, world: World) -> PpoMethod:
        return ppo_method(self.config, world)

    def train_ppo(
        self, method: PpoMethod, run: Run, folder: Path, reward: Reward, *, evaluations: int, measure: Measure | None = None
    ) -> tuple[Points, Variables]:
        """PPO on a reward with the target KL `run.settings["KL"]`."""
        target = run.settings["KL"]
        options = {"target_kl": target, "kl_coef": first_kl_coef(target), "evaluations": evaluations, "seed": run.seed}
        return method.train(folder, reward=reward, measure=measure, **options)

    def reference_samples(self, world: World) -> tuple[Prompts, Scored]:
        """`frontier.optimum_samples` reference completions for each of `frontier.optimum_prompts` held-out prompts."""
        prompts = prompts_of(self.config, "optimum_prompts", world.tokenizer).repeated(self.config.frontier.optimum_samples)
        # A different key from those of the training samples and of the evaluation samples.
        return prompts, world.sample(world.reference, prompts, jax.random.key(self.config.run.seed + 2))


def shared_settings(config: Config, digest: str, world: World) -> dict[str, Any]:
    """Settings on which all results depend; a change repeats all runs. Settings of single runs are listed with the runs."""
    training = [option.removeprefix("dpo.") for option in COMMANDS["robust"].reads if option.startswith("dpo.")]
    options = {name: getattr(config.frontier, name) for name in _SHARED}
    if config.frontier.classifier is not None:
        options["classifier"] = classifier_name(config.frontier.classifier)
    # Every run of `shift` is tested on both families. The order of the topics does not matter.
    shift = config.robust.experiment == "shift"
    families_tested = {"families": {name: sorted(set(of)) for name, of in families(config).items()}} if shift else {}
    return {
        "reference": digest,
        "architecture": architecture(world.model),
        "tokenizer": tokenizer_digest(world.tokenizer),
        "data": {name: getattr(config.data, name) for name in _SHARED_DATA} | digests_of_data(config, world) | AS_SAMPLED,
        "frontier": options,
        "training": {name: getattr(config.dpo, name) for name in training if name != "policy"},
        "lora": dataclasses.asdict(config.lora),
        "seed": config.run.seed,
        "precision": config.run.precision,
        **families_tested,
    }


def per_prompt(values: np.ndarray, samples: int) -> np.ndarray:
    """Values of concatenated samples, the same number for each prompt, as float64[P, samples]."""
    return np.asarray(values, np.float64).reshape(-1, samples)
