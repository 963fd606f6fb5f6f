"""`dpo-jax sft`: supervised fine-tuning of the policy that DPO starts from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_jax.cli import build, splits
from dpo_jax.cli.balancing import router_aux_loss
from dpo_jax.cli.card import sft_card
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.earlier import earlier_run
from dpo_jax.cli.exports import write_exact, write_outputs, writer
from dpo_jax.cli.images import encode_shown, vision_of
from dpo_jax.cli.repeats import check_repeats
from dpo_jax.cli.train import train
from dpo_jax.cli.trainable import trainable_of
from dpo_jax.cli.training_plan import TrainingData, plan_training
from dpo_jax.data.loader import eval_batches
from dpo_jax.data.pairs import Cause, DataError, DataReport
from dpo_jax.data.prepare import encode_targets
from dpo_jax.logps import sequence_logps
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.progress import reported
from dpo_jax.sft import sft_step
from dpo_jax.training.run import steps_of
from dpo_jax.types import TrainState


def run(config: Config) -> int:
    section = config.sft
    with build.open_run(config, "sft") as run_dir:
        saved = earlier_run(config, "sft", section)
        tokenizer = build.tokenizer_of(config, model_path=config.model.path)
        data = (_plain_texts if config.data.source in splits.TEXT_SOURCES else _targets)(config, tokenizer)
        _check_texts(data)
        model = build.start_model(config, tokenizer, images=data.vision is not None)
        trainable = trainable_of(config, section, model, config.model.path)
        partitioner, balancing = trainable.partitioner(config), router_aux_loss(section, model)
        plan = plan_training(config, section, data, tokenizer=tokenizer, partitioner=partitioner, saved=saved)
        if config.model.path is None:
            variables, start = build.start_weights(config, model, partitioner)
            digests = {"start": start}
        else:
            variables, digests = trainable.load(config.model.path, partitioner, name="model.path")
        score = partitioner.compile_map(functools.partial(sequence_logps, trainable.model))

        def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
            total, tokens, count = 0.0, 0.0, len(data.held_out)
            batches = eval_batches(data.held_out, layout=plan.held_out_layout, batch=section.batch, part=partitioner.host_part)
            with reported("evaluating", total=count, unit="texts", brief=True) as task:
                for batch in batches:
                    total -= float(np.sum(batch.of_examples(score(state.variables, batch.rows))[1]))
                    tokens += batch.stats["scored_tokens"]
                    task.advance(int(batch.stats["texts"]))
                    pause()
            return {"loss": total / (tokens if section.loss == "mean" else count), "nll_per_token": total / tokens}

        state = train(
            config,
            run_dir,
            section,
            plan,
            step=functools.partial(
                sft_step, model=trainable.model, per_token=section.loss == "mean", router_aux_loss=balancing
            ),
            trainable=trainable,
            variables=variables,
            weights=digests,
            partitioner=partitioner,
            evaluate=evaluate,
        )
        # DPO starts from exactly these weights.
        write = writer(trainable, write_exact, source=config.model.path, dtype=None, digests=digests)
        final = trainable.written(partitioner, state)
        card = functools.partial(sft_card, config, run_dir, step=steps_of(state, partitioner))
        write_outputs(run_dir, model, final, tokenizer, card=card, write=write)
    return 0


def _check_texts(data: TrainingData) -> None:
    """Raises `DataError` for a split without texts: single completions may all be undesirable."""
    for texts, report in zip((data.train, data.held_out), data.reports, strict=True):
        if not texts:
            raise DataError(
                f"{report.source} [{report.split}]: no text for supervised fine-tuning in {report.kept:,} kept rows; each "
                "split needs at least one, and of single completions only the desirable ones count (label: true)",
                causes=[Cause.NO_ROWS],
            )


def _targets(config: Config, tokenizer: Any) -> TrainingData:
    """The texts to learn from preference data: their SFT targets, or else the chosen completions."""
    data = config.data
    # The best completions do not depend on what the loss of dpo reads.
    sets = splits.load_splits(config, tokenizer, rows="any", images=True)
    vision = vision_of(config, config.model.path, tokenizer, *sets, name="model.path")
    # Encoding the pairs as well makes SFT refuse the same bad rows as DPO, so that both see the same data.
    pairs = [encode_shown(config, preferences, tokenizer, vision) for preferences in sets]
    check_repeats(config, *pairs)
    limits: dict[str, Any] = {name: getattr(data, name) for name in ("max_length", "max_prompt_length", "bos")}
    limits["truncation"] = data.cut
    kept = [splits.only_kept(split, encoded) for split, encoded in zip(sets, pairs, strict=True)]
    images = None if vision is None else vision.tokens
    with reported("encoding the training texts"):
        (texts, uids), (held_out, _) = (
            encode_targets(split, tokenizer, **limits, score_prompt=config.sft.scored == "all", images=images) for split in kept
        )
    for name, rows, found in zip(("train", "test"), kept, (texts, held_out), strict=True):
        if len(found) < len(rows):
            why = "a repeated text counts once, and undesirable completions are left out"
            print(f"note: {name} split: {len(found):,} texts to learn in {len(rows):,} rows ({why})", flush=True)
    return TrainingData(texts, held_out, [encoded.report for encoded in pairs], uids, vision)


def _plain_texts(config: Config, tokenizer: Any) -> TrainingData:
    """Plain texts, which have no prompts and are scored as a whole."""
    if config.sft.scored != "all":
        raise ConfigError(f"sft.scored: {config.data.source} have no prompts, so all of their tokens are scored; set it to all")
    found, reports = [], []
    for split in ("train", "test"):
        texts = splits.load_texts(config, split)
        encoded = splits.encode_texts(config, texts, tokenizer)
        found.append((encoded, [text.uid for text in texts]))
        count, cut = len(texts), sum(int(text[1][-1] != tokenizer.eos_token_id) for text in encoded)
        report = DataReport(source=str(config.data.path), split=split, format=config.data.source)
        report.rows = report.read = report.kept = count
        report.truncated = {"text": cut} if cut else {}
        reports.append(report)
    (texts, uids), (held_out, _) = found
    return TrainingData(texts, held_out, reports, uids)
