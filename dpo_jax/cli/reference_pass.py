"""The reference pass of the commands: pairs, reference, and its log-probabilities, cached or computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax import loss_table
from dpo_jax.cli import build, splits
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.images import Vision, check_same_encoder, encode_shown, vision_of
from dpo_jax.cli.trainable import Trainable
from dpo_jax.data.chat_date import writes_date
from dpo_jax.data.encode import Encoded
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.data.row_kinds import check_ranking_lengths
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.training.fingerprint import architecture
from dpo_jax.training.references import cached_reference_logps
from dpo_jax.types import Model, Partitioner, Variables


def load_pairs(config: Config, tokenizer: Any) -> tuple[tuple[EncodedSet, EncodedSet], Vision | None]:
    """Token ids of the train and held-out splits, as the loss of `dpo` reads them, and the vision encoder, if any."""
    rows = loss_table.rows_of(config.dpo.loss)
    loaded = splits.load_splits(config, tokenizer, rows=rows, images=True)
    vision = vision_of(config, config.dpo_policy(), tokenizer, *loaded, name="dpo.policy")
    train, test = (encode_shown(config, preferences, tokenizer, vision) for preferences in loaded)
    check_ranking_lengths([*train, *test], where="the splits")
    return (train, test), vision


def check_reference(config: Config, model: Model, tokenizer: Any, vision: Vision | None) -> None:
    """Raises `ConfigError` unless `dpo.reference` has the policy's architecture. Reads none of the decoder's weights."""
    if config.dpo.reference is None:
        return
    reading = {"name": "dpo.reference", "images": vision is not None}
    reference = build.policy_model(config, config.dpo.reference, tokenizer, **reading)
    if architecture(reference) != architecture(model):
        raise ConfigError(f"dpo.reference: {config.dpo.reference} differs from the policy in architecture, not just in weights")
    check_same_encoder(config, vision, config.dpo.reference, name="dpo.reference")


def load_reference(config: Config, trainable: Trainable, partitioner: Partitioner) -> tuple[Variables, dict[str, str]]:
    """The reference's weights on the devices and their digests (`Trainable.load`): the starting policy's or the named one's."""
    if config.dpo.reference is None:
        return trainable.load(config.dpo_policy(), partitioner, name="dpo.policy")
    variables, digest = build.load_weights(
        config.dpo.reference, trainable.base, partitioner, name="dpo.reference", dtype=trainable.dtype
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
    vision: Vision | None,
) -> list[np.ndarray]:
    """log pi_ref of every pair of `splits`, float32[n, 2] each (rankings [n, K]), from the cache; missing ones are computed.

    `variables` are placed by the partitioner; `weights` is their digest.
    """
    dated = f", or the date in the chat template (data.date is {config.data.date} here)" if writes_date(tokenizer) else ""
    pairs = [pair for split in splits for pair in split]
    values = cached_reference_logps(
        model,
        variables,
        pairs,
        cache=config.refs_cache(),
        identity=cache_identity(config, model, weights, tokenizer, vision),
        partitioner=partitioner,
        layout=build.row_layout(config, pairs, batch=config.refs.batch, parts=partitioner.row_shards),
        batch=config.refs.batch,
        ld_alpha=config.dpo.ld_alpha,
        other_data=f"other data{dated}",
    )
    return np.split(values, np.cumsum([len(split) for split in splits])[:-1])


def cache_identity(config: Config, model: Model, weights: str, tokenizer: Any, vision: Vision | None) -> dict[str, Any]:
    """Everything on which reference log-probabilities depend."""
    return {
        "weights": weights,
        "architecture": architecture(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "truncation": config.data.cut,
        "dtype": config.run.precision,
        "kernel": build.attention_name(config),
        **({"ld_alpha": config.dpo.ld_alpha} if config.dpo.ld_alpha != 1 else {}),
        **({} if vision is None else {"vision encoder": vision.digest}),
    }
