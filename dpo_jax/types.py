"""The core records of the package: `Rows` (a batch), `Model`, `TrainState` and `Partitioner`.

Axis letters, used in every docstring and einsum of this package:

    R  rows of a batch              D  model width
    L  positions in a row           N  attention heads
    S  scored positions in a row    K  key/value heads
    P  preference pairs, rankings   H  head size
    E  examples (pairs or texts)    V  vocabulary

In `[P, K]`, K is instead the number of completions of an example: 2 in a pair, more in a ranking.

A *row* is the model's input: `L` tokens. A *completion slot* is one output of a row: the summed log-probability of one
completion. A *pair* is two neighboring slots, chosen first, so log-probabilities of pairs are one array `[P, 2]`.
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
ROW_AXES = ("data", "fsdp", "expert")
"""Axes of a device mesh over which the rows of a batch are split."""
CONTEXT_AXIS = "context"
"""The mesh axis over which the positions of each row are split (`models.context`)."""
TOKEN_AXES = (*ROW_AXES, CONTEXT_AXIS)
"""Mesh axes over which the tokens of a batch are split."""
HEAD_AXIS = "tensor"
"""The mesh axis over which attention heads are split."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowImages:
    """The images of rows: features of the image tokens, and the positions that read them. M is fixed for all rows of a batch.

        features  float[R, M, W]  outputs of the frozen vision encoder, one column per image token; unused columns are 0
        index     int32[R, L]     the column that a position reads instead of its token's embedding; -1: text

    The T tokens of an image are T neighboring columns, starting at a multiple of T, and T neighboring positions.
    """

    features: Array
    index: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of token rows, their attention intervals and their scored positions. `dpo_jax.data.layout` builds it, in numpy.

        tokens, positions  int32[R, L]       token ids; positions for the model's position embeddings
        k_start, k_end     int32[R, L]       the token at `x` sees the keys `k_start[x] <= k < k_end[x]` of its row
        source             int32[R, S]       position in the row of the hidden state that predicts `target`
        target             int32[R, S]       the token id that is scored
        slot               int32[R, S]       which completion of the row it belongs to; `slots` marks padding
        weight             float32[E]        1, or 0 for a padding example: an example that only fills up the batch
        index              int32[E]          which of the caller's examples this is; -1 for a padding example
        ref_logps          float32[P, K]     reference log-probabilities in nats, summed; [P, 2] of pairs; or None
        pairs              int32[R, Q, 2]    slots of chosen and rejected in their row, where pairs share completions; or None
        extras             {name: [E, ...]}  further arguments of the loss, by keyword (`dpo_step`); or None
        images             RowImages         for models that read images; or None
        slots              int               completion slots of a row

    Attention: a token sees exactly its interval; a padding token sees only itself. The order of tokens in a row has no other
    meaning: position embeddings come from `positions`.

    Outputs: the slots of all rows, in order, are the completions of the batch. Slot `j` of row `r` is completion
    `r * slots + j`. Completions `2p` and `2p + 1` are pair `p`; completions `K * p` to `K * p + K - 1` are ranking `p`. With
    `pairs`, pair `q` of row `r` is pair `r * Q + q` of the batch. `slots_to_pairs` regroups values of completions by pair;
    `examples_to_rows` goes from the caller's order to that of the batch.

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
    """A key-value cache for several continuations of each prompt. The prompts' keys and values are stored once, read-only.

    Row `r` of R continues prompt `r // (R / G)`. Its `k_start` and `k_end` count the columns of `prompts` first, then its own
    tokens, including the new one. Rows may have started at different times: `own` is a ring buffer in which all rows write
    their new token to the same column, so it holds the last C tokens of each.
    """

    prompts: Any  # cache of G rows, with one column per token read
    own: Any  # cache of R rows and C columns


class Routing(NamedTuple):
    """Router decisions of a mixture of experts, for every layer and token. `Model.route` returns it.

    chosen       int32[layers, R, L, taken]     the experts of each token
    probability  float32[layers, R, experts]    the router's probabilities, summed over the counted tokens of a row
    entropy      float32[layers, R]             their entropy in nats, summed likewise
    counted      bool[R, L]                     which tokens count: all but padding
    """

    chosen: jax.Array
    probability: jax.Array
    entropy: jax.Array
    counted: jax.Array


