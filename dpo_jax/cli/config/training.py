"""Options that every training command has, and those of supervised fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.ranges import Problem, not_negative, positive

Optimizer = Literal["rmsprop", "adamw"]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What every training command has. Defaults are the paper's."""

    batch: int = 64
    """Texts (sft) or pairs (dpo) an optimizer step."""
    epochs: int = 1
    """Passes over the train split."""
    lr: float = 1e-6
    """Learning rate after warm-up."""
    optimizer: Optimizer = "rmsprop"
    """RMSprop as in the original (decay 0.99, eps 1e-8), or AdamW."""
    warmup_steps: int = 150
    """Optimizer steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear"] = "constant"
    """After warm-up the learning rate stays, as in the original, or falls on a line to 0 at the end of the run."""
    max_grad_norm: float = 10.0
    """Gradients are scaled down to this global L2 norm."""
    microbatches: int = 1
    """Parts into which a batch is split to save memory; the result is the same. On one device parts of padding cost nothing."""
    trainable: str | None = None
    """Train only these: last_layer, last_layers:N, or patterns of parameter names (final_norm.*, *.bias), with commas between;
    none: all of them."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "batch", "epochs", "lr", "max_grad_norm", "microbatches")
        yield from not_negative(self, "warmup_steps")
        if self.trainable is not None and not all(term.strip() for term in self.trainable.split(",")):
            yield "trainable", f"must be names with commas between, such as last_layer,final_norm.*, got {self.trainable!r}"
        if self.batch > 0 and self.microbatches > 0 and self.batch % self.microbatches:
            nearest = min(divisors(self.batch), key=lambda size: abs(size - self.microbatches))
            yield (
                "microbatches",
                f"must divide batch: {self.batch} do not split into {self.microbatches} equal parts; the nearest is {nearest}",
            )


@dataclasses.dataclass(frozen=True)
class SftConfig(TrainingConfig):
    """Supervised fine-tuning: the policy, and the reference of DPO."""

    scored: Literal["completion", "all"] = "completion"
    """Tokens the loss counts: those of the completion, or all (plain language modelling)."""


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
