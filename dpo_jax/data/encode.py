"""From text to token ids, truncated exactly as the original implementation does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Truncation = Literal["keep_end", "keep_start"]


class EosInText(ValueError):
    """A text contains the end-of-sequence token, which would end the completion before its end."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One preference as token ids. Completions end in EOS unless truncation cut it away.

        prompt, chosen, rejected               int32[n] each
        uid                                    names the pair in messages
        prompt_cut, chosen_cut, rejected_cut   truncation removed tokens

    `encode` makes one of texts; token ids of your own do as well:

    >>> Encoded(prompt=np.int32([5, 6]), chosen=np.int32([7, 0]), rejected=np.int32([8, 9, 0])).rejected
    array([8, 9, 0], dtype=int32)
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    uid: str = ""
    prompt_cut: bool = False
    chosen_cut: bool = False
    rejected_cut: bool = False


def encode(
    preference: Any,
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: Truncation = "keep_end",
) -> Encoded:
    """Token ids of one preference: a mapping or record with `prompt`, `chosen`, `rejected` (and `uid`, if it has one).

    As `tokenize_batch_element` of the original: prompt and completions are tokenized apart, without special tokens, and EOS is
    appended to the completions. Where the prompt and the longer completion exceed `max_length` tokens, the prompt is
    cut to `max_prompt_length` (keeping its end or its start), and if that is not enough both completions to `max_length -
    max_prompt_length`. Raises `EosInText` when a text contains EOS itself; only in a record marked `chat` may EOS end the turns
    of the prompt, and a completion that its template already ended gets no second one.

    Lists of messages `{"role", "content"}` are rendered by the chat template of `tokenizer`, as in `load_preferences`. Without
    `prompt`, it is the messages that both sides begin with. A tokenizer without a template is a ValueError that says so.

    >>> pair = {"prompt": "The film was", "chosen": " a delight.", "rejected": " a bore."}
    >>> ids = encode(pair, tokenizer, max_length=64, max_prompt_length=32)
    >>> tokenizer.decode(ids.prompt), tokenizer.decode(ids.chosen)
    ('The film was', ' a delight.<|endoftext|>')
    """
    if truncation not in ("keep_end", "keep_start"):
        raise ValueError(f"truncation={truncation!r}: use 'keep_end' or 'keep_start'")
    if not 0 < max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length={max_prompt_length} must lie between 0 and max_length={max_length}")

    def get(name: str, default: Any = None) -> Any:
        return preference.get(name, default) if isinstance(preference, Mapping) else getattr(preference, name, default)

    uid = get("uid", "") or ""
    if any(isinstance(get(field), list) for field in ("prompt", "chosen", "rejected")):
        from dpo_jax.data.chat import chat_preference  # here: plain texts need none of it

        sides = get("chosen"), get("rejected")
        preference = chat_preference(get("prompt"), *sides, uid=uid or "encode", tokenizer=tokenizer)
    chat = bool(get("chat", False))
    prompt = _ids(tokenizer, get("prompt"))
    if not chat:
        _refuse_eos(prompt, tokenizer, "prompt")
    chosen, rejected = (_completion_ids(tokenizer, get(side), side, chat=chat) for side in ("chosen", "rejected"))
    full = {"prompt": len(prompt), "chosen": len(chosen), "rejected": len(rejected)}

    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length:
        prompt = prompt[:max_prompt_length] if truncation == "keep_start" else prompt[-max_prompt_length:]
    if len(prompt) + longer > max_length:
        chosen, rejected = (ids[: max_length - max_prompt_length] for ids in (chosen, rejected))
    return Encoded(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        uid=uid,
        prompt_cut=len(prompt) < full["prompt"],
        chosen_cut=len(chosen) < full["chosen"],
        rejected_cut=len(rejected) < full["rejected"],
    )


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _completion_ids(tokenizer: Any, text: str, name: str, *, chat: bool) -> np.ndarray:
    """The completion's ids with exactly one EOS, at the end."""
    ids = _ids(tokenizer, text)
    if chat and tokenizer.eos_token_id in ids:
        end = int(np.argmax(ids == tokenizer.eos_token_id))
        if not tokenizer.decode(ids[end + 1 :]).strip():  # templates like to end a turn with EOS and a newline
            ids = ids[:end]
    _refuse_eos(ids, tokenizer, name)
    return np.append(ids, np.int32(tokenizer.eos_token_id))


def _refuse_eos(ids: np.ndarray, tokenizer: Any, name: str) -> None:
    if tokenizer.eos_token_id in ids:
        raise EosInText(f"{name} contains the end-of-sequence token {tokenizer.eos_token!r} (id {tokenizer.eos_token_id})")
