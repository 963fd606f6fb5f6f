"""Report sections on experiments: sweeps of `dpo-jax frontier`, `dpo-jax robust` and `dpo-jax dialogue`."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.evals.frontier_panels import Spot, plot_learned, plot_lengths
from dpo_jax.evals.frontier_plot import plot_trajectories
from dpo_jax.evals.overoptimization import declines, trajectories
from dpo_jax.lab.second_reward import CHOSEN
from dpo_jax.lab.seeds import over_seeds
from dpo_jax.lab.world import LEARNED, SECOND
from dpo_jax.plotting.curves import KL_OF_SAMPLES
from dpo_jax.report.page import Block, Figures, Section, Table, Text
from dpo_jax.report.record_shapes import ROBUST, SUMMARY
from dpo_jax.report.run_record import RunRecord, Stage, of, one_or_more, read_results

FIGURES = {
    "frontier.png": "reward against KL",
    "second_reward.png": "a second reward, which no policy was trained on, against KL",
    "displacement.png": "displacement in training",
}
BETA = "beta "
Ended = dict[tuple[str, str], dict[str, float]]
"""By method and setting: a value at the end of training, `{"": mean over seeds, "_low": ..., "_high": ...}`."""


def frontier(runs: Sequence[RunRecord], drawn: Path) -> Section | None:
    """Reward against KL: the figures, methods at equal KL, and failures: over-optimization during training (true reward), of
    the scorer (second reward) and of a learned reward, and lengths. New figures are written to `drawn`."""
    blocks: list[Block] = []
    for run, stage in one_or_more(runs, "frontier"):
        for file, caption in FIGURES.items():
            if os.path.isfile(stage.path / file):
                blocks.append(Figures([(stage.path / file, of(run, runs, caption))], size="wide"))
        summary = stage.read_object("summary.json", SUMMARY)
        table = summary.get("at_equal_kl", [])
        if table:
            kls = list(dict.fromkeys(row["kl"] for row in table))
            cells = {(row["method"], row["kl"]): row for row in table}
            methods = dict.fromkeys(row["method"] for row in table)
            rows = [[method, *(_at_kl(cells.get((method, kl))) for kl in kls)] for method in methods]
            note = f"True reward of the best mixture within that {KL_OF_SAMPLES}; in brackets: share of the possible gain."
            columns = ["method", *(f"KL {kl:g} nats" for kl in kls)]
            blocks.append(Table(columns, rows, caption=of(run, runs, "Methods at equal KL"), note=note))
        blocks += _second(of(run, runs, "Beside a second reward"), summary.get(SECOND))
        results = stage.read("results.csv", read_results, [])
        if over := _overoptimized(of(run, runs, "Over-optimization"), results):
            blocks += over
            with stage.showing("results.csv"):
                figure = plot_trajectories(trajectories(results), drawn / f"overoptimization-{len(blocks)}.png")
                caption = "true reward over training; full: best, hollow: last"
                blocks.append(Figures([(figure, of(run, runs, caption))], size="wide"))
        for title, build in (("Lengths", _lengths), ("Learned reward", _learned)):
            with stage.showing("results.csv"):
                blocks += build(of(run, runs, title), results, drawn / f"{title.split()[0].lower()}-{len(blocks)}.png")
    return Section("Frontier", blocks) if blocks else None


def _at_kl(row: Mapping[str, Any] | None) -> str:
    if row is None or row["reward"] is None:
        return "-"
    return f"{row['reward']:.2f}" + (f" ({row['share_of_gain']:.0%})" if row["share_of_gain"] is not None else "")


def _overoptimized(caption: str, results: Sequence[Mapping[str, str]]) -> list[Block]:
    found = declines(results)
    if not found:
        return []
    seeds = len({row.seed for row in found}) > 1
    rows = [
        [
            " ".join(filter(None, (row.method, row.setting, f"seed {row.seed}" if seeds else ""))),
            f"{row.best_reward:.2f}",
            f"{row.best_kl:.2f}",
            f"{row.last_reward:.2f}",
            f"{row.last_kl:.2f}",
            f"{row.fall:.2f} ({row.interval[0]:.2f} to {row.interval[1]:.2f})" if row.fall else "-",
            "yes" if row.overoptimized else "no",
        ]
        for row in found
    ]
    columns = ["run", "best true reward", "at KL", "last true reward", "at KL", "fall", "over-optimized"]
    note = "Over-optimized: training went on to a larger KL, and the true reward fell by more than its interval explains."
    return [Table(columns, rows, caption=caption, note=note)]


def _second(caption: str, found: Mapping[str, Any] | None) -> list[Block]:
    """Each method's gains in both rewards, and the sweep's own interpretation of them."""
    if not found:
        return []
    rows = [
        [
            " ".join(filter(None, (row["method"], row["label"]))),
            f"{row['kl']:.2f}",
            *(f"{row[g]:.2f} ({row[f'{g}_low']:.2f} to {row[f'{g}_high']:.2f})" for g in ("gain", "second_gain")),
            row["reading"] + (f"; the second was higher at {row['turned']}" if row["turned"] else ""),
        ]
        for row in found["gains"]
    ]
    columns = ["policy of the highest true reward", "KL", "gain in reward", f"gain in {found['name']}", "reading"]
    note = f"Gains over the reference, with 95 % intervals. {CHOSEN}"
    return [Table(columns, rows, caption=caption, note=note), Text(found["words"])]


def _ended(results: Sequence[Mapping[str, str]], name: str) -> Ended:
    """The value `name` at the end of training, for every setting whose runs have it with an interval."""
    last = {(row["method"], row["label"], row["seed"]): row for row in results}
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for (method, label, _), row in last.items():
        if all(row.get(f"{name}{end}") for end in ("", "_low", "_high")):
            values = {f"{name}{end}": float(row[f"{name}{end}"]) for end in ("", "_low", "_high")}
            if all(map(math.isfinite, values.values())):
                found.setdefault((method, label), []).append(values)
    return {key: over_seeds(points, name) for key, points in found.items()}


def _cell(value: Mapping[str, float], form: str) -> str:
    return f"{value['']:{form}} ({value['_low']:{form}} to {value['_high']:{form}})"


def _spots(x: Mapping[tuple[str, str], float], y: Ended) -> dict[str, list[Spot]]:
    """Points by method, for the settings that have both values."""
    found: dict[str, list[Spot]] = {}
    for (method, label), value in y.items():
        if (method, label) in x:
            found.setdefault(method, []).append(Spot(x[method, label], value[""], (value["_low"], value["_high"])))
    return found


def _lengths(caption: str, results: Sequence[Mapping[str, str]], path: Path) -> list[Block]:
    """Tokens of the samples of every policy at the end of training, as a table, and against KL and beta."""
    tokens, kl = _ended(results, "tokens"), _ended(results, "kl")
    start = tokens.pop(("reference", ""), None)
    if start is None or not tokens:
        return []
    last = {(row["method"], row["label"], row["seed"]): row.get("cut") for row in results}
    cut: dict[tuple[str, str], list[float]] = {}
    for (method, label, _), share in last.items():
        cut.setdefault((method, label), []).extend([float(share)] if share else [])
    rows = [["reference", "0.00", _cell(start, ".1f"), "-", _mean_percent(cut["reference", ""])]]
    rows += [
        [
            " ".join(key).strip(),
            f"{kl[key]['']:.2f}",
            _cell(value, ".1f"),
            f"{value[''] - start['']:+.1f}",
            _mean_percent(cut[key]),
        ]
        for key, value in tokens.items()
        if key in kl
    ]
    betas = {key: float(key[1].removeprefix(BETA)) for key in tokens if key[1].startswith(BETA)}
    figure = plot_lengths(
        _spots({key: value[""] for key, value in kl.items()}, tokens), _spots(betas, tokens), path, reference=start[""]
    )
    columns = ["policy", "KL", "mean tokens of a sample", "minus the reference's", "cut by the limit"]
    note = "At the end of training; 95 % intervals. A sample cut by the limit counts with the length of the limit."
    blocks: list[Block] = [Table(columns, rows, caption=caption, note=note)]
    return [*blocks, Figures([(figure, "tokens of samples against KL and beta")], size="wide")]


def _mean_percent(shares: Sequence[float]) -> str:
    return f"{statistics.fmean(shares):.0%}" if shares else "-"


def _learned(caption: str, results: Sequence[Mapping[str, str]], path: Path) -> list[Block]:
    """The learned reward compared with the true one, as gains over the reference: a learned reward has no absolute zero."""
    learned, true = _ended(results, LEARNED), _ended(results, "reward")
    start, truly = learned.pop(("reference", ""), None), true.get(("reference", ""))
    learned = {key: value for key, value in learned.items() if key in true}
    if start is None or truly is None or not learned:
        return []

    def gain(value: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
        return {end: value[end] - base[""] for end in ("", "_low", "_high")}

    promised = {key: gain(value, start) for key, value in learned.items()}
    real = {key: gain(true[key], truly) for key in learned}
    rows = [
        [
            " ".join(key).strip(),
            _cell(promised[key], ".2f"),
            _cell(real[key], ".2f"),
            f"{promised[key][''] - real[key]['']:+.2f}",
        ]
        for key in learned
    ]
    columns = ["policy", "gain in the learned reward", "gain in the true reward", "overestimate"]
    note = "At the end of training, over the reference; 95 % intervals of the policy. The reward model judges every policy."
    figure = plot_learned(_spots({key: value[""] for key, value in promised.items()}, real), path)
    blocks: list[Block] = [Table(columns, rows, caption=caption, note=note)]
    return [*blocks, Figures([(figure, "below the diagonal the learned reward overestimates the gain")], size="half")]


UNKNOWN = "unknown: no true reward was measured"
POLICIES = ("dpo", "ppo", "online")  # stages that move a policy away from its reference


def robustness(runs: Sequence[RunRecord]) -> Section | None:
    """Figure and tables of each experiment, and one table of the KLs after which the true reward falls."""
    blocks: list[Block] = []
    for run, stage in one_or_more(runs, "robust"):
        blocks += _experiment(stage, of(run, runs, stage.name.partition("-")[2]), "robust.png")
    falls = [[of(run, runs, what), *cells] for run in runs for what, *cells in _falls(run)]
    if falls:
        note = (
            "True reward against KL(policy || reference). A fit counts where its interval ends within the KL that was measured."
        )
        blocks.append(
            Table(["policy", "true reward falls", "seen in"], falls, caption="Where the true reward falls", note=note)
        )
    title = "Robustness" if one_or_more(runs, "robust") else "Over-optimization"
    return Section(title, blocks) if blocks else None


def dialogue(runs: Sequence[RunRecord]) -> Section | None:
    """Figure and table of the question game."""
    found = [(stage, of(run, runs, "question game")) for run, stage in one_or_more(runs, "dialogue")]
    blocks = [block for stage, caption in found for block in _experiment(stage, caption, "dialogue.png")]
    return Section("Several turns", blocks) if blocks else None


def _experiment(stage: Stage, caption: str, figure: str) -> list[Block]:
    """The figure of an experiment, and the tables of its summary."""
    blocks: list[Block] = []
    if os.path.isfile(stage.path / figure):
        blocks.append(Figures([(stage.path / figure, f"{caption}: gain in reward against KL")], size="wide"))
    for table in stage.read_object("summary.json", ROBUST).get("tables", []):
        columns, rows = [table["caption"], *table["columns"]], table["rows"]
        if any(len(row) != len(columns) for row in rows):
            stage.problems.append(f"summary.json: a row of {table['caption']!r} has more or fewer cells than the table")
            continue
        blocks.append(Table(columns, rows, caption=caption, note=table["note"]))
    return blocks


def _falls(run: RunRecord) -> list[list[str]]:
    """For each policy of a run: its name, the KL after which its true reward falls, and the evidence for it."""
    rows = []
    for _, stage in one_or_more([run], "robust"):
        found = stage.read_object("summary.json", ROBUST).get("falls", [])
        rows += [[row["what"], row["words"], f"{stage.name}, fitted"] for row in found]
    for _, stage in one_or_more([run], "frontier"):
        for row in declines(stage.read("results.csv", read_results, [])):
            name = " ".join(filter(None, (row.method, row.setting, f"seed {row.seed}")))
            none = f"no fall beyond the interval within this run, up to KL {row.last_kl:.2f}"
            seen = f"after KL {row.best_kl:.2f}" if row.overoptimized else none
            rows.append([name, seen, "frontier, measured"])
    return rows + [[stage, UNKNOWN, "-"] for stage in POLICIES if stage in run.stages]
