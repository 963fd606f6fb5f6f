"""Detect and fix the date in a chat template, so that a prompt has the same tokens tomorrow.

Templates such as those of Llama 3.2 and Granite write today's date into every prompt with `strftime_now(format)`.
"""

from __future__ import annotations

import copy
import datetime
from typing import Any

# All directives that Python's strftime supports on every platform, and glibc's unpadded forms, which templates use.
DIRECTIVES = (*(f"%-{letter}" for letter in "dmyHIMSj"), *(f"%{letter}" for letter in "aAwdbBmyYHIpMSfjUWVGuzZcxX"))


def writes_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template (any of them, if there are several) uses today's date."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "strftime_now" in (str(template) if isinstance(template, str | dict) else "")


def at_date(tokenizer: Any, moment: datetime.datetime) -> Any:
    """A copy of the tokenizer whose chat template uses `moment` as the current time.

    `apply_chat_template` of the copy renders with a fixed clock. `chat_template` itself is unchanged, so a saved tokenizer
    writes the current date again. Returns `tokenizer` if no template uses the date.
    """
    if not writes_date(tokenizer):
        return tokenizer
    clock = _fixed_clock(moment)
    fixed = copy.copy(tokenizer)

    def apply_chat_template(conversation: Any, tools: Any = None, *, chat_template: str | None = None, **options: Any) -> Any:
        template = clock + tokenizer.get_chat_template(chat_template, tools)
        return tokenizer.apply_chat_template(conversation, tools=tools, chat_template=template, **options)

    fixed.apply_chat_template = apply_chat_template
    return fixed


def _fixed_clock(moment: datetime.datetime) -> str:
    """A Jinja macro `strftime_now` to prepend to a template.

    A function passed as a template variable would not work: transformers turns variables into text.
    """
    replaced = "".join(f' | replace("{name}", {moment.strftime(name)!r})' for name in DIRECTIVES)
    text = 'format | replace("%%", "\\0")' + replaced + ' | replace("\\0", "%")'
    # The tag removes its line break (`trim_blocks`), so the template still begins at the start of a line.
    return "{%- macro strftime_now(format) -%}{{ " + text + " }}{%- endmacro %}\n"
