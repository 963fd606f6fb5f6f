"""Rows with images: the image shown at each place of a conversation, and its tokens in the text.

    {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
     "chosen": ..., "rejected": ..., "images": ["cat.png"]}

A content part of type image names its own image (`image`, `path`, `url`, `bytes` or `base64`), or takes the next image of the
column `images` (or `image`). Without such parts, the images come before the first user's message, as in TRL. An image is bytes,
a path relative to the folder of the data file, a `data:` URL, or the form of `datasets`, `{"bytes", "path"}`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.columns import UNREAD, CsvText, Row
from dpo_jax.data.images import Source, from_base64, open_image
from dpo_jax.data.pairs import BadRow, Cause, Preference
from dpo_jax.data.roles import with_roles

COLUMNS = ("images", "image")
OWN = ("bytes", "path", "image", "url", "base64")
"""Keys that hold an image, in a content part or in a value of the column."""
MAX_IMAGES = 1000  # per row


@dataclasses.dataclass(frozen=True)
class Place:
    """A content part that shows an image; the chat template writes it as the text `mark`. Rows cannot contain this type."""

    mark: str


class Marks(NamedTuple):
    """The text marks of an image: `place` before the token count is known; then `place`, `soft` for each token, and `end`."""

    place: str
    soft: str
    end: str

    def expanded(self, text: str, tokens: int) -> str:
        """`text` with `tokens` image tokens at each place, as in Gemma 3's processor."""
        return text.replace(self.place, f"\n\n{self.place}{self.soft * tokens}{self.end}\n\n")

    def collapsed(self, text: str) -> str:
        """The inverse of `expanded`, for display."""
        tokens = f"{re.escape(self.place)}(?:{re.escape(self.soft)})+{re.escape(self.end)}"
        return re.sub(f"\n\n{tokens}\n\n", lambda _: self.place, text)


def image_marks(tokenizer: Any) -> Marks:
    """The marks of a tokenizer with Gemma 3's special image tokens. Raises `BadRow` for any other tokenizer."""
    names = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    found = [str(getattr(tokenizer, name, None) or usual) for name, usual in names.items()]
    if missing := [token for token in found if tokenizer is None or not _has_token(tokenizer, token)]:
        detail = f"the tokenizer has no token {missing[0]!r} for images; use the tokenizer of a model that reads them (Gemma 3)"
        raise BadRow(Cause.CHAT_TEMPLATE, detail)
    return Marks(*found)


def _has_token(tokenizer: Any, token: str) -> bool:
    """A single look-up: building the vocabulary dictionary for every row would take longer than the rest of the row."""
    number = tokenizer.convert_tokens_to_ids(token)
    return number is not None and tokenizer.convert_ids_to_tokens(number) == token


def names_images(row: Row) -> bool:
    """Whether the prompt of a row shows an image, valid or not."""
    return any(row[name] != [] for name in _filled(row)) or any(_is_image(part) for part in _parts(row.get("prompt")))


def take_images(row: Row, tokenizer: Any) -> tuple[Row, tuple[Source, ...]]:
    """The row with its image parts replaced by `Place`s, and the images in order; the row itself if it has none.

    Raises `BadRow` if the numbers of places and images differ, for an image in a completion, and for a value that is no image.
    """
    column = _column(row)
    if not column and not any(_is_image(part) for part in _parts(row.get("prompt"))):
        for field in ("chosen", "rejected"):
            _refuse_images(row.get(field), field, implicit="prompt" not in row)
        return row, ()
    mark = image_marks(tokenizer).place
    prompt, row = _messages(row)
    sources: list[Source] = []
    waiting = list(column)
    if not any(_is_image(part) for part in _parts(prompt)):
        prompt = _before_first(prompt, len(column))
    turns = [_with_places(turn, f"prompt.{number}", waiting, sources, mark) for number, turn in enumerate(prompt)]
    if waiting:
        detail = f"{len(column)} images, but the prompt has places for {len(column) - len(waiting)}"
        raise BadRow(Cause.IMAGE_COUNT, detail, field="images")
    return {**row, "prompt": turns}, tuple(sources)


def open_images(preference: Preference, root: str | os.PathLike[str]) -> Preference:
    """The preference with its images opened: each is decoded once as a check. Raises `BadRow` as `open_image` does."""
    found = (open_image(source, root=root, field=f"images.{number}") for number, source in enumerate(preference.images))
    return dataclasses.replace(preference, images=tuple(found))


def with_images(preference: Preference, sources: tuple[Source, ...], tokenizer: Any) -> Preference:
    """The preference with its images, not opened yet. Raises `BadRow` if the chat template wrote a different number of
    images."""
    check_count(preference.prompt, sources, tokenizer)
    return dataclasses.replace(preference, images=sources)


def check_count(prompt: str, sources: Sequence[Source], tokenizer: Any) -> None:
    """Raises `BadRow` if the chat template wrote a different number of images into the prompt."""
    written = prompt.count(image_marks(tokenizer).place)
    if written != len(sources):
        detail = f"the chat template writes {written} of the {len(sources)} images of the prompt"
        raise BadRow(Cause.IMAGE_COUNT, detail, field="prompt")


