"""Over-optimisation: true and learned reward as KL grows, for sizes of model and data, with the fits of Gao et al. 2022."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.cli.config import Config
from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.robust.runs import REFERENCE, at_width
from dpo_jax.cli.robust.setup import Setup, make_reference, per_prompt
from dpo_jax.data.encode import Encoded
from dpo_jax.data.terminal import json_text
from dpo_jax.evals.frontier import best_of_n
from dpo_jax.evals.overoptimisation import FORMS, GainFit, best_by, fit_gains, gain_at
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.methods import PairMethod
from dpo_jax.lab.ppo import PpoMethod
from dpo_jax.lab.robust import Grid
from dpo_jax.lab.robust_plot import Curve
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.lab.world import Prompts, Scored, with_interval
from dpo_jax.losses import dpo_loss
from dpo_jax.shapes import fit
from dpo_jax.types import Variables
from dpo_jax.untrusted import Unreadable, read_lines
from dpo_jax.writing import writing

PROMPTS = "prompts.jsonl"  # in the folder of a run: for each of its points the values of every prompt
ROW = {"reward": [float], "proxy": [float], "kl": [float]}
FORM = {"best-of-n": "bon", "dpo": "rl", "ppo": "rl"}  # as Gao et al. fit them; the other form is fitted, too
LINES = "fits to the true reward; hollow: the learned one"
POINTS = 40  # of a drawn curve
Cell = tuple[int, int]  # width, prompts


def prepare(config: Config) -> None:
    for width in config.robust.counts("widths"):
        make_reference(at_width(config, width))


class Experiment:
    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.sizes = {w: Size(at_width(config, w), folder / f"width-{w}") for w in config.robust.counts("widths")}
        self.shared = {"widths": {str(w): size.setup.shared for w, size in self.sizes.items()}}

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        size, rows = self.sizes[run.settings["width"]], []
        measure = functools.partial(_measure, size, rows, self._proxy(run))
        if run.method == REFERENCE:
            points = [{"step": 0.0, **measure(size.setup.world.reference)}]
        else:
            points = size.train(run, folder, measure=measure, evaluations=self.config.frontier.evaluations)
        with writing(folder / PROMPTS) as file:
            file.writelines(json_text(row) + "\n" for row in rows)
        return points

    def _proxy(self, run: Run) -> Callable[[Sequence[str], Sequence[str]], Mapping[str, np.ndarray]]:
        """The learned rewards that judge a run: of the reference all, by their number of prompts."""
        size = self.sizes[run.settings["width"]]
        counts = self.config.robust.counts("train_prompts") if run.method == REFERENCE else [run.settings["prompts"]]
        with size.setup.making:
            judges = {count: size.reward(count) for count in counts}
        if run.method != REFERENCE:
            return lambda prompts, texts: {"proxy": judges[counts[0]](prompts, texts)}
        return lambda prompts, texts: {f"proxy_{count}": judge(prompts, texts) for count, judge in judges.items()}

    def summary(self, results: Sequence[Result]) -> tuple[dict[str, Any], list[Curve]]:
        """For each width, number of prompts and method: both forms, fitted, and what the learned reward promised at the end."""
        found, curves = [], []
        for width, size in self.sizes.items():
            (base,) = (self._rows(r) for r in results if r.run.method == REFERENCE and r.run.settings["width"] == width)
            best_of = size.best_of(numbers(self.config.frontier.best_of), self.config.robust.counts("train_prompts"))
            for count, method in itertools.product(self.config.robust.counts("train_prompts"), FORM):
                if method == "best-of-n":
                    kl, gains, proxy, runs = best_of[count]
                else:
                    mine = [
                        r
                        for r in results
                        if r.run.method == method and (r.run.settings["width"], r.run.settings["prompts"]) == (width, count)
                    ]
                    rows = [(number, row) for number, result in enumerate(mine) for row in self._rows(result)]
                    kl = np.array([np.mean(row["kl"]) for _, row in rows])
                    gains = np.array([row["reward"] for _, row in rows]).T - np.array(base[0]["reward"])[:, None]
                    proxy = np.array([np.mean(row["proxy"]) for _, row in rows]) - np.mean(base[0][f"proxy_{count}"])
                    runs = [number for number, _ in rows]
                fits = {form: fit_gains(kl, gains, form=form, seed=self.config.run.seed, runs=runs) for form in FORMS}
                last = int(np.argmax(kl))
                promised = {"kl": float(kl[last]), "true": float(gains[:, last].mean()), "learned": float(proxy[last])}
                marks = {form: _marks(one) for form, one in fits.items()}
                found.append(
                    {
                        "width": width,
                        "prompts": count,
                        "method": method,
                        "form": FORM[method],
                        "fits": marks,
                        "furthest": promised,
                    }
                )
                curves.append(
                    _curve(
                        f"{method}, width {width}",
                        f"{count:,} prompts",
                        kl,
                        gains,
                        proxy,
                        fits[FORM[method]],
                        self.config.run.seed,
                    )
                )
        falls = [{"what": _name(row), "words": row["fits"][row["form"]]["words"]} for row in found]
        return {"fits": found, "falls": falls}, sorted(
            curves, key=lambda curve: list(self.sizes).index(int(curve.panel.rpartition(" ")[2]))
        )

    def _rows(self, result: Result) -> list[dict[str, Any]]:
        """What was measured of each prompt at each point of a run."""
        file = self.folder / "runs" / result.run.name / PROMPTS
        shape = ROW if result.run.method != REFERENCE else {"reward": [float], "kl": [float], str: [float]}
        found = read_lines(file, lambda row: fit(row, shape, "no such row"))
        if found.damaged or len(found.rows) != len(result.points):
            raise Unreadable(f"{file}: {found.words or 'lines are missing'}; delete the folder {file.parent}, and run again")
        return found.rows

    def tables(self, summary: Mapping[str, Any]) -> list[Grid]:
        """What is printed."""
        rows = []
        for row in summary["fits"]:
            one, end = row["fits"][row["form"]], row["furthest"]
            a, b = (f"{one[name]:.2f} ({one[f'{name}_interval'][0]:.2f} to {one[f'{name}_interval'][1]:.2f})" for name in "ab")
            gains = f"{end['true']:.2f} and {end['learned']:.2f} at KL {end['kl']:.2f}"
            rows.append([_name(row), FORMS[row["form"]], a, b, one["words"], gains])
        columns = ["form, d = sqrt(KL)", "a", "b", "true reward falls", "furthest: gain, true and learned"]
        note = "95 % intervals over prompts and seeds; what the learned reward gains beyond the true one is over-optimisation"
        return [Grid("fit of the true reward", columns, rows, note)]


def _marks(fitted: GainFit) -> dict[str, Any]:
    """A fit for a JSON file, where None stands for a curve that rises for ever."""
    peak, ends = ([x if math.isfinite(x) else None for x in some] for some in ([fitted.falls_after], fitted.falls_interval))
    return {**fitted._asdict(), "falls_after": peak[0], "falls_interval": ends, "falls": fitted.falls, "words": fitted.words}


def _name(row: Mapping[str, Any]) -> str:
    return f"width {row['width']}, {row['prompts']:,} prompts, {row['method']}"


class Size:
    """All that depends on the width of the model. Made when a run first asks."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.setup = Setup(config, folder)
        self._rewards: dict[int, Reward] = {}
        self._dpo: dict[int, PairMethod] = {}

    @functools.cached_property
    def pairs(self) -> Sequence[Encoded]:
        return self.setup.labelled(self.setup.world, "train")

    def first(self, count: int) -> list[Encoded]:
        """The pairs of the first `count` prompts."""
        number = dict.fromkeys(pair.prompt.tobytes() for pair in self.pairs)
        wanted = set(itertools.islice(number, count))
        return [pair for pair in self.pairs if pair.prompt.tobytes() in wanted]

    def reward(self, count: int) -> Reward:
        if count not in self._rewards:
            self._rewards[count] = self.setup.reward_model(self.setup.world, self.first(count), f"{count}-prompts")
        return self._rewards[count]

    @functools.cached_property
    def ppo(self) -> PpoMethod:
        return self.setup.ppo(self.setup.world)

    def dpo(self, count: int) -> PairMethod:
        world = self.setup.world
        if count not in self._dpo:
            self._dpo[count] = self.setup.method(world, self.setup.data(world, self.first(count)), dpo_loss)
        return self._dpo[count]

    def train(self, run: Run, folder: Path, **options: Any) -> list[dict[str, float]]:
        count = run.settings["prompts"]
        if run.method == "ppo":
            with self.setup.making:
                method, reward = self.ppo, self.reward(count)
            return self.setup.train_ppo(method, run, folder, reward, **options)[0]
        with self.setup.making:
            method = self.dpo(count)
        return method.train(folder, settings={"beta": run.settings["beta"]}, seed=run.seed, **options)[0]

    @functools.cached_property
    def drawn(self) -> tuple[Prompts, Scored]:
        return self.setup.reference_samples(self.setup.world)

    def best_of(
        self, several: Sequence[float], counts: Sequence[int]
    ) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]]:
        """Best-of-N by each learned reward: KL [n], gains in true reward [P, n] and in the learned one [n], and one run."""
        prompts, scored = self.drawn
        shape = len(prompts.ids) // self.setup.config.frontier.optimum_samples
        true = per_prompt(scored.rewards, shape)
        ns = [int(n) for n in several if 1 < n <= true.shape[1]]
        found = {}
        for count in counts:
            proxy = per_prompt(self.reward(count)(prompts.texts, scored.completions.texts), shape)
            best = [best_of_n(proxy, n) for n in ns]
            gains = np.stack([best_by(proxy, true, n) for n in ns], axis=1) - true.mean(axis=1, keepdims=True)
            promised = np.array([one.reward.mean() for one in best]) - proxy.mean()
            found[count] = np.array([one.kl.mean() for one in best]), gains, promised, [0] * len(ns)
        return found


