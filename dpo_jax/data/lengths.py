"""Token lengths of a split: percentiles, what truncation removed, and how far the longer answer is the better one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.pairs import source_of

PARTS = ("prompt", "chosen", "rejected")


def length_table(pairs: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """Mean, percentiles and maximum of the token counts of prompt, chosen and rejected, EOS and BOS included."""
    table = {}
    for name in PARTS:
        sizes = np.array([len(getattr(pair, name)) for pair in pairs])
        percentiles = np.percentile(sizes, [50, 90, 99])
        table[name] = {
            "mean": float(sizes.mean()),
            **{f"p{p}": float(v) for p, v in zip((50, 90, 99), percentiles, strict=True)},
            "max": float(sizes.max()),
        }
    return table


def cut_table(pairs: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """What truncation removed: pairs that lost tokens, these tokens, and their share of all tokens, by part.

    "completions" are chosen and rejected together: a pair that lost the end of either counts once.
    """
    table = {}
    for name in (*PARTS, "completions"):
        parts = PARTS[1:] if name == "completions" else (name,)
        cut = np.array([sum(getattr(pair, f"{part}_cut") for part in parts) for pair in pairs])
        kept = sum(len(getattr(pair, part)) for pair in pairs for part in parts)
        table[name] = {
            "pairs": int((cut > 0).sum()),
            "tokens": int(cut.sum()),
            "share": float(cut.sum() / max(1, cut.sum() + kept)),
        }
    return table


def source_table(pairs: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """Pairs and tokens of each source of a mixture, copies included, and their shares of all (0 to 1)."""
    table: dict[str, dict[str, float]] = {}
    for pair in pairs:
        row = table.setdefault(source_of(pair.uid), {"pairs": 0, "tokens": 0})
        row["pairs"] += 1
        row["tokens"] += sum(len(getattr(pair, name)) for name in PARTS)
    totals = {what: max(1, sum(row[what] for row in table.values())) for what in ("pairs", "tokens")}
    return {name: row | {f"{what}_share": row[what] / total for what, total in totals.items()} for name, row in table.items()}


def length_differences(pairs: Sequence[Encoded]) -> np.ndarray:
    """Scored tokens of chosen less those of rejected: int64[P]. Their signs are the votes of the rule "the longer one wins"."""
    return np.array([chosen - rejected for chosen, rejected in (pair.scored_tokens for pair in pairs)], np.int64)
