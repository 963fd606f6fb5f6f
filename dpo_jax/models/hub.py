"""Models by name: a folder, or a Hub id "organization/name", optionally with "@revision"; and uploads to the Hub."""

from __future__ import annotations

from pathlib import Path

from dpo_jax.models.folder import adapter_base, is_hub_id, local_folder

_WANTED = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja", "*.model", "README.md"]
_UNREAD = ["consolidated*"]  # Mistral's own format of the same weights, beside the shards
_REPLACED = [
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
]
"""Files of an earlier model that a push removes: readers take an index before a single file, and an adapter for its base."""


def resolve(path: str | Path) -> Path:
    """The local folder of a model: `path` itself, or a download of a Hub id (safetensors, JSON, tokenizer files and the card).

    Raises FileNotFoundError if it is neither a folder nor an id that can be fetched, NotADirectoryError for a file.
    """
    if (folder := local_folder(path)) is not None:
        return folder
    try:
        return _snapshot(str(path))
    except Exception as error:  # the hub client raises its own errors, those of requests, and OSError
        raise FileNotFoundError(f"{path} is not a local folder and could not be fetched from the Hub: {error}") from error


def model_folder(path: str | Path) -> Path:
    """The folder with a model's weights and `config.json`; for an adapter (LoRA), its base's.

    Raises what `resolve` raises, naming the adapter if its base is not found.
    """
    folder = resolve(path)
    base = adapter_base(folder)
    if base is None:
        return folder
    try:
        found = resolve(base)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{folder} is an adapter, and its base model is not here: {error}") from error
    if adapter_base(found) is not None:
        raise FileNotFoundError(
            f"{folder} is an adapter of {base}, which is an adapter itself; merge that one into its base first"
        )
    return found


def tokenizer_folder(folder: str | Path) -> Path:
    """`folder`, or its base's folder for an adapter without its own tokenizer."""
    own = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    return Path(folder) if own else model_folder(folder)


class PushError(Exception):
    """A folder could not be uploaded to the Hub. The message says why, and gives the remedy."""


def check_push(name: str) -> None:
    """Raises `PushError` if nothing can be pushed to the repository `name` from here: no such id, no token, no network."""
    from huggingface_hub import constants, get_token

    if not is_hub_id(name) or "@" in name:
        raise PushError(f"{name}: not an id of the Hub (organization/name)")
    if constants.is_offline_mode():
        raise PushError(f"{name}: HF_HUB_OFFLINE forbids asking the Hub; unset it")
    if get_token() is None:
        raise PushError(f"{name}: no token for the Hub; log in with `hf auth login`, or set HF_TOKEN (with write permission)")


def push(folder: str | Path, name: str, *, message: str, public: bool = False) -> str:
    """Uploads a model folder as one commit, and returns its address. A missing repository is created, private unless `public`.

    The commit also removes the weights of an earlier model, where the folder does not overwrite them. Raises `PushError`; the
    folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_push(name)
    later = f"the model is in {folder}; later: hf upload {name} {folder}"
    try:
        HfApi().create_repo(name, private=not public, exist_ok=True)
        options = {"commit_message": message, "delete_patterns": _REPLACED}
        return HfApi().upload_folder(repo_id=name, folder_path=folder, **options).commit_url
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        why = {
            401: "the Hub rejects this token; log in with `hf auth login`, or set HF_TOKEN",
            403: "the token has no write permission there; use one that has, or another organization",
        }.get(status, f"the Hub refuses it: {' '.join(str(error).split())[:300]}")
        raise PushError(f"{name}: {why}; {later}") from error
    except Exception as error:  # network errors: the underlying HTTP library raises its own
        raise PushError(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; {later}") from error


def cached_revision(path: str) -> str | None:
    """The commit of a Hub id already downloaded to this machine, or None. Uses no network."""
    try:
        return _snapshot(path, local_files_only=True).name
    except Exception:  # not downloaded, or no cache at all
        return None


def _snapshot(path: str, *, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = path.partition("@")
    options = {"allow_patterns": _WANTED, "ignore_patterns": _UNREAD, "local_files_only": local_files_only}
    return Path(snapshot_download(name, revision=revision or None, **options))
