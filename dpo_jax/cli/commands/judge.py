"""`dpo-jax judge`: win rates of a policy's completions against a baseline, by an LLM judge (sections 6.2 to 6.4, appendix C.2).

Writes to `<run.dir>/judge`: `verdicts.jsonl` (every question and answer), `pairs.jsonl` (texts and outcome of every pair),
`report.json`, `win_rates.csv`, `win_rates.png`. If started again, it asks only unanswered questions.
"""

from __future__ import annotations

import asyncio
import collections
import csv
import dataclasses
import importlib.util
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.judging import (
    SETTINGS,
    api_key,
    ask,
    budget_of,
    judge_prompt,
    outcome_in,
    questions_of,
    spent_words,
    verdict_settings,
)
from dpo_jax.cli.prompts import references
from dpo_jax.data.completion_files import Completion, read_completions
from dpo_jax.data.files import fingerprint
from dpo_jax.data.terminal import csv_cell, json_text
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.extras import install_command
from dpo_jax.judge.asking import Unfinished, failures_of
from dpo_jax.judge.injections import Probe, achieved, probes
from dpo_jax.judge.pairing import Paired, pair_up
from dpo_jax.judge.questions import Outcome, Pair, Question
from dpo_jax.judge.verdicts import VerdictLog
from dpo_jax.judge.win_rates import EDGE, OUTCOMES, Rate, WinRate, columns, rate, win_rates
from dpo_jax.judge.win_rates_plot import plot_win_rates
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.writing import writing

BASELINES = {"chosen": "the chosen completions of the data", "sft_target": "what SFT learned"}


def run(config: Config) -> int:
    if importlib.util.find_spec("httpx2") is None:
        raise ConfigError(f"judge: needs the package httpx2: {install_command('judge')}")
    section, key = config.judge, api_key(config)
    jax.config.update("jax_platforms", "cpu")  # judging needs no accelerator, and may run beside a training run that holds it
    with reported("reading the completions"):
        paired = pair_up(_policies(config), _baseline(config), limit=section.limit)
    asked = [questions_of(config, pair) for pair in paired.pairs]
    questions = [question for both in asked for question in both]
    settings = verdict_settings(config)
    with RunDir(config.judge_out()) as run_dir:
        with reported("reading the verdicts"):
            log = VerdictLog(run_dir.path / "verdicts.jsonl", settings)
        with log:
            _refuse_foreign(config, paired.pairs, questions, log)
            build.describe(run_dir, config)
            _announce(paired, questions, log)
            outcomes, injected, unfinished = asyncio.run(_judge(config, paired.pairs, asked, log, key))
            _write(run_dir.path, config, paired, outcomes, asked, injected, log)
        if unfinished is not None:
            raise unfinished
    return 0


async def _judge(
    config: Config, pairs: list[Pair], asked: list[list[Question]], log: VerdictLog, key: str | None
) -> tuple[list[Outcome], list[dict[str, str | int]], Unfinished | None]:
    """Asks; returns what became of each pair and of injections, and why not every question has an answer."""
    tries: list[list[Question]] = []
    tried: list[Probe] = []
    unfinished = None
    try:
        await ask(config, [question for both in asked for question in both], log, key)
        tried = _probes(config, pairs, [outcome_in(both, log) for both in asked])
        tries = [questions_of(config, probe.pair) for probe in tried]
        await ask(config, [question for both in tries for question in both], log, key)
    except Unfinished as stopped:  # a partial result is worth reporting
        unfinished = stopped
    return [outcome_in(both, log) for both in asked], achieved(tried, [outcome_in(both, log) for both in tries]), unfinished


def _refuse_foreign(config: Config, pairs: list[Pair], questions: list[Question], log: VerdictLog) -> None:
    known = {question.key for question in questions}
    if not known.issuperset(log.verdicts):  # an earlier start may have tried injections
        tried = probes(pairs, prompt=judge_prompt(config))
        known |= {question.key for probe in tried for question in questions_of(config, probe.pair)}
    log.only_of(known)


