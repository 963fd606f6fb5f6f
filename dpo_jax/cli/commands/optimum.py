"""`dpo-jax optimum`: the optimal reward-KL frontier (eq. 4) and Best-of-N, estimated from samples of the reference alone.

Writes `optimum.json` and `optimum.png` to `<run.dir>/optimum`. With M samples per prompt the estimate reaches about log M nats;
`dpo-jax frontier` reaches further, because it also samples its trained policies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config
from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.experiment import make_world, sized
from dpo_jax.evals.frontier import Optimum
from dpo_jax.evals.frontier_plot import plot_frontier
from dpo_jax.lab import report
from dpo_jax.lab.optimum import estimate, to_json
from dpo_jax.lab.sweep import Result
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.rundir import write_json

KLS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)  # KLs of the printed table, in nats


def run(config: Config) -> int:
    config = sized(config)
    section = config.frontier
    with build.open_run(config, "optimum") as run_dir:
        world, _ = make_world(config, train=None, test="optimum_prompts")
        build.describe(run_dir, config)
        print(f"{section.optimum_samples} completions of each of {len(world.test.ids)} prompts", flush=True)
        best, drawn = estimate(world, world.test, samples=section.optimum_samples, policies=[], seed=config.run.seed)
        several = numbers(section.best_of)
        best_of_n = report.best_of_results(drawn.rewards, several, seed=config.run.seed, beside=drawn.beside)
        if not is_first():
            return 0
        points = [{"n": result.run.settings["n"], **result.points[0]} for result in best_of_n]
        write_json(run_dir.path / "optimum.json", {**to_json(best), "best_of_n": points})
        figure = plot_frontier(report.points(best_of_n), best, run_dir.path / "optimum.png")
        print(f"{_curve(best)}\n\n{_best_of_n(best_of_n)}\n\nfigure: {figure}")
    return 0


def _curve(best: Optimum) -> str:
    """Reward, its interval and effective sample size of the optimum by KL, as far as the curve goes."""
    lines = [f"{'KL (nats)':>12}{'optimum':>10}{'95 % interval':>20}{'effective samples':>20}"]
    for at in (kl for kl in KLS if kl <= best.kl[-1]):
        reward, low, high, ess = (
            float(np.interp(at, best.kl, values)) for values in (best.reward, *best.band, best.ess * best.samples)
        )
        few = "" if at <= best.reach else "  too few to trust"
        lines.append(f"{at:>12g}{reward:>10.2f}{f'{low:.2f} to {high:.2f}':>20}{ess:>20.0f}{few}")
    return "\n".join([*lines, f"the reference has a reward of {best.reference:.2f}; trusted up to {best.reach:.2f} nats"])


def _best_of_n(results: Sequence[Result]) -> str:
    lines = [f"{'best of N':>12}{'reward':>10}{'95 % interval':>20}{'KL (nats)':>12}{'its bound':>12}"]
    for result in results:
        p = result.points[0]
        interval = f"{p['reward_low']:.2f} to {p['reward_high']:.2f}"
        lines.append(f"{result.run.settings['n']:>12}{p['reward']:>10.2f}{interval:>20}{p['kl']:>12.2f}{p['kl_bound']:>12.2f}")
    return "\n".join(lines)
