"""`dpo-jax eval`: evaluates a policy on held-out pairs and prompts, against its reference."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import loss_table
from dpo_jax.cli import build, splits
from dpo_jax.cli.card import dpo_card, with_digest
from dpo_jax.cli.config import Config, ConfigError, load_config
from dpo_jax.cli.identity import loss_files
from dpo_jax.cli.images import Vision, check_same_encoder, encode_shown, has_encoder, open_vision, vision_of
from dpo_jax.cli.implicit_rewards import write_rewards
from dpo_jax.cli.model_folders import eval_reference
from dpo_jax.cli.preflight.inputs import naming_trained_loss
from dpo_jax.cli.reference_pass import reference_values
from dpo_jax.cli.training_samples import distinct_prompts, prompt_line
from dpo_jax.data import reviews
from dpo_jax.data.encode import Encoded, prompt_key
from dpo_jax.data.loader import eval_batches
from dpo_jax.data.pairs import PreferenceSet
from dpo_jax.data.prepare import EncodedSet, data_digest
from dpo_jax.data.terminal import json_text
from dpo_jax.evals.completions import Completer, map_completions
from dpo_jax.evals.intervals import mean_with_error
from dpo_jax.evals.preference import completion_tokens, held_out_logps, labels_of, preference_summary
from dpo_jax.logps import completion_logps, sequence_logps
from dpo_jax.losses import PreferenceLoss
from dpo_jax.report.health import examine_run, repetition
from dpo_jax.report.result_table import result_table, wrapped
from dpo_jax.runtime.checkpoint import newest_meta
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.rundir import RunDir, RunLocked, write_json
from dpo_jax.training.fingerprint import HELD_OUT, architecture
from dpo_jax.types import Model, Partitioner, Variables
from dpo_jax.writing import write_text, writing


class Compared(NamedTuple):
    """Policy and reference, placed on the devices, and the held-out examples on which they are compared."""

    model: Model
    tokenizer: Any
    partitioner: Partitioner
    variables: dict[str, Variables]  # of "reference" and "policy"
    weights: dict[str, str]  # their digests
    preferences: PreferenceSet
    held_out: EncodedSet
    vision: Vision | None
    loss: PreferenceLoss


def run(config: Config) -> int:
    given = config
    # The table and the rewards use the same reference.
    config = dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, reference=eval_reference(config)))
    of_run = Path(config.eval_policy()).resolve() == Path(config.run.dir, "dpo", "export").resolve()
    task = "rewards" if config.eval.rewards else "eval"
    with build.open_run(given, task, out=config.eval.rewards_out) as run_dir:
        both = _load(config)
        build.describe(run_dir, given, both.held_out.report)
        if is_first():  # results of an earlier evaluation must not stand beside the configuration of this one
            for old in ("report.json", "rewards.jsonl" if config.eval.rewards else "samples.jsonl"):
                (run_dir.path / old).unlink(missing_ok=True)
        if of_run and is_first():
            _note_other_reference(given, both.weights["reference"])
        logps, ref_logps = _logps(config, both)
        if not config.eval.rewards:
            report = _report(config, both, logps, ref_logps) | {"of_run": of_run}
            if is_first():
                _write(config, run_dir, both, report)
        elif is_first():
            kept = splits.only_kept(both.preferences, both.held_out)
            write_rewards(config, run_dir, kept, both.held_out, logps=logps, ref_logps=ref_logps, weights=both.weights)
    return 0


def _load(config: Config) -> Compared:
    """Raises `ConfigError` if policy and reference are different models, or if the data do not suit the loss."""
    loss = build.make_loss(config.dpo)
    tokenizer = build.tokenizer_of(config, model_path=config.eval_policy(), name="eval.policy")
    rows = loss_table.rows_of(config.dpo.loss)
    if config.eval.rewards and rows != "pairs":
        raise ConfigError(f"eval.rewards: judges pairs, but loss {config.dpo.loss} reads {rows}; leave out dpo.loss")
    with naming_trained_loss(config):
        preferences = splits.load_split(config, "test", tokenizer, rows=rows, images=True)
    vision = _vision(config, preferences, tokenizer)
    images = vision is not None
    model = build.policy_model(config, config.dpo_reference(), tokenizer, name="eval.reference", images=images)
    judged = build.policy_model(config, config.eval_policy(), tokenizer, name="eval.policy", images=images)
    if architecture(judged) != architecture(model):
        raise ConfigError(
            f"eval.reference: {config.dpo_reference()} differs from the policy in architecture, not just in weights"
        )
    partitioner = build.make_partitioner(config, model)
    held_out = encode_shown(config, preferences, tokenizer, vision)
    if vision is not None:
        vision.compute(config)
    paths = {"reference": (config.dpo_reference(), {"dtype": config.kept_dtype()}), "policy": (config.eval_policy(), {})}
    variables, weights = {}, {}
    for who, (path, kept) in paths.items():
        variables[who], weights[who] = build.load_weights(path, model, partitioner, name=f"eval.{who}", **kept)
    return Compared(model, tokenizer, partitioner, variables, weights, preferences, held_out, vision, loss)


def _logps(config: Config, both: Compared) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the held-out completions, float32[P, K] each: by the policy, and by the reference."""
    model, partitioner, held_out = both.model, both.partitioner, both.held_out
    known = {"partitioner": partitioner, "weights": both.weights["reference"], "vision": both.vision}
    (ref_logps,) = reference_values(config, model, both.variables["reference"], both.tokenizer, [held_out], **known)
    layout = build.row_layout(config, held_out, batch=config.eval.batch, parts=partitioner.row_shards)
    compiled = partitioner.compile_map(functools.partial(completion_logps, model, ld_alpha=config.dpo.ld_alpha))
    logps = held_out_logps(
        lambda rows: compiled(both.variables["policy"], rows),
        eval_batches(held_out, layout=layout, batch=config.eval.batch, part=partitioner.host_part),
        pairs=len(held_out),
    )
    return logps, ref_logps


