"""Published figures of a race: medians with spread, ratios, and every figure in which we lose."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.bench.flops import device_peak, step_flops
from dpo_jax.bench.race import Results, pairs_per_second
from dpo_jax.bench.scaling import exponents
from dpo_jax.bench.work import CONTENDERS, LIBRARIES, OURS, SIDES, Work, library, pairs_of_step
from dpo_jax.data.encode import Encoded
from dpo_jax.models.config import DecoderConfig

RIVALS = {"literal loop": ("torch-live",), "better of TRL": ("trl", "trl-best")}
QUIET = 0.05  # share of the cores that other processes may use before figures are to be doubted
LOADER_BAR = 0.1  # loader time per batch, as a share of the step


def summarize(
    work: Work, config: DecoderConfig, pairs: Sequence[Encoded], results: Results, differences: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of a race as one JSON value; `differences` are those measured by the gates, which have passed."""
    timed = [pair for step in range(1, work.steps + 1) for pair in pairs_of_step(work, pairs, step)]
    lengths = np.array([[len(getattr(pair, side)) for side in SIDES] for pair in timed], np.float64)
    flops = float(step_flops(config, *lengths.T).mean())
    useful = float((lengths @ [2, 1, 1]).mean())
    matmuls = {kind: results[name] for kind, name in LIBRARIES.items() if name in results}
    rates = {kind: _spread([result["flops_per_second"] for result in rounds]) for kind, rounds in matmuls.items()}
    contenders = {
        name: contender_figures(work, results[name], flops=flops, useful=useful) for name in results if name in CONTENDERS
    }
    devices = {results[name][0]["device"] for name in contenders}
    peak = next((device_peak(device) for device in devices if device != "cpu"), None)
    peak = peak or max(rate["median"] for rate in rates.values())
    for figures in contenders.values():
        figures["mfu"] = figures["pairs_per_second"]["median"] * flops / peak
    return {
        "work": {
            "pairs": len(timed),
            "batch": work.batch,
            "steps": work.steps,
            "rounds": len(next(iter(results.values()))),
            "precision": work.precision,
            "torch_microbatches": work.torch_microbatches,
            "groups": work.groups,
            "microbatches": work.microbatches,
            "remat": work.remat,
            "mean_tokens": dict(zip(SIDES, lengths.mean(axis=0).tolist(), strict=True)),
            "useful_tokens_per_pair": useful,
            "flops_per_pair": flops,
        },
        "devices": sorted(devices),
        "versions": {k: v for name in contenders for k, v in results[name][0]["versions"].items()},
        "threads": {name: results[name][0].get("threads", results[name][0]["cores"]) for name in contenders},
        "neighbors": max(result["neighbors"] for rounds in results.values() for result in rounds),
        "gates": dict(differences),
        "matmul_flops_per_second": rates,
        "peak_flops_per_second": peak,
        "contenders": contenders,
        "ratios": ratios(contenders, rates),
        "lost": lost(contenders),
    }


def contender_figures(work: Work, rounds: Sequence[Mapping[str, Any]], *, flops: float, useful: float) -> dict[str, Any]:
    """Medians over the rounds of one contender. Only the first round starts with empty compilation caches ("cold")."""
    first, later = rounds[0], rounds[1:]
    speed = _spread([pairs_per_second(work, dict(result)) for result in rounds])
    reference = _reference_seconds(work, rounds)
    per_pair = 1 / speed["median"]
    step_seconds = statistics.median(s for r in rounds for s in r["step_seconds"][1 : work.steps + 1])
    loader = statistics.median(r["loader_seconds"] for r in rounds) if "loader_seconds" in first else None
    return {
        "pairs_per_second": speed,
        "useful_tokens_per_second": speed["median"] * useful,
        "gigaflops_per_second": speed["median"] * flops / 1e9,
        "padding": 1 - first["real_positions"] / first["positions"],
        "peak_bytes": max(result["peak_bytes"] for result in rounds),
        "seconds_to_first_step": {"cold": first["seconds_to_first_step"], "warm": _median(later, "seconds_to_first_step")},
        "compile_seconds": {"cold": first.get("compile_seconds"), "warm": _median(later, "compile_seconds")},
        "shapes": first.get("shapes"),
        "reference_pairs_per_second": None if reference is None else 1 / reference,
        "pairs_per_second_with_reference_pass": {
            f"{epochs} epochs": 1 / (per_pair + (reference or 0.0) / epochs) for epochs in (1, 3)
        },
        "loader_share": None if loader is None else loader / step_seconds,
        "losses": first["losses"],
        "grad_norms": first["grad_norms"],
    }


