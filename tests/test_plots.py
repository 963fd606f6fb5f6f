import math
import sys

from dpo_jax.evals.plots import PANELS, guide_of, plot_training


def training_row(step):
    names = [line.metric for panel in PANELS for line in panel.lines if line.metric != "nll_per_token"]
    return {"step": step} | {name: math.sin(step / 9) for name in names} | ({"loss": None} if step == 3 else {})


def test_a_dpo_run_has_every_panel_but_the_likelihood(tmp_path):
    rows = [training_row(step) for step in range(90)]
    accuracies = {"eval/rewards/accuracies": 0.5, "eval/rewards/accuracies_low": 0.4, "eval/rewards/accuracies_high": 0.6}
    rows += [{"step": step, "eval/loss": 0.6, **accuracies} for step in (0, 90)]
    written = plot_training(rows, tmp_path / "plots")
    assert [path.name for path in written] == [f"{panel.file}.png" for panel in PANELS if panel.file != "nll"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert "matplotlib.pyplot" not in sys.modules  # no global figures, no display


def test_a_run_without_rows_or_with_one(tmp_path):
    assert plot_training([], tmp_path) == []
    assert [path.name for path in plot_training([{"step": 0, "loss": 3.0, "nll_per_token": 1.0}], tmp_path)] == [
        "loss.png",
        "nll.png",
    ]


def test_ln_2_guides_the_eye_only_where_the_loss_begins_there():
    loss, kl = (next(panel for panel in PANELS if panel.file == file) for file in ("loss", "kl"))

    def rows(first):
        return [{"step": 0, "loss": first, "rewards/margins": 0.0}, {"step": 1, "loss": 0.7, "rewards/margins": 0.1}]

    assert guide_of(loss, rows(0.6931)) == loss.guide
    for first in (25.0, 41.2, -3.0):  # IPO, Preferred-FT, unlikelihood
        assert guide_of(loss, rows(first)) is None
        assert guide_of(kl, rows(first)) == kl.guide
    assert guide_of(loss, [{"step": 0, "loss": 0.6931, "nll_per_token": 0.1}]) is None
