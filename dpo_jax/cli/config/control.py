"""Options of `control`, preference learning for control; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import TextList, is_count
from dpo_jax.cli.config.ranges import Problem, not_negative, positive

METHODS = ("sft", "cpl", "p-iql", "percent-bc")
PREFERENCES = ("regret", "return")


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """Contrastive Preference Learning (CPL) and baselines: a Gaussian policy from preferences between trajectory segments."""

    world: Literal["lqr", "pendulum"] = "lqr"
    """Environment: lqr, linear-quadratic control with an exact optimum; or pendulum, Gymnasium's Pendulum-v1 (extra
    `control`)."""
    methods: TextList = ",".join(METHODS)
    """Methods to run, separated by commas: sft, cpl, p-iql, percent-bc."""
    preferences: TextList = ",".join(PREFERENCES)
    """Score behind the preferences: regret, return (of the segment), or both, separated by a comma."""
    temperature: float = 1.0
    """A segment is preferred with probability sigmoid(difference of scores / temperature); 0: the better one always is."""
    segments: int = 8000
    """Number of trajectory segments."""
    length: int = 16
    """Steps per segment."""
    comparisons: int = 1
    """How many other segments each segment is compared with."""
    discount: float = 0.95
    """Discount factor gamma of the environment, of regret and of CPL's scores."""
    hidden: TextList | None = None
    """Sizes of the policy's hidden layers, separated by commas; none: an affine policy, the only kind that lqr takes."""
    std: float | None = None
    """Standard deviation of the policy; none: a covariance is learned. Actions of pendulum lie within [-1, 1]."""
    alpha: float = 0.1
    """Temperature of CPL, and of the maximum-entropy optimum of lqr."""
    lam: float = 1.0
    """lambda of CPL(lambda): weight of the rejected segment; 1, or less to stay near the data."""
    lr: float = 3e-3
    """Learning rate of all methods (Adam)."""
    sft_steps: int = 500
    """Steps of SFT before CPL."""
    steps: int = 2000
    """Steps of CPL after its SFT; the other methods take as many steps as both together."""
    reward_steps: int = 1000
    """Steps of P-IQL's reward model, before the rest."""
    batch: int = 128
    """Pairs of segments per step, for CPL and the reward model."""
    transitions: int = 512
    """Transitions per step, for SFT, percent-BC and P-IQL."""
    expectile: float = 0.7
    """Expectile of P-IQL's value function."""
    beta: float = 3.0
    """Inverse temperature of the policy's weights in P-IQL."""
    share: float = 0.1
    """Fraction of the segments that percent-BC clones: the best by true score."""
    evaluations: int = 5
    """Number of evaluations per run."""
    episodes: int = 100
    """pendulum: episodes per evaluation."""
    seeds: int = 3
    """Runs per method, each with its own segments and preferences."""
    jobs: int = 2
    """Runs at a time; on several devices always one."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "segments", "length", "comparisons", "std", "alpha", "lr", "sft_steps", "steps")
        yield from positive(self, "reward_steps", "batch", "transitions", "beta", "evaluations", "episodes", "seeds", "jobs")
        yield from not_negative(self, "temperature")
        for field, known in (("methods", METHODS), ("preferences", PREFERENCES)):
            chosen = self.chosen(field)
            if not chosen or set(chosen) - set(known) or len(set(chosen)) < len(chosen):
                yield field, f"must be some of {', '.join(known)}, separated by commas, got {getattr(self, field)!r}"
        if self.hidden is not None and not all(is_count(part.strip()) for part in self.hidden.split(",")):
            yield "hidden", f"must be whole numbers above 0, separated by commas, or null, got {self.hidden!r}"
        if self.world == "lqr" and self.hidden is not None:
            yield "hidden", "must be null in the world lqr: costs are exact only for affine policies"
        if self.world == "pendulum" and self.episodes == 1:
            yield "episodes", "must be at least 2: the interval of a return is over episodes"
        if self.segments < 2:
            yield "segments", "must be at least 2: they are compared"
        if self.world == "pendulum" and self.length > 200:
            yield "length", f"must be at most 200, the steps of an episode of pendulum, got {self.length}"
        for field in ("discount", "expectile", "share"):
            if not 0 < getattr(self, field) < 1:
                yield field, f"must be between 0 and 1, got {getattr(self, field)}"
        if not 0 < self.lam <= 1:
            yield "lam", f"must be above 0 and at most 1, got {self.lam}"

    def chosen(self, field: str) -> list[str]:
        """The names in `methods` or `preferences`."""
        return [name.strip() for name in getattr(self, field).split(",") if name.strip()]

    def widths(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.hidden.split(",")) if self.hidden is not None else ()
