"""Train and held-out pairs from one split, divided by a hash of the prompt.

The side depends on the prompt alone: no prompt is on both sides, and neither the order of the rows nor other rows matter. The
hash covers the messages of a conversation, so template and date do not matter, and the images of the prompt.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from dpo_jax.data.pairs import BadRow, Cause, Preference, PreferenceSet

_PURPOSE = b"dpo_jax held out"  # at most 16 bytes


def is_held_out(preference: Preference, share: float) -> bool:
    """Whether the prompt of a pair belongs to the held-out `share` (0 to 1). A smaller share is a subset of a larger one.

    >>> from dpo_jax.data.pairs import Preference
    >>> pairs = [Preference(f"question {i}", " yes", " no", uid=str(i)) for i in range(1000)]
    >>> sum(is_held_out(pair, 0.05) for pair in pairs)
    48
    """
    key = "\0".join([preference.prompt_digest or preference.prompt, *(image.digest for image in preference.images)])
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, person=_PURPOSE).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def take_side(preferences: PreferenceSet, side: Literal["train", "test"], *, share: float, split: str) -> PreferenceSet:
    """The pairs of one side, named `split` in the report. Pairs of the other side are counted as dropped (`other_split`)."""
    report, kept = preferences.report.copy(), []
    report.notes.append(
        f"{report.split!r} is the only split: {share:.1%} of its prompts are held out, by a hash of each (data.test_share)"
    )
    for preference in preferences:
        if is_held_out(preference, share) == (side == "test"):
            kept.append(preference)
        else:
            report.add(
                preference.uid, BadRow(Cause.OTHER_SPLIT, f"belongs to the {'train' if side == 'test' else 'held-out'} pairs")
            )
    report.split, report.kept = split, len(kept)
    report.check()
    return PreferenceSet(kept, report)
