"""`dpo-jax export`: writes a run's checkpoint as a Hugging Face folder; also the writers that other commands use."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.card import dpo_card, merged_card, online_card, sft_card
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, SftConfig, load_config
from dpo_jax.cli.exports import write_lora, write_model, writer
from dpo_jax.cli.model_folders import checkpoints_to_export, refuse_foreign
from dpo_jax.cli.train import early_stopping
from dpo_jax.cli.trainable import Trainable, trainable_of
from dpo_jax.models.checkpoint_stream import assemble
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import WeightsDigest, files_digest
from dpo_jax.models.families import decoder_config
from dpo_jax.models.hf import load_config as load_hf_config
from dpo_jax.models.hf import read_weights, variable_shapes
from dpo_jax.models.hub import PushError, check_push, push
from dpo_jax.models.partial import split
from dpo_jax.runtime.checkpoint import Checkpoints, has_steps, newest_meta
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.types import TrainState, Variables

CARDS = {"sft": sft_card, "dpo": dpo_card, "online": online_card}
"""Runs whose checkpoints have the folder of the run to themselves, also under `run.checkpoints`, and their model cards."""


def run(config: Config) -> int:
    directory = checkpoints_to_export(config)
    if config.export.out is not None:
        refuse_foreign(Path(config.export.out).expanduser())
    if config.export.push is not None:
        with _pushing():
            check_push(config.export.push)  # before anything is computed
    folder = _run_of(config, directory)
    written_by = folder / "config.yaml"
    if not (written_by.is_file() and has_steps(directory)):
        raise ConfigError(f"export.checkpoint: {directory}: no run wrote checkpoints here (there must be a {written_by})")
    task, original = folder.name, load_config(written_by)
    if config.export.checkpoint is None and task == "sft":
        print(f"the run has no folder {config.run.dir}/dpo, so the model of sft is exported", flush=True)
    start = original.model.path if task == "sft" else original.dpo_policy()
    tokenizer = build.tokenizer_of(original, model_path=start, name="model.path" if task == "sft" else "dpo.policy")
    hf = load_hf_config(start) if start is not None else build.new_hf_config(original, tokenizer)
    saved = newest_meta(directory)
    images = saved is not None and "encoder" in saved[1]["fingerprint"]
    model = make_model(decoder_config(hf, where=f"{start}/config.json", images=images))
    section = original.sft if task == "sft" else original.dpo
    trainable, tx = trainable_of(original, section, model, start), build.make_tx(section)
    if config.export.merge and trainable.lora is None:
        raise ConfigError(f"export.merge: {folder} trained no adapter, and its export is the whole model; leave it out")
    abstract = jax.eval_shape(lambda: trainable.state(model.init(jax.random.key(0)), tx=tx).replace(frozen={}))
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns that it will write nothing, which is intended
    run_dir = RunDir(folder, lock=False)
    best = None if saved is None else _best_step(section, run_dir, *saved)
    with Checkpoints(directory, read_only=True) as checkpoints, reported("reading the checkpoint"):
        found = _restored(checkpoints, abstract, config.export.step, best=best)
    if found is None:
        raise ConfigError(f"export.checkpoint: {directory} holds no checkpoint; train first")
    (state, meta), step = found, int(found[0].step)
    name = "export" if config.export.step is None else f"export-{config.export.step}"
    options = {"source": start, "dtype": config.export.dtype}
    card = _card_of(original, run_dir, task, step, best=best)
    with reported("exporting"):
        if config.export.merge:
            name, variables, write = (
                f"{name}-merged",
                _merged(trainable, state, start, meta),
                functools.partial(write_model, **options),
            )
            card = merged_card(card)
        else:
            variables = _whole(trainable, state, start, meta)
            write = writer(trainable, write_model, **options, digests=meta["fingerprint"])
        out, written = write(config.export.out or folder / name, model, variables, tokenizer, card=card)
    print(f"step {step} of {folder} as {written} in {out}")
    if (name := config.export.push) is not None:
        message = f"{task}, step {step}; weights {files_digest(out)[0][:16]}"
        with _pushing(), reported(f"uploading to {name}"):
            address = push(out, name, message=message, public=config.export.public)
        print(f"pushed to {address}")
    return 0


@contextlib.contextmanager
def _pushing() -> Iterator[None]:
    """A context that turns a `PushError` into a `ConfigError` naming the option."""
    try:
        yield
    except PushError as error:
        raise ConfigError(f"export.push: {error}") from error


def _whole(trainable: Trainable, state: TrainState, start: str | None, meta: Mapping[str, Any]) -> Variables:
    """The weights to export from the trained ones in a checkpoint: frozen ones are added, except for an adapter."""
    if trainable.chosen is None:
        return state.variables
    digest = WeightsDigest()
    assert start is not None  # a new model that is only partly trained is refused
    base = assemble(variable_shapes(trainable.base), read_weights(start, trainable.base, digest=digest), put=np.asarray)
    if digest.hexdigest() != (known := meta["fingerprint"]["start"]):
        raise ConfigError(f"{start} is not the model that training began with ({digest.hexdigest()[:12]}, not {known[:12]})")
    return trainable.whole({**split(base, trainable.chosen), **state.params})


def _merged(trainable: Trainable, state: TrainState, start: str | None, meta: Mapping[str, Any]) -> Variables:
    """The whole model, on the host. Raises `ConfigError` if the base is not the one on which the adapter was trained."""
    with tempfile.TemporaryDirectory() as folder, build.naming_option("export.merge", str(start)):
        write_lora(Path(folder), trainable, state.variables, source=start, digests=meta["fingerprint"])
        return assemble(variable_shapes(trainable.base), read_weights(folder, trainable.base), put=np.asarray)


def _card_of(original: Config, run: RunDir, task: str, step: int, *, best: int | None) -> str:
    """The card of the run, which may include the table of `eval`, if the run exported these weights; else one for this step.

    A run exports its last weights; with early stopping those after `best` steps.
    """
    judged = [row["step"] for row in read_metrics(run.metrics) if is_evaluation(row)] if run.metrics.is_file() else []
    if run.card.is_file() and judged and (judged[-1] if best is None else best) == step:
        return run.card.read_text(encoding="utf-8")
    return CARDS.get(task, dpo_card)(original, run, step=step)


def _best_step(section: SftConfig | DpoConfig, run: RunDir, newest: int, meta: Mapping[str, Any]) -> int | None:
    """The step whose weights the run exported, if early stopping chose it. `newest`, `meta`: of the newest checkpoint."""
    stopping = early_stopping(section)
    if stopping is None or "early_stopping" not in meta:
        return None
    stopping.record |= meta["early_stopping"]
    stopping.catch_up(read_metrics(run.metrics) if run.metrics.is_file() else [], until=newest)
    return stopping.best


def _restored(
    checkpoints: Checkpoints, abstract: TrainState, step: int | None, *, best: int | None
) -> tuple[TrainState, Any] | None:
    """State and record of `step`, or else of the `best` step, or else of the newest."""
    try:
        return checkpoints.restore_latest(abstract, only=best if step is None else step)
    except LookupError as error:
        name = "export.step" if step is not None else "the best step, by early stopping, is gone; name another, --export.step"
        raise ConfigError(f"{name}: {error}") from error


def _run_of(config: Config, directory: str) -> Path:
    """The folder of the run that wrote these checkpoints: they are inside it, unless `run.checkpoints` put them elsewhere."""
    for task in CARDS:
        if config.run.checkpoints is not None and directory == config.checkpoints_of(task):
            return Path(config.run.dir) / task
    return Path(directory).resolve().parent
