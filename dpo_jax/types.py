"""The records that everything else is written against.

Axis letters, used in every docstring and einsum of this package:

    R  rows of a batch              D  model width
    L  positions in a row           N  attention heads
    S  scored positions in a row    K  key/value heads
    P  preference pairs, rankings   H  head size
    E  examples (pairs or texts)    V  vocabulary

In `[P, K]` the second letter is the number of completions of an example: 2 in a pair, more in a ranking.

A *row* is what the model reads: `L` tokens. A *completion slot* is what is read out of it: the summed log-probability of one
completion. A *pair* is two neighbouring slots, chosen first, so log-probabilities of pairs are one array `[P, 2]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Variables = Mapping[str, Any]
"""Model parameters: a nested dict of arrays, `{"params": {...}}`."""
Metrics = dict[str, jax.Array]
ROW_AXES = ("data", "fsdp")
"""Axes of a device mesh over which the rows of a batch are cut."""
HEAD_AXIS = "tensor"
"""The axis over which attention heads are cut."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowImages:
    """The images in rows: features of their tokens, and which positions these take. M is fixed for all rows of a batch.

        features  float[R, M, W]  outputs of the frozen vision encoder, a column for each token of an image; what is not used, 0
        index     int32[R, L]     the column that a position reads in the place of its token's embedding; -1: text

    The T tokens of an image are T neighbouring columns that begin at a multiple of T, and as many neighbouring positions.
    """

    features: Array
    index: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of token rows, and what to read out of them. `dpo_jax.data.layout` builds it, from numpy arrays.

        tokens, positions  int32[R, L]       token ids; positions for the model's position embeddings
        k_start, k_end     int32[R, L]       the token at `x` sees the keys `k_start[x] <= k < k_end[x]` of its row
        source             int32[R, S]       where in the row the hidden state lies that predicts `target`
        target             int32[R, S]       the token id that is scored
        slot               int32[R, S]       which completion of the row it belongs to; `slots` marks padding
        weight             float32[E]        1, or 0 for an example that only fills up the batch
        index              int32[E]          which of the caller's examples this is; -1 for a filler
        ref_logps          float32[P, K]     reference log-probabilities in nats, summed; [P, 2] of pairs; or None
        pairs              int32[R, Q, 2]    slots of chosen and rejected in their row, where pairs share completions; or None
        extras             {name: [E, ...]}  what else the loss takes, by keyword (`dpo_step`); or None
        images             RowImages         of models that read images; or None
        slots              int               completion slots of a row

    Attention: a token sees exactly its interval, and a padding token itself. Order inside a row carries no meaning beyond that:
    position embeddings come from `positions`.

    Read-out: the slots of all rows, in order, are the completions of the batch: slot `j` of row `r` is completion
    `r * slots + j`; completions `2p` and `2p + 1` are pair `p`, and those from `K * p` to `K * p + K - 1` ranking `p`. With
    `pairs`, pair `q` of row `r` is pair `r * Q + q` of the batch. `slots_to_pairs` goes from completions to pairs,
    `examples_to_rows` from the caller's order to that of the batch.

    >>> rows = shared_rows(encoded, length=96)  # two pairs, a row each
    >>> rows.tokens.shape, rows.slots, rows.index.tolist()
    ((2, 96), 2, [0, 1])
    """

    tokens: Array
    positions: Array
    k_start: Array
    k_end: Array
    source: Array
    target: Array
    slot: Array
    weight: Array
    index: Array
    ref_logps: Array | None = None
    pairs: Array | None = None
    extras: Mapping[str, Array] | None = None
    images: RowImages | None = None
    slots: int = dataclasses.field(default=1, metadata={"static": True})

    def replace(self, **changes: Any) -> Rows:
        return dataclasses.replace(self, **changes)


class SharedCache(NamedTuple):
    """A cache for several continuations of each prompt: the prompts' keys and values are there once, and are only read.

    Row `r` of R continues prompt `r // (R / G)`. Its `k_start` and `k_end` count the columns of `prompts`, then the tokens of
    its own, the new one included. Rows may have begun at different times: `own` is a ring, in which all write their new token
    to the same column, so that it holds the last C tokens of each.
    """

    prompts: Any  # cache of G rows, as many columns as tokens were read
    own: Any  # cache of R rows and C columns


class Model(NamedTuple):
    """What an algorithm may know about a language model: pure functions of its variables. The first three make a model.

    `forward(variables, rows) -> hidden[R, L, D]` is the trunk; `unembed(variables, hidden[..., D]) -> float32[..., V]` is the
    head, applied by the caller to the few positions that are scored.

    `init_cache(batch, length, dtype=float32) -> cache` and `decode(variables, rows, cache) -> (hidden[R, L, D], cache)` are the
    same trunk with memory: the `L` new tokens of each row are written to the next `L` columns of the cache, and `k_start`,
    `k_end` of `rows` count cache columns. Prefill is a `decode` of the whole prompt, generation one of a single token.

    `take_rows(cache, index, held=None, moved=None) -> cache`: rows of a cache; `index` int32[D, n] numbers them within each of
    D equal parts. `held`: what it returned before, if only rows `moved` bool[D, n] have changed since. The `decode` of a model
    that has it also takes a `SharedCache` and rows of one token.

    `by_layer(variables, cache) -> (variables, cache)` takes layers that are stacked apart, for `decode` only: on a CPU, what is
    cut out of a stack is copied, and in a loop over tokens for each of them.

    >>> model = Model(init, forward, unembed)  # of your own; `load_hf` gives one with all functions
    >>> model.forward(variables, rows).shape
    (2, 96, 32)
    """

    init: Callable[[jax.Array], Variables]
    forward: Callable[[Variables, Rows], jax.Array]
    unembed: Callable[[Variables, jax.Array], jax.Array]
    init_cache: Callable[..., Any] | None = None
    decode: Callable[[Variables, Rows, Any], tuple[jax.Array, Any]] | None = None
    take_rows: Callable[..., Any] | None = None
    by_layer: Callable[[Variables, Any], tuple[Variables, Any]] | None = None
    axes: Callable[[], Any] | None = None  # logical axis names, a tree like the variables
    config: Any = None  # static description (`models.decoder.DecoderConfig` for ours)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an optimizer step reads and writes; `init_state` makes one.

        step       int32[]       optimizer steps taken
        params     nested dict   what is trained
        opt_state                the optimizer's
        frozen     nested dict   base weights that are only read; {} in full fine-tuning

    >>> state = init_state(variables, tx)
    >>> int(state.step), sorted(state.variables)
    (0, ['params'])
    """

    step: Array
    params: Variables
    opt_state: Any
    frozen: Variables = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What `Model.forward` takes."""
        return {**self.frozen, **self.params}

    def replace(self, **changes: Any) -> TrainState:
        return dataclasses.replace(self, **changes)


class Partitioner(NamedTuple):
    """Where arrays live and how a pure function is compiled: the only thing that differs between one device, pmap and a mesh.

    `compile_step(step)` turns `step(state, rows) -> (state, metrics)` into a compiled function that donates `state`;
    `compile_map(fn)` turns `fn(variables, rows) -> [E, ...]` into a compiled function with the same result on the host.

    Parameters come to the devices in three ways: `load_variables(shapes, pieces)` puts those of `models.checkpoint_stream`
    where they belong, a tensor at a time; `make_variables(make)` runs a function without arguments; `put_variables(tree)`
    copies whole arrays. `init_state(make, variables)` turns such parameters, which it consumes, into the state
    `make(variables)`.

    `get_state` gives the form that is saved and restored, with the shapes of one device (a mesh leaves it in pieces);
    `put_state` lays a copy of that out on the devices; `to_host` gives whole numpy arrays, on every host.

    A batch must hold a multiple of `row_shards` rows. `host_part` is (index, count): where there are several hosts, each
    gives its part of the rows, the `index`-th of `count`; results of `compile_map` are those of all rows.
    """

    axis_name: str | None
    row_shards: int
    compile_step: Callable[[Callable[..., Any]], Callable[..., Any]]
    compile_map: Callable[[Callable[..., Any]], Callable[..., Any]]
    init_state: Callable[[Callable[[Variables], TrainState], Variables], TrainState]
    put_state: Callable[[TrainState], TrainState]
    get_state: Callable[[TrainState], TrainState]
    load_variables: Callable[[Variables, Iterable[Any]], Variables]
    make_variables: Callable[[Callable[[], Variables]], Variables]
    put_variables: Callable[[Variables], Variables]
    to_host: Callable[[Any], Any]
    host_part: tuple[int, int] = (0, 1)