def _measure(
    size: Size,
    rows: list[dict[str, list[float]]],
    judge: Callable[[Sequence[str], Sequence[str]], Mapping[str, np.ndarray]],
    variables: Variables,
) -> dict[str, float]:
    """A point of a policy with what learned rewards say of it; the values of each prompt go to `rows`."""
    world = size.setup.world
    found = world.observe(variables)
    judged = judge(world.test.texts, found.completions.texts)
    rows.append(
        {name: np.asarray(x, np.float64).tolist() for name, x in {"reward": found.rewards, "kl": found.kl, **judged}.items()}
    )
    point = world.point(found)
    for name, values in judged.items():
        point |= with_interval(name, np.asarray(values, np.float64), world.seed)
    return point


def _curve(panel: str, name: str, kl: np.ndarray, gains: np.ndarray, proxy: np.ndarray, fitted: GainFit, seed: int) -> Curve:
    ends = [with_interval("gain", column, seed) for column in gains.T]
    points = [(x, e["gain"], e["gain_low"], e["gain_high"]) for x, e in zip(kl.tolist(), ends, strict=True)]
    line = np.linspace(0.0, np.sqrt(kl.max()), POINTS) ** 2
    return Curve(panel, name, points, line, gain_at(fitted, line), list(zip(kl.tolist(), proxy.tolist(), strict=True)))
