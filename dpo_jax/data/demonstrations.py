"""Parsers of texts to imitate, for supervised fine-tuning: conversations, prompts with a completion, plain texts.

They are TRL's forms of SFT data. Each becomes a `Preference` marked `demonstration`, whose text is both chosen and rejected.
"""

from __future__ import annotations

import hashlib
from typing import Any

from dpo_jax.data.candidates import Candidates, Rows, chat_options, completions_of, one_each, refuse_images
from dpo_jax.data.chat import chat_text
from dpo_jax.data.columns import Row, column, text
from dpo_jax.data.conversations import whole_conversation
from dpo_jax.data.pairs import Preference, Spans, check_completion


def sft_messages(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """Conversations in `messages`. All turns of the assistant are scored; those of users and tools between them are context."""

    def preference(uid: str, row: Row) -> Preference:
        refuse_images(row)
        found = chat_text(whole_conversation(row), uid=uid, tokenizer=tokenizer, **chat_options(row))
        shown = {"chat": True, "notes": found.notes, "prompt_digest": found.prompt_digest}
        return _demonstration(found.prompt, found.completions[0], uid, found.spans[0], **shown)

    return one_each(rows, preference)


def sft_completion(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """A `prompt` and the `completion` to learn, as texts or messages."""

    def preference(uid: str, row: Row) -> Preference:
        named = [("completion", column(row, "completion"))]
        prompt, (completion,), (spans,), more = completions_of(row, named, uid, tokenizer)
        return _demonstration(prompt, completion, uid, spans, **more)

    return one_each(rows, preference)


def sft_text(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """Plain texts: the prompt is empty, and all tokens are scored."""

    def preference(uid: str, row: Row) -> Preference:
        whole = text(row, "text")
        check_completion(whole, field="text")
        digest = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return _demonstration("", whole, uid, None, prompt_digest=digest)

    return one_each(rows, preference)


def _demonstration(prompt: str, completion: str, uid: str, spans: Spans | None, **more: Any) -> Preference:
    sides = {"chosen": completion, "rejected": completion, "chosen_spans": spans, "rejected_spans": spans}
    return Preference(prompt, uid=uid, desirable=True, demonstration=True, **sides, **more)
