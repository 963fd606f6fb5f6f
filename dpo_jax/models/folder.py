"""A model folder on this machine and its `config.json`. Needs no JAX, weights or network."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.models.fields import Fields
from dpo_jax.untrusted import Unreadable, read_object

ADAPTER = "adapter_config.json"
EARLIER_HEAD = "reward_head.safetensors"  # of reward models, as earlier versions of this package wrote them


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` looks like "organization/name" or "organization/name@revision"."""
    return re.fullmatch(r"\w[\w.-]{0,95}/[\w.-]{1,96}(@[\w./-]{1,200})?", str(path)) is not None


def local_folder(path: str | Path) -> Path | None:
    """The folder `path`, or None for a Hub id ("organization/name"). Raises FileNotFoundError if it is neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{path} is a file; give the model's folder, which holds config.json and *.safetensors")
    if not is_hub_id(path):
        raise FileNotFoundError(f"no model folder {path}, and it does not look like a Hub id (organization/name)")
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `config.json`. Raises FileNotFoundError, or `Unreadable` naming the file."""
    file = folder / "config.json"
    if not file.is_file():
        refuse_adapter(folder)
        raise FileNotFoundError(f"{file} does not exist; a model folder holds config.json and *.safetensors")
    return read_object(file, remedy="save or fetch it again")


def is_scorer(hf: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a sequence classifier, such as a reward model (`models.scorer`)."""
    names = hf.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)


def check_kind(folder: Path, hf: Mapping[str, Any], *, scorer: bool) -> None:
    """Raises ValueError unless the folder, with this `config.json`, holds a reward model (`scorer`), or else a language
    model."""
    if is_scorer(hf) == scorer:
        return
    if not scorer:
        raise ValueError(f"is a reward model or classifier ({str(hf['architectures'][0])[:80]}), not a language model")
    if (folder / EARLIER_HEAD).is_file():
        raise ValueError("was written by an earlier version: the same `dpo-jax reward-model` command writes it again")
    raise ValueError("is not a reward model (...ForSequenceClassification, with one output); `dpo-jax reward-model` writes one")


def name_and_revision(path: str | Path) -> tuple[str, str | None]:
    """("organization/name", "revision") of "organization/name@revision"; (`path`, None) for a folder or without a revision."""
    if Path(path).expanduser().is_dir() or not is_hub_id(path):
        return str(path), None
    name, _, revision = str(path).partition("@")
    return name, revision or None


def adapter_base(folder: Path) -> str | None:
    """The base model of the adapter (LoRA) in `folder`, as named in its `adapter_config.json`, with "@revision" if it has one;
    None if it is not an adapter.

    Raises `Unreadable` naming the file.
    """
    if not (folder / ADAPTER).is_file():
        return None
    fields = Fields(read_object(folder / ADAPTER), folder / ADAPTER)
    base, revision = fields.text("base_model_name_or_path"), fields.text("revision", "")
    of_the_hub = is_hub_id(base) and "@" not in base and not Path(base).expanduser().is_dir()
    return f"{base}@{revision}" if revision and of_the_hub else base


def config_folder(path: str | Path) -> Path | None:
    """The local folder with a model's `config.json`: `path`, or that of an adapter's base; None if there is none."""
    folder = Path(path).expanduser()
    base = adapter_base(folder)
    folder = folder if base is None else Path(base).expanduser()
    return folder if (folder / "config.json").is_file() else None


def refuse_adapter(folder: Path) -> None:
    """Raises FileNotFoundError for a folder of LoRA weights without their model."""
    if not (folder / ADAPTER).is_file():
        return
    base = None
    with contextlib.suppress(OSError, Unreadable):
        base = read_object(folder / ADAPTER).get("base_model_name_or_path")
    model = f"its base model {base[:200]!r}" if isinstance(base, str) and base else "its base model"
    raise FileNotFoundError(
        f"{folder} holds an adapter (LoRA: {ADAPTER}), not a model; merge it into {model} (in peft: merge_and_unload, "
        "save_pretrained) and name the folder of the result"
    )
