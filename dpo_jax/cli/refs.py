"""`dpo-jax refs`: the reference pass. `dpo` and `eval` call the same functions, so they build what is absent."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from dpo_jax.cli import build
from dpo_jax.cli.config import Config
from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import Batch, few_shapes, in_order
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.reference import ReferenceCache, fill_cache, reference_logps
from dpo_jax.runtime.hosts import from_first, is_first
from dpo_jax.types import Model, Partitioner, Variables


def run(config: Config) -> int:
    with build.open_run(config, "refs") as run_dir:
        tokenizer = build.tokenizer_of(config, model_path=config.dpo_policy(), name="dpo.policy")
        model = build.policy_model(config, config.dpo_policy(), tokenizer, name="dpo.policy")
        partitioner = build.make_partitioner(config, model)
        splits = [
            build.encode_split(config, build.load_split(config, name, tokenizer), tokenizer) for name in ("train", "test")
        ]
        build.describe(run_dir, config, *(split.report for split in splits))
        variables, digest = build.load_weights(config.dpo_policy(), model, partitioner, name="dpo.policy")
        values = reference_values(config, model, variables, tokenizer, splits, partitioner=partitioner, weights=digest)
        for name, logps in zip(("train", "test"), values, strict=True):
            chosen, rejected = logps.mean(axis=0)
            print(f"{name}: {len(logps):,} pairs, mean log pi_ref(chosen) {chosen:.2f}, of rejected {rejected:.2f} nats")
    return 0


def reference_values(
    config: Config,
    model: Model,
    variables: Variables,
    tokenizer: Any,
    splits: Sequence[Sequence[Encoded]],
    *,
    partitioner: Partitioner,
    weights: str,
) -> list[np.ndarray]:
    """log pi_ref of every pair of `splits`, float32[n, 2] each: read from the cache, after computing what it lacks.

    `variables` are the partitioner's, `weights` is their digest.
    """
    # The first host has the cache; what it lacks, and in the end all values, the others hear from it.
    cache = ReferenceCache(config.refs_cache(), identity(config, model, weights, tokenizer)) if is_first() else None
    for what in cache.damage if cache is not None else ():
        print(f"{config.refs_cache()}: {what}; what is lacking is computed again", flush=True)
    pairs = [pair for split in splits for pair in split]
    absent = np.zeros(len(pairs), np.uint8)
    if cache is not None:
        absent[cache.missing(pairs)] = 1
    todo = [pairs[number] for number in np.flatnonzero(from_first(absent))]
    layout = build.pair_layout(config, pairs, batch=config.refs.batch, parts=partitioner.row_shards)
    layout = few_shapes(layout, examples=len(todo), batch=config.refs.batch)
    compiled = partitioner.compile_map(functools.partial(reference_logps, model))
    if len(todo) < len(pairs):
        print(f"{config.refs_cache()}: {len(pairs) - len(todo):,} of {len(pairs):,} pairs are there already", flush=True)
    quiet = cache is None or not todo or not sys.stderr.isatty()
    with tqdm(total=len(todo), unit="pair", desc="reference pass", dynamic_ncols=True, disable=quiet) as bar:

        def progress(batch: Batch) -> None:
            bar.update(int(batch.stats["pairs"]))

        fill_cache(
            cache,
            todo,
            batches=functools.partial(in_order, layout=layout, batch=config.refs.batch, part=partitioner.host_part),
            logps=lambda rows: compiled(variables, rows),
            progress=progress,
        )
    values = from_first(np.zeros((len(pairs), 2), np.float32) if cache is None else cache.lookup(pairs))
    return np.split(values, np.cumsum([len(split) for split in splits])[:-1])


def identity(config: Config, model: Model, weights: str, tokenizer: Any) -> dict[str, Any]:
    """Everything that reference log-probabilities depend on."""
    return {
        "weights": weights,
        "architecture": build.architecture(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "truncation": config.data.truncation,
        "dtype": config.run.precision,
        "kernel": build.attention_name(config),
    }
