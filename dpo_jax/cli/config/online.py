"""Options of `online`; a section of `Config`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.ranges import Problem, positive


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """Online and iterative DPO: rounds of samples of the present policy, labels, pairs and optimizer steps."""

    rounds: int = 8
    """Rounds. Iterative DPO is a few long ones."""
    prompts: int = 256
    """Prompts of a round for which labels are asked, of the frontier.prompts there are."""
    completions: int = 4
    """Completions of each."""
    pairs: Literal["best_worst", "all", "bradley_terry", "soft"] = "best_worst"
    """Pairs of them: the best against the worst; all, the better one chosen; all, chosen with the probability that Bradley and
    Terry give it (eq. 1); or soft: all, and the loss is given this probability instead of a draw, as label_smoothing."""
    steps: int | None = None
    """Optimizer steps a round; none: as many as read each of its prompts once."""
    replay: int = 1
    """Steps of a round read the pairs of the newest so many rounds, as far back as the reference has not moved. The steps of a
    round stay as many (online.steps): each pair is read in several rounds, and less often in each."""
    reward_scale: float = 1.0
    """Of pairs that are drawn or soft: rewards times this are the logits of the labels. Labels of rewards that lie many logits
    apart are all 0 or 1, and say nothing of how far. The optimum is that of the rewards at beta dpo.beta / reward_scale."""
    beta_last: float | None = None
    """beta of the last round: from dpo.beta in the first one it changes in equal ratios, so that one run passes through the
    policies of many KLs. None: dpo.beta throughout."""
    reward: Literal["known", "reward-model", "judge", "people"] = "known"
    """Who labels: frontier.reward (exact, linear, hf), a learned reward, the judge of section judge, or people on a page. The
    last two compare each two completions of a prompt, and a completion scores the share that it wins."""
    reward_model: str | None = None
    """Folder of reward-model: the reward, if that is reward-model; else the estimate of elicitation disagreement."""
    elicitation: Literal["uniform", "disagreement", "uncertainty"] = "uniform"
    """Which prompts are asked next: any; those whose completions' estimated rewards scatter most; or those whose completions
    the policy's implicit reward cannot tell apart."""
    candidates: int = 4
    """Prompts that are sampled for each that is asked, where elicitation is not uniform."""
    refresh_reference_rounds: int | None = None
    """The policy becomes the reference after every so many rounds; none: it is fixed. KL is measured to the first."""
    label_budget: int | None = None
    """Refuse a run that could ask for more labels than this: rewards of completions, or comparisons; none: any number."""

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
            yield "pairs", f"a {self.reward} label says who won, and is no reward to draw by: use best_worst or all"
        if self.reward == "reward-model" and self.reward_model is None:
            yield "reward_model", "names the folder of online.reward reward-model; dpo-jax reward-model writes one"
        if self.reward_model is not None and self.reward != "reward-model" and self.elicitation != "disagreement":
            yield "reward_model", "is read with online.reward reward-model or online.elicitation disagreement: leave it out"

    def compares(self) -> bool:
        """Whether labels are comparisons of two completions, and no rewards of one."""
        return self.reward in ("judge", "people")

    def labels_each(self) -> int:
        """Labels that a prompt takes at most."""
        return math.comb(self.completions, 2) if self.compares() else self.completions

    def pairs_each(self) -> int:
        """Pairs that a prompt gives at most."""
        return 1 if self.pairs == "best_worst" else math.comb(self.completions, 2)

    def sampled(self) -> int:
        """Prompts that a round samples completions of."""
        return self.prompts * (1 if self.elicitation == "uniform" else self.candidates)

    def batch(self, pairs: int) -> int:
        """Prompts a step, for about so many pairs."""
        return max(1, round(pairs / self.pairs_each()))

    def steps_each(self, pairs: int) -> int:
        """Optimizer steps of a round, with about so many pairs a step."""
        return self.steps or math.ceil(self.prompts / self.batch(pairs))
