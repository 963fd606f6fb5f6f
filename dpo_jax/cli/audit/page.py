"""The audit as one page of text, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpo_jax.cli.config import Config
from dpo_jax.data.terminal import one_line, printable
from dpo_jax.data.token_text import SEPARATOR, marked, rows_of
from dpo_jax.report.audit import verdict_sentences

WIDTH = 80
REASONS = 6  # dropped rows that are shown
EXAMPLE = {"prompt": 180}  # characters of the example's prompt; 120 of its completions


def page(config: Config, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The printed report of `dpo-jax audit`. Safe to print: escape sequences in the data are shown as text."""
    train = reports[config.data.train_split]
    notes = verdict_sentences(reports)
    lines = [
        *_wrapped(f"{train['source']} as {train['format']}"),
        *_counts(reports),
        *_sources(reports),
        *_examples(reports),
        *_reasons(reports),
        "",
        *_lengths(reports),
        "",
        *_template(train),
        *_example(train["example"]),
        "",
        *(line for note in notes for line in _wrapped(note, first="note: ")),
        *([] if notes else ["nothing to note"]),
    ]
    return printable("\n".join(lines), keep="\n")


def _wrapped(text: str, *, first: str = "", indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _counts(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Row counts, one column per split."""

    def row(name: str, cell: Callable[[Mapping[str, Any]], str]) -> str:
        return f"  {name:<42}" + "".join(f"{cell(report):>18}" for report in reports.values())

    def finding(group: str, name: str) -> Callable[[Mapping[str, Any]], str]:
        def cell(report: Mapping[str, Any]) -> str:
            found = report.get(group, {}).get(name)
            return "-" if found is None else f"{found['pairs']:,} ({found['share']:.1%})"

        return cell

    def value(group: str, name: str, form: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda report: "-" if (found := report.get(group)) is None else f"{found[name]:{form}}"

    yield f"  {'':<42}" + "".join(f"{one_line(split)[:17]:>18}" for split in reports)
    yield row("rows read", lambda report: f"{report['read']:,}")
    yield row("kept", lambda report: f"{report['kept']:,}")
    for cause in sorted({cause for report in reports.values() for cause in report["dropped"]}):
        yield row(f"dropped, {cause}", lambda report, cause=cause: f"{report['dropped'].get(cause, 0):,}")
    if any(report.get("images") for report in reports.values()):
        yield row("different images in prompts", lambda report: f"{report['images']:,}")
    yield row("exact duplicates", finding("repeats", "duplicates"))
    yield row("contradictions: sides swapped", finding("repeats", "contradictions"))
    yield row("chosen here, rejected elsewhere", finding("repeats", "both_sides"))
    yield row("pairs also in train", finding("overlap", "pairs"))
    yield row("pairs also in train, sides swapped", finding("overlap", "swapped"))
    yield row("prompts also in train", finding("overlap", "prompts"))
    # One split may hold single completions and the other pairs.
    if any("labels" in report for report in reports.values()):
        yield row("desirable", value("labels", "desirable", ","))
        yield row("undesirable", value("labels", "undesirable", ","))
    if any(report["longer_wins"] for report in reports.values()):
        yield row("chosen is longer", value("longer_wins", "chosen_longer", ".1%"))
        yield row('accuracy of "the longer one wins"', value("longer_wins", "accuracy", ".3f"))


def _sources(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What each source of a mixture contributes to a split, with weights applied."""
    for split, report in reports.items():
        for name, one in report.get("sources", {}).items():
            words = f"weight {one['weight']:g}, as {one['format']}: {one['read']:,} read, {one['kept']:,} kept"
            if "pairs_share" in one:
                words += f": {one['pairs_share']:.1%} of the pairs, {one['tokens_share']:.1%} of the tokens"
            yield from _wrapped(one_line(words), first=f"  {one_line(split)}, {one_line(name)}: ", indent="    ")


EXAMPLES_OF = {
    "duplicates": "duplicates",
    "contradictions": "contradictions",
    "both_sides": "chosen and rejected",
    "pairs": "also in train",
    "swapped": "swapped in train",
    "prompts": "prompt in train",
}


def _examples(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The first three places of each kind of finding. A place with several is listed only under the worst kind."""
    for split, report in reports.items():
        found = report["repeats"] | report.get("overlap", {})
        shown: set[frozenset[str]] = set()
        for kind, name in EXAMPLES_OF.items():
            examples = [one for one in found.get(kind, {}).get("examples", ()) if frozenset(one.split(" with ")) not in shown]
            shown |= {frozenset(one.split(" with ")) for one in examples}
            if examples:
                yield from _wrapped(one_line("; ".join(examples)), first=f"  {split}, {name}: ", indent="    ")


def _reasons(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Where rows were dropped, and the notes of the file readers."""
    told = [line for report in reports.values() for lines in report["examples"].values() for line in lines[:2]]
    yield from (_cut(one_line(f"  {line}")) for line in told[:REASONS])
    notes = dict.fromkeys(note for report in reports.values() for note in report["notes"])
    yield from (_cut(one_line(f"  {note}")) for note in [*notes][:REASONS])


def _lengths(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    columns = list(next(iter(reports.values()))["lengths"]["prompt"])
    yield f"  {'tokens':<22}" + "".join(f"{name:>8}" for name in columns) + f"{'cut':>16}"
    for split, report in reports.items():
        for name in report["lengths"]:
            sizes, cut = report["lengths"][name], report["cut"][name]
            lost = f"{cut['tokens']:,} ({cut['share']:.1%})" if cut["tokens"] else "0"
            yield f"  {f'{one_line(split)[:12]} {name}':<22}" + "".join(f"{sizes[c]:>8,.0f}" for c in columns) + f"{lost:>16}"
    rows = [(split, report["packing"]) for split, report in reports.items()]
    _, of_train = rows[0]
    padding = ", ".join(f"{split} {one['padding']:.0%}" for split, one in rows)
    yield from _wrapped(
        f"rows of {of_train['length']} tokens ({of_train['layout']}); padding at {of_train['batch']} pairs a step: {padding}",
        first="  ",
        indent="    ",
    )


def _template(report: Mapping[str, Any]) -> Iterator[str]:
    """BOS handling, and the chat template's effect, if it is used."""
    bos, kept = report["bos"], report["kept"]
    begin = f"{bos['pairs']:,} of {kept:,} prompts begin" if 0 < bos["pairs"] < kept else "prompts begin"
    yield f"  {begin} with BOS, {bos['token']!r}" if bos["pairs"] else "  prompts do not begin with BOS"
    template = report["template"]
    if template is None or not report["conversations"]:
        return
    parts = [
        f"system message {template['system']}",
        f"earlier turns {template['earlier_turns']}",
        f"<think> {template['reasoning']}",
        f"date {template['date']!r}" if template["date"] is not None else "no date",
        f"generation prompt {template['generation_prompt']!r}",
        f"a turn ends with {template['turn_end']!r}",
        *(["white space trimmed"] if template["trims"] else []),
    ]
    yield from _wrapped("; ".join(parts), first="  chat template: ", indent="    ")


def _example(example: Mapping[str, Any]) -> Iterator[str]:
    """Prompt, chosen and rejected as tokens. Tokens that the loss counts are in brackets."""
    label = "" if "desirable" not in example else f", {'' if example['desirable'] else 'un'}desirable"
    yield _cut(one_line(f"  {example['uid']}{label}, tokens separated by {SEPARATOR}, scored ones in [ ]"))
    for name in (name for name, part in example.items() if isinstance(part, Mapping)):
        strings = marked(example[name]["tokens"], example[name]["scored"], EXAMPLE.get(name, 120))
        for number, line in enumerate(rows_of(strings, WIDTH - 13)):
            yield f"  {'' if number else name:<11}{line}"
