"""Options of the robustness experiments; a section of `Config`. Sizes and sweeps are those of section frontier."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import is_count
from dpo_jax.cli.config.lab import numbers

LOSSES = ("dpo", "cdpo", "robust", "ipo")


@dataclasses.dataclass(frozen=True)
class RobustConfig:
    """What goes wrong with preferences: flipped labels, other prompts than those trained on, too much optimisation."""

    experiment: Literal["noise", "shift", "overoptimisation"] = "noise"
    """Flipped labels; other prompts in testing; or true and learned reward as KL grows."""
    flip_rates: str = "0,0.1,0.2,0.3"
    """Of noise: shares of the training labels that are flipped."""
    losses: str = ",".join(LOSSES)
    """Of noise: some of dpo, cdpo (conservative), robust, ipo, at every beta. cdpo and robust are told the share of flips."""
    topics: str = "acting,plot"
    """Of shift: what prompts of the first family are about; those of the second are about the other topics."""
    widths: str = "64,96"
    """Of overoptimisation: widths of the models, each with its own SFT; the rest of section model is theirs, too."""
    train_prompts: str = "1000,4000,16000"
    """Of overoptimisation: prompts whose labelled pairs are learned from, the first of those that frontier.prompts counts."""

    def check(self) -> Iterator[tuple[str, str]]:
        try:
            rates = self.rates()
        except ValueError:
            rates = []
        if not rates or not all(0 <= rate < 0.5 for rate in rates) or len(set(rates)) < len(rates):
            yield "flip_rates", f"must be different shares in [0, 0.5), separated by commas, got {self.flip_rates!r}"
        if not self.chosen() or set(self.chosen()) - set(LOSSES):
            yield "losses", f"must be some of {', '.join(LOSSES)}, separated by commas, got {self.losses!r}"
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
