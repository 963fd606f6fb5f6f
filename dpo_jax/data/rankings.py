"""Parser of rankings: a prompt and several completions, with their order."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from dpo_jax.data.candidates import Rankings, Rows, completions_of, one_each
from dpo_jax.data.columns import Row, column, number, text
from dpo_jax.data.pairs import BadRow, Cause
from dpo_jax.data.row_kinds import Ranking

MAX_ANSWERS = 1000  # per question: they form half a million pairs
_TEXTS = ("text", "response", "answer", "completion")  # fields of a completion that is an object,
_ORDERS = {"rank": "ranks", **dict.fromkeys(("score", "overall_score", "rating", "reward"), "scores")}  # and those of its place


def ranked(rows: Rows, *, tokenizer: Any = None) -> Rankings:
    """Rankings: `completions`, best first, or in any order with `ranks` (1 is the best) or `scores`.

    A completion may also be an object with its text and its rank or score, as in Nectar and UltraFeedback.
    """

    def ranking(uid: str, row: Row) -> Ranking:
        row = _without_objects(row)
        several = column(row, "completions")
        if not isinstance(several, list):
            detail = f"expected a list of completions, got {type(several).__name__}"
            raise BadRow(Cause.WRONG_TYPE, detail, field="completions")
        if len(several) < 2:
            raise BadRow(
                Cause.NO_PAIR, f"a ranking has at least two completions, but this one has {len(several)}", field="completions"
            )
        if len(several) > MAX_ANSWERS:
            raise BadRow(
                Cause.OUT_OF_RANGE, f"{len(several):,} completions, but the limit is {MAX_ANSWERS:,}", field="completions"
            )
        ranks = _ranks(row, len(several))
        named = [(f"completions.{i}", completion) for i, completion in enumerate(several)]
        prompt, texts, spans, more = completions_of(row, named, uid, tokenizer)
        for (name, _), parts in zip(named, spans, strict=True):
            if parts is not None:
                detail = "a completion of several turns, but in a ranking each has one, the assistant's answer"
                raise BadRow(Cause.TOO_LONG, detail, field=name)
        order = sorted(range(len(texts)), key=lambda i: ranks[i])
        return Ranking(prompt, tuple(texts[i] for i in order), tuple(ranks[i] for i in order), uid, **more)

    return one_each(rows, ranking)


def _ranks(row: Row, count: int) -> list[float]:
    """The rank of each completion (lower is better): by `ranks`, by `scores`, or by order."""
    found: dict[str, list[float]] = {}
    for field, sign in (("ranks", 1), ("scores", -1)):
        values = row.get(field)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != count:
            what = f"a list of {len(values)}" if isinstance(values, list) else type(values).__name__
            raise BadRow(Cause.WRONG_TYPE, f"expected a list of {count} numbers, got {what}", field=field)
        items = {str(i): value for i, value in enumerate(values)}
        found[field] = [sign * number(items, name, inside=f"{field}.") for name in items]
    if len(found) == 2 and any(
        (a - b) * (c - d) < 0 for (a, c), (b, d) in combinations(zip(found["ranks"], found["scores"], strict=True), 2)
    ):
        raise BadRow(Cause.OUT_OF_RANGE, "ranks and scores put the completions in different orders", field="ranks, scores")
    return next(iter(found.values()), [float(i + 1) for i in range(count)])


def is_ranked(completion: Any) -> bool:
    """Whether a value is an object with the text of a completion and its rank or score."""
    return is_object(completion) and any(name in completion for name in _TEXTS) and any(name in completion for name in _ORDERS)


def is_object(completion: Any) -> bool:
    """Whether a completion is an object and not a message."""
    return isinstance(completion, Mapping) and not {"role", "from"} & completion.keys()


def _without_objects(row: Row) -> Row:
    """The row with the texts of completions that are objects, and with their `ranks` or `scores` unless it has its own."""
    several = row.get("completions")
    if not isinstance(several, list) or not several or not all(map(is_object, several)):
        return row
    texts = []
    for place, one in enumerate(several):
        name = next((name for name in _TEXTS if name in one), _TEXTS[0])
        texts.append(text(one, name, inside=f"completions.{place}."))
    if any(row.get(name) is not None for name in _ORDERS.values()):
        return {**row, "completions": texts}
    key = next((key for key in _ORDERS if all(one.get(key) is not None for one in several)), None)
    if key is None:
        detail = f"these objects do not all have one of {', '.join(_ORDERS)}, which would rank them"
        raise BadRow(Cause.MISSING_COLUMN, detail, field="completions")
    order = [number(one, key, inside=f"completions.{place}.") for place, one in enumerate(several)]
    return {**row, "completions": texts, _ORDERS[key]: order}
