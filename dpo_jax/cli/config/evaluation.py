"""Options of `eval` and `sample`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import is_count
from dpo_jax.cli.config.ranges import Problem, not_negative, positive


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: loss, preference accuracy with its interval, margin, displacement, and KL from samples."""

    policy: str | None = None
    """Folder or Hub id of the policy; none: dpo/export in the run directory."""
    reference: str | None = None
    """Folder or Hub id of the reference; none: that of dpo."""
    batch: int = 64
    """Pairs a forward pass."""
    samples: int = 64
    """Held-out prompts to sample from for the KL to the reference; 0: leave it out."""
    max_new_tokens: int = 128
    """Longest sample, in tokens."""
    rewards: bool = False
    """Instead judge the implicit reward on the test split: by subset, calibration, length (short: --rewards)."""
    rewards_out: str | None = None
    """Folder of --rewards; none: rewards/ in the run directory. `report` shows each whose name begins with rewards-."""

    def check(self) -> Iterator[Problem]:
        if self.rewards_out is not None and not self.rewards:
            yield "rewards_out", "is the folder of --rewards: set that too, or leave it out"
        yield from positive(self, "batch", "max_new_tokens")
        yield from not_negative(self, "samples")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Completions of held-out prompts, or of your own."""

    policy: str | None = None
    """Folder or Hub id of the policy; none: dpo/export in the run directory."""
    prompts: int = 8
    """Held-out prompts to complete."""
    prompts_file: str | None = None
    """Complete these prompts instead: a text file with one a line, or .jsonl with a field "prompt" (a text, or messages) or
    "messages"."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Whether the chat template renders a text of prompts_file as a user's turn; auto: if there is a template, and the policy
    does not lie in a run that was trained on plain texts. Messages are always rendered."""
    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    temperatures: str | None = None
    """Several instead, separated by commas, such as 0,0.25,0.5,0.75,1: one after the other into one file."""
    best_of: str | None = None
    """Keep the best of so many completions by a reward; several, such as 1,4,16: draw the most, and keep one for each."""
    reward_model: str | None = None
    """The reward of best_of: a folder that reward-model wrote; none: the true one (source reviews)."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability; 1: all."""
    out: str | None = None
    """Write JSON Lines here instead of printing."""

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
            yield "reward_model", "chooses among the completions of best_of: set that, or leave it out"
        if not 0 < self.top_p <= 1:
            yield "top_p", f"must be above 0 and at most 1, got {self.top_p}"


def _temperature(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False
