"""Limits on untrusted input, as options. `dpo_jax.untrusted` enforces them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """The most that is read of files and replies from elsewhere, so that a damaged or hostile one ends in a message."""

    line_mb: int = 64
    """MB of one line of a text file (data, completions, logs), unpacked."""
    file_mb: int = 1024
    """MB of a file that is read whole (JSON, completions, logs, tokenizers)."""
    reply_kb: int = 1024
    """kB of one reply of a judge's endpoint."""
    depth: int = 100
    """How deep JSON and HTML may be nested."""
    layers: int = 1000
    """Layers of a model."""
    model_b: int = 10_000
    """Parameters of a model, in billions."""
    template_s: int = 5
    """Seconds that a chat template may take for one conversation."""
    template_mb: int = 1024
    """MB of memory that a chat template may take for one conversation."""
    growth: int = 100
    """How many times as long a tokenizer's normalizer, pre-tokenizer, post-processor or decoder may make a text."""
    pattern_s: int = 5
    """Seconds that the regular expressions of a tokenizer may take for some texts of 10,000 characters."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name, value in dataclasses.asdict(self).items():
            if value <= 0:
                yield name, f"must be greater than 0, got {value}"
