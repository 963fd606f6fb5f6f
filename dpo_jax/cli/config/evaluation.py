"""Options of `eval` and `sample`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import TextList, is_count
from dpo_jax.cli.config.ranges import Problem, not_negative, positive


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: loss, preference accuracy with its interval, margin, displacement, and KL from samples."""

    policy: str | None = None
    """Folder or Hub id of the policy; none: dpo/export in the run directory."""
    reference: str | None = None
    """Folder or Hub id of the reference; none: the reference of dpo."""
    batch: int = 64
    """Pairs per forward pass."""
    samples: int = 64
    """Held-out prompts to sample from, to estimate the KL to the reference; 0: skip it."""
    max_new_tokens: int = 128
    """Maximum length of a sample, in tokens."""
    rewards: bool = False
    """Evaluate the implicit reward on the test split instead: by subset, calibration, length (short: --rewards)."""
    rewards_out: str | None = None
    """Output folder of --rewards; none: rewards/ in the run directory. `report` shows every folder named rewards-..."""

    def check(self) -> Iterator[Problem]:
        if self.rewards_out is not None and not self.rewards:
            yield "rewards_out", "is the folder of --rewards: set that too, or leave it out"
        yield from positive(self, "batch", "max_new_tokens")
        yield from not_negative(self, "samples")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Completions of held-out prompts, or of prompts of your own."""

    policy: str | None = None
    """Folder or Hub id of the policy; none: dpo/export in the run directory."""
    prompts: int = 8
    """Number of held-out prompts to complete."""
    prompts_file: str | None = None
    """Complete these prompts instead: a text file with one prompt per line, or .jsonl with a field "prompt" (text or
    messages) or "messages"."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Render plain-text prompts of prompts_file with the chat template, as a user turn. auto: if there is a template,
    unless the policy lies in a run that was trained on plain texts. Messages are always rendered."""
    max_new_tokens: int = 128
    """Maximum length of a completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0: greedy."""
    temperatures: TextList | None = None
    """Several temperatures instead, separated by commas, such as 0,0.25,0.5,0.75,1; all samples go into one file."""
    best_of: TextList | None = None
    """Best-of-N: keep the best of N completions by a reward. Several values, such as 1,4,16: draw the largest N, and keep
    one for each."""
    reward_model: str | None = None
    """Reward for best_of: a reward model, a folder or Hub id (of reward-model, or any with one output); none: the true reward
    (source reviews)."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Nucleus sampling: sample among the most likely tokens with this total probability; 1: all."""
    out: str | None = None
    """Write JSON Lines to this file instead of printing."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "prompts", "max_new_tokens")
        yield from not_negative(self, "temperature", "top_k")
        for field, what, good in (
            ("temperatures", "numbers of at least 0", _temperature),
            ("best_of", "whole numbers", is_count),
        ):
            if (text := getattr(self, field)) is not None and not all(good(part.strip()) for part in text.split(",")):
                yield field, f"must be {what}, separated by commas, got {text!r}"
        if self.reward_model is not None and self.best_of is None:
            yield "reward_model", "is used only with sample.best_of: set that, or leave it out"
        if not 0 < self.top_p <= 1:
            yield "top_p", f"must be above 0 and at most 1, got {self.top_p}"


def _temperature(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False
