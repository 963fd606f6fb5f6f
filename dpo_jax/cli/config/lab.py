"""Options of the experiments of the paper's section 6.1; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import TextList, is_count

OFFLINE = ("preferred-ft", "unlikelihood", "dpo", "rdpo", "ipo", "cdpo", "ppo", "ppo-gt", "best-of-n")
ONLINE = {"online": "uniform", "online-disagreement": "disagreement", "online-uncertainty": "uncertainty"}
"""Methods that ask labels for samples of their own, and their `online.elicitation`."""
METHODS = (*OFFLINE, *ONLINE)


@dataclasses.dataclass(frozen=True)
class FrontierConfig:
    """Reward-KL frontier (section 6.1): true reward by KL to the reference, for every method of the paper and the optimum."""

    methods: TextList = ",".join(OFFLINE)
    """Methods to run, separated by commas; also online, online-disagreement and online-uncertainty, which read section
    online."""
    reward: Literal["exact", "linear", "hf"] = "exact"
    """True reward: exact, the rule of the generated reviews; linear, a bag-of-words classifier (extra `lab`); hf, one from
    the Hub."""
    classifier: str | None = None
    """Folder or Hub id of a text-classification model, for reward hf (needs torch)."""
    second_reward: Literal["vader"] | None = None
    """A reward that no policy trains on, measured beside the first: vader, a published sentiment lexicon (extra `lab`)."""
    prompts: int = 2000
    """Prompts for which the reference writes completions that are labeled; PPO trains on the same prompts."""
    completions: int = 4
    """Completions per prompt; all their pairs are labeled."""
    labels: Literal["argmax", "bradley_terry"] = "bradley_terry"
    """argmax: the better completion is always chosen; bradley_terry: with its Bradley-Terry probability (eq. 1)."""
    test_prompts: int = 256
    """Prompts on which policies are evaluated."""
    optimum_prompts: int = 48
    """Prompts on which the optimal frontier is estimated."""
    optimum_samples: int = 512
    """Reference completions for each of these prompts; more of them extend the KL range in which the estimate can be
    trusted."""
    max_new_tokens: int = 32
    """Maximum length of a completion, in tokens."""
    sample_batch: int = 256
    """Completions drawn at a time."""
    evaluations: int = 6
    """Number of evaluations per run."""
    dpo_betas: TextList = "0.05,0.1,1,5"
    """beta of the dpo, rdpo, ipo and cdpo runs."""
    online_betas: TextList = "2,1,0.5"
    """beta of the online runs, the same in all rounds."""
    unlikelihood_alphas: TextList = "0.05,0.1,0.5,1"
    """alpha of the unlikelihood runs."""
    ppo_kls: TextList = "3,6,9,12"
    """Target KL of the ppo and ppo-gt runs, in nats per completion."""
    best_of: TextList = "1,4,16,64,128"
    """Values of N for best-of-n."""
    seeds: int = 1
    """Runs per setting; Preferred-FT always has three, except with --fast."""
    label_smoothing: float = 0.1
    """cdpo: assumed fraction of swapped labels."""
    length_penalty: float = 0.01
    """alpha of rdpo (length-regularized DPO): penalty in the margin, in nats per token."""
    ppo_iterations: int = 40
    """PPO: rollouts per run."""
    ppo_batch: int = 256
    """PPO: completions per rollout."""
    ppo_epochs: int = 4
    """PPO: passes over a rollout."""
    ppo_minibatches: int = 4
    """PPO: optimizer steps per pass."""
    ppo_lr: float = 5e-4
    """PPO: learning rate."""
    reward_model_epochs: int = 1
    """Epochs of reward-model training."""
    jobs: int = 1
    """Runs at a time. A small model keeps about one CPU core busy, so as many as cores; on an accelerator or several hosts
    one."""
    fast: bool = False
    """Quick first look: an eighth of the prompts, a quarter of the rest and one seed (short: --fast)."""

    def check(self) -> Iterator[tuple[str, str]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and field.name != "label_smoothing"
                and value <= 0
            ):
                yield field.name, f"must be greater than 0, got {value}"
        chosen = self.chosen()
        wrong = [name for number, name in enumerate(chosen) if name not in METHODS or name in chosen[:number]]
        if wrong or not chosen:
            yield "methods", f"must be some of {', '.join(METHODS)}, each once, got {', '.join(wrong) or 'none'}"
        for field in ("dpo_betas", "online_betas", "unlikelihood_alphas", "ppo_kls", "best_of"):
            try:
                values = numbers(getattr(self, field))
            except ValueError:
                values = []
            # Runs are named after them, with six digits.
            if not values or min(values) <= 0 or len({f"{value:g}" for value in values}) < len(values):
                yield field, f"must be different numbers above 0, separated by commas, got {getattr(self, field)!r}"
            elif field == "unlikelihood_alphas" and max(values) > 1:
                yield field, f"alpha is at most 1, got {max(values)}"
        if self.best_of and any(not is_count(part.strip()) for part in self.best_of.split(",")):
            yield "best_of", f"must be whole numbers, got {self.best_of!r}"
        if self.ppo_minibatches > 0 and self.ppo_batch % self.ppo_minibatches:
            yield "ppo_minibatches", f"must divide ppo_batch ({self.ppo_batch}), got {self.ppo_minibatches}"
        if self.completions == 1:
            yield "completions", "must be at least 2: a pair needs two"
        if not 0 <= self.label_smoothing < 0.5:
            yield "label_smoothing", f"must be at least 0 and below 0.5, got {self.label_smoothing}"
        if (self.reward == "hf") != (self.classifier is not None):
            yield "classifier", "is the model of frontier.reward hf: set both, or neither"

    def chosen(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",") if name.strip()]


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """Trains one policy with PPO. Sizes and learning rate are the options frontier.ppo_*."""

    target_kl: float = 3.0
    """KL to the reference that the adaptive KL coefficient aims for, in nats per completion."""
    reward_model: str | None = None
    """Learned reward to train against: a reward model, a folder or Hub id (reward-model/export, or any with one output); none:
    the true reward."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.target_kl <= 0:
            yield "target_kl", f"must be greater than 0, got {self.target_kl}"


def numbers(text: str) -> list[float]:
    """The numbers in a text, separated by commas. Raises ValueError where one is not a number."""
    return [float(part) for part in text.split(",")]
