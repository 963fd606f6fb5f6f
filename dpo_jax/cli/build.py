"""Builds what a configuration describes: run directory, tokenizer, model, optimizer. Data are built in `splits`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from dpo_jax import loss_table
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, SftConfig, dump_config
from dpo_jax.cli.fixed import date_of, keep, pin_revisions
from dpo_jax.cli.model_folders import check_fit, planned_hf_config, remedy, sized_hf_config
from dpo_jax.cli.preflight.devices import batch_parts as batch_parts
from dpo_jax.cli.preflight.packages import check_writers
from dpo_jax.cli.splits import TEXT_SOURCES, load_split, load_texts
from dpo_jax.data.chat_date import at_date
from dpo_jax.data.layout import Example, Layout, places_of
from dpo_jax.data.loader import plan_layout
from dpo_jax.data.pairs import DataReport
from dpo_jax.data.rendering import check_syntax
from dpo_jax.data.template import turn_end_token
from dpo_jax.data.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from dpo_jax.losses import PreferenceLoss, named_loss, required_inputs
from dpo_jax.models.attention_paths import attention_path, path_name
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import WeightsDigest
from dpo_jax.models.families import decoder_config
from dpo_jax.models.folder import adapter_base, check_kind
from dpo_jax.models.hf import end_tokens, load_config, read_weights, variable_shapes
from dpo_jax.models.hub import resolve, tokenizer_folder
from dpo_jax.models.logical_axes import whole_heads
from dpo_jax.own_loss import described
from dpo_jax.rounding import stochastic_rounding
from dpo_jax.runtime.compiling import keep_programs, report_compiling
from dpo_jax.runtime.hosts import HostsError, first_goes_first, is_first, shared_digest, start
from dpo_jax.runtime.mesh import MeshError, make_mesh
from dpo_jax.runtime.optim import Schedule, make_optimizer
from dpo_jax.runtime.optim import make_schedule as named_schedule
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.training.run import Saving
from dpo_jax.training.run import free as free
from dpo_jax.types import Model, Partitioner, Variables
from dpo_jax.untrusted import Unreadable, read_object, read_text
from dpo_jax.writing import write_text

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def join_hosts(config: Config) -> bool:
    """Joins the processes of `run.distributed`, before anything else uses JAX. Returns whether this is the first of them."""
    run = config.run
    try:
        start(run.coordinator, run.num_processes, run.process_id, heartbeat_seconds=run.heartbeat_seconds)
    except HostsError as error:
        raise ConfigError(f"run.distributed: {error}") from error
    return is_first()


@contextmanager
def open_run(config: Config, task: str, *, out: str | None = None) -> Iterator[RunDir]:
    """The locked directory of a task, `out` or `<run.dir>/<task>`, with resolved configuration and environment written down.

    The task may still be refused. So the records of an earlier one stay until it calls `describe`, once its settings and inputs
    have passed.
    """
    check_writers(config)
    with RunDir(out or Path(config.run.dir) / task, lock=is_first()) as run:
        if is_first():
            keep(config)
        # So that the next task and a resumed run need not compile the same program again.
        keep_programs(Path(config.run.dir) / "compiled")
        if not run.config.is_file():
            describe(run, config)
        yield run


def describe(run: RunDir, config: Config, *reports: DataReport) -> None:
    """Writes the record of a run: the resolved configuration, the environment, and the data report."""
    if not is_first():
        return
    # The process number is not part of a reproducible configuration.
    anywhere = dataclasses.replace(config.run, coordinator=None, num_processes=None, process_id=None)
    if reports:
        config = pin_revisions(config)
    write_text(run.config, dump_config(dataclasses.replace(config, run=anywhere)))
    run.write_env()
    if reports:
        write_json(run.data_report, {report.split: report.to_json() for report in reports})


def saving(config: Config, task: str) -> Saving:
    """When and where the training of `task` saves its state, by the options of section `run`."""
    run = config.run
    elsewhere = None if run.checkpoints is None else config.checkpoints_of(task)
    return Saving(run.save_every_steps, run.save_every_minutes, keep=run.max_to_keep, folder=elsewhere)


def make_partitioner(config: Config, model: Model) -> Partitioner:
    """The partitioner of `run.devices`. Raises `ConfigError` if mesh, devices and model do not fit together."""
    report_compiling()
    if config.run.devices == "single" and jax.process_count() > 1:
        raise ConfigError(f"run.devices: single uses one device, but there are {jax.process_count()} hosts; use mesh or pmap")
    if config.run.devices == "pmap":
        return pmap_partitioner()
    if config.run.devices == "single":
        return single_device()
    try:
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
        return mesh_partitioner(mesh, model, units=whole_heads(model.config))
    except MeshError as error:
        raise ConfigError(f"mesh: {error}") from error


def tokenizer_of(config: Config, *, model_path: str | None, name: str = "model.path") -> PreTrainedTokenizerFast:
    """The tokenizer: the one in the configuration, else the model's, else one trained on the train split and kept.

    `name` is the option that `model_path` comes from.
    """
    for path, option in ((config.tokenizer.path, "tokenizer.path"), (model_path, name)):
        if path is not None:
            with naming_option(option, path), reported("loading the tokenizer"):
                tokenizer = load_tokenizer(tokenizer_folder(require_model(config, path, option)))
            return _with_bos_token(config, at_date(with_template(config, tokenizer), date_of(config)))
    if config.data.source in TEXT_SOURCES:
        texts = [snippet.text for snippet in load_texts(config, "train")]
    else:
        rows = load_split(config, "train", rows="any")
        texts = [text for p in rows for text in (p.prompt, p.chosen, p.rejected, p.sft_target or "")]
    made_from = {"vocab_size": config.tokenizer.vocab_size, "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    kept = Path(config.run.dir) / "tokenizer"
    record = kept / "made_from.json"
    with first_goes_first("tokenizer"), reported("training the tokenizer"):
        if _record(record) != made_from:
            save_tokenizer(train_tokenizer(texts, vocab_size=config.tokenizer.vocab_size), kept)
            write_json(record, made_from)  # written last: a folder without it is made again
        return _with_bos_token(config, with_template(config, load_tokenizer(kept)))


def _record(file: Path) -> dict[str, Any] | None:
    """The run directory's record of its tokenizer; None if it is missing or damaged."""
    try:
        return read_object(file)
    except (OSError, Unreadable):
        return None


