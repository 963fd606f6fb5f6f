"""Token lengths of a split: percentiles, truncation, and length differences between chosen and rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.pairs import source_of

Part = tuple[tuple[np.ndarray, ...], int]
"""Texts as token ids, and the number of their tokens removed by truncation."""


def parts_of(pair: Encoded) -> Mapping[str, Part]:
    """The texts of an example by name: prompt, chosen, rejected; for a ranking best, between, worst; or a single completion."""
    prompt, chosen = ((pair.prompt,), pair.prompt_cut), ((pair.chosen,), pair.chosen_cut)
    rejected = (pair.rejected,), pair.rejected_cut
    if pair.desirable is not None:
        return {"prompt": prompt, "completion": chosen}
    if pair.between:
        return {"prompt": prompt, "best": chosen, "between": (pair.between, pair.between_cut), "worst": rejected}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def length_table(pairs: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """Mean, percentiles and maximum of the token counts of prompt, chosen and rejected (`parts_of`), EOS and BOS included."""
    table = {}
    parts = [parts_of(pair) for pair in pairs]
    for name in parts[0]:
        sizes = np.array([len(ids) for of_pair in parts for ids in of_pair[name][0]])
        percentiles = np.percentile(sizes, [50, 90, 99])
        table[name] = {
            "mean": float(sizes.mean()),
            **{f"p{p}": float(v) for p, v in zip((50, 90, 99), percentiles, strict=True)},
            "max": float(sizes.max()),
        }
    return table


def cut_table(pairs: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """Truncation by part: pairs that lost tokens, tokens lost, and their share of all tokens.

    "completions" combines all completions: a pair that lost the end of any counts once.
    """
    table = {}
    parts = [parts_of(pair) for pair in pairs]
    for name in (*parts[0], "completions"):
        names = [part for part in parts[0] if part != "prompt"] if name == "completions" else [name]
        cut = np.array([sum(of_pair[part][1] for part in names) for of_pair in parts])
        kept = sum(len(ids) for of_pair in parts for part in names for ids in of_pair[part][0])
        table[name] = {
            "pairs": int((cut > 0).sum()),
            "tokens": int(cut.sum()),
            "share": float(cut.sum() / max(1, cut.sum() + kept)),
        }
    return table


def source_table(pairs: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """Pairs and tokens of each source of a mixture, copies included, and their shares of the total (0 to 1)."""
    table: dict[str, dict[str, float]] = {}
    for pair in pairs:
        row = table.setdefault(source_of(pair.uid), {"pairs": 0, "tokens": 0})
        row["pairs"] += 1
        row["tokens"] += sum(len(ids) for texts, _ in parts_of(pair).values() for ids in texts)
    totals = {what: max(1, sum(row[what] for row in table.values())) for what in ("pairs", "tokens")}
    return {name: row | {f"{what}_share": row[what] / total for what, total in totals.items()} for name, row in table.items()}


def length_differences(pairs: Sequence[Encoded]) -> np.ndarray:
    """Scored tokens of chosen minus those of rejected: int64[P]. The signs are the predictions of the rule "the longer one
    wins"."""
    return np.array([best - worst for best, *_, worst in (pair.scored_tokens for pair in pairs)], np.int64)
