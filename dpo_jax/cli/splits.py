"""The train and held-out splits of a configuration: read, counted, and encoded as token ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from dpo_jax.cli.config import GENERATED, Config, ConfigError
from dpo_jax.cli.data_sources import check_hub_splits, load_files
from dpo_jax.cli.preflight.inputs import NO_IMAGES, refuse_texts
from dpo_jax.cli.preflight.inputs import TEXT_SOURCES as TEXT_SOURCES
from dpo_jax.data.encode import token_ids, with_bos
from dpo_jax.data.image_prompts import ImageTokens
from dpo_jax.data.layout import Text
from dpo_jax.data.pairs import Cause, DataError, DataReport, Preference, PreferenceSet
from dpo_jax.data.prepare import EncodedSet, encode_all
from dpo_jax.data.question_game import game_preferences
from dpo_jax.data.reviews import review_preferences
from dpo_jax.data.row_kinds import Wanted, check_kind, split_pairs
from dpo_jax.data.snippets import Snippet, load_snippets, snippets_of
from dpo_jax.runtime.progress import reported


@contextmanager
def needs_tfds(option: str) -> Iterator[None]:
    """A context that turns a missing tensorflow-datasets, unneeded for plain files, into a `ConfigError` starting with
    `option`."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = {"tensorflow_datasets": "tensorflow-datasets"}.get(error.name or "", error.name)
        if package not in ("tensorflow-datasets", "array_record", "importlib_resources"):
            raise
        raise ConfigError(f"{option}: needs the package {package}, which is not installed: pip install {package}") from error


@functools.lru_cache(maxsize=1)  # a tokenizer is trained on the same texts as the model
def _generated(source: str, count: int, seed: int, split: Literal["train", "test"]) -> tuple[Preference, ...]:
    make = {"reviews": review_preferences, "question_game": game_preferences}[source]
    return tuple(make(count, seed, split=split))


def load_split(
    config: Config, split: Literal["train", "test"], tokenizer: Any = None, *, rows: Wanted = "pairs", images: bool = False
) -> PreferenceSet:
    """The preferences of the train or the held-out split, read as `rows`. Raises `DataError` for bad data.

    With `images` prompts may show images; otherwise the first that shows one raises `ConfigError`.
    """
    data = config.data
    limit = data.max_train if split == "train" else data.max_test
    if data.source in GENERATED:
        count = data.reviews_train if split == "train" else data.reviews_test
        preferences = _generated(data.source, count, config.run.seed, split)
        report = DataReport(source=data.source, split=split, format=data.source, rows=count, read=count, kept=count)
        check_kind("pairs", rows, where=f"data.source {data.source}")
        pairs = PreferenceSet(preferences, report)
        return (split_pairs(pairs) if rows == "unpaired" else pairs).take(limit)
    refuse_texts(config)
    # Files may also be a TFDS folder.
    with needs_tfds(f"data.source: {data.source}"):
        found = load_files(config, split, tokenizer, rows=rows).take(limit)
    if not images and (shown := next((one for one in found if one.images), None)):
        raise ConfigError(f"{shown.uid}: {NO_IMAGES}")
    if data.rendered:
        found = PreferenceSet((dataclasses.replace(one, chat=True) for one in found), found.report)
    return found


def load_splits(
    config: Config, tokenizer: Any = None, *, rows: Wanted = "pairs", images: bool = False
) -> tuple[PreferenceSet, PreferenceSet]:
    """`load_split` of the train and the held-out split. If a Hub data set lacks one of them, nothing is downloaded."""
    check_hub_splits(config)
    train, test = (load_split(config, split, tokenizer, rows=rows, images=images) for split in ("train", "test"))
    return train, test


def load_texts(config: Config, split: Literal["train", "test"]) -> list[Snippet]:
    """The texts for training, or for evaluation. Of snippets, the rest belongs to the reward."""
    data = config.data
    assert data.path is not None  # checked with the configuration
    if data.source == "imdb":
        with needs_tfds("data.source: imdb"):
            from dpo_jax.data.tfds import read_texts
        with reported(f"reading the {split} split"):
            texts = read_texts(data.path, data.train_split if split == "train" else data.test_split)
    else:
        with reported("reading the snippets"):
            texts = snippets_of(load_snippets(data.path), "policy" if split == "train" else "test")
    return texts[: data.max_train if split == "train" else data.max_test]


def encode_texts(config: Config, snippets: Sequence[Snippet], tokenizer: Any) -> list[Text]:
    """Whole texts as examples: every token scored but the first (BOS, if any); truncated to `data.max_length`, EOS included."""
    ids = (with_bos(token_ids(snippet.text, tokenizer), tokenizer, bos=config.data.bos) for snippet in snippets)
    ended = (np.append(x, np.int32(tokenizer.eos_token_id))[: config.data.max_length] for x in ids)
    with reported(f"encoding {len(snippets):,} texts"):
        return [(x[:0], x) for x in ended]


