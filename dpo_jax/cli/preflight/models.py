"""`--check` of a command's models and tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.cli import model_folders
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.preflight.inputs import Check, note_misspelled
from dpo_jax.cli.vision import check_mesh, encoder_settings, no_encoder
from dpo_jax.data.rendering import check_syntax
from dpo_jax.untrusted import Unreadable, read_text


def model(option: str, value: Callable[[Config], str | None], *, expected: bool = False) -> Callable[[Check], None]:
    def look(check: Check) -> None:
        path = value(check.config)
        if path is None:
            if expected and check.images is not None:
                raise ConfigError(f"{option}: {no_encoder(check.images, 'a new model')}")
            if expected:  # the start of sft
                check.tell("model", f"new: {_sizes(check.config.model)}")
                _remember(check, None)
            return
        made_by = model_folders.maker(path)
        own = made_by is not None and Path(path) == Path(check.config.run.dir, made_by, "export")
        _remember(check, path)
        if not check.unseen("model", path, made_by if own else None):
            check.tell("model", f"{path}: {_fits(check, path, option, expected=expected)}")

    return look


def targets(section: str, start: Callable[[Config], str | None]) -> Callable[[Check], None]:
    """The parameters that a command trains, from its starting model on."""

    def look(check: Check) -> None:
        path = start(check.config)
        model_folders.check_adapter(check.config, path)
        if check.images is None and (decoder := model_folders.known_decoder(check.config, path)) is not None:
            model_folders.check_targets(check.config, section, decoder)

    return look


def template(start: Callable[[Config], str | None]) -> Callable[[Check], None]:
    """The chat template, if the data need one: of tokenizer.path, or of the starting model."""

    def look(check: Check) -> None:
        if check.chat is None:
            return
        if (file := check.config.tokenizer.chat_template) is not None:
            if Path(file).is_file() and not check.scope.hides(file):
                _check_source(check, f"tokenizer.chat_template: {file}", read_text(file))
            return
        path = check.config.tokenizer.path or start(check.config)
        if path is None or _lacks_template(check, path):  # without a path, a tokenizer is trained, which has none
            raise check.chat

    return look


def _check_source(check: Check, where: str, source: str) -> None:
    """Raises `ConfigError` for a template that cannot be parsed, or that does not write the tools of the data."""
    try:
        check_syntax(where, source)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if check.tools is not None and "tools" not in source:
        detail = "has tools, which the chat template does not write: use a template that does, or leave the column tools out"
        raise ConfigError(f"{where}: {check.tools} {detail}")


def _lacks_template(check: Check, path: str) -> bool:
    """Whether the tokenizer of a local folder has no chat template; of an adapter's base, if the adapter has no tokenizer.

    A template that is there is checked.
    """
    from dpo_jax.data.tokenizer import has_template, template_of
    from dpo_jax.models.folder import adapter_base, local_folder

    try:
        folder = local_folder(path)
        if folder is not None and not (folder / "tokenizer.json").is_file() and (base := adapter_base(folder)) is not None:
            folder = local_folder(base)
        lacks = folder is not None and not has_template(folder)
        source = template_of(folder) if folder is not None else None
    except (OSError, ValueError):  # reported where the folder itself is checked
        return False
    if source is not None:
        _check_source(check, f"chat template of {path}", source)
    return lacks


def _remember(check: Check, path: str | None) -> None:
    """Records a model for `devices`, which may have to split it."""
    if decoder := model_folders.known_decoder(check.config, path):
        check.decoders[path or "section model"] = decoder


def _of_the_hub(check: Check, path: str, option: str) -> str:
    """A description of a path that is not a local folder but looks like a Hub model id."""
    note_misspelled(check, path, option)
    return "from the Hub or its local cache; not checked"


def _sizes(model: Any) -> str:
    return f"{model.family}, {model.layers} layers x {model.width}"


def _fits(check: Check, path: str, option: str, *, expected: bool) -> str:
    """A description of a model folder whose config, tokenizer and tensor names are consistent."""
    from dpo_jax.models.families import decoder_config
    from dpo_jax.models.folder import adapter_base, check_kind, is_scorer, local_folder, read_config
    from dpo_jax.models.generation import end_tokens
    from dpo_jax.models.tensors import contents
    from dpo_jax.models.weights import Checkpoint

    config = check.config
    try:
        folder = local_folder(path)
        if folder is None:
            return _of_the_hub(check, path, option)
        own, base = folder, adapter_base(folder)
        if base is not None and (folder := local_folder(base)) is None:
            return f"an adapter of {base}, {_of_the_hub(check, base, option)}"
        hf = read_config(folder)
        check_kind(folder, hf, scorer=option.endswith("reward_model"))
        images = check.images is not None and not is_scorer(hf)
        if images:
            _check_encoder(check, folder, hf)
        decoder = decoder_config(hf, where=folder / "config.json", images=images)
        with Checkpoint(folder, contents(decoder)) as checkpoint:
            checkpoint.check_names()
            checkpoint.check_tensor(checkpoint.contents.table[0].name, (decoder.vocab_size, decoder.width))
        own = own if (own / "tokenizer.json").is_file() else folder
        _check_tokenizer(Path(config.tokenizer.path or own).expanduser(), hf, end_tokens(folder, hf), decoder.vocab_size)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{option}: {error}. {model_folders.remedy(config, path)}".rstrip()) from error
    except Unreadable as error:
        raise Unreadable(f"{option}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{option}: {path}: {error}") from error
    model_folders.check_fit(config, decoder, path, expected=expected)
    sizes = f"{_sizes(decoder)}{', with its vision encoder' if images else ''}"
    return sizes if base is None else f"an adapter of {base}, {sizes}"


def _check_encoder(check: Check, folder: Path, hf: Mapping[str, Any]) -> None:
    """Raises ValueError if a folder's model cannot read the images of the data."""
    from dpo_jax.models.families import reads_images

    check_mesh(check.config)
    if not reads_images(hf):
        raise ValueError(no_encoder(str(check.images), str(folder)))
    encoder_settings(folder, hf)


