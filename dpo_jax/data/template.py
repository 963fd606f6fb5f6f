"""Properties of a chat template, found by rendering small conversations."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any, Literal, NamedTuple

from dpo_jax.data import rendering
from dpo_jax.data.chat_date import at_date
from dpo_jax.data.special_tokens import special_tokens
from dpo_jax.untrusted import Unreadable

Handling = Literal["kept", "dropped", "refused"]


class TemplateParts(NamedTuple):
    """Properties of a template. Texts are as it writes them; `None` if it refused the conversation that would show the
    property."""

    date: str | None  # the current date as the template writes it; None: the prompt does not depend on the date
    generation_prompt: str | None  # the text that starts the assistant's answer; "" if there is none
    turn_end: str | None  # the text after an assistant's last turn
    system: Handling  # a system message
    earlier_turns: Handling  # texts of the turns before the last
    reasoning: Literal["kept", "dropped", "dropped in earlier turns", "refused"]  # <think>...</think> of the assistant
    trims: bool | None  # white space at the ends of a message is removed


def template_parts(tokenizer: Any) -> TemplateParts | None:
    """The properties of the tokenizer's chat template; None if it has no template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    render = _Renderer(tokenizer)
    one = render([_user("ASKED")])
    asking = render([_user("ASKED")], generate=True)
    answered = render([_user("ASKED"), _assistant("ANSWERED")])
    spaced = render([_user("  ASKED  ")])
    return TemplateParts(
        date=_date(tokenizer),
        generation_prompt=None if one is None or asking is None else asking.removeprefix(one) if asking != one else "",
        turn_end=None if answered is None or "ANSWERED" not in answered else answered.rpartition("ANSWERED")[2],
        system=_handling(render([{"role": "system", "content": "RULED"}, _user("ASKED")]), "RULED"),
        earlier_turns=_handling(render(_turns("ANSWERED", "ENDED")), "FIRST", "ANSWERED"),
        reasoning=_reasoning(render),
        trims=None if spaced is None else "  ASKED  " not in spaced,
    )


def turn_end_token(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an assistant's last turn; None if there is none.

    Also None for a template that exceeds its limits, because callers such as sampling from plain texts may have nothing to
    render.
    """
    after = turn_end(tokenizer).strip()
    token = next((token for token in special_tokens(tokenizer) if after.startswith(token)), None)
    return None if token is None else int(tokenizer.convert_tokens_to_ids(token))


def is_rendered(prompt: str, tokenizer: Any) -> bool:
    """Whether a chat template wrote a prompt: it holds a special token other than BOS, which a plain text does not."""
    if getattr(tokenizer, "chat_template", None) is None:
        return False
    return any(token in prompt for token in special_tokens(tokenizer) if token != tokenizer.bos_token)


def turn_end(tokenizer: Any) -> str:
    """The text that the chat template writes after an assistant's last turn.

    "" without a template, and for one that refuses such a turn or exceeds its limits.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    try:
        answered = _Renderer(tokenizer)([_user("ASKED"), _assistant("ANSWERED")]) or ""
    except Unreadable:
        return ""
    return answered.rpartition("ANSWERED")[2]


def asking_end(tokenizer: Any) -> str:
    """The end of every prompt that the chat template writes, without blanks; "" if there is none.

    It tells prompts without special tokens, too, such as Llama 2's `[INST] ... [/INST]`.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    try:
        asked = _Renderer(tokenizer)([_user("ASKED")], generate=True) or ""
    except Unreadable:
        return ""
    return asked.rpartition("ASKED")[2].rstrip()


def same_template(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers write a short conversation alike, also if neither has a chat template."""

    def written(one: Any) -> list[str | None]:
        if getattr(one, "chat_template", None) is None:
            return []
        turns = [_user("ASKED"), _assistant("ANSWERED"), _user("AGAIN")]
        try:
            return [_Renderer(one)(turns, generate=True), turn_end(one)]
        except Unreadable:
            return []

    return written(tokenizer) == written(other)


class _Renderer:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, messages: list[dict[str, str]], *, generate: bool = False, **options: Any) -> str | None:
        """The rendered text; None if the template refuses these messages."""
        try:
            return rendering.render(self.tokenizer, messages, generate=generate, **options)
        except rendering.Refused:
            return None


def _date(tokenizer: Any) -> str | None:
    """The date that the template writes, if the rendered conversation depends on the day."""
    # Year, month, day, weekday and hour all differ.
    days = datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2010, 11, 12, 13, 14, 15)
    turns = _turns("ANSWERED", None)
    first, second = (_Renderer(at_date(tokenizer, day))(turns, generate=True) for day in days)
    if first is None or first == second:
        return None
    render = _Renderer(tokenizer)
    here = render(turns, generate=True) or ""
    forms = dict.fromkeys(form for _, form in re.findall(r"""strftime_now\(\s*(['"])(.*?)\1""", tokenizer.get_chat_template()))
    written = (render(turns, chat_template=f"{{{{ strftime_now({json.dumps(form)}) }}}}") or "" for form in forms)
    return ", ".join(text for text in written if text and text in here)


def _reasoning(render: _Renderer) -> Literal["kept", "dropped", "dropped in earlier turns", "refused"]:
    text = render(_turns("<think>MUSED</think>ANSWERED", "<think>PONDERED</think>ENDED"))
    if text is None:
        return "refused"
    if "PONDERED" not in text:
        return "dropped"
    return "kept" if "MUSED" in text else "dropped in earlier turns"


def _handling(text: str | None, *marks: str) -> Handling:
    if text is None:
        return "refused"
    return "kept" if all(mark in text for mark in marks) else "dropped"


def _turns(answer: str, last: str | None) -> list[dict[str, str]]:
    turns = [_user("FIRST"), _assistant(answer), _user("SECOND")]
    return turns if last is None else [*turns, _assistant(last)]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
