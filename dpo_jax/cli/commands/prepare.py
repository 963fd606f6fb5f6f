"""`dpo-jax prepare`: writes a configuration's checked preferences as a TFDS data set in array_record files."""

from __future__ import annotations

from pathlib import Path

from dpo_jax.cli import build, splits
from dpo_jax.cli.config import Config
from dpo_jax.runtime.progress import reported


def run(config: Config) -> int:
    """Texts are checked, but not truncated or tokenized, so the folder serves any model. The chat template renders chats."""
    with splits.needs_tfds("prepare"):
        from dpo_jax.data.tfds import write_tfds
    with build.open_run(config, "prepare") as run_dir:
        named = config.tokenizer.path or config.model.path
        tokenizer = build.tokenizer_of(config, model_path=config.model.path) if named else None
        found = {
            config.data.train_split: splits.load_split(config, "train", tokenizer),
            config.data.test_split: splits.load_split(config, "test", tokenizer),
        }
        build.describe(run_dir, config, *(preferences.report for preferences in found.values()))
        for preferences in found.values():
            print(preferences.report.summary())
        with reported("writing"):
            folder = write_tfds(found, Path(config.prepare.out or f"{config.run.dir}/tfds"))
        print(f"read it back with --data.source tfds --data.path {folder}")
    return 0
