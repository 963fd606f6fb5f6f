"""Report of the question game: each method's gain at equal KL against the enumerated optimum, as a table and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.lab.conversation_tree import Measured, evaluate, myopic, optimum, tilted
from dpo_jax.lab.dialogue import DialogueWorld
from dpo_jax.lab.robust import Grid, Value, by_seed, curve_at, gain_at_kl
from dpo_jax.lab.robust_plot import Curve
from dpo_jax.lab.seeds import over_seeds
from dpo_jax.lab.sweep import Result

EQUAL_KL = (1.0, 2.0, 3.0)  # nats a conversation
BETAS = np.geomspace(100, 0.05, 80)
OPTIMUM, MYOPIC, TILTED = "the optimum", "the best myopic policy", "ref exp(R / beta), no policy"
NAMES = {
    "dpo": "DPO on conversations",
    "online": "online DPO on conversations",
    "preferred-ft": "Preferred-FT",
    "myopic": "DPO on single turns",
    "dpo-limit": "what DPO on conversations tends to",
}
COLUMNS = (
    *("method", "label", "seed", "step", "kl", "kl_low", "kl_high", "reward", "reward_low", "reward_high", "right"),
    *("courtesies", "nonsense", "reward_sampled", "reward_sampled_low", "reward_sampled_high", "kl_sampled"),
    *("kl_sampled_low", "kl_sampled_high", "seconds"),
)
Frontier = tuple[np.ndarray, np.ndarray]
"""KL and gain over the reference, ascending in KL."""


def frontiers(world: DialogueWorld) -> dict[str, Frontier]:
    """Frontiers computed from the reference's probabilities alone, averaged over openings."""
    policies = world.reference_policy
    base = _mean([evaluate(game.tree, of, of) for game, of in zip(world.trees, policies, strict=True)]).reward

    def curve(measure: Callable[..., Measured]) -> Frontier:
        every = [
            _mean([measure(game.tree, of, float(beta)) for game, of in zip(world.trees, policies, strict=True)])
            for beta in BETAS
        ]
        return np.array([one.kl for one in every]), np.array([one.reward - base for one in every])

    return {
        OPTIMUM: curve(lambda tree, of, beta: evaluate(tree, optimum(tree, of, beta), of)),
        MYOPIC: curve(lambda tree, of, beta: evaluate(tree, myopic(tree, of, beta), of)),
        TILTED: curve(tilted),
    }


def _mean(every: Sequence[Measured]) -> Measured:
    return Measured(*np.mean(every, axis=0).tolist())


def summary(results: Sequence[Result], curves: Mapping[str, Frontier], *, reference: str) -> dict[str, Any]:
    """Gains at equal KL of the computed frontiers and of every method, each with its share of the optimum's gain."""
    (start,) = (r for r in results if r.run.method == reference)
    base, rows = start.points[-1]["reward"], []
    best = {at: curve_at(*curves[OPTIMUM], at) for at in EQUAL_KL}
    for name, (kl, gain) in curves.items():
        rows += [_row(name, at, _exactly(curve_at(kl, gain, at)), best[at]) for at in EQUAL_KL]
    for method in (name for name in NAMES if any(r.run.method == name for r in results)):
        seeds = by_seed(r for r in results if r.run.method == method)
        rows += [_row(NAMES[method], at, gain_at_kl(seeds, at, reference=base), best[at]) for at in EQUAL_KL]
    checked = [point for r in results for point in r.points if "reward_sampled" in point]
    inside = sum(p["reward_sampled_low"] <= p["reward"] <= p["reward_sampled_high"] for p in checked)
    return {"reference": start.points[-1], "gains": rows, "points": len(checked), "inside": inside}


def _exactly(value: float | None) -> Value | None:
    return None if value is None else {"": value, "_low": value, "_high": value}


def _row(name: str, at: float, gain: Value | None, best: float | None) -> dict[str, Any]:
    share = None if gain is None or not best else gain[""] / best
    return {"name": name, "kl": at, "gain": gain, "share": share}


def table(found: Mapping[str, Any]) -> Grid:
    """The printed table."""
    names = dict.fromkeys(row["name"] for row in found["gains"])
    cells = {(row["name"], row["kl"]): row for row in found["gains"]}
    rows = [[name, *(_cell(cells[name, at]) for at in EQUAL_KL)] for name in names]
    note = (
        f"gain in reward over the reference ({found['reference']['reward']:.2f}), its 95 % interval over seeds, share of the "
        f"optimum's. Exact values; {found['inside']} of {found['points']} lie in the 95 % intervals of sampled conversations."
    )
    return Grid("gain at equal KL", [f"KL {at:g}" for at in EQUAL_KL], rows, note)


def _cell(row: Mapping[str, Any]) -> str:
    gain, share = row["gain"], row["share"]
    if gain is None:
        return "-"
    interval = f" ({gain['_low']:.2f} to {gain['_high']:.2f})" if gain["_low"] < gain["_high"] else ""
    return f"{gain['']:.2f}{interval}" + ("" if share is None else f" {share:.0%}")


def drawn(results: Sequence[Result], curves: Mapping[str, Frontier], *, base: float, most: float) -> list[Curve]:
    """The computed frontiers up to KL `most` as lines, and the last points of every setting, averaged over seeds."""
    panel, found = "question game of three turns", []
    for name, (kl, gain) in curves.items():
        if name != TILTED:  # it would take up the upper half of the figure
            found.append(Curve(panel, name, [], kl[kl <= most], gain[kl <= most]))
    for method, name in NAMES.items():
        mine, points = [r for r in results if r.run.method == method], []
        for label in dict.fromkeys(r.run.label for r in mine):
            last = [r.points[-1] for r in mine if r.run.label == label]
            gain = {end: value - base for end, value in over_seeds(last, "reward").items()}
            points.append((float(np.mean([p["kl"] for p in last])), gain[""], gain["_low"], gain["_high"]))
        if points:
            found.append(Curve(panel, name, points, np.empty(0), np.empty(0)))
    return found
