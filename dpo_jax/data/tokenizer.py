"""Tokenizers: training, loading, saving, digests, and checks against a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dpo_jax.data.special_tokens import special_tokens
from dpo_jax.data.tokenizer_steps import check_steps
from dpo_jax.models.folder import refuse_adapter
from dpo_jax.untrusted import LIMITS, Unreadable, check_name, read_object, read_text, reading
from dpo_jax.writing import naming, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Silences transformers' advice to install PyTorch, which this package does not use.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_AGAIN = "save or fetch it again"

LONGEST_WORD = 1000  # characters
LARGEST_ID = 10_000_000
_LONG = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD}}}|(?<!\s)\s{{{LONGEST_WORD}}}")  # a longer word contains such a run


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, eos: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as in GPT-2: every text can be encoded and decoded exactly. The same texts give the same
    tokenizer.

    `vocab_size` is an upper bound (few texts have few merges), at least 257: the bytes, and `eos`, which is token 0, also the
    BOS, and never added by encoding. There is no padding token, because masks are made from lengths. A word of more than
    `LONGEST_WORD` characters is split into several.

    >>> tokenizer = train_tokenizer(["The film was a delight.", "The film was a bore."], vocab_size=270)
    >>> tokenizer.decode(tokenizer.encode("a new film"))
    'a new film'
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(f"vocab_size must be at least {len(alphabet) + 1} (every byte, and {eos!r}), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = words  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[eos], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator((part for text in texts for part in _with_short_words(text, words)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=eos, clean_up_tokenization_spaces=False)


def _with_short_words(text: str, words: Any) -> list[str]:
    """The text, split inside overlong words: merging takes quadratic time in the length of a word."""
    if not _LONG.search(text):
        return [text]
    cuts = [at for _, (start, end) in words.pre_tokenize_str(text) for at in range(start + LONGEST_WORD, end, LONGEST_WORD)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, or of a Hugging Face model such as "org/name". Code in a model folder is never run.

    Checked: it encodes and decodes, and its special tokens are in its vocabulary. Raises ValueError if there is no tokenizer,
    or no `tokenizer.json`, because a slow tokenizer cannot be fingerprinted; `Unreadable`, a ValueError, for damaged files.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    check_name(path)
    settings = check_files(Path(path)) if Path(path).is_dir() else {}
    # A tokenizer with its own code, or in an older form, may be intact and still unsupported here.
    damaged = (Path(path) / "tokenizer.json").is_file() and "auto_map" not in settings
    where = f"no tokenizer could be loaded from {str(path)!r}"
    with reading(where, remedy=_AGAIN if damaged else "", error=Unreadable if damaged else ValueError):
        file = cached_file(str(path), "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        written = None if file is None else _read(file)
        tokenizer = _as_written(_class_of(settings).from_pretrained(str(path), trust_remote_code=False), written, path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{str(path)!r} has a {type(tokenizer).__name__}, but a tokenizer.json (a fast tokenizer) is needed")
    with reading(where, remedy=_AGAIN):
        _try(tokenizer)
    return tokenizer


def _as_written(tokenizer: Any, written: Tokenizer | None, path: str | Path) -> Any:
    """`tokenizer`, or if its class splits text differently from `tokenizer.json`, one that follows the file.

    Some classes of transformers 5 (Llama's and Qwen2's, for example) use their own normalizer and pre-tokenizer although the
    model was trained with the file's, and they use others once the tokenizer has been saved. Special tokens that no file names,
    such as the EOS of GPT-2, are still taken from the class.
    """
    from transformers import PreTrainedTokenizerFast

    if written is None or type(tokenizer) is PreTrainedTokenizerFast or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    if _splitting(tokenizer.backend_tokenizer) == _splitting(written):
        return tokenizer
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    known: dict[str, Any] = {name: token for name, token in named.items() if written.token_to_id(token) is not None}
    return PreTrainedTokenizerFast.from_pretrained(str(path), **known)


def _read(file: str) -> Tokenizer:
    """Read a `tokenizer.json`. Raises if two tokens have one id, and for steps and ids that take the library minutes."""
    check_steps(file)
    tokenizer = Tokenizer.from_file(file)
    vocabulary = tokenizer.get_vocab()
    if vocabulary and (largest := max(vocabulary.values())) > LARGEST_ID:
        raise ValueError(f"a token has the id {largest:,}, and {LARGEST_ID:,} is the largest")
    _check_distinct(vocabulary)
    return tokenizer


def _check_distinct(vocabulary: Mapping[str, int]) -> None:
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two tokens have the same id")


def _splitting(tokenizer: Tokenizer) -> dict[str, Any]:
    """The parts of a tokenizer that determine encoding and decoding, except special tokens."""
    content = json.loads(tokenizer.to_str())
    return {part: content[part] for part in ("model", "normalizer", "pre_tokenizer", "decoder")}


def _try(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises if a tokenizer lacks what the rest of the package assumes after `load_tokenizer`."""
    _check_distinct(tokenizer.get_vocab())  # added tokens are numbered from the vocabulary size on, whatever ids exist
    for special in (True, False):
        tokenizer.decode(tokenizer("Hello, world", add_special_tokens=special)["input_ids"])
    shortest = min(tokenizer.get_vocab().items(), key=lambda item: len(item[0]), default=("", 0))[1]
    tokenizer.decode([shortest, shortest])  # a decoder may strip more characters than there are
    if not all(isinstance(token, str) for token in special_tokens(tokenizer)):
        raise ValueError("a special token is not a text")
    for name in ("eos_token", "bos_token", "pad_token"):
        token, number = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        if token is not None and (number is None or tokenizer.backend_tokenizer.id_to_token(number) != str(token)):
            raise ValueError(f"{name} {str(token)[:80]!r} is not in the vocabulary")
    template: Any = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [] if template is None else [template]
    if template == {} or not all(isinstance(text, str) for text in texts):
        raise ValueError("the chat template is not a text")


