"""The training stream: a pure function of (data, seed, step). Resuming needs one integer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Completion, Layout
from dpo_jax.types import Array, Rows

Example = Encoded | Completion


class Batch(NamedTuple):
    """What one step reads, on the host."""

    rows: Rows
    uids: list[str]  # of the examples in it, for error messages
    stats: dict[str, float]  # pairs or texts; tokens in real positions; scored_tokens; padding (share of positions, 0 to 1)


def total_steps(examples: int, *, batch: int, epochs: float) -> int:
    """Optimizer steps until every example was seen `epochs` times; the last step may be a partial batch."""
    return math.ceil(round(examples * epochs) / batch)


def batch_indices(
    examples: int, *, batch: int, seed: int, step: int, epochs: float | None = None, shard: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """The examples of step `step`: int64[<= batch], a pure function of the arguments.

    Epochs follow each other without a gap, so a batch may end one and begin the next; within an epoch each example comes once.
    `epochs` ends the stream: the last batch is cut there. `shard=(index, count)` is the part of one host of `count`; the parts
    of all hosts, in order, are the global batch.
    """
    last = math.inf if epochs is None else round(examples * epochs)
    places = np.arange(step * batch, min((step + 1) * batch, last), dtype=np.int64)
    epoch, place = np.divmod(places, examples)
    indices = np.empty(len(places), np.int64)
    for number in np.unique(epoch):
        here = epoch == number
        indices[here] = _permutation(examples, seed, int(number))[place[here]]
    part = -(-batch // shard[1])
    return indices[shard[0] * part : (shard[0] + 1) * part]


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def stream(
    examples: Sequence[Example],
    *,
    layout: Layout,
    batch: int,
    seed: int,
    epochs: float | None = None,
    ref_logps: Array | None = None,
    uids: Sequence[str] | None = None,
) -> Callable[[int], Batch]:
    """`stream(step) -> Batch`: shuffled training batches. `ref_logps[E, 2]` is in the order of `examples`."""

    def at(step: int) -> Batch:
        return make_batch(
            examples,
            batch_indices(len(examples), batch=batch, seed=seed, step=step, epochs=epochs),
            layout=layout,
            batch=batch,
            ref_logps=ref_logps,
            uids=uids,
        )

    return at


def in_order(
    examples: Sequence[Example], *, layout: Layout, batch: int, ref_logps: Array | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example once, in order, for evaluation and the reference pass: (which examples, their batch)."""
    for start in range(0, len(examples), batch):
        indices = np.arange(start, min(start + batch, len(examples)))
        yield indices, make_batch(examples, indices, layout=layout, batch=batch, ref_logps=ref_logps)


def make_batch(
    examples: Sequence[Example],
    indices: np.ndarray,
    *,
    layout: Layout,
    batch: int,
    ref_logps: Array | None = None,
    uids: Sequence[str] | None = None,
) -> Batch:
    """The rows of `examples[indices]`. `rows.index` counts within the batch. A short batch is filled with empty rows."""
    chosen = [examples[i] for i in indices]
    rows = layout.rows(chosen, ref_logps=None if ref_logps is None else np.asarray(ref_logps)[indices])
    if layout.kind != "packed":
        rows = _fill(rows, batch * (2 if layout.kind == "plain" and isinstance(chosen[0], Encoded) else 1), layout)
    names = [
        e.uid if isinstance(e, Encoded) else (str(i) if uids is None else uids[int(i)])
        for i, e in zip(indices, chosen, strict=True)
    ]
    real = sum(_tokens(example, plain=layout.kind == "plain") for example in chosen)
    stats = {
        "pairs" if isinstance(chosen[0], Encoded) else "texts": float(len(chosen)),
        "tokens": float(real),
        "scored_tokens": float((rows.slot < rows.slots).sum()),
        "padding": 1 - real / rows.tokens.size,
    }
    return Batch(rows, names, stats)


def plan_layout(
    examples: Sequence[Example],
    *,
    kind: Literal["plain", "shared", "packed"],
    batch: int,
    length: int | None = None,
    multiple: int = 1,
) -> Layout:
    """The tightest fixed shape into which all `examples` fit: row length, scored positions, pairs per row, row counts.

    `length` is the row length, by default the longest example (packed: at least twice the mean, so that rows fill up).
    `multiple` is what the number of rows must be divisible by: devices times microbatches.
    """
    sizes = np.array([_size(example, plain=kind == "plain") for example in examples])  # [E, (tokens, scored)]
    longest, most_scored = sizes.max(axis=0)
    if kind != "packed":
        return Layout(kind, length=length or round_up(longest, 32), scored=round_up(most_scored, 32), rows_multiple=multiple)
    length = length or round_up(max(longest, 2 * sizes[:, 0].mean()), 64)
    mean_tokens, mean_scored = sizes.mean(axis=0)
    # Scored positions are a second capacity of a row: with a little more than its mean share of them, rows still fill up.
    scored = min(length, round_up(max(most_scored, 1.15 * length * mean_scored / mean_tokens), 32))
    per_row = min(batch, max(2, math.ceil(1.5 * length / mean_tokens)))
    expected_rows = batch * mean_tokens / length
    # Row counts differ from batch to batch; rounding them up to a few values keeps the number of compilations small.
    step = multiple * max(1, math.ceil(expected_rows / 12 / multiple))
    return Layout(kind, length=length, scored=scored, per_row=per_row, rows_multiple=step)


def round_up(x: float, multiple: int) -> int:
    return math.ceil(x / multiple) * multiple


def _tokens(example: Example, *, plain: bool) -> int:
    """Positions that `example` takes up in all its rows."""
    if not isinstance(example, Encoded):
        return len(example[0]) + len(example[1])
    return len(example.prompt) * (2 if plain else 1) + len(example.chosen) + len(example.rejected)


def _size(example: Example, *, plain: bool) -> tuple[int, int]:
    """(tokens, scored positions) of the longest row that `example` needs."""
    if not isinstance(example, Encoded):
        prompt, completion = example
        return len(prompt) + len(completion), len(completion)
    completions = len(example.chosen), len(example.rejected)
    scored = max(completions) if plain else sum(completions)
    return len(example.prompt) + scored, scored


def _fill(rows: Rows, count: int, layout: Layout) -> Rows:
    """Empty rows up to `count`, so that the last batch of an epoch has the shape of the others."""
    missing = round_up(count, layout.rows_multiple) - len(rows.tokens)
    if missing <= 0:
        return rows
    x = np.broadcast_to(np.arange(layout.length, dtype=np.int32), (missing, layout.length))
    empty_row = {"k_start": x, "k_end": x + 1}
    examples = missing * len(rows.index) // len(rows.tokens)
    filler = {"slot": rows.slots, "index": -1}

    def extend(name: str) -> np.ndarray:
        value = getattr(rows, name)
        more = examples if name in ("weight", "index", "ref_logps") else missing
        tail = empty_row.get(name, np.full((more, *value.shape[1:]), filler.get(name, 0), value.dtype))
        return np.concatenate([value, tail])

    names = [name for name in rows.__dataclass_fields__ if name != "slots" and getattr(rows, name) is not None]
    return rows.replace(**{name: extend(name) for name in names})
