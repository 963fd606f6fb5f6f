"""The origin of a model or data set, as recorded in local files: its Hub id, and the license of a model.

Nothing is guessed and no network is used; anything the files do not record is None.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_jax.models.folder import is_hub_id
from dpo_jax.untrusted import Unreadable, read_object, read_text

LONGEST = 500  # characters of a value in a model card
PARENTS = 3  # how many parent folders to search for the root of a clone or snapshot


class License(NamedTuple):
    """The fields of a model card: an identifier of the Hub's list, or "other" with a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None


class Origin(NamedTuple):
    hub_id: str | None = None
    license: License | None = None


def model_origin(path: str | None) -> Origin:
    """The origin of a Hub id or model folder. A folder without its own id gets the base model that its card names, if any."""
    if path is None:
        return Origin()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        name, _, revision = path.partition("@")
        if not is_hub_id(path):
            return Origin()
        return Origin(name, license_of(_header(_cached_card(name, revision or None))))
    header, config = _header(_read(folder / "README.md")), _json(folder / "config.json")
    named = config.get("_name_or_path")
    named = named if isinstance(named, str) and is_hub_id(named) and not Path(named).exists() else None
    stated = header.get("base_model", "")
    own = hub_id_of_folder(folder, "models", clones=0)
    found = own or (stated if is_hub_id(stated) else None) or hub_id_of_folder(folder, "models") or named
    return Origin(found, license_of(header))


def hub_id_of_folder(path: str | Path, kind: Literal["models", "datasets"], *, clones: int = PARENTS) -> str | None:
    """The Hub id of the cache snapshot that `path` is or lies in, or of the repository clone at most `clones` levels above."""
    folder = Path(path).expanduser().absolute()
    for level, place in enumerate((folder, *list(folder.parents)[:PARENTS])):
        cached = re.fullmatch(rf"{kind}--([\w.-]+?)--([\w.-]+)", place.name)
        if cached:
            return "/".join(cached.groups())
        if level > clones:
            continue
        prefix = "datasets/" if kind == "datasets" else ""
        remote = re.search(rf"huggingface\.co/{prefix}([\w.-]+/[\w.-]+)", _read(place / ".git" / "config") or "")
        if remote and (kind == "datasets" or not remote[1].startswith(("datasets/", "spaces/"))):
            return remote[1].removesuffix(".git")
    return None


def license_of(header: dict[str, str]) -> License | None:
    """The license stated in the header of a model card."""
    stated = header.get("license")
    return License(stated, header.get("license_name"), header.get("license_link")) if stated else None


def _header(card: str | None) -> dict[str, str]:
    """The one-line values of a card's YAML header. Lists, nested values and unprintable ones are left out."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", card or "", re.S)
    found = re.findall(r"^(\w+):[ \t]*([^\s#\[{|>-][^\n]*)$", block[1], re.M) if block else []
    values = {name: value.strip().strip("\"'") for name, value in found}
    return {name: value for name, value in values.items() if value.isprintable() and len(value) <= LONGEST}


def _cached_card(hub_id: str, revision: str | None) -> str | None:
    """The model card of a Hub id already downloaded."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # the client finds that this is not a valid id
        path = try_to_load_from_cache(hub_id, "README.md", revision=revision)
        return _read(Path(path)) if isinstance(path, str) else None
    return None


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError, Unreadable):
        return read_text(path) if path.is_file() else None
    return None


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, Unreadable):
        return read_object(path) if path.is_file() else {}
    return {}
