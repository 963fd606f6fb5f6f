"""RewardBench scores (Lambert et al. 2024, arXiv 2403.13787, section 4): subsets form sections, sections form one score.

A section's score is the mean over its pairs, so subsets are weighted by size. Mathematics is the exception: `math-prm` has the
weight of the six code subsets together (984 pairs instead of 447). The score is the plain mean of the four sections. The older
public preference sets that the first leaderboard added as a fifth section are not part of this data set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpo_jax.evals.calibration import mean_share

CODE = ("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust")
MATH = "math-prm"
SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer"),
    "Reasoning": (MATH, *CODE),
}
SUBSETS = frozenset(name for names in SECTIONS.values() for name in names)


def is_rewardbench(subsets: Collection[str]) -> bool:
    """Whether all of these are subsets of RewardBench."""
    return bool(subsets) and SUBSETS.issuperset(subsets)


def section_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"sections": rows, "score": row, "missing": names}, from the rows of `calibration.accuracy_by`.

    A section is scored on its available subsets, and left out if there are none; "missing" names the missing ones. Ties count
    half; the original counts them as wrong.
    """
    found = {row["subset"]: row for row in rows}
    code = sum(found[name]["pairs"] for name in CODE if name in found)
    weights = {name: code if name == MATH and code else row["pairs"] for name, row in found.items()}
    sections, all_rows, all_weights = [], [], []
    for section, names in SECTIONS.items():
        present = [found[name] for name in names if name in found]
        if present:
            own = [weights[row["subset"]] for row in present]
            pairs = sum(row["pairs"] for row in present)
            sections.append({"section": section, "pairs": pairs, **mean_share(present, own)})
            all_rows += present
            all_weights += [weight / sum(own) for weight in own]
    missing = [name for names in SECTIONS.values() for name in names if name not in found]
    return {"sections": sections, "score": mean_share(all_rows, all_weights), "missing": missing}
