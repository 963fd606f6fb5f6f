"""Writes trained weights as Hugging Face folders: whole models or adapters, with tokenizer and model card."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dpo_jax.cli.card import with_digest
from dpo_jax.cli.config import ConfigError
from dpo_jax.cli.trainable import Trainable
from dpo_jax.data.template import turn_end_token
from dpo_jax.data.tokenizer import save_tokenizer
from dpo_jax.models.adapter import write_adapter
from dpo_jax.models.encoder_folder import encoder_in_hf_form, load_encoder
from dpo_jax.models.folder import adapter_base
from dpo_jax.models.generation import eos_ids, float_type, generation_config
from dpo_jax.models.hf import load_config as load_hf_config
from dpo_jax.models.hf import save_hf
from dpo_jax.models.hub import model_folder, resolve
from dpo_jax.models.lora import LORA
from dpo_jax.runtime import hosts
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.types import Model, Variables
from dpo_jax.untrusted import check_name, read_text
from dpo_jax.writing import write_text

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Image-processing files of a model folder that an export copies."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def writer(
    trainable: Trainable,
    write: Callable[..., tuple[Path, str]],
    *,
    source: str | None,
    dtype: str | None,
    digests: Mapping[str, str],
) -> Callable[..., tuple[Path, str]]:
    """The write function (`write_model` or `write_exact`) for the trained part; an adapter is written in PEFT's format.

    `source` is the starting model of training, `digests` those of its weights (`Trainable.load`).
    """
    if trainable.lora is None:
        options = {"source": source} if dtype is None and write is write_exact else {"source": source, "dtype": dtype}
        return functools.partial(write, **options)

    def write_adapter_folder(
        path: str | Path, model: Model, variables: Variables, tokenizer: Any, *, card: str | None = None
    ) -> tuple[Path, str]:
        folder = write_lora(
            Path(path).expanduser(), trainable, variables, source=source, digests=digests, dtype=dtype or "float32"
        )
        _write_beside(folder, tokenizer, card)
        return folder, dtype or "float32"

    return write_adapter_folder


def write_lora(
    path: Path,
    trainable: Trainable,
    variables: Variables,
    *,
    source: str | None,
    digests: Mapping[str, str],
    dtype: str = "float32",
) -> Path:
    """Writes the adapter in `variables`. All hosts call this; the first one writes."""
    assert trainable.lora is not None
    assert source is not None  # checked by `trained`
    check_name(path)
    try:
        return write_adapter(
            path,
            trainable.base.config,
            trainable.lora,
            variables[LORA],
            base=adapter_base(resolve(source)) or source,
            source=model_folder(source),
            base_digest=digests["base"],
            base_dtype=trainable.dtype,
            dtype=DTYPES[dtype],
            fetch=hosts.whole,
            write=hosts.is_first(),
        )
    except FileExistsError as error:
        raise ConfigError(f"export.out: {error}") from error


def write_model(
    path: str | Path,
    model: Model,
    variables: Variables,
    tokenizer: Any,
    *,
    source: str | None,
    dtype: str | None,
    card: str | None = None,
) -> tuple[Path, str]:
    """Write model, tokenizer and model card as a Hugging Face folder. Returns the folder, and the type of the weights.

    `source` is the starting model of training, None for a new one. Its `generation_config.json` is copied; `dtype=None` means
    its type, or float32 if that is float16 and too small for these weights. All hosts call this; the first one writes. Raises
    `ConfigError` if the weights do not fit the requested `dtype`.
    """
    wanted = dtype or source_type(source)
    try:
        folder = _save(path, model, variables, source=source, dtype=wanted)
    except OverflowError as error:
        if dtype is not None:
            raise ConfigError(f"export.dtype: {error}") from error
        if hosts.is_first():
            print(f"written as float32, and not as {wanted} like {source}: {error}", flush=True)
        wanted = "float32"
        folder = _save(path, model, variables, source=source, dtype=wanted)
    _write_beside(folder, tokenizer, card)
    return folder, wanted


def write_exact(
    path: str | Path, model: Model, variables: Variables, tokenizer: Any, *, source: str | None, card: str | None = None
) -> tuple[Path, str]:
    """Like `write_model`, but keeps training's float32 weights unchanged, for a next stage that starts from them.

    `config.json` also records the source's type, which the next stage's own export will have.
    """
    known = source_type(source)
    settings = {"source_dtype": known} if known != "float32" else {}
    folder = _save(path, model, variables, source=source, dtype="float32", settings=settings)
    _write_beside(folder, tokenizer, card)
    return folder, "float32"


def source_type(source: str | None) -> str:
    """The weight type of the starting model of training; float32 for a new model."""
    return "float32" if source is None else float_type(load_hf_config(source))


def _save(path: str | Path, model: Model, variables: Variables, *, dtype: str, source: str | None, **options: Any) -> Path:
    check_name(path)  # the tokenizer comes after the weights
    if not model.config.image_width:
        others = None
    else:
        assert source is not None  # a new model reads no images
        others = encoder_in_hf_form(*load_encoder(source))
    options |= {"source": source, "others": others, "fetch": hosts.whole, "write": hosts.is_first()}
    folder = save_hf(path, model, variables, dtype=DTYPES[dtype], **options)
    if hosts.is_first():
        for name in PROCESSOR_FILES:
            if others and source is not None and (file := model_folder(source) / name).is_file():
                write_text(folder / name, read_text(file))
            else:
                (folder / name).unlink(missing_ok=True)  # of a model that was exported here before
    return folder


def _write_beside(folder: Path, tokenizer: Any, card: str | None) -> None:
    if not hosts.is_first():
        return
    save_tokenizer(tokenizer, folder)
    served = generation_config(folder) or {}
    ends = eos_ids(served, folder)
    turn = turn_end_token(tokenizer)
    for token, why in ((tokenizer.eos_token_id, "training ends completions"), (turn, "the chat template ends turns")):
        if ends and token not in {None, *ends}:
            name = tokenizer.convert_ids_to_tokens(token)
            print(
                f"note: generation_config.json stops at {ends}, but not at {name!r} ({token}), although {why} with it: "
                "the server of the model must add it",
                flush=True,
            )
    if card is not None:
        write_text(folder / "README.md", with_digest(card, folder))


def write_outputs(
    run: RunDir,
    model: Model,
    variables: Variables,
    tokenizer: Any,
    *,
    card: Callable[[], str],
    write: Callable[..., tuple[Path, str]],
) -> None:
    """Writes the plots, the model card, and by `write` (of `export`) the model or adapter as a Hugging Face folder.

    All hosts call it, with `variables` as returned by `Trainable.written`.
    """
    text = card() if hosts.is_first() else None
    with reported("exporting the policy"):
        folder, dtype = write(run.export, model, variables, tokenizer, card=text)
    if text is None:
        return
    from dpo_jax.plotting.training_curves import plot_training  # matplotlib: 0.4 s that need not delay the first step

    with reported("drawing plots"):
        plot_training(read_metrics(run.metrics), run.plots)
    write_text(run.card, (folder / "README.md").read_text(encoding="utf-8"))  # with the digest of the weights
    print(f"the policy is in {folder}, in {dtype}")
