"""Duplicate and contradictory pairs within a split, and overlap between the held-out and train splits.

Pairs are compared by hashes of their token ids, as the model reads them, so texts that truncation makes equal are equal here. A
ranking is a duplicate if all its completions are equal, and contradicts one with best and worst swapped. A single completion
contradicts the same completion with the other label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded, Side, prompt_key, scored_bytes
from dpo_jax.data.mixture import copy_number

EXAMPLES = 3
Key = tuple[bytes, bytes, bytes]  # hashes of prompt, chosen, rejected (for a ranking: best and worst)


class Finding(NamedTuple):
    pairs: int  # count
    share: float  # of `of`, 0 to 1
    examples: list[str]  # the first three, "train.jsonl:9 with train.jsonl:8": the pair, and the one that it matches
    of: int  # the pairs of the split, without copies made by the weight of a source


class Repeats(NamedTuple):
    """Repeats within one split."""

    duplicates: Finding  # pairs that repeat an earlier one: same prompt, chosen and rejected
    contradictions: Finding  # pairs that equal an earlier one with chosen and rejected swapped
    both_sides: Finding  # pairs whose chosen answer is rejected in another pair of the prompt, as in rankings of 3


class Overlap(NamedTuple):
    """Held-out pairs that are also in the train split."""

    pairs: Finding  # same prompt, chosen and rejected
    swapped: Finding  # the same with chosen and rejected swapped
    prompts: Finding  # same prompt, any answers; includes the pairs above


def find_repeats(pairs: Sequence[Encoded]) -> Repeats:
    """Duplicates and contradictions in a split. Copies made by the weight of a source are left out."""
    pairs = [pair for pair in pairs if copy_number(pair.uid) == 1]
    keys = [_key(pair) for pair in pairs]
    rejected = {(prompt, no): pair.uid for (prompt, _, no), pair in zip(keys, pairs, strict=True) if no}
    seen: dict[tuple[Key, bytes], str] = {}
    sides: dict[Key, str] = {}
    found: list[list[str]] = [[], [], []]
    for key, pair in zip(keys, pairs, strict=True):
        (prompt, yes, no), whole = key, (key, _digest(*pair.between))
        _note(found, pair.uid, (seen.get(whole), sides.get((prompt, no, yes)), rejected.get((prompt, yes))))
        seen.setdefault(whole, pair.uid)
        sides.setdefault(key, pair.uid)
    return Repeats(*(_finding(of_kind, len(pairs)) for of_kind in found))


def find_overlap(held_out: Sequence[Encoded], train: Sequence[Encoded]) -> Overlap:
    """Held-out pairs and prompts that were trained on, where results include memorization."""
    seen: dict[tuple[Key, bytes], str] = {}
    sides: dict[Key, str] = {}
    prompts: dict[bytes, str] = {}
    for pair in train:
        key = _key(pair)
        seen.setdefault((key, _digest(*pair.between)), pair.uid)
        sides.setdefault(key, pair.uid)
        prompts.setdefault(key[0], pair.uid)
    found: list[list[str]] = [[], [], []]
    for pair in held_out:
        key = prompt, yes, no = _key(pair)
        same, swapped = seen.get((key, _digest(*pair.between))), sides.get((prompt, no, yes))
        shared = prompts.get(prompt) if len(pair.prompt) > pair.bos_added else None  # all plain texts have an empty prompt
        _note(found, pair.uid, (same, swapped, shared or same or swapped))
    return Overlap(*(_finding(of_kind, len(held_out)) for of_kind in found))


def _key(pair: Encoded) -> Key:
    """Hashes of a pair. A single completion has one empty side, so that the other label means swapped sides."""
    prompt = hashlib.blake2b(prompt_key(pair), digest_size=16).digest()
    chosen, rejected = _side(pair.sides[0]), _side(pair.sides[-1])
    if pair.desirable is not None:
        return (prompt, chosen, b"") if pair.desirable else (prompt, b"", chosen)
    return prompt, chosen, rejected


def _side(side: Side) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(side[0], "<i4").tobytes() + scored_bytes(side), digest_size=16).digest()


def _digest(*several: np.ndarray) -> bytes:
    parts = [np.ascontiguousarray(ids, "<i4").tobytes() for ids in several]
    sizes = b"" if len(parts) == 1 else np.array([len(part) for part in parts], "<i8").tobytes()
    return hashlib.blake2b(sizes + b"".join(parts), digest_size=16).digest()


def _note(found: Sequence[list[str]], uid: str, twins: Sequence[str | None]) -> None:
    for of_kind, twin in zip(found, twins, strict=True):
        if twin is not None:
            of_kind.append(f"{uid} with {twin}")


def _finding(found: Sequence[str], pairs: int) -> Finding:
    return Finding(len(found), len(found) / pairs if pairs else 0.0, list(found[:EXAMPLES]), pairs)
