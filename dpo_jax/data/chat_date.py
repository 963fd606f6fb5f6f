"""The date in a chat template: found, and fixed, so that a prompt has the same tokens tomorrow.

Templates such as those of Llama 3.2 and Granite write today's date into every prompt by `strftime_now(format)`.
"""

from __future__ import annotations

import copy
import datetime
from typing import Any

# All that Python's strftime knows on every platform, and glibc's forms without padding, which templates use.
DIRECTIVES = (*(f"%-{letter}" for letter in "dmyHIMSj"), *(f"%{letter}" for letter in "aAwdbBmyYHIpMSfjUWVGuzZcxX"))


def writes_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template, or one of them, asks for today's date."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "strftime_now" in (str(template) if isinstance(template, str | dict) else "")


def at_date(tokenizer: Any, moment: datetime.datetime) -> Any:
    """A tokenizer like this one whose chat template takes `moment` for the present.

    `apply_chat_template` of the copy renders with a fixed clock. `chat_template` itself stays as it is: saved, the tokenizer
    writes the date of the day again. Returns `tokenizer` where no template asks for the date.
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
    """A Jinja macro `strftime_now` to put before a template.

    A function passed as a variable of the template would not do: transformers turns variables into text.
    """
    replaced = "".join(f' | replace("{name}", {moment.strftime(name)!r})' for name in DIRECTIVES)
    text = 'format | replace("%%", "\\0")' + replaced + ' | replace("\\0", "%")'
    # The line break is taken away with the tag (`trim_blocks`), and the template still begins at the start of a line.
    return "{%- macro strftime_now(format) -%}{{ " + text + " }}{%- endmacro %}\n"
