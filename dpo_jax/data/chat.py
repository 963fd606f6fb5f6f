"""Conversational preferences: messages rendered by the tokenizer's chat template, and the spans that the assistant wrote."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax.data.messages import Message, Template, call_names, content_of, is_learned, read_messages, read_template
from dpo_jax.data.pairs import BadRow, Cause, Preference, Spans, check_completion, check_pair
from dpo_jax.data.special_tokens import ends_in_special
from dpo_jax.data.turns import assistant_spans, boundary, refuse_rewriting

SIDES = ("chosen", "rejected")
MAX_TURNS = 500  # of a completion: each turn is found by rendering all turns before it


def chat_preference(
    prompt: list[Any] | None,
    chosen: Any,
    rejected: Any,
    *,
    uid: str,
    tokenizer: Any,
    tools: Any = None,
    chat_template_kwargs: Any = None,
) -> Preference:
    """A preference from three lists of messages `{"role", "content"}`, rendered as text.

    With `prompt=None` the prompt is implicit: the messages that both sides begin with. The prompt is rendered with the
    template's generation prompt; a completion is the rendered whole minus the rendered prompt. An EOS token at the end of the
    completion is removed, with what the template writes after it, because encoding appends EOS. After another end token EOS
    stays (Phi 3), because encoding appends none to a completion that ends in another one (Gemma).

    A completion may have several turns. The assistant's turns are scored (`Preference.chosen_spans`); turns of users and tools
    are context. Turns after the assistant's last one are dropped. If the template does not begin an answer with its generation
    prompt, the prompt ends where the two diverge. `Preference.notes` records both.

    `tools` and `chat_template_kwargs` are passed to the template (JSON text is accepted). Raises `BadRow`, `DataError` if the
    tokenizer has no chat template, and `Unreadable` if the template exceeds its limits (`data.rendering`).
    """
    template = read_template(tokenizer, tools=tools, variables=chat_template_kwargs, where=uid)
    sides = [read_messages(side, name, tokenizer) for side, name in zip((chosen, rejected), SIDES, strict=True)]
    if [*map(content_of, sides[0])] == [*map(content_of, sides[1])]:
        raise BadRow(Cause.IDENTICAL, "chosen and rejected are the same messages")
    context = 0  # turns that both completions begin with and that are not compared
    if prompt is None:
        turns, sides, context = _implicit(*sides)
    else:
        turns = read_messages(prompt, "prompt", tokenizer)
        _check_apart(turns, sides)
    rendered = _conversation(template, turns, dict(zip(SIDES, sides, strict=True)), context=context)
    chosen, rejected = rendered.completions
    check_pair(rendered.prompt, chosen, rejected)
    return Preference(
        rendered.prompt,
        chosen,
        rejected,
        uid,
        chat=True,
        chosen_spans=rendered.spans[0],
        rejected_spans=rendered.spans[1],
        notes=rendered.notes,
        prompt_digest=rendered.prompt_digest,
    )


class Conversation(NamedTuple):
    """A prompt and its completions, rendered by a chat template."""

    prompt: str
    completions: list[str]
    spans: list[Spans | None]  # of each completion, as in `Preference`
    notes: tuple[str, ...]
    prompt_digest: str


def chat_text(messages: Any, *, uid: str, tokenizer: Any, tools: Any = None, chat_template_kwargs: Any = None) -> Conversation:
    """Render a whole conversation: prompt up to the first turn of the assistant, and one completion from there to its last.

    Raises `BadRow`, also if no turn is the assistant's, or the first one is.
    """
    template = read_template(tokenizer, tools=tools, variables=chat_template_kwargs, where=uid)
    turns = read_messages(messages, "messages", tokenizer)
    first = next((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    if first in (0, len(turns)):
        detail = "the assistant speaks first, so there is no prompt" if not first else "no turn of the assistant"
        raise BadRow(Cause.NO_PROMPT if not first else Cause.EMPTY, detail, field="messages")
    return _conversation(template, turns[:first], {"messages": turns[first:]})


def chat_completions(
    prompt: list[Any],
    completions: Mapping[str, Any],
    *,
    uid: str,
    tokenizer: Any,
    tools: Any = None,
    chat_template_kwargs: Any = None,
) -> Conversation:
    """Render one prompt and any number of completions (lists of messages by name), as `chat_preference` does."""
    template = read_template(tokenizer, tools=tools, variables=chat_template_kwargs, where=uid)
    turns = read_messages(prompt, "prompt", tokenizer)
    sides = {name: read_messages(side, name, tokenizer) for name, side in completions.items()}
    rendered = _conversation(template, turns, sides)
    for name, text in zip(sides, rendered.completions, strict=True):
        check_completion(text, field=name)
    return rendered


def _conversation(
    template: Template, turns: list[Message], sides: Mapping[str, list[Message]], *, context: int = 0
) -> Conversation:
    """Check and render prompt and completions. Turns after the assistant's last one are dropped."""
    notes = template.notes()
    ended = {name: _until_the_assistant(side) for name, side in sides.items()}
    for name, side in ended.items():
        _check_completion(side, name, context=context)
    if ended != sides:
        notes.append("turns after the assistant's last one are left out")
    _check_prompt(turns, "prompt")
    (text, *texts), spans, found = _rendered(template, turns, ended, context)
    _check_written({"prompt": turns, **ended}, [text, *texts])
    return Conversation(text, texts, spans, (*notes, *found), _digest(turns))