def encode_split(config: Config, preferences: PreferenceSet, tokenizer: Any, images: ImageTokens | None = None) -> EncodedSet:
    """Token ids of a split. Raises `DataError` for unusable pairs, or if too large a share had to be dropped, of all rows or of
    those encoded here.

    `images`: how images in prompts become tokens, for a model that reads them.
    """
    data = config.data
    with reported(f"encoding {len(preferences):,} pairs"), _hint_of_rendered_texts(config):
        encoded = encode_all(
            preferences,
            tokenizer,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            truncation=data.truncation,
            bos=data.bos,
            on_bad=data.on_bad,
            row_length=None if data.layout == "plain" else data.row_length,  # a plain row holds one side, within max_length
            images=images,
        )
    report, kept = encoded.report, only_kept(preferences, encoded)
    report.chat = sum(preference.chat for preference in kept)
    report.images = len({image.digest for preference in kept for image in preference.images})
    # Rows beyond data.max_train, or of the other side of a hash split, are never encoded and must not dilute the share.
    of_encoded = (report.bad - preferences.report.bad) / len(preferences) if len(preferences) else 0.0
    with _hint_of_rendered_texts(config):
        check_dropped(config, report, max(report.bad_share, of_encoded))
    if not len(encoded):
        told = f"{report.summary()}\n{report.reasons()}no pair is left{_raise_length(config, report)}"
        raise DataError(told, causes=[Cause.NO_ROWS])
    return encoded


_BY_LIMITS = (Cause.OVER_LIMIT, Cause.OTHER_SPLIT, Cause.WEIGHT)  # causes that the configuration asks for
_BY_LENGTH = (Cause.NO_ROOM, Cause.BEYOND_MAX_LENGTH, Cause.IDENTICAL_AFTER_TRUNCATION, Cause.COMPLETION_CUT)


def _raise_length(config: Config, report: DataReport) -> str:
    """The remedy for rows dropped for their length; "" if there are none."""
    found = any(cause in report.dropped for cause in _BY_LENGTH)
    return f"; --data.max-length {config.data.max_length} is too short for some: raise it" if found else ""


def truncation_note(config: Config, report: DataReport) -> str | None:
    """One line on the texts truncated and the rows dropped in a split, with the options that decide; None if there are none."""
    data, parts = config.data, []
    if report.truncated:
        named = {"prompt": "prompts", "text": "texts"}
        cut = ", ".join(f"{count:,} {named.get(part, part)}" for part, count in report.truncated.items())
        limits = f"data.max_length {data.max_length}"
        if "prompt" in report.truncated or data.cut != "completions":
            limits += f", data.max_prompt_length {data.max_prompt_length}; data.truncation: completions keeps prompts whole"
        parts.append(f"{cut} truncated ({limits})")
    dropped = {cause: count for cause, count in report.dropped.items() if cause not in _BY_LIMITS}
    if dropped:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in sorted(dropped.items()))
        parts.append(f"{sum(dropped.values()):,} rows dropped ({causes}){_raise_length(config, report)}")
    return f"{report.split} split, {report.kept:,} kept: {'; '.join(parts)}" if parts else None


@contextmanager
def _hint_of_rendered_texts(config: Config) -> Iterator[None]:
    """A context that names `data.rendered` where texts are refused for their end-of-text tokens."""
    try:
        yield
    except DataError as error:
        if config.data.rendered or Cause.EOS_IN_TEXT not in error.causes:
            raise
        hint = "If the chat template rendered these texts before, add --data.rendered (or give the messages instead)."
        raise DataError(f"{error}\n{hint}", causes=error.causes) from error


def check_dropped(config: Config, report: DataReport, share: float) -> None:
    """Raises `DataError` if more than `data.max_dropped_share` was dropped as bad."""
    if share > config.data.max_dropped_share:
        raise DataError(
            f"{report.summary()}\n{report.reasons()}{share:.1%} of the rows were dropped as bad, more than "
            f"--data.max-dropped-share {config.data.max_dropped_share:.1%} allows: repair the data, or raise that limit",
            causes=[Cause(cause) for cause in report.dropped],
        )


def only_kept(preferences: PreferenceSet, encoded: EncodedSet) -> list[Preference]:
    """The preferences whose pair survived encoding."""
    kept = {pair.uid for pair in encoded}
    return [preference for preference in preferences if preference.uid in kept]


def with_data(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
