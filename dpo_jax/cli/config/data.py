"""Options of the data: preference pairs, tokenizer, and the TFDS folder that `prepare` writes."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import TextMap
from dpo_jax.cli.config.ranges import Problem, positive
from dpo_jax.data.format_table import FormatName


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """One of several sources of preferences. What is left out is that of section `data`."""

    path: str = ""
    """File, folder or data set of the Hub, as `data.path`."""
    weight: float = 1.0
    """How often each of its training rows is seen in an epoch: 2 twice, 0.5 a fixed half of them."""
    format: FormatName | None = None
    """As `data.format`."""
    columns: TextMap | None = None
    """As `data.columns`."""
    config: str | None = None
    """As `data.config`."""
    revision: str | None = None
    """As `data.revision`."""
    train_split: str | None = None
    """As `data.train_split`."""
    test_split: str | None = None
    """As `data.test_split`."""


GENERATED = ("reviews", "question_game")
"""Sources that are made, not read."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which preference pairs, and how they become rows of tokens."""

    source: Literal["reviews", "question_game", "files", "tfds", "snippets", "imdb", "cnn_dailymail"] = "files"
    """Generated reviews or games, preference files, our TFDS folders; texts only: rt-polarity, TFDS's IMDb, CNN/DailyMail."""
    path: str | None = None
    """File or folder with the data, or a data set of the Hugging Face Hub (organization/name); if it is not generated."""
    config: str | None = None
    """Folder of the data with the files, or configuration of the Hub, where a data set has several; none: all of it."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set; none: main when the run directory is begun, and the same commit ever after."""
    mix: tuple[MixConfig, ...] = ()
    """In the place of path: several sources, a list of {path, weight} with format, config, ... where they differ; in a file."""
    test_share: float | None = None
    """Hold out this share of the train split (0 to 1), by a hash of the prompt, where the data have no held-out split."""
    format: FormatName = "auto"  # its help is that of the table
    columns: TextMap | None = None
    """Columns that go by other names in the files: prompt=question, prompt=instruction+input (joined); system= reads none."""
    train_split: str = "train"
    """Name of the split to train on."""
    test_split: str = "test"
    """Name of the held-out split."""
    max_train: int | None = None
    """Use only the first this many training pairs; none: all."""
    max_test: int | None = None
    """Use only the first this many held-out pairs; none: all."""
    reviews_train: int = 8_000
    """Training pairs to generate (sources reviews, question_game)."""
    reviews_test: int = 500
    """Held-out pairs to generate (sources reviews, question_game)."""
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
        if self.columns is not None:
            from dpo_jax.data.column_map import ColumnMap  # here: --help reads none of it

            try:
                ColumnMap.of(self.columns).check(self.format)
            except ValueError as error:
                yield "columns", str(error)
            if self.source != "files":
                yield "columns", f"only files have columns of other names, and source is {self.source}: leave it out"
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
        if self.source in GENERATED and self.path is not None:
            yield "path", f"{self.source} are generated: leave path out, or set source to files or tfds"

        if self.test_share is not None and not 0 < self.test_share < 1:
            yield "test_share", f"must be a share between 0 and 1, such as 0.05, got {self.test_share}"
        if self.source != "files":
            for field in ("config", "revision", "mix", "test_share"):
                if getattr(self, field):
                    yield field, f"is read with source files only, and not with {self.source}; leave it out"
        yield from self._check_mix()

    def _check_mix(self) -> Iterator[Problem]:
        for field in ("path", "config", "revision"):
            if self.mix and getattr(self, field) is not None:
                yield field, f"stands beside data.mix, whose entries have a {field} each; leave one of them out"
        for number, source in enumerate(self.mix, 1):
            if not source.path.strip():
                yield "mix", f"entry {number} has no path"
            if not 0 < source.weight <= 1000:
                yield "mix", f"entry {number} ({source.path}): weight must be above 0, and at most 1000, got {source.weight:g}"
        places = [(source.path.rstrip("/"), source.config) for source in self.mix]
        for path, config in dict.fromkeys(place for place in places if places.count(place) > 1):
            yield "mix", f"{path}{f' ({config})' if config else ''} stands there twice; give it once, with a higher weight"

    def missing(self) -> Iterator[Problem]:
        if self.source not in GENERATED and self.path is None and not self.mix:
            yield "path", f"source {self.source} needs a file or folder: pass --data.path"

    def name(self) -> str:
        """What the data are, for people."""
        return " + ".join(part.path for part in self.mix) or self.path or self.source

    def parts(self) -> tuple[MixConfig, ...]:
        """The sources of `mix`, or `path` as the only one."""
        alone = MixConfig(self.path or "", config=self.config, revision=self.revision)

        def filled(part: MixConfig) -> MixConfig:
            own = {field: getattr(part, field) or getattr(self, field) for field in ("train_split", "test_split")}
            return dataclasses.replace(part, format=part.format or self.format, columns=part.columns or self.columns, **own)

        return tuple(map(filled, self.mix or (alone,)))


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
