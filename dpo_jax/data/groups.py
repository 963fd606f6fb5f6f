"""Group pairs that share completions, so that each completion of a prompt passes through the model once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpo_jax.data.encode import Encoded


@dataclasses.dataclass(frozen=True)
class PairGroup:
    """Distinct completions of one prompt, and which was preferred to which: for six pairs 4 of them, not 12."""

    prompt: np.ndarray  # int32[n]
    completions: tuple[np.ndarray, ...]  # int32[n] each
    pairs: np.ndarray  # int32[Q, 2]  numbers of chosen and rejected
    members: np.ndarray  # int64[Q]  which of the caller's pairs these are
    uids: tuple[str, ...]  # theirs


def group_pairs(pairs: Sequence[Encoded]) -> list[PairGroup]:
    """All `pairs`, by prompt, in the order in which prompts first come. Each is in one group, also one that comes twice."""
    by_prompt: dict[bytes, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt.tobytes(), []).append(number)
    return [_group(pairs, numbers) for numbers in by_prompt.values()]


def _group(pairs: Sequence[Encoded], members: Sequence[int]) -> PairGroup:
    completions: dict[bytes, np.ndarray] = {}
    for number in members:
        for ids in (pairs[number].chosen, pairs[number].rejected):
            completions.setdefault(ids.tobytes(), ids)
    place = {name: i for i, name in enumerate(completions)}
    numbered = [[place[pairs[n].chosen.tobytes()], place[pairs[n].rejected.tobytes()]] for n in members]
    return PairGroup(
        prompt=pairs[members[0]].prompt,
        completions=tuple(completions.values()),
        pairs=np.array(numbered, np.int32),
        members=np.array(members, np.int64),
        uids=tuple(pairs[n].uid for n in members),
    )
