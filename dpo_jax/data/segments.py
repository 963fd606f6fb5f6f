"""Row segments: spans of tokens with their key intervals and the positions that are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded, PromptImages, count_scored
from dpo_jax.data.groups import PairGroup
from dpo_jax.types import RowImages, Rows


class Unit(NamedTuple):
    """A segment: tokens with key ranges and sources relative to its first token."""

    tokens: np.ndarray
    positions: np.ndarray
    k_start: np.ndarray
    k_end: np.ndarray
    source: np.ndarray
    target: np.ndarray
    slot: np.ndarray
    images: PromptImages | None = None  # its images, with `starts` relative to its first token


class Completion(NamedTuple):
    """A training text: int32[n] ids of prompt and completion, bool[n] marking the scored tokens of the completion (None: all),
    and the images of the prompt."""

    prompt: np.ndarray
    completion: np.ndarray
    scored: np.ndarray | None = None
    images: PromptImages | None = None

    @classmethod
    def of(cls, text: Sequence[Any]) -> Completion:
        """From a tuple, which may omit the last fields."""
        return cls(*text)

    @property
    def size(self) -> tuple[int, int]:
        """(tokens, scored positions). Without a prompt nothing predicts the first token, so it is not scored."""
        first = not len(self.prompt) and len(self.completion) and (self.scored is None or self.scored[0])
        return len(self.prompt) + len(self.completion), count_scored(self.completion, self.scored) - bool(first)


def completion_unit(
    prompt: np.ndarray, completion: np.ndarray, scored: np.ndarray | None = None, images: PromptImages | None = None
) -> Unit:
    """A prompt and one completion. Without a prompt nothing predicts the first token, so it is not scored."""
    tokens = np.concatenate([prompt, completion])
    x = np.arange(len(tokens))
    scored = _places(completion, scored) + len(prompt)
    scored = scored[scored > 0]
    return Unit(tokens, x, np.zeros_like(x), x + 1, scored - 1, tokens[scored], np.zeros_like(scored), images)


def shared_unit(pair: Encoded) -> Unit:
    """`[reversed(chosen) | prompt | rejected]`, the shared layout described in `layout.py`."""
    c, p, r = len(pair.chosen), len(pair.prompt), len(pair.rejected)
    if c == 0:
        raise ValueError(f"{pair.uid or 'pair'}: its chosen completion has no tokens, not even EOS")
    if p == 0:
        raise ValueError(f"{pair.uid or 'pair'}: without a prompt there is nothing to share; use the plain layout")
    x = np.arange(c + p + r)
    is_chosen = x < c
    last_of_prompt = c + p - 1
    chosen_source = np.concatenate([[last_of_prompt], c - np.arange(1, c)])  # c_j is at c-1-j: its right neighbor is c_{j-1}
    rejected_source = last_of_prompt + np.arange(r)
    of_chosen, of_rejected = (_places(*side) for side in pair.sides)
    return Unit(
        tokens=np.concatenate([pair.chosen[::-1], pair.prompt, pair.rejected]),
        positions=np.concatenate([p + np.arange(c)[::-1], np.arange(p + r)]),
        k_start=np.where(is_chosen, x, c),
        k_end=np.where(is_chosen, c + p, x + 1),
        source=np.concatenate([chosen_source[of_chosen], rejected_source[of_rejected]]),
        target=np.concatenate([pair.chosen[of_chosen], pair.rejected[of_rejected]]),
        slot=np.repeat([0, 1], [len(of_chosen), len(of_rejected)]),
        images=_moved(pair.images, c),
    )


def _moved(images: PromptImages | None, by: int) -> PromptImages | None:
    return images and dataclasses.replace(images, starts=images.starts + by)


def _places(ids: np.ndarray, scored: np.ndarray | None) -> np.ndarray:
    """Indices of the scored tokens of a completion, in text order."""
    return np.arange(len(ids)) if scored is None else np.flatnonzero(scored)


def group_unit(group: PairGroup | Encoded, *, shared: bool) -> Unit:
    """The completions of a group or ranking, with the same indices: two per shared prompt or, if not `shared`, each after its
    own prompt."""
    p, several, images = group.prompt, group.sides, group.images
    if not shared:
        return _beside([completion_unit(p, *completion, images) for completion in several])
    units = [
        shared_unit(Encoded(p, chosen, rejected, uid=_uid(group), chosen_scored=one, rejected_scored=other, images=images))
        for (chosen, one), (rejected, other) in zip(several[::2], several[1::2], strict=False)
    ]
    return _beside([*units, *[completion_unit(p, *odd, images) for odd in several[len(units) * 2 :]]])


def _uid(group: PairGroup | Encoded) -> str:
    return group.uid if isinstance(group, Encoded) else group.uids[0]


def group_size(group: PairGroup | Encoded, *, shared: bool) -> tuple[int, int]:
    """(tokens, scored positions) of `group_unit`."""
    tokens, copies = sum(map(len, group.completions)), len(group.completions)
    scored = sum(count_scored(*side) for side in group.sides)
    return len(group.prompt) * (-(-copies // 2) if shared else copies) + tokens, scored


def _beside(units: Sequence[Unit]) -> Unit:
    """Several units concatenated into one, with consecutive slots."""
    begins = np.cumsum([0, *[len(unit.tokens) for unit in units]])
    slots = np.cumsum([0, *[unit.slot.max() + 1 for unit in units]])
    moved = [
        unit._replace(k_start=unit.k_start + at, k_end=unit.k_end + at, source=unit.source + at, slot=unit.slot + slot)
        for unit, at, slot in zip(units, begins, slots, strict=False)
    ]
    names = (name for name in Unit._fields if name != "images")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(unit, name) for unit in moved]) for name in names}
    shown = [images for unit, at in zip(units, begins, strict=False) if (images := _moved(unit.images, at))]
    if not shown:
        return Unit(**arrays)
    starts, names = np.concatenate([images.starts for images in shown]), tuple(name for one in shown for name in one.names)
    return Unit(**arrays, images=dataclasses.replace(shown[0], starts=starts, names=names))


def place_units(
    units: Mapping[int, Unit],
    members: np.ndarray,
    *,
    length: int,
    scored: int,
    unit_slots: int,
    image_shape: tuple[int, int] = (0, 0),
) -> Rows:
    """Rows with the units `members[R, per_row]` (-1: none) written one after the other; the rest is padding.

    `image_shape`: M and W of `RowImages`; 0 for rows without images.
    """
    count, per_row = members.shape
    slots = unit_slots * per_row
    x = np.broadcast_to(np.arange(length, dtype=np.int32), (count, length))
    tokens, positions = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    k_start, k_end = x.copy(), x + 1
    source, target = np.zeros((count, scored), np.int32), np.zeros((count, scored), np.int32)
    slot = np.full((count, scored), slots, np.int32)
    images = ImageRows(count, length, *image_shape) if image_shape[0] else None
    for row in range(count):
        at, read = 0, 0
        for place, member in enumerate(members[row][members[row] >= 0]):
            unit = units[int(member)]
            here, there = slice(at, at + len(unit.tokens)), slice(read, read + len(unit.target))
            tokens[row, here], positions[row, here] = unit.tokens, unit.positions
            k_start[row, here], k_end[row, here] = at + unit.k_start, at + unit.k_end
            if images is not None and unit.images is not None:
                for x in images.place(row, at, unit.images):  # the tokens of an image see each other in both directions
                    k_end[row, x] = x.stop
            source[row, there], target[row, there] = at + unit.source, unit.target
            slot[row, there] = place * unit_slots + unit.slot
            at, read = here.stop, there.stop
    index = members.reshape(-1)
    weight = (index >= 0).astype(np.float32)
    found = None if images is None else images.rows
    return Rows(tokens, positions, k_start, k_end, source, target, slot, weight, index, images=found, slots=slots)


class ImageRows:
    """Builder for the images of rows; `rows` is the result so far."""

    def __init__(self, count: int, length: int, columns: int, width: int) -> None:
        self.rows = RowImages(np.zeros((count, columns, width), np.float32), np.full((count, length), -1, np.int32))
        self._held: list[dict[str, int]] = [{} for _ in range(count)]  # first column of each image, by row

    def place(self, row: int, at: int, images: PromptImages) -> list[slice]:
        """Adds the images of a text that begins at position `at` of a row. Returns the positions of each image."""
        held, places = self._held[row], []
        for start, name in zip(images.starts.tolist(), images.names, strict=True):
            if name not in held:
                held[name] = len(held) * images.tokens
                self.rows.features[row, held[name] : held[name] + images.tokens] = images.features[name]
            here = slice(at + start, at + start + images.tokens)
            self.rows.index[row, here] = held[name] + np.arange(images.tokens)
            places.append(here)
        return places
