"""Moving parts of a chat template, found by rendering small conversations with it."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any, Literal, NamedTuple

Handling = Literal["kept", "dropped", "refused"]


class TemplateParts(NamedTuple):
    """What a template does. Texts are as it writes them; `None` where it refused the conversation that would tell."""

    date: str | None  # the current date as the template writes it; None: the prompt does not depend on the date
    generation_prompt: str | None  # what makes the assistant answer; "" if the template has none
    turn_end: str | None  # what follows the text of an assistant's last turn
    system: Handling  # a system message
    earlier_turns: Handling  # texts of the turns before the last
    reasoning: Literal["kept", "dropped", "dropped in earlier turns", "refused"]  # <think>...</think> of the assistant
    trims: bool | None  # white space at the ends of a message is removed


def template_parts(tokenizer: Any) -> TemplateParts | None:
    """The moving parts of the tokenizer's chat template; None if it has none."""
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


class _Renderer:
    def __init__(self, tokenizer: Any, *, now: datetime.datetime | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = {} if now is None else {"chat_template": _at(now, tokenizer.get_chat_template())}

    def __call__(self, messages: list[dict[str, str]], *, generate: bool = False) -> str | None:
        """The rendered text; None if the template refuses these messages."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **self.options)
        except Exception:  # a template may raise anything: it is a program in the tokenizer's file
            return None


def _at(now: datetime.datetime, template: str) -> str:
    """The template with a clock that stands still: a macro in front takes the place of `strftime_now`."""
    written = {form: now.strftime(form) for form in _date_formats(template)}
    return "{% macro strftime_now(form) %}{{ " + json.dumps(written) + "[form] }}{% endmacro %}" + template


def _date_formats(template: str) -> list[str]:
    return list(dict.fromkeys(form for _, form in re.findall(r"""strftime_now\(\s*(['"])(.*?)\1""", template)))


def _date(tokenizer: Any) -> str | None:
    """What `strftime_now` gives today, if the same conversation is another text on another day."""

    def on(day: datetime.datetime) -> str | None:
        return _Renderer(tokenizer, now=day)(_turns("ANSWERED", None), generate=True)

    # All of year, month, day, weekday and hour differ.
    first, second = on(datetime.datetime(2001, 2, 3, 4, 5, 6)), on(datetime.datetime(2010, 11, 12, 13, 14, 15))
    if first is None or first == second:
        return None
    now = datetime.datetime.now()
    here = on(now) or ""
    return ", ".join(text for form in _date_formats(tokenizer.get_chat_template()) if (text := now.strftime(form)) in here)


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
