"""Preference pairs as text, and the report of rows read, kept and dropped by cause.

Nothing is repaired or lost silently. Code that finds a row unusable raises `BadRow`. A `Triage` turns that into a refusal of
the whole data set (the default) or a counted drop, and ensures that rows kept plus rows dropped equal rows read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, overload

from dpo_jax.data.terminal import printable
from dpo_jax.untrusted import Unreadable, reading

OnBad = Literal["refuse", "drop"]
HH_ASSISTANT = "\n\nAssistant:"


class Cause(enum.StrEnum):
    """Why a row, or a whole file, cannot be used. The values are the names in `data_report.json`."""

    # the row as bytes
    INVALID_UTF8 = "invalid_utf8"  # also lone surrogates, which no tokenizer encodes
    NUL = "nul"  # zero bytes in a text file, as left by a crash; a JSON text may contain \u0000
    INVALID_JSON = "invalid_json"
    DUPLICATE_KEY = "duplicate_key"
    NAN = "nan"
    LINE_TOO_LONG = "line_too_long"
    TOO_DEEP = "too_deep"  # JSON and HTML
    # its columns
    MISSING_COLUMN = "missing_column"
    UNREAD_COLUMN = "unread_column"  # it may hold the prompt or a system text, but the format does not read it
    WRONG_TYPE = "wrong_type"
    OUT_OF_RANGE = "out_of_range"
    # the pair
    EMPTY = "empty"
    IDENTICAL = "identical"
    TOO_LONG = "too_long"
    NO_PROMPT = "no_prompt"
    DIFFERENT_PROMPTS = "different_prompts"
    CHAT_TEMPLATE = "chat_template"
    EOS_IN_TEXT = "eos_in_text"
    # its images
    NO_IMAGE = "no_image"  # a missing file, or a remote address
    BAD_IMAGE = "bad_image"  # unknown image type, or damaged
    IMAGE_SIZE = "image_size"  # no pixels, or too many
    IMAGE_COUNT = "image_count"  # numbers of places and images differ
    # its tokens
    NO_ROOM = "no_room"
    COMPLETION_CUT = "completion_cut"
    IDENTICAL_AFTER_TRUNCATION = "identical_after_truncation"
    # a valid row that states no preference
    TIE = "tie"
    NO_PAIR = "no_pair"
    SCORE_RATIO = "score_ratio"
    BEYOND_MAX_LENGTH = "beyond_max_length"
    OVER_LIMIT = "over_limit"
    OTHER_SPLIT = "other_split"  # one file holds both splits, divided by a hash of the prompt
    WEIGHT = "weight"  # left out by its source's weight, below 1
    # the file: the number of lost rows is unknown, so a file is never dropped
    GIT_LFS_POINTER = "git_lfs_pointer"
    BAD_GZIP = "bad_gzip"
    BAD_PARQUET = "bad_parquet"
    BAD_CSV = "bad_csv"
    BAD_ARRAY_RECORD = "bad_array_record"
    BAD_LAYOUT = "bad_layout"
    NO_ROWS = "no_rows"


FILTERED = frozenset(
    (
        *(Cause.IDENTICAL_AFTER_TRUNCATION, Cause.TIE, Cause.NO_PAIR, Cause.SCORE_RATIO, Cause.OVER_LIMIT),
        *(Cause.BEYOND_MAX_LENGTH, Cause.OTHER_SPLIT, Cause.WEIGHT),
    )
)
"""Causes that leave out a valid row by definition of the task. They are counted and never refused."""


Spans = tuple[tuple[int, int], ...]
"""Character ranges [begin, end) of a text, ascending and disjoint."""


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt and two completions of it. `prompt + chosen` is the original text: nothing is stripped or added.

    A ranking of more than two has the others in `between`. A single completion has a label `desirable` and its text as both
    `chosen` and `rejected`. A text that only supervised fine-tuning reads is a desirable one marked `demonstration`.
    """

    prompt: str
    chosen: str
    rejected: str
    uid: str  # unique in its set; names the place: "harmless-base/train.jsonl.gz:17"
    sft_target: str | None = None  # SFT target for this prompt, if not `chosen`
    chat: bool = False  # rendered by a chat template: its special tokens (EOS after each turn) belong in the prompt
    subset: str | None = None  # name of its subset; used only to report results
    chosen_spans: Spans | None = None  # the assistant's text, if others' turns are in between; None: all
    rejected_spans: Spans | None = None
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # how it was rendered; counted in the report
    prompt_digest: str | None = None  # conversations: digest of the messages, independent of template and date
    between: tuple[str, ...] = ()  # rankings only: best first
    desirable: bool | None = None  # single completions only
    demonstration: bool = False  # a completion to imitate, without a label; of a plain text the prompt is empty
    unended: tuple[str, ...] = ()  # "chosen", "rejected": samples that a token limit cut off, after which no EOS was drawn
    images: tuple[Any, ...] = ()  # images of the prompt: `ImageFile` each; before opening, what the row named


