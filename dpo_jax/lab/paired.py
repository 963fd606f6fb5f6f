"""Gains over the reference on the same prompts: kept for every prompt, at equal KL, and their differences.

All policies are measured on the same prompts with the same random numbers (`World.observe`). Differences prompt by prompt
cancel this shared noise, so their intervals are narrower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.terminal import json_text
from dpo_jax.evals.frontier import best_mixture
from dpo_jax.lab.robust import Value
from dpo_jax.lab.seeds import over_seeds
from dpo_jax.lab.sweep import Result
from dpo_jax.lab.world import with_interval
from dpo_jax.shapes import check_shape
from dpo_jax.types import Array
from dpo_jax.untrusted import Unreadable, read_lines
from dpo_jax.writing import writing

PROMPTS = "prompts.jsonl"  # in a run's folder: a line for each policy measured, with lists of values, one per prompt
PROMPTS_KEPT = {"kept": "rewards of every prompt"}
"""A setting of results that have `PROMPTS`. Earlier versions kept means alone; their runs are repeated."""


def write_prompts(folder: Path, rows: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes `PROMPTS`: for each row, arrays [P] by name."""
    with writing(folder / PROMPTS) as file:
        file.writelines(json_text({name: values.tolist() for name, values in row.items()}) + "\n" for row in rows)


def read_prompts(folder: Path, count: int, names: Sequence[str] = ("reward",)) -> list[dict[str, Any]]:
    """The `count` rows of `PROMPTS`, each with lists under `names`. Raises `Unreadable` where they are damaged or missing."""
    file, shape = folder / PROMPTS, {name: [float] for name in names}
    found = read_lines(file, lambda row: check_shape(row, shape, "no such row"))
    if found.damaged or len(found.rows) != count:
        raise Unreadable(f"{file}: {found.words or 'lines are missing'}; delete the folder {folder}, and run again")
    return found.rows


class Policy(NamedTuple):
    """A measured policy."""

    label: str
    seed: int
    kl: float  # nats
    gain: np.ndarray  # float64[P], true reward minus that of the reference on the same prompt


def policy(result: Result, point: int, rewards: Sequence[float] | Array, reference: Sequence[float] | Array) -> Policy:
    """The policy of a result's point number `point`, from its `rewards[P]` and those of the reference."""
    gain = np.asarray(rewards, np.float64) - np.asarray(reference, np.float64)
    return Policy(result.run.label, result.run.seed, result.points[point]["kl"], gain)


def gains_at_kl(policies: Iterable[Policy], at: float) -> dict[int, np.ndarray | None]:
    """By seed: the gain on each prompt, float64[P], of the best policy or mixture of two, one of which may be the reference,
    within a KL of `at`; None where no policy of the seed reaches it."""
    seeds: dict[int, list[Policy]] = {}
    for one in policies:
        seeds.setdefault(one.seed, []).append(one)
    found: dict[int, np.ndarray | None] = {}
    for seed, mine in seeds.items():
        kls = np.array([0.0, *(one.kl for one in mine)])
        gains = np.stack([np.zeros_like(mine[0].gain), *(one.gain for one in mine)])
        found[seed] = best_mixture(kls, gains.mean(axis=1), at) @ gains if at <= kls.max() else None
    return found


def mean_gain(gains: Mapping[int, np.ndarray | None], *, seed: int) -> Value | None:
    """Mean over prompts and seeds of `gains_at_kl`, with its 95 % interval over both (`over_seeds`); None if there are none.

    The value says how many of the "seeds" are in it, out of those "of". The mixture is taken as given. `seed` is of the
    bootstrap over prompts."""
    known = [with_interval("gain", gain, seed) for gain in gains.values() if gain is not None]
    return over_seeds(known, "gain") | {"seeds": len(known), "of": len(gains)} if known else None


def gain_lost(home: Mapping[int, np.ndarray | None], away: Mapping[int, np.ndarray | None], *, seed: int) -> Value | None:
    """`home - away` prompt by prompt and seed by seed, as `mean_gain`. Only seeds that both have count."""

    def lost(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        return None if one is None or other is None else one - other

    return mean_gain({s: lost(gain, away.get(s)) for s, gain in home.items()}, seed=seed)


def best_setting(policies: Sequence[Policy], *, seed: int) -> dict[str, Any]:
    """The setting with the highest mean gain over seeds: its label, gain (`Value`) and KL. One policy per setting and seed."""
    found = []
    for label in dict.fromkeys(one.label for one in policies):
        mine = [one for one in policies if one.label == label]
        gain = over_seeds([with_interval("gain", one.gain, seed) for one in mine], "gain")
        found.append({"label": label, "gain": gain, "kl": float(np.mean([one.kl for one in mine]))})
    return max(found, key=lambda setting: setting["gain"][""])


def plot_points(policies: Iterable[Policy], *, seed: int) -> list[tuple[float, float, float, float]]:
    """(KL, gain, and its interval over prompts) of every policy, for a figure."""
    ends = [(one.kl, with_interval("gain", one.gain, seed)) for one in policies]
    return [(kl, gain["gain"], gain["gain_low"], gain["gain_high"]) for kl, gain in ends]
