"""Over-optimization: true and learned reward as KL grows, by model and data size, with the fits of Gao et al. 2022."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.cli.config import Config
from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.robust.runs import at_width
from dpo_jax.cli.robust.setup import Setup, per_prompt
from dpo_jax.cli.starting_policy import make_reference
from dpo_jax.data.encode import Encoded
from dpo_jax.evals.frontier import best_of_n
from dpo_jax.evals.overoptimization import FORMS, GainFit, best_by, fit_gains, gain_at
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.methods import PairMethod
from dpo_jax.lab.paired import read_prompts, write_prompts
from dpo_jax.lab.ppo import PpoMethod
from dpo_jax.lab.robust import Grid
from dpo_jax.lab.robust_plot import Curve
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.lab.world import Observed, Prompts, Scored, with_interval
from dpo_jax.losses import dpo_loss
from dpo_jax.types import Variables

FORM = {"best-of-n": "bon", "dpo": "rl", "ppo": "rl"}  # as Gao et al. fit them; the other form is fitted, too
LINES = "fits to the true reward; hollow: the learned one"
POINTS = 40  # points of a drawn curve
Row = dict[str, np.ndarray]
"""True reward, learned reward and KL in nats of each prompt: float64[P] each. A run keeps those of the reference, then those of
each of its points."""


class Measured(NamedTuple):
    """Data of a fit: n points of several runs (seeds), as gains over the reference."""

    kl: np.ndarray  # float64[n], nats
    gains: np.ndarray  # float64[P, n], in true reward
    proxy: np.ndarray  # float64[n], in the learned one
    runs: np.ndarray  # int64[n], the run of each point


def prepare(config: Config) -> None:
    for width in config.robust.counts("widths"):
        make_reference(at_width(config, width))


class Experiment:
    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.sizes = {w: Size(at_width(config, w), folder / f"width-{w}") for w in config.robust.counts("widths")}
        widths = {str(w): size.setup.shared for w, size in self.sizes.items()}
        counts = config.robust.counts("train_prompts")
        # Earlier versions took one pass over any number of prompts.
        steps = {"steps": f"as many as for {max(counts)} prompts"} if len(counts) > 1 else {}
        self.shared = {"widths": widths, **steps}

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        points, rows = self.sizes[run.settings["width"]].perform(run, folder)
        write_prompts(folder, rows)
        return points

    def summary(self, results: Sequence[Result]) -> tuple[dict[str, Any], list[Curve]]:
        """For each width, number of prompts and method: both fitted forms, and the final gain by the learned reward."""
        section, seed = self.config.robust, self.config.run.seed
        found, curves = [], []
        for width, method, count in itertools.product(section.counts("widths"), FORM, section.counts("train_prompts")):
            cell = {"width": width, "prompts": count}
            named = {**cell, "passes": self.sizes[width].passes(count), "method": method, "form": FORM[method]}
            mine = [r for r in results if r.run.method == method and cell.items() <= r.run.settings.items()]
            measured = self._measured(mine)
            kl, gains, proxy, runs = measured
            fits = {form: fit_gains(kl, gains, form=form, seed=seed, runs=runs) for form in FORMS}
            last = int(np.argmax(kl))
            furthest = {"kl": float(kl[last]), "true": float(gains[:, last].mean()), "learned": float(proxy[last])}
            marks = {form: _marks(one) for form, one in fits.items()}
            found.append({**named, "fits": marks, "furthest": furthest})
            curves.append(_curve(f"{method}, width {width}", f"{count:,} prompts", measured, fits[FORM[method]], seed))
        falls = [{"what": _name(row), "words": row["fits"][row["form"]]["words"]} for row in found]
        return {"fits": found, "falls": falls}, curves

    def _measured(self, results: Sequence[Result]) -> Measured:
        kl, gains, proxy, runs = [], [], [], []
        for number, result in enumerate(results):
            base, *rows = self._rows(result)
            kl += [np.mean(row["kl"]) for row in rows]
            gains += [np.array(row["reward"]) - np.array(base["reward"]) for row in rows]
            proxy += [np.mean(row["proxy"]) - np.mean(base["proxy"]) for row in rows]
            runs += [number] * len(rows)
        return Measured(np.array(kl), np.stack(gains, axis=1), np.array(proxy), np.array(runs))

    def _rows(self, result: Result) -> list[dict[str, Any]]:
        return read_prompts(self.folder / "runs" / result.run.name, len(result.points) + 1, ("reward", "proxy", "kl"))

    def tables(self, summary: Mapping[str, Any]) -> list[Grid]:
        """The printed tables."""
        rows = []
        for row in summary["fits"]:
            one, end = row["fits"][row["form"]], row["furthest"]
            a, b = (f"{one[name]:.2f} ({one[f'{name}_interval'][0]:.2f} to {one[f'{name}_interval'][1]:.2f})" for name in "ab")
            gains = f"{end['true']:.2f} and {end['learned']:.2f} at KL {end['kl']:.2f}"
            rows.append([_name(row), f"{row['passes']:g}", FORMS[row["form"]], a, b, one["words"], gains])
        columns = ["passes", "form, d = sqrt(KL)", "a", "b", "true reward falls", "furthest: gain, true and learned"]
        note = (
            "95 % intervals over prompts and, of several runs, over seeds (Student's t); what the learned reward gains beyond "
            "the true one is over-optimization; passes: over the pairs, for the learned reward and for DPO, in units of the "
            "configured epochs: all numbers of prompts take the same number of optimizer steps"
        )
        return [Grid("fit of the true reward", columns, rows, note)]


def _marks(fitted: GainFit) -> dict[str, Any]:
    """A fit for a JSON file, where None stands for a curve that never stops rising."""
    peak, ends = ([x if math.isfinite(x) else None for x in some] for some in ([fitted.falls_after], fitted.falls_interval))
    return {**fitted._asdict(), "falls_after": peak[0], "falls_interval": ends, "falls": fitted.falls, "words": fitted.words}


def _name(row: Mapping[str, Any]) -> str:
    return f"width {row['width']}, {row['prompts']:,} prompts, {row['method']}"


class Size:
    """Everything that depends on the model's width. Made when a run first needs it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.setup = Setup(config, folder)
        self._rewards: dict[int, Reward] = {}
        self._dpo: dict[int, PairMethod] = {}
        self._base: Observed | None = None  # the reference on the test prompts
        self._drawn: tuple[Prompts, Scored] | None = None

    @functools.cached_property
    def pairs(self) -> Sequence[Encoded]:
        return self.setup.labeled(self.setup.world, "train")

    def passes(self, count: int) -> float:
        """Passes over the pairs of `count` prompts that take as many steps as one over those of the largest number. With one
        pass each, the effect of more data could not be told from that of more steps."""
        return max(self.setup.config.robust.counts("train_prompts")) / count

    def first(self, count: int) -> list[Encoded]:
        """The pairs of the first `count` prompts; prompt numbers are in the uids of `data.label`: "samples:7:0-2"."""
        return [pair for pair in self.pairs if int(pair.uid.split(":")[1]) < count]

    def reward(self, count: int) -> Reward:
        if count not in self._rewards:
            pairs, passes = self.first(count), self.passes(count)
            self._rewards[count] = self.setup.reward_model(self.setup.world, pairs, f"{count}-prompts", passes=passes)
        return self._rewards[count]

    @functools.cached_property
    def ppo(self) -> PpoMethod:
        return self.setup.ppo(self.setup.world)

    def dpo(self, count: int) -> PairMethod:
        world = self.setup.world
        if count not in self._dpo:
            data = self.setup.data(world, self.first(count))
            self._dpo[count] = self.setup.method(world, data, dpo_loss, passes=self.passes(count))
        return self._dpo[count]

    def perform(self, run: Run, folder: Path) -> tuple[list[dict[str, float]], list[Row]]:
        """The points of a run, and the values for every prompt: of the reference, then of each point."""
        count = run.settings["prompts"]
        with self.setup.making:
            reward = self.reward(count)
            if run.method == "best-of-n":
                return self._best_of(run, reward)
            if self._base is None:
                self._base = self.setup.world.observe(self.setup.world.reference)
            method = self.ppo if run.method == "ppo" else self.dpo(count)
        rows = [self._row(self._base, reward)]

        def measure(variables: Variables) -> dict[str, float]:
            found = self.setup.world.observe(variables)
            rows.append(self._row(found, reward))
            return {**self.setup.world.point(found), **with_interval("proxy", rows[-1]["proxy"], self.setup.world.seed)}

        options: dict[str, Any] = {"evaluations": self.setup.config.frontier.evaluations, "measure": measure}
        if isinstance(method, PpoMethod):
            points, _ = self.setup.train_ppo(method, run, folder, reward, **options)
        else:
            points, _ = method.train(folder, settings={"beta": run.settings["beta"]}, seed=run.seed, **options)
        return points, rows

    def _row(self, found: Observed, reward: Reward) -> Row:
        proxy = np.asarray(reward(self.setup.world.test.texts, found.completions.texts), np.float64)
        return {"reward": found.rewards, "proxy": proxy, "kl": np.asarray(found.kl, np.float64)}

    def _best_of(self, run: Run, reward: Reward) -> tuple[list[dict[str, float]], list[Row]]:
        """Best-of-N under a learned reward, from samples of the reference."""
        if self._drawn is None:
            self._drawn = self.setup.reference_samples(self.setup.world)
        prompts, scored = self._drawn
        judged = reward(prompts.texts, scored.completions.texts)
        true, proxy = (per_prompt(values, run.settings["samples"]) for values in (scored.rewards, judged))
        ns = [1, *(int(n) for n in numbers(run.settings["best_of"]) if 1 < n <= true.shape[1])]
        best = [best_of_n(proxy, n) for n in ns]
        rows = [{"reward": best_by(proxy, true, one.n), "proxy": one.reward, "kl": one.kl} for one in best]
        points = []
        for one, row in zip(best[1:], rows[1:], strict=True):
            point = {"step": float(one.n), "kl_bound": one.kl_bound}
            for name, values in row.items():
                point |= with_interval(name, values, run.seed)
            points.append(point)
        return points, rows


def _curve(panel: str, name: str, measured: Measured, fitted: GainFit, seed: int) -> Curve:
    kl = measured.kl.tolist()
    ends = [with_interval("gain", column, seed) for column in measured.gains.T]
    points = [(x, e["gain"], e["gain_low"], e["gain_high"]) for x, e in zip(kl, ends, strict=True)]
    line = np.linspace(0.0, np.sqrt(max(kl)), POINTS) ** 2
    return Curve(panel, name, points, line, gain_at(fitted, line), list(zip(kl, measured.proxy.tolist(), strict=True)))