OF_TOKENIZERS = {
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
}
"""Files from which transformers may build a tokenizer."""


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write the tokenizer's files, with special tokens and chat template, so that transformers 4 and 5 load them alike.

    transformers 5 names a class that version 4 lacks, and writes a list where version 4 expects an object. Raises `Unreadable`
    for a folder whose name is not UTF-8.
    """
    check_name(folder)
    folder = Path(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The library would follow links and block on a pipe.
        with tempfile.TemporaryDirectory(prefix=".tokenizer.", dir=folder) as beside:
            new = Path(beside)
            tokenizer.save_pretrained(new)
            _for_every_version(new / "tokenizer_config.json")
            files = sorted(new.iterdir())
            for file in files:
                os.replace(file, folder / file.name)
        for name in OF_TOKENIZERS - {file.name for file in files}:  # of a tokenizer that was written here before
            (folder / name).unlink(missing_ok=True)


def _for_every_version(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    for where_it_was in ("is_local", "local_files_only"):
        content.pop(where_it_was, None)
    write_text(file, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def decode_completion(
    tokenizer: Any, prompt: Sequence[int] | np.ndarray, completion: Sequence[int] | np.ndarray, *, stop_ids: Sequence[int] = ()
) -> str:
    """The text that a completion adds to its prompt, without special tokens and without the final one of `stop_ids`.

    Both are decoded together, because SentencePiece tokenizers strip the first space of a decoded text.
    """
    if len(completion) and int(completion[-1]) in stop_ids:
        completion = completion[:-1]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt, **options)
    whole = tokenizer.decode(np.concatenate([prompt, completion]).astype(np.int32), **options)
    # The boundary between prompt and completion may be inside a character.
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(completion, **options)


def check_files(folder: Path) -> dict[str, Any]:
    """The content of a folder's `tokenizer_config.json` ({} without one), after a check of the other tokenizer files.

    Raises ValueError for a folder without a tokenizer, where transformers would invent an empty one; `Unreadable` for a file
    that is too large, and for damaged JSON. The large `tokenizer.json` is left to its library.
    """
    files = [folder / name for name in (*_FILES, *_SETTINGS) if (folder / name).is_file()]
    if not any(file.name in _FILES for file in files):
        refuse_adapter(folder)
        raise ValueError(f"no tokenizer could be loaded from '{folder}': it holds no tokenizer.json")
    for file in files:
        LIMITS.check("file_mb", file.stat().st_size, file, what="bytes")
    settings = {file.name: read_object(file, remedy=_AGAIN) for file in files if file.name in _SETTINGS}
    for name, content in settings.items():
        with reading(folder / name, remedy=_AGAIN):  # half a surrogate pair is not UTF-8 and could not be saved again
            json.dumps(content, ensure_ascii=False).encode()
    return settings.get("tokenizer_config.json", {})


def has_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template, by its files. Raises as `check_files`."""
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    return check_files(folder).get("chat_template") is not None or any((folder / name).exists() for name in files)


