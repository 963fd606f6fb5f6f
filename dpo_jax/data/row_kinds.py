"""Kinds of examples in rows (pair, ranking, single completion, demonstration, prompt), and their conversion to what is read.

A ranking of K completions converts to all of its pairs, and a pair to two single completions. There are no other conversions.
Demonstrations state no preference: only supervised fine-tuning reads them. Prompts can be read from rows of every kind.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any, Literal

from dpo_jax.data.encode import Encoded
from dpo_jax.data.format_table import Kind
from dpo_jax.data.pairs import BadRow, Cause, DataError, Preference, PreferenceSet
from dpo_jax.loss_table import RowKind, names_of

Wanted = RowKind | Literal["any", "prompts"]
"""The kind to read. "any": whatever the files contain, rankings as pairs; "prompts": the same, or prompts alone."""
_STATES = {
    "pairs": "pairs",
    "unpaired": "single completions with labels",
    "rankings": "rankings",
    "demonstrations": "texts for supervised fine-tuning",
    "prompts": "prompts alone",
}


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A prompt and its completions, best first, with `ranks`: a smaller rank is better, equal ranks are ties."""

    prompt: str
    completions: tuple[str, ...]
    ranks: tuple[float, ...]
    uid: str
    chat: bool = False
    subset: str | None = None
    notes: tuple[str, ...] = ()  # as in `Preference`, like the next field
    prompt_digest: str | None = None


Candidates = Iterable[tuple[str, Preference | Ranking | BadRow]]


def check_kind(stated: Kind, wanted: Wanted, *, where: str, remedy: str | None = None, hint: str | None = None) -> None:
    """Raises `DataError` if rows of kind `stated` cannot be read as `wanted`.

    The message names the losses that read such rows, or the `remedy` of a command without a loss. `hint`: how rows that were
    detected as prompts alone may state preferences.
    """
    if wanted in (stated, "prompts") or (wanted == "any" and stated != "prompts"):
        return
    if (stated, wanted) in (("rankings", "pairs"), ("pairs", "unpaired")):
        return
    if stated == "prompts":
        remedy = "commands that sample read them, such as `dpo-jax online`; a preference also has chosen and rejected"
        remedy += f"; {hint}" if hint else ""
    elif stated == "demonstrations":
        remedy = "`dpo-jax sft` trains on them; a preference has a better and a worse completion, such as chosen and rejected"
    elif remedy is None and stated == "pairs":
        remedy = "use the loss dpo, which is the same for two completions"
    elif remedy is None:
        remedy = f"`dpo-jax dpo` reads them with one of these as dpo.loss: {names_of(stated)}"
    needed = "completions" if wanted == "any" else _STATES[wanted]
    raise DataError(f"{where} holds {_STATES[stated]}, but {needed} are needed here: {remedy}", causes=[Cause.MISSING_COLUMN])


def preferences_of(
    candidates: Candidates, wanted: Wanted, *, best: int | None = None
) -> Iterator[tuple[str, Preference | BadRow]]:
    """Candidates of a format as preferences: a ranking of its `best` completions, or else all its pairs."""
    for uid, candidate in candidates:
        if not isinstance(candidate, Ranking):
            yield uid, candidate
        elif wanted == "rankings":
            try:
                yield uid, whole_ranking(candidate, best=best)
            except BadRow as problem:
                yield uid, problem
        else:
            yield from pairs_of_ranking(candidate)


def whole_ranking(ranking: Ranking, *, best: int | None = None) -> Preference:
    """A ranking as one preference with `between`, of its `best` completions.

    Raises `BadRow` for ties, equal completions and shorter rankings.
    """
    several, keep = ranking.completions, best or len(ranking.completions)
    if len(set(several)) < len(several):
        raise BadRow(Cause.IDENTICAL, "two completions are the same text", field="completions")
    if len(several) < keep:
        detail = f"{len(several)} completions, but the best {keep} are wanted (--data.ranking-length)"
        raise BadRow(Cause.OUT_OF_RANGE, detail, field="completions")
    compared = ranking.ranks[: keep + 1]  # with a tie at the end, either could be kept
    if len(set(compared)) < len(compared):
        raise BadRow(Cause.TIE, "two completions have the same rank, so this is not a ranking", field="completions")
    chosen, *between, rejected = several[:keep]
    return Preference(ranking.prompt, chosen, rejected, ranking.uid, between=tuple(between), **_shared(ranking))


def pairs_of_ranking(ranking: Ranking) -> Iterator[tuple[str, Preference | BadRow]]:
    """Every two completions of different rank as a pair, or the `BadRow` of equal ones. SFT trains on the best one."""
    several, ranks = ranking.completions, ranking.ranks
    for i, j in combinations(range(len(several)), 2):
        uid = f"{ranking.uid}#{i}-{j}"
        if ranks[i] == ranks[j]:
            yield uid, BadRow(Cause.TIE, f"both completions have rank {ranks[i]:g}")
            continue
        if several[i] == several[j]:
            yield uid, BadRow(Cause.IDENTICAL, "both completions are the same text", field="completions")
            continue
        target = None if several[i] == several[0] else several[0]
        yield uid, Preference(ranking.prompt, several[i], several[j], uid, target, **_shared(ranking))


def _shared(ranking: Ranking) -> dict[str, Any]:
    return {name: getattr(ranking, name) for name in ("chat", "subset", "notes", "prompt_digest")}


def split_pairs(pairs: PreferenceSet) -> PreferenceSet:
    """Each pair as two single completions: chosen is desirable, rejected is not. The report counts completions."""
    report = pairs.report.copy()
    report.read, report.kept = report.read + len(pairs), report.kept + len(pairs)
    report.notes.append("each pair is read as two single completions, one desirable and one not")
    return PreferenceSet(
        [
            dataclasses.replace(
                pair,
                uid=f"{pair.uid}#{name}",
                chosen=completion,
                rejected=completion,
                chosen_spans=spans,
                rejected_spans=spans,
                sft_target=pair.sft_target if desirable else None,
                desirable=desirable,
                unended=("chosen", "rejected") if name in pair.unended else (),
            )
            for pair in pairs
            for name, completion, spans, desirable in (
                ("chosen", pair.chosen, pair.chosen_spans, True),
                ("rejected", pair.rejected, pair.rejected_spans, False),
            )
        ],
        report,
    )


def check_ranking_lengths(rankings: Iterable[Preference | Encoded], *, where: str) -> None:
    """Raises `DataError`, with counts and the first place of each length, unless all have the same number of completions."""
    first: dict[int, str] = {}
    counts: collections.Counter[int] = collections.Counter()
    for ranking in rankings:
        number = 2 + len(ranking.between)
        first.setdefault(number, ranking.uid)
        counts[number] += 1
    if len(counts) > 1:
        found = "\n".join(
            f"  {number} completions: {counts[number]:,} rankings, first {first[number]}" for number in sorted(counts)
        )
        raise DataError(
            f"{where}: the rankings of a run must have the same number of completions:\n{found}\n"
            f"--data.ranking-length {min(counts)} keeps the best {min(counts)} of each; a larger number drops the shorter ones "
            "(--data.on-bad drop).",
            causes=[Cause.OUT_OF_RANGE],
        )