class BadRow(Unreadable):
    """An unusable row: `cause`, the `field` at fault ("" for the whole row) and a readable `detail`.

    A `remedy` is what to do, with the columns to map for it; `ColumnMap.named` writes it as an option.
    """

    def __init__(
        self, cause: Cause, detail: str, *, field: str = "", remedy: tuple[str, Mapping[str, str]] | None = None
    ) -> None:
        # Both may quote the data, which may be very long, or contain lone surrogates, which cannot be encoded.
        detail, field = _shortened(detail, 240), _shortened(field, 80)
        super().__init__(f"{field}: {cause}: {detail}" if field else f"{cause}: {detail}")
        self.cause, self.detail, self.field, self.remedy = cause, detail, field, remedy


class DataError(Unreadable):
    """The data are refused. The message names each place (`file:line`), field and cause, and the remedy."""

    def __init__(self, message: str, *, causes: Iterable[Cause]) -> None:
        super().__init__(message)
        self.causes = tuple(causes)


def refuse(cause: Cause, where: str | os.PathLike[str], detail: str) -> NoReturn:
    """Raises `DataError` for one place."""
    raise DataError(f"{where}: {cause}: {detail}", causes=[cause])


@dataclasses.dataclass
class Place:
    """The position of a reader in a file, for error messages of libraries: "name:line: cause: detail"."""

    name: str
    cause: Cause
    detail: str
    number: int = 0  # of the last line or row read

    def __str__(self) -> str:
        return f"{self.name}:{self.number + 1}: {self.cause}: {self.detail}"

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Turn any exception of a library into a `DataError`."""
        return reading(self, error=lambda words: DataError(words, causes=[self.cause]))


def readable_name(path: str | os.PathLike[str]) -> str:
    """A file name as encodable text: non-UTF-8 bytes as `\\xe9`, backslashes doubled."""
    return os.fsencode(path).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def _shortened(text: str, most: int) -> str:
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclasses.dataclass
class SourceReport:
    """Rows read, kept and dropped of one of several sources, counted as in `DataReport`."""

    path: str
    format: str
    weight: float  # how often each of its rows is seen in an epoch
    rows: int
    read: int
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.read - sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"kept": self.kept}


def source_of(uid: str) -> str:
    """The source in the uid of a pair, for several sources: "hh" in "hh: train.jsonl:3"."""
    return uid.partition(": ")[0]


def folder_of(uid: str) -> str:
    """The first folder in the uid of a pair of one source: "hh" in "hh/train.jsonl:3"; "" for a file outside of any."""
    return uid.rpartition("/")[0].partition("/")[0]


@dataclasses.dataclass
class DataReport:
    """Report on a data set: candidates read, kept, and dropped by cause.

    `read` counts candidate pairs. A row is one candidate, unless the format forms several pairs from it. A row that forms none
    counts as one dropped candidate. Always: `kept + sum(dropped.values()) == read`.
    """

    source: str = ""
    split: str = ""
    format: str = ""
    rows: int = 0  # lines or records in the files
    read: int = 0
    kept: int = 0
    chat: int = 0  # kept ones rendered by a chat template
    images: int = 0  # distinct images in the prompts of kept ones
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # cause -> candidates
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # cause -> its first five, "where: detail"
    truncated: dict[str, int] = dataclasses.field(default_factory=dict)  # part that was cut -> pairs
    notes: list[str] = dataclasses.field(default_factory=list)
    files: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"path", "bytes", "sha256"}
    sources: dict[str, SourceReport] = dataclasses.field(default_factory=dict)  # several sources: by the name that begins uids

    def add(self, where: str, problem: BadRow) -> None:
        """Counts one candidate as dropped."""
        cause = problem.cause.value
        self.dropped[cause] = self.dropped.get(cause, 0) + 1
        if source := self.sources.get(source_of(where)):
            source.dropped[cause] = source.dropped.get(cause, 0) + 1
        examples = self.examples.setdefault(cause, [])
        if len(examples) < 5:
            examples.append(f"{where}: {problem}")

    @property
    def bad(self) -> int:
        """Number of candidates dropped as bad, not left out by definition (`FILTERED`)."""
        return sum(count for cause, count in self.dropped.items() if cause not in FILTERED)

    @property
    def bad_share(self) -> float:
        """Share of all candidates read that were dropped as bad, in [0, 1]. Those left out by definition count as read."""
        return self.bad / self.read if self.read else 0.0

    def check(self) -> None:
        """Raises `AssertionError` if kept + dropped is not read: a bug in this package, not in the data."""
        total = self.kept + sum(self.dropped.values())
        if total != self.read:
            raise AssertionError(f"{self.source}: read {self.read} candidates, but kept + dropped = {total}: {self.dropped}")
        if self.sources and sum(source.kept for source in self.sources.values()) != self.kept:
            raise AssertionError(f"{self.source}: the pairs kept by the sources do not add up to the total: {self.sources}")

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        report = dataclasses.asdict(self)
        sources = {name: source.to_json() for name, source in self.sources.items()}
        return (
            report | {"sources": sources} if sources else {name: value for name, value in report.items() if name != "sources"}
        )

    def copy(self) -> DataReport:
        """An independent copy."""
        return copy.deepcopy(self)

    def reasons(self) -> str:
        """Lines with place and reason of the first three dropped candidates of every cause."""
        return printable("".join(f"    {line}\n" for lines in self.examples.values() for line in lines[:3]))

    def summary(self) -> str:
        """The report as a small text table."""
        lines = [f"{self.source} [{self.split}] as {self.format}: {self.rows} rows in {len(self.files)} files"]
        counts = {"read": self.read, "kept": self.kept}
        counts |= {f"dropped, {cause}": count for cause, count in sorted(self.dropped.items())}
        counts |= {f"truncated, {what}": count for what, count in sorted(self.truncated.items())}
        counts |= {"images": self.images} if self.images else {}
        width = max(map(len, counts))
        lines += [f"  {name:<{width}}  {count:>9,}" for name, count in counts.items()]
        for name, source in self.sources.items():
            lines.append(f"  source {name}: weight {source.weight:g}, {source.read:,} read, {source.kept:,} kept")
        lines += [f"  note: {note}" for note in self.notes]
        return printable("\n".join(lines))


class Triage:
    """Handling of bad rows: call `reject` for each one, then `finish` with the number kept."""

    def __init__(self, report: DataReport, *, on_bad: OnBad) -> None:
        if on_bad not in ("refuse", "drop"):
            raise ValueError(f"on_bad must be 'refuse' or 'drop', got {on_bad!r}")
        self.report, self.on_bad = report, on_bad
        self._refused: dict[Cause, int] = {}
        self._first: list[str] = []

    def reject(self, where: str, problem: BadRow) -> None:
        """Counts one candidate at `where` as dropped and, unless it is left out by definition, records it for the refusal."""
        self.report.add(where, problem)
        if self.on_bad == "refuse" and problem.cause not in FILTERED:
            self._refused[problem.cause] = self._refused.get(problem.cause, 0) + 1
            if len(self._first) < 10:
                self._first.append(f"{where}: {problem}")

    def finish(self, kept: int) -> None:
        """Checks the counts. Raises `DataError`, listing the first ten bad rows and counts by cause, if `on_bad` is
        "refuse"."""
        self.report.kept = kept
        self.report.check()
        if not self._refused:
            return
        total = sum(self._refused.values())
        counts = ", ".join(f"{cause} {count}" for cause, count in sorted(self._refused.items()))
        listed = "\n".join(f"  {line}" for line in self._first)
        remedies = {Cause.CHAT_TEMPLATE: "Use another chat template", Cause.NO_ROOM: "Raise this limit"}
        remedy = remedies.get(next(iter(self._refused)), "Fix these rows") if len(self._refused) == 1 else "Fix these rows"
        more = f"\n  ... and {total - len(self._first)} more" if total > len(self._first) else ""
        raise DataError(
            f"{total} of {self.report.read} rows cannot be used ({counts}):\n{listed}{more}\n"
            f"{remedy}, or drop and count such rows with --data.on-bad drop.",
            causes=self._refused,
        )


class PreferenceSet(Sequence[Preference]):
    """Preferences in the order of their files, with their `report`. Uids are unique."""

    def __init__(self, preferences: Iterable[Preference], report: DataReport) -> None:
        self._preferences = tuple(preferences)
        self.report = report
        if len({preference.uid for preference in self._preferences}) != len(self._preferences):
            raise ValueError("two preferences have the same uid")

    def __len__(self) -> int:
        return len(self._preferences)

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Preference]: ...
    def __getitem__(self, index: int | slice) -> Preference | Sequence[Preference]:
        return self._preferences[index]

    def take(self, limit: int | None) -> PreferenceSet:
        """The first `limit` preferences (`None`: all); the rest is counted as dropped in the report."""
        report = self.report.copy()
        if limit is None or limit >= len(self):
            return PreferenceSet(self, report)
        for preference in self._preferences[limit:]:
            report.add(preference.uid, BadRow(Cause.OVER_LIMIT, f"beyond the first {limit}"))
        report.kept = limit
        report.check()
        return PreferenceSet(self._preferences[:limit], report)


MAX_CHARACTERS = 1_000_000
"""Longest text of a pair: hundreds of times a model's context, yet tokenized in reasonable time."""