def template_of(folder: Path) -> str | None:
    """The source of the one chat template in a folder; None if it has none, or several. Raises as `check_files`."""
    if (folder / "additional_chat_templates").exists():
        return None
    if (file := folder / "chat_template.jinja").is_file():
        return read_text(file)
    source = check_files(folder).get("chat_template")
    return source if isinstance(source, str) else None


def vocabulary_of(folder: Path) -> Mapping[str, int]:
    """Token -> id, from a folder's `tokenizer.json`. Raises `Unreadable`."""
    file = folder / "tokenizer.json"
    check_name(file)
    with reading(file, remedy=_AGAIN):
        return _read(str(file)).get_vocab()


def _class_of(settings: Mapping[str, Any]) -> Any:
    """The class that loads a tokenizer with this `tokenizer_config.json`: transformers' plain fast tokenizer if it was saved as
    one.

    Otherwise `AutoTokenizer`. It takes half a second to import, and next to a Qwen2 config.json it would load our own tokenizer
    as Qwen2's class, which normalizes text and so gives different ids.
    """
    from transformers import PreTrainedTokenizerFast

    plain = ("TokenizersBackend", "PreTrainedTokenizerFast")
    if settings.get("tokenizer_class") in plain and "auto_map" not in settings:
        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of everything that determines the ids of a text or conversation. Saving and loading do not change it."""
    serialized: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call that used them; this package uses neither.
    del serialized["truncation"], serialized["padding"]
    identity = {
        "tokenizer": serialized,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check_tokenizer(tokenizer: Any, model_vocab_size: int, *, eos_token_id: int | Sequence[int] | None) -> None:
    """Raises ValueError if a tokenizer does not fit a model, before anything is compiled.

    The ids are those of the model's files; only `get_vocab()` and `eos_token_id` of the tokenizer are used.

    Errors are a token id outside the model's vocabulary, no EOS, or an EOS token that is none of the model's (if both state
    one). A model may have more embeddings than the tokenizer has tokens: tables are often rounded up. Padding tokens may
    differ, because padding has no weight here.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= model_vocab_size:
        raise ValueError(
            f"the tokenizer has token id {largest} ({token!r}), but the model's vocabulary has {model_vocab_size} entries"
            f" (ids 0 to {model_vocab_size - 1}): is this the model's own tokenizer?"
        )
    own = tokenizer.eos_token_id
    if own is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), which every completion must end with")
    accepted = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    if accepted is not None and own not in accepted:
        shown = accepted[0] if len(accepted) == 1 else list(accepted)
        raise ValueError(
            f"eos_token_id is {own} in the tokenizer, but {shown} in the model's config.json: is this its own tokenizer? "
            f"If completions are to end with it, add {own} to eos_token_id in the model's generation_config.json"
        )
