"""Argument checks of the public functions: pairs, completions and token ids."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.groups import PairGroup

LARGEST_ID = np.iinfo(np.int32).max
KINDS = ("plain", "shared", "packed")


def check_pairs(pairs: Any, *, name: str = "pairs") -> None:
    """Raises TypeError unless `pairs` is a sequence of `Encoded`, and ValueError naming the pair whose token ids are unusable.

    A completion needs at least one token, usually EOS. An empty prompt passes: each layout checks whether it needs one.
    """
    _check_sequence(pairs, "Encoded (token ids)", name=name)
    for number, pair in enumerate(pairs):
        if not isinstance(pair, Encoded):
            raise TypeError(f"{name} must be Encoded (token ids): use dpo_jax.encode; got {type(pair).__name__}")
        label = pair.uid or f"pair {number}"
        check_ids(pair.prompt, f"{label}: prompt", empty=True)
        check_ids(pair.chosen, f"{label}: chosen")
        check_ids(pair.rejected, f"{label}: rejected")
        for side, scored in zip(("chosen", "rejected"), (pair.chosen_scored, pair.rejected_scored), strict=True):
            check_scored(scored, getattr(pair, side), f"{label}: {side}")
        for place, ids in enumerate(pair.between):
            check_ids(ids, f"{label}: completion {place + 1}")
        if len(pair.between) != len(pairs[0].between):
            few, many = len(pairs[0].completions), len(pair.completions)
            raise ValueError(
                f"{label}: has {many} completions, but the first of {name} has {few}: all must have the same number"
            )


def check_completions(completions: Any) -> None:
    """Raises TypeError unless `completions` is a sequence of (prompt ids, completion ids), and ValueError for unusable ids."""
    _check_sequence(completions, "(prompt ids, completion ids)", name="completions")
    for number, pair in enumerate(completions):
        if isinstance(pair, Encoded):
            raise TypeError(
                "completions must be (prompt ids, completion ids), got Encoded: give "
                "[(pair.prompt, pair.chosen) for pair in encoded], or use plain_rows for pairs"
            )
        if isinstance(pair, str | Mapping) or not hasattr(pair, "__len__") or len(pair) not in (2, 3, 4):
            raise TypeError(f"completions must be (prompt ids, completion ids), got {type(pair).__name__} as number {number}")
        prompt, completion, *scored = pair
        check_ids(prompt, f"text {number}: prompt", empty=True)
        check_ids(completion, f"text {number}: completion")
        check_scored(scored[0] if scored else None, completion, f"text {number}: completion")


def check_scored(scored: Any, ids: Any, label: str) -> None:
    """Raises ValueError, beginning with `label`, unless `scored` is None, or bool [n] like `ids` with at least one true
    entry."""
    if scored is None:
        return
    if np.shape(scored) != np.shape(ids) or np.asarray(scored).dtype != bool:
        shape = f"{np.asarray(scored).dtype}{list(np.shape(scored))}"
        raise ValueError(f"{label}: the mask of scored tokens is {shape}; expected bool{list(np.shape(ids))}")
    if not np.any(scored):
        raise ValueError(f"{label} has no scored token")


def check_ids(ids: Any, label: str, *, empty: bool = False) -> None:
    """Raises ValueError, beginning with `label`, unless `ids` are non-negative integers [n] that fit in int32, and n > 0."""
    ids = np.asarray(ids)
    if ids.ndim != 1:
        raise ValueError(f"{label} has shape {ids.shape}; token ids [n] are expected")
    if not ids.size:  # of any dtype: an empty list has no integer one
        if empty:
            return
        raise ValueError(f"{label} has no tokens, not even EOS")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{label} has values of type {ids.dtype}; token ids are integers")
    if ids.min() < 0 or ids.max() > LARGEST_ID:
        raise ValueError(f"{label} holds {ids.min() if ids.min() < 0 else ids.max()}, which is not a token id")


def check_mismatched(examples: Sequence[Any]) -> None:
    """Warns if each labeled completion stands in for its own mismatched one, as `encode` leaves it.

    Losses that do not read mismatched ones need no others.
    """
    own = all(np.array_equal(example.chosen, example.rejected) for example in examples)
    if own and any(not np.array_equal(example.chosen, examples[0].chosen) for example in examples):
        warnings.warn(
            "each labeled completion is its own mismatched one, so KTO would take its KL from them: use the examples that "
            "dpo_jax.mismatched(examples, max_length=...) makes",
            stacklevel=3,
        )


def check_ref_logps(ref_logps: Any, examples: Sequence[Any], *, pairs: int) -> None:
    """Raises ValueError unless `ref_logps` is [E, K] for pairs or rankings, or [E, `pairs`, 2] for groups: reshaping, or values
    of other examples, would assign values to the wrong pairs. Texts have none, and are not checked."""
    first = examples[0] if len(examples) else None
    if isinstance(first, PairGroup):
        expected, of = (len(examples), pairs, 2), "the pairs of each group, chosen first"
    elif isinstance(first, Encoded):
        expected = (len(examples), len(first.completions))
        of = "one row for each pair, chosen first" if expected[1] == 2 else "one row for each ranking, best first"
    else:
        return
    if np.shape(ref_logps) != expected:
        raise ValueError(f"ref_logps has shape {np.shape(ref_logps)}, but {list(expected)} is expected: {of}")


def check_kind(kind: Any) -> None:
    """Raises ValueError unless `kind` is one of the kinds of rows."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")


def check_batch(batch: Any) -> None:
    """Raises ValueError unless a batch has at least one example."""
    if batch < 1:
        raise ValueError(f"batch: expected at least 1 example, got {batch}")


def _check_sequence(value: Any, items: str, *, name: str) -> None:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence | np.ndarray):
        what = "a single Encoded" if isinstance(value, Encoded) else type(value).__name__
        raise TypeError(f"{name} must be a sequence of {items}, such as a list; got {what}")