def with_template(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, with the chat template of `tokenizer.chat_template` if there is one."""
    if (file := config.tokenizer.chat_template) is not None:
        if not Path(file).is_file():
            raise ConfigError(f"tokenizer.chat_template: {file}: no such file")
        with naming_option("tokenizer.chat_template", file):
            check_syntax(file, source := read_text(file))
        tokenizer.chat_template = source
        vars(tokenizer)["template_file"] = f"tokenizer.chat_template {file}"  # for messages
    return tokenizer


def _with_bos_token(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if config.data.bos == "always" and tokenizer.bos_token_id is None:
        raise ConfigError("data.bos: always, but the tokenizer has no beginning-of-text token (bos_token): set it to auto")
    return tokenizer


def start_model(config: Config, tokenizer: PreTrainedTokenizerFast, *, images: bool = False) -> Model:
    """The model that SFT starts from, without weights: that of `model.path`, or a new one of the sizes in `model`."""
    if config.model.path is not None:
        return policy_model(config, config.model.path, tokenizer, name="model.path", expected=True, images=images)
    return decoder_of(config, new_hf_config(config, tokenizer))


def start_weights(config: Config, model: Model, partitioner: Partitioner) -> tuple[Variables, str]:
    """The weights of `model.path`, or new random ones; and their name: a digest, or how the random ones were drawn."""
    if config.model.path is not None:
        return load_weights(config.model.path, model, partitioner, name="model.path")
    with reported("drawing random weights"):
        new = partitioner.make_variables(lambda: model.init(jax.random.key(config.run.seed)))
    return new, f"random, seed {config.run.seed}"


def decoder_of(config: Config, hf: dict[str, Any], *, platform: str | None = None, images: bool = False) -> Model:
    decoder, dtype = decoder_config(hf, images=images), PRECISIONS[config.run.precision]
    if platform is None and jax.default_backend() == "tpu" and dtype == jnp.float32:
        # JAX's kernel goes by this, and would multiply in bfloat16. It must still hold when the backward pass is traced. No
        # bfloat16 program may be compiled with it: all models of a command have one format. The exception,
        # `balancing.tell_switches`, gives a platform.
        jax.config.update("jax_default_matmul_precision", "highest")
    platform = platform or jax.default_backend()
    try:
        asked, pieces = config.model.attention, config.mesh.context
        path = attention_path(asked, platform=platform, config=decoder, dtype=dtype, pieces=pieces)
    except ValueError as error:
        raise ConfigError(f"model.attention: {error}") from error
    return make_model(decoder, dtype=dtype, remat=config.model.remat, attention=path)


def attention_name(config: Config) -> str:
    """The attention path that runs here."""
    return path_name(config.model.attention, jax.default_backend())


def new_hf_config(config: Config, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The Hugging Face configuration of a new model. The vocabulary is the tokenizer's, unless `model.vocab_size` is larger."""
    vocab_size = config.model.vocab_size or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise ConfigError(f"model.vocab_size: {vocab_size} is less than the tokenizer's {len(tokenizer)} entries; leave it out")
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)  # load_tokenizer's tokenizers have one
    return sized_hf_config(config, vocab_size=vocab_size, eos=eos)