def image_starts(ids: np.ndarray, *, soft: int, tokens: int, images: int) -> np.ndarray:
    """Positions in the prompt `ids` where the tokens of each image begin: int32[images].

    Raises `BadRow` if truncation cut some of them off.
    """
    places = np.flatnonzero(np.asarray(ids) == soft)
    starts = places[::tokens]
    whole = (starts[:, None] + np.arange(tokens)).reshape(-1)
    if len(places) != images * tokens or not np.array_equal(places, whole):
        detail = f"{len(places)} of {images * tokens} image tokens are left: truncation cut an image; raise max_prompt_length"
        raise BadRow(Cause.NO_ROOM, detail, field="prompt")
    return starts.astype(np.int32)


def _filled(row: Row) -> list[str]:
    """The image columns that hold a value; an empty cell of a CSV file is none."""
    values = {name: row[name] for name in COLUMNS if name in row}
    return [
        name
        for name, value in values.items()
        if value is not None and value is not UNREAD and not (isinstance(value, CsvText) and not value.strip())
    ]


def _column(row: Row) -> list[Any]:
    """The images in the row's column; [] without that column."""
    named = _filled(row)
    if not named:
        return []
    if len(named) > 1:
        raise BadRow(Cause.IMAGE_COUNT, "the row has both `images` and `image`; leave one out", field="image")
    value = row[named[0]]
    found = value if isinstance(value, list | tuple) else [value]
    if len(found) > MAX_IMAGES:
        raise BadRow(Cause.IMAGE_COUNT, f"{len(found):,} images, but the limit is {MAX_IMAGES:,}", field=named[0])
    return [_source(one, f"{named[0]}.{number}") for number, one in enumerate(found)]


def _source(value: Any, field: str) -> Source:
    """Bytes or path of an image given in any of the accepted forms. Raises `BadRow`."""
    if isinstance(value, bytes | str) and value:
        return value
    if isinstance(value, Mapping):
        for name in OWN:
            if (inside := value.get(name)) is None:
                continue
            if name == "base64" and isinstance(inside, str):
                return from_base64(inside, f"{field}.base64")
            return _source(inside, f"{field}.{name}")
    detail = f"expected bytes, a path or {{'bytes', 'path'}}, got {type(value).__name__}"
    raise BadRow(Cause.NO_IMAGE if not value else Cause.WRONG_TYPE, detail, field=field)


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _parts(messages: Any) -> Iterator[Any]:
    """The content parts of messages."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from content if isinstance(content, list) else ()


def _refuse_images(side: Any, field: str, *, implicit: bool = False) -> None:
    if any(_is_image(part) for part in _parts(side)):
        remedy = "; give the messages before the answer in a column prompt" if implicit else ""
        raise BadRow(Cause.WRONG_TYPE, f"images are read in the prompt only{remedy}", field=field)


def _messages(row: Row) -> tuple[list[Any], dict[str, Any]]:
    """The prompt as messages, and the row with its completions as messages."""
    prompt, found = row.get("prompt"), dict(row)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise BadRow(Cause.NO_PROMPT, "a row with images needs a prompt: a text, or messages", field="prompt")
    for field in ("chosen", "rejected"):
        _refuse_images(row.get(field), field)
        if isinstance(row.get(field), str):
            found[field] = [{"role": "assistant", "content": row[field]}]
    return with_roles(prompt), found


def _before_first(prompt: list[Any], images: int) -> list[Any]:
    """The messages with places for `images` images before the first user's text."""
    first = next((number for number, turn in enumerate(prompt) if turn.get("role") == "user"), None)
    if first is None:
        raise BadRow(Cause.IMAGE_COUNT, "the images need a message of a user", field="prompt")
    content = prompt[first].get("content")
    text = content if isinstance(content, list) else [{"type": "text", "text": content}]
    shown = {**prompt[first], "content": [*({"type": "image"} for _ in range(images)), *text]}
    return [*prompt[:first], shown, *prompt[first + 1 :]]


def _with_places(turn: Any, field: str, waiting: list[Source], sources: list[Source], mark: str) -> Any:
    """A message with a `Place` for each image; the image is moved from `waiting`, or from the part itself, to `sources`."""
    content = turn.get("content")
    if not isinstance(content, list):
        return turn
    parts = []
    for number, part in enumerate(content):
        if not _is_image(part):
            parts.append(part)
            continue
        own = {name: part[name] for name in OWN if part.get(name) is not None}
        if own:
            sources.append(_source(own, f"{field}.content.{number}"))
        elif waiting:
            sources.append(waiting.pop(0))
        else:
            detail = f"a place for an image, but the row has only {len(sources)} images"
            raise BadRow(Cause.IMAGE_COUNT, detail, field=f"{field}.content.{number}")
        parts.append(Place(mark))
    return {**turn, "content": parts}
