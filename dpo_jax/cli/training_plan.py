"""Training plan, made before weights are read: data, batch shapes, length and identity."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.cli import build, identity
from dpo_jax.cli.config import Config, DpoConfig, SftConfig
from dpo_jax.cli.images import Vision
from dpo_jax.data.encode import image_bytes
from dpo_jax.data.layout import Example, Layout, images_of
from dpo_jax.data.loader import batch_indices, few_shapes, skippable, total_steps
from dpo_jax.data.pairs import DataReport
from dpo_jax.data.prepare import data_digest
from dpo_jax.training import fingerprint
from dpo_jax.training.fingerprint import SavedRun
from dpo_jax.types import Partitioner


class TrainingData(NamedTuple):
    """Token ids for training and evaluation, and the reports of the rows that were read."""

    train: Sequence[Any]  # pairs, or texts of `encode_targets`
    held_out: Sequence[Any]
    reports: Sequence[DataReport]
    uids: Sequence[str] | None = None  # for texts, which have none of their own
    vision: Vision | None = None  # reads images in prompts


class TrainingPlan(NamedTuple):
    """Facts of a run known before weights are read: data, batch shapes, length and identity."""

    data: TrainingData
    saved: SavedRun | None  # the run that is continued
    layout: Layout  # of training batches
    held_out_layout: Layout
    behind: int  # see `fingerprint.behind`
    steps: int
    epochs: float | None  # after which the stream ends; None if the length is given in steps
    digest: str  # of the training data
    record: Mapping[str, Any]  # everything that determines the data

    def read_by(self, step: int, *, batch: int, seed: int) -> np.ndarray:
        """The numbers of a step's examples; beyond the end of the run, those that a longer run would have."""
        return batch_indices(len(self.data.train), batch=batch, seed=seed, step=step, behind=self.behind)


def plan_training(
    config: Config,
    section: SftConfig | DpoConfig,
    data: TrainingData,
    *,
    tokenizer: Any,
    partitioner: Partitioner,
    saved: SavedRun | None,
) -> TrainingPlan:
    """Batch shapes and length of the run. Raises `ConfigError` if its data or length do not fit the run that it continues.

    Features of images are computed here, because their width determines the shape of batches.
    """
    if data.vision is not None:
        with identity.refusing_mismatch():
            fingerprint.check_weights(saved, encoder=data.vision.digest)
        data.vision.compute(config)
    pairs = isinstance(section, DpoConfig)
    # A single completion shares its prompt with no other.
    kind = "plain" if config.data.layout == "shared" and not pairs else config.data.layout
    shards = partitioner.row_shards
    layout_of = functools.partial(build.row_layout, config, [*data.train, *data.held_out], kind=kind, batch=section.batch)
    parts = build.batch_parts(section, shards, layout=kind)
    layout = layout_of(parts=parts, microbatches=skippable(section.microbatches, shards))
    layout = few_shapes(layout, examples=len(data.train), batch=section.batch)
    held_out_layout = few_shapes(layout_of(parts=shards), examples=len(data.held_out), batch=section.batch)
    record = identity.data_record(config, tokenizer, data.reports, held_out=data_digest(data.held_out))
    record |= _images_record(data.train)
    digest = data_digest(data.train)
    behind = fingerprint.behind(saved, examples=len(data.train), batch=section.batch)
    epochs = None if section.steps else section.epochs
    steps = section.steps or total_steps(len(data.train), batch=section.batch, epochs=section.epochs, behind=behind)
    with identity.refusing_mismatch():
        fingerprint.check_data(saved, digest, record)
        fingerprint.check_held_out(saved, record)
    with identity.refusing_mismatch(identity.LONGER):
        fingerprint.check_length(saved, steps=steps)
        fingerprint.check_epochs(saved, epochs=epochs, examples=len(data.train), batch=section.batch)
    return TrainingPlan(data, saved, layout, held_out_layout, behind, steps, epochs, digest, record)


def _images_record(examples: Sequence[Example]) -> dict[str, str]:
    """A digest of the images in prompts, in order, for a data record; empty if there are none."""
    shown = b"\0".join(image_bytes(images) for example in examples if (images := images_of(example)) is not None)
    return {"images": hashlib.sha256(shown).hexdigest()} if shown else {}
