"""Duplicate and contradictory pairs within a split, and pairs that the held-out split shares with the train split.

Pairs are compared by hashes of their token ids, so as a model reads them: texts that truncation makes equal are equal here.
A ranking is a duplicate where all of its completions are equal, and contradicts one whose best and worst are swapped; a single
completion contradicts itself with the other label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded, Side, prompt_key, scored_bytes
from dpo_jax.data.mixture import copy_number

EXAMPLES = 3
Key = tuple[bytes, bytes, bytes]  # hashes of prompt, chosen, rejected (of a ranking: best and worst)


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
    """Which held-out pairs and prompts were trained on: what is measured on them is memory, too."""
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
        twins = seen.get((key, _digest(*pair.between))), sides.get((prompt, no, yes)), prompts.get(prompt)
        _note(found, pair.uid, twins)
    return Overlap(*(_finding(of_kind, len(held_out)) for of_kind in found))


def _key(pair: Encoded) -> Key:
    """Of a single completion one side is empty: the same one with the other label has its sides swapped."""
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
    return Finding(len(found), len(found) / pairs if pairs else 0.0, list(found[:EXAMPLES]))
