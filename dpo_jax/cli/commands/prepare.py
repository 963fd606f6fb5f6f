"""`dpo-jax prepare`: writes a configuration's checked preferences as a TFDS data set in array_record files."""

from __future__ import annotations

from pathlib import Path

from dpo_jax.cli import build, splits
from dpo_jax.cli.config import Config
from dpo_jax.cli.preflight.inputs import TFDS_OF_PAIRS
from dpo_jax.data.pairs import PreferenceSet
from dpo_jax.data.row_kinds import check_kind
from dpo_jax.runtime.progress import reported


def run(config: Config) -> int:
    """Texts are checked, but not truncated or tokenized, so the folder serves any model. The chat template renders chats."""
    with splits.needs_tfds("prepare"):
        from dpo_jax.data.tfds import write_tfds
    with build.open_run(config, "prepare") as run_dir:
        named = config.tokenizer.path or config.model.path
        tokenizer = build.tokenizer_of(config, model_path=config.model.path) if named else None
        train, test = splits.load_splits(config, tokenizer, rows="any")
        found = {config.data.train_split: train, config.data.test_split: test}
        for preferences in found.values():
            _check(config, preferences)
        build.describe(run_dir, config, *(preferences.report for preferences in found.values()))
        for preferences in found.values():
            print(preferences.report.summary())
        with reported("writing"):
            folder = write_tfds(found, Path(config.prepare.out or f"{config.run.dir}/tfds"))
        print(f"read it back with --data.source tfds --data.path {folder}")
    return 0


def _check(config: Config, preferences: PreferenceSet) -> None:
    """Raises `DataError` for single completions, or if too large a share of the rows was dropped."""
    report = preferences.report
    labeled = any(preference.desirable is not None for preference in preferences)
    check_kind("unpaired" if labeled else "pairs", "pairs", where=f"{report.source} [{report.split}]", remedy=TFDS_OF_PAIRS)
    splits.check_dropped(config, report, report.bad_share)
