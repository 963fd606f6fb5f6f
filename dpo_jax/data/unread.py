"""Columns that a format does not read but that may hold the prompt or a system text, and the option to read them.

TRL's implicit prompt is the common beginning of chosen and rejected. If the real prompt is in another column, only the answers'
common first words would be used, so such a row is refused.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpo_jax.data.column_map import ColumnMap
from dpo_jax.data.columns import ColumnType, Row, shown_names
from dpo_jax.data.conversations import text_of
from dpo_jax.data.format_table import FORMATS
from dpo_jax.data.rankings import is_ranked
from dpo_jax.data.roles import role_of

# Words in column names, most likely first.
PROMPT = (
    *("prompt", "prompts", "instruction", "instructions", "question", "questions", "query", "queries", "problem", "request"),
    *("conversations", "conversation", "messages", "dialogue", "dialog", "history", "turns", "user", "human"),
    *("inputs", "input", "context", "contexts", "passage", "document", "article", "post", "text"),
)
CONTEXT = {"context", "contexts", "passage", "document", "article", "background"}
CHOSEN = {"chosen", "preferred", "better", "accepted", "accept", "winner", "winning", "win", "positive", "pos", "good"}
REJECTED = {"rejected", "reject", "dispreferred", "worse", "loser", "losing", "lose", "negative", "neg", "bad"}
_ANSWER = {"answer", "response", "completion", "output", "reply", "text", "message", "messages", "content", "summary", "side"}
OTHER_SIDES = CHOSEN | REJECTED | _ANSWER - {"text", "messages", "message", "content"}
_ANSWERS = _ANSWER | {"answers", "responses", "completions", "outputs", "replies", "candidates"}
# Metadata columns: `prompt_id`, `chosen_model`, `score_a`.
_ABOUT = {
    *("id", "ids", "uid", "uuid", "idx", "index", "hash", "key", "name", "dataset", "model", "models", "url", "link", "path"),
    *("score", "scores", "rating", "ratings", "rank", "margin", "reward", "quality", "confidence", "weight", "num", "count"),
    *("date", "time", "timestamp", "created", "updated", "at", "year", "version", "split", "subset", "fold", "status", "order"),
    *("lang", "language", "category", "categories", "topic", "topics", "tag", "tags", "type", "kind", "label", "labels"),
    *("domain", "domains", "level", "difficulty", "reason", "rationale", "explanation", "feedback", "critique", "comment"),
    *("annotator", "annotators", "annotation", "annotations", "labelling", "labeling", "evolved", "raw", "license", "author"),
    *("meta", "metadata", "length", "len", "tokens", "truth", "gold", "reference", "solution", "target", "generations"),
    *("generation", "is", "has", "judge", "format", "provenance", "origin", "file"),
}

_TRL = FORMATS["trl"].reads


def unread(row: Row, format: str, mapped: ColumnMap) -> list[str]:
    """Columns of a mapped row that hold a system text, or possibly the prompt, and that `format` does not read."""
    reads = FORMATS[format].reads
    if not row.keys() >= {*FORMATS[format].told_by}:
        return []
    found = _systems(row, mapped, format)
    if not _infers_prompt(format) or is_filled(row.get("prompt")) or "prompt" in mapped.columns or not is_implicit(row):
        return found
    others = [name for name in row if name not in reads and name not in found and not is_about(name)]
    return found + [name for name in others if _may_be_prompt(name, row[name])]


def prompts_and_systems(names: Sequence[str], types: Mapping[str, ColumnType], format: str) -> list[str]:
    """The columns of a file that must be decoded to know whether they hold a prompt or a system text."""
    implicit = _infers_prompt(format) and "prompt" not in names
    others = [name for name in names if implicit and not is_about(name)]
    likely = [name for name in others if types.get(name) == "text" or _rank(name) is not None]
    return list(dict.fromkeys([*filter(is_system, names), *likely]))


def _infers_prompt(format: str) -> bool:
    """Whether the prompt is the common beginning of chosen and rejected where no column holds it."""
    return {"prompt", "chosen", "system"} <= FORMATS[format].reads.keys()


def refusal(found: Sequence[str], row: Row, format: str, mapped: ColumnMap) -> str:
    """Message: why a row with the `unread` columns `found` is refused, and the option that reads them."""
    systems = {name for name in found if is_system(name)}
    prompts = [name for name in found if name not in systems]
    none = {"prompt": ""} if prompts else {}
    none |= {"system": ""} if systems else {}
    what = " and ".join([*(["the prompt"] if prompts else []), *(["a system text"] if systems else [])])
    option = suggestion(row, mapped)
    if ("chosen" not in row or not _infers_prompt(format)) and systems == {found[0]}:
        option = None if set(",+") & set(found[0]) else option_of(mapped, {"system": found[0]})
    if systems and _begins_with_system(row, format):
        option = None
        what += ", while the messages begin with another one"
    elif systems and "system" not in FORMATS[format].reads:
        option = f"--data.format hh_chat {option}" if format == "hh" and option else None
    reads = f"{option} reads" if option else "give messages to read" if systems else "rename the column to read"
    left = [name for name in found if option and name not in option]  # for example earlier turns in `history`
    it = "it" if len(found) == 1 else "them"
    if left:
        it = f"{shown_names(name for name in found if name not in left)}, but not {shown_names(left)} (give messages instead)"
    then = " (the prompt is then the common beginning of chosen and rejected)" if prompts else ""
    return f"not read, and may hold {what}: {shown_names(found)}; {reads} {it}, {option_of(mapped, none)} goes without{then}"


def suggestion(row: Row, mapped: ColumnMap) -> str | None:
    """The value of `--data.columns` that reads a mapped row as a preference; None if its columns suggest none."""
    found: dict[str, str] = {}
    for key, words in (("chosen", CHOSEN), ("rejected", REJECTED)):
        if key not in row and (name := _side(row, words)):
            found[key] = name
    if not found and row.keys() >= {"response_j", "response_k"}:  # StackExchange pairs
        found = {"chosen": "response_j", "rejected": "response_k"}
    if not {*row, *found} >= {"chosen", "rejected"}:
        return None
    if (
        not is_filled(row.get("prompt"))
        and "prompt" not in mapped.columns
        and (is_implicit(row) or found)
        and (prompt := _prompt(row))
    ):
        found = {"prompt": prompt} | found
    if systems := _systems(row, mapped, "trl"):
        found["system"] = systems[0]
    named = [name for names in ColumnMap.of(found).columns.values() for name in names]
    return option_of(mapped, found) if found and "," not in "".join(named) and row.keys() >= {*named} else None


def remedy_for_lists(row: Row, mapped: ColumnMap) -> str | None:
    """How to read a mapped row whose completions are in one list: two texts, or objects with text and rank or score."""
    prompt = {} if is_filled(row.get("prompt")) or "prompt" in mapped.columns else {"prompt": _prompt(row)}
    for name, value in row.items():
        if not isinstance(value, list) or len(value) < 2 or set(",+") & set(name) or None in prompt.values():
            continue
        if all(map(is_ranked, value)):
            named = prompt if name == "completions" else prompt | {"completions": name}
            return f"{option_of(mapped, named)} reads them as rankings" if named else None
        if len(value) == 2 and all(isinstance(text, str) for text in value) and _ANSWERS & {*words_of(name)}:
            sides = {"chosen": f"{name}.0", "rejected": f"{name}.1"}
            return f"{option_of(mapped, prompt | sides)} reads them, if the first of two is the better"
    return None


def option_of(mapped: ColumnMap, more: Mapping[str, str | None]) -> str:
    """The option `--data.columns` with `more` added to what is mapped."""
    text = ",".join(filter(None, [str(mapped), *(f"{key}={name}" for key, name in more.items())]))
    return f"--data.columns {shlex.quote(text)}"


def _systems(row: Row, mapped: ColumnMap, format: str) -> list[str]:
    """The columns with a system text, unless one is mapped or the text is also in the conversation."""
    if "system" in mapped.columns:
        return []
    return [name for name in row if is_system(name) and is_filled(row[name]) and not _said(row, row[name], format)]


def _side(row: Row, words: Collection[str]) -> str | None:
    """The column whose name is a variant of chosen or rejected: `Chosen`, `answer_chosen`, `non_preferred_output`."""
    for name, value in row.items():
        told = set(words_of(name))
        negated = bool(told & {"non", "not"})
        side = REJECTED if told & REJECTED or (told & CHOSEN and negated) else CHOSEN if told & CHOSEN else None
        if side is words and told <= {"non", "not", *CHOSEN, *REJECTED, *_ANSWER} and is_filled(value):
            return name
    return None


def _prompt(row: Row) -> str | None:
    """The columns that hold the prompt, as written in the option: `instruction+input`."""
    names = [name for name in row if name not in _TRL and not is_system(name) and not is_about(name)]
    ranked = sorted((rank, name) for name in names if (rank := _rank(name)) is not None and is_filled(row[name]))
    if not ranked:
        return next((name for name in names if _may_be_prompt(name, row[name])), None)
    best = ranked[0][1]
    if not isinstance(row[best], str):
        return best
    texts = [name for name in names if isinstance(row[name], str) and name != best]
    before = [name for name in texts if set(words_of(name)) & CONTEXT]
    after = [name for name in texts if words_of(name) in (("input",), ("inputs",))]
    return "+".join([*before[:1], best, *after[:1]])


@functools.lru_cache(maxsize=2**14)  # called for every row
def words_of(name: str) -> tuple[str, ...]:
    """The words of a column's name in lower case: `promptText`, `prompt-text` and `Prompt Text` have two."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+", name[:200]))