def _digest(messages: list[Message]) -> str:
    """Identifies a prompt independently of how a template renders it. (`default=str`: parquet values can have any type.)"""
    text = json.dumps([content_of(message) for message in messages], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def chat_prompt(
    messages: Any, *, tokenizer: Any, field: str = "messages", tools: Any = None, chat_template_kwargs: Any = None
) -> str:
    """Messages `{"role", "content"}` rendered as a prompt, with the generation prompt, as `chat_preference` does it.

    Raises `BadRow`, also if the last message is the assistant's.
    """
    template = read_template(tokenizer, tools=tools, variables=chat_template_kwargs, where=field)
    turns = read_messages(messages, field, tokenizer)
    _check_prompt(turns, field)
    text = _asked(template, turns)
    _check_written({field: turns}, [text])
    return text


def _implicit(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[list[Message]], int]:
    """The prompt that both sides begin with, the completions, and how many turns at the start of these are shared as well.

    A prompt must end with a turn that the assistant answers. If the sides diverge after an assistant's turn, that turn begins
    both completions, as context.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and content_of(chosen[shared]) == content_of(rejected[shared]):
        shared += 1
    end = shared
    if shared < min(len(chosen), len(rejected)):
        while end and chosen[end - 1]["role"] == "assistant":
            end -= 1
    return chosen[:end], [chosen[end:], rejected[end:]], shared - end


def _until_the_assistant(side: list[Message]) -> list[Message]:
    end = next((end for end in range(len(side), 0, -1) if side[end - 1]["role"] == "assistant"), 0)
    return side[:end] or side


def _check_prompt(turns: list[Message], field: str) -> None:
    if not turns or turns[-1]["role"] == "assistant":
        raise BadRow(Cause.NO_PROMPT, "the prompt must end with a message that the assistant answers", field=field)


def _check_apart(prompt: list[Message], sides: list[list[Message]]) -> None:
    if all(side[: len(prompt)] == prompt for side in sides):
        detail = "both repeat the messages of the prompt: remove them there, or leave out the column prompt"
        raise BadRow(Cause.DIFFERENT_PROMPTS, detail, field="chosen, rejected")


def _check_completion(messages: list[Message], field: str, *, context: int) -> None:
    if messages and messages[0]["role"] != "assistant":
        detail = (
            f"a completion begins with a turn of the assistant, but this one with a turn of {messages[0]['role']!r}; without a "
            "column prompt, chosen and rejected must begin with the same messages, their prompt"
        )
        raise BadRow(Cause.DIFFERENT_PROMPTS, detail, field=field)
    if len(messages) > MAX_TURNS:
        raise BadRow(Cause.TOO_LONG, f"a completion of {len(messages):,} turns, but the limit is {MAX_TURNS:,}", field=field)
    own = [message for message in messages[context:] if message["role"] == "assistant"]
    if own and not any(map(is_learned, own)):
        raise BadRow(Cause.EMPTY, "every turn of the assistant has weight 0, so there is nothing to learn", field=field)
    if not any((message["content"] or "").strip() or message.get("tool_calls") for message in own):
        raise BadRow(Cause.EMPTY, "the completion is empty or blank", field=field)


def _check_written(sides: Mapping[str, list[Message]], texts: list[str]) -> None:
    """Raises `BadRow` if the template left out a whole side that has text, or what distinguishes two sides."""
    written = {name: [(turn["content"] or "").strip() for turn in side] for name, side in sides.items()}
    for (name, contents), text in zip(written.items(), texts, strict=True):
        if not text.strip() and any(contents):
            raise BadRow(Cause.CHAT_TEMPLATE, "the chat template writes nothing for this turn", field=name)
    if {*written} >= {*SIDES} and written["chosen"] != written["rejected"] and texts[-2] == texts[-1]:
        detail = "the chat template writes the same text for both, although their messages differ"
        raise BadRow(Cause.CHAT_TEMPLATE, detail, field="chosen, rejected")


def _asked(template: Template, turns: list[Message]) -> str:
    """The rendered prompt with the generation prompt. Raises `BadRow` if the template omits tools or tool calls."""
    text = template.render(turns, generate=True)
    if template.tools and text == template.render(turns, generate=True, tools=False):
        detail = "the chat template does not write tools; use a tokenizer whose template does, or leave the column out"
        raise BadRow(Cause.CHAT_TEMPLATE, detail, field="tools")
    _check_calls(text, turns)
    return text


def _check_calls(text: str, turns: list[Message]) -> None:
    for number, turn in enumerate(turns):
        if left_out := [name for name in call_names(turn) if name not in text]:
            detail = f"the chat template does not write the call of {left_out[0]!r} in message {number} of the conversation"
            raise BadRow(Cause.CHAT_TEMPLATE, detail, field="tool_calls")


def _rendered(
    template: Template, turns: list[Message], sides: Mapping[str, list[Message]], context: int
) -> tuple[list[str], list[Spans | None], list[str]]:
    """Texts of prompt and completions, spans of the completions, and notes."""
    asked = _asked(template, turns)
    wholes = [template.render(turns + side) for side in sides.values()]
    for whole, side in zip(wholes, sides.values(), strict=True):
        _check_calls(whole, turns + side)
    if all(whole.startswith(asked) for whole in wholes):
        start, notes = len(asked), []
    else:
        asked, wholes, start, notes = _parted(template, turns, sides, asked, wholes)
    texts, spans = [asked[:start]], []
    for (name, side), whole in zip(sides.items(), wholes, strict=True):
        texts.append(_without_end(whole[start:], template.tokenizer))
        if len(side) == 1:  # scored as a whole
            spans.append(None)
            continue
        found = assistant_spans(template, turns, side, whole, start=start, context=context, field=name)
        spans.append(tuple((begin - start, min(end - start, len(texts[-1]))) for begin, end in found))
    if any(turn["role"] in ("system", "user") and (turn["content"] or "").strip() not in asked for turn in turns):
        notes.append("the chat template leaves out or changes part of a system's or user's message in the prompt")
    own = ((turn, whole) for side, whole in zip(sides.values(), wholes, strict=True) for turn in side[context:])
    if any((turn["content"] or "").strip() not in whole for turn, whole in own):
        notes.append("the chat template leaves out or changes part of what the assistant wrote, for example its reasoning")
    return texts, spans, notes


def _without_end(completion: str, tokenizer: Any) -> str:
    if not tokenizer.eos_token or not completion.rstrip().endswith(tokenizer.eos_token):
        return completion
    rest = completion.rstrip().removesuffix(tokenizer.eos_token)
    return completion if ends_in_special(rest, tokenizer) else rest


def _parted(
    template: Template, turns: list[Message], sides: Mapping[str, list[Message]], asked: str, wholes: list[str]
) -> tuple[str, list[str], int, list[str]]:
    """Prompt, whole texts, end of the prompt in them, and notes, for templates whose answers do not begin with the generation
    prompt.

    Some templates open `<think>` in the generation prompt and remove the reasoning from each answer that they render: then the
    completion is what the assistant wrote. Others begin an answer differently: then the prompt ends where the two diverge.
    """
    bare = template.render(turns)
    before = len(os.path.commonprefix([asked, bare]))  # where the generation prompt begins
    for name, whole in zip(sides, wholes, strict=True):
        if len(os.path.commonprefix([asked, whole])) < before:
            refuse_rewriting(name)
    opened = re.search(r"<([\w:-]+)>(\s*)$", asked[before:])
    if opened:
        tag, space = opened.groups()
        written = [
            _with_reasoning(side, whole[before:], tag, space) for side, whole in zip(sides.values(), wholes, strict=True)
        ]
        if all(text is not None for text in written):
            note = f"the chat template leaves out reasoning, which its generation prompt opens with '<{tag}>': taken as written"
            return asked, [f"{asked}{text}" for text in written], len(asked), [note]
        if any(text is not None for text in written):
            detail = f"one side has reasoning after '<{tag}>' and the other has none, and the chat template leaves it out"
            raise BadRow(Cause.CHAT_TEMPLATE, detail)
    start = min(boundary(asked, whole, template.tokenizer) for whole in wholes)
    note = f"the generation prompt {asked[before:]!r} is not the beginning of rendered answers: scored from where they diverge"
    return asked, wholes, start, [note]


def _with_reasoning(side: list[Message], rendered: str, tag: str, space: str) -> str | None:
    """The assistant's text after a generation prompt that ends with `<tag>` and `space`, plus the turn's end from `rendered`.

    None if the text has no reasoning, or if the template kept it.
    """
    content, opening, closing = side[0]["content"] or "", f"<{tag}>", f"</{tag}>"
    if content.lstrip().startswith(opening):
        content = content.lstrip().removeprefix(opening).removeprefix(space)
    reasoning, closed, answer = content.partition(closing)
    if len(side) > 1 or not closed or not answer.strip() or answer.strip() not in rendered:
        return None
    if closing in rendered and reasoning.strip() in rendered:
        return None
    return content.rstrip() + rendered.rpartition(answer.strip())[2]
