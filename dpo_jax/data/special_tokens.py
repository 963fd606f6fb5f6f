"""Special tokens of a tokenizer, which chat templates use to end turns. Imports no tokenizer library."""

from __future__ import annotations

import functools
from typing import Any


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Every special token, including those without a role that templates write, such as Llama 3's `<|start_header_id|>`."""
    return _special_tokens(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))


def ends_in_special(text: str, tokenizer: Any) -> bool:
    """Whether a text, ignoring trailing blanks, ends in a special token other than EOS: `<end_of_turn>` of Gemma, `<|end|>` of
    Phi."""
    return text.rstrip().endswith(tuple(token for token in special_tokens(tokenizer) if token != tokenizer.eos_token))


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any, size: int, with_role: tuple[str, ...]) -> tuple[str, ...]:
    # Cached, because every message needs this list of some hundred tokens. `size` and `with_role` change with an added token.
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*with_role, *added]))
