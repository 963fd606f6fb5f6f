"""Table 2 as rows of text, from `agreement.json`, for `dpo-jax agree` and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Column = Mapping[str, Any]  # a study: the content of its agreement.json
INTERVALS = "95 % intervals over items: Wilson's of shares, bootstrap of kappa"


def table_rows(columns: Sequence[Column]) -> list[list[str]]:
    """Rows of the paper's table, and counts of what was set aside: a label, then a cell per study. Row 0 names the methods."""
    judges = list(dict.fromkeys(name for column in columns for name in column["judges"]))
    rows = [["", *(f"{column['names']['a']} / {column['names']['b']}" for column in columns)]]

    def row(label: str, cell: Callable[[Column], str]) -> None:
        rows.append([label, *(cell(column) for column in columns)])

    def of_judge(name: str, shown: Callable[[Column], str], *measure: str) -> Callable[[Column], str]:
        def cell(column: Column) -> str:
            found = column["judges"].get(name)  # None if the study did not use this judge
            for part in measure if found else ():
                found = found[part]
            return shown(found) if found else "-"

        return cell

    row("raters", lambda c: f"{c['people']['raters']}")
    row("N respondents", lambda c: f"{c['people']['kept']}")
    row("  nearly identical, set aside", lambda c: f"{c['people']['ties']}")
    row("  items", lambda c: f"{c['people']['items']}")
    for name in judges:
        row(f"{name} win %", of_judge(name, _percent, "win"))
    row("Human win %", lambda c: _percent(c["people"]["win"]))
    row("  by majority of an item", lambda c: _percent(c["people"]["majority_win"]))
    for name in judges:
        row(f"{name}-H agree %", of_judge(name, _percent, "with_people", "agree"))
        row("  Cohen's kappa", of_judge(name, _number, "with_people", "kappa"))
        row("  with the majority %", of_judge(name, _percent, "with_majority", "agree"))
    row("H-H agree %", lambda c: _percent(c["people"]["with_people"]["agree"]))
    row("  Cohen's kappa", lambda c: _number(c["people"]["with_people"]["kappa"]))
    row("preferred the first text %", lambda c: _percent(c["people"]["first"]))
    return rows


def _percent(estimate: Mapping[str, Any]) -> str:
    return _shown(estimate, 100, ".1f")


def _number(estimate: Mapping[str, Any]) -> str:
    return _shown(estimate, 1, ".2f")


def _shown(estimate: Mapping[str, Any], factor: float, spec: str) -> str:
    if estimate["value"] is None:
        return "-"
    value, low, high = (None if estimate[name] is None else factor * estimate[name] for name in ("value", "low", "high"))
    return f"{value:{spec}}" + ("" if low is None or high is None else f" ({low:{spec}} to {high:{spec}})")
