"""Learned rewards: reward models read from their folders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.data.template import asking_end, is_rendered, same_template
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.reward_model import RewardModel
from dpo_jax.models.hf import load_config
from dpo_jax.models.hub import model_folder
from dpo_jax.models.scorer import read_head
from dpo_jax.reward_model import HEAD, with_scalar_head


def learned_reward(config: Config, path: str, *, name: str, batch: int, policy: str) -> Reward:
    """The reward in a folder or Hub repository of a reward model: of `dpo-jax reward-model`, or another with one output.

    `name` is the option that `path` comes from. `policy` is the model whose tokenizer renders prompts: a conversation raises
    `ConfigError` if the chat template of the reward model is another.
    """
    tokenizer = build.tokenizer_of(config, model_path=path, name=name)
    model = build.policy_model(config, path, tokenizer, name=name, scorer=True)
    with build.naming_option(name, path):
        hf = load_config(path)
        head = read_head(model_folder(path), hf, width=model.config.width)
    partitioner = build.make_partitioner(config, with_scalar_head(model))
    variables, _ = build.load_weights(path, model, partitioner, name=name)
    variables = {**variables, **partitioner.put_variables({HEAD: head})}
    how = {"batch": batch, "bos": config.data.bos, "pad_token_id": hf.get("pad_token_id")}
    reward = RewardModel(partitioner, model).of_texts(variables, tokenizer, **how)
    of_policy = build.tokenizer_of(config, model_path=policy, name="the policy")
    if same_template(tokenizer, of_policy):
        return reward
    end = asking_end(of_policy)

    def of_texts(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        if any(is_rendered(prompt, of_policy) or (end and prompt.rstrip().endswith(end)) for prompt in prompts):
            raise ConfigError(
                f"{name}: {path} has another chat template than the policy, so it would misread these conversations: use a "
                "reward model with the template of the policy"
            )
        return reward(prompts, completions)

    return of_texts
