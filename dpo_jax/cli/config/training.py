"""Options shared by all training commands, and the options of supervised fine-tuning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from dpo_jax import optimizer_table
from dpo_jax.cli.config.file import TextList
from dpo_jax.cli.config.ranges import Problem, not_negative, positive

# Optimizer, schedule and their options, with the defaults and help texts of `optimizer_table`.
_OPTIONS = {**optimizer_table.OPTIONS, **optimizer_table.SCHEDULE_OPTIONS}
OptimizerConfig: Any = dataclasses.make_dataclass(
    "OptimizerConfig",
    [
        *(("optimizer", optimizer_table.Optimizer, "rmsprop"), ("schedule", optimizer_table.Schedule, "constant")),
        *((name, option.type, option.default) for name, option in _OPTIONS.items()),
    ],
    frozen=True,
)
ALTERNATIVES = (("warmup_ratio", "warmup_steps"), ("steps", "epochs"))
"""Pairs of options that say the same in two ways: only one of them may be set."""
HIGHER = ("rewards/accuracies", "rewards/margins")
"""Held-out metrics for which higher is better."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig(OptimizerConfig):
    """Options shared by all training commands. Defaults are those of the original DPO code (RMSprop, constant rate), not of
    TRL."""

    name: ClassVar[str]  # of the section, as in the names of its options

    batch: int = 64
    """Examples per optimizer step, over all devices and microbatches: texts (sft), pairs (dpo), completions (kto)."""
    epochs: float = 1
    """Passes over the train split; 0.5 trains on a random half of it."""
    steps: int | None = None
    """Number of optimizer steps, instead of epochs; the train split is repeated as often as needed."""
    lr: float = 1e-6
    """Peak learning rate, reached after warm-up."""
    warmup_steps: int = 150
    """Optimizer steps of linear warm-up from 0."""
    warmup_ratio: float | None = None
    """Warm-up as a fraction of the run, instead of warmup_steps; rounded up to whole steps."""
    max_grad_norm: float | None = 10.0
    """Clip gradients to this global L2 norm; none: no clipping."""
    microbatches: int = 1
    """Gradient accumulation: number of parts into which a batch is split to save memory. The result is the same, except for the
    load-balancing loss of experts, which is then the mean of the parts. Losses of the whole batch (kto, aot, aot_unpaired) take
    one more forward pass."""
    trainable: TextList | None = None
    """Train only these parameters: last_layer, last_layers:N, or name patterns (final_norm.*, *.bias), separated by commas;
    none: all of them."""

    router_aux_loss: float | None = None
    """Coefficient of the load-balancing loss for mixture-of-experts models; none: router_aux_loss_coef from the model's
    config.json, if that turns on output_router_logits."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained parameters. bfloat16 halves their memory; updates are then rounded stochastically, and the
    optimizer state stays float32."""

    patience: int = 0
    """Early stopping: stop after this many evaluations in a row without improvement in stop_on, and keep the best weights; 0:
    off. run.eval_every_examples sets how often evaluations run."""
    stop_on: Literal["loss", "nll_per_token", "rewards/accuracies", "rewards/margins"] = "loss"
    """Held-out metric for patience and keep_best. nll_per_token is for sft only, rewards/... for dpo only."""
    keep_best: bool = False
    """Keep the weights of the evaluation with the best stop_on instead of the last; the run still goes to its end."""

    def optimizer_options(self) -> dict[str, Any]:
        """The values of all optimizer options."""
        return {name: getattr(self, name) for name in optimizer_table.OPTIONS}

    def schedule_options(self) -> dict[str, Any]:
        """The values of the options that the schedule reads."""
        return {name: getattr(self, name) for name in optimizer_table.SCHEDULES[self.schedule].options}

    def warmup(self, steps: int) -> int:
        """Number of warm-up steps in a run of `steps` steps."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * steps)

    def keeps_best(self) -> bool:
        """Whether the run ends with the weights of its best evaluation."""
        return self.keep_best or self.patience > 0

    def stops_on(self) -> tuple[str, ...]:
        """The evaluation metrics that `stop_on` may name."""
        return ("loss", "nll_per_token")

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "batch", "epochs", "steps", "lr", "microbatches")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            yield "max_grad_norm", f"must be greater than 0, or null for no clipping, got {self.max_grad_norm:g}"
        yield from not_negative(self, "warmup_steps", "patience", "router_aux_loss")
        yield from optimizer_table.problems({"optimizer": self.optimizer, "schedule": self.schedule, **self._options()})
        yield from self._check_length()
        if self.trainable is not None and not all(term.strip() for term in self.trainable.split(",")):
            yield "trainable", f"must be names with commas between, such as last_layer,final_norm.*, got {self.trainable!r}"
        if self.stop_on not in self.stops_on():
            yield "stop_on", f"must be one of {', '.join(self.stops_on())}, got {self.stop_on!r}"
        elif self.stop_on != "loss" and not self.keeps_best():
            yield "stop_on", "is read only with patience or keep_best: set one of them, or leave this out"
        if self.batch > 0 and self.microbatches > 0 and self.batch % self.microbatches:
            nearest = min(divisors(self.batch), key=lambda size: abs(size - self.microbatches))
            yield (
                "microbatches",
                f"must divide batch ({self.batch}), got {self.microbatches}; the nearest is {nearest}",
            )

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def _check_length(self) -> Iterator[Problem]:
        if self.steps is not None and self.epochs != 1:
            yield "steps", f"set steps or epochs, not both (epochs is {self.epochs:g}): each sets the length of the run"
        if self.warmup_ratio is None:
            return
        if not 0 <= self.warmup_ratio <= 1:
            yield "warmup_ratio", f"must be between 0 and 1, got {self.warmup_ratio}"
        if self.warmup_steps not in (0, TrainingConfig.warmup_steps):  # 0 is TRL's default beside a ratio
            yield "warmup_ratio", f"set warmup_ratio or warmup_steps, not both (warmup_steps is {self.warmup_steps})"


@dataclasses.dataclass(frozen=True)
class SftConfig(TrainingConfig):
    """Supervised fine-tuning. It gives DPO its starting policy and its reference."""

    name: ClassVar[str] = "sft"

    scored: Literal["completion", "all"] = "completion"
    """Tokens that count in the loss: those of the completion, or all (plain language modeling)."""
    loss: Literal["sum", "mean"] = "sum"
    """Negative log-likelihood summed over a completion, averaged over completions (the original code), or its mean over the
    scored tokens of a batch (TRL). It matters for max_grad_norm: a sum has the larger gradient."""


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
