"""Options of the data: preference pairs, the tokenizer, and the TFDS folder that `prepare` writes."""

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
    """One of several preference sources. Options left out are taken from section `data`."""

    path: str = ""
    """File, folder or Hub data set, as in `data.path`."""
    weight: float = 1.0
    """How often each training row appears in an epoch: 2 means twice, 0.5 means a fixed half of the rows."""
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
"""Sources that are generated, not read from files."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where preference pairs come from, and how they become rows of tokens."""

    source: Literal["reviews", "question_game", "files", "tfds", "snippets", "imdb", "cnn_dailymail"] = "files"
    """files; generated: reviews, question_game; tfds: folders that prepare writes; texts only: snippets (rt-polarity), imdb
    (from TFDS), cnn_dailymail."""
    path: str | None = None
    """File or folder of the data, or a Hugging Face Hub data set (organization/name). Generated sources have none."""
    config: str | None = None
    """Subfolder of the data, or configuration of a Hub data set, if there are several; none: all of it."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set; none: main when the run directory is created. The run keeps that commit."""
    mix: tuple[MixConfig, ...] = ()
    """Several sources instead of path: a list of {path, weight}, with format, config, ... where they differ. Only in the
    YAML file."""
    test_share: float | None = None
    """Hold out this fraction of the train split (0 to 1), by a hash of the prompt, if the data have no held-out split."""
    format: FormatName = "auto"  # its help is that of the table
    columns: TextMap | None = None
    """Column names, if the files use others: prompt=question, or prompt=instruction+input (joined). `system=` (empty): ignore
    the column system."""
    train_split: str = "train"
    """Name of the split to train on."""
    test_split: str = "test"
    """Name of the held-out split."""
    max_train: int | None = None
    """Use only the first N training pairs; none: all."""
    max_test: int | None = None
    """Use only the first N held-out pairs; none: all."""
    reviews_train: int = 8_000
    """Training pairs to generate (sources reviews, question_game)."""
    reviews_test: int = 500
    """Held-out pairs to generate (sources reviews, question_game)."""
    ranking_length: int | None = None
    """Keep the best N completions of each ranking (loss plackett_luce); none: all rankings must have the same number."""
    on_bad: Literal["refuse", "drop"] = "refuse"
    """refuse: a bad row stops the command, which names its file, line and cause; drop: skip bad rows and count them by
    cause."""
    max_dropped_share: float = 0.05
    """With on_bad drop: stop if more than this fraction of a split is dropped (0 to 1)."""
    max_length: int = 512
    """Maximum length of prompt plus completion, in tokens; longer ones are truncated and counted."""
    max_prompt_length: int = 256
    """If prompt plus completion exceed max_length, the prompt is cut to this many tokens, then each completion to max_length
    minus this. Raise it together with max_length."""
    truncation: Literal["keep_end", "keep_start", "completions", "drop"] = "keep_end"
    """Which end of an over-long prompt to keep. completions: keep prompts whole and cut only completions, at max_length (as TRL
    does by default); a prompt that leaves no room makes a bad row. drop: leave out rows longer than max_length, and count them;
    prompts to sample from are kept whole."""
    date: str | None = None
    """Date that chat templates see as today, such as 2026-11-27; none: the day the run directory was created."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Start prompts with one BOS token. auto: for texts, if the tokenizer adds it; for conversations, if the template does."""
    rendered: bool = False
    """The texts in the files are already rendered by the chat template: prompts keep its end-of-text tokens, a completion may
    end with one, and bos auto adds none."""
    max_duplicates: float | None = None
    """Refuse a split if more than this fraction repeats an earlier pair (0 to 1); none: only report it."""
    max_contradictions: float | None = None
    """Refuse a split if more than this fraction repeats an earlier pair with its sides swapped (0 to 1); none: only report
    it."""
    max_overlap: float | None = None
    """Refuse held-out data if more than this fraction has a prompt of the train split (0 to 1); none: only report it."""
    layout: Literal["packed", "shared", "plain"] = "packed"
    """packed: several pairs per row; shared: one pair per row, its prompt computed once; plain: one completion per row. The
    numbers are the same; packing saves padding."""
    row_length: int | None = None
    """Row length in tokens; none: the shortest that fits the data in this layout."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "max_train", "max_test", "reviews_train", "reviews_test", "max_length", "max_prompt_length")
        if self.ranking_length is not None and self.ranking_length < 2:
            yield "ranking_length", f"a ranking has at least 2 completions, got {self.ranking_length}"
        if self.max_prompt_length >= self.max_length:
            yield "max_prompt_length", f"must be less than max_length ({self.max_length}), got {self.max_prompt_length}"
        if self.truncation == "drop" and self.source in ("snippets", "imdb"):
            yield "truncation", f"drop leaves out rows, but the texts of {self.source} are cut at max_length: leave it out"
        if not 0 <= self.max_dropped_share <= 1:
            yield "max_dropped_share", f"must be a share between 0 and 1, got {self.max_dropped_share}"
        if self.columns is not None:
            from dpo_jax.data.column_map import ColumnMap  # here: --help reads none of it

            try:
                ColumnMap.of(self.columns).check(self.format)
            except ValueError as error:
                yield "columns", str(error)
            if self.source != "files":
                yield "columns", f"renames the columns of files, but source is {self.source}: leave it out"
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
            yield "test_split", f"must differ from train_split, got {self.test_split!r} for both"
        if self.source in GENERATED and self.path is not None:
            yield "path", f"{self.source} are generated: leave path out, or set source to files or tfds"

        if self.test_share is not None and not 0 < self.test_share < 1:
            yield "test_share", f"must be a share between 0 and 1, such as 0.05, got {self.test_share}"
        if self.source != "files":
            for field in ("config", "revision", "mix", "test_share"):
                if getattr(self, field):
                    yield field, f"is read only with source files, not with {self.source}; leave it out"
        yield from self._check_mix()

    def _check_mix(self) -> Iterator[Problem]:
        for field in ("path", "config", "revision"):
            if self.mix and getattr(self, field) is not None:
                yield field, f"cannot be combined with data.mix, whose entries have their own {field}; leave one of them out"
        for number, source in enumerate(self.mix, 1):
            if not source.path.strip():
                yield "mix", f"entry {number} has no path"
            if not 0 < source.weight <= 1000:
                yield "mix", f"entry {number} ({source.path}): weight must be above 0, and at most 1000, got {source.weight:g}"
        places = [(source.path.rstrip("/"), source.config) for source in self.mix]
        for path, config in dict.fromkeys(place for place in places if places.count(place) > 1):
            yield "mix", f"{path}{f' ({config})' if config else ''} is listed twice; list it once, with a higher weight"

    @property
    def cut(self) -> Literal["keep_end", "keep_start", "completions"]:
        """How texts are cut where no row can be left out, as in sampling."""
        return "completions" if self.truncation == "drop" else self.truncation

    def missing(self) -> Iterator[Problem]:
        if self.source not in GENERATED and self.path is None and not self.mix:
            yield "path", f"source {self.source} needs a file or folder: pass --data.path"

    def name(self) -> str:
        """A readable name of the data."""
        return " + ".join(part.path for part in self.mix) or self.path or self.source

    def parts(self) -> tuple[MixConfig, ...]:
        """The sources of `mix`, or `path` as the only source."""
        alone = MixConfig(self.path or "", config=self.config, revision=self.revision)

        def filled(part: MixConfig) -> MixConfig:
            own = {field: getattr(part, field) or getattr(self, field) for field in ("train_split", "test_split")}
            return dataclasses.replace(part, format=part.format or self.format, columns=part.columns or self.columns, **own)

        return tuple(map(filled, self.mix or (alone,)))


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer. Without a path, it is the model's own; for a new model, one is trained on the train split."""

    path: str | None = None
    """Hugging Face folder or Hub id to load the tokenizer from."""
    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the tokenizer's own; exports keep it."""
    vocab_size: int = 8_000
    """Vocabulary size of a byte-level BPE tokenizer that is trained."""

    def check(self) -> Iterator[Problem]:
        if self.vocab_size < 257:
            yield "vocab_size", f"must be at least 257 (256 bytes and the end token), got {self.vocab_size}"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Checked preferences written as a TFDS folder, which `data.source: tfds` reads."""

    out: str | None = None
    """Folder to write; none: tfds/ in the run directory. It must not already contain the data set."""

    def check(self) -> Iterator[Problem]:
        yield from ()
