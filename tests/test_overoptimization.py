"""Over-optimization: where reward falls as KL grows, told from scatter, and as the report shows it."""

import csv

import numpy as np
import pytest

from dpo_jax.evals.overoptimization import declines, fit_gains
from dpo_jax.report.experiments import frontier
from dpo_jax.report.run_record import read_run


@pytest.mark.parametrize("runs", [2, 3])
def test_intervals_of_a_fit_hold_for_runs_that_differ(runs):
    """A bootstrap over two or three runs covered 50 and 69 %."""
    rng, kl, held = np.random.default_rng(0), np.tile([1.0, 2.0, 4.0, 8.0], runs), 0
    d, of = np.sqrt(kl), np.repeat(np.arange(runs), 4)
    for _ in range(200):
        gains = d * (rng.normal(3, 0.3, runs)[of] - 0.5 * np.log(d))
        found = fit_gains(kl, np.tile(gains, (4, 1)), form="rl", seed=0, runs=of, resamples=2)
        held += found.a_interval[0] <= 3 <= found.a_interval[1]
    assert 0.91 < held / 200 < 0.99


def test_declines_tell_a_fall_from_scatter(tmp_path):
    def point(kl, reward, half, label="beta 1"):
        return {"method": "dpo", "label": label, "seed": "0", "kl": str(kl), "reward": str(reward)} | {
            "reward_low": str(reward - half),
            "reward_high": str(reward + half),
        }

    fell = [point(1, 3, 0.3), point(4, 5, 0.3), point(9, 4, 0.4)]
    (row,) = declines(fell)
    assert (row.best_kl, row.best_reward, row.last_kl, row.last_reward, row.fall) == (4, 5, 9, 4, 1)
    assert row.interval == pytest.approx((0.5, 1.5))  # 0.3 and 0.4 add up to 0.5 in squares
    assert row.overoptimized
    scatter = [*fell[:2], point(9, 4, 1.0)]
    nearer = [*fell[:2], point(2, 4, 0.4)]
    assert [row.overoptimized for rows in (scatter, nearer) for row in declines(rows)] == [False, False]
    assert declines([point(1, 3, 0.3), point(1, 3, 0.3, label="other")]) == []
    for stage in ("frontier", "dpo"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "config.yaml").write_text("")
    with open(tmp_path / "run" / "frontier" / "results.csv", "w") as file:
        writer = csv.DictWriter(file, list(fell[0]))
        writer.writeheader()
        writer.writerows(fell)
    section = frontier([read_run(tmp_path / "run", name="r")], tmp_path)
    table, figures = section.blocks
    assert table.rows == [["dpo beta 1", "5.00", "4.00", "4.00", "9.00", "1.00 (0.50 to 1.50)", "yes"]]
    assert figures.images[0][0].read_bytes().startswith(b"\x89PNG")
