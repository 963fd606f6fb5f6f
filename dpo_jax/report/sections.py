"""Sections of a report after the first, built from one or several run directories."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.display import shown_prompt
from dpo_jax.data.pairs import FILTERED
from dpo_jax.plotting.curves import KL_OF_SAMPLES, PANELS, series
from dpo_jax.report.page import Block, Figures, Sample, Section, Side, Table, Text
from dpo_jax.report.record_shapes import SAMPLE, SAMPLE_OF_TRAINING
from dpo_jax.report.result_table import CHOSEN, MEASURES, with_interval
from dpo_jax.report.run_record import TRAINING, RunRecord, Stage, kind_of, of, one_or_more

_Shown = tuple[str, tuple[str, ...]]
_OF_STEP = re.compile(r"step-(\d{8,})\.jsonl")
REWARDS = {
    "implicit": "implicit reward",
    "per_token": "per token",
    "reference_free": "reference-free",
    "reference_free_per_token": "reference-free, per token",
}


def evaluation(runs: Sequence[RunRecord]) -> Section | None:
    """The table of `dpo-jax eval` with policy and reference columns for each run, and the result of SFT."""
    found = [(run, stage.report) for run, stage in one_or_more(runs, "eval") if {"policy", "reference"} <= set(stage.report)]
    blocks: list[Block] = []
    if found:
        columns, cells = ["measure"], {label: [] for label, name, _ in MEASURES if any(name in r["policy"] for _, r in found)}
        for run, report in found:
            for who in ("reference", "policy"):
                columns.append(of(run, runs, who))
                for label, name, form in MEASURES:
                    if label in cells:
                        cells[label].append(with_interval(report[who], name, form))
        pairs = ", ".join(
            of(run, runs, f"{report['pairs']:,} held-out {report.get('examples', 'pairs')}") for run, report in found
        )
        note = (
            f"{pairs}. Brackets: 95 % interval (Wilson). ±: one standard error. A policy equal to its reference has accuracy "
            f"0.5. {KL_OF_SAMPLES} is per completion, from samples of the policy."
        )
        chosen = [of(run, runs, CHOSEN) for run, report in found if report.get("chosen_on_these")]
        note = " ".join([note, *chosen])
        blocks.append(Table(columns, [[label, *row] for label, row in cells.items()], note=note))
    rows = [row for run, stage in one_or_more(runs, "sft") if (row := _sft_row(of(run, runs, "sft"), stage))]
    if rows:
        columns = ["stage", "loss (nats per text)", "loss per token (nats)", "perplexity per token", "after steps"]
        blocks.append(Table(columns, rows, caption="Supervised fine-tuning, held out"))
    return Section("Held-out evaluation", blocks) if blocks else None


def _sft_row(name: str, stage: Stage) -> list[str]:
    """The last evaluation of SFT; empty if it has no value per token."""
    last = {metric: series(stage.metrics, f"eval/{metric}") for metric in ("loss", "nll_per_token")}
    (steps, losses), (_, per_token) = last.values()
    if not len(losses) or not len(per_token):
        return []
    return [name, f"{losses[-1]:.2f}", f"{per_token[-1]:.4f}", f"{np.exp(per_token[-1]):.2f}", f"{steps[-1]:,.0f}"]


def implicit_rewards(runs: Sequence[RunRecord]) -> Section | None:
    """Results of `dpo-jax eval --rewards`: accuracy, calibration and length, and every subset."""
    found = [(run, stage) for run, stage in one_or_more(runs, "rewards") if "rewards" in stage.report]
    if not found:
        return None
    blocks: list[Block] = []
    for run, stage in found:
        report = stage.report
        settings = report["settings"]
        rows = [
            [label, _share(row), f"{row['margin']:.4f}", _correlation(row["length"])]
            for name, label in REWARDS.items()
            if (row := report["rewards"].get(name))
        ]
        columns = ["reward", "accuracy", "mean margin", "rank correlation with length"]
        title = of(
            run, runs, f"{report['pairs']:,} pairs of {settings['data']} [{settings['split']}], beta {settings['beta']:g}"
        )
        blocks.append(Table(columns, rows, caption=title, note="Brackets: 95 % intervals. Correlations are Spearman's."))
        blocks += _by_subset(report["rewards"]["implicit"])
        blocks.append(_calibration(report))
        if os.path.isfile(stage.path / "reliability.png"):
            blocks.append(
                Figures([(stage.path / "reliability.png", of(run, runs, "reliability of the implicit reward"))], size="half")
            )
    return Section("Implicit reward", blocks)


def _by_subset(row: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    if "subsets" in row:
        rows = [[part["subset"], f"{part['pairs']:,}", _share(part), f"{part['margin']:.4f}"] for part in row["subsets"]]
        rows.append(["mean over subsets", f"{row['pairs']:,}", _share(row["macro"]), "-"])
        blocks.append(Table(["subset", "pairs", "accuracy", "mean margin"], rows, caption="By subset"))
    if "rewardbench" in row:
        bench = row["rewardbench"]
        rows = [[part["section"], f"{part['pairs']:,}", _share(part)] for part in bench["sections"]]
        rows.append(["score: mean of the sections", "-", _share(bench["score"])])
        note = f"Not in this set: {', '.join(bench['missing'])}." if bench["missing"] else ""
        blocks.append(Table(["RewardBench section", "pairs", "accuracy"], rows, caption="RewardBench", note=note))
    return blocks


def _calibration(report: Mapping[str, Any]) -> Table:
    found, length = report["calibration"], report["length"]
    ece, over = found["ece_interval"], found["overconfidence_interval"]
    rows = [
        ["calibration error (ECE)", f"{found['ece']:.3f} ({ece[0]:.3f} to {ece[1]:.3f})"],
        ["ECE if all beliefs were right", f"{found['expected_ece']:.3f} (above {found['expected_ece_high']:.3f} once in 20)"],
        ["overconfidence: belief less truth", f"{found['overconfidence']:.3f} ({over[0]:.3f} to {over[1]:.3f})"],
        ["mean tokens, chosen / rejected", " / ".join(f"{tokens:.1f}" for tokens in length["mean_tokens"])],
        *([f"accuracy, {row['subset']} ({row['pairs']:,} pairs)", _share(row)] for row in length["accuracy"]),
    ]
    note = "Belief is the logistic function of the margin's size. ECE is biased upward: compare it with the line below it."
    if not report.get("bradley_terry", True):
        note += " Both presume that the margin is a logit (Bradley-Terry), which this loss does not fit."
    return Table(["calibration and length", "value"], rows, note=note)


def _share(row: Mapping[str, float]) -> str:
    return f"{row['accuracy']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _correlation(row: Mapping[str, Any]) -> str:
    if row["spearman"] is None:
        return "-"
    return f"{row['spearman']:z.2f} ({row['spearman_low']:z.2f} to {row['spearman_high']:z.2f})"


def training(
    runs: Sequence[RunRecord], images: Mapping[tuple[str, str], Sequence[Path]], together: Mapping[str, Sequence[Path]]
) -> Section | None:
    """Training curves: all runs in the same axes if there are several, then those of each stage."""
    titles = {panel.file: panel.title for panel in PANELS}
    blocks: list[Block] = []
    for name, paths in together.items():
        shown = [(path, f"{path.stem}: all runs") for path in paths]
        blocks.append(Figures(shown, caption=f"{name}: all runs"))
    for run in runs:
        for name in TRAINING:
            paths = images.get((run.name, name), ())
            shown = [(path, titles.get(path.stem, path.stem)) for path in paths]
            if shown:
                blocks.append(Figures(shown, caption=of(run, runs, name)))
    return Section("Training", blocks) if blocks else None


def samples(runs: Sequence[RunRecord], count: int) -> Section | None:
    """Samples of reference and policy for the same prompts; prompts shared by several runs are shown together."""
    by_prompt: dict[_Shown, dict[tuple[str, str, str], list[str]]] = {}  # the runs that gave each text
    for run, stage in one_or_more(runs, "eval"):
        if stage.report and "sampling" not in stage.report:
            continue  # the samples are those of an earlier evaluation
        limit = stage.report.get("sampling", {}).get("max_new_tokens")
        mark = f"cut by the limit of {limit} tokens" if limit else "cut by the token limit"
        for line in stage.read_lines("samples.jsonl", SAMPLE):
            sides = by_prompt.setdefault(_shown(line), {})
            for who in ("reference", "policy"):
                if who in line:
                    cut = "" if line.get(f"{who}_finished", True) else mark
                    sides.setdefault((who, str(line[who]), cut), []).append(run.name)
    # Prompts shared by most runs come first, otherwise in file order.
    chosen = sorted(by_prompt.items(), key=lambda item: -sum(map(len, item[1].values())))[:count]
    if not chosen:
        return None
    note = f"{len(chosen)} of {len(by_prompt):,} prompts, drawn at temperature 1; eval/samples.jsonl holds all."
    return Section("Samples", [Text(note), *(Sample(prompt, _sides(sides, runs)) for (prompt, _), sides in chosen)])


def samples_of_training(runs: Sequence[RunRecord], count: int) -> Section | None:
    """Completions by the policy at evaluations during training (`dpo.eval_samples`): the same prompts at up to four steps."""
    blocks: list[Block] = []
    for run, stage in one_or_more(runs, "dpo"):
        steps = sorted(int(name[1]) for file in stage.path.glob("samples/step-*.jsonl") if (name := _OF_STEP.match(file.name)))
        chosen = [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, 4)})] if steps else []
        by_prompt: dict[_Shown, list[Side]] = {}
        for step in chosen:
            for line in stage.read_lines(f"samples/step-{step:08}.jsonl", SAMPLE_OF_TRAINING):
                mark = "" if line["finished"] else "cut by the token limit"
                by_prompt.setdefault(_shown(line), []).append(Side(f"step {step:,}", line["completion"], mark))
        shown = list(by_prompt.items())[:count]
        if shown:
            blocks.append(
                Text(of(run, runs, f"{len(shown)} of {len(by_prompt):,} prompts, at {len(chosen)} of {len(steps):,} steps."))
            )
            blocks += [Sample(prompt, sides) for (prompt, _), sides in shown]
    return Section("Samples during training", blocks) if blocks else None


def _shown(line: Mapping[str, Any]) -> _Shown:
    """The prompt of a line, and the images in it, which tell apart prompts of the same words."""
    return shown_prompt(line), tuple(line.get("images", ()))


def _sides(sides: Mapping[tuple[str, str, str], Sequence[str]], runs: Sequence[RunRecord]) -> list[Side]:
    """Texts of a prompt. A text that several runs gave word for word (such as runs with one reference) is shown once."""
    ordered = sorted(sides.items(), key=lambda side: side[0][0] != "reference")
    return [Side(f"{who} of {', '.join(names)}" if len(runs) > 1 else who, text, mark) for (who, text, mark), names in ordered]


def data(runs: Sequence[RunRecord]) -> Section | None:
    """Account of all rows that were read: kept, and dropped by cause. Stages that read the same are listed once."""
    rows, notes = [], []
    for run in runs:
        for split, report in _accounts(run):
            dropped = report.get("dropped", {})
            bad = sum(count for cause, count in dropped.items() if cause not in FILTERED)
            causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(dropped.items())) or "none"
            cut = ", ".join(f"{count:,} {what}" for what, count in sorted(report.get("truncated", {}).items())) or "none"
            cells = [report.get("source", ""), report.get("format", ""), *(f"{report[name]:,}" for name in ("read", "kept"))]
            rows.append([of(run, runs, split), *cells, f"{bad:,}", causes, cut])
            notes += [of(run, runs, f"{split}: {note}") for note in report.get("notes", [])]
    if not rows:
        return None
    columns = ["split", "source", "format", "read", "kept", "bad", "left out, by cause", "cut to length"]
    return Section("Data", [Table(columns, rows, note="Read = kept + left out."), *map(Text, notes)])


def _accounts(run: RunRecord) -> list[tuple[str, Mapping[str, Any]]]:
    """(split, account) of all stages, each once; those of stages after the first that has any are named after their stage."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    known: list[tuple[Any, ...]] = []
    for stage in sorted(run.stages.values(), key=lambda stage: kind_of(stage.name) not in TRAINING):
        first = not known
        for split, account in stage.data.items():
            read = (split, *(account.get(part) for part in ("source", "format", "read", "kept", "dropped", "truncated")))
            if read not in known:
                known.append(read)
                found.append((split if first else f"{stage.name}, {split}", account))
    return found
