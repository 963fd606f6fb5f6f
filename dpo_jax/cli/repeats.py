"""Reports duplicates, contradictions and train/test overlap, and enforces their limits in section `data`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dpo_jax.cli.config import Config
from dpo_jax.data.pairs import DataError
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.data.repeats import Finding, Overlap, Repeats, find_overlap, find_repeats
from dpo_jax.data.terminal import one_line


class Found(NamedTuple):
    train: Repeats
    test: Repeats
    overlap: Overlap


def look_for_repeats(train: EncodedSet, test: EncodedSet) -> Found:
    return Found(find_repeats(train), find_repeats(test), find_overlap(test, train))


def check_repeats(config: Config, train: EncodedSet, test: EncodedSet) -> None:
    """Prints one line if repeats distort held-out numbers, and notes it in the report of each split.

    Raises `DataError` if the limits are exceeded.
    """
    found = look_for_repeats(train, test)
    refuse_repeats(config, found)
    words = []
    for split, repeats in ((train, found.train), (test, found.test)):
        if repeats.contradictions.pairs:
            words.append(f"{_counted(repeats.contradictions, split)} contradict an earlier one")
            split.report.notes.append(words[-1])
    if found.overlap.prompts.pairs:
        same = found.overlap.pairs.pairs
        words.append(f"{_counted(found.overlap.prompts, test)} have a prompt of {train.report.split}")
        words[-1] += f" ({same:,} the same pair)" if same else ""
        test.report.notes.append(words[-1])
    if words:
        print(f"note: held-out numbers mean less: {', '.join(words)}; see dpo-jax audit", flush=True)


def _counted(finding: Finding, split: EncodedSet) -> str:
    return f"{finding.pairs:,} of {finding.of:,} {split.report.split} pairs"


def refuse_repeats(config: Config, found: Found) -> None:
    """Raises `DataError`, naming the option, for each limit that is exceeded."""
    problems = [
        f"--data.{option.replace('_', '-')} {limit:g}: {finding.share:.1%} of the {name} pairs ({finding.pairs:,}) {what}: "
        f"{one_line('; '.join(finding.examples))}"
        for option, name, finding, what in _limited(config, found)
        if (limit := getattr(config.data, option)) is not None and finding.share > limit
    ]
    if problems:
        raise DataError("\n".join([*problems, "Remove these pairs, or raise the limit."]), causes=[])


def _limited(config: Config, found: Found) -> Iterator[tuple[str, str, Finding, str]]:
    for name, repeats in ((config.data.train_split, found.train), (config.data.test_split, found.test)):
        yield "max_duplicates", name, repeats.duplicates, "repeat an earlier pair"
        yield "max_contradictions", name, repeats.contradictions, "are an earlier pair with chosen and rejected swapped"
    yield "max_overlap", config.data.test_split, found.overlap.prompts, f"have a prompt of {config.data.train_split}"
