"""`dpo-jax export`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError, load_config
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.hf import load_config as load_hf_config
from dpo_jax.models.hf import save_hf
from dpo_jax.runtime.checkpoint import Checkpoints, has_steps
from dpo_jax.runtime.progress import reported
from dpo_jax.step import init_state
from dpo_jax.types import TrainState

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def run(config: Config) -> int:
    directory = config.export.checkpoint or config.checkpoints_of("dpo")
    folder = _run_of(config, directory)
    written_by = folder / "config.yaml"
    if not (written_by.is_file() and has_steps(directory)):
        raise ConfigError(f"export.checkpoint: {directory}: no run wrote checkpoints here (there must be a {written_by})")
    task, original = folder.name, load_config(written_by)
    start = original.model.path if task == "sft" else original.dpo_policy()
    tokenizer = build.tokenizer_of(original, model_path=start, name="model.path" if task == "sft" else "dpo.policy")
    hf = load_hf_config(start) if start is not None else build.new_hf_config(original, tokenizer)
    model = make_model(decoder_config(hf))
    tx = build.make_tx(original.sft if task == "sft" else original.dpo)
    abstract = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), tx))
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of what is asked for: that it will write nothing
    with Checkpoints(directory, read_only=True) as checkpoints, reported("reading the checkpoint"):
        found = _restored(checkpoints, abstract, config.export.step)
    if found is None:
        raise ConfigError(f"export.checkpoint: {directory} holds no checkpoint; train first")
    state, _ = found
    name = "export" if config.export.step is None else f"export-{config.export.step}"
    with reported("exporting"):
        out = save_hf(config.export.out or folder / name, model, state.variables, dtype=DTYPES[config.export.dtype])
    tokenizer.save_pretrained(out)
    print(f"step {int(state.step)} of {folder} as {config.export.dtype} in {out}")
    return 0


def _restored(checkpoints: Checkpoints, abstract: TrainState, step: int | None) -> tuple[TrainState, Any] | None:
    try:
        return checkpoints.restore_latest(abstract, only=step)
    except LookupError as error:
        raise ConfigError(f"export.step: {error}") from error


def _run_of(config: Config, directory: str) -> Path:
    """The folder of the run that wrote these checkpoints: they lie in it, unless `run.checkpoints` put them elsewhere."""
    for task in ("sft", "dpo"):
        if config.run.checkpoints is not None and directory == config.checkpoints_of(task):
            return Path(config.run.dir) / task
    return Path(directory).resolve().parent
