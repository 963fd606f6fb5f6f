"""Report section on win rates by a judge, and on Table 2 by people."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.judge.asking import failures_of
from dpo_jax.report.page import Block, Figures, Section, Table, Text
from dpo_jax.report.record_shapes import AGREEMENT
from dpo_jax.report.run_record import RunRecord, Stage, of, one_or_more
from dpo_jax.study.agreement_table import INTERVALS, table_rows

READING = (
    "A pair is won by the policy in both orders, lost in both, or flipped: the judge named one letter twice. One without an "
    "answer in the format has failed. The win rate counts a flipped pair as half a win and leaves failed ones out. Lengths are "
    "mean characters. Of equal length are texts that differ by a tenth at most; length-controlled is a logistic regression, "
    "extrapolated where nearly all texts of one side are longer. Brackets: 95 % intervals."
)
COUNTS = ("won", "lost", "flipped", "failed")


def judged(runs: Sequence[RunRecord]) -> Section | None:
    """Figure, tables and counts for each judge folder; for ratings by people, the table of `dpo-jax agree`."""
    blocks: list[Block] = []
    for run, stage in one_or_more(runs, "judge"):
        if stage.report:
            blocks += _judge(of(run, runs, stage.name), stage)
    if blocks:
        blocks.insert(0, Text(READING))
    for run, stage in one_or_more(runs, "agree"):
        column = stage.read_object("agreement.json", AGREEMENT)
        if column:
            (_, names), *rows = table_rows([column])
            rows = [[label.strip(), cell] for label, cell in rows]
            caption = of(run, runs, "People (Table 2 of the paper)")
            blocks.append(Table(["", names], rows, caption=caption, note=f"{INTERVALS}."))
    return Section("Win rates and ratings", blocks) if blocks else None


def _judge(name: str, stage: Stage) -> list[Block]:
    report = stage.report
    settings, points = report["settings"], report["points"]
    title = f"{name}: against {Path(report['baseline']).name}, by {settings['model']} ({settings['prompt']})"
    figure = stage.path / "win_rates.png"
    drawn = os.path.isfile(figure) and len(points) > 1
    blocks: list[Block] = [Figures([(figure, f"{name}: win rates and lengths")], size="half")] if drawn else []
    counts = [column for column in COUNTS if not (settings["one_order"] and column == "flipped")]
    rows = [[f"{point['pairs']}", _rate(point, "win_rate"), *(f"{point[column]}" for column in counts)] for point in points]
    blocks.append(_table(report, ["pairs", "win rate", *counts], rows, caption=title))
    rows = [
        [
            f"{point['policy_length']:.0f} / {point['baseline_length']:.0f}",
            f"{point['pairs_at_equal_length']}",
            _rate(point, "win_rate_at_equal_length"),
            _rate(point, "win_rate_length_controlled") + ", extrapolated" * point["extrapolated"],
        ]
        for point in points
    ]
    columns = ["length / baseline's", "of equal length", "win rate of these", "length-controlled"]
    blocks += [_table(report, columns, rows, caption=f"{name}: length"), Text(_books(report))]
    if report["injections"]:
        rows = [[str(cell) for cell in row.values()] for row in report["injections"]]
        caption = f"{name}: instructions to the judge, appended to texts that had lost"
        blocks.append(Table(list(report["injections"][0]), rows, caption=caption))
    return blocks


def _table(report: Mapping[str, Any], columns: list[str], rows: list[list[str]], *, caption: str) -> Table:
    """Rows of the points, each with its policy and its position on the x-axis, if any."""
    points = report["points"]
    places = any(point["at"] is not None for point in points)
    heads = ["policy", report["by"].replace("_", " ")] if places else ["policy"]
    names = [[point["series"], *([f"{point['at']:g}"] if places else [])] for point in points]
    return Table([*heads, *columns], [name + row for name, row in zip(names, rows, strict=True)], caption=caption)


def _rate(point: Mapping[str, Any], name: str) -> str:
    value, low, high = (point[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "-" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _books(report: Mapping[str, Any]) -> str:
    """Counts of questions and their outcomes, in words."""
    settings, first = report["settings"], report["first_preferred"]
    order = "in one random order each" if settings["one_order"] else "in both orders"
    fence = "texts fenced as data" if settings["fence"] else "texts not fenced"
    words = [
        f"{report['questions']:,} questions, {order}, {fence}; {report['answers']:,} answered by {', '.join(report['models'])}"
    ]
    if undecided := report["outcomes"]["unanswered"]:
        words.append(f"{undecided:,} pairs have no verdict yet and count in no rate")
    if report["failures"]:
        words.append(f"answers without a verdict: {failures_of(report['failures'])}")
    if report["faults"]:
        words.append(f"faults of the endpoint, asked again: {_counts(report['faults'])}")
    if first:
        words.append(f"the text shown first was preferred in {first['value']:.1%} ({first['low']:.1%} to {first['high']:.1%})")
    _, *policies = report["books"].items()  # extra prompts of the baseline do not count as dropped
    left = {name: sum(map(len, books["dropped"].values())) for name, books in policies}
    words += [f"{count:,} completions of {name} were left out" for name, count in left.items() if count]
    cost = f", cost {report['cost']:,.2f}" if report["cost"] else ""
    words.append(f"{report['requests']:,} requests, {sum(report['tokens'].values()):,} tokens{cost}")
    return ". ".join(word[0].upper() + word[1:] for word in words) + "."


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(found.items()))
