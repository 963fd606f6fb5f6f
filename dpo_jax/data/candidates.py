"""Converts each row to the preference that it states, or to a `BadRow` that says why it has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from dpo_jax.data.chat import chat_completions
from dpo_jax.data.columns import Row, text
from dpo_jax.data.conversations import same_kind
from dpo_jax.data.pairs import BadRow, Cause, DataError, Preference, Spans, check_completion, check_pair, check_prompt
from dpo_jax.data.row_kinds import Ranking
from dpo_jax.untrusted import Unreadable

Rows = Iterable[tuple[str, Row]]
Candidates = Iterator[tuple[str, Preference | BadRow]]
Stated = TypeVar("Stated", Preference, Ranking)
Rankings = Iterator[tuple[str, Ranking | BadRow]]


def one_each(
    rows: Rows, preference: Callable[[str, Row], Stated], *, subset: str = "subset"
) -> Iterator[tuple[str, Stated | BadRow]]:
    """`(uid, preference(uid, row))` of each row, with its subset from the column `subset`, or the `BadRow` that it raised."""
    for uid, row in rows:
        try:
            yield uid, _with_subset(preference(uid, row), row, subset)
        except BadRow as problem:
            yield uid, problem
        except DataError:
            raise
        except Unreadable as error:  # the template's limits of time and memory: each further row might take as long
            raise DataError(f"{uid}: {Cause.CHAT_TEMPLATE}: {error}", causes=[Cause.CHAT_TEMPLATE]) from error


def _with_subset(preference: Stated, row: Row, column: str) -> Stated:
    """The preference with the subset named in a column of its row; unchanged without that column."""
    subset = row.get(column)
    if subset is None or subset == "":
        return preference
    if isinstance(subset, int) and not isinstance(subset, bool):
        return dataclasses.replace(preference, subset=str(subset))
    return dataclasses.replace(preference, subset=text(row, column))


def refuse_images(row: Row) -> None:
    """Raises `BadRow` for a row with images, in a format that would leave them out."""
    for name in ("images", "image"):
        if row.get(name):
            raise BadRow(Cause.UNREAD_COLUMN, "images are read in the format trl only", field=name)


def chat_options(row: Row) -> dict[str, Any]:
    """The columns of a row that the chat template reads besides messages."""
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}


def unread_options(row: Row) -> tuple[str, ...]:
    """Notes on such columns of a row of texts."""
    return tuple(f"{name}: not read with texts, only with messages" for name, value in chat_options(row).items() if value)


def checked(preference: Preference) -> Preference:
    """The preference itself. Raises `BadRow` as `check_pair` does."""
    check_pair(preference.prompt, preference.chosen, preference.rejected)
    return preference


def with_target(preference: Preference, target: str) -> Preference:
    """The preference with `target` as its SFT text, if that differs from the chosen completion."""
    return preference if target == preference.chosen else dataclasses.replace(preference, sft_target=target)


def completions_of(
    row: Row, completions: list[tuple[str, Any]], uid: str, tokenizer: Any
) -> tuple[str, list[str], list[Spans | None], dict[str, Any]]:
    """Prompt, completions, their spans and further fields of the preference, from named texts or messages."""
    refuse_images(row)
    prompt, sides = same_kind(row, dict(completions))
    if isinstance(prompt, list):
        found = chat_completions(prompt, sides, uid=uid, tokenizer=tokenizer, **chat_options(row))
        more = {"chat": True, "notes": found.notes, "prompt_digest": found.prompt_digest}
        return found.prompt, found.completions, found.spans, more
    prompt = text(row, "prompt")
    check_prompt(prompt)
    texts = [text(sides, name) for name in sides]
    for name, completion in zip(sides, texts, strict=True):
        check_completion(completion, field=name)
    return prompt, texts, [None] * len(texts), {"notes": unread_options(row)}
