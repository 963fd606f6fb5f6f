"""Report section on the findings of `dpo-jax audit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.token_text import marked
from dpo_jax.report.page import Block, Notice, Section, Table
from dpo_jax.report.run_record import RunRecord, of, one_or_more

FOUND = (
    ("exact duplicates", "repeats", "duplicates"),
    ("contradictions: an earlier pair, sides swapped", "repeats", "contradictions"),
    ("chosen here, rejected elsewhere", "repeats", "both_sides"),
    ("pairs also in the train split", "overlap", "pairs"),
    ("the same, sides swapped", "overlap", "swapped"),
    ("prompts also in the train split", "overlap", "prompts"),
)
LABELS = ("desirable", "undesirable")
SERIOUS = (
    "loss",
    "labels",
    "overlap",
    "contradictions",
    "bad rows",
    "duplicates",
    "bos",
    "template",
    "date",
    "reasoning",
    "cut",
    "length",
)


def verdict_sentences(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Notes on all splits, most serious first. Notes with the same subject and remedy are merged into one sentence."""
    found: dict[tuple[str, str], list[str]] = {}
    for report in reports.values():
        for note in report["verdict"]:
            found.setdefault((note["about"], note["remedy"]), []).append(note["found"])
    last = len(SERIOUS)
    order = sorted(found, key=lambda note: SERIOUS.index(note[0]) if note[0] in SERIOUS else last)
    return [f"{'; '.join(found[note])}: {note[1]}" for note in order]


def audited(runs: Sequence[RunRecord]) -> Section | None:
    """The verdict, the counts of each split, and one pair as tokens, for the audited runs."""
    blocks: list[Block] = []
    for run, stage in one_or_more(runs, "audit"):
        splits = {split: report for split, report in stage.data.items() if "verdict" in report}  # older reports have none
        if not splits:
            continue
        blocks += [Notice(of(run, runs, words)) for words in verdict_sentences(splits)]
        blocks.append(_counts(of(run, runs, "What the audit counted"), splits))
        blocks += _sources(of(run, runs, "Sources"), splits)
        examples = [
            [of(run, runs, split), what, "; ".join(found["examples"])]
            for split, report in splits.items()
            for what, group, name in FOUND
            if (found := report.get(group, {}).get(name, {})).get("examples")
        ]
        if examples:
            blocks.append(Table(["split", "what", "the first three"], examples))
        blocks.append(_lengths(of(run, runs, "Tokens"), splits))
        blocks += [_example(report["example"]) for report in splits.values() if "example" in report]
    return Section("Data audit", blocks) if blocks else None


def _counts(caption: str, splits: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [[what, *(_finding(report.get(group, {}).get(name)) for report in splits.values())] for what, group, name in FOUND]
    labels, rules = ([report.get(name) for report in splits.values()] for name in ("labels", "longer_wins"))
    if any(labels):
        rows += [[what, *(str((found or {}).get(what, "-")) for found in labels)] for what in LABELS]
    if any(rules):
        shares = [f"{rule['accuracy']:.3f} ({rule['low']:.3f} to {rule['high']:.3f})" if rule else "-" for rule in rules]
        rows.append(["chosen is longer", *(f"{rule['chosen_longer']:.1%}" if rule else "-" for rule in rules)])
        rows.append(['accuracy of "the longer one wins"', *shares])
    note = "Completions are compared by their token ids." + (" Intervals: 95 %." if any(rules) else "")
    return Table(["what", *splits], rows, caption=caption, note=note)


def _sources(caption: str, splits: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    rows = [
        [f"{split}, {name}", f"{one['weight']:g}", one["format"], *(f"{one[count]:,}" for count in ("read", "kept"))]
        + [f"{one[share]:.1%}" if share in one else "-" for share in ("pairs_share", "tokens_share")]
        for split, report in splits.items()
        for name, one in report.get("sources", {}).items()
    ]
    columns = ["source", "weight", "format", "read", "kept", "of the pairs", "of the tokens"]
    return [Table(columns, rows, caption=caption)] if rows else []


def _finding(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{found['pairs']:,} ({found['share']:.1%})"


def _lengths(caption: str, splits: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for split, report in splits.items():
        for name, sizes in report["lengths"].items():
            cut = report["cut"].get(name, {"tokens": 0, "share": 0.0})
            lost = f"{cut['tokens']:,} ({cut['share']:.1%})"
            rows.append([f"{split}, {name}", *(f"{value:,.0f}" for value in sizes.values()), lost])
    columns = ["part", *next(iter(splits.values()))["lengths"]["prompt"], "cut by the limits"]
    return Table(columns, rows, caption=caption)


def _example(example: Mapping[str, Any]) -> Table:
    rows = []
    for name, part in example.items():
        if not isinstance(part, Mapping):
            continue
        tokens, scored = part["tokens"], part["scored"]
        every = isinstance(scored, bool)
        told = ("yes" if scored else "no") if every else "in [ ]"
        rows.append([name, told, "·".join(tokens if every else marked(tokens, scored))])
    return Table(["part", "scored", "tokens"], rows, caption=f"{example['uid']} as the model reads it")
