"""Groups of pairs that share completions, so that each completion of a prompt passes through the model once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpo_jax.data.encode import Encoded, PromptImages, Side, prompt_key, scored_bytes


@dataclasses.dataclass(frozen=True)
class PairGroup:
    """The distinct completions of one prompt and the preferences among them: 4 completions for six pairs, not 12."""

    prompt: np.ndarray  # int32[n]
    completions: tuple[np.ndarray, ...]  # int32[n] each
    pairs: np.ndarray  # int32[Q, 2]  indices of chosen and rejected
    members: np.ndarray  # int64[Q]  indices of these pairs in the caller's list
    uids: tuple[str, ...]  # of these pairs
    scored: tuple[np.ndarray | None, ...] = ()  # bool[n] each: scored tokens, None for all; empty: all scored
    images: PromptImages | None = None

    @property
    def sides(self) -> list[Side]:
        """(ids, scored) of each completion."""
        return list(zip(self.completions, self.scored or [None] * len(self.completions), strict=True))


def group_pairs(pairs: Sequence[Encoded]) -> list[PairGroup]:
    """All `pairs` grouped by prompt, in order of first appearance. Each pair is in one group; duplicates are kept.

    Raises ValueError for rankings of more than two completions.
    """
    if longer := next((pair for pair in pairs if pair.between), None):
        raise ValueError(f"{longer.uid or 'an example'} is a ranking of {len(longer.completions)} completions, not a pair")
    by_prompt: dict[bytes, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_prompt.setdefault(prompt_key(pair), []).append(number)
    return [_group(pairs, numbers) for numbers in by_prompt.values()]


def _group(pairs: Sequence[Encoded], members: Sequence[int]) -> PairGroup:
    completions: dict[tuple[bytes, bytes], Side] = {}
    for number in members:
        for side in pairs[number].sides:
            completions.setdefault(_name(*side), side)
    place = {name: i for i, name in enumerate(completions)}
    numbered = [[place[_name(*side)] for side in pairs[n].sides] for n in members]
    return PairGroup(
        prompt=pairs[members[0]].prompt,
        completions=tuple(ids for ids, _ in completions.values()),
        scored=tuple(scored for _, scored in completions.values()),
        pairs=np.array(numbered, np.int32),
        members=np.array(members, np.int64),
        uids=tuple(pairs[n].uid for n in members),
        images=pairs[members[0]].images,
    )


def _name(ids: np.ndarray, scored: np.ndarray | None) -> tuple[bytes, bytes]:
    return ids.tobytes(), scored_bytes((ids, scored))
