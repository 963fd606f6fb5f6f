"""Options of DPO and of its reference pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from dpo_jax import loss_table
from dpo_jax.cli.config.ranges import Problem, not_negative, positive
from dpo_jax.cli.config.training import HIGHER, TrainingConfig


@dataclasses.dataclass(frozen=True)
class RefsConfig:
    """The reference pass: log-probabilities under the frozen reference model, computed once and cached."""

    batch: int = 64
    """Pairs per forward pass."""
    cache: str | None = None
    """Cache folder; none: refs/ in the run directory."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "batch")


# All loss options, with the defaults and help texts of `loss_table`.
LossConfig: Any = dataclasses.make_dataclass(
    "LossConfig",
    [("loss", str, "dpo"), *((name, option.type, option.default) for name, option in loss_table.OPTIONS.items())],
    frozen=True,
)


@dataclasses.dataclass(frozen=True)
class DpoConfig(LossConfig, TrainingConfig):
    """Direct Preference Optimization (Rafailov et al. 2023) and other preference losses. Defaults are those of the original
    DPO code (RMSprop, constant rate), not of TRL."""

    name: ClassVar[str] = "dpo"

    policy: str | None = None
    """Starting policy, a folder or Hub id; "model": the one at model.path; none: sft/export in the run directory."""
    reference: str | None = None
    """Reference model, a folder or Hub id; none: the starting policy. A second round can keep the reference of the first."""

    ld_alpha: float = 1.0
    """LD-DPO: weight (0 to 1) of tokens beyond the length of the pair's shorter completion; 1: all tokens count alike."""

    refresh_reference_steps: int | None = None
    """TR-DPO, hard update: every N steps the current policy becomes the reference for training. Held-out pairs are still
    measured against the first reference."""

    eval_samples: int = 0
    """Also complete this many held-out prompts at each evaluation, with at most eval.max_new_tokens tokens. Written to the
    folder samples, one file per evaluation; their length and repetition are metrics. 0: none."""

    def loss_options(self) -> dict[str, Any]:
        """The values of all loss options."""
        return {name: getattr(self, name) for name in loss_table.OPTIONS}

    def stops_on(self) -> tuple[str, ...]:
        return ("loss", *HIGHER)

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if not 0 <= self.ld_alpha <= 1:
            yield "ld_alpha", f"must be between 0 and 1, got {self.ld_alpha}"
        if self.ld_alpha != 1 and loss_table.rows_of(self.loss) != "pairs":
            yield "ld_alpha", f"compares lengths within a pair, and loss {self.loss} does not read pairs: leave it at 1"
        elif self.ld_alpha != 1 and (term := loss_table.likelihood_term(self.loss)):
            yield "ld_alpha", f"would weigh the tokens of the likelihood in {term} as well: leave it at 1, or leave out {term}"
        yield from positive(self, "refresh_reference_steps")
        yield from not_negative(self, "eval_samples")
        yield from self._check_refresh()
        yield from loss_table.problems(self.loss, self.loss_options())

    def _check_refresh(self) -> Iterator[Problem]:
        if self.refresh_reference_steps is None:
            return
        with contextlib.suppress(ValueError):  # an unknown loss is reported by name
            if self.reference_free or not loss_table.uses_reference(self.loss):
                why = "reference_free is set" if self.reference_free else f"loss {self.loss} has no reference"
                yield "refresh_reference_steps", f"{why}, so there is nothing to refresh: leave it out"
