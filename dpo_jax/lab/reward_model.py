"""Bradley-Terry reward model learned from pairs, as a saved folder and as a reward function for PPO."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dpo_jax.data.encode import Bos, Encoded, prompt_key
from dpo_jax.data.groups import PairGroup, group_pairs
from dpo_jax.data.layout import Layout
from dpo_jax.data.loader import eval_batches, plan_layout, round_up, total_steps, train_batches
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.data.prepare import data_digest
from dpo_jax.evals.calibration import accuracy
from dpo_jax.evals.reward_functions import Reward, learned, with_ends
from dpo_jax.lab.methods import row_parts
from dpo_jax.lab.world import World
from dpo_jax.logps import slots_to_pairs
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, family_of
from dpo_jax.models.hf import cast, save_hf, variable_shapes
from dpo_jax.models.scorer import scorer_settings, without_earlier_head
from dpo_jax.models.tensors import SCORE
from dpo_jax.reward_model import HEAD, center_rewards, completion_rewards, reward_step, scalar_head, with_scalar_head
from dpo_jax.runtime.fit import Evaluation
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.runtime.training_progress import Progress
from dpo_jax.step import init_state
from dpo_jax.training.run import train
from dpo_jax.training.stopping import EarlyStopping
from dpo_jax.types import Model, Partitioner, Rows, TrainState, Variables

HELD_OUT = 10  # the pairs of one prompt in ten are held out to choose the checkpoint


class RewardModel:
    """A decoder with a scalar head, run by a partitioner. `variables` are the partitioner's, with the collection "head"."""

    def __init__(self, partitioner: Partitioner, model: Model) -> None:
        self.partitioner, self.model = partitioner, with_scalar_head(model)
        self.score = partitioner.compile_map(functools.partial(_of_pairs, self.model))
        self.score_texts = partitioner.compile_map(functools.partial(completion_rewards, self.model))

    def of_pairs(self, variables: Variables, pairs: Sequence[Encoded], *, batch: int) -> np.ndarray:
        """Rewards of chosen and rejected completions: float64[P, 2]. About `batch` pairs at a time."""
        groups = group_pairs(pairs)
        several, layout = plain_layout(groups, len(pairs), batch=batch, partitioner=self.partitioner)
        rewards = np.full((len(groups), layout.pairs, 2), np.nan)
        for one in eval_batches(groups, layout=layout, batch=several, part=self.partitioner.host_part):
            numbers, scores = one.of_examples(self.score(variables, one.rows))
            rewards.reshape(-1, 2)[numbers] = scores
            pause()
        found = np.empty((len(pairs), 2))
        for group, of_group in zip(groups, rewards, strict=True):
            found[group.members] = of_group[: len(group.members)]
        return found

    def of_texts(
        self, variables: Variables, tokenizer: Any, *, batch: int, bos: Bos = "auto", pad_token_id: int | None = None
    ) -> Reward:
        """Reward function of prompt and completion texts, `batch` at a time, encoded with `bos` like the pairs.

        The score is read at the last token that is not `pad_token_id`.
        """
        score = functools.partial(self.score_texts, variables)
        batch, part = round_up(batch, self.partitioner.row_shards), self.partitioner.host_part
        length = self.model.config.max_positions
        how = {"batch": batch, "bos": bos, "host_part": part, "pad_token_id": pad_token_id}
        return learned(score, tokenizer, length=length, **how)


def judged(rewards: np.ndarray) -> dict[str, float]:
    """Loss in nats (eq. 2) and accuracy of `rewards[P, 2]`; a tie counts as half."""
    margins = rewards[:, 0] - rewards[:, 1]
    return {"loss": float(np.logaddexp(0, -margins).mean()), "accuracy": float((1 + np.sign(margins)).mean() / 2)}


def accuracy_words(figures: Mapping[str, float]) -> str:
    """The accuracy of `fit_reward_model`'s figures, with its interval and what it was measured on."""
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    which = f"on the {figures['held_out']:.0f} held-out pairs that chose the checkpoint"
    return f"accuracy {figures['accuracy']:.3f} ({low:.3f} to {high:.3f}) {which}"


def _of_pairs(model: Model, variables: Variables, rows: Rows) -> jax.Array:
    return slots_to_pairs(completion_rewards(model, variables, rows), rows)


def plain_layout(
    groups: Sequence[PairGroup], pairs: int, *, batch: int, partitioner: Partitioner, microbatches: int = 1
) -> tuple[int, Layout]:
    """Number of groups that hold about `batch` of their `pairs`, and their layout with a copy of the prompt per completion."""
    several = max(1, round(batch * len(groups) / pairs))
    return several, plan_layout(groups, kind="plain", batch=several, shapes=2, **row_parts(partitioner, microbatches))