def _report(config: Config, both: Compared, logps: np.ndarray, ref_logps: np.ndarray) -> dict[str, Any]:
    """The table's figures, with samples of both models if `eval.samples` asks for any. All hosts must call it."""
    held_out = both.held_out
    summary = functools.partial(
        preference_summary,
        loss=both.loss,
        lengths=completion_tokens(held_out),
        desirable=labels_of(held_out),
        prompts=[prompt_key(pair) for pair in held_out],
    )
    report: dict[str, Any] = {
        "pairs": len(held_out),
        "examples": loss_table.example_word(config.dpo.loss),
        "settings": _settings(config),
        "weights": both.weights,
        "reference": summary(ref_logps, ref_logps),
        "policy": summary(logps, ref_logps),
    }
    if config.eval.samples:
        stop_ids = build.stop_ids(both.tokenizer, config.eval_policy(), config.eval_reference())
        samples = sampled(config, both.partitioner, both.model, both.variables, both.tokenizer, held_out, stop_ids=stop_ids)
        for who in ("reference", "policy"):
            report[who] |= samples["summary"][who]
        report["samples"] = samples["texts"]
        report["sampling"] = {"prompts": len(samples["texts"]), "max_new_tokens": config.eval.max_new_tokens}
    return report


def _write(config: Config, run_dir: RunDir, both: Compared, report: dict[str, Any]) -> None:
    """Writes `report.json`, `samples.jsonl` and, for the policy of this run, its model card; prints the table."""
    if config.eval.samples:
        with writing(run_dir.path / "samples.jsonl") as file:
            file.writelines(json_text(line) + "\n" for line in report["samples"])
        report["samples"] = report["samples"][:3]
    report["chosen_on_these"] = report["of_run"] and _chosen_on(config, both.held_out)
    metrics = Path(config.run.dir, "dpo", "metrics.jsonl")
    health = examine_run(report, read_metrics(metrics) if report["of_run"] and metrics.is_file() else ())
    report["notes"] = [note._asdict() for note in health.notes]
    write_json(run_dir.path / "report.json", report)
    print(result_table(report), end="\n\n")
    for note in health.notes:
        print(wrapped(f"{note.name}: {note.words}", mark="! "))
    print(wrapped(health.summary, mark=""))
    print(f"\nfull report: {run_dir.path}/report.json")
    if report["of_run"]:
        _update_card(config, report, both.held_out)


def _vision(config: Config, preferences: PreferenceSet, tokenizer: Any) -> Vision | None:
    """The encoder of policy and reference: if held-out prompts show images, and if both models have one.

    In the latter case training may have read images although no held-out prompt shows any, and the reference cache belongs to
    the same model.
    """
    both = {"eval.policy": config.eval_policy(), "eval.reference": config.dpo_reference()}
    policy, reference = both.values()
    if any(one.images for one in preferences):
        vision = vision_of(config, policy, tokenizer, preferences, name="eval.policy")
    elif all(has_encoder(config, path, name=name) for name, path in both.items()):
        vision = open_vision(config, policy, tokenizer, name="eval.policy")
    else:
        vision = None
    check_same_encoder(config, vision, reference, name="eval.reference")
    return vision


