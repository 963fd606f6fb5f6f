"""Options of `dialogue`, the multi-turn experiment; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import TextList
from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.config.ranges import Problem, positive

METHODS = ("dpo", "online", "preferred-ft", "myopic", "dpo-limit")


@dataclasses.dataclass(frozen=True)
class DialogueConfig:
    """A question game of three turns: preferences between whole conversations, compared with the enumerated optimum."""

    methods: TextList = ",".join(METHODS)
    """Methods to run, separated by commas: dpo (on conversations); online (the same, in rounds); preferred-ft; myopic (dpo
    on single turns, each by its own reward); dpo-limit (the limit of dpo with endless pairs, computed)."""
    betas: TextList = "0.3,0.6"
    """beta of the dpo, online, myopic and dpo-limit runs."""
    starts: int = 64
    """Starts from each of the twelve openings."""
    completions: int = 4
    """Conversations from each start; the user thinks of a different object in each."""
    pairs: Literal["best_worst", "all", "bradley_terry"] = "bradley_terry"
    """How pairs are formed from them, as in online.pairs; dpo-limit always takes bradley_terry."""
    rounds: int = 4
    """Rounds of online; they share the starts and the steps of dpo."""
    test: int = 240
    """Sampled conversations that check the exact measures."""
    sample_batch: int = 256
    """Conversations drawn at a time, and texts scored at a time."""
    evaluations: int = 2
    """Number of evaluations per run; online is evaluated after each round."""
    seeds: int = 3
    """Runs per setting, each on its own conversations."""
    jobs: int = 1
    """Runs at a time: as many as there are CPU cores; on an accelerator one."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "starts", "rounds", "test", "sample_batch", "evaluations", "seeds", "jobs")
        if self.completions < 2:
            yield "completions", f"must be at least 2, as a pair needs two, got {self.completions}"
        if not self.chosen() or set(self.chosen()) - set(METHODS) or len(set(self.chosen())) < len(self.chosen()):
            yield "methods", f"must be some of {', '.join(METHODS)}, each once, separated by commas, got {self.methods!r}"
        if 0 < self.starts < self.rounds and "online" in self.chosen():
            yield "rounds", f"cannot divide {self.starts} starts; lower it, or raise dialogue.starts"
        try:
            values = numbers(self.betas)
        except ValueError:
            values = []
        if not values or min(values) <= 0 or len(set(values)) < len(values):
            yield "betas", f"must be different numbers above 0, separated by commas, got {self.betas!r}"

    def chosen(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",") if name.strip()]
