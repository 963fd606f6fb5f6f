"""How token ids lie in rows: one completion a row, one pair a row with its prompt shared, or several pairs a row.

The trick is in the shared layout, `[reversed(chosen) | prompt | rejected]`: with the chosen completion stored backwards, every
token sees one contiguous range of keys, so two integers per token describe any packing:

    chosen c_j    (index x)   [x, end of prompt)     c_j, c_{j-1}, ..., c_0, then the whole prompt
    prompt p_i    (index x)   [start of prompt, x]
    rejected r_k  (index x)   [start of prompt, x]   the whole prompt, then r_0 ... r_k
    padding       (index x)   [x, x]                 itself, so that no softmax is empty

The prompt passes through the model once, and both completions see it. `c_0` and `r_0` are predicted by the last prompt token,
`c_j` by its neighbour on the right, `r_k` by its neighbour on the left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.types import Array, Rows

Completion = tuple[np.ndarray, np.ndarray]
"""(prompt ids, completion ids), int32 each."""


def causal_rows(tokens: Array) -> Rows:
    """Plain language-model rows: every token of `tokens[R, L]` sees those before it; all but the first are scored."""
    tokens = np.asarray(tokens, np.int32)
    rows, length = tokens.shape
    index = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Rows(
        tokens=tokens,
        positions=index,
        k_start=np.zeros_like(index),
        k_end=index + 1,
        source=index[:, :-1],
        target=tokens[:, 1:],
        slot=np.zeros((rows, length - 1), np.int32),
        weight=np.ones(rows, np.float32),
        index=np.arange(rows, dtype=np.int32),
    )


def plain_rows(encoded: Sequence[Encoded], *, length: int, ref_logps: Array | None = None) -> Rows:
    """Each completion in a row of its own, after its prompt: R = 2P rows, chosen and rejected taking turns.

    `ref_logps[P, 2]`, in the order of `encoded`, travels with the rows. A row that needs more than `length` is a `ValueError`.
    """
    layout = Layout("plain", length=length, scored=length)
    return layout.rows(encoded, ref_logps=ref_logps)


def shared_rows(encoded: Sequence[Encoded], *, length: int, ref_logps: Array | None = None) -> Rows:
    """Each pair in one row, `[reversed(chosen) | prompt | rejected]`: R = P rows, and the prompt is computed once."""
    layout = Layout("shared", length=length, scored=length)
    return layout.rows(encoded, ref_logps=ref_logps)


def packed_rows(encoded: Sequence[Encoded], *, length: int, pairs_per_row: int = 16, ref_logps: Array | None = None) -> Rows:
    """Whole pairs, each as in `shared_rows`, packed into as few rows as first-fit decreasing finds.

    Pairs come out in another order than they went in: `rows.index[P]` tells which is which, and -1 where a slot is empty.
    """
    layout = Layout("packed", length=length, scored=length, per_row=pairs_per_row)
    return layout.rows(encoded, ref_logps=ref_logps)


def completion_rows(completions: Sequence[Completion], *, length: int, per_row: int = 1) -> Rows:
    """Single completions after their prompts, `per_row` to a row at most: what supervised fine-tuning reads."""
    return Layout("packed" if per_row > 1 else "plain", length=length, scored=length, per_row=per_row).rows(completions)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A fixed shape for the batches of a run, so that it compiles few times."""

    kind: Literal["plain", "shared", "packed"]
    length: int  # L, tokens per row
    scored: int  # S, scored positions per row
    per_row: int = 1  # pairs (or completions) per row at most; above 1 only when packed
    rows_multiple: int = 1  # R is rounded up to a multiple of this with empty rows

    def rows(self, examples: Sequence[Encoded] | Sequence[Completion], *, ref_logps: Array | None = None) -> Rows:
        """Lay out `examples` (all pairs, or all completions). Nothing is cut: what does not fit raises `ValueError`."""
        pairs = bool(examples) and isinstance(examples[0], Encoded)
        units, names = self._units(examples)
        for unit, name in zip(units, names, strict=True):
            if len(unit.tokens) > self.length or len(unit.target) > self.scored:
                raise ValueError(
                    f"{name}: needs a row of {len(unit.tokens)} tokens, {len(unit.target)} of them scored, and rows hold "
                    f"{self.length} and {self.scored}; raise the row length or lower max_length"
                )
        bins = self._bins(units)
        bins += [[]] * (-len(bins) % self.rows_multiple)
        rows = _place(units, bins, length=self.length, scored=self.scored, per_row=self.per_row)
        if self.kind == "plain" and pairs:  # two rows make one example
            rows = rows.replace(index=np.where(rows.index[::2] < 0, -1, rows.index[::2] // 2), weight=rows.weight[::2])
        if ref_logps is not None:
            placed = np.where(rows.index[:, None] >= 0, np.asarray(ref_logps, np.float32)[rows.index], np.float32(0))
            rows = rows.replace(ref_logps=placed)
        return rows

    def _units(self, examples: Sequence[Encoded] | Sequence[Completion]) -> tuple[list[_Unit], list[str]]:
        units, names = [], []
        for number, example in enumerate(examples):
            if not isinstance(example, Encoded):
                units.append(_completion_unit(*example))
                names.append(f"text {number}")
            elif self.kind == "plain":
                units += [_completion_unit(example.prompt, example.chosen), _completion_unit(example.prompt, example.rejected)]
                names += [f"{example.uid or number} (chosen)", f"{example.uid or number} (rejected)"]
            else:
                units.append(_shared_unit(example))
                names.append(example.uid or f"pair {number}")
        return units, names

    def _bins(self, units: Sequence[_Unit]) -> list[list[int]]:
        if self.kind != "packed":
            return [[i] for i in range(len(units))]
        return first_fit_decreasing(
            np.array([(len(u.tokens), len(u.target), 1) for u in units]).reshape(-1, 3),
            capacity=(self.length, self.scored, self.per_row),
        )


def first_fit_decreasing(sizes: np.ndarray, *, capacity: tuple[int, ...]) -> list[list[int]]:
    """Bins of item numbers such that every column of `sizes[n, k]` sums to at most `capacity[k]`; longest (column 0) first."""
    bins: list[list[int]] = []
    room = np.empty((0, len(capacity)), np.int64)
    for item in np.argsort(-sizes[:, 0], kind="stable"):
        fits = np.flatnonzero((room >= sizes[item]).all(axis=1))
        if len(fits):
            chosen = fits[0]
        else:
            chosen = len(bins)
            bins.append([])
            room = np.vstack([room, np.asarray(capacity)])
        bins[chosen].append(int(item))
        room[chosen] -= sizes[item]
    return bins


class _Unit(NamedTuple):
    """Tokens that belong together, with key ranges and sources relative to their own beginning."""

    tokens: np.ndarray
    positions: np.ndarray
    k_start: np.ndarray
    k_end: np.ndarray
    source: np.ndarray
    target: np.ndarray
    slot: np.ndarray

    @property
    def slots(self) -> int:
        return int(self.slot[-1]) + 1


def _completion_unit(prompt: np.ndarray, completion: np.ndarray) -> _Unit:
    """A prompt and one completion. Without a prompt nothing predicts the first token, and it is not scored."""
    tokens = np.concatenate([prompt, completion])
    x = np.arange(len(tokens))
    scored = np.arange(max(1, len(prompt)), len(tokens))
    return _Unit(tokens, x, np.zeros_like(x), x + 1, scored - 1, tokens[scored], np.zeros_like(scored))


def _shared_unit(pair: Encoded) -> _Unit:
    """`[reversed(chosen) | prompt | rejected]`, the layout at the head of this file."""
    c, p, r = len(pair.chosen), len(pair.prompt), len(pair.rejected)
    if p == 0:
        raise ValueError(f"{pair.uid or 'pair'}: without a prompt there is nothing to share; use the plain layout")
    x = np.arange(c + p + r)
    is_chosen = x < c
    last_of_prompt = c + p - 1
    chosen_source = np.concatenate([[last_of_prompt], c - np.arange(1, c)])  # c_j is at c-1-j: its right neighbour is c_{j-1}
    rejected_source = last_of_prompt + np.arange(r)
    return _Unit(
        tokens=np.concatenate([pair.chosen[::-1], pair.prompt, pair.rejected]),
        positions=np.concatenate([p + np.arange(c)[::-1], np.arange(p + r)]),
        k_start=np.where(is_chosen, x, c),
        k_end=np.where(is_chosen, c + p, x + 1),
        source=np.concatenate([chosen_source, rejected_source]),
        target=np.concatenate([pair.chosen, pair.rejected]),
        slot=np.repeat([0, 1], [c, r]),
    )


def _place(units: Sequence[_Unit], bins: Sequence[Sequence[int]], *, length: int, scored: int, per_row: int) -> Rows:
    """Write the units of each bin one behind the other into a row; what is left over becomes padding."""
    count = len(bins)
    unit_slots = max((unit.slots for unit in units), default=1)
    slots = unit_slots * per_row
    x = np.broadcast_to(np.arange(length, dtype=np.int32), (count, length))
    tokens, positions = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    k_start, k_end = x.copy(), x + 1
    source, target = np.zeros((count, scored), np.int32), np.zeros((count, scored), np.int32)
    slot = np.full((count, scored), slots, np.int32)
    index = np.full((count, per_row), -1, np.int32)
    for row, members in enumerate(bins):
        at, read = 0, 0
        for place, member in enumerate(members):
            unit = units[member]
            here, there = slice(at, at + len(unit.tokens)), slice(read, read + len(unit.target))
            tokens[row, here], positions[row, here] = unit.tokens, unit.positions
            k_start[row, here], k_end[row, here] = at + unit.k_start, at + unit.k_end
            source[row, there], target[row, there] = at + unit.source, unit.target
            slot[row, there] = place * unit_slots + unit.slot
            index[row, place] = member
            at, read = here.stop, there.stop
    index = index.reshape(-1)
    weight = (index >= 0).astype(np.float32)
    return Rows(tokens, positions, k_start, k_end, source, target, slot, weight, index, slots=slots)
