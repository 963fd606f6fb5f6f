"""Batches and their shapes: the training stream is a pure function of (data, seed, step), so resuming needs one integer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

from dpo_jax.data.arguments import check_batch, check_ref_logps
from dpo_jax.data.encode import Encoded, count_scored
from dpo_jax.data.groups import PairGroup
from dpo_jax.data.layout import Completion, Example, Layout, first_fit_decreasing, image_tokens, images_of, places_of
from dpo_jax.data.segments import group_size
from dpo_jax.types import Array, Rows


class Batch(NamedTuple):
    """The input of one step, on the host. All fields but `rows` describe the whole batch, even if `rows` is one host's part."""

    rows: Rows
    index: np.ndarray  # int32[E]  position in `uids` of the example at each place; -1 for a padding example
    uids: list[str]  # of the examples in the batch
    stats: dict[str, float]  # pairs or texts; computed positions, tokens in them; scored_tokens; padding (0 to 1)
    first: int = 0  # place of the first example in the data; set by `eval_batches`

    def of_examples(self, values: Array) -> tuple[np.ndarray, np.ndarray]:
        """The real examples' places in the data, int[n], and their part of `values[E, ...]`, [n, ...]: without padding
        examples.

        Only in batches of `eval_batches`; in others the places are those in the batch (`uids`). Groups count as `Layout.pairs`
        places each.
        """
        used = self.index >= 0
        return self.first + self.index[used], np.asarray(values)[used]


def total_steps(examples: int, *, batch: int, epochs: float, behind: int = 0) -> int:
    """Optimizer steps of `epochs` passes over the examples; the last step may be a partial batch.

    >>> total_steps(100, batch=32, epochs=3)
    10
    """
    if not isinstance(examples, int | np.integer):
        raise TypeError(f"examples: expected their number, got {type(examples).__name__}: give len(examples)")
    check_batch(batch)
    return math.ceil((seen_in(epochs, examples) + behind) / batch)


def seen_in(epochs: float, examples: int) -> int:
    """Examples seen in `epochs` passes, at least one. A fraction of an epoch sees a random subset, each example once."""
    return max(1, round(examples * epochs))


