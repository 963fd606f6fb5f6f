"""`dpo-jax sft`: supervised fine-tuning of the policy that DPO starts from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.cli import build, identity
from dpo_jax.cli.card import sft_card
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.export import write_exact, writer
from dpo_jax.cli.repeats import check_repeats
from dpo_jax.cli.train import earlier_run, leave_results, train
from dpo_jax.cli.trained import trained
from dpo_jax.data.layout import Completion
from dpo_jax.data.loader import few_shapes, in_order, plan_layout, skippable, stream, total_steps
from dpo_jax.data.pairs import DataReport
from dpo_jax.data.prepare import data_digest, encode_targets
from dpo_jax.logps import sequence_logps
from dpo_jax.runtime.progress import reported
from dpo_jax.sft import sft_step
from dpo_jax.types import TrainState


def run(config: Config) -> int:
    section, data = config.sft, config.data
    with build.open_run(config, "sft", continues=True) as run_dir:
        earlier = earlier_run(config, "sft", section)
        tokenizer = build.tokenizer_of(config, model_path=config.model.path)
        model = build.start_model(config, tokenizer)
        part = trained(config, section, model, config.model.path)
        partitioner = part.partitioner(config)
        (texts, uids), held_out, reports = (_plain_texts if data.source in build.TEXT_SOURCES else _targets)(config, tokenizer)
        if config.model.path is None:
            variables, start = build.start_weights(config, model, partitioner)
            digests = {"start": start}
        else:
            variables, digests = part.load(config.model.path, partitioner, name="model.path")
        kind = "plain" if data.layout == "shared" else data.layout  # a single completion shares its prompt with nobody
        parts = build.batch_parts(section, partitioner.row_shards, layout=kind)
        plan = functools.partial(plan_layout, [*texts, *held_out], kind=kind, batch=section.batch, length=data.row_length)
        layout = few_shapes(
            plan(multiple=parts, microbatches=skippable(section.microbatches, partitioner.row_shards)),
            examples=len(texts),
            batch=section.batch,
        )
        forward_layout = few_shapes(plan(multiple=partitioner.row_shards), examples=len(held_out), batch=section.batch)
        behind = identity.behind(earlier, examples=len(texts), batch=section.batch)
        steps = total_steps(len(texts), batch=section.batch, epochs=section.epochs, behind=behind)
        data_of_run = identity.data_record(config, tokenizer, reports, held_out=data_digest(held_out))
        identity.check_data(earlier, data_digest(texts), data_of_run)
        identity.check_length(earlier, steps=steps)
        tx = build.make_tx(section, steps=steps)
        step = functools.partial(
            sft_step, model=part.model, tx=tx, microbatches=section.microbatches, axis_name=partitioner.axis_name
        )
        score = partitioner.compile_map(functools.partial(sequence_logps, part.model))

        def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
            total, tokens = 0.0, 0.0
            with reported("evaluating", total=len(held_out), unit="texts", brief=True) as task:
                for _, batch in in_order(held_out, layout=forward_layout, batch=section.batch, part=partitioner.host_part):
                    total -= float(np.sum(score(state.variables, batch.rows)[batch.index >= 0]))
                    tokens += batch.stats["scored_tokens"]
                    task.advance(int(batch.stats["texts"]))
            return {"loss": total / len(held_out), "nll_per_token": total / tokens}

        print(f"{len(texts):,} texts to learn, {len(held_out):,} held out; rows of {layout.length} tokens", flush=True)
        state = train(
            config,
            run_dir,
            section,
            step=step,
            state=part.begin(partitioner, variables, tx),
            stream=stream(
                texts,
                layout=layout,
                batch=section.batch,
                seed=config.run.seed,
                epochs=section.epochs,
                behind=behind,
                uids=uids,
                part=partitioner.host_part,
            ),
            total_steps=steps,
            lr=build.make_schedule(section, steps=steps),
            fingerprint={
                **identity.settings(config, section),
                "data": data_digest(texts),
                **digests,
                "architecture": identity.architecture(model),
                "behind": behind,
            },
            earlier=earlier,
            data=data_of_run,
            reports=reports,
            partitioner=partitioner,
            evaluate=evaluate,
            shapes=max(1, len(layout.row_counts)),
            unit="texts",
        )
        # DPO starts from exactly these weights.
        write = writer(part, write_exact, source=config.model.path, dtype=None, digests=digests)
        leave_results(
            run_dir, model, part.written(partitioner, state), tokenizer, card=lambda: sft_card(config, run_dir), write=write
        )
    return 0


class Texts(NamedTuple):
    """What is learnt, what is held out, and what became of the data."""

    train: tuple[list[Completion], list[str]]  # and their uids
    held_out: list[Completion]
    reports: list[DataReport]


def _targets(config: Config, tokenizer: Any) -> Texts:
    """The texts of preference data: their SFT targets, or else the chosen completions."""
    data = config.data
    train_set, test_set = (build.load_split(config, split, tokenizer) for split in ("train", "test"))
    # Encoding the pairs, too, makes SFT refuse the same bad rows as DPO: both see the same data.
    pairs = [build.encode_split(config, preferences, tokenizer) for preferences in (train_set, test_set)]
    check_repeats(config, *pairs)
    limits = {name: getattr(data, name) for name in ("max_length", "max_prompt_length", "truncation", "bos")}
    kept = [build.only_kept(split, encoded) for split, encoded in zip((train_set, test_set), pairs, strict=True)]
    with reported("encoding the texts to learn"):
        train, (held_out, _) = (
            encode_targets(split, tokenizer, **limits, score_prompt=config.sft.scored == "all") for split in kept
        )
    return Texts(train, held_out, [encoded.report for encoded in pairs])


def _plain_texts(config: Config, tokenizer: Any) -> Texts:
    """Plain texts, which are scored as a whole: they have no prompts."""
    if config.sft.scored != "all":
        raise ConfigError(f"sft.scored: {config.data.source} have no prompts, so all of their tokens are scored; set it to all")
    found, reports = [], []
    for split in ("train", "test"):
        texts = build.load_texts(config, split)
        encoded = build.encode_texts(config, texts, tokenizer)
        found.append((encoded, [text.uid for text in texts]))
        count, cut = len(texts), sum(int(ids[-1] != tokenizer.eos_token_id) for _, ids in encoded)
        report = DataReport(source=str(config.data.path), split=split, format=config.data.source)
        report.rows = report.read = report.kept = count
        report.truncated = {"text": cut} if cut else {}
        reports.append(report)
    return Texts(found[0], found[1][0], reports)
