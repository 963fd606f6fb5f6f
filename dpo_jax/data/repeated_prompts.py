"""Completions that repeat their prompt: it is removed where a data set writes its rows so."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_jax.data.columns import Row
from dpo_jax.data.format_table import FORMATS
from dpo_jax.data.pairs import BadRow, Cause

_SIDES = ("chosen", "rejected", "completion", "completions", "response_0", "response_1")


class RepeatedPrompts:
    """Removes the prompt from the beginning of completions if all first rows repeat it there, or nine in ten of at least ten.

    Conversations stay as they are.
    """

    def __init__(self, format: str, first: Sequence[Row]) -> None:
        reads = FORMATS[format].reads
        self._sides = [name for name in _SIDES if name in reads] if "prompt" in reads else []
        found = [repeats for row in first if (repeats := self._repeats(row)) is not None and not self._is_only_prompt(row)]
        self._share = f"{sum(found)} of the first {len(found)} rows"
        self._removed = bool(found) and (all(found) or (len(found) >= 10 and 10 * sum(found) >= 9 * len(found)))
        self.rows = self.count = 0  # rows of texts, and those that repeat their prompt

    def row(self, row: Row) -> Row:
        """The row, with its prompt once. Raises `BadRow` for a row that does not repeat its prompt although others do."""
        repeats = self._repeats(row)
        if repeats is None:
            return row
        self.rows += 1
        self.count += repeats
        if not self._removed:
            return row
        if not repeats:
            detail = f"{self._share} repeat their prompt in the completions, where it is removed, but this one does not"
            raise BadRow(Cause.DIFFERENT_PROMPTS, f"{detail}; write all rows alike", field=", ".join(self._sides))
        return {**row, **{name: _without(row[name], row["prompt"]) for name in self._sides}}

    def notes(self) -> list[str]:
        """Notes for the report on rows that repeat their prompt."""
        if not self.count:
            return []
        if self._removed:
            return [f"the prompt is removed from the completions of all {self.count} rows, which repeat it"]
        return [f"{self.count} of {self.rows} rows repeat their prompt in the completions; they are left unchanged"]

    def _repeats(self, row: Row) -> bool | None:
        """Whether all completions of a row begin with its prompt; None if they are not texts."""
        prompt, sides = row.get("prompt"), [row.get(name) for name in self._sides]
        values = [value for side in sides for value in (side if isinstance(side, list) else [side])]
        texts = [value for value in values if isinstance(value, str)]
        if not texts or len(texts) < len(values) or not isinstance(prompt, str) or not prompt.strip():
            return None
        return all(text.lstrip().startswith(prompt.strip()) for text in texts)

    def _is_only_prompt(self, row: Row) -> bool:
        """Whether nothing follows the prompt in any completion: such a row does not tell how the others are written."""
        return all(str(row[name]).strip() == row["prompt"].strip() for name in self._sides)


def _without(side: str | list[str], prompt: str) -> str | list[str]:
    if isinstance(side, list):
        return [str(_without(text, prompt)) for text in side]
    text = side.lstrip()
    cut = prompt.lstrip() if text.startswith(prompt.lstrip()) else prompt.strip()
    return text.removeprefix(cut)
