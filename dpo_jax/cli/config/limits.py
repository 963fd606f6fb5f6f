"""Limits on untrusted input; a section of `Config`. `dpo_jax.untrusted` enforces them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """Limits on files and replies from elsewhere, so that a damaged or hostile one ends in an error message."""

    line_mb: int = 64
    """Longest line of a text file (data, completions, logs), decompressed, in MB."""
    file_mb: int = 1024
    """Largest file that is read whole (JSON, completions, logs, tokenizers), in MB."""
    reply_kb: int = 1024
    """Largest reply of a judge's endpoint, in kB."""
    depth: int = 100
    """Deepest nesting of JSON and HTML."""
    layers: int = 1000
    """Maximum layer count."""
    model_b: int = 10_000
    """Maximum model size, in billions of parameters."""
    template_s: int = 5
    """Time limit of a chat template per conversation, in seconds."""
    template_mb: int = 1024
    """Memory limit of a chat template per conversation, in MB."""
    growth: int = 100
    """Largest factor by which a tokenizer's normalizer, pre-tokenizer, post-processor or decoder may lengthen a text."""
    pattern_s: int = 5
    """Longest time for a tokenizer's regular expressions on some texts of 10,000 characters, in seconds."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name, value in dataclasses.asdict(self).items():
            if value <= 0:
                yield name, f"must be greater than 0, got {value}"