class _TokenizerFiles(NamedTuple):
    """The content of a tokenizer's files, for `check_tokenizer`."""

    vocabulary: Mapping[str, int]
    eos_token_id: int | None

    def get_vocab(self) -> Mapping[str, int]:
        return self.vocabulary


def _check_tokenizer(folder: Path, hf: Mapping[str, Any], ends: list[int], vocab_size: int) -> None:
    if not folder.is_dir():
        return  # of the Hub
    from dpo_jax.data.tokenizer import check_files, check_tokenizer, vocabulary_of

    stated = check_files(folder)
    if not (folder / "tokenizer.json").is_file():
        return  # an older form, which transformers converts
    vocabulary = vocabulary_of(folder)
    token = stated.get("eos_token")
    eos = vocabulary.get(str(token.get("content") if isinstance(token, dict) else token))
    if eos is None:  # a class of transformers may have its own
        eos = ends[0] if ends else 0
    check_tokenizer(_TokenizerFiles(vocabulary, eos), vocab_size, eos_token_id=ends or None)


def tokenizer(check: Check) -> None:
    file = check.config.tokenizer.chat_template
    if file is not None and not check.unseen("tokenizer", file) and not Path(file).is_file():
        raise ConfigError(f"tokenizer.chat_template: {file}: no such file")
    path = check.config.tokenizer.path
    if path is not None and not check.unseen("tokenizer", path):
        from dpo_jax.models.folder import local_folder

        try:
            if (folder := local_folder(path)) is not None:
                _check_tokenizer(folder, {}, [], vocab_size=10**9)
            else:
                _of_the_hub(check, path, "tokenizer.path")
        except Unreadable as error:
            raise Unreadable(f"tokenizer.path: {error}") from error
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise ConfigError(f"tokenizer.path: {error}") from error