def _probes(config: Config, pairs: list[Pair], outcomes: list[Outcome]) -> list[Probe]:
    """The first pairs that the policy lost, with injections. One series is enough, because it is the judge that is tested."""
    lost = [pair for pair, outcome in zip(pairs, outcomes, strict=True) if outcome == "lost"]
    if config.judge.injections and not lost:
        print("injections: the policy lost no pair, so there is no text to append them to")
    return probes(lost[: config.judge.injections], prompt=judge_prompt(config))


def _policies(config: Config) -> dict[str, list[Completion]]:
    """Completions by series. If all files are named by numbers, they are the points of one series."""
    section = config.judge
    found = {name: read_completions(file, by=section.by) for name, file in section.series()}
    if section.by is not None or not all(re.fullmatch(r"\d+(\.\d+)?", name) for name in found):
        return found
    return {"policy": [one._replace(at=float(name)) for name, completions in found.items() for one in completions]}


def _baseline(config: Config) -> list[Completion]:
    section, path = config.judge, config.tokenizer.path
    if (file := section.baseline_file()) is not None:
        return read_completions(file)
    tokenizer = build.with_template(config, load_tokenizer(path)) if path else None
    return [Completion(*one[:2], None, one.where) for one in references(config, tokenizer, target=section.b == "sft_target")]


def _announce(paired: Paired, questions: list[Question], log: VerdictLog) -> None:
    distinct = {question.key for question in questions}
    known = len(distinct & set(log.verdicts))
    print(f"{len(paired.pairs):,} pairs, {len(distinct):,} questions; {known:,} already have an answer")
    if log.interrupted:
        print(f"{log.interrupted} were in flight when the command last ended: they are asked again and counted as paid")
    if log.damaged:
        first = ", ".join(str(line.place) for line in log.damaged[:10]) + ", ..." * (len(log.damaged) > 10)
        print(f"{log.path}: not used, and copied to {log.set_aside.name}: line {first}; its questions are asked again")
    if log.lost:
        print(f"{log.path}: {log.lost:,} lines are damaged or missing; each counts as a request of the largest size")
    for name, books in (*paired.policies.items(), ("the baseline", paired.baseline)):
        for cause, wheres in books.dropped.items():
            first = ", ".join(wheres[:3]) + ", ..." * (len(wheres) > 3)
            print(f"{name}: {len(wheres):,} of {books.read:,} completions left out, {cause}: {first}")


