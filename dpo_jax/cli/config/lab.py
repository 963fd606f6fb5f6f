"""Options of the experiments of the paper's section 6.1; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import is_count

OFFLINE = ("preferred-ft", "unlikelihood", "dpo", "rdpo", "ipo", "cdpo", "ppo", "ppo-gt", "best-of-n")
ONLINE = {"online": "uniform", "online-disagreement": "disagreement", "online-uncertainty": "uncertainty"}
"""Methods that ask labels for samples of their own, and their `online.elicitation`."""
METHODS = (*OFFLINE, *ONLINE)


@dataclasses.dataclass(frozen=True)
class FrontierConfig:
    """Every method of the paper against the best that is possible: true reward by KL to the reference (section 6.1)."""

    methods: str = ",".join(OFFLINE)
    """Which methods, separated by commas; also online, online-disagreement and online-uncertainty, by the options of online."""
    reward: Literal["exact", "linear", "hf"] = "exact"
    """The true reward: the rule of the generated reviews, a bag-of-words classifier (extra `lab`), or one from the Hub."""
    classifier: str | None = None
    """Folder or Hub id of a text-classification model, for reward hf (needs torch)."""
    second_reward: Literal["vader"] | None = None
    """A reward that no policy trains on, measured beside the first: vader, a published sentiment lexicon (extra `lab`)."""
    prompts: int = 2000
    """Prompts whose completions by the reference are labelled; PPO trains on the same ones."""
    completions: int = 4
    """Completions of each, all pairs of which are labelled."""
    labels: Literal["argmax", "bradley_terry"] = "bradley_terry"
    """The better completion is chosen always, or with the probability that Bradley and Terry give it (eq. 1)."""
    test_prompts: int = 256
    """Prompts on which policies are measured."""
    optimum_prompts: int = 48
    """Prompts on which the best possible frontier is estimated."""
    optimum_samples: int = 512
    """Completions by the reference of each of them: the more, the further out the optimum can be trusted."""
    max_new_tokens: int = 32
    """Longest completion, in tokens."""
    sample_batch: int = 256
    """Completions drawn at a time."""
    evaluations: int = 6
    """How often each run is measured."""
    dpo_betas: str = "0.05,0.1,1,5"
    """beta of the runs of dpo, rdpo, ipo and cdpo."""
    online_betas: str = "2,1,0.5"
    """beta of the online runs, the same in all rounds."""
    unlikelihood_alphas: str = "0.05,0.1,0.5,1"
    """alpha of the unlikelihood runs."""
    ppo_kls: str = "3,6,9,12"
    """Target KL of the ppo and ppo-gt runs, in nats a completion."""
    best_of: str = "1,4,16,64,128"
    """N of best-of-n."""
    seeds: int = 1
    """Runs of every setting; Preferred-FT has three in any case, but for --fast."""
    label_smoothing: float = 0.1
    """Assumed share of swapped labels, of cdpo."""
    length_penalty: float = 0.01
    """alpha of rdpo, length-regularised DPO: nats that a token more of a completion costs in the margin."""
    ppo_iterations: int = 40
    """Rollouts of a PPO run."""
    ppo_batch: int = 256
    """Completions of a rollout."""
    ppo_epochs: int = 4
    """Passes over a rollout."""
    ppo_minibatches: int = 4
    """Optimizer steps of such a pass."""
    ppo_lr: float = 5e-4
    """Learning rate of PPO."""
    reward_model_epochs: int = 1
    """Passes over the labelled pairs to learn the reward that PPO is given."""
    jobs: int = 1
    """Runs at a time. A small model keeps about one CPU core busy: as many as cores; on an accelerator or several hosts one."""
    fast: bool = False
    """An eighth of the prompts, a quarter of the rest and one seed, for a first look (short: --fast)."""

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
        unknown = [name for name in self.chosen() if name not in METHODS]
        if unknown or not self.chosen():
            yield "methods", f"must be some of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}"
        for field in ("dpo_betas", "online_betas", "unlikelihood_alphas", "ppo_kls", "best_of"):
            try:
                values = numbers(getattr(self, field))
            except ValueError:
                values = []
            if not values or min(values) <= 0:
                yield field, f"must be numbers above 0, separated by commas, got {getattr(self, field)!r}"
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
            yield "classifier", "names the model of frontier.reward hf, and goes with no other"

    def chosen(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",") if name.strip()]


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """One policy by PPO. Its sizes and its learning rate are the options frontier.ppo_*."""

    target_kl: float = 3.0
    """KL to the reference that the KL coefficient seeks, in nats a completion."""
    reward_model: str | None = None
    """Learned reward to train against: a folder that reward-model wrote, such as reward-model/export; none: the true one."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.target_kl <= 0:
            yield "target_kl", f"must be greater than 0, got {self.target_kl}"


def numbers(text: str) -> list[float]:
    """Raises ValueError where one of them is none."""
    return [float(part) for part in text.split(",")]
