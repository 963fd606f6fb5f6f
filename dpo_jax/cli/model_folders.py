"""Model folders named in a configuration: which command makes a missing one, and whether they fit. Needs no JAX."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from dpo_jax.cli.config import Config, ConfigError, DpoConfig, load_config
from dpo_jax.data.completion_files import holds_others
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.folder import config_folder, read_config
from dpo_jax.models.targets import chosen_names, lora_targets, parameters
from dpo_jax.untrusted import Unreadable, read_text, regular

MAKERS = ("sft", "dpo", "ppo", "reward-model")
"""Commands that export a model to their own folder in the run directory: RUN/sft/export."""


def maker(path: str) -> str | None:
    """The command that writes the model folder `path`, inferred from its name: sft for "RUN/sft/export"."""
    parts = Path(path).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == "export" and parts[-2] in MAKERS else None


def saved_steps(checkpoints: str) -> list[int]:
    """The steps in a local checkpoint folder, ascending. Empty for a bucket, which is not read."""
    folder = Path(checkpoints)
    if "://" in checkpoints or not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isascii() and path.name.isdecimal())


EXPORTED = ("dpo", "sft", "online")
"""Commands whose checkpoints `export` reads."""


def checkpoints_to_export(config: Config) -> str:
    """The checkpoint folder that `export` reads: `export.checkpoint`, or else that of dpo, or of sft in a run without dpo.

    Raises `ConfigError` for that of a reward model, and where no run wrote checkpoints, naming the commands that did.
    """
    named, dpo, sft = config.export.checkpoint, config.checkpoints_of("dpo"), config.checkpoints_of("sft")
    if named is not None:
        _refuse_reward_model(config, named)
        return named
    if "://" in dpo or saved_steps(dpo):
        return dpo
    if saved_steps(sft) and not Path(config.run.dir, "dpo").exists():
        return sft
    others = [folder for task in EXPORTED[1:] if saved_steps(folder := config.checkpoints_of(task))]
    choose = "; there are others: " + " or ".join(f"--export.checkpoint {folder}" for folder in others)
    raise ConfigError(f"export.checkpoint: {dpo}: no run wrote checkpoints here{choose if others else '; train first'}")


def _refuse_reward_model(config: Config, directory: str) -> None:
    if directory == config.checkpoints_of("reward-model"):
        folder = Path(config.run.dir, "reward-model")
    elif Path(directory).absolute().parts[-2:] == ("reward-model", "checkpoints"):
        folder = Path(directory).parent
    else:
        return
    export = folder / "export"
    there = (export / "config.json").is_file()
    remedy = f"to upload it: hf upload ORGANIZATION/NAME {export}" if there else "run `dpo-jax reward-model` to its end"
    raise ConfigError(
        f"export.checkpoint: {directory} is of a reward model, which `dpo-jax reward-model` itself writes to {export}; {remedy}"
    )


def remedy(config: Config, path: str) -> str:
    """A sentence on what to do about a missing model folder, depending on its run directory; "" for other paths."""
    task = maker(path)
    if task is None:
        return ""
    run = Path(path).parent.parent
    itself = ", or start from model.path itself: --dpo.policy model" if task == "sft" and config.model.path else ""
    if not run.is_dir():
        return f"There is no run directory {run}: check --run.dir, or run `dpo-jax {task}` first{itself}."
    if task in ("sft", "dpo"):
        own = run.resolve() == Path(config.run.dir).resolve()
        checkpoints = config.checkpoints_of(task) if own else f"{run}/{task}/checkpoints"
        if steps := saved_steps(checkpoints):
            named = "" if own and task == "dpo" and not config.run.checkpoints else f" --export.checkpoint {checkpoints}"
            return (
                f"The run was interrupted: {checkpoints} has step {steps[-1]}. Continue it with `dpo-jax {task}`, which writes "
                f"the model when it ends, or write that step with `dpo-jax export{named}`."
            )
        if "://" in checkpoints and (run / task).is_dir():
            return f"If {checkpoints} holds steps, continue with `dpo-jax {task}`, or write the last one with `dpo-jax export`."
        if task == "dpo" and own and config.dpo.policy is None and not (run / "sft" / "export").is_dir():
            return "Run `dpo-jax sft`, then `dpo-jax dpo` first, or name the model."
    return f"Run `dpo-jax {task}` first, or name the model{itself}."


def eval_reference(config: Config) -> str:
    """The reference of an evaluation: the one named, else the one that the run's own policy was trained against."""
    named = (config.eval.policy, config.eval.reference, config.dpo.policy, config.dpo.reference)
    if any(name is not None for name in named) or (trained := trained_section(config)) is None:
        return config.eval_reference()
    return trained.reference or trained.policy or config.eval_reference()  # the run may have been moved since


def trained_section(config: Config) -> DpoConfig | None:
    """Section dpo of the run's own training; None if there is none, or one of another version."""
    written = Path(config.run.dir, "dpo", "config.yaml")
    try:
        return load_config(written).dpo if written.is_file() else None
    except ConfigError:
        return None


_TAGGED = re.compile(r"\A---\n(?:(?!---\n).*\n)*?(?:tags: *\[|[ -]*- )[\"']?dpo_jax\b")


