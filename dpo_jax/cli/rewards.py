"""Learned rewards: reward models read from their folders."""

from __future__ import annotations

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.reward_model import RewardModel, load_head
from dpo_jax.models.hub import resolve
from dpo_jax.reward_model import HEAD, with_scalar_head
from dpo_jax.untrusted import Unreadable


def learned_reward(config: Config, path: str, *, name: str, batch: int) -> Reward:
    """The reward in a folder of `dpo-jax reward-model`. `name` is the option that `path` comes from."""
    tokenizer = build.tokenizer_of(config, model_path=path, name=name)
    model = build.policy_model(config, path, tokenizer, name=name)
    try:
        head = load_head(resolve(path), width=model.config.width)
    except Unreadable:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {path}: {error}") from error
    partitioner = build.make_partitioner(config, with_scalar_head(model))
    variables, _ = build.load_weights(path, model, partitioner, name=name)
    variables = {**variables, **partitioner.put_variables({HEAD: head})}
    return RewardModel(partitioner, model).of_texts(variables, tokenizer, batch=batch, bos=config.data.bos)
