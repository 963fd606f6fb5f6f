"""Log-probabilities of a whole data set in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from dpo_jax.data.arguments import check_pairs
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import places_of
from dpo_jax.data.loader import eval_batches, plan_layout
from dpo_jax.models.config import DecoderConfig
from dpo_jax.reference import check_finite, reference_logps
from dpo_jax.types import Model, Partitioner, Rows, Variables


def reference_logps_of(
    model: Model,
    variables: Variables,
    pairs: Sequence[Encoded],
    *,
    layout: Literal["plain", "shared", "packed"] = "plain",
    batch: int = 16,
    ld_alpha: float = 1.0,
    partitioner: Partitioner | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> np.ndarray:
    """log pi(y|x) of all `pairs`: float32[n, 2] in nats, chosen first, in the order given (rankings: float32[n, K]).

    It lays out the pairs, compiles, runs and collects. Pass the result to `shared_rows` and the other layouts as `ref_logps`.
    With a policy's variables it gives the log-probabilities that evaluation needs.

    Args:
      pairs: the result of `encode`.
      layout: row layout. "plain" works with every causal model. "packed" is the fastest; "packed" and "shared" need a model
        that honors `k_start`, `k_end` and `positions`: those of `load_hf` do, your own if `check_model` says so.
      batch: pairs per forward pass; bounds memory.
      ld_alpha: that of `dpo_step`, which needs it in the reference as well.
      partitioner: devices to run on; None: `jax.jit`, where `variables` are. For one of `runtime.parallel`, `variables` must
        have been placed by it.
      progress: called with (pairs done, all pairs) after every batch.

    A second call with the same model and shapes compiles nothing. Raises `BrokenReference` naming the pair for NaN or infinity,
    for example from a token id of a completion beyond the vocabulary; TypeError for pairs that are not `Encoded`; ValueError
    for unusable token ids, an unknown layout, a `batch` below 1, and variables of `load_hf` without their "params". A model of
    your own should give NaN for prompt ids and positions beyond its tables, as in the README's example: JAX clamps indices.

    >>> ref_logps = reference_logps_of(model, variables, encoded)
    >>> ref_logps.shape
    (2, 2)
    >>> rows = shared_rows(encoded, length=96, ref_logps=ref_logps)
    """
    check_pairs(pairs)
    if layout not in ("plain", "shared", "packed"):
        raise ValueError(f"layout={layout!r}: use 'plain', 'shared' or 'packed'")
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    if isinstance(model.config, DecoderConfig) and "params" not in variables:
        raise ValueError(
            f"variables must be {{'params': ...}}, as load_hf gives them; these have {', '.join(sorted(variables))}"
        )
    if not len(pairs):
        return np.zeros((0, 2), np.float32)
    if partitioner is None:
        shards, part, run = 1, (0, 1), functools.partial(_logps, model.forward, model.unembed, ld_alpha)
    else:
        shards, part = partitioner.row_shards, partitioner.host_part
        run = partitioner.compile_map(functools.partial(reference_logps, model, ld_alpha=ld_alpha))
    places = places_of(pairs[0])
    shape = plan_layout(pairs, kind=layout, batch=batch, multiple=shards * (places if layout == "plain" else 1))
    logps = np.empty((len(pairs), places), np.float32)
    done = 0
    for laid_out in eval_batches(pairs, layout=shape, batch=batch, part=part):
        numbers, values = laid_out.of_examples(run(variables, laid_out.rows))
        check_finite([pairs[i] for i in numbers], values, numbers=numbers)
        logps[numbers] = values
        done += len(numbers)
        if progress is not None:
            progress(done, len(pairs))
    return logps


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _logps(
    forward: Callable[..., Any], unembed: Callable[..., Any], ld_alpha: float, variables: Variables, rows: Rows
) -> jax.Array:
    return reference_logps(Model(lambda key: {}, forward, unembed), variables, rows, ld_alpha=ld_alpha)