def refuse_foreign(folder: Path) -> None:
    """Raises `ConfigError` if an export would replace files in a folder that no export has written.

    An export's model card has this program's tag, which is recognized even if the card has been edited since.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    card = folder / "README.md"
    try:
        ours = folder.is_dir() and _TAGGED.search(read_text(regular(card))) is not None
        ours = ours and not (folder / "env.json").exists()  # a run directory, whose card has the tag too
    except (OSError, Unreadable):
        ours = False
    if not ours:
        raise ConfigError(
            f"export.out: {folder} already exists and was not written by dpo-jax export (it would have a README.md "
            "tagged dpo_jax): choose another folder, or move it away"
        )


def refuse_other_lines(out: str | None) -> None:
    """Raises `ConfigError` if `sample.out` would replace a folder, or a file that does not hold completions."""
    if out is not None and (Path(out).is_dir() or holds_others(Path(out))):
        raise ConfigError(f"sample.out: {out} already exists and was not written by dpo-jax sample: choose another file")


def check_fit(config: Config, decoder: DecoderConfig, path: str, *, expected: bool = False) -> None:
    """Raises `ConfigError` if a model does not fit the lengths of the data or, with `expected`, the sizes in `model`."""
    if config.data.max_length > decoder.max_positions:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} tokens do not fit the {decoder.max_positions} positions of {path}"
        )
    if not expected:
        return
    for name in ("family", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "vocab_size"):
        want, have = getattr(config.model, name), getattr(decoder, name)
        if name == "family" and decoder.image_width:
            have = f"{have}_text"  # its name in section `model`, whose sizes are those of the text model
        if want is not None and want != have:
            raise ConfigError(f"model.{name}: {want} is expected, but {path} has {have}; correct one of them")


def check_adapter(config: Config, path: str | None) -> None:
    """Raises `ConfigError` for an adapter beside a new model."""
    if config.lora.rank is not None and path is None:
        raise ConfigError("lora.rank: an adapter needs a pretrained model, but this one is new; set model.path")


def check_targets(config: Config, section: str, decoder: DecoderConfig) -> None:
    """Raises `ConfigError` if a model lacks what `lora.targets`, or `trainable` of section `sft` or `dpo`, names."""
    trainable = getattr(config, section).trainable
    try:
        if trainable is not None and not decoder.image_width:  # whose projector is not in this table
            chosen_names(trainable, parameters(decoder), layers=decoder.layers)
        elif config.lora.rank is not None:
            lora_targets(config.lora.targets, decoder)
    except ValueError as error:
        raise ConfigError(f"{'lora.targets' if trainable is None else f'{section}.trainable'}: {error}") from error


def sized_hf_config(config: Config, *, vocab_size: int, eos: int) -> dict[str, Any]:
    """The Hugging Face configuration of a new model with the sizes in `model`, for a known vocabulary size."""
    sizes = config.model
    asked = {name: getattr(sizes, name) for name in ("width", "layers", "heads", "max_positions")}
    options = {name: getattr(sizes, name) for name in ("kv_heads", "head_size", "mlp_width", "tie")}
    assert sizes.family is not None  # checked with the configuration
    try:
        return hf_config(sizes.family, vocab_size=vocab_size, eos_token_id=eos, **asked, **options)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def planned_hf_config(config: Config) -> tuple[dict[str, Any], str]:
    """The Hugging Face configuration of the policy, and where it comes from, before any model is made or fetched.

    Sizes come from the local folder of the starting policy or of `model.path`, if present; else from section `model`. Raises
    `ConfigError` if neither is complete.
    """
    for option, path in (("dpo.policy", config.dpo_policy()), ("model.path", config.model.path)):
        if path is not None and (folder := config_folder(path)) is not None:
            try:
                hf = read_config(folder)
                decoder_config(hf, where=f"{folder}/config.json")
                return hf, f"{folder}/config.json"
            except Unreadable as error:
                raise Unreadable(f"{option}: {error}") from error
            except ValueError as error:
                raise ConfigError(f"{option}: {path}: {error}") from error
    sizes = dataclasses.replace(config.model, path=None)
    # A tokenizer trained for a new model has at most the requested number of entries.
    trained = config.model.path is None and config.tokenizer.path is None
    vocab_size = sizes.vocab_size or (config.tokenizer.vocab_size if trained else None)
    absent = [field for field, _ in sizes.missing()] + (["vocab_size"] if vocab_size is None else [])
    if absent:
        raise ConfigError(
            "\n".join(f"model.{field}: there is no model folder here, so its sizes must be configured" for field in absent)
        )
    source = "the sizes in section model" + ("" if sizes.vocab_size else ", and tokenizer.vocab_size")
    return sized_hf_config(config, vocab_size=vocab_size or 0, eos=0), source


def known_decoder(config: Config, path: str | None) -> DecoderConfig | None:
    """The decoder of a model folder, which need not exist yet, or of a new model (None); None if it is not known.

    The models that `sft` and `dpo` will make have the sizes of their starting models, ultimately those in `model`. If these
    omit the vocabulary size, it is 1.
    """
    if path is not None and (folder := config_folder(path)) is not None:
        try:
            return decoder_config(read_config(folder))
        except ValueError:  # reported where the folder itself is checked
            return None
    task = None if path is None else maker(path)
    if task is not None and path is not None and Path(path) == Path(config.run.dir, task, "export"):
        start = config.model.path if task == "sft" else config.dpo_policy()
        return None if start == path else known_decoder(config, start)
    sizes = dataclasses.replace(config.model, path=None)
    if path != config.model.path or any(sizes.missing()):
        return None
    return decoder_config(sized_hf_config(config, vocab_size=sizes.vocab_size or 1, eos=0))
