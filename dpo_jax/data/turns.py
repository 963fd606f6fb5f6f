"""Spans of the assistant's turns in a rendered conversation, found by rendering its prefixes."""

from __future__ import annotations

import bisect
import os
import re
from typing import Any, NoReturn

from dpo_jax.data.messages import Message, Template, call_names, is_learned
from dpo_jax.data.pairs import BadRow, Cause
from dpo_jax.data.special_tokens import special_tokens


def assistant_spans(
    template: Template, prompt: list[Message], side: list[Message], whole: str, *, start: int, context: int, field: str
) -> list[tuple[int, int]]:
    """Character ranges [begin, end) of `whole` that the assistant wrote.

    `whole` is `prompt + side` rendered; the completion begins at `start`, and its first `context` turns are not scored. A turn
    begins after the previous turns and the generation prompt. It includes what the template writes after it, such as EOS, but
    not the following white space. A turn of weight 0 is context. Raises `BadRow` for a template that rewrites the turns before
    an answer.
    """
    spans = []
    for index in range(context, len(side)):
        turn, before = side[index], prompt + side[:index]
        if turn["role"] != "assistant" or not is_learned(turn):
            continue
        begin = start if index == 0 else _begin(template, before, whole, field)
        if index == len(side) - 1:
            end = len(whole)
        else:
            alone = template.render([*before, turn])
            end = len(alone) if whole.startswith(alone) else _end(template, alone, whole, begin, turn, field)
            end = _without_space(whole, begin, end, template.tokenizer)
        spans.append((begin, end))
    return spans


def _begin(template: Template, before: list[Message], whole: str, field: str) -> int:
    asked = template.render(before, generate=True)
    if whole.startswith(asked):
        return len(asked)
    if len(os.path.commonprefix([asked, whole])) < len(os.path.commonprefix([asked, template.render(before)])):
        refuse_rewriting(field)
    return boundary(asked, whole, template.tokenizer)


def _end(template: Template, alone: str, whole: str, begin: int, turn: Message, field: str) -> int:
    """The end in `whole` of a turn that is rendered differently as the last turn, in `alone`.

    If its beginning differs (reasoning removed from earlier turns), the turn is the end of `alone`. If its end differs (the end
    of a conversation is marked), its text is followed by a special token.
    """
    names = call_names(turn)
    last_word = re.search(r"[^\s>]+>*\s*$", turn["content"] or "")
    kept = names[-1] if names else last_word[0].rstrip() if last_word else ""
    for cut in range(min(begin, len(alone)), len(alone)):
        if whole.startswith(alone[cut:], begin):
            if kept in alone[cut:]:
                return begin + len(alone) - cut
            break
    written = (turn["content"] or "").strip()
    if written and not names and (at := whole.find(written, begin)) >= 0:
        ends = "|".join(map(re.escape, special_tokens(template.tokenizer)))
        if found := re.compile(rf"\s*({ends})").match(whole, at + len(written)):
            return found.end()
    refuse_rewriting(field)


def _without_space(whole: str, begin: int, end: int, tokenizer: Any) -> int:
    turn = whole[begin:end].rstrip()
    return begin + len(turn) if turn.endswith(special_tokens(tokenizer)) else end


def boundary(asked: str, whole: str, tokenizer: Any) -> int:
    """The last position up to which two texts are equal and which no token of either crosses."""
    common = len(os.path.commonprefix([asked, whole]))
    starts = [_starts(text, tokenizer) for text in (asked, whole)]
    places = sorted(set(starts[0]) & set(starts[1]))
    return places[bisect.bisect_right(places, common) - 1] if places else 0


def _starts(text: str, tokenizer: Any) -> list[int]:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [begin for begin, _ in offsets] + [len(text)]


def refuse_rewriting(field: str) -> NoReturn:
    """Raises `BadRow`: the rendered prompt is not a prefix of the rendered conversation."""
    detail = "the rendered conversation does not begin with the rendered prompt; the template rewrites earlier turns"
    raise BadRow(Cause.CHAT_TEMPLATE, detail, field=field)
