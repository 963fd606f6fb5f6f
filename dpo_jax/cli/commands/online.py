"""`dpo-jax online`: online and iterative DPO, in rounds of sampling, labeling, pairing and optimizer steps.

Writes to `<run.dir>/online`: `round-000/`, ... (`dpo_jax.online.rounds`), `rounds.jsonl` (one row per round), `labels.jsonl`
(every label, so that none is requested twice; for a judge also `verdicts.jsonl`), `metrics.jsonl`, `plots/`, `result.json`
(reward and KL on held-out prompts after each round) and `export/`. The same command continues an interrupted run, with
bit-identical results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.cli import build, identity
from dpo_jax.cli.balancing import router_aux_loss
from dpo_jax.cli.card import online_card
from dpo_jax.cli.config import Config, DpoConfig, OnlineConfig
from dpo_jax.cli.earlier import earlier_run
from dpo_jax.cli.experiment import has_true_reward, make_world
from dpo_jax.cli.exports import write_model, write_outputs, writer
from dpo_jax.cli.frontier_runs import classifier_name
from dpo_jax.cli.kept_policies import KeptPolicies
from dpo_jax.cli.metrics_writers import metrics_writers
from dpo_jax.cli.online_labels import compare_of, label_settings
from dpo_jax.cli.preflight.online import refuse_unfit
from dpo_jax.cli.rewards import learned_reward
from dpo_jax.cli.trainable import Trainable, planned_trainable
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.dpo import dpo_step
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.world import World, copy_of
from dpo_jax.losses import PreferenceLoss
from dpo_jax.models.digest import files_digest
from dpo_jax.models.hub import resolve
from dpo_jax.online.labels import LabelLog
from dpo_jax.online.references import KeptReferences
from dpo_jax.online.rounds import RoundOptions, Rounds
from dpo_jax.runtime import hosts
from dpo_jax.runtime.fit import Evaluation
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.runtime.training_progress import Progress
from dpo_jax.training.fingerprint import SavedRun, architecture, check_settings
from dpo_jax.training.run import steps_of, train
from dpo_jax.types import TrainState, Variables

NOT_OF_A_ROUND = ("rounds", "label_budget", "steps", "replay", "reward_model")
"""Options of `online` that do not change the files of a round. The reward model is identified by its weights."""
UNSAVED = {"online.replay": 1}
"""Facts of runs whose version saved them only if they differed from these values."""


def run(config: Config) -> int:
    refuse_unfit(config)
    section = config.online.training(config.dpo)
    with build.open_run(config, "online") as run_dir:
        loss, saved = build.make_loss(section), earlier_run(config, "online", section)
        compare = compare_of(config, run_dir)
        learned = _learned(config)
        reward = None if compare else learned if config.online.reward == "reward-model" else None
        judge = None if has_true_reward(config) else reward or _unknown
        world, digests = make_world(config, train="prompts", test="test_prompts", reward=judge)
        if judge is not None:
            words = "the policy is measured by the learned one" if reward else "only KL is measured on held-out prompts"
            print(f"the true reward of these data is not known: {words}", flush=True)
        rounds = _rounds(
            config,
            run_dir,
            world,
            digests,
            compare=compare,
            reward=None if compare else reward or world.reward,
            estimate=learned,
        )
        before = _measured(world, world.reference)
        print(f"the reference: {_words(before)}", flush=True)
        state = _train(config, section, run_dir, world, rounds, digests, loss=loss, saved=saved)
        points = hosts.run_on_first(lambda: list(filter(is_evaluation, read_metrics(run_dir.metrics))))
        named = [{name.removeprefix("eval/"): value for name, value in row.items()} for row in points]
        if hosts.is_first():
            write_json(run_dir.path / "result.json", {"points": [{"step": 0, **before}, *named]})
        trainable = _trainable(config, world)
        write = writer(trainable, write_model, source=config.dpo_policy(), dtype=config.export.dtype, digests=digests)
        card = functools.partial(online_card, config, run_dir, step=steps_of(state, world.partitioner))
        final = trainable.written(world.partitioner, state)
        write_outputs(run_dir, trainable.base, final, world.tokenizer, card=card, write=write)
        print(f"{_words(before)} -> {_words(named[-1])}; {rounds.log.total(config.online.rounds):,} labels")
    return 0


def _learned(config: Config) -> Reward | None:
    """The learned reward in the configuration: the label source, or the estimate for elicitation."""
    path = config.online.reward_model
    if path is None:
        return None
    return learned_reward(
        config, path, name="online.reward_model", batch=config.frontier.sample_batch, policy=config.dpo_policy()
    )


def _unknown(prompts: Any, completions: Any) -> np.ndarray:
    return np.zeros(len(completions))


def _measured(world: World, variables: Variables) -> dict[str, float]:
    """Held-out reward, if one is known, and KL."""
    found = world.measure(variables)
    return {name: value for name, value in found.items() if world.reward is not _unknown or not name.startswith("reward")}


def _words(point: Mapping[str, float]) -> str:
    return (f"reward {point['reward']:.2f} at " if "reward" in point else "") + f"KL {point['kl']:.2f} nats"


def _trainable(config: Config, world: World) -> Trainable:
    model = build.policy_model(config, config.dpo_policy(), world.tokenizer, name="dpo.policy")
    return planned_trainable(config, config.dpo, model)


def _rounds(config: Config, run: RunDir, world: World, digests: Mapping[str, str], **labels: Any) -> Rounds:
    section, dpo = config.online, config.dpo
    options = RoundOptions(
        prompts=section.prompts,
        completions=section.completions,
        pairs=section.pairs,
        steps=section.steps_each(dpo.batch),
        batch=section.batch(dpo.batch),
        beta=dpo.beta,
        seed=config.run.seed,
        candidates=section.candidates,
        elicitation=section.elicitation,
        refresh=section.refresh_reference_rounds or 0,
        layout=config.data.layout,
        row_length=config.data.row_length,
        microbatches=dpo.microbatches,
        beta_last=section.beta_last,
        reward_scale=section.reward_scale,
        rounds=section.rounds,
        replay=section.replay,
    )
    kept = KeptPolicies(_trainable(config, world), world, config.dpo_policy(), digests, "online.refresh_reference_rounds")

    def save(path: Path, variables: Variables) -> None:
        kept.save(path, world.partitioner.get_state(variables))

    with identity.refusing_mismatch():
        log = LabelLog(run.path / "labels.jsonl", label_settings(config))
    return Rounds(
        world,
        run.path,
        options,
        log=log,
        settings=_settings(config, world),
        start=digests["start"],
        references=KeptReferences(run.path / "references", save=save, load=kept.load) if options.refresh else None,
        **labels,
    )


def _settings(config: Config, world: World) -> dict[str, Any]:
    """Settings on which samples, labels and pairs of a round depend, besides the weights of policy and reference."""
    online = {name: value for name, value in dataclasses.asdict(config.online).items() if name not in NOT_OF_A_ROUND}
    # If beta changes, training in a round depends on the number of rounds.
    length = {} if config.online.beta_last is None else {"online.rounds": config.online.rounds}
    return {
        **length,
        **{f"online.{name}": value for name, value in online.items()},
        **{f"labels, {name}": value for name, value in label_settings(config).items()},
        "frontier.max_new_tokens": config.frontier.max_new_tokens,
        "dpo.beta": config.dpo.beta,
        "steps of a round": config.online.steps_each(config.dpo.batch),
        "seed": config.run.seed,
        "precision": config.run.precision,
        "tokenizer": tokenizer_digest(world.tokenizer),
        "architecture": architecture(world.model),
        "prompts": world.train.digest(),
        "estimate": _estimate_digest(config.online),
    }


def _estimate_digest(section: OnlineConfig) -> str | None:
    """Digest of the reward model that estimates rewards for elicitation; None if there is none."""
    if section.elicitation != "disagreement" or section.reward_model is None:
        return None
    return files_digest(resolve(section.reward_model))[0]


def _facts(config: Config, section: DpoConfig, world: World, digests: Mapping[str, str]) -> dict[str, Any]:
    """The fingerprint of the run. `section`: `dpo`, with the length of all rounds; `digests`: of the initial weights."""
    return {
        **identity.settings(config, section),
        **_settings(config, world),
        **digests,
        "data.layout": config.data.layout,
        "online.replay": config.online.replay,
        "test prompts": world.test.digest(),
        "measured reward": _measured_reward(config),
    }


def _measured_reward(config: Config) -> str | None:
    """The reward that is measured on held-out prompts. Settings of labels identify a learned one by its weights."""
    section = config.frontier
    if not has_true_reward(config):
        return "reward model" if config.online.reward == "reward-model" else None
    return section.reward if section.classifier is None else f"{section.reward}, {classifier_name(section.classifier)}"


def _refuse_changes(saved: SavedRun, facts: Mapping[str, Any]) -> None:
    """Raises `RunMismatch`, naming each fact that differs from the saved run."""
    check_settings(saved.place, {**UNSAVED, **saved.fingerprint}, facts)


def _train(
    config: Config,
    section: DpoConfig,
    run: RunDir,
    world: World,
    rounds: Rounds,
    digests: Mapping[str, str],
    *,
    loss: PreferenceLoss,
    saved: SavedRun | None,
) -> TrainState:
    """Runs the rounds and their steps, from the newest checkpoint if there is one. Returns the final state on the devices."""
    partitioner, total = world.partitioner, section.steps or 0
    tx = build.make_tx(section, steps=total, seed=config.run.seed)
    facts = _facts(config, section, world, digests)
    with identity.refusing_mismatch():
        if saved is not None:
            _refuse_changes(saved, facts)
        if saved is None or saved.step < rounds.every:
            rounds.begin(world.reference)
        copy = copy_of(world.reference)
        step = functools.partial(
            dpo_step,
            model=world.model,
            tx=tx,
            loss=loss,
            router_aux_loss=router_aux_loss(section, world.model),
            microbatches=section.microbatches,
            axis_name=partitioner.axis_name,
        )
        return train(
            partitioner.compile_step(step),
            partitioner.init_state(functools.partial(world.begin, tx=tx), copy),
            rounds.batch,
            folder=run,
            total_steps=total,
            fingerprint=facts,
            saved=saved,
            partitioner=partitioner,
            saving=build.saving(config, "online"),
            evaluation=Evaluation(lambda state, done: _measured(world, state.variables), every=rounds.every),
            refresh=rounds,
            lr=build.make_schedule(section, steps=total),
            begin=lambda: build.describe(run, config),
            writers=functools.partial(metrics_writers, config, run, facts),
            progress=Progress(),
        )
