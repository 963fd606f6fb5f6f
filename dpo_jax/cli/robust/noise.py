"""Label noise: DPO, conservative DPO, robust DPO and IPO on pairs with a known flip rate, compared with theory."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.cli.config import Config
from dpo_jax.cli.robust.runs import REFERENCE, unflipped
from dpo_jax.cli.robust.setup import Measure, Setup, per_prompt
from dpo_jax.cli.starting_policy import make_reference
from dpo_jax.data.terminal import json_text
from dpo_jax.evals.frontier import Optimum, optimum
from dpo_jax.lab.methods import PairData, PairMethod
from dpo_jax.lab.noise import flipped, predicted_curve
from dpo_jax.lab.optimum import BETAS
from dpo_jax.lab.paired import (
    PROMPTS_KEPT,
    best_setting,
    gains_at_kl,
    mean_gain,
    plot_points,
    policy,
    read_prompts,
    write_prompts,
)
from dpo_jax.lab.robust import EQUAL_KL, Grid, cell, curve_at
from dpo_jax.lab.robust_plot import Curve
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.losses import dpo_loss, ipo_loss, robust_loss
from dpo_jax.shapes import check_shape
from dpo_jax.types import Variables
from dpo_jax.untrusted import Unreadable, read_lines
from dpo_jax.writing import writing

NAMES = {"dpo": "DPO", "cdpo": "conservative DPO", "robust": "robust DPO", "ipo": "IPO"}
LOSSES = {"dpo": dpo_loss, "cdpo": dpo_loss, "robust": robust_loss, "ipo": ipo_loss}
REWARDS = "rewards.jsonl"  # in the folder of the reference's run: true rewards of its samples, one line per prompt
LINES = "what the expected loss predicts"
prepare = make_reference


class Experiment:
    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.setup = config, Setup(config, folder)
        self.shared, self._methods = self.setup.shared | PROMPTS_KEPT, {}

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        world, rewards = self.setup.world, []

        def measure(variables: Variables) -> dict[str, float]:
            found = world.observe(variables)
            rewards.append(found.rewards)
            return world.point(found)

        points = self._train(run, folder, measure)
        write_prompts(folder, [{"reward": rewards[-1]}])
        return points

    def _train(self, run: Run, folder: Path, measure: Measure) -> list[dict[str, float]]:
        """The last point of a run."""
        world = self.setup.world
        if run.method == REFERENCE:
            _, scored = self.setup.reference_samples(world)
            with writing(folder / REWARDS) as file:
                rewards = per_prompt(scored.rewards, run.settings["samples"]).tolist()
                file.writelines(json_text({"rewards": row}) + "\n" for row in rewards)
            return [{"step": 0.0, **measure(world.reference)}]
        rate, beta = run.settings["rate"], run.settings["beta"]
        with self.setup.making:
            method = self._method(run.method)
        data, count = flipped(self.data, rate, seed=run.seed)
        # Conservative and robust DPO are given the true flip rate; DPO assumes no flips, and IPO has no such option.
        assumed = {"dpo": {"label_smoothing": 0.0}, "ipo": {}}.get(run.method, {"label_smoothing": rate})
        settings = {"beta": beta, **assumed}
        points, _ = method.train(folder, settings=settings, evaluations=1, seed=run.seed, data=data, measure=measure)
        pairs = sum(len(group.pairs) for group in data.groups)
        return [{**points[-1], "flipped": float(count), "pairs": float(pairs)}]

    @functools.cached_property
    def data(self) -> PairData:
        return self.setup.data(self.setup.world, self.setup.labeled(self.setup.world, "train"))

    def _method(self, name: str) -> PairMethod:
        loss = LOSSES[name]
        if loss not in self._methods:
            self._methods[loss] = self.setup.method(self.setup.world, self.data, loss)
        return self._methods[loss]

    def summary(self, results: Sequence[Result]) -> tuple[dict[str, Any], list[Curve]]:
        """For each flip rate and loss: measured gain at equal KL, predicted gain, and that of eq. 4; and the best beta. Also
        the figure's data."""
        (start,) = (r for r in results if r.run.method == REFERENCE)
        reference, rewards, seed = self._measured(start), self._rewards(start.run), self.config.run.seed
        best = optimum(rewards, BETAS, seed=seed)
        found, curves = [], []
        for rate in self.config.robust.rates():
            for loss in self.config.robust.chosen():
                mine = [policy(result, 0, self._measured(result), reference) for result in _of(results, loss, rate)]
                kl, reward = predicted_curve(loss, rewards, BETAS, rate=rate)
                # Beyond the reach of the samples neither curve can be trusted.
                theory = {at: curve_at(kl, reward - best.reference, at) if at <= best.reach else None for at in EQUAL_KL}
                for at in EQUAL_KL:
                    gain = mean_gain(gains_at_kl(mine, at), seed=seed)
                    possible = curve_at(best.kl, best.reward - best.reference, at) if at <= best.reach else None
                    found.append(
                        {"rate": rate, "loss": loss, "kl": at, "gain": gain, "predicted": theory[at], "possible": possible}
                    )
                found.append({"rate": rate, "loss": loss, "kl": None, "best": best_setting(mine, seed=seed)})
                curves.append(_curve(f"{rate:.0%} flipped", loss, plot_points(mine, seed=seed), (kl, reward), best))
        return {"reference": start.points[-1]["reward"], "reach": best.reach, "gains": found}, curves

    def _measured(self, result: Result) -> list[float]:
        """True reward of a policy on each test prompt."""
        (row,) = read_prompts(self.setup.folder / "runs" / result.run.name, 1)
        return row["reward"]

    def _rewards(self, run: Run) -> np.ndarray:
        """True rewards [P, M] of the reference's own samples."""
        file = self.setup.folder / "runs" / run.name / REWARDS
        shape = {"rewards": [float]}
        found = read_lines(file, lambda row: check_shape(row, shape, "no such row"))
        lengths = {len(row["rewards"]) for row in found.rows}
        if found.damaged or lengths != {run.settings["samples"]}:
            raise Unreadable(f"{file}: {found.words or 'samples are missing'}; delete the folder {file.parent}, and run again")
        return np.array([row["rewards"] for row in found.rows])

    def tables(self, summary: Mapping[str, Any]) -> list[Grid]:
        """The printed tables."""
        rates, losses = self.config.robust.rates(), self.config.robust.chosen()
        cells = {(row["rate"], row["loss"], row["kl"]): row for row in summary["gains"]}
        columns, found = [f"{rate:.0%} flipped" for rate in rates], []
        for at in EQUAL_KL:
            rows = [
                [NAMES[loss], *(cell((row := cells[rate, loss, at])["gain"], beside=row["predicted"]) for rate in rates)]
                for loss in losses
            ]
            possible = cells[rates[0], losses[0], at]["possible"]
            note = "" if possible is None else f"the optimum (eq. 4) gains {possible:.2f}"
            found.append(Grid(f"gain at KL {at:g}", columns, rows, note))
        best = [[NAMES[loss], *(_best(cells[rate, loss, None]["best"]) for rate in rates)] for loss in losses]
        note = (
            "gain in true reward over the reference, 95 % interval over prompts and seeds, [what the expected loss predicts]; "
            "of the policies measured the best counts, chosen on the same prompts"
        )
        return [*found, Grid("best beta", columns, best, note)]


def _of(results: Sequence[Result], loss: str, rate: float) -> list[Result]:
    ran = loss if rate else unflipped(loss)
    return [r for r in results if r.run.method == ran and r.run.settings["rate"] == rate]


def _curve(
    panel: str,
    loss: str,
    points: Sequence[tuple[float, float, float, float]],
    theory: tuple[np.ndarray, np.ndarray],
    best: Optimum,
) -> Curve:
    kl, reward = theory
    inside = kl <= best.reach
    return Curve(panel, NAMES[loss], points, kl[inside], reward[inside] - best.reference)


def _best(best: Mapping[str, Any]) -> str:
    """The gain at the best beta, and that beta."""
    return f"{cell(best['gain'])}, {best['label'][best['label'].index('beta') :]}, KL {best['kl']:.2f}"
