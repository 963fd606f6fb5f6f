"""Joins the completions of a policy and of a baseline by prompt.

Completions kept plus completions dropped equals completions read, and every dropped one is listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_jax.data.completion_files import Completion
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.judge.questions import Pair

OVER_LIMIT = "over judge.limit"


@dataclasses.dataclass
class RowCounts:
    """Account of one side's completions: kept, and dropped by cause."""

    read: int
    kept: int
    dropped: dict[str, list[str]]  # cause -> where

    def check(self) -> None:
        lost = sum(map(len, self.dropped.values()))
        if self.kept + lost != self.read:
            raise AssertionError(f"read {self.read} completions, but {self.kept} kept and {lost} dropped")


class Paired(NamedTuple):
    pairs: list[Pair]
    policies: dict[str, RowCounts]  # by series
    baseline: RowCounts


def pair_up(
    policies: Mapping[str, Sequence[Completion]], baseline: Sequence[Completion], *, limit: int | None = None
) -> Paired:
    """Pairs every completion of `policies` (keyed by series) with the baseline's completion of the same prompt.

    For the baseline, the first completion of a prompt is used, and the first `limit` of its prompts that a policy has. Raises
    `DataError` if a policy has two completions of a prompt at one point, and if no pair is left.
    """
    completed = {one.prompt for completions in policies.values() for one in completions}
    answers: dict[str, Completion] = {}
    dropped: dict[str, list[str]] = {}
    over: set[str] = set()
    for one in baseline:
        if one.prompt not in completed:
            cause = "no policy has this prompt"
        elif one.prompt in answers:
            cause = "repeated prompt"
        elif one.prompt in over or len(answers) == limit:
            cause = OVER_LIMIT
            over.add(one.prompt)
        else:
            answers[one.prompt] = one
            continue
        dropped.setdefault(cause, []).append(one.where)
    paired = Paired([], {}, RowCounts(len(baseline), len(answers), dropped))
    for series, completions in policies.items():
        _refuse_repeats(series, completions)
        pairs, lost = [], {}
        for one in completions:
            if one.prompt in answers:
                point = "" if one.at is None else f"{one.at:g}:"
                uid = f"{series}:{point}{one.where.rpartition(':')[2]}"
                pairs.append(Pair(uid, series, one.at, one.prompt, one.text, answers[one.prompt].text))
            else:
                lost.setdefault(OVER_LIMIT if one.prompt in over else "the baseline lacks this prompt", []).append(one.where)
        paired.pairs.extend(pairs)
        paired.policies[series] = RowCounts(len(completions), len(pairs), lost)
    for book in (paired.baseline, *paired.policies.values()):
        book.check()
    if not paired.pairs:
        raise DataError("no prompt is in both: policy and baseline must be given the same prompts", causes=[Cause.NO_ROWS])
    return paired


def _refuse_repeats(series: str, completions: Sequence[Completion]) -> None:
    seen: dict[tuple[float | None, str], str] = {}
    for one in completions:
        first = seen.setdefault((one.at, one.prompt), one.where)
        if first != one.where:
            detail = f"{one.where}: completes the prompt of {first} again; --judge.by COLUMN tells the points of a series apart"
            raise DataError(f"{series}: {detail}", causes=[Cause.BAD_LAYOUT])
