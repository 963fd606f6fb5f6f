"""Context parallelism: rows split over the context axis of a mesh, and hidden states at scored positions.

A decoder computes pieces: `[R * C, L / C, ...]`, one piece of each row on each of the `C` devices along the axis, all sharded
over `types.TOKEN_AXES` along their first axis. All but attention works token by token and does not see the difference.

A piece is not one contiguous run. Some tokens see more keys than others: in causal rows the late ones, in shared rows those of
the completions, at both ends. To balance the work, a row is dealt out in rounds. Each round gives every device a short run, in
alternately ascending and descending device order. The columns of a piece increase, so an interval of the row is an interval of
each piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpo_jax.models.axes import parts_of
from dpo_jax.types import CONTEXT_AXIS, ROW_AXES, Array, Rows

ROUNDS = 8  # at least. More rounds balance the work better, but leave more kernel blocks nearly empty


def context_parts() -> int:
    """Number of pieces into which the mesh of the program being traced splits each row."""
    return parts_of((CONTEXT_AXIS,))


def rounds_of(parts: int) -> int:
    """Number of runs in a piece: a multiple of `parts`, so that `from_pieces` is one exchange."""
    return parts * -(-ROUNDS // parts)


def columns_before(column: jax.Array, *, holder: jax.Array, run: int, parts: int) -> jax.Array:
    """Number of columns before `column` of the row in the piece of device `holder`, whose runs have `run` columns."""
    rounds, within = jnp.divmod(column, jnp.asarray(run * parts, column.dtype))
    place = jnp.where(rounds % 2 == 0, holder, parts - 1 - holder)
    return rounds * run + jnp.clip(within - place * run, 0, run)


def row_pieces(rows: Rows) -> Rows:
    """`rows` with tokens and positions in pieces. Intervals stay whole: `attention_ring` counts columns of the row."""
    tokens, positions = to_pieces((rows.tokens, rows.positions))
    return rows.replace(tokens=tokens, positions=positions)


def to_pieces(of_columns: Sequence[Array], fill: Sequence[int] | None = None) -> list[jax.Array]:
    """Arrays [R, L] as pieces [R * C, L / C]. Each device has all columns and takes its own. `fill`: value beyond L."""
    parts, length = context_parts(), of_columns[0].shape[1]
    rounds = rounds_of(parts)
    padding = -length % (parts * rounds)

    def mine(*of_columns: jax.Array) -> list[jax.Array]:
        here = jax.lax.axis_index(CONTEXT_AXIS)
        dealt = (_up_and_down(x.reshape(x.shape[0], rounds, parts, -1)) for x in of_columns)
        return [jnp.take(x, here, axis=2).reshape(x.shape[0], -1) for x in dealt]

    rows, pieces = _specs()
    filled = [
        jnp.pad(jnp.asarray(x), ((0, 0), (0, padding)), constant_values=value)
        for x, value in zip(of_columns, fill or [0] * len(of_columns), strict=True)
    ]
    return _manual(mine, in_specs=(P(rows),) * len(filled), out_specs=[P(pieces)] * len(filled))(*filled)


def from_pieces(x: jax.Array, length: int) -> jax.Array:
    """Pieces [R * C, L / C, D] as rows [R, L, D] of `length`, sharded over the context axis into contiguous parts."""
    parts = context_parts()
    rounds = rounds_of(parts) // parts  # whole rounds that a device will hold

    def neighbors(x: jax.Array) -> jax.Array:
        rows, columns, width = x.shape
        x = x.reshape(rows, parts, rounds, columns // (parts * rounds), width)
        # From the rounds of each device to the devices of each round: the axes of [R, parts, rounds, ...] swap meaning.
        x = jax.lax.all_to_all(x, CONTEXT_AXIS, split_axis=1, concat_axis=1).swapaxes(1, 2)
        return _up_and_down(x, first=jax.lax.axis_index(CONTEXT_AXIS) * rounds).reshape(rows, columns, width)

    rows, pieces = _specs()
    return _manual(neighbors, in_specs=P(pieces), out_specs=P(rows, CONTEXT_AXIS))(x)[:, :length]


def _up_and_down(x: jax.Array, *, first: Array | int = 0) -> jax.Array:
    """`x[R, rounds, parts, ...]` with the parts of odd rounds in reverse order; `first` is the number of the first round."""
    odd = (jnp.arange(x.shape[1], dtype=jnp.int32) + first) % 2 == 1
    return jnp.where(odd.reshape(1, -1, *(1 for _ in x.shape[2:])), jnp.flip(x, 2), x)


def hidden_at(hidden: jax.Array, source: Array) -> jax.Array:
    """Hidden states [R, L, D] at the columns `source` int32[R, S]: [R, S, D]; on a context axis sharded along S.

    On a context axis, sums of S / C positions go round the devices, and each device adds the states that it has. No device
    holds more than its part of L and of S.
    """
    parts, source = context_parts(), jnp.asarray(source)
    if parts == 1:
        return jnp.take_along_axis(hidden, source[:, :, None], axis=1)
    scored = source.shape[1]
    hidden, source = (jnp.pad(x, [(0, 0), (0, -x.shape[1] % parts)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, source))

    def mine(hidden: jax.Array, source: jax.Array) -> jax.Array:
        here, (count, columns, _) = jax.lax.axis_index(CONTEXT_AXIS), hidden.shape
        by_part = source.reshape(count, parts, -1)

        def found(turn: jax.Array) -> jax.Array:
            column = jnp.take(by_part, (here - turn - 1) % parts, axis=1) - here * columns
            inside = (column >= 0) & (column < columns)
            states = jnp.take_along_axis(hidden, jnp.clip(column, 0, columns - 1)[:, :, None], axis=1)
            return jnp.where(inside[:, :, None], states, 0)

        def add(sums: jax.Array, turn: jax.Array) -> tuple[jax.Array, None]:
            return pass_on(sums, parts) + found(turn), None

        return jax.lax.scan(add, found(jnp.int32(0)), jnp.arange(1, parts, dtype=jnp.int32))[0]

    rows, _ = _specs()
    of_columns = P(rows, CONTEXT_AXIS)
    return _manual(mine, in_specs=(of_columns, P(rows)), out_specs=of_columns)(hidden, source)[:, :scored]


def pass_on(tree: Any, parts: int) -> Any:
    """Inside `shard_map`: passes each device's arrays to the next along the context axis, those of the last to the first."""
    ring = [(number, (number + 1) % parts) for number in range(parts)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT_AXIS, ring), tree)


def _specs() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Partition specs of rows, and of pieces."""
    auto = jax.sharding.get_abstract_mesh().auto_axes
    rows = tuple(axis for axis in ROW_AXES if axis in auto)
    return rows, (*rows, CONTEXT_AXIS)


def _manual(work: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`shard_map` over the axes of tokens; heads and matrices keep their sharding."""
    _, pieces = _specs()
    return jax.shard_map(work, in_specs=in_specs, out_specs=out_specs, axis_names=set(pieces), check_vma=False)
