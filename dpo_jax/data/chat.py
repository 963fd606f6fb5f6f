"""Conversational preferences: messages rendered by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_jax.data.columns import text
from dpo_jax.data.pairs import BadRow, Cause, DataError, Preference, check_completion, check_length, check_pair
from dpo_jax.data.rendering import Refused, render
from dpo_jax.data.tokenizer import special_tokens

Message = dict[str, Any]
MAX_MESSAGES = 10_000


def chat_preference(prompt: list[Any] | None, chosen: Any, rejected: Any, *, uid: str, tokenizer: Any) -> Preference:
    """The preference that three lists of messages `{"role", "content"}` make, rendered as text.

    `prompt=None`: the prompt is implicit, the messages that both sides begin with. The prompt is rendered with the template's
    generation prompt; a completion is the rendered whole minus the rendered prompt, which must be its beginning. An EOS token
    that ends the completion is taken off, together with what the template puts after it: encoding appends EOS itself.
    Raises `BadRow`, `DataError` if the tokenizer has no chat template, and `Unreadable` if it does not end (`data.rendering`).
    """
    _need_template(tokenizer, uid)
    sides = {"chosen": _messages(chosen, "chosen", tokenizer), "rejected": _messages(rejected, "rejected", tokenizer)}
    if sides["chosen"] == sides["rejected"]:
        raise BadRow(Cause.IDENTICAL, "chosen and rejected are the same messages")
    if prompt is None:
        shared = 0
        while all(len(side) > shared for side in sides.values()) and sides["chosen"][shared] == sides["rejected"][shared]:
            shared += 1
        turns = sides["chosen"][:shared]
        sides = {name: side[shared:] for name, side in sides.items()}
    else:
        turns = _messages(prompt, "prompt", tokenizer)
    for name, side in sides.items():
        _check_completion(side, name)
    _check_prompt(turns, "prompt")
    text = _render(turns, tokenizer, generate=True)
    completions = {name: _completion(text, turns + side, name, tokenizer) for name, side in sides.items()}
    check_pair(text, **completions)
    return Preference(text, completions["chosen"], completions["rejected"], uid, chat=True)


def _need_template(tokenizer: Any, uid: str) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{uid}: {Cause.CHAT_TEMPLATE}: conversational rows need a tokenizer with a chat template",
            causes=[Cause.CHAT_TEMPLATE],
        )


def chat_completions(prompt: list[Any], completions: Mapping[str, Any], *, uid: str, tokenizer: Any) -> tuple[str, list[str]]:
    """(prompt, completions) as text, of messages: any number of completions by name, rendered as in `chat_preference`."""
    _need_template(tokenizer, uid)
    turns = _messages(prompt, "prompt", tokenizer)
    _check_prompt(turns, "prompt")
    text = _render(turns, tokenizer, generate=True)
    texts = []
    for name, value in completions.items():
        side = _messages(value, name, tokenizer)
        _check_completion(side, name)
        texts.append(_completion(text, turns + side, name, tokenizer))
        check_completion(texts[-1], field=name)
    return text, texts


def chat_prompt(messages: Any, *, tokenizer: Any, field: str = "messages") -> str:
    """Messages `{"role", "content"}` rendered as a prompt, with the generation prompt, as `chat_preference` does it.

    Raises `BadRow`, also where the assistant has the last word.
    """
    turns = _messages(messages, field, tokenizer)
    _check_prompt(turns, field)
    return _render(turns, tokenizer, generate=True)


def _check_prompt(turns: list[Message], field: str) -> None:
    if not turns or turns[-1]["role"] == "assistant":
        raise BadRow(Cause.NO_PROMPT, "the prompt must end with a message that the assistant answers", field=field)


def _messages(value: Any, field: str, tokenizer: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        detail = "a list of messages is needed, " + ("this one is empty" if value == [] else f"this is {type(value).__name__}")
        raise BadRow(Cause.EMPTY if value == [] else Cause.WRONG_TYPE, detail, field=field)
    if len(value) > MAX_MESSAGES:
        raise BadRow(Cause.TOO_LONG, f"{len(value):,} messages, where {MAX_MESSAGES:,} are the limit", field=field)
    messages = []
    for index, message in enumerate(value):
        place = f"{field}.{index}"
        if not isinstance(message, Mapping):
            raise BadRow(Cause.WRONG_TYPE, f"a message is needed, this is {type(message).__name__}", field=place)
        for key in ("role", "content"):
            _check_content(message, key, place=place, tokenizer=tokenizer)
        # parquet gives every message every key that any message has
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def _check_content(message: Mapping[str, Any], key: str, *, place: str, tokenizer: Any) -> None:
    # A special token written out by a user would end or fake a turn.
    content = text(message, key, inside=f"{place}.")
    check_length(content, field=f"{place}.{key}")
    for token in special_tokens(tokenizer):
        if token in content:
            raise BadRow(Cause.EOS_IN_TEXT, f"the text contains the special token {token!r}", field=f"{place}.{key}")


def _check_completion(messages: list[Message], field: str) -> None:
    if not any(message["content"].strip() for message in messages):
        raise BadRow(Cause.EMPTY, "the completion is empty or blank", field=field)
    for message in messages:
        if message["role"] != "assistant":
            detail = f"a completion holds assistant messages only, this one has a message of {message['role']!r}"
            raise BadRow(Cause.DIFFERENT_PROMPTS, detail, field=field)


def _render(messages: list[Message], tokenizer: Any, *, generate: bool = False) -> str:
    try:
        return render(tokenizer, messages, generate=generate)
    except Refused as error:
        raise BadRow(Cause.CHAT_TEMPLATE, f"the template refuses these messages: {error}") from error


def _completion(prompt: str, messages: list[Message], field: str, tokenizer: Any) -> str:
    whole = _render(messages, tokenizer)
    if not whole.startswith(prompt):
        detail = "the rendered conversation does not begin with the rendered prompt; the template rewrites earlier turns"
        raise BadRow(Cause.CHAT_TEMPLATE, detail, field=field)
    completion = whole[len(prompt) :]
    if tokenizer.eos_token and completion.rstrip().endswith(tokenizer.eos_token):
        completion = completion.rstrip().removesuffix(tokenizer.eos_token)
    return completion
