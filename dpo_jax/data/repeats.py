"""Duplicate and contradictory pairs within a split, and pairs that the held-out split shares with the train split.

Pairs are compared by hashes of their token ids, so as a model reads them: texts that truncation makes equal are equal here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded, scored_bytes
from dpo_jax.data.mixture import copy_number

EXAMPLES = 3
Key = tuple[bytes, bytes, bytes]  # hashes of prompt, chosen, rejected


class Finding(NamedTuple):
    pairs: int  # how many
    share: float  # of all pairs of the split, 0 to 1
    examples: list[str]  # the first three, "train.jsonl:9 with train.jsonl:8": the pair, and the one that it is compared with


class Repeats(NamedTuple):
    """Within one split."""

    duplicates: Finding  # pairs that repeat an earlier one: same prompt, chosen and rejected
    contradictions: Finding  # pairs that are an earlier one with chosen and rejected swapped
    both_sides: Finding  # pairs whose chosen answer is rejected in another pair of the prompt; rankings of 3 answers have these


class Overlap(NamedTuple):
    """Held-out pairs that are in the train split, too."""

    pairs: Finding  # same prompt, chosen and rejected
    swapped: Finding  # the same with chosen and rejected swapped
    prompts: Finding  # the same prompt, whatever the answers; the pairs above are among these


def find_repeats(pairs: Sequence[Encoded]) -> Repeats:
    """What a split says twice, and where it contradicts itself. Copies that the weight of a source asks for are left out."""
    pairs = [pair for pair in pairs if copy_number(pair.uid) == 1]
    keys = [_key(pair) for pair in pairs]
    rejected = {(prompt, no): pair.uid for (prompt, _, no), pair in zip(keys, pairs, strict=True)}
    seen: dict[Key, str] = {}
    found: list[list[str]] = [[], [], []]
    for (prompt, yes, no), pair in zip(keys, pairs, strict=True):
        twins = (seen.get((prompt, yes, no)), seen.get((prompt, no, yes)), rejected.get((prompt, yes)))
        _note(found, pair.uid, twins)
        seen.setdefault((prompt, yes, no), pair.uid)
    return Repeats(*(_finding(of_kind, len(pairs)) for of_kind in found))


def find_overlap(held_out: Sequence[Encoded], train: Sequence[Encoded]) -> Overlap:
    """Which held-out pairs and prompts were trained on: what is measured on them is memory, too."""
    seen: dict[Key, str] = {}
    prompts: dict[bytes, str] = {}
    for pair in train:
        key = _key(pair)
        seen.setdefault(key, pair.uid)
        prompts.setdefault(key[0], pair.uid)
    found: list[list[str]] = [[], [], []]
    for pair in held_out:
        prompt, yes, no = _key(pair)
        _note(found, pair.uid, (seen.get((prompt, yes, no)), seen.get((prompt, no, yes)), prompts.get(prompt)))
    return Overlap(*(_finding(of_kind, len(held_out)) for of_kind in found))


def _key(pair: Encoded) -> Key:
    prompt, chosen, rejected = (
        hashlib.blake2b(np.ascontiguousarray(ids, "<i4").tobytes() + scored_bytes((ids, scored)), digest_size=16).digest()
        for ids, scored in ((pair.prompt, None), *pair.sides)
    )
    return prompt, chosen, rejected


def _note(found: Sequence[list[str]], uid: str, twins: Sequence[str | None]) -> None:
    for of_kind, twin in zip(found, twins, strict=True):
        if twin is not None:
            of_kind.append(f"{uid} with {twin}")


def _finding(found: Sequence[str], pairs: int) -> Finding:
    return Finding(len(found), len(found) / pairs if pairs else 0.0, list(found[:EXAMPLES]))