def check_length(text: str, *, field: str, most: int = MAX_CHARACTERS) -> None:
    """Raises `BadRow` for a text longer than `most` characters."""
    if len(text) > most:
        raise BadRow(Cause.TOO_LONG, f"{len(text):,} characters, but the limit is {most:,}", field=field)


def check_pair(prompt: str, chosen: str, rejected: str) -> None:
    """Raises `BadRow` if the texts form no preference: blank prompt, blank or overlong completion, or equal completions."""
    check_prompt(prompt)
    check_completion(chosen, field="chosen")
    check_completion(rejected, field="rejected")
    check_different(chosen, rejected)


def check_prompt(prompt: str) -> None:
    """Raises `BadRow` for a blank or overlong prompt."""
    check_length(prompt, field="prompt")
    if not prompt.strip():
        raise BadRow(Cause.NO_PROMPT, "the prompt is blank", field="prompt")


def check_completion(text: str, *, field: str) -> None:
    """Raises `BadRow` for a blank or overlong completion."""
    check_length(text, field=field)
    if not text.strip():
        raise BadRow(Cause.EMPTY, "the completion is empty or blank", field=field)


def check_different(chosen: str, rejected: str) -> None:
    """Raises `BadRow` for completions that cannot be distinguished."""
    if chosen == rejected:
        raise BadRow(Cause.IDENTICAL, "chosen and rejected are the same text")
