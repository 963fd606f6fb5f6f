"""Options of `online`; a section of `Config`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.dpo import DpoConfig
from dpo_jax.cli.config.ranges import Problem, positive


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """Online and iterative DPO: rounds of sampling from the current policy, labeling, pairing and optimizer steps."""

    rounds: int = 8
    """Number of rounds. Iterative DPO has a few long ones."""
    prompts: int = 256
    """Prompts per round for which labels are requested, out of the frontier.prompts available."""
    completions: int = 4
    """Completions per prompt."""
    pairs: Literal["best_worst", "all", "bradley_terry", "soft"] = "best_worst"
    """How pairs are formed. best_worst: the best against the worst completion; all: all pairs, the better one chosen;
    bradley_terry: all pairs, chosen with their Bradley-Terry probability (eq. 1); soft: all pairs, with this probability
    passed to the loss as label_smoothing instead of a draw."""
    steps: int | None = None
    """Optimizer steps per round; none: as many as read each of its prompts once."""
    replay: int = 1
    """Replay buffer in rounds: each round trains on the pairs of the newest N rounds since the reference last moved. The
    number of steps per round (online.steps) stays the same, so each pair is read in several rounds, and less often in each."""
    reward_scale: float = 1.0
    """Scale of the rewards behind bradley_terry and soft labels: reward times this is the logit. If rewards lie many logits
    apart, all labels are 0 or 1. The optimum is the same as with unscaled rewards and beta dpo.beta / reward_scale."""
    beta_last: float | None = None
    """beta of the last round. beta changes geometrically from dpo.beta in the first round, so that one run passes through
    policies at many KLs; none: dpo.beta throughout."""
    reward: Literal["known", "reward-model", "judge", "people"] = "known"
    """Source of labels: known, frontier.reward (exact, linear, hf); reward-model, a learned reward; judge, as in section
    judge; people, on a web page. Judge and people compare every two completions of a prompt; a completion's score is its
    share of wins."""
    reward_model: str | None = None
    """A reward model, a folder or Hub id: the reward, if online.reward is reward-model; otherwise the estimate for elicitation
    disagreement."""
    elicitation: Literal["uniform", "disagreement", "uncertainty"] = "uniform"
    """Which prompts to label next. uniform: any; disagreement: those whose completions' estimated rewards vary most;
    uncertainty: those whose completions the policy's implicit reward separates least."""
    candidates: int = 4
    """Prompts sampled for each prompt labeled, if elicitation is not uniform."""
    refresh_reference_rounds: int | None = None
    """The policy becomes the reference every N rounds; none: the reference is fixed. KL is always measured to the first one."""
    label_budget: int | None = None
    """Refuse a run that could request more labels than this (rewards of completions, or comparisons); none: no limit."""

    def check(self) -> Iterator[Problem]:
        numbers = ("rounds", "prompts", "steps", "replay", "candidates", "refresh_reference_rounds", "label_budget")
        yield from positive(self, *numbers, "completions")
        if self.completions == 1:
            yield "completions", "must be at least 2: a pair needs two"
        if not self.reward_scale > 0:
            yield "reward_scale", f"must be greater than 0, got {self.reward_scale}"
        if self.reward_scale != 1 and self.pairs not in ("bradley_terry", "soft"):
            yield "reward_scale", f"changes nothing with pairs {self.pairs}: leave it out"
        if self.beta_last is not None and not self.beta_last > 0:
            yield "beta_last", f"must be greater than 0, got {self.beta_last}"
        yield from self._check_reward()
        if self.refresh_reference_rounds is not None and self.refresh_reference_rounds >= self.rounds > 0:
            yield "refresh_reference_rounds", f"there are {self.rounds} rounds, so the reference would never move: leave it out"
        most = self.rounds * self.prompts * self.labels_each()
        if self.label_budget is not None and 0 < self.label_budget < most:
            fits = max(1, self.label_budget // (self.rounds * self.labels_each()))
            yield (
                "label_budget",
                f"{self.rounds} rounds x {self.prompts} prompts x {self.labels_each()} labels are {most:,}, more than "
                f"{self.label_budget:,}; lower online.prompts to {fits}, or online.rounds or online.completions",
            )

    def _check_reward(self) -> Iterator[Problem]:
        if self.reward == "people" and self.completions != 2:
            yield "completions", f"people compare one pair a prompt, so they need 2 completions, got {self.completions}"
        if self.pairs in ("bradley_terry", "soft") and self.compares():
            yield (
                "pairs",
                f"a {self.reward} label says who won, and gives no reward to draw by: use best_worst or all",
            )
        if self.reward == "reward-model" and self.reward_model is None:
            yield "reward_model", "names the folder of online.reward reward-model; dpo-jax reward-model writes one"
        if self.reward_model is not None and self.reward != "reward-model" and self.elicitation != "disagreement":
            yield "reward_model", "is read with online.reward reward-model or online.elicitation disagreement: leave it out"

    def compares(self) -> bool:
        """Whether labels compare two completions, rather than score one."""
        return self.reward in ("judge", "people")

    def labels_each(self) -> int:
        """The most labels that one prompt takes."""
        return math.comb(self.completions, 2) if self.compares() else self.completions

    def pairs_each(self) -> int:
        """The most pairs that one prompt gives."""
        return 1 if self.pairs == "best_worst" else math.comb(self.completions, 2)

    def sampled(self) -> int:
        """Prompts per round for which completions are sampled."""
        return self.prompts * (1 if self.elicitation == "uniform" else self.candidates)

    def batch(self, pairs: int) -> int:
        """Prompts per step, for about `pairs` pairs per step."""
        return max(1, round(pairs / self.pairs_each()))

    def steps_each(self, pairs: int) -> int:
        """Optimizer steps per round, with about `pairs` pairs per step."""
        return self.steps or math.ceil(self.prompts / self.batch(pairs))

    def training(self, dpo: DpoConfig) -> DpoConfig:
        """Section `dpo` with the length of all rounds together."""
        return dataclasses.replace(dpo, steps=self.rounds * self.steps_each(dpo.batch), epochs=1)