def _reference_seconds(work: Work, rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of the reference pass per pair, at the median batch; None for a live reference, which the step contains."""
    batches = [s for result in rounds for s in (result["reference_seconds"] or ())]
    return statistics.median(batches) / work.batch if batches else None


def ratios(contenders: Mapping[str, Any], rates: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Ratios of ours to each rival that ran, in pairs/s (medians, and the worst case of the spread) and peak memory.

    `over_matmul` divides by how much faster our library multiplies matrices on this machine.
    """
    if OURS not in contenders:
        return {}
    ours, found = contenders[OURS], {}
    for label, names in RIVALS.items():
        ran = [name for name in names if name in contenders]
        if not ran:
            continue
        rival = max(ran, key=lambda name: contenders[name]["pairs_per_second"]["median"])
        theirs = contenders[rival]
        speed = ours["pairs_per_second"]["median"] / theirs["pairs_per_second"]["median"]
        amortized = {
            epochs: rate / theirs["pairs_per_second_with_reference_pass"][epochs]
            for epochs, rate in ours["pairs_per_second_with_reference_pass"].items()
        }
        found[label] = {
            "contender": rival,
            "pairs_per_second": speed,
            "at_least": ours["pairs_per_second"]["min"] / theirs["pairs_per_second"]["max"],
            "at_most": ours["pairs_per_second"]["max"] / theirs["pairs_per_second"]["min"],
            "over_matmul": speed / (rates[library(OURS)]["median"] / rates[library(rival)]["median"]),
            "with_reference_pass": amortized,
            "peak_bytes": ours["peak_bytes"] / theirs["peak_bytes"],
        }
    return found


def lost(contenders: Mapping[str, Any]) -> list[str]:
    """Every figure in which a PyTorch contender beats ours, as text naming the best of them."""
    if OURS not in contenders:
        return []
    ours, found = contenders[OURS], []

    def compare(what: str, get: Any, *, unit: str, more_is_better: bool) -> None:
        mine, sign = get(ours), 1 if more_is_better else -1
        theirs = {name: get(figures) for name, figures in contenders.items() if library(name) == "torch"}
        known = {name: value for name, value in theirs.items() if value is not None}
        best = max(known, key=lambda name: sign * known[name], default=None)
        if best is not None and mine is not None and sign * known[best] > sign * mine:
            found.append(f"{what}: {best} {known[best]:.3g} {unit}, {OURS} {mine:.3g}")

    compare("pairs/s", lambda f: f["pairs_per_second"]["median"], unit="pairs/s", more_is_better=True)
    for epochs in ("1 epochs", "3 epochs"):
        label = f"pairs/s with the reference pass over {epochs}".replace("1 epochs", "1 epoch")
        compare(label, lambda f, e=epochs: f["pairs_per_second_with_reference_pass"][e], unit="pairs/s", more_is_better=True)
    compare("reference pass", lambda f: f["reference_pairs_per_second"], unit="pairs/s", more_is_better=True)
    compare("padding", lambda f: f["padding"], unit="of all positions", more_is_better=False)
    compare("peak memory", lambda f: f["peak_bytes"] / 2**30, unit="GiB", more_is_better=False)
    for state in ("cold", "warm"):
        what = f"time to the first step, {state} compilation cache"
        compare(what, lambda f, s=state: f["seconds_to_first_step"][s], unit="s", more_is_better=False)
    return found


def scaling(points: Mapping[str, Any]) -> dict[str, Any]:
    """The points of `scaling.run` with their fitted exponents."""
    return {kind: {"points": points[kind], "exponents": exponents(points[kind])} for kind in ("batch", "length")}


def table(summary: Mapping[str, Any]) -> str:
    """The figures as a Markdown table, followed by the ratios, the gates and the figures in which we lose."""
    gates = summary["gates"]
    head = (
        "contender",
        "pairs/s (min to max)",
        "useful tokens/s",
        "padding",
        "MFU",
        "peak memory",
        "first step cold / warm",
        "compile cold / warm",
        "with reference pass, 1 / 3 epochs",
        f"update off {gates['yardstick']}" if "updates" in gates else "update",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, figures in summary["contenders"].items():
        speed, first, compiled = (figures[key] for key in ("pairs_per_second", "seconds_to_first_step", "compile_seconds"))
        shapes = f" ({figures['shapes']} shapes)" if figures["shapes"] else ""
        one, three = figures["pairs_per_second_with_reference_pass"].values()
        cells = (
            f"`{name}`",
            f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})",
            f"{figures['useful_tokens_per_second']:,.0f}",
            f"{figures['padding']:.0%}",
            f"{figures['mfu']:.1%}",
            f"{figures['peak_bytes'] / 2**30:.2f} GiB",
            f"{_number(first['cold'])} / {_number(first['warm'])} s",
            f"{_number(compiled['cold'])} / {_number(compiled['warm'])} s{shapes}" if compiled["cold"] is not None else "",
            f"{one:.2f} / {three:.2f}",
            f"{gates['updates'][name]:.1e}" if "updates" in gates else "-",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(summary)])


