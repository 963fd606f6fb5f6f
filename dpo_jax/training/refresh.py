"""Refreshed references: the policy becomes the new reference every N steps (TR-DPO's hard update).

Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment", arXiv 2404.09656. No reference weights are kept.
Training needs only the reference log-probabilities, which one pass computes from the policy of that step, for the pairs that
are read before the next update.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout
from dpo_jax.data.loader import few_shapes, make_batch, round_up
from dpo_jax.reference import ReferenceCache, pair_key
from dpo_jax.runtime.hosts import from_first, is_first
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.progress import SAY, reported
from dpo_jax.types import Array, Rows, Variables


class Refresh(Protocol):
    """Training inputs computed from the policy after every `every` steps: log-probabilities here, whole rounds of samples in
    `dpo_jax.online`. `train` saves the state first, and keeps that of step `origin(done)` while it is needed.
    """

    every: int
    record: dict[str, Any]
    """Saved with each checkpoint and passed to `resume`."""

    def origin(self, done: int) -> int: ...
    def resume(self, record: Mapping[str, Any]) -> None: ...
    def lacks(self, step: int, weights: str) -> bool: ...
    def update(self, step: int, variables: Variables, weights: str, *, steps: Iterable[int]) -> None: ...


class RefreshedReference:
    """The reference log-probabilities of a run whose reference becomes the policy after every `every` steps.

    Args:
      pairs: the training pairs.
      values: float32[n, 2], those of the first reference (rankings: [n, K]), used by steps below `every`. The attribute
        `values` is a copy that changes in place: pass it to `stream` as `ref_logps`. Entries that the next steps do not read
        become NaN, so that no stale value can be used.
      total_steps: of the run. Pairs that only later steps would read are skipped.
      read_by: `read_by(step)` gives the indices of the pairs that a step reads, also beyond `total_steps`.
      score: compiled `score(variables, rows) -> float32[P, K]`, as for `reference_logps`.
      folder: for one cache per update, `step-N-...`. A killed pass continues there.
      layout, batch, part: row layout, pairs per batch, and `Partitioner.host_part`.
      identity: what the values depend on besides the weights, as for `cached_reference_logps`. The step and a digest of its
        weights are added.
    """

    def __init__(
        self,
        every: int,
        *,
        pairs: Sequence[Encoded],
        values: np.ndarray,
        total_steps: int,
        read_by: Callable[[int], Iterable[int]],
        score: Callable[[Variables, Rows], Array],
        folder: Path,
        layout: Layout,
        batch: int = 16,
        part: tuple[int, int] = (0, 1),
        identity: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = SAY,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.every, self.folder, self.record = every, folder, {}
        self.values = np.array(values, np.float32)
        self._pairs, self._score = pairs, score
        self._total_steps, self._read_by = total_steps, read_by
        self._layout = few_shapes(layout, examples=len(pairs), batch=batch)
        self._batch, self._part, self._identity, self._say = batch, part, dict(identity or {}), say

    def origin(self, done: int) -> int:
        """The step whose policy is the reference of step `done`; 0: the first reference."""
        return done - done % self.every

    def lacks(self, step: int, weights: str) -> bool:
        """Whether the weights of `step`, with digest `weights`, are needed to complete its log-probabilities."""
        return bool(self._lacking(self._open(step, weights), self._to_compute(step)).any())

    def update(self, step: int, variables: Variables, weights: str, *, steps: Iterable[int]) -> None:
        """Makes the policy of `step` the reference. `variables` are used only if the cache is incomplete.

        `weights` is their digest. The caches of `steps`, at which a run may be resumed, are kept. A signal can interrupt
        it after each batch (`runtime.pauses`).
        """
        distinct, store = self._to_compute(step), self._open(step, weights)
        for what in store.damage if store is not None else ():
            self._say(f"{self.folder}: {what}; missing entries are computed again")
        lacking = self._lacking(store, distinct)
        # Always the same batches, because the last bits of a sum may depend on the rest of the batch.
        batches = [range(first, min(first + self._batch, len(distinct))) for first in range(0, len(distinct), self._batch)]
        todo = [distinct[batch.start : batch.stop] for batch in batches if lacking[batch.start : batch.stop].any()]
        with reported(f"reference pass of step {step}", total=sum(map(len, todo)), unit="pairs") as task:
            for some in todo:
                batch = make_batch(self._pairs, some, layout=self._layout, batch=self._batch, part=self._part)
                numbers, values = batch.of_examples(self._score(variables, batch.rows))
                if store is not None:
                    store.add([self._pairs[i] for i in some[numbers]], values)
                task.advance(len(some))
                pause()
        numbers = self._numbers(step, min(step + self.every, self._total_steps))
        found = np.zeros((len(numbers), *self.values.shape[1:]), np.float32)
        if store is not None:
            found = store.lookup([self._pairs[i] for i in numbers])
        self.values[:] = np.nan
        self.values[numbers] = from_first(found)
        self.record |= {"step": step, "weights": weights}
        self._forget({self.origin(one) for one in steps} | {step}, keep=None if store is None else store.directory)
        self._say(f"reference from step {step}: log-probabilities of the {len(numbers):,} pairs of the next steps")

    def resume(self, record: Mapping[str, Any]) -> None:
        """Continues from the `record` of a checkpoint."""
        self.record.clear()
        self.record |= record

    def _numbers(self, first: int, last: int) -> np.ndarray:
        """The distinct indices of pairs read by steps `first` to `last - 1`."""
        return np.array(list(dict.fromkeys(int(i) for step in range(first, last) for i in self._read_by(step))), np.int64)

    def _to_compute(self, step: int) -> np.ndarray:
        """The distinct pairs read from `step` on, in full batches, so that an extended run has the same ones."""
        first: dict[tuple[bytes, ...], int] = {}
        for number in self._numbers(step, step + self.every):
            first.setdefault(pair_key(self._pairs[number]), int(number))
        read = {pair_key(self._pairs[i]) for i in self._numbers(step, min(step + self.every, self._total_steps))}
        return np.array(list(first.values()), np.int64)[: round_up(len(read), self._batch)]

    def _open(self, step: int, weights: str) -> ReferenceCache | None:
        """The cache of `step`, which only the first host has."""
        if not is_first():
            return None
        identity = {**self._identity, "step": step, "weights": weights}
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return ReferenceCache(self.folder / f"step-{step}-{name}", identity)

    def _lacking(self, store: ReferenceCache | None, distinct: np.ndarray) -> np.ndarray:
        lacking = np.zeros(len(distinct), np.uint8)
        if store is not None:
            lacking[store.missing([self._pairs[i] for i in distinct])] = 1
        return from_first(lacking)

    def _forget(self, steps: set[int], *, keep: Path | None) -> None:
        """Deletes the caches of steps not in `steps`, and caches of the same step with other weights than in `keep`."""
        if keep is None:
            return
        for folder in self.folder.glob("step-*-*"):
            with contextlib.suppress(ValueError):
                step = int(folder.name.split("-")[1])
                if folder != keep and (step not in steps or folder.name.split("-")[:2] == keep.name.split("-")[:2]):
                    shutil.rmtree(folder)
