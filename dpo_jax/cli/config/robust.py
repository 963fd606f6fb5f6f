"""Options of the robustness experiments; a section of `Config`. Sizes and sweeps come from section frontier."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import TextList, is_count
from dpo_jax.cli.config.lab import numbers

LOSSES = ("dpo", "cdpo", "robust", "ipo")


@dataclasses.dataclass(frozen=True)
class RobustConfig:
    """Robustness experiments: label noise, prompt shift (test prompts unlike the training prompts), over-optimization."""

    experiment: Literal["noise", "shift", "overoptimization"] = "noise"
    """noise: flipped labels; shift: other prompts in testing; overoptimization: true and learned reward as KL grows."""
    flip_rates: TextList = "0,0.1,0.2,0.3"
    """noise: fractions of the training labels that are flipped."""
    losses: TextList = ",".join(LOSSES)
    """noise: losses to run at every beta: dpo, cdpo (conservative), robust, ipo. cdpo and robust are given the flip rate."""
    topics: TextList = "acting,plot"
    """shift: topics of the first family of prompts; the second family has the other topics."""
    widths: TextList = "64,96"
    """overoptimization: hidden sizes of the models, each with its own SFT; the rest of section model applies to all of them."""
    train_prompts: TextList = "1000,4000,16000"
    """overoptimization: numbers of prompts whose labeled pairs are trained on, the first ones of frontier.prompts."""

    def check(self) -> Iterator[tuple[str, str]]:
        try:
            rates = self.rates()
        except ValueError:
            rates = []
        if not rates or not all(0 <= rate < 0.5 for rate in rates) or len(set(rates)) < len(rates):
            yield "flip_rates", f"must be different shares in [0, 0.5), separated by commas, got {self.flip_rates!r}"
        if not self.chosen() or set(self.chosen()) - set(LOSSES) or len(set(self.chosen())) < len(self.chosen()):
            yield "losses", f"must be some of {', '.join(LOSSES)}, each once, separated by commas, got {self.losses!r}"
        for field in ("widths", "train_prompts"):
            parts = [part.strip() for part in getattr(self, field).split(",")]
            if not all(is_count(part) for part in parts) or len(set(map(int, parts))) < len(parts):
                yield field, f"must be different whole numbers above 0, separated by commas, got {getattr(self, field)!r}"

    def rates(self) -> list[float]:
        return numbers(self.flip_rates)

    def chosen(self) -> list[str]:
        return [name.strip() for name in self.losses.split(",") if name.strip()]

    def family(self) -> list[str]:
        return [name.strip() for name in self.topics.split(",") if name.strip()]

    def counts(self, field: str) -> list[int]:
        """The whole numbers of `widths` or `train_prompts`."""
        return [int(part) for part in getattr(self, field).split(",")]
