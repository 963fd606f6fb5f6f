"""`dpo-jax refs`: the reference pass. `dpo` and `eval` call the same functions, so they build what is absent."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax.cli import build, identity
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.repeats import check_repeats
from dpo_jax.cli.trained import Trained, trained
from dpo_jax.data.chat_date import writes_date
from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import Batch, few_shapes, in_order
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.reference import ReferenceCache, fill_cache, pair_key, reference_logps
from dpo_jax.runtime.hosts import from_first, is_first
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Model, Partitioner, Variables


def run(config: Config) -> int:
    with build.open_run(config, "refs") as run_dir:
        tokenizer = build.tokenizer_of(config, model_path=config.dpo_policy(), name="dpo.policy")
        model = build.policy_model(config, config.dpo_policy(), tokenizer, name="dpo.policy")
        check_reference(config, model, tokenizer)
        part = trained(config, config.dpo, model, config.dpo_policy())
        partitioner = part.partitioner(config)
        splits = [
            build.encode_split(config, build.load_split(config, name, tokenizer), tokenizer) for name in ("train", "test")
        ]
        check_repeats(config, *splits)
        build.describe(run_dir, config, *(split.report for split in splits))
        variables, digests = load_reference(config, part, partitioner)
        values = reference_values(
            config,
            part.reader(variables),
            variables,
            tokenizer,
            splits,
            partitioner=partitioner,
            weights=digests["start"],
        )
        for name, logps in zip(("train", "test"), values, strict=True):
            chosen, rejected = logps.mean(axis=0)
            print(f"{name}: {len(logps):,} pairs, mean log pi_ref(chosen) {chosen:.2f}, of rejected {rejected:.2f} nats")
    return 0


def check_reference(config: Config, model: Model, tokenizer: Any) -> None:
    """Raises `ConfigError` where `dpo.reference` is not the policy's model with other weights. Reads no weights."""
    if config.dpo.reference is None:
        return
    reference = build.policy_model(config, config.dpo.reference, tokenizer, name="dpo.reference")
    if identity.architecture(reference) != identity.architecture(model):
        raise ConfigError(f"dpo.reference: {config.dpo.reference} is another model than the policy, not only other weights")


def load_reference(config: Config, part: Trained, partitioner: Partitioner) -> tuple[Variables, dict[str, str]]:
    """The reference's weights on the devices, and their digests (`Trained.load`): the start of training, or the one named."""
    if config.dpo.reference is None:
        return part.load(config.dpo_policy(), partitioner, name="dpo.policy")
    variables, digest = build.load_weights(
        config.dpo.reference, part.base, partitioner, name="dpo.reference", dtype=config.lora.base_dtype
    )
    return variables, {"start": digest}


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
    with reported("reading the reference cache"):
        cache = ReferenceCache(config.refs_cache(), cache_identity(config, model, weights, tokenizer)) if is_first() else None
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
    distinct = len({pair_key(pair) for pair in pairs})
    if len(todo) < distinct:
        print(f"{config.refs_cache()}: {distinct - len(todo):,} of {distinct:,} pairs are there already", flush=True)
    elif cache is not None and len(cache):
        # Of the same weights and limits: it is the texts that differ, or the date that a chat template writes into them.
        dated = f", or the date in the chat template (data.date is {config.data.date} here)" if writes_date(tokenizer) else ""
        print(f"{config.refs_cache()}: has {len(cache):,} pairs and none of these: other data{dated}", flush=True)
    with reported("reference pass", total=len(todo), unit="pairs") as task:

        def progress(batch: Batch) -> None:
            task.advance(int(batch.stats["pairs"]))

        fill_cache(
            cache,
            todo,
            batches=functools.partial(in_order, layout=layout, batch=config.refs.batch, part=partitioner.host_part),
            logps=lambda rows: compiled(variables, rows),
            progress=progress,
        )
    values = from_first(np.zeros((len(pairs), 2), np.float32) if cache is None else cache.lookup(pairs))
    return np.split(values, np.cumsum([len(split) for split in splits])[:-1])


def cache_identity(config: Config, model: Model, weights: str, tokenizer: Any) -> dict[str, Any]:
    """Everything that reference log-probabilities depend on."""
    return {
        "weights": weights,
        "architecture": identity.architecture(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "truncation": config.data.truncation,
        "dtype": config.run.precision,
        "kernel": build.attention_name(config),
    }
