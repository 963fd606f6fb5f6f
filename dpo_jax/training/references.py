"""The cached reference pass: reference log-probabilities of a data set are computed once and then read from disk."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout, places_of
from dpo_jax.data.loader import Batch, eval_batches, few_shapes, plan_layout
from dpo_jax.logps import scored_hidden
from dpo_jax.models.digest import weights_digest
from dpo_jax.reference import ForeignCache, ReferenceCache, check_finite, fill_cache, pair_key, reference_logps
from dpo_jax.runtime.hosts import from_first, is_first
from dpo_jax.runtime.progress import SAY, reported
from dpo_jax.types import Model, Partitioner, Rows, Variables


def cached_reference_logps(
    model: Model,
    variables: Variables,
    pairs: Sequence[Encoded],
    *,
    cache: str | os.PathLike[str],
    partitioner: Partitioner,
    identity: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    batch: int = 16,
    ld_alpha: float = 1.0,
    say: Callable[[str], None] = SAY,
    other_data: str = "other data",
) -> np.ndarray:
    """log pi_ref(y|x) of all `pairs`, in order: float32[n, 2] in nats, chosen first (rankings: [n, K], best first). Computes
    only values missing in the cache.

    A killed pass continues where it was. Several hosts may call it together: they share the work, and the first one holds the
    cache. `reference_logps_of` does the same without a cache.

    Args:
      variables: those of the reference, placed by `partitioner`.
      cache: a folder, created if missing.
      identity: JSON values that the log-probabilities depend on: a digest of the weights, the architecture, the number format,
        the kernel, an adapter's scale, constants of your own model. A cache with another identity raises `ForeignCache`, naming
        the differences. The default is the `weights_digest` of the whole weights, which each host gathers, the model's `config`
        and the type of its hidden states. That may not be all, so a batch of cached pairs is computed again; `ForeignCache` if
        the values differ by more than rounding. Pairs are found by their token ids.
      layout: row layout from `plan_layout`; by default plain rows, which are correct for every causal model.
      batch: pairs per batch.
      ld_alpha: as in `dpo_step`; 1 for rankings. Your own `identity` must include it.
      say: called with a line about the contents of the cache, if relevant.
      other_data: the reason stated if the cache has pairs but none of these.

    Raises `BrokenReference`, naming the pair, for NaN and infinity.

    >>> from dpo_jax.runtime.parallel import single_device
    >>> partitioner = single_device()
    >>> placed = partitioner.put_variables(variables)
    >>> score = partial(cached_reference_logps, model, placed, encoded, cache="refs", partitioner=partitioner)
    >>> score().shape
    (2, 2)
    >>> again = score()
    refs: 2 of 2 pairs are already cached
    """
    places = places_of(pairs[0]) if len(pairs) else 2
    if layout is None:
        layout = plan_layout(pairs, kind="plain", batch=batch, multiple=places * partitioner.row_shards)
    by_default = identity is None
    if identity is None:
        identity = _identity(model, partitioner.to_host(variables), layout.rows(pairs[:1]) if len(pairs) else None, ld_alpha)
    # The first host holds the cache and tells the others what is missing, and in the end all values.
    with reported("reading the reference cache"):
        store = ReferenceCache(cache, identity) if is_first() else None
    for what in store.damage if store is not None else ():
        say(f"{cache}: {what}; missing entries are computed again")
    absent = np.zeros(len(pairs), np.uint8)
    if store is not None:
        absent[store.missing(pairs)] = 1
    todo = [pairs[int(number)] for number in np.flatnonzero(from_first(absent))]
    layout = few_shapes(layout, examples=len(todo), batch=batch)
    batches = functools.partial(eval_batches, layout=layout, batch=batch, part=partitioner.host_part)
    compiled = partitioner.compile_map(functools.partial(reference_logps, model, ld_alpha=ld_alpha))
    distinct = len({pair_key(pair) for pair in pairs})
    if len(todo) < distinct:
        say(f"{cache}: {distinct - len(todo):,} of {distinct:,} pairs are already cached")
    elif store is not None and len(store):
        say(f"{cache}: has {len(store):,} pairs, but none of these: {other_data}")
    if by_default:
        lacking = {pair_key(pair) for pair in todo}
        held = [pair for pair in pairs if pair_key(pair) not in lacking][:batch]
        with reported("comparing cached pairs with the model", brief=True):
            _check_values(store, held, batches(held), lambda rows: compiled(variables, rows), identity, place=str(cache))
    with reported("reference pass", total=len(todo), unit="pairs") as task:

        def progress(batch: Batch) -> None:
            task.advance(int(batch.stats["pairs"]))

        fill_cache(
            store,
            todo,
            batches=batches,
            logps=lambda rows: compiled(variables, rows),
            progress=progress,
        )
    return from_first(np.zeros((len(pairs), places), np.float32) if store is None else store.lookup(pairs))


def _identity(model: Model, weights: Variables, rows: Rows | None, ld_alpha: float) -> dict[str, Any]:
    """What is known of a reference without a name for it. Fields with a usual value are left out, so older caches fit."""
    identity: dict[str, Any] = {"weights": weights_digest(weights), "model": repr(model.config)}
    if rows is not None:
        dtype = jax.eval_shape(functools.partial(scored_hidden, model), weights, rows).dtype
        identity |= {"dtype": str(dtype)} if dtype != jnp.float32 else {}
    return identity | ({"ld_alpha": ld_alpha} if ld_alpha != 1 else {})


def _check_values(
    store: ReferenceCache | None,
    pairs: Sequence[Encoded],
    batches: Iterable[Batch],
    logps: Callable[[Rows], np.ndarray],
    identity: Mapping[str, Any],
    *,
    place: str,
) -> None:
    """Computes cached `pairs` again. Raises `ForeignCache`, on all hosts, if the values differ by more than rounding."""
    nats, share = (0.01, 0.002) if jnp.finfo(identity.get("dtype", "float32")).bits >= 32 else (0.1, 0.01)
    for batch in batches:
        numbers, values = batch.of_examples(logps(batch.rows))
        difference = np.zeros(2)
        if store is not None:  # the first host
            these = [pairs[number] for number in numbers]
            check_finite(these, values)
            cached = store.lookup(these)
            difference = np.sqrt([np.square(values - cached).mean(), np.square(cached).mean()])
        off, size = from_first(difference)
        if off > nats + share * size:
            raise ForeignCache(
                f"{place} holds reference log-probabilities of another model with the same weights and config: computed again, "
                f"those of {len(pairs)} pairs differ by {off:.3g} nats (root mean square). Choose another folder, and name in "
                "`identity` what differs, such as an adapter's scale or a constant of your own model."
            )