def model_without_weights(config: Config, *, platform: str) -> tuple[Model, str]:
    """The policy on `platform`, and where its sizes come from. Needs no weights, tokenizer or network.

    Sizes come from the local folder of the starting policy or of `model.path`, if present; else from section `model`.
    """
    hf, source = planned_hf_config(config)
    return decoder_of(config, hf, platform=platform), source


def policy_model(
    config: Config,
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    name: str,
    expected: bool = False,
    images: bool = False,
    scorer: bool = False,
) -> Model:
    """The model of a folder, checked against tokenizer and length limits (and, if `expected`, the sizes in `model`).

    With `scorer` it must be a reward model, and is its decoder; otherwise it must be none. With `images` it is the model that
    reads images, without its vision encoder. `name` is the option that `path` comes from. Weights are not read yet, so a model
    that does not fit is refused at once.
    """
    path = require_model(config, path, name)
    with naming_option(name, path):
        hf = load_config(path)
        check_kind(Path(path), hf, scorer=scorer)
        decoder = decoder_config(hf, where=Path(path, "config.json"), images=images)
        check_tokenizer(tokenizer, decoder.vocab_size, eos_token_id=end_tokens(path) or None)
    check_fit(config, decoder, path, expected=expected)
    return decoder_of(config, hf, images=images)


def stop_ids(tokenizer: PreTrainedTokenizerFast, *paths: str) -> tuple[int, ...]:
    """All tokens that end a completion: EOS, the end of turn of the chat template, and those of the models."""
    eos, turn = tokenizer.eos_token_id, turn_end_token(tokenizer)
    assert isinstance(eos, int)  # `policy_model` has checked tokenizer and models
    own = [eos] if turn is None else [eos, turn]
    return tuple(dict.fromkeys([*own, *(one for path in paths for one in end_tokens(path))]))


def load_weights(
    path: str, model: Model, partitioner: Partitioner, *, name: str, dtype: str = "float32"
) -> tuple[Variables, str]:
    """The weights in a folder whose model `policy_model` has checked, placed on the devices, and their digest.

    They are kept in `dtype`; if their files have another type, the digest records that. An adapter is merged into its base.
    """
    digest = shared_digest()
    with naming_option(name, path), reported(f"loading the weights of {path}"):
        dtype = "float32" if adapter_base(resolve(path)) is not None else dtype
        shapes = variable_shapes(model, PRECISIONS[dtype])
        variables = partitioner.load_variables(shapes, read_weights(path, model, digest=digest))
    return variables, digest_in(digest, dtype)


