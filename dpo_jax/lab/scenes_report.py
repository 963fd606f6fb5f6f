"""Report of the scenes experiment: hallucination at equal recall, and a figure of hallucination against recall."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dpo_jax.lab.robust import Grid, cell
from dpo_jax.lab.seeds import last_points, over_seeds
from dpo_jax.lab.sweep import Result
from dpo_jax.plotting.drawing import bare, figure_text, save
from dpo_jax.plotting.palette import GUIDE, STYLES

REFERENCE = "sft"
VALUES = ("hallucinated", "recalled", "mentioned")
ENDS = ("", "_low", "_high")
POINT = {"step": float, **{f"{name}{end}": float for name in VALUES for end in ENDS}}
COLUMNS = ("method", "chosen", "label", "seed", "step", *(f"{name}{end}" for name in VALUES for end in ENDS), "seconds")
NAMES = {"dpo": "DPO", "preferred-ft": "Preferred-FT"}


def words(point: Mapping[str, float]) -> str:
    return f"hallucinated {point['hallucinated']:5.1%}, recalled {point['recalled']:5.1%}"


def ended(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Final results of each setting: means over seeds, with intervals over scenes and seeds."""
    kinds = {(r.run.method, r.run.label): r.run.settings.get("chosen", "") for r in results}
    return [
        {
            "method": method,
            "chosen": kinds[method, label],
            "label": label,
            **{name: over_seeds(list(runs.values()), name) for name in VALUES},
        }
        for (method, label), runs in last_points(results).items()
    ]


def at_equal_recall(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each method and kind of pairs, the setting with the fewest hallucinations among those whose recall is not below SFT's
    interval, and `share`, its hallucinations over SFT's. Without a setting if none qualifies."""
    reference = next(one for one in settings if one["method"] == REFERENCE)
    rows = []
    for method, kind in dict.fromkeys((one["method"], one["chosen"]) for one in settings if one["method"] != REFERENCE):
        mine = [one for one in settings if (one["method"], one["chosen"]) == (method, kind)]
        enough = [one for one in mine if one["recalled"][""] >= reference["recalled"]["_low"]]
        best = min(enough, key=lambda one: one["hallucinated"][""], default=None)
        share = None if best is None else best["hallucinated"][""] / max(reference["hallucinated"][""], 1e-9)
        rows.append({"method": method, "chosen": kind, "best": best, "share": share})
    return rows


def tables(settings: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Tables of hallucination at a recall not below SFT's interval, and of the final results of all settings."""
    reference = next(one for one in settings if one["method"] == REFERENCE)
    rows = [["SFT", cell(reference["hallucinated"]), cell(reference["recalled"]), "1.00"]]
    for one in at_equal_recall(settings):
        name, best = f"{NAMES[one['method']]}, {one['chosen']} captions chosen", one["best"]
        if best is None:
            rows.append([name, "-", "-", "-"])
        else:
            values = (cell(best["hallucinated"]), cell(best["recalled"]), f"{one['share']:.2f}")
            rows.append([f"{name}, {best['label'].rpartition(' ')[0].split(' ', 1)[1]} {best['label'].split()[-1]}", *values])
    note = (
        "hallucinated: share of the mentioned objects (CHAIR); recalled: of those present; 95 % intervals over scenes and "
        "seeds. Each row is optimistic: the setting with the fewest hallucinations on these very scenes, among those whose "
        "recall is not below SFT's interval"
    )
    equal = Grid("at equal recall", ["hallucinated", "recalled", "over SFT's"], rows, note)
    every = [
        [f"{NAMES.get(one['method'], 'SFT')} {one['label']}".strip(), *(cell(one[name]) for name in VALUES)] for one in settings
    ]
    return [equal, Grid("where runs ended", list(VALUES), every)]


def plot_recall(results: Sequence[Result], path: str | os.PathLike[str]) -> Path:
    """One PNG: share hallucinated against share recalled for every measured point, with a panel for each kind of pairs."""
    kinds = list(dict.fromkeys(r.run.settings["chosen"] for r in results if r.run.method != REFERENCE))
    reference = [point for r in results if r.run.method == REFERENCE for point in r.points]
    figure = Figure(figsize=(4.3 * len(kinds), 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for style, (method, name) in zip(STYLES, NAMES.items(), strict=False):
            mine = [r for r in results if r.run.method == method and r.run.settings["chosen"] == kind]
            points = [point for r in mine for point in r.points]
            x, y = ([point[value] for point in points] for value in ("recalled", "hallucinated"))
            last = [r.points[-1] for r in mine]
            panel.plot(x, y, style.marker, color=style.color, markersize=3.5, alpha=0.45)
            x, y = ([point[value] for point in last] for value in ("recalled", "hallucinated"))
            panel.plot(x, y, style.marker, color=style.color, markersize=5.5, label=figure_text(name))
        x, y = ([point[value] for point in reference] for value in ("recalled", "hallucinated"))
        panel.plot(x, y, "*", color="black", markersize=8, label="SFT")
        panel.axvline(sum(x) / len(x), color=GUIDE.color, linewidth=0.6)
        panel.set_title(f"pairs with {kind} captions chosen", loc="left", fontsize="medium")
        panel.set_ylim(bottom=0.0)
        bare(panel)
    panels[0].set_ylabel("hallucinated, of those mentioned")
    figure.supxlabel("recalled, of the objects there (large: where runs ended)", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return save(figure, path, dpi=130)
