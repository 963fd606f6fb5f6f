"""Vision encoder of the scenes: SigLIP's architecture, trained to classify which kinds of objects an image shows, then frozen.

The loss is SigLIP's sigmoid loss with one text for each kind (Zhai et al. 2023, arXiv 2303.15343). The text vectors are trained
with the encoder and then dropped. The features thus encode which objects are present; the language model must learn to
read them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.loader import batch_indices
from dpo_jax.data.scenes import CELL, CELLS, SIZE, THINGS, Scene
from dpo_jax.models.siglip import encode_images, init_encoder
from dpo_jax.models.vision_config import VisionConfig
from dpo_jax.runtime.optim import make_optimizer, make_schedule
from dpo_jax.runtime.parallel import single_device
from dpo_jax.runtime.progress import reported
from dpo_jax.step import init_state, train_step
from dpo_jax.training.run import Saving, train
from dpo_jax.types import Array, Metrics, TrainState, Variables


def encoder_config(width: int) -> VisionConfig:
    """A small encoder that reads a scene as CELLS x CELLS patches, each of which is an image token."""
    return VisionConfig(
        width=width,
        layers=1,
        heads=4,
        mlp_width=4 * width,
        image_size=SIZE,
        patch_size=CELL,
        activation="gelu_tanh",
        eps=1e-6,
        tokens=CELLS * CELLS,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labeled:
    """Labeled images: pixels float32[E, SIZE, SIZE, 3]; present float32[E, kinds], 1 if shown; weight float32[E]."""

    pixels: Array
    present: Array
    weight: Array


def presence(scenes: Sequence[Scene]) -> np.ndarray:
    """Indicators of the kinds that each scene shows: float32[n, kinds]."""
    return np.array([[thing in scene.things for thing in THINGS] for scene in scenes], np.float32)


def presence_logits(variables: Variables, pixels: Array, *, config: VisionConfig) -> jax.Array:
    """Log-odds that the image shows a kind: float32[E, kinds]. A soft maximum over the image tokens."""
    features = encode_images({"params": variables["params"]["encoder"]}, pixels, config=config)
    return jax.nn.logsumexp(features @ variables["params"]["texts"], axis=1) - 2.0


def train_encoder(
    scenes: Sequence[Scene],
    pixels: np.ndarray,
    folder: Path,
    *,
    config: VisionConfig,
    steps: int,
    lr: float,
    seed: int,
    fingerprint: Mapping[str, Any],
    batch: int = 64,
) -> Variables:
    """The encoder's variables (host arrays) after `steps` on `pixels` of `scenes`, resumed from a checkpoint in `folder`."""
    partitioner, present = single_device(), presence(scenes)
    rate = make_schedule("cosine", lr, warmup_steps=steps // 10, total_steps=steps)
    tx = make_optimizer(rate, name="adamw", b2=0.99, max_grad_norm=1.0)

    def begin() -> Variables:
        first, second = jax.random.split(jax.random.key(seed))
        texts = jax.random.normal(second, (config.width, len(THINGS))) / config.width**0.5
        return {"params": {"encoder": init_encoder(first, config)["params"], "texts": texts}}

    def objective(variables: Variables, part: Labeled) -> tuple[jax.Array, Metrics]:
        logits, present = presence_logits(variables, part.pixels, config=config), jnp.asarray(part.present)
        right = ((logits > 0) == (present > 0)).all(axis=1)
        losses = -jax.nn.log_sigmoid(jnp.where(present > 0, logits, -logits)).sum(axis=1)
        return losses, {"right": right.astype(jnp.float32)}

    def step(state: TrainState, part: Labeled) -> tuple[TrainState, Metrics]:
        return train_step(state, part, objective=objective, tx=tx)

    def stream(number: int) -> Labeled:
        index = batch_indices(len(scenes), batch=batch, seed=seed, step=number)
        return Labeled(pixels[index], present[index], np.ones(batch, np.float32))

    with reported("training the encoder", total=steps, unit="steps") as task:
        state = train(
            partitioner.compile_step(step),
            partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.make_variables(begin)),
            stream,
            folder=folder,
            total_steps=steps,
            saving=Saving(every=max(1, steps // 2)),
            fingerprint=fingerprint,
            partitioner=partitioner,
            check=lambda step, metrics: task.advance(note="{right:.0%} right".format(**metrics)),
        )
    return {"params": partitioner.to_host(state.params)["params"]["encoder"]}
