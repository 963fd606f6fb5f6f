"""Options of the data: preference pairs, tokenizer, and the TFDS folder that `prepare` writes."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.ranges import Problem, positive
from dpo_jax.data.format_table import FormatName


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which preference pairs, and how they become rows of tokens."""

    source: Literal["reviews", "files", "tfds", "snippets", "imdb", "cnn_dailymail"] = "files"
    """Generated reviews, files of preferences, a TFDS folder of ours; texts only: rt-polarity, TFDS's IMDb, CNN/DailyMail."""
    path: str | None = None
    """File or folder with the data, for all sources but reviews."""
    format: FormatName = "auto"  # its help is that of the table
    train_split: str = "train"
    """Name of the split to train on."""
    test_split: str = "test"
    """Name of the held-out split."""
    max_train: int | None = None
    """Use only the first this many training pairs; none: all."""
    max_test: int | None = None
    """Use only the first this many held-out pairs; none: all."""
    reviews_train: int = 8_000
    """Training pairs to generate (source reviews)."""
    reviews_test: int = 500
    """Held-out pairs to generate (source reviews)."""
    ranking_length: int | None = None
    """Keep the best so many completions of each ranking (loss plackett_luce); none: all must have the same number."""
    on_bad: Literal["refuse", "drop"] = "refuse"
    """A bad row stops the command with its file, line and cause, or is dropped and counted by cause."""
    max_dropped_share: float = 0.05
    """With on_bad drop, stop all the same if more than this share of a split is dropped (0 to 1)."""
    max_length: int = 512
    """Longest prompt plus completion, in tokens; what is longer is cut and counted."""
    max_prompt_length: int = 256
    """Length, in tokens, to which the prompt is cut when prompt plus completion exceed max_length."""
    truncation: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of an over-long prompt is kept."""
    date: str | None = None
    """Day that a chat template takes for today, such as 2026-11-27; none: the day on which the run directory was begun."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin prompts with BOS, once. auto: a text if the tokenizer does so itself, a conversation if its template does."""
    max_duplicates: float | None = None
    """Refuse a split of which a larger share repeats an earlier pair (0 to 1); none: only say so."""
    max_contradictions: float | None = None
    """Refuse a split of which a larger share is an earlier pair with its sides swapped (0 to 1); none: only say so."""
    max_overlap: float | None = None
    """Refuse held-out data of which a larger share has a prompt of the train split (0 to 1); none: only say so."""
    layout: Literal["packed", "shared", "plain"] = "packed"
    """Several pairs a row, one pair a row with its prompt read once, or one completion a row. Same numbers, less padding."""
    row_length: int | None = None
    """Length of a row, in tokens; none: the shortest that fits the data in this layout."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "max_train", "max_test", "reviews_train", "reviews_test", "max_length", "max_prompt_length")
        if self.ranking_length is not None and self.ranking_length < 2:
            yield "ranking_length", f"a ranking has at least 2 completions, got {self.ranking_length}"
        if self.max_prompt_length >= self.max_length:
            yield "max_prompt_length", f"must be less than max_length ({self.max_length}), got {self.max_prompt_length}"
        if not 0 <= self.max_dropped_share <= 1:
            yield "max_dropped_share", f"must be a share between 0 and 1, got {self.max_dropped_share}"
        for field in ("max_duplicates", "max_contradictions", "max_overlap"):
            if (share := getattr(self, field)) is not None and not 0 <= share <= 1:
                yield field, f"must be a share between 0 and 1, or null for no limit, got {share}"
        if self.row_length is not None and self.row_length < self.max_length:
            yield "row_length", f"must be at least max_length ({self.max_length}), got {self.row_length}"
        if self.date is not None:
            try:
                datetime.datetime.fromisoformat(self.date)
            except ValueError:
                yield "date", f"must be a day, such as 2026-11-27, with or without a time (2026-11-27T09:30), got {self.date!r}"
        for field in ("train_split", "test_split"):
            if not getattr(self, field).strip():
                yield field, "must name a split"
        if max(self.reviews_train, self.reviews_test) > 10_000_000:
            yield "reviews_train", "at most 10 million reviews are generated, for either split"
        if self.train_split == self.test_split:
            yield "test_split", f"must be another than train_split, got {self.test_split!r} for both"
        if self.source == "reviews" and self.path is not None:
            yield "path", "reviews are generated: leave path out, or set source to files or tfds"

    def missing(self) -> Iterator[Problem]:
        if self.source != "reviews" and self.path is None:
            yield "path", f"source {self.source} needs a file or folder: pass --data.path"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer. Without a path: that of the model; for a new model one is trained on the train split."""

    path: str | None = None
    """Hugging Face folder or Hub id to load it from."""
    vocab_size: int = 8_000
    """Entries of a trained byte-level BPE vocabulary."""

    def check(self) -> Iterator[Problem]:
        if self.vocab_size < 257:
            yield "vocab_size", f"must be at least 257 (256 bytes and the end token), got {self.vocab_size}"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Checked preferences as a TFDS folder, which `data.source: tfds` reads."""

    out: str | None = None
    """Folder to write; none: tfds/ in the run directory. It must not hold the data set yet."""

    def check(self) -> Iterator[Problem]:
        yield from ()
