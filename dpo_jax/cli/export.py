"""`dpo-jax export`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError, load_config
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.hf import load_config as load_hf_config
from dpo_jax.models.hf import save_hf
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.step import init_state

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def run(config: Config) -> int:
    directory = Path(config.export.checkpoint or f"{config.run.dir}/dpo/checkpoints").resolve()
    written_by = directory.parent / "config.yaml"
    if not (written_by.is_file() and directory.is_dir()):
        raise ConfigError(f"export.checkpoint: {directory}: no run wrote checkpoints here (there must be a {written_by})")
    task, original = directory.parent.name, load_config(written_by)
    start = original.model.path if task == "sft" else original.dpo_policy()
    tokenizer = build.tokenizer_of(original, model_path=start, name="model.path" if task == "sft" else "dpo.policy")
    hf = load_hf_config(start) if start is not None else build.new_hf_config(original, tokenizer)
    model = make_model(decoder_config(hf))
    tx = build.make_tx(original.sft if task == "sft" else original.dpo)
    abstract = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), tx))
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of what is asked for: that it will write nothing
    with Checkpoints(directory, read_only=True) as checkpoints:
        found = checkpoints.restore_latest(abstract)
    if found is None:
        raise ConfigError(f"export.checkpoint: {directory} holds no checkpoint; train first")
    state, _ = found
    out = config.export.out or f"{directory.parent}/export"
    folder = save_hf(out, model, state.variables, dtype=DTYPES[config.export.dtype])
    tokenizer.save_pretrained(folder)
    print(f"step {int(state.step)} of {directory.parent} as {config.export.dtype} in {folder}")
    return 0
