"""Batches of a round: pairs grouped by prompt, in one row layout for all rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.groups import PairGroup, group_pairs
from dpo_jax.data.layout import Layout, examples_to_rows
from dpo_jax.data.loader import Batch, make_batch, plan_layout
from dpo_jax.lab.methods import row_parts
from dpo_jax.types import Partitioner


class PairBatches(NamedTuple):
    groups: Sequence[PairGroup]
    ref_logps: np.ndarray  # float32[groups, pairs, 2]
    layout: Layout
    columns: Mapping[str, np.ndarray] = {}  # float32[groups, pairs] each: further inputs of the loss per pair, by keyword

    def batch(self, indices: np.ndarray, *, size: int, part: tuple[int, int]) -> Batch:
        """Rows of the groups `indices`, at most `size`."""
        made = make_batch(self.groups, indices, layout=self.layout, batch=size, ref_logps=self.ref_logps, part=part)
        if not self.columns:
            return made
        of_pairs = {name: values[indices].reshape(-1) for name, values in self.columns.items()}
        # Groups with fewer pairs have a 0 in place of a value, as padding examples do; a loss that divides by it would be
        # infinite.
        extras = {
            name: np.where((found := examples_to_rows(values, made.rows)) == 0, values.max() * (name == "beta"), found)
            for name, values in of_pairs.items()
        }
        return made._replace(rows=made.rows.replace(extras=extras))


def of_groups(groups: Sequence[PairGroup], values: np.ndarray, *, pairs: int) -> np.ndarray:
    """Values of the caller's pairs, [P, ...], arranged by group: float32[groups, pairs, ...], 0 where there is no pair."""
    found = np.zeros((len(groups), pairs, *values.shape[1:]), np.float32)
    for place, group in zip(found, groups, strict=True):
        place[: len(group.members)] = values[group.members]
    return found


def prompt_groups(pairs: Sequence[Encoded], prompts: Iterable[Hashable]) -> list[PairGroup]:
    """`pairs` grouped by prompt, in order of first appearance; `prompts[P]` are numbers or names of prompts. `members` index
    all pairs."""
    members: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(place)
    groups = []
    for places in members.values():
        [group] = group_pairs([pairs[place] for place in places])
        groups.append(dataclasses.replace(group, members=np.array(places, np.int64)[group.members]))
    return groups


def worst_case(prompts: Sequence[np.ndarray], *, completions: int, tokens: int) -> PairGroup:
    """The largest possible group: the longest prompt, `completions` of `tokens` tokens each, and all pairs of them."""
    several = tuple(np.full(tokens, number, np.int32) for number in range(completions))
    pairs = np.stack(np.triu_indices(completions, 1), axis=1).astype(np.int32)
    members = np.arange(len(pairs), dtype=np.int64)
    return PairGroup(max(prompts, key=len), several, pairs, members, ("",) * len(pairs))


def plan_rows(
    groups: Sequence[PairGroup],
    partitioner: Partitioner,
    *,
    kind: Literal["plain", "shared", "packed"],
    batch: int,
    microbatches: int,
    length: int | None = None,
) -> Layout:
    """A layout for batches of `batch` groups. `groups` must include the largest group to come. `length`: see `plan_layout`."""
    return plan_layout(groups, kind=kind, batch=batch, length=length, shapes=2, **row_parts(partitioner, microbatches))
