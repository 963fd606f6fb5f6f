"""Recognizes the errors of a device that ran out of memory."""

from __future__ import annotations

import sys

_WORDS = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "Ran out of memory", "OUT_OF_MEMORY")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is JAX's report that a device has too little memory, while compiling or running."""
    if "jax" not in sys.modules:
        return False
    from jax.errors import JaxRuntimeError

    return isinstance(error, JaxRuntimeError) and any(words in str(error) for words in _WORDS)
