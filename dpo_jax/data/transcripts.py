"""Anthropic HH: dialogues as single texts, split into a prompt and two answers, or into chat messages."""

from __future__ import annotations

import re
from typing import Any

from dpo_jax.data.candidates import Candidates, Rows, checked, one_each
from dpo_jax.data.chat import chat_preference
from dpo_jax.data.columns import Row, text
from dpo_jax.data.conversations import with_system
from dpo_jax.data.pairs import HH_ASSISTANT, BadRow, Cause, Preference

HH_HUMAN = "\n\nHuman:"
# Also with Windows line ends.
_ANSWERS = re.compile(r"\r?\n\r?\nAssistant:")
_TURNS = re.compile(r"\r?\n\r?\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """Anthropic HH: two transcripts, `chosen` and `rejected`, that differ after their last "\\n\\nAssistant:"."""

    def preference(uid: str, row: Row) -> Preference:
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        prompt = split_hh(chosen, rejected)
        return checked(Preference(prompt, chosen[len(prompt) :], rejected[len(prompt) :], uid))

    return one_each(rows, preference)


def hh_chat(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """As `hh`, but the turns become messages rendered by the tokenizer's chat template, for chat models."""

    def preference(uid: str, row: Row) -> Preference:
        transcripts = [text(row, "chosen"), text(row, "rejected")]
        asked = split_hh(*transcripts)
        *prompt, _ = messages_of(asked + " ?", field="chosen")  # a stand-in for the answer, which may be blank
        answers = [transcript[len(asked) :].strip() for transcript in transcripts]
        sides = ([{"role": "assistant", "content": answer}] for answer in answers)
        return chat_preference(with_system(row, prompt), *sides, uid=uid, tokenizer=tokenizer)

    return one_each(rows, preference)


def split_hh(chosen: str, rejected: str) -> str:
    """The prompt of a pair of Anthropic HH transcripts, up to and including its last "\\n\\nAssistant:".

    Like `extract_anthropic_prompt` of the original implementation, which uses the chosen side's prompt for both. If the two
    sides have different prompts, that cuts the rejected answer at a meaningless place, so such a pair raises `BadRow` here.
    """
    prompts = []
    for field, transcript in (("chosen", chosen), ("rejected", rejected)):
        ends = [turn.end() for turn in _ANSWERS.finditer(transcript)]
        if not ends:
            raise BadRow(Cause.NO_PROMPT, f"the transcript has no {HH_ASSISTANT!r}", field=field)
        prompts.append(transcript[: ends[-1]])
    if prompts[0] != prompts[1]:
        detail = f"the last {HH_ASSISTANT!r} ends at character {len(prompts[0])} of chosen, {len(prompts[1])} of rejected"
        raise BadRow(Cause.DIFFERENT_PROMPTS, detail)
    return prompts[0]


def messages_of(transcript: str, *, field: str) -> list[dict[str, str]]:
    """The turns of a transcript as messages `{"role", "content"}` with stripped texts.

    Raises `BadRow`, naming the column `field`, for a transcript with text before its first turn, and for a blank turn.

    >>> messages_of("\\n\\nHuman: Hello\\n\\nAssistant: Hi!", field="chosen")
    [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Hi!'}]
    """
    before, *turns = _TURNS.split(transcript)
    if before.strip() or not turns:
        raise BadRow(Cause.NO_PROMPT, f"the transcript does not begin with {HH_HUMAN!r}", field=field)
    messages = [{"role": _ROLES[who], "content": content.strip()} for who, content in zip(turns[::2], turns[1::2], strict=True)]
    for number, message in enumerate(messages, start=1):
        if not message["content"]:
            raise BadRow(Cause.EMPTY, f"turn {number} of the transcript is blank", field=field)
    return messages


def as_transcript(question: str) -> str:
    """A one-question prompt in the form of HH."""
    return f"{HH_HUMAN} {question}{HH_ASSISTANT}"