def batch_indices(
    examples: int, *, batch: int, seed: int, step: int, epochs: float | None = None, behind: int = 0
) -> np.ndarray:
    """The examples of step `step`: int64[<= batch], a pure function of the arguments.

    Epochs follow each other without a gap, so a batch may end one and begin the next; each epoch contains each example once.
    `epochs` ends the stream, and the last batch may be smaller. If a run that ended with such a batch is extended, `behind` is
    the number of examples that this batch lacked: every later step starts that many examples earlier.
    """
    last = math.inf if epochs is None else seen_in(epochs, examples)
    places = np.arange(step * batch - behind, min((step + 1) * batch - behind, last), dtype=np.int64)
    epoch, place = np.divmod(places, examples)
    indices = np.empty(len(places), np.int64)
    for number in np.unique(epoch):
        here = epoch == number
        indices[here] = _permutation(examples, seed, int(number))[place[here]]
    return indices


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def train_batches(
    examples: Sequence[Example],
    *,
    layout: Layout,
    batch: int,
    seed: int,
    epochs: float | None = None,
    behind: int = 0,
    ref_logps: Array | None = None,
    uids: Sequence[str] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Callable[[int], Batch]:
    """`stream(step) -> Batch`: shuffled training batches. `ref_logps[E, K]` is in the order of `examples` (of groups,
    [E, pairs, 2]). `epochs`, `behind`: as in `batch_indices`.

    `part` (`Partitioner.host_part`) builds only the rows of one host; the batch does not depend on the number of hosts.

    >>> batches = train_batches(encoded, layout=plan_layout(encoded, kind="shared", batch=2), batch=2, seed=0)
    >>> batches(0).rows.weight
    array([1., 1.], dtype=float32)

    ValueError: no examples, `ref_logps` of another shape, another number of `uids`, or a step beyond `epochs`.
    """
    check_batch(batch)
    if not len(examples):
        raise ValueError("there are no examples to train on")
    if ref_logps is not None:  # otherwise values could be those of other examples: they are joined by place
        check_ref_logps(ref_logps, examples, pairs=layout.pairs)
    if uids is not None and len(uids) != len(examples):
        raise ValueError(f"uids: expected one for each of the {len(examples)} examples, got {len(uids)}")

    def at(step: int) -> Batch:
        indices = batch_indices(len(examples), batch=batch, seed=seed, step=step, epochs=epochs, behind=behind)
        if not len(indices):  # only if the stream ends
            steps = total_steps(len(examples), batch=batch, epochs=epochs or 0, behind=behind)
            raise ValueError(f"step {step} is beyond epochs={epochs} ({steps} steps): use total_steps(...)")
        return make_batch(
            examples,
            indices,
            layout=layout,
            batch=batch,
            ref_logps=ref_logps,
            uids=uids,
            part=part,
        )

    return at


def eval_batches(examples: Sequence[Example], *, layout: Layout, batch: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """Batches that contain every example once, in order: for evaluation and the reference pass (`Batch.of_examples`).

    The next batch is made in a thread while the caller works on one.

    >>> [batch] = eval_batches(encoded, layout=plan_layout(encoded, kind="shared", batch=2), batch=2)
    >>> numbers, values = batch.of_examples(completion_logps(model, variables, batch.rows))
    >>> numbers.tolist(), values.shape
    ([0, 1], (2, 2))
    """

    def build(start: int) -> Batch:
        indices = np.arange(start, min(start + batch, len(examples)))
        return make_batch(examples, indices, layout=layout, batch=batch, part=part)._replace(first=start * layout.pairs)

    with ThreadPoolExecutor(1, thread_name_prefix="next-batch") as pool:
        starts = iter(range(0, len(examples), batch))
        coming = [pool.submit(build, start) for start in itertools.islice(starts, 1)]
        while coming:
            here = coming.pop().result()
            coming = [pool.submit(build, start) for start in itertools.islice(starts, 1)]
            yield here


def make_batch(
    examples: Sequence[Example],
    indices: np.ndarray,
    *,
    layout: Layout,
    batch: int,
    ref_logps: Array | None = None,
    uids: Sequence[str] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Batch:
    """The rows of `examples[indices]`. `index` counts within the batch. A short batch is padded with empty rows."""
    chosen = [examples[i] for i in indices]
    pairs = not isinstance(chosen[0], tuple)
    at_least = 0 if layout.per_row > 1 else batch * (places_of(chosen[0]) if layout.kind == "plain" else 1)
    ref = None if ref_logps is None else np.asarray(ref_logps)[indices]
    rows, index = layout.place(chosen, ref_logps=ref, at_least=at_least, part=part)
    names = [
        name
        for i, example in zip(indices, chosen, strict=True)
        for name in _uids(example, other=str(i) if uids is None else uids[int(i)], places=layout.pairs)
    ]
    plain = layout.kind == "plain"
    real = sum(_tokens(example, plain=plain) for example in chosen)
    left_out = 1 - (index.reshape(layout.microbatches, -1) >= 0).any(axis=1).mean()
    positions = rows.tokens.size * part[1] * (1 - left_out)
    stats = {
        "pairs" if pairs else "texts": float((index >= 0).sum()),
        "tokens": float(real),
        "positions": float(positions),
        "scored_tokens": float(sum(_scored(example) for example in chosen)),
        "padding": 1 - real / positions,
    }
    return Batch(rows, index, names, stats)


def _uids(example: Example, *, other: str, places: int) -> list[str]:
    """One uid for each place of `example` in the index of a batch; empty for unused places."""
    if isinstance(example, PairGroup):
        return [*example.uids, *[""] * (places - len(example.uids))]
    return [example.uid if isinstance(example, Encoded) else other]


SHAPES = 5  # most programs to compile
BLOCK = 128  # least queries or keys per block of an attention kernel
LENGTHS = np.array([1.08, 1.17, 1.25, 1.33, 1.5, 2.0])
"""Candidate lengths of packed rows, in units of the longest example."""


def plan_layout(
    examples: Sequence[Example],
    *,
    kind: Literal["plain", "shared", "packed"],
    batch: int,
    length: int | None = None,
    multiple: int = 1,
    microbatches: int = 1,
    shapes: int = SHAPES,
    pieces: int = 1,
) -> Layout:
    """The tightest shapes into which all `examples` fit: row length, scored positions, pairs per row, row counts.

    `length` is the row length; the default is that of the longest example, or for packed rows the one with the least padding.
    The number of rows is a multiple of `multiple`: devices times microbatches. `microbatches`: on one device their number,
    because it skips empty ones; else 1. `shapes`, at least 2, limits the row counts of packed rows: fewer mean fewer programs
    to compile and more padding. `pieces` is the number of parts into which a mesh splits each row (its context axis); each part
    then fits whole blocks of the attention kernels.

    >>> layout = plan_layout(encoded, kind="packed", batch=2)
    >>> layout.place(encoded)[0].tokens.shape[1] == layout.length
    True
    """
    check_batch(batch)
    if not len(examples):
        raise ValueError("there are no examples to lay out in rows")
    sizes = np.array([_size(example, plain=kind == "plain") for example in examples])  # [E, (tokens, scored)]
    longest, most_scored = sizes.max(axis=0)
    image_shape = image_shape_of(examples)
    groups = [example for example in examples if isinstance(example, PairGroup)]
    if kind != "packed" and not groups:
        unit = 32 if pieces == 1 else pieces * BLOCK
        length, scored = length or round_up(longest, unit), round_up(most_scored, math.lcm(32, pieces))
        parts = {"rows_multiple": multiple, "microbatches": microbatches, "image_shape": image_shape}
        return Layout(kind, length=length, scored=scored, **parts)
    unit = 64 if pieces == 1 else pieces * BLOCK
    lengths = [length] if length else sorted({round_up(max(longest, x), unit) for x in (0, *(longest * LENGTHS), 1024)})
    parts = {"multiple": multiple, "microbatches": microbatches, "pieces": pieces}
    layouts = [_packed(sizes, length, batch=batch, shapes=shapes, **parts) for length in lengths]
    least = min(positions for positions, _ in layouts)
    # The shortest of about equally good lengths: attention is cheaper, and there are more rows to divide among devices.
    layout = next(layout for positions, layout in layouts if positions <= 1.01 * least)
    if image_shape[0]:  # for all examples of a row, as far as their tokens fit
        columns = min(layout.length // image_shape[0], layout.per_row) * image_shape[0]
        layout = dataclasses.replace(layout, image_shape=(columns, image_shape[1]))
    if not groups:
        return layout
    completions, pairs = (max(len(getattr(group, name)) for group in groups) for name in ("completions", "pairs"))
    return dataclasses.replace(layout, kind=kind, completions=completions, pairs=pairs)


def image_shape_of(examples: Sequence[Example]) -> tuple[int, int]:
    """The largest number of image tokens of an example, and the feature width; zeros without images."""
    images = images_of(max(examples, key=image_tokens))
    return (0, 0) if images is None else (images.columns, images.width)


WORTH_COMPILING = 500
"""Number of batches above which a few percent less padding saves more time than compiling several programs takes."""


def few_shapes(layout: Layout, *, examples: int, batch: int) -> Layout:
    """`layout` for a pass over `examples` examples: short passes get only two row counts, of which usually one is compiled.

    The row length is unchanged, so each row is computed as before; a sum over the rows of a batch may round differently. The
    number of epochs does not matter, so an extended run keeps its shapes.
    """
    return layout if examples > WORTH_COMPILING * batch else dataclasses.replace(layout, row_counts=layout.row_counts[-2:])


def skippable(microbatches: int, row_shards: int) -> int:
    """Number of microbatches that can be skipped if they have only empty rows (`step.mean_grads`): those of a single device."""
    return microbatches if row_shards == 1 else 1


def _packed(
    sizes: np.ndarray, length: int, *, batch: int, multiple: int, microbatches: int, shapes: int, pieces: int, tries: int = 64
) -> tuple[float, Layout]:
    """(positions, layout) of packed rows of `length`: positions per batch of `batch` examples, padding included.

    The layout has at most `shapes` row counts, chosen so that few rows are empty.
    """
    most_scored = sizes.max(axis=0)[1]
    mean_tokens, mean_scored = sizes.mean(axis=0)
    # Scored positions and pairs also limit a row: capacities somewhat above their mean share still let rows fill up.
    scored = min(length, round_up(max(most_scored, 1.3 * length * mean_scored / mean_tokens), math.lcm(32, pieces)))
    per_row = min(batch, max(2, math.ceil(3 * length / mean_tokens)))
    generator = np.random.default_rng(0)  # the same on all hosts, independent of the run's seed
    sizes = np.column_stack([sizes, np.ones(len(sizes), np.int64)])
    drawn = [
        len(first_fit_decreasing(generator.permutation(sizes)[:batch], capacity=(length, scored, per_row)))
        for _ in range(tries)
    ]
    counts, rows = _few(drawn, shapes - 1, multiple=multiple, microbatches=microbatches)
    # The last count is for a batch larger than all of these.
    counts = (*counts, counts[-1] + round_up(counts[-1] / 16, multiple))
    layout = Layout(
        "packed",
        length=length,
        scored=scored,
        per_row=per_row,
        rows_multiple=multiple,
        row_counts=counts,
        microbatches=microbatches,
    )
    return rows * length, layout


def _few(needed: Sequence[int], most: int, *, multiple: int, microbatches: int) -> tuple[tuple[int, ...], float]:
    """At most `most` counts that minimize the rows added when `needed` is rounded up to them, and the mean of computed rows.

    If empty microbatches are skipped, the fewest counts that are about as good.
    """
    distinct = sorted({round_up(count, multiple) for count in needed})
    most = min(most, len(distinct))

    def computed(counts: tuple[int, ...]) -> float:
        allowed = [next(allowed for allowed in counts if allowed >= count) for count in needed]
        if microbatches > 1:
            allowed = [round_up(count, rows // microbatches) for count, rows in zip(needed, allowed, strict=True)]
        return float(np.mean(allowed))

    tried = []
    for number in range(1 if microbatches > 1 else most, most + 1):
        choices = [(*choice, distinct[-1]) for choice in itertools.combinations(distinct[:-1], number - 1)]
        best = min(choices, key=computed)
        tried.append((best, computed(best)))
    least = min(rows for _, rows in tried)
    return next((counts, rows) for counts, rows in tried if rows <= 1.01 * least)


def round_up(x: float, multiple: int) -> int:
    return math.ceil(x / multiple) * multiple


def _tokens(example: Example, *, plain: bool) -> int:
    """Positions that `example` occupies in all its rows."""
    if isinstance(example, PairGroup | Encoded):
        return group_size(example, shared=not plain)[0]
    return Completion.of(example).size[0]


def _scored(example: Example) -> int:
    """Scored positions of `example`."""
    if isinstance(example, PairGroup | Encoded):
        return sum(count_scored(*side) for side in example.sides)
    return Completion.of(example).size[1]


def _size(example: Example, *, plain: bool) -> tuple[int, int]:
    """(tokens, scored positions) of the longest row that `example` needs."""
    if isinstance(example, PairGroup):
        return group_size(example, shared=not plain)
    if not isinstance(example, Encoded):
        text = Completion.of(example)
        return text.size[0], count_scored(text.completion, text.scored)
    if not plain:
        return group_size(example, shared=True)
    return len(example.prompt) + max(map(len, example.completions)), max(example.scored_tokens)