def _notes(summary: Mapping[str, Any]) -> list[str]:
    work, gates = summary["work"], summary["gates"]
    tokens = " + ".join(f"{count:.0f}" for count in work["mean_tokens"].values())
    matmuls = summary["matmul_flops_per_second"].items()
    rates = ", ".join(f"{kind} {rate['median'] / 1e9:,.0f} GFLOP/s" for kind, rate in matmuls)
    updates = f"{gates['update']:.1e} (L2)" if "update" in gates else "not compared: there is only one"
    notes = [
        f"work         {work['batch']} pairs a step, prompt + chosen + rejected {tokens} tokens, {work['precision']}; "
        f"{work['rounds']} rounds of {work['steps']} timed steps",
        f"machine      {', '.join(summary['devices'])}; matrix products: {rates}; others used up to "
        f"{summary['neighbors']:.0%} of the cores" + (": TOO BUSY to rely on" if summary["neighbors"] > QUIET else ""),
        f"gates        log-probabilities {gates['first_logps']:.1e} (relative), loss - ln 2 {gates['first_loss']:.1e}, "
        f"over {gates['steps']:.0f} steps loss {gates['loss_curve']:.1e}, gradient norms {gates['grad_norm']:.1e} (relative), "
        f"then the update of all weights {updates}",
    ]
    for label, ratio in summary["ratios"].items():
        notes.append(
            f"{OURS} against {label} ({ratio['contender']}): {ratio['pairs_per_second']:.2f}x the pairs/s "
            f"({ratio['at_least']:.2f} to {ratio['at_most']:.2f}), {ratio['over_matmul']:.2f}x over equal matrix products, "
            f"{ratio['with_reference_pass']['1 epochs']:.2f}x with the reference pass in 1 epoch, "
            f"{ratio['peak_bytes']:.2f}x the peak memory"
        )
    share = summary["contenders"].get(OURS, {}).get("loader_share")
    if share is not None:
        verdict = "" if share < LOADER_BAR else f": MORE THAN {LOADER_BAR:.0%}, the input slows training down"
        notes.append(f"loader       {share:.2%} of a step{verdict}")
    for kind, found in summary.get("scaling", {}).items():
        fitted = found["exponents"]
        notes.append(
            f"step time    grows with tokens^{fitted['seconds']:.2f} in {kind} (FLOPs: tokens^{fitted['flops']:.2f}), "
            f"from {found['points'][0]['tokens']:,.0f} to {found['points'][-1]['tokens']:,.0f} tokens"
        )
    if not summary["ratios"]:
        return notes
    return [*notes, "where a contender in PyTorch is better:", *(f"  {line}" for line in summary["lost"] or ["nowhere"])]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _median(rounds: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [result[key] for result in rounds if key in result]
    return statistics.median(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
