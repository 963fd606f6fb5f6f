"""PPO with the options of section frontier, for `frontier`, `ppo` and `robust`."""

from __future__ import annotations

import dataclasses
import math

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.lab.ppo import PpoMethod, PpoOptions
from dpo_jax.lab.world import World
from dpo_jax.runtime.optim import make_optimizer


def ppo_method(config: Config, world: World) -> PpoMethod:
    """Raises `ConfigError` if completions do not divide over minibatches, devices and microbatches."""
    section, parts = config.frontier, config.dpo.microbatches * world.partitioner.row_shards
    options = PpoOptions(
        iterations=section.ppo_iterations,
        batch=section.ppo_batch,
        epochs=section.ppo_epochs,
        minibatches=section.ppo_minibatches,
        microbatches=config.dpo.microbatches,
        horizon=2 * section.ppo_batch,
        clip=0.2,
        value_clip=0.2,
        value_weight=0.1,
        gamma=1.0,
        lam=0.95,
    )
    if (options.batch // options.minibatches) % parts:
        raise ConfigError(
            f"frontier.ppo_batch: {options.batch} completions in {options.minibatches} minibatches cannot be split over "
            f"{world.partitioner.row_shards} devices x {options.microbatches} microbatches; use a multiple of "
            f"{options.minibatches * parts}"
        )
    steps = options.iterations * options.epochs * options.minibatches
    schedule = build.make_schedule(dataclasses.replace(config.dpo, lr=section.ppo_lr), steps=steps)
    return PpoMethod(world, tx=make_optimizer(schedule, name="adamw", max_grad_norm=1.0), options=options)


def first_kl_coef(target_kl: float) -> float:
    """Initial KL coefficient: that of the optimum at this KL if rewards were normal, in standard deviations of the reward."""
    return 1 / math.sqrt(2 * target_kl)