class Model(NamedTuple):
    """The language model as algorithms see it: pure functions of its variables. Only the first three are required.

    `forward(variables, rows) -> hidden[R, L, D]` is the trunk; `unembed(variables, hidden[..., D]) -> float32[..., V]` is the
    head, which the caller applies to the few positions that are scored.

    `init_cache(batch, length, cache_dtype=None) -> cache` (by default in the compute type) and
    `decode(variables, rows, cache) -> (hidden[R, L, D], cache)` are the same trunk with a key-value cache: the `L` new tokens
    of each row are written to the next `L` columns of the cache, and `k_start` and `k_end` of `rows` count cache columns.
    Prefill decodes the whole prompt, generation one token at a time.

    `take_rows(cache, index, held=None, moved=None) -> cache` selects rows of a cache; `index` int32[D, n] numbers them within
    each of D equal parts. `held` is its previous result, if only the rows `moved` bool[D, n] have changed since. If a model has
    `take_rows`, its `decode` also takes a `SharedCache` and rows of one token.

    `rounded(variables) -> variables` rounds kernels and the head's table to the compute type. `decode` and `unembed` compute
    the same with the result, without rounding the weights for each token. It also takes the variables of `by_layer`.

    `by_layer(variables, cache) -> (variables, cache)` unstacks the scanned layers, for `decode` only: on CPUs and
    GPUs, a slice of a stack is copied, and a loop over tokens would copy it for each token.

    `route(variables, rows) -> (hidden[R, L, D], Routing)` is `forward` that also returns the routers' decisions; None for a
    model without experts.

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
    rounded: Callable[[Variables], Variables] | None = None
    by_layer: Callable[[Variables, Any], tuple[Variables, Any]] | None = None
    route: Callable[[Variables, Rows], tuple[jax.Array, Routing]] | None = None
    axes: Callable[[], Any] | None = None  # logical axis names, a tree like the variables
    config: Any = None  # static description (`models.decoder.DecoderConfig` for ours)


def init_shapes(model: Model) -> Variables:
    """The tree of `model.init` as `ShapeDtypeStruct`s. Nothing is computed, and JAX remembers the shapes of each `init`."""
    key = jax.eval_shape(lambda: jax.random.key(0))  # a key itself would be compiled and computed
    return jax.eval_shape(model.init, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an optimizer step reads and writes; `init_state` makes one.

        step       int32[]       optimizer steps taken
        params     nested dict   trained parameters
        opt_state                state of the optimizer
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
        """The frozen and trained variables together, as `Model.forward` takes them."""
        return {**self.frozen, **self.params}

    def replace(self, **changes: Any) -> TrainState:
        return dataclasses.replace(self, **changes)


class Partitioner(NamedTuple):
    """Placement of arrays and compilation of pure functions: the only difference between one device, pmap and a mesh.

    `compile_step(step)` turns `step(state, rows) -> (state, metrics)` into a compiled function that donates `state`;
    `compile_map(fn)` turns `fn(variables, rows) -> [E, ...]` into a compiled function with the same result on the host.

    Parameters reach the devices in three ways. `load_variables(shapes, pieces)` streams those of `models.checkpoint_stream`
    into their shards, one tensor at a time; `make_variables(make)` runs a function without arguments; `put_variables(tree)`
    copies whole arrays. `init_state(make, variables)` consumes such parameters and returns the state `make(variables)`.

    `get_state` returns the form that is saved and restored, with the shapes of one device (on a mesh it stays sharded);
    `put_state` moves that to the devices: arrays that lie there already may be consumed. `saved_shapes(state)` is its form
    without data, `jax.ShapeDtypeStruct`s. `to_host` returns whole numpy arrays, on every host.

    A batch must hold a multiple of `row_shards` rows. `host_part` is (index, count): with several hosts, each supplies its part
    of the rows, the `index`-th of `count`; results of `compile_map` cover all rows.
    """

    axis_name: str | None
    row_shards: int
    compile_step: Callable[[Callable[..., Any]], Callable[..., Any]]
    compile_map: Callable[[Callable[..., Any]], Callable[..., Any]]
    init_state: Callable[[Callable[[Variables], TrainState], Variables], TrainState]
    put_state: Callable[[TrainState], TrainState]
    get_state: Callable[[Any], Any]  # of any state, or a part of it
    saved_shapes: Callable[[Any], Any]
    load_variables: Callable[[Variables, Iterable[Any]], Variables]
    make_variables: Callable[[Callable[[], Variables]], Variables]
    put_variables: Callable[[Variables], Variables]
    to_host: Callable[[Any], Any]
    host_part: tuple[int, int] = (0, 1)