def _rank(name: str) -> int | None:
    ranks = [PROMPT.index(word) for word in words_of(name) if word in PROMPT]
    return min(ranks, default=None)


@functools.lru_cache(maxsize=2**14)
def is_about(name: str) -> bool:
    words = words_of(name)
    return bool(set(words) & (_ABOUT | OTHER_SIDES)) or words[-1:] in (("source",), ("sources",))


def is_metadata(name: str) -> bool:
    """Whether a column is named like a fact about the row: `prompt_id`, `score`; `response` is not."""
    return bool(set(words_of(name)) & _ABOUT)


@functools.lru_cache(maxsize=2**14)
def is_system(name: str) -> bool:
    words = set(words_of(name))
    return bool(words & {"system", "sys"}) and not words & _ABOUT


def is_filled(value: Any) -> bool:
    """Whether a cell holds a text, or anything in a list or an object."""
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, (list, Mapping)) and bool(value)


def _may_be_prompt(name: str, value: Any) -> bool:
    """Whether a cell may be a prompt: any text if its column is named so, otherwise a text of several words, or messages."""
    if not is_filled(value) or _rank(name) is not None:
        return is_filled(value)
    if isinstance(value, str):
        return len(value.split()) > 1 or len(value) > 20
    return is_messages(value)


def is_messages(value: Any) -> bool:
    """Whether a value is a list that begins with a message."""
    return isinstance(value, list) and bool({"role", "from"} & _first(value).keys())


