"""Win rates by a judge and Table 2 by people, as a report shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.evals.agreement_table import INTERVALS, table_rows
from dpo_jax.evals.report_page import Block, Figures, Section, Table, Text
from dpo_jax.evals.run_record import RunRecord, Stage, of, one_or_more, read_object

READING = (
    "Win rate: a flipped pair, where the judge named the same letter in both orders, is half a win. Failed: no answer in the "
    "format. Lengths are mean characters, policy / baseline. At equal length: pairs whose lengths differ by a tenth at most; "
    "length-controlled: by logistic regression, extrapolated where nearly all texts of one side are longer. Brackets: 95 % "
    "intervals."
)


def judged(runs: Sequence[RunRecord]) -> Section | None:
    """Of each folder of a judge its figure, table and books; of people the table of `dpo-jax agree`."""
    blocks: list[Block] = []
    for run, stage in one_or_more(runs, "judge"):
        if stage.report:
            blocks += _judge(of(run, runs, stage.name), stage)
    for run, stage in one_or_more(runs, "agree"):
        column = stage.read("agreement.json", read_object, {})
        if column:
            (_, names), *rows = table_rows([column])
            caption = of(run, runs, "People (Table 2 of the paper)")
            blocks.append(
                Table(["", names], [[label.strip(), cell] for label, cell in rows], caption=caption, note=f"{INTERVALS}.")
            )
    return Section("Win rates and ratings", blocks) if blocks else None


def _judge(name: str, stage: Stage) -> list[Block]:
    report = stage.report
    settings, points = report["settings"], report["points"]
    figure = stage.path / "win_rates.png"
    blocks: list[Block] = [Figures([(figure, f"{name}: win rates")], wide=True)] if figure.is_file() else []
    at = report["by"] if any(point["at"] is not None for point in points) else None
    columns = [
        "policy",
        *([at] if at else []),
        "pairs",
        "win rate",
        "won in both orders",
        "lost",
        "flipped",
        "failed",
        "length",
    ]
    columns += ["at equal length", "length-controlled"]
    if settings["one_order"]:
        columns = [column.replace("won in both orders", "won") for column in columns if column != "flipped"]
    rows = [[_cell(column, point, at) for column in columns] for point in points]
    caption = f"{name}: against {Path(report['baseline']).name}, by {settings['model']} ({settings['prompt']})"
    blocks += [Table(columns, rows, caption=caption, note=READING), Text(_books(report))]
    if report["injections"]:
        rows = [[str(cell) for cell in row.values()] for row in report["injections"]]
        caption = f"{name}: words to the judge, put behind texts that had lost"
        blocks.append(Table(list(report["injections"][0]), rows, caption=caption))
    return blocks


def _cell(column: str, point: Mapping[str, Any], at: str | None) -> str:
    if column == at:
        return f"{point['at']:g}"
    if column == "length":
        return f"{point['policy_length']:.0f} / {point['baseline_length']:.0f}"
    if column == "at equal length":
        return f"{_rate(point, 'win_rate_at_equal_length')}, {point['pairs_at_equal_length']} pairs"
    if column == "length-controlled":
        return _rate(point, "win_rate_length_controlled") + (", extrapolated" if point["extrapolated"] else "")
    if column == "win rate":
        return _rate(point, "win_rate")
    return str(point[{"policy": "series", "won in both orders": "won"}.get(column, column)])


def _rate(point: Mapping[str, Any], name: str) -> str:
    value, low, high = (point[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "-" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _books(report: Mapping[str, Any]) -> str:
    """What was asked and what became of it, in words."""
    settings, first = report["settings"], report["first_preferred"]
    order = "in one order each, drawn by lot" if settings["one_order"] else "in both orders"
    fence = "texts fenced as data" if settings["fence"] else "texts not fenced"
    words = [
        f"{report['questions']:,} questions, {order}, {fence}; {report['answers']:,} answered by {', '.join(report['models'])}"
    ]
    if undecided := report["outcomes"]["unanswered"]:
        words.append(f"{undecided:,} pairs have no verdict yet, and count in no rate")
    if report["failures"]:
        words.append(f"failed answers: {_counts(report['failures'])}")
    if report["faults"]:
        words.append(f"faults of the endpoint, asked again: {_counts(report['faults'])}")
    if first:
        words.append(f"the text shown first was preferred in {first['value']:.1%} ({first['low']:.1%} to {first['high']:.1%})")
    left = {name: sum(map(len, books["dropped"].values())) for name, books in report["books"].items()}
    words += [f"left out, {Path(name).name}: {count:,} completions" for name, count in left.items() if count]
    cost = f", cost {report['cost']:,.2f}" if report["cost"] else ""
    words.append(f"{report['requests']:,} requests, {sum(report['tokens'].values()):,} tokens{cost}")
    return ". ".join(word[0].upper() + word[1:] for word in words) + "."


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(found.items()))
