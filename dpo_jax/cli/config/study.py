"""Options of the study with people (appendix D.3 of the paper); sections of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A web page for blind human ratings: people say which of two completions is better."""

    a: str | None = None
    """Completions of the first method: JSON Lines with "prompt" and "completion", as sample.out writes them."""
    b: str | None = None
    """Completions of the second method for the same prompts."""
    name_a: str = "policy"
    """Name of the first method in the key and in the table; raters never see it."""
    name_b: str = "baseline"
    """Name of the second method."""
    task: Literal["summary", "dialogue"] = "summary"
    """What is compared. It sets the question (from appendix C.2), and the names of prompt and completions on the page."""
    question: str | None = None
    """Ask this question instead."""
    title: str = "Which one is better?"
    """Title of the page. It should not reveal what is studied."""
    items: int | None = None
    """Number of comparisons, drawn at random; none: all."""
    raters: int = 1
    """Number of lists of comparisons, one per person. If there is only one list, any number of people may rate it."""
    twice: float | None = None
    """Fraction of the comparisons (0 to 1) that appear in two lists, to measure agreement; none: all, if there are two
    lists."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.raters < 1:
            yield "raters", f"must be at least 1, got {self.raters}"
        if self.items is not None and self.items < 1:
            yield "items", f"must be at least 1, got {self.items}"
        if self.twice is not None and not 0 <= self.twice <= 1:
            yield "twice", f"must be a share between 0 and 1, got {self.twice}"
        if self.twice is not None and self.raters == 1:
            yield "twice", "needs several lists: set study.raters to at least 2, or leave it out"
        if self.name_a == self.name_b:
            yield "name_b", f"must differ from name_a, got {self.name_b!r} for both"
        for field in ("name_a", "name_b", "title", "question"):
            value = getattr(self, field)
            if value is not None and not value.strip():
                yield field, "must not be empty"

    def missing(self) -> Iterator[tuple[str, str]]:
        for field in ("a", "b"):
            if getattr(self, field) is None:
                yield field, f"name a file of completions: dpo-jax sample CONFIG --sample.out FILE, then --study.{field} FILE"

    def share_twice(self) -> float:
        return self.twice if self.twice is not None else float(self.raters > 1)


@dataclasses.dataclass(frozen=True)
class AgreeConfig:
    """Table 2 of the paper: win rates by people and by judges, and how often they agree."""

    key: str | None = None
    """Key file of the study; none: study/key.json in the run directory."""
    ratings: str | None = None
    """Saved ratings: files separated by commas, or a folder of them; none: study/ratings in the run directory."""
    judge: str | None = None
    """Judge verdicts: FILE or NAME=FILE, separated by commas; none: judge/pairs.jsonl in the run directory, if it exists."""
    beside: str | None = None
    """Run directories, separated by commas, whose agree/agreement.json is printed beside this one, one column each."""

    def check(self) -> Iterator[tuple[str, str]]:
        for field in ("key", "ratings", "judge", "beside"):
            value = getattr(self, field)
            if value is not None and not all(part.strip() for part in value.split(",")):
                yield field, f"names nothing between two commas, or nothing at all: {value!r}"
