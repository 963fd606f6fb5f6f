"""`dpo-jax reward-model`: trains the Bradley-Terry reward model (eq. 2) on the configuration's preferences.

It starts from the starting policy and writes to `<run.dir>/reward-model`: `export/` (for `ppo.reward_model`), `checkpoints/`,
`metrics.jsonl` and `result.json`. The same command continues a run that was killed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_jax.cli import build, identity, splits
from dpo_jax.cli.config import Config, ConfigError, DpoConfig
from dpo_jax.cli.earlier import earlier_run
from dpo_jax.cli.exports import DTYPES
from dpo_jax.cli.repeats import check_repeats
from dpo_jax.cli.trainable import trainable_of
from dpo_jax.data.encode import Encoded, prompt_key
from dpo_jax.data.prepare import data_digest
from dpo_jax.data.template import turn_end_token
from dpo_jax.data.tokenizer import save_tokenizer
from dpo_jax.evals.calibration import accuracy
from dpo_jax.evals.reward_functions import with_ends
from dpo_jax.lab.reward_model import RewardModel, fit_reward_model, judged, save_reward_model
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.training.fingerprint import architecture
from dpo_jax.types import Model, Variables


def run(config: Config) -> int:
    path, training = config.dpo_policy(), config.dpo
    with build.open_run(config, "reward-model") as run_dir:
        earlier_run(config, "reward-model", training)
        tokenizer = build.tokenizer_of(config, model_path=path, name="dpo.policy")
        model = build.policy_model(config, path, tokenizer, name="dpo.policy")
        trainable = trainable_of(config, training, model, path)
        partitioner = trainable.partitioner(config, head=True)
        pairs, test = (splits.encode_split(config, loaded, tokenizer) for loaded in splits.load_splits(config, tokenizer))
        check_repeats(config, pairs, test)
        _note_unread(config)
        start, digests = trainable.load(path, partitioner, name="dpo.policy")
        print(f"{len(pairs):,} pairs for training and model selection, {len(test):,} for the final test", flush=True)
        judge = RewardModel(partitioner, trainable.model)
        learned, final = (_ended(config, one, tokenizer, limit=model.config.max_positions) for one in (pairs, test))
        with identity.refusing_mismatch():
            variables, validation = fit_reward_model(
                judge,
                start,
                learned,
                run_dir,
                make_tx=functools.partial(build.make_tx, training, seed=config.run.seed),
                batch=training.batch,
                epochs=config.frontier.reward_model_epochs,
                evaluations=config.frontier.evaluations,
                seed=config.run.seed,
                fingerprint={
                    **identity.settings_read(config, "reward-model"),
                    **digests,
                    "architecture": architecture(trainable.base),
                },
                data=identity.data_record(config, tokenizer, [pairs.report, test.report], held_out=data_digest(final)),
                microbatches=training.microbatches,
                make_state=trainable.state,
                saving=build.saving(config, "reward-model"),
                begin=lambda: build.describe(run_dir, config, pairs.report, test.report),
            )
        rewards = judge.of_pairs(partitioner.put_variables(variables), final, batch=training.batch)
        figures, margins = judged(rewards), rewards[:, 0] - rewards[:, 1]
        spread = accuracy(margins, [prompt_key(pair) for pair in test])
        low, high = spread["low"], spread["high"]
        folder = _save(config, run_dir, model, trainable.merged(variables), tokenizer)
        found = {**figures, "accuracy_low": low, "accuracy_high": high, "pairs": len(test)}
        if is_first():
            save_tokenizer(tokenizer, folder)
            write_json(run_dir.path / "result.json", {"validation": validation, "test": found})
        print(f"the checkpoint of step {validation['step']:g} has the lowest validation loss: {validation['loss']:.4f}")
        print(
            f"on the test split: loss {figures['loss']:.4f} (no preference learned: 0.6931), "
            f"accuracy {figures['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        )
        print(f"train a policy against it with dpo-jax ppo ... --ppo.reward-model {folder}")
    return 0


def _note_unread(config: Config) -> None:
    """Prints a note on options of dpo that set the length of its run, but not of this one."""
    default, own = DpoConfig(), config.dpo
    unread = [f"dpo.{name}" for name in ("epochs", "steps", "patience") if getattr(own, name) != getattr(default, name)]
    if unread:
        print(
            f"note: {', '.join(unread)}: not read by reward-model, whose length is frontier.reward_model_epochs "
            f"({config.frontier.reward_model_epochs:g})",
            flush=True,
        )


def _save(config: Config, run_dir: RunDir, model: Model, variables: Variables, tokenizer: Any) -> Path:
    """Writes the reward model. Raises `ConfigError` if its weights do not fit `export.dtype`."""
    dtype = None if config.export.dtype is None else DTYPES[config.export.dtype]
    try:
        return save_reward_model(run_dir.export, model, variables, pad_token_id=_padding(tokenizer), dtype=dtype)
    except OverflowError as error:
        raise ConfigError(f"export.dtype: {error}") from error


def _padding(tokenizer: Any) -> int | None:
    """The padding token, unless it ends texts or turns: transformers would then read the score before it."""
    ends = {tokenizer.eos_token_id, turn_end_token(tokenizer)}
    return None if tokenizer.pad_token_id in ends else tokenizer.pad_token_id


def _ended(config: Config, pairs: Sequence[Encoded], tokenizer: Any, *, limit: int) -> list[Encoded]:
    """`with_ends`. Raises `ConfigError` if a text is then longer than the model reads."""
    ended = with_ends(pairs, tokenizer)
    longest = max((len(pair.prompt) + max(map(len, pair.completions)) for pair in ended), default=0)
    if longest > limit:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} leaves no room for the end of a turn, with which a text has {longest} "
            f"tokens, but the model reads {limit}: lower it by {longest - limit} or more"
        )
    return ended