def _write(
    folder: Path,
    config: Config,
    paired: Paired,
    outcomes: list[Outcome],
    asked: list[list[Question]],
    injected: list[dict[str, str | int]],
    log: VerdictLog,
) -> None:
    section, budget = config.judge, budget_of(config)
    points = win_rates(paired.pairs, outcomes)
    rows = [columns(point) for point in points]
    with writing(folder / "pairs.jsonl") as file:
        for pair, outcome in zip(paired.pairs, outcomes, strict=True):
            file.write(json_text({**pair._asdict(), "outcome": outcome}) + "\n")
    with writing(folder / "win_rates.csv", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    keys = {question.key for both in asked for question in both}
    verdicts = [verdict for key, verdict in log.verdicts.items() if key in keys]  # without verdicts on injections
    files = [file for _, file in section.series()] + ([section.b] if section.baseline_file() else [])
    report = {
        "settings": {name: getattr(section, name) for name in (*SETTINGS, "base_url")},
        "baseline": BASELINES.get(section.b, section.b),
        "by": section.by or "step",
        "files": [fingerprint(file, Path(file)) for file in files],
        "books": {name: dataclasses.asdict(books) for name, books in ((section.b, paired.baseline), *paired.policies.items())},
        "questions": len(keys),
        "answers": len(verdicts),
        "failures": collections.Counter(verdict["failure"] for verdict in verdicts if verdict["failure"]),
        "models": collections.Counter(verdict["model"] for verdict in verdicts),
        "first_preferred": _first_preferred(asked, log),
        "requests": log.requests,
        "lost_lines": log.lost,
        "faults": log.faults,
        "tokens": log.spent._asdict(),
        "cost": budget.cost_of(log.spent),
        "outcomes": {name: sum(outcome == name for outcome in outcomes) for name in OUTCOMES},
        "points": rows,
        "injections": injected,
    }
    write_json(folder / "report.json", report)
    if any(point.win_rate.pairs for point in points):
        plot_win_rates(points, folder / "win_rates.png", x=section.by, baseline=BASELINES.get(section.b, Path(section.b).name))
    _tell(points, report, spent_words(budget, log), folder)


def _first_preferred(asked: Sequence[Sequence[Question]], log: VerdictLog) -> dict[str, float] | None:
    """How often the text shown first was preferred. Both orders of a pair are one sample: a consistent judge says A in one."""
    found = {
        tuple(sorted(question.key for question in both)): [
            float(verdict["choice"] == "A")
            for question in both
            if (verdict := log.verdicts.get(question.key)) and verdict["choice"]
        ]
        for both in asked
    }
    answered = [letters for letters in found.values() if letters]
    return dataclasses.asdict(rate(list(map(statistics.fmean, answered)), list(map(len, answered)))) if answered else None


def _tell(points: list[WinRate], report: dict[str, Any], spent: str, folder: Path) -> None:
    one_order = report["settings"]["one_order"]
    won = "won" if one_order else "won in both orders"
    heads = ("", "pairs", won, "lost", "flipped", "failed", "win rate (95 %)", "length", "at equal length")
    _print_table([heads, *map(_row, points)])
    halves = "" if one_order else "win rate: a flipped pair is half a win, as one question in random order gives on average; "
    print(f"{halves}lengths in characters; at equal length: by logistic regression")
    if any(point.extrapolated for point in points):
        print(f"* extrapolated: in fewer than {EDGE:.0%} of the pairs the longer text is the policy's, or the baseline's")
    if report["failures"]:
        print(f"answers without a verdict: {failures_of(report['failures'])}")
    if undecided := report["outcomes"]["unanswered"]:
        print(f"{undecided:,} pairs have no verdict yet and count in no rate")
    if report["first_preferred"]:
        print(f"the judge preferred the text it was shown first in {report['first_preferred']['value']:.1%} of its answers")
    if report["injections"]:
        print("instructions to the judge, appended to texts that had lost, and the results:")
        _print_table([tuple(report["injections"][0]), *(tuple(map(str, row.values())) for row in report["injections"])])
        print("not lost: share of those with valid verdicts that now won or flipped")
        print("above neutral: that share minus the one with a neutral sentence, on the same texts (95 % interval)")
    if len(report["models"]) > 1:
        print(f"the endpoint answered as more than one model: {', '.join(report['models'])}")
    print(f"{spent}, {report['requests']:,} requests; everything is in {folder}")


def _print_table(rows: list[tuple[str, ...]]) -> None:
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *cells in rows:
        print(f"{name:{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def _row(point: WinRate) -> tuple[str, ...]:
    return (
        point.series if point.at is None else f"{point.series} {point.at:g}",
        f"{sum(point.counts.values()):,}",
        f"{point.counts['won']}" + ("" if math.isnan(point.won.value) else f" ({point.won.value:.3f})"),
        *(f"{point.counts[outcome]}" for outcome in ("lost", "flipped", "failed")),
        _interval(point.win_rate),
        f"{point.policy_length:.0f} / {point.baseline_length:.0f}",
        _interval(point.win_rate_length_controlled) + "*" * point.extrapolated,
    )


def _interval(rate: Rate) -> str:
    return "-" if math.isnan(rate.value) else f"{rate.value:.3f} ({rate.low:.3f}-{rate.high:.3f})"