def sampled(
    config: Config,
    partitioner: Partitioner,
    model: Model,
    variables: dict[str, Variables],
    tokenizer: Any,
    held_out: Any,
    *,
    stop_ids: Sequence[int],
) -> dict[str, Any]:
    """Completions of held-out prompts by policy and reference, with the sequence KL of each to the reference.

    `kl` is the mean over samples y ~ pi(.|x) of log pi(y|x) - log pi_ref(y|x), in nats per completion. It is unbiased; for
    completions truncated at `eval.max_new_tokens` it measures the part that was generated. `cut` is the share of truncated
    ones, `repetition` the mean share of 4-grams that occurred before in their sample. Both models stop at any of `stop_ids`.
    The line of a chat prompt has its `turns` beside the `prompt` as the model read it.
    """
    shown = distinct_prompts(held_out, config.eval.samples)
    prompts, images = [pair.prompt for pair in shown], [pair.images for pair in shown]
    lines = [prompt_line(pair, tokenizer) for pair in shown]
    key = jax.random.key(config.run.seed)
    complete = Completer(partitioner, model, tokenizer, stop_ids=stop_ids, max_new_tokens=config.eval.max_new_tokens)
    score = partitioner.compile_map(functools.partial(sequence_logps, model))
    summary = {}
    for number, (who, weights) in enumerate(variables.items()):
        try:
            samples = complete(weights, prompts, jax.random.fold_in(key, number), images=images)
        except ValueError as error:
            raise ConfigError(f"eval.samples: {error}; lower --data.max-prompt-length, or set it to 0") from error
        finished = [bool(len(ids)) and int(ids[-1]) in stop_ids for ids in samples.ids]
        for line, sample, ended in zip(lines, samples.texts, finished, strict=True):
            line |= {who: sample, f"{who}_finished": ended}
        of_reference = map_completions(partitioner, score, variables["reference"], prompts, samples.ids, images=images)
        log_ratio = samples.logps - of_reference
        kl, error = mean_with_error(log_ratio)
        summary[who] = {
            "kl": kl,
            "kl_error": error,
            "tokens": float(np.mean([len(ids) for ids in samples.ids])),
            "cut": 1 - float(np.mean(finished)),
            "repetition": float(np.mean([repetition(ids) for ids in samples.ids])),
        }
        if config.data.source == "reviews":
            values = [reviews.reward(line["prompt"] + text) for line, text in zip(lines, samples.texts, strict=True)]
            summary[who]["true_reward"], summary[who]["true_reward_error"] = mean_with_error(np.array(values))
    return {"summary": summary, "texts": lines}


def _note_other_reference(config: Config, digest: str) -> None:
    """Prints a note if the run's policy was trained against other weights than those it is compared with."""
    found = newest_meta(config.checkpoints_of("dpo"))
    trained = found[1]["fingerprint"].get("reference", digest) if found else digest
    if trained != digest:
        print(
            f"note: the policy was trained against a different reference ({trained[:12]}…) than this one ({digest[:12]}…): "
            "accuracy, margin and KL are not those of its training",
            flush=True,
        )


def _update_card(config: Config, report: dict[str, Any], held_out: Sequence[Encoded]) -> None:
    """Adds the table to the model card of the evaluated run, if it was measured with the run's own settings and data."""
    try:
        with RunDir(Path(config.run.dir) / "dpo") as run_dir:
            trained = load_config(run_dir.config)
            if _trained_settings(config, trained) != _settings(config):
                print(f"{run_dir.card} is left as it is: the run was trained with {_settings(trained)}")
                return
            if _other_pairs(config, held_out):
                print(f"{run_dir.card} is left as it is: these are not the held-out pairs of its training")
                return
            card = with_digest(dpo_card(trained, run_dir, report=report), run_dir.export)
            write_text(run_dir.card, card)
            write_text(run_dir.export / "README.md", card)
    except (RunLocked, ConfigError) as error:  # a run that is training again, or a copied folder
        print(f"the model card is left as it is: {error}")


def _trained_settings(config: Config, trained: Config) -> dict[str, Any]:
    """Those of the run's training, with the files of its loss as they were then."""
    found = newest_meta(config.checkpoints_of("dpo"))
    files = {name: value for name, value in found[1]["fingerprint"].items() if name.startswith("loss file ")} if found else {}
    return _settings(trained) | files


def _other_pairs(config: Config, held_out: Sequence[Encoded]) -> bool:
    """Whether the run's newest checkpoint names other held-out token ids than these; False if it names none."""
    found = newest_meta(config.checkpoints_of("dpo"))
    digest = found[1].get("data", {}).get(HELD_OUT) if found else None
    return digest is not None and digest != data_digest(held_out)


def _chosen_on(config: Config, held_out: Sequence[Encoded]) -> bool:
    """Whether the run's weights are those of its best evaluation, on these pairs."""
    found = newest_meta(config.checkpoints_of("dpo"))
    return found is not None and "best" in found[1].get("early_stopping", {}) and not _other_pairs(config, held_out)


def _settings(config: Config) -> dict[str, Any]:
    """Settings on which the table depends, besides weights and data."""
    return {
        "loss": config.dpo.loss,
        **loss_files(config.dpo.loss),
        "ld_alpha": config.dpo.ld_alpha,
        **config.dpo.loss_options(),
        "reference": config.dpo_reference(),
    }
