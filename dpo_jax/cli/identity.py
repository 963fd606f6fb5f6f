"""The configuration's part of a training run's fingerprint, and mismatches as configuration errors."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax import loss_table
from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import Config, ConfigError, TrainingConfig
from dpo_jax.data.chat_date import writes_date
from dpo_jax.data.pairs import DataReport
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.own_loss import digest_of
from dpo_jax.training.fingerprint import HELD_OUT, RunMismatch

NEITHER = {"policy", "reference", "microbatches", "eval_samples"}
"""Options of a section that are not settings: paths, whose weights have digests, and options that do not change results."""
LIMITS = (
    *("max_length", "max_prompt_length", "truncation", "bos", "format", "columns", "on_bad", "max_train", "config"),
    *("test_share", "ranking_length"),
)
CONTINUE = "Continue it with its own settings (its config.yaml), or choose another --run.dir."
LONGER = "Choose another --run.dir, or export an earlier step (--export.step)."


def settings(config: Config, section: TrainingConfig) -> dict[str, Any]:
    """The options that determine the result of a training run, without devices and logging."""
    options = {name: value for name, value in dataclasses.asdict(section).items() if name not in NEITHER}
    lora = dataclasses.asdict(config.lora) if config.lora.rank is not None else {"rank": None}
    options |= {f"lora.{name}": value for name, value in lora.items()}
    options |= loss_files(options["loss"]) if section.name == "dpo" else {}
    return {**options, "seed": config.run.seed, "precision": config.run.precision}


def loss_files(loss: str) -> dict[str, str | None]:
    """A digest of each file of a loss of your own, as it was loaded: `{"loss file mine.py": ...}`."""
    return {f"loss file {file}": digest_of(file) for file in loss_table.own_files(loss)}


def settings_shown(config: Config, task: str) -> dict[str, Any]:
    """The sections that describe a training run, flat ("data.path"), for the pages of metrics packages."""
    sections = ("run", "data", "model", "lora", "mesh", "tokenizer", *(("dpo",) if task == "online" else ()), task)
    return {
        f"{section}.{name}": value
        for section in sections
        for name, value in dataclasses.asdict(getattr(config, section)).items()
    }


def settings_read(config: Config, command: str) -> dict[str, Any]:
    """Of the DPO options, those that a command reads; also seed, precision and adapter."""
    read = {option.removeprefix("dpo.") for option in COMMANDS[command].reads} | {"seed", "precision"}
    every = settings(config, config.dpo)
    also = ("lora.", *(("loss file ",) if "loss" in read else ()))
    return {name: value for name, value in every.items() if name in read or name.startswith(also)}


def data_record(config: Config, tokenizer: Any, reports: Sequence[DataReport], *, held_out: str) -> dict[str, Any]:
    """Everything that determines the token ids, one field each, to explain differing digests. `held_out`: a digest."""
    record: dict[str, Any] = {HELD_OUT: held_out}
    for report in reports:
        record |= {f"{report.split} split, {name}": getattr(report, name) for name in ("rows", "read", "kept")}
        record |= {f"file {file['path']}": file["sha256"] for file in report.files}
    record |= {f"data.{name}": getattr(config.data, name) for name in LIMITS}
    if config.data.rendered:  # included only if set, so that earlier records stay valid
        record["data.rendered"] = True
    record |= {f"data.mix, weight of {part.path}": part.weight for part in config.data.mix}
    record["chat template"] = (
        hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest() if tokenizer.chat_template else None
    )
    record["tokenizer"] = tokenizer_digest(tokenizer)
    if writes_date(tokenizer):
        record["data.date (the chat template writes it)"] = config.data.date
    return record | {f"package {name}": importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")}


@contextlib.contextmanager
def refusing_mismatch(remedy: str = CONTINUE) -> Iterator[None]:
    """A context that turns a `RunMismatch` into a `ConfigError` that ends with the relevant options."""
    try:
        yield
    except RunMismatch as error:
        raise ConfigError(f"{error}\n{remedy}") from error
