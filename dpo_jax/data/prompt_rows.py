"""Parser of prompts alone, for commands that sample their own completions, such as `dpo-jax online`."""

from __future__ import annotations

from typing import Any

from dpo_jax.data.candidates import Candidates, Rows, chat_options, one_each, refuse_images, unread_options
from dpo_jax.data.chat import chat_completions
from dpo_jax.data.columns import Row, text
from dpo_jax.data.conversations import same_kind
from dpo_jax.data.pairs import Preference, check_prompt


def prompts(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """A `prompt`, as a text or messages. It becomes a `Preference` whose completions are empty."""

    def preference(uid: str, row: Row) -> Preference:
        refuse_images(row)
        prompt, _ = same_kind(row, {})
        if isinstance(prompt, list):
            found = chat_completions(prompt, {}, uid=uid, tokenizer=tokenizer, **chat_options(row))
            shown = {"chat": True, "notes": found.notes, "prompt_digest": found.prompt_digest}
            return Preference(found.prompt, "", "", uid, **shown)
        prompt = text(row, "prompt")
        check_prompt(prompt)
        return Preference(prompt, "", "", uid, notes=unread_options(row))

    return one_each(rows, preference)
