"""Options of DPO and of its reference pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.ranges import Problem, positive
from dpo_jax.cli.config.training import TrainingConfig

BASELINES = ("unlikelihood", "preferred_ft")  # losses of the paper's baselines, which compare with no reference


@dataclasses.dataclass(frozen=True)
class RefsConfig:
    """The reference pass: log-probabilities of the frozen starting policy, computed once and cached."""

    batch: int = 64
    """Pairs a forward pass."""
    cache: str | None = None
    """Folder of the cache; none: refs/ in the run directory."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "batch")


@dataclasses.dataclass(frozen=True)
class DpoConfig(TrainingConfig):
    """Direct Preference Optimization (Rafailov et al. 2023). Defaults are the paper's."""

    policy: str | None = None
    """Folder or Hub id of the starting policy; none: sft/export in the run directory."""
    reference: str | None = None
    """Folder or Hub id of the reference; none: the starting policy. A second round may keep the reference of the first."""
    loss: Literal["dpo", "ipo", "unlikelihood", "preferred_ft"] = "dpo"
    """The paper's loss, IPO (Azar et al. 2023), or one of the paper's baselines, which know no reference."""
    beta: float = 0.1
    """Strength of the pull towards the reference; the paper uses 0.1, and 0.5 for TL;DR. Losses dpo and ipo only."""
    alpha: float | None = None
    """Weight of the rejected completion, 0 to 1; loss unlikelihood only, which needs it."""
    label_smoothing: float = 0.0
    """Assumed share of swapped labels (conservative DPO), 0 to below 0.5; loss dpo only."""
    reference_free: bool = False
    """Take a uniform reference instead of the starting policy; loss dpo only."""

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        yield from positive(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            yield "label_smoothing", f"must be at least 0 and below 0.5, got {self.label_smoothing}"
        if self.loss == "ipo" and self.label_smoothing:
            yield "label_smoothing", "IPO has no label smoothing: leave it at 0, or use loss dpo"
        if self.loss == "ipo" and self.reference_free:
            yield "reference_free", "IPO compares with the reference: leave it false, or use loss dpo"
        if self.loss in BASELINES:
            for field in ("beta", "label_smoothing", "reference_free"):
                default = getattr(DpoConfig, field)
                if getattr(self, field) != default:
                    yield field, f"loss {self.loss} has no such term: leave it at {str(default).lower()}, or use loss dpo"
        if self.loss == "unlikelihood" and self.alpha is None:
            yield "alpha", "loss unlikelihood needs it: a weight of the rejected completion between 0 and 1"
        if self.loss != "unlikelihood" and self.alpha is not None:
            yield "alpha", f"loss {self.loss} has no such weight: leave it out, or use loss unlikelihood"
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            yield "alpha", f"must be between 0 and 1, got {self.alpha}"
