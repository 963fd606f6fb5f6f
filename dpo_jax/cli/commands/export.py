"""`dpo-jax export`: writes a run's checkpoint as a Hugging Face folder; also the writers that other commands use."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.card import dpo_card, merged_card, online_card, sft_card, with_digest
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, SftConfig, load_config
from dpo_jax.cli.model_folders import refuse_foreign
from dpo_jax.cli.train import early_stopping
from dpo_jax.cli.trained import Trained, trained
from dpo_jax.data.template import turn_end_token
from dpo_jax.data.tokenizer import save_tokenizer
from dpo_jax.models.adapter import write_adapter
from dpo_jax.models.checkpoint_stream import assemble
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import WeightsDigest, files_digest
from dpo_jax.models.encoder_folder import encoder_in_hf_form, load_encoder
from dpo_jax.models.families import decoder_config
from dpo_jax.models.folder import adapter_base
from dpo_jax.models.generation import eos_ids, float_type, generation_config
from dpo_jax.models.hf import load_config as load_hf_config
from dpo_jax.models.hf import read_weights, save_hf, variable_shapes
from dpo_jax.models.hub import PushError, check_push, model_folder, push, resolve
from dpo_jax.models.lora import LORA
from dpo_jax.models.partial import split
from dpo_jax.runtime import hosts
from dpo_jax.runtime.checkpoint import Checkpoints, has_steps, newest_meta
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.types import Model, TrainState, Variables
from dpo_jax.untrusted import check_name, read_text
from dpo_jax.writing import write_text

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Image-processing files of a model folder that an export copies."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
CARDS = {"sft": sft_card, "dpo": dpo_card, "online": online_card}
"""Runs whose checkpoints have the folder of the run to themselves, also under `run.checkpoints`, and their model cards."""


def run(config: Config) -> int:
    directory = config.export.checkpoint or config.checkpoints_of("dpo")
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
    start = original.model.path if task == "sft" else original.dpo_policy()
    tokenizer = build.tokenizer_of(original, model_path=start, name="model.path" if task == "sft" else "dpo.policy")
    hf = load_hf_config(start) if start is not None else build.new_hf_config(original, tokenizer)
    saved = newest_meta(directory)
    images = saved is not None and "encoder" in saved[1]["fingerprint"]
    model = make_model(decoder_config(hf, where=f"{start}/config.json", images=images))
    section = original.sft if task == "sft" else original.dpo
    part, tx = trained(original, section, model, start), build.make_tx(section)
    if config.export.merge and part.lora is None:
        raise ConfigError(f"export.merge: {folder} trained no adapter, and its export is the whole model; leave it out")
    abstract = jax.eval_shape(lambda: part.state(model.init(jax.random.key(0)), tx=tx).replace(frozen={}))
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
                _merged(part, state, start, meta),
                functools.partial(write_model, **options),
            )
            card = merged_card(card)
        else:
            variables = _whole(part, state, start, meta)
            write = writer(part, write_model, **options, digests=meta["fingerprint"])
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


def _whole(part: Trained, state: TrainState, start: str | None, meta: Mapping[str, Any]) -> Variables:
    """The weights to export from the trained ones in a checkpoint: frozen ones are added, except for an adapter."""
    if part.chosen is None:
        return state.variables
    digest = WeightsDigest()
    assert start is not None  # a new model that is only partly trained is refused
    base = assemble(variable_shapes(part.base), read_weights(start, part.base, digest=digest), put=np.asarray)
    if digest.hexdigest() != (known := meta["fingerprint"]["start"]):
        raise ConfigError(f"{start} is not the model that training began with ({digest.hexdigest()[:12]}, not {known[:12]})")
    return part.whole({**split(base, part.chosen), **state.params})


def _merged(part: Trained, state: TrainState, start: str | None, meta: Mapping[str, Any]) -> Variables:
    """The whole model, on the host. Raises `ConfigError` if the base is not the one on which the adapter was trained."""
    with tempfile.TemporaryDirectory() as folder, build.naming_option("export.merge", str(start)):
        write_lora(Path(folder), part, state.variables, source=start, digests=meta["fingerprint"])
        return assemble(variable_shapes(part.base), read_weights(folder, part.base), put=np.asarray)


def writer(
    part: Trained, write: Callable[..., tuple[Path, str]], *, source: str | None, dtype: str | None, digests: Mapping[str, str]
) -> Callable[..., tuple[Path, str]]:
    """The write function (`write_model` or `write_exact`) for the trained part; an adapter is written in PEFT's format.

    `source` is the starting model of training, `digests` those of its weights (`Trained.load`).
    """
    if part.lora is None:
        options = {"source": source} if dtype is None and write is write_exact else {"source": source, "dtype": dtype}
        return functools.partial(write, **options)

    def write_adapter_folder(
        path: str | Path, model: Model, variables: Variables, tokenizer: Any, *, card: str | None = None
    ) -> tuple[Path, str]:
        folder = write_lora(Path(path).expanduser(), part, variables, source=source, digests=digests, dtype=dtype or "float32")
        _write_beside(folder, tokenizer, card)
        return folder, dtype or "float32"

    return write_adapter_folder


def write_lora(
    path: Path, part: Trained, variables: Variables, *, source: str | None, digests: Mapping[str, str], dtype: str = "float32"
) -> Path:
    """Writes the adapter in `variables`. All hosts call this; the first one writes."""
    assert part.lora is not None
    assert source is not None  # checked by `trained`
    check_name(path)
    try:
        return write_adapter(
            path,
            part.base.config,
            part.lora,
            variables[LORA],
            base=adapter_base(resolve(source)) or source,
            source=model_folder(source),
            base_digest=digests["base"],
            base_dtype=part.dtype,
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
