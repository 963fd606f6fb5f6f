"""Special tokens of a tokenizer, with which chat templates end turns. Imports no library of tokenizers."""

from __future__ import annotations

import functools
from typing import Any


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Every special token, also those without a role, such as Llama 3's `<|start_header_id|>`, which templates write."""
    return _special_tokens(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))


def ends_in_special(text: str, tokenizer: Any) -> bool:
    """Whether a text ends in a special token other than EOS, but for blanks: `<end_of_turn>` of Gemma, `<|end|>` of Phi."""
    return text.rstrip().endswith(tuple(token for token in special_tokens(tokenizer) if token != tokenizer.eos_token))


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any, size: int, with_role: tuple[str, ...]) -> tuple[str, ...]:
    # Cached: a list of some hundred tokens is asked for with every message. `size` and `with_role` notice an added token.
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*with_role, *added]))