def digest_in(digest: WeightsDigest, dtype: str) -> str:
    """The digest of weights kept in `dtype`: rounded weights are different weights."""
    return digest.hexdigest() if dtype == "float32" or digest.all_in(dtype) else f"{digest.hexdigest()} in {dtype}"


@contextmanager
def naming_option(option: str, path: str) -> Iterator[None]:
    """A context that names the option of a model folder in its errors.

    Damaged files stay `Unreadable`. Intact files that do not fit (another tensor, a git-lfs pointer, ...) raise `ConfigError`.
    """
    try:
        yield
    except ConfigError:
        raise
    except Unreadable as error:
        raise Unreadable(f"{option}: {error}") from error
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{option}: {path}: {error}") from error


def require_model(config: Config, path: str, name: str) -> str:
    """`path`, if it is a folder or a Hub id that exists. Otherwise raises `ConfigError` with option and remedy."""
    try:
        return str(resolve(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{name}: {error}. {remedy(config, path)}".rstrip()) from error


def make_schedule(section: SftConfig | DpoConfig, *, steps: int) -> Schedule:
    """The learning rate schedule of a run of `steps` steps."""
    options = section.schedule_options()
    return named_schedule(section.schedule, section.lr, warmup_steps=section.warmup(steps), total_steps=steps, **options)


def make_tx(section: SftConfig | DpoConfig, *, steps: int = 1, seed: int = 0) -> Any:
    """The optimizer of a run of `steps` steps; its state does not depend on `steps`. `seed` is for rounding to bfloat16."""
    schedule, options = make_schedule(section, steps=steps), section.optimizer_options()
    tx = make_optimizer(schedule, name=section.optimizer, max_grad_norm=section.max_grad_norm, **options)
    return tx if section.param_dtype == "float32" else stochastic_rounding(tx, seed=seed)


def make_loss(section: DpoConfig) -> PreferenceLoss:
    """The loss of `dpo.loss`. Raises `ConfigError` for an error in a file of your own, or a result of another form."""
    try:
        loss = named_loss(section.loss, **section.loss_options())
    except ValueError as error:
        raise ConfigError(f"dpo.loss: {error}") from error
    for file in loss_table.own_files(section.loss):
        _try_loss(loss, section.loss, file)
    return loss


def _try_loss(loss: PreferenceLoss, name: str, file: Path) -> None:
    """Calls a loss of your own with abstract values, so that its errors come before hours of the reference pass."""
    pairs = np.zeros((2, 2), np.float32)
    signals = {signal: pairs for signal in ("lengths", "mean_lengths", "aligned_logps")}
    signals |= {signal: pairs[:, 0] for signal in ("weight", "desirable")}
    try:
        needed = {signal: signals[signal] for signal in required_inputs(loss)}
        found = jax.eval_shape(loss, pairs, pairs, **needed)
        shapes = [tuple(one.shape) for one in found] if isinstance(found, tuple) else found
    except Exception as error:
        raise ConfigError(f"dpo.loss: {described(error, file)}") from error
    if shapes != [(2,), (2, 2)]:
        raise ConfigError(
            f"dpo.loss: {name} must return (losses float[P], rewards float[P, 2]); for 2 pairs it returns {shapes}"
        )


def row_layout(
    config: Config,
    examples: Sequence[Example],
    *,
    batch: int,
    parts: int,
    microbatches: int = 1,
    kind: Literal["plain", "shared", "packed"] | None = None,
) -> Layout:
    """Layout for batches that divide into `parts` (devices times microbatches) without splitting examples. See `plan_layout`.

    `kind` is `data.layout` if not given.
    """
    kind, length = kind or config.data.layout, config.data.row_length
    parts *= places_of(examples[0]) if kind == "plain" else 1
    with reported("planning the rows"):
        cut = {"multiple": parts, "microbatches": microbatches, "pieces": config.mesh.context}
        return plan_layout(examples, kind=kind, batch=batch, length=length, **cut)