def fit_reward_model(
    judge: RewardModel,
    start: Variables,
    pairs: Sequence[Encoded],
    folder: str | os.PathLike[str] | RunDir,
    *,
    make_tx: Callable[..., optax.GradientTransformation],
    batch: int,
    epochs: float,
    evaluations: int,
    seed: int,
    fingerprint: Mapping[str, Any],
    microbatches: int = 1,
    make_state: Callable[..., TrainState] = init_state,
    **options: Any,
) -> tuple[Variables, dict[str, float]]:
    """Trains a reward model. Returns the variables with the lowest validation loss, on the host, and their figures.

    The figures are of the held-out pairs that chose these variables, so they are rather too good; `accuracy_low` and
    `accuracy_high` are the 95 % interval over prompts. Training starts from a policy's variables `start`. A killed run in
    `folder` continues if it has the same `fingerprint` (JSON values: settings and digests, to which this function's own are
    added); `training.run.train` does this and takes the other `options`. Validation holds out whole prompts, because pairs of
    one prompt may share completions. The rewards have mean 0 over all completions of `pairs` (section 3 of the paper).
    `make_tx(steps=n)` makes the optimizer of a run of `n` steps. `make_state(variables, tx=...)` makes the state before the
    first step and thus selects what is trained. Raises `DataError` if all pairs have a single prompt, and `NonFinite` where the
    validation loss is not finite.
    """
    partitioner = judge.partitioner
    groups = group_pairs(pairs)
    training = [group for number, group in enumerate(groups) if number % HELD_OUT]
    held_out = [pairs[member] for group in groups[::HELD_OUT] for member in group.members]
    if not training:
        raise DataError("a reward model needs pairs from at least two prompts; one is held out", causes=[Cause.NO_ROWS])
    several, layout = plain_layout(groups, len(pairs), batch=batch, partitioner=partitioner, microbatches=microbatches)

    def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
        return judged(judge.of_pairs(state.variables, held_out, batch=batch))

    head = scalar_head(judge.model.config.width)
    placed = partitioner.put_variables({**partitioner.to_host(start), HEAD: jax.device_get(head)})
    steps = total_steps(len(training), batch=several, epochs=epochs)
    tx, best = make_tx(steps=steps), EarlyStopping("loss", patience=None)
    step = functools.partial(reward_step, model=judge.model, tx=tx, microbatches=microbatches, axis_name=partitioner.axis_name)
    own = {"batch": batch, "passes": epochs, "evaluations": evaluations, "seed": seed, "data": data_digest(pairs)}
    state = train(
        partitioner.compile_step(step),
        partitioner.init_state(functools.partial(make_state, tx=tx), placed),
        train_batches(training, layout=layout, batch=several, seed=seed, epochs=epochs, part=partitioner.host_part),
        folder=folder,
        total_steps=steps,
        fingerprint={**fingerprint, **own},
        partitioner=partitioner,
        evaluation=Evaluation(evaluate, every=max(1, math.ceil(steps / evaluations))),
        stopping=best,
        progress=Progress(epochs=epochs),
        **options,
    )
    variables, of_held_out = partitioner.to_host(state.variables), judge.of_pairs(state.variables, held_out, batch=batch)
    spread = accuracy(of_held_out[:, 0] - of_held_out[:, 1], [prompt_key(pair) for pair in held_out])
    figures = {**judged(of_held_out), "accuracy_low": spread["low"], "accuracy_high": spread["high"]}
    rewards = judge.of_pairs(state.variables, pairs, batch=batch)
    counts = {"step": float(best.best or steps), "pairs": float(len(pairs) - len(held_out)), "held_out": float(len(held_out))}
    return center_rewards(variables, rewards), {**figures, **counts}


def learn_reward(
    world: World, pairs: Sequence[Encoded], folder: Path, *, bos: Bos = "auto", **options: Any
) -> tuple[Reward, dict[str, float]]:
    """Learns a reward from pairs of a world with `fit_reward_model`, which takes the `options`. Returns it with its figures.

    `bos` must be the setting that the pairs were encoded with.
    """
    judge = RewardModel(world.partitioner, world.model)
    variables, figures = fit_reward_model(judge, world.reference, with_ends(pairs, world.tokenizer), folder, **options)
    variables = world.partitioner.put_variables(variables)
    return judge.of_texts(variables, world.tokenizer, batch=world.batch, bos=bos), figures


def save_reward_model(
    path: Path, model: Model, variables: Variables, *, pad_token_id: int | None = None, dtype: Any = None
) -> Path:
    """Writes a reward model as transformers' `AutoModelForSequenceClassification` reads it (`models.scorer`).

    `variables` are on the host. `pad_token_id` is the tokenizer's padding token, if that is not EOS. `dtype` is the type of the
    weights (None: as they are; the head is then float32). If there are several hosts, only the first one writes. Raises
    OverflowError for values too large for `dtype`.
    """
    if not is_first():
        return path
    head = variables[HEAD]
    settings = scorer_settings(
        family_of(model.config).architecture, bias=float(np.asarray(head["bias"])), pad_token_id=pad_token_id
    )
    decoder = make_model(decoder_config({**model.config.hf, **settings}))
    kept = variable_shapes(decoder)["params"]
    params = {name: leaf for name, leaf in variables["params"].items() if name in kept}
    without_earlier_head(path)
    score = {SCORE: cast(np.asarray(head["kernel"], np.float32), np.dtype(dtype or np.float32), SCORE)[None]}
    return save_hf(path, decoder, {"params": params}, settings=settings, others=score, dtype=dtype)
