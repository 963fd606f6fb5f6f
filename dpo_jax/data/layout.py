"""Row layouts: plain (one completion per row), shared (one pair per row, prompt stored once), packed (several pairs per row).

The shared layout is `[reversed(chosen) | prompt | rejected]`. With the chosen completion stored backwards, every token sees one
contiguous range of keys, so two integers per token describe any packing:

    chosen c_j    (index x)   [x, end of prompt)     c_j, c_{j-1}, ..., c_0, then the whole prompt
    prompt p_i    (index x)   [start of prompt, x]
    rejected r_k  (index x)   [start of prompt, x]   the whole prompt, then r_0 ... r_k
    padding       (index x)   [x, x]                 itself, so that no softmax is empty

The prompt passes through the model once, and both completions attend to it. The last prompt token predicts `c_0` and `r_0`; the
neighbor on the right predicts `c_j`, the neighbor on the left `r_k`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np

from dpo_jax.data.arguments import check_completions, check_ids, check_kind, check_mismatched, check_pairs, check_ref_logps
from dpo_jax.data.encode import Encoded, PromptImages
from dpo_jax.data.groups import PairGroup
from dpo_jax.data.segments import Completion, Unit, completion_unit, group_size, group_unit, place_units, shared_unit
from dpo_jax.types import Array, Rows

Ranking = tuple[np.ndarray, Sequence[np.ndarray]]
"""(prompt ids, [completion ids, ...] best first), int32 each."""
Text = tuple[np.ndarray, np.ndarray] | Completion
"""A training text: (prompt ids, completion ids), int32 each, or a `Completion`, which has further fields."""
Example = Encoded | PairGroup | Text


def causal_rows(tokens: Array | Sequence[Sequence[int]]) -> Rows:
    """Plain language-model rows: each token of `tokens` int32[R, L] sees itself and those before it.
    All but the first are scored.

    >>> rows = causal_rows([[5, 6, 7], [8, 9, 4]])
    >>> rows.target.tolist(), rows.slots
    ([[6, 7], [9, 4]], 1)
    """
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
    """One completion per row, after its prompt: R = 2P rows of L = `length` tokens, alternating chosen and rejected.

    Works with any causal model: padding is on the right, and a model may ignore `k_start` and `k_end`. `ref_logps` float[P, 2],
    in the order of `encoded`, is stored in the rows. Without a prompt nothing predicts the first token, so it is not scored.

    Raises ValueError for a row that needs more than `length` tokens, a completion without tokens, negative or fractional ids,
    and `ref_logps` of another shape; TypeError for pairs that are not `Encoded`.

    >>> rows = plain_rows(encoded, length=64)
    >>> rows.tokens.shape, rows.weight.shape
    ((4, 64), (2,))
    """
    check_pairs(encoded)
    layout = Layout("plain", length=length, scored=length)
    return layout.rows(encoded, ref_logps=ref_logps)


def shared_rows(encoded: Sequence[Encoded], *, length: int, ref_logps: Array | None = None) -> Rows:
    """One pair per row, `[reversed(chosen) | prompt | rejected]`: the prompt is computed once.

    R = P rows of L = `length` tokens, for models that honor `k_start`, `k_end` and `positions` (see `check_model`); for other
    models use `plain_rows`. `ref_logps` float[P, 2], in the order of `encoded`, is stored in the rows. Raises ValueError for a
    pair that needs more than `length` tokens or has no prompt; other errors are those of `plain_rows`.

    >>> rows = shared_rows(encoded, length=96, ref_logps=np.zeros((2, 2)))
    >>> rows.tokens.shape, rows.ref_logps.shape
    ((2, 96), (2, 2))
    """
    check_pairs(encoded)
    layout = Layout("shared", length=length, scored=length)
    return layout.rows(encoded, ref_logps=ref_logps)


def packed_rows(encoded: Sequence[Encoded], *, length: int, pairs_per_row: int = 16, ref_logps: Array | None = None) -> Rows:
    """Several pairs per row, each laid out as in `shared_rows`, in as few rows as first-fit decreasing finds.

    R rows of L = `length` tokens and at most `pairs_per_row` pairs. Packing reorders the pairs: `rows.index` int32[P] gives the
    number of each, and -1 for an empty place. `ref_logps`, in the order of `encoded`, is reordered with them. Reorder columns
    of your own (`extras`, `weight`) with `examples_to_rows`. Otherwise like `shared_rows`.

    >>> rows = packed_rows(encoded, length=128, pairs_per_row=2)
    >>> rows.tokens.shape, rows.index.tolist()
    ((1, 128), [1, 0])
    """
    check_pairs(encoded)
    layout = Layout("packed", length=length, scored=length, per_row=pairs_per_row)
    return layout.rows(encoded, ref_logps=ref_logps)


def completion_rows(
    completions: Sequence[Text], *, length: int, per_row: int = 1, image_shape: tuple[int, int] = (0, 0)
) -> Rows:
    """Single completions after their prompts, at most `per_row` per row: the rows of supervised fine-tuning.

    `completions` are (prompt, completion), int32[n] token ids each, with a third field bool[n] if not all tokens of the
    completion count. R rows of L = `length` tokens, one slot per completion. With `per_row` above 1, the rows are packed, and
    `rows.index` int32[E] gives the order. `image_shape` is that of `Layout`, for prompts that show images. Without a prompt the
    first token is not scored. Raises ValueError for a completion that does not fit, has no tokens or holds invalid token ids;
    TypeError for pairs.

    >>> rows = completion_rows([(np.int32([5, 6]), np.int32([7, 0]))], length=8)
    >>> rows.tokens.tolist(), completion_lengths(rows).tolist()
    ([[5, 6, 7, 0, 0, 0, 0, 0]], [[2.0]])
    """
    check_completions(completions)
    kind = "packed" if per_row > 1 else "plain"
    return Layout(kind, length=length, scored=length, per_row=per_row, image_shape=image_shape).rows(completions)


def ranking_rows(rankings: Sequence[Ranking], *, length: int, ref_logps: Array | None = None, at_least: int = 0) -> Rows:
    """Rankings of K completions, one completion per row after its prompt: R = K * P rows, those of a ranking together.

    `ref_logps[P, K]`, in the order of `rankings`, is stored in the rows. `weight` and `index` have one entry per ranking, and
    padding examples of weight 0 are added up to `at_least`. Raises ValueError if the rankings differ in length or are empty, or
    if one needs more than `length` tokens.

    >>> prompt, completions = np.int32([5, 6]), [np.int32([7, 0]), np.int32([8, 0]), np.int32([9, 0])]
    >>> rows = ranking_rows([(prompt, completions)], length=8)
    >>> rows.tokens.shape, rows.index.tolist()
    ((3, 8), [0])
    """
    sizes = sorted({len(completions) for _, completions in rankings})
    if len(sizes) != 1 or sizes[0] < 2:
        raise ValueError(f"rankings need the same number of completions, two or more; these have {sizes or 'none'}")
    places = sizes[0]
    for number, (prompt, completions) in enumerate(rankings):
        check_ids(prompt, f"ranking {number}: prompt", empty=True)
        for place, completion in enumerate(completions):
            check_ids(completion, f"ranking {number}: completion {place}")
        longest = len(prompt) + max(len(completion) for completion in completions)
        if longest > length:
            raise ValueError(f"ranking {number}: needs rows of {longest} tokens, but they hold {length}; raise the row length")
    encoded = [Encoded(prompt, best, worst, between=tuple(between)) for prompt, (best, *between, worst) in rankings]
    layout = Layout("plain", length=length, scored=length)
    return layout.rows(encoded, ref_logps=ref_logps, at_least=places * at_least)


def examples_to_rows(values: Array, rows: Rows, *, fill_value: float = 0.0) -> np.ndarray:
    """Values of the caller's examples, `values` [n, ...], reordered to match the batch: [E, ...], with `fill_value` for a
    padding example.

    Rows may hold examples in another order (`packed_rows`); this follows `rows.index`. Use it on the host, before the step:

        rows.replace(extras={"gap": examples_to_rows(gap, rows)})    a column that the loss takes by keyword
        rows.replace(extras={"beta": examples_to_rows(beta, rows, fill_value=0.1)})    one that must not be 0
        rows.replace(weight=examples_to_rows(weight, rows))          a weighted mean
        rows.replace(ref_logps=examples_to_rows(ref_logps, rows))    reference log-probabilities computed later

    A padding example has weight 0, but 0 times the NaN or infinity of a loss that divides by its column is NaN. Raises
    ValueError if `rows` hold more examples than `values`.

    >>> packed = packed_rows(encoded, length=128, pairs_per_row=3)
    >>> packed.index.tolist(), examples_to_rows(np.float32([0.5, 2.0]), packed).tolist()
    ([1, 0, -1], [2.0, 0.5, 0.0])
    """
    values, index = np.asarray(values), np.asarray(rows.index)
    if index.max(initial=-1) >= len(values):
        raise ValueError(f"{len(values)} values, but the rows hold example number {index.max()}: give one for each example")
    used = (index >= 0).reshape(-1, *(1 for _ in values.shape[1:]))
    return np.where(used, values[index], values.dtype.type(fill_value))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A fixed shape for the batches of a run, so that few programs are compiled.

    Groups of pairs are laid out like pairs. A group stays in one row even in kind plain, each completion after its own prompt.

    >>> Layout("shared", length=96, scored=64).rows(encoded).tokens.shape
    (2, 96)
    """

    kind: Literal["plain", "shared", "packed"]
    length: int  # L, tokens per row
    scored: int  # S, scored positions per row
    per_row: int = 1  # most pairs (groups, completions) per row; above 1 when packed, and for groups
    completions: int = 2  # most completions of a group
    pairs: int = 1  # most pairs of a group
    rows_multiple: int = 1  # empty rows pad R to a multiple of this
    row_counts: tuple[int, ...] = ()  # ascending; R is then padded to the next of these, so that few shapes are compiled
    image_shape: tuple[int, int] = (0, 0)  # M and W of `RowImages`: columns for image tokens in a row, and their width
    microbatches: int = 1  # on one device: equal parts of a batch, of which `step.mean_grads` skips those of empty rows

    def __post_init__(self) -> None:
        check_kind(self.kind)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Layout:
        """The layout with these fields, as read from JSON."""
        read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return cls(**read)

    def rows(
        self,
        examples: Sequence[Example],
        *,
        ref_logps: Array | None = None,
        at_least: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Rows:
        """The rows of `examples`: all pairs, all groups, or all completions. ValueError if one is too long; none is truncated.

        Empty rows are added up to `at_least`. `part=(index, count)` builds only the `index`-th of `count` equal parts of the
        rows, as each of several hosts needs. All parts in order are the rows, whatever their number.
        """
        return self.place(examples, ref_logps=ref_logps, at_least=at_least, part=part)[0]

    def place(
        self,
        examples: Sequence[Example],
        *,
        ref_logps: Array | None = None,
        at_least: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> tuple[Rows, np.ndarray]:
        """The result of `rows`, and `index` int32[E] over all parts: the example in each place of the batch, -1 for none.

        A group has places for `pairs` pairs: `index` numbers these, and `ref_logps` is [groups, pairs, 2]. Labels of single
        completions become the column `desirable` of `extras`.
        """
        first = examples[0] if examples else None
        pairs, places = isinstance(first, Encoded), places_of(first)
        groups = [example for example in examples if isinstance(example, PairGroup)]
        each = places if pairs and self.kind == "plain" else 1  # rows of an example
        sizes = np.array([size for example in examples for size in self._sizes(example)]).reshape(-1, 2)
        self._check(examples, sizes)
        shown = np.array([image_tokens(example) for example in examples for _ in self._sizes(example)], np.int64)
        self._check_images(examples, shown)
        bins = self._bins(sizes, shown, at_least=at_least)
        index = np.full((len(bins), self.per_row), -1, np.int32)
        for row, members in enumerate(bins):
            index[row, : len(members)] = members
        if len(bins) % part[1]:
            raise ValueError(f"{len(bins)} rows cannot be split into {part[1]} equal parts: raise rows_multiple")
        here = slice(part[0] * len(bins) // part[1], (part[0] + 1) * len(bins) // part[1])
        units = {member: self._unit(examples, member) for members in bins[here] for member in members}
        slots = self.completions if groups else places // each
        shape = {"length": self.length, "scored": self.scored, "image_shape": self.image_shape}
        rows = place_units(units, index[here], unit_slots=slots, **shape)
        if groups:
            slots_of_pairs, index = self._pairs(groups, index)
            rows = rows.replace(pairs=slots_of_pairs[here])
        if each > 1:
            index = np.where(index[::each] < 0, -1, index[::each] // each)
        mine = index[here.start // each : here.stop // each]
        rows = rows.replace(index=mine.reshape(-1), weight=(mine.reshape(-1) >= 0).astype(np.float32))
        if ref_logps is not None:
            check_ref_logps(ref_logps, examples, pairs=self.pairs)
            values = np.asarray(ref_logps, np.float32).reshape(-1, places if pairs else 2)
            rows = rows.replace(ref_logps=examples_to_rows(values, rows))
        if isinstance(first, Encoded) and first.desirable is not None:
            check_mismatched(examples)
            labels = np.array([bool(getattr(example, "desirable", None)) for example in examples], np.float32)
            rows = rows.replace(extras={"desirable": examples_to_rows(labels, rows)})
        return rows, index.reshape(-1)

    def _pairs(self, groups: Sequence[PairGroup], members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the pairs of the groups `members[R, per_row]`, int32[R, per_row * pairs, 2], and the `index` of `place`."""
        slots = np.zeros((*members.shape, self.pairs, 2), np.int32)
        index = np.full((*members.shape, self.pairs), -1, np.int32)
        for row, place in np.argwhere(members >= 0).tolist():
            number = int(members[row, place])
            pairs = groups[number].pairs
            slots[row, place, : len(pairs)] = place * self.completions + pairs
            index[row, place, : len(pairs)] = number * self.pairs + np.arange(len(pairs))
        return slots.reshape(len(members), -1, 2), index.reshape(len(members), -1)

    def _sizes(self, example: Example) -> list[tuple[int, int]]:
        """(tokens, scored positions) of each unit of `example`."""
        if isinstance(example, PairGroup):
            return [group_size(example, shared=self.kind != "plain")]
        if not isinstance(example, Encoded):
            return [Completion.of(example).size]
        if self.kind == "plain":
            return [Completion(example.prompt, *side).size for side in example.sides]
        return [group_size(example, shared=True)]

    def _check(self, examples: Sequence[Example], sizes: np.ndarray) -> None:
        for group in examples:
            if not isinstance(group, PairGroup):
                _check_alike(examples)
                break
            if len(group.completions) > self.completions or len(group.pairs) > self.pairs:
                raise ValueError(
                    f"{group.uids[0]}: its prompt has {len(group.completions)} completions and {len(group.pairs)} pairs, but "
                    f"the layout is for {self.completions} and {self.pairs}"
                )
        bad = np.flatnonzero((sizes > (self.length, self.scored)).any(axis=1))
        if not len(bad):
            return
        number = int(bad[0])
        example = examples[number * len(examples) // len(sizes)]
        name = (example.uid or f"pair {number}") if isinstance(example, Encoded) else f"text {number}"
        places = len(sizes) // len(examples)
        names = ("chosen", "rejected") if places == 2 else [f"completion {place}" for place in range(places)]
        side = f" ({names[number % places]})" if places > 1 else ""
        raise ValueError(
            f"{name}{side}: needs a row of {sizes[number][0]} tokens, {sizes[number][1]} of them scored, but rows hold "
            f"{self.length} and {self.scored}; raise the row length or lower max_length"
        )

    def _unit(self, examples: Sequence[Example], number: int) -> Unit:
        if self.kind == "plain" and isinstance(examples[0], Encoded):
            places = places_of(examples[0])
            pair = cast(Encoded, examples[number // places])
            return completion_unit(pair.prompt, *pair.sides[number % places], pair.images)
        example = examples[number]
        if isinstance(example, PairGroup) or (isinstance(example, Encoded) and example.between):
            return group_unit(example, shared=self.kind != "plain")
        return shared_unit(example) if isinstance(example, Encoded) else completion_unit(*Completion.of(example))

    def _check_images(self, examples: Sequence[Example], shown: np.ndarray) -> None:
        if shown.max(initial=0) <= self.image_shape[0]:
            return
        number = int(np.argmax(shown)) * len(examples) // len(shown)
        name = getattr(examples[number], "uid", "") or f"example {number}"
        raise ValueError(
            f"{name}: its images take {shown.max()} tokens, and a row has columns for {self.image_shape[0]}: make the layout "
            "with plan_layout, or give Layout(image_shape=(columns, width of the features))"
        )

    def _bins(self, sizes: np.ndarray, shown: np.ndarray, *, at_least: int) -> list[list[int]]:
        """The units of each row, with empty rows added for `at_least`, `row_counts` and `rows_multiple`."""
        if self.per_row > 1:
            sizes = np.column_stack([sizes, np.ones(len(sizes), np.int64), shown])
            bins = first_fit_decreasing(sizes, capacity=(self.length, self.scored, self.per_row, self.image_shape[0]))
        else:
            bins = [[i] for i in range(len(sizes))]
        count = max(len(bins), at_least)
        count = next((allowed for allowed in self.row_counts if allowed >= count), count)
        return bins + [[]] * (count + -count % self.rows_multiple - len(bins))


def _check_alike(examples: Sequence[Example]) -> None:
    """Raises ValueError unless all examples have as many completions as the first, and either all or none have a label."""
    for example in examples:
        if isinstance(example, Encoded) and places_of(example) != places_of(examples[0]):
            raise ValueError(
                f"{example.uid or 'an example'} has {places_of(example)} completions, but the first example has "
                f"{places_of(examples[0])}: all of a batch must have the same number"
            )
        if (getattr(example, "desirable", None) is None) != (getattr(examples[0], "desirable", None) is None):
            raise ValueError("some examples have a label (desirable) and some have none: a batch must be of one kind")


def images_of(example: Example) -> PromptImages | None:
    """The images that the prompt of an example shows."""
    return Completion.of(example).images if isinstance(example, tuple) else example.images


def image_tokens(example: Example) -> int:
    """Number of `RowImages` columns that an example takes: the tokens of its images, each image counted once."""
    images = images_of(example)
    return 0 if images is None else images.columns


def places_of(example: Example | None) -> int:
    """Number of completions of an example: 2 for a pair, K for a ranking, 1 for a text. Groups are handled separately."""
    return len(example.completions) if isinstance(example, Encoded) else 1


def first_fit_decreasing(sizes: np.ndarray, *, capacity: tuple[int, ...]) -> list[list[int]]:
    """First-fit decreasing bin packing: bins of item numbers, longest (column 0) first.

    In each bin, column k of `sizes[n, k]` sums to at most `capacity[k]`.
    """
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
