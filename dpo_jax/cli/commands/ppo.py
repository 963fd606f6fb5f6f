"""`dpo-jax ppo`: trains one policy with PPO, from the starting policy, on the true reward or a learned one.

Writes to `<run.dir>/ppo`: `export/` (the policy), `checkpoints/`, `metrics.jsonl` (one row per rollout), `plots/` and
`result.json` (true reward and KL on held-out prompts during the run). The same command continues a run that was killed, with
bit-identical results. Sizes and learning rate are the options `frontier.ppo_*`; `run.save_every_steps` counts rollouts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from dpo_jax.cli import build, identity
from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import Config
from dpo_jax.cli.earlier import earlier_run
from dpo_jax.cli.experiment import has_true_reward, make_world, sized
from dpo_jax.cli.exports import write_model, writer
from dpo_jax.cli.frontier_runs import classifier_name
from dpo_jax.cli.ppo_setup import first_kl_coef, ppo_method
from dpo_jax.cli.rewards import learned_reward
from dpo_jax.cli.starting_policy import refuse_bfloat16
from dpo_jax.cli.trainable import planned_trainable
from dpo_jax.lab.world import LEARNED, World
from dpo_jax.models.digest import files_digest
from dpo_jax.models.hub import resolve
from dpo_jax.plotting import training_curves
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.training.fingerprint import architecture, check_settings


def run(config: Config) -> int:
    config = sized(config)
    refuse_bfloat16(config, "ppo")
    with build.open_run(config, "ppo") as run_dir:
        saved = earlier_run(config, "ppo", config.dpo)
        path = config.ppo.reward_model
        how = {"batch": config.frontier.sample_batch, "policy": config.dpo_policy()}
        reward = learned_reward(config, path, name="ppo.reward_model", **how) if path else None
        settings = _settings(config)
        if saved is not None:
            with identity.refusing_mismatch():
                check_settings(saved.place, saved.fingerprint, settings)
        judge = None if has_true_reward(config) else reward
        if judge:
            print("the true reward of these data is not known: the policy is measured by the learned one, too", flush=True)
        world, digests = make_world(config, train="prompts", test="test_prompts", reward=judge)
        if reward and not judge:
            world.beside[LEARNED] = reward
        before = world.measure(world.reference)
        print(f"the reference: reward {before['reward']:.2f}", flush=True)
        with identity.refusing_mismatch():
            points, variables = ppo_method(config, world).train(
                run_dir,
                reward=reward or world.reward,
                target_kl=config.ppo.target_kl,
                kl_coef=first_kl_coef(config.ppo.target_kl),
                evaluations=config.frontier.evaluations,
                seed=config.run.seed,
                say=functools.partial(print, flush=True),
                resumable=_resumable(config, run_dir, world, {**settings, **digests}) | {"saved": saved},
            )
        with reported("exporting the policy"):
            model = build.policy_model(config, config.dpo_policy(), world.tokenizer, name="dpo.policy")
            trainable = planned_trainable(config, config.dpo, model)
            write = writer(trainable, write_model, source=config.dpo_policy(), dtype=config.export.dtype, digests=digests)
            folder, _ = write(run_dir.export, model, trainable.whole(variables), world.tokenizer)
        if is_first():
            training_curves.plot_training(read_metrics(run_dir.metrics), run_dir.plots)
            write_json(run_dir.path / "result.json", {"points": [{"step": 0.0, **before}, *points]})
        last = points[-1]
        print(
            f"reward {before['reward']:.2f} -> {last['reward']:.2f} ({last['reward_low']:.2f} to {last['reward_high']:.2f}) "
            f"at KL {last['kl']:.2f} nats ({last['kl_low']:.2f} to {last['kl_high']:.2f}; target {config.ppo.target_kl:g})"
        )
        print(f"the policy is in {folder}")
    return 0


def _resumable(config: Config, run_dir: RunDir, world: World, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `training.run.train`. `facts`: settings, and the digests of the weights."""
    of_data = {"data": world.train.digest(), "architecture": architecture(world.model)}
    return {
        "fingerprint": {**facts, **of_data},
        "data": identity.data_record(config, world.tokenizer, [], held_out=world.test.digest()),
        "saving": build.saving(config, "ppo"),
        "begin": functools.partial(build.describe, run_dir, config),
    }


def _settings(config: Config) -> dict[str, Any]:
    """The options that determine the result. sample_batch does not, because rows are independent; `sized` has applied fast."""
    names = [option for option in COMMANDS["ppo"].reads if option.startswith("frontier.")]
    found = {name: getattr(config.frontier, name.removeprefix("frontier.")) for name in names}
    del found["frontier.fast"], found["frontier.sample_batch"]
    if config.frontier.classifier is not None:
        found["frontier.classifier"] = classifier_name(config.frontier.classifier)
    path = config.ppo.reward_model
    return {
        **identity.settings_read(config, "ppo"),
        **found,
        "ppo.target_kl": config.ppo.target_kl,
        "ppo.reward_model": None if path is None else files_digest(resolve(path))[0],
    }
