import itertools
import math
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from dpo_jax.evals.curves import PANELS, guide_of
from dpo_jax.evals.drawing import spread
from dpo_jax.evals.frontier import Point, measured, optimum
from dpo_jax.evals.frontier_plot import _set_apart, plot_frontier
from dpo_jax.evals.palette import STYLES
from dpo_jax.evals.plots import plot_displacement, plot_training

save = Figure.savefig


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


CURVE = optimum(np.random.default_rng(0).normal(size=(8, 300)), [math.inf, 4.0, 1.0, 0.5, 0.2], seed=0)
POINTS = [
    Point("SFT", "", 0.0, 0.0),
    *(Point("DPO", setting, kl, reward) for setting in ("0.1", "1") for kl, reward in ((0.2, 0.3), (0.9, 1.0))),
    measured("Best-of-N", "4", rewards=np.arange(3.0), kls=np.array([0.5, 0.6, 0.7]), seed=0, kl_bound=0.64),
    Point("Unlikelihood", "1", 250.0, -3.0, (200.0, 300.0), (-4.0, -2.0)),
]


@pytest.mark.parametrize("max_kl", [None, 5.0])
def test_the_frontier_names_every_method_once(tmp_path, monkeypatch, max_kl):
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **options: drawn.append(figure) or save(figure, path, **options)
    )
    path = plot_frontier(POINTS, CURVE, tmp_path / "frontier.png", max_kl=max_kl)
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    texts = [text.get_text() for text in axes.texts]
    for name in ("SFT", "DPO", "Best-of-N", "Unlikelihood", "optimum (eq. 4)", "too few effective samples from here"):
        assert texts.count(name) == 1
    assert not axes.get_legend()
    assert any("KL 250" in text for text in texts) == (max_kl is not None)
    markers = {line.get_marker() for line in axes.lines} - {"None", "|"}
    assert len(markers) == 4  # one for each method


def test_the_frontier_can_tell_so_many_methods_apart_and_no_more(tmp_path):
    many = [Point(f"method {number}", "", 1.0, float(number)) for number in range(len(STYLES) + 1)]
    assert len({style.marker for style in STYLES}) == len({style.line for style in STYLES}) == len(STYLES)
    with pytest.raises(ValueError, match="styles that can be told apart"):
        plot_frontier(many, CURVE, tmp_path / "frontier.png")


GAP = 0.045


def test_labels_keep_their_distance_and_their_order():
    for heights in ([0.5] * 4, [0.0, 0.01, 0.5, 0.52, 0.53, 1.0], [0.1, 0.9], np.sort(np.random.default_rng(0).random(12))):
        placed = spread(list(heights), GAP)
        assert (np.diff(placed) >= GAP - 1e-9).all()
        assert np.mean(placed) == pytest.approx(np.mean(heights))
    assert spread([0.1, 0.9], GAP) == [0.1, 0.9]


def test_displacements_of_several_runs_in_one_image(tmp_path):
    runs = {f"run {number}": [training_row(step) for step in range(20)] for number in range(5)}
    runs["DPO, only evaluated"] = [{"step": 3, "eval/displacement/chosen": -1.0, "eval/displacement/rejected": -5.0}]
    runs["SFT"] = [{"step": 0, "loss": 3.0}]
    path = plot_displacement(runs, tmp_path / "displacement.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="none of the 1 runs has displacement/chosen"):
        plot_displacement({"SFT": runs["SFT"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_labels_of_a_frontier_stand_apart_and_one_without_a_place_goes():
    axes = Figure().add_subplot(xlim=(0, 10), ylim=(0, 10))
    places = [(5, 5)] * 6 + [(5.1, 5), (10, 2)]  # the last at the edge, beside which the names of the methods are
    for number, at in enumerate(places):
        axes.annotate(f"setting {number}", at, (4, -9), textcoords="offset points")
    _set_apart(axes, list(axes.texts))
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    kept = [text.get_text() for text in axes.texts]
    assert "setting 0" in kept
    assert "setting 5" not in kept
    assert boxes[kept.index("setting 7")].x1 < axes.transData.transform((10, 2))[0]