def is_implicit(row: Row) -> bool:
    """Whether the prompt must be inferred from chosen and rejected, and no user turn is in them."""
    sides = [row.get(side) for side in ("chosen", "rejected")]
    firsts = [side[0] if isinstance(side, list) and side else side for side in sides]
    roles = [first.get("role", first.get("from")) if isinstance(first, Mapping) else None for first in firsts]
    return any(role is None or role_of(str(role)) == "assistant" for role in roles)


def _said(row: Row, system: Any, format: str) -> bool:
    """Whether the texts or the first messages that `format` reads contain a system text."""
    if not isinstance(system, str):
        return False
    texts = (value if isinstance(value, str) else text_of(_first(value)) for value in _read(row, format))
    return any(system.strip() in text for text in texts)


def _begins_with_system(row: Row, format: str) -> bool:
    firsts = map(_first, _read(row, format))
    return any(role_of(str(first.get("role", first.get("from")))) in ("system", "developer") for first in firsts)


def _read(row: Row, format: str) -> list[Any]:
    """The values that `format` reads besides the column `system`: texts, and lists of messages also where they are inside."""
    values = [row.get(name) for name in {name.partition(".")[0] for name in FORMATS[format].reads} - {"system"}]
    return [value.get("messages") if isinstance(value, Mapping) else value for value in values]


def _first(turns: Any) -> Mapping[str, Any]:
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) else {}
