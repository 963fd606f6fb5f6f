import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dpo_jax.cli.config.lab import METHODS
from dpo_jax.evals.calibration import Reliability
from dpo_jax.evals.calibration_plot import plot_reliability
from dpo_jax.evals.frontier import Point, measured, optimum
from dpo_jax.evals.frontier_plot import _set_apart, plot_frontier, plot_trajectories
from dpo_jax.plotting.curves import PANELS, guide_of, running_mean, window_of
from dpo_jax.plotting.drawing import spread
from dpo_jax.plotting.palette import CHOSEN, REJECTED, STYLES, style_of
from dpo_jax.plotting.training_curves import plot_displacement, plot_runs, plot_training

save = Figure.savefig


def captured(monkeypatch):
    """The figures by file name, as they are saved from now on."""
    drawn = {}

    def keep(figure, path, **options):
        drawn[Path(path).name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


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
    drawn = captured(monkeypatch)
    path = plot_frontier(POINTS, CURVE, tmp_path / "frontier.png", max_kl=max_kl)
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = drawn["frontier.png"].axes[0]
    texts = [text.get_text() for text in axes.texts]
    for name in ("SFT", "DPO", "Best-of-N", "Unlikelihood", "optimum (eq. 4)", "too few effective samples from here"):
        assert texts.count(name) == 1
    assert not axes.get_legend()
    assert any("KL 250" in text for text in texts) == (max_kl is not None)
    markers = {line.get_marker() for line in axes.lines} - {"None", "|"}
    assert len(markers) == 4  # one for each method


def test_the_frontier_tells_all_methods_apart(tmp_path, monkeypatch):
    assert len({style.marker for style in STYLES}) == len({style.line for style in STYLES}) == len(STYLES)
    styles = [style_of(number) for number in range(len(STYLES) ** 2)]
    assert tuple(styles[: len(STYLES)]) == STYLES
    assert len({(style.marker, style.line) for style in styles}) == len(styles)
    drawn = captured(monkeypatch)
    assert len(METHODS) > len(STYLES)
    every = ["reference", *METHODS]
    points = [Point(name, "", 0.1 * number, 0.1 * number) for number, name in enumerate(every)]
    plot_frontier(points, CURVE, tmp_path / "frontier.png")
    axes = drawn["frontier.png"].axes[0]
    assert {*every} <= {text.get_text() for text in axes.texts}
    finals = {(line.get_marker(), line.get_color()) for line in axes.lines} - {("None", "black")}
    assert len([look for look in finals if look[0] != "None"]) == len(every)


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


def dpo_rows(steps=200):
    """A run as the quickstart has: three rewards that move apart, noise, and a rate that warms up over ten steps."""
    noise = np.random.default_rng(0).normal(size=(steps, 4))
    rows = []
    for step in range(steps):
        chosen, rejected = -2 * step / steps + 0.2 * noise[step, 0], -5 * step / steps + 0.3 * noise[step, 1]
        rewards = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        moved = {"displacement/chosen": 2 * chosen, "displacement/rejected": 2 * rejected}
        others = {"loss": 0.69 - 0.5 * step / steps, "rewards/accuracies": 0.8, "kl_reference_policy": -chosen - rejected}
        rows.append({"step": step, **rewards, **moved, **others, "lr": 1e-3 * min(1.0, (step + 1) / 11)})
    interval = {"eval/rewards/accuracies": 0.8, "eval/rewards/accuracies_low": 0.7, "eval/rewards/accuracies_high": 0.9}
    return [*rows, *({"step": step, "eval/rewards/chosen": -1.0, "eval/loss": 0.4, **interval} for step in (100, steps))]


@pytest.fixture(scope="module")
def of_a_run(tmp_path_factory):
    """Its rows, and the figures of `plot_training` by file name."""
    rows = dpo_rows()
    with pytest.MonkeyPatch.context() as patch:
        drawn = captured(patch)
        plot_training(rows, tmp_path_factory.mktemp("plots"))
    return rows, drawn


def test_the_schedule_is_drawn_as_it_is(of_a_run):
    rows, drawn = of_a_run
    (line,) = drawn["lr.png"].axes[0].lines
    rates = [row["lr"] for row in rows if "lr" in row]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(200))
    np.testing.assert_array_equal(line.get_ydata(), rates)


def test_smoothing_keeps_the_raw_values_in_sight_and_says_its_window(of_a_run):
    rows, drawn = of_a_run
    figure = drawn["rewards.png"]
    values = np.array([row["rewards/chosen"] for row in rows if "rewards/chosen" in row])
    mine = [line for line in figure.axes[0].lines if len(line.get_ydata()) == 200 and line.get_color() == CHOSEN.color]
    raw, smooth = sorted(mine, key=lambda line: line.get_linewidth())
    np.testing.assert_array_equal(raw.get_ydata(), values)
    assert raw.get_alpha() < 0.5
    assert f"mean of {window_of(200)} steps" in figure.get_supxlabel()
    assert "points: held out" in figure.get_supxlabel()
    shown = np.asarray(smooth.get_ydata())
    assert shown[0] == values[0]
    assert shown[100] == pytest.approx(values[95:106].mean())


@pytest.mark.parametrize("window", [1, 3, 11])
def test_a_running_mean_leaves_a_straight_line_and_the_first_value_as_they_are(window):
    line = np.linspace(1.0, 5.0, 40)
    there = slice(0, 40 - window // 2)
    np.testing.assert_allclose(running_mean(line, window)[there], line[there], rtol=1e-12)
    assert np.isnan(running_mean(line, window)[there.stop :]).all()
    line[7] = np.nan
    np.testing.assert_allclose(running_mean(np.where(np.isnan(line), np.nan, 2.0), max(window, 3))[:30], 2.0)


def test_no_name_of_a_curve_lies_over_the_curves_or_over_another(tmp_path, monkeypatch, of_a_run):
    rows, training = of_a_run
    drawn = captured(monkeypatch)
    plot_displacement({"one": rows, "two": rows}, tmp_path / "displacements.png")
    few = [{"step": row["step"], "rewards/margins": row["rewards/margins"]} for row in rows if "rewards/margins" in row]
    plot_runs({f"a run with the name {number}": few for number in range(6)}, tmp_path / "runs")
    runs = {("dpo", f"beta {beta:g}", "0"): [{"kl": 0.1, "reward": 1.0}, {"kl": 4.0, "reward": 2.0}] for beta in (0.1, 0.2, 1)}
    plot_trajectories(runs, tmp_path / "trajectories.png")
    bins = [{"belief": 0.6, "accuracy": 0.6, "low": 0.5, "high": 0.7}]
    numbers = dict.fromkeys(set(Reliability._fields) - {"bins"}, 0.0)
    plot_reliability(Reliability(bins=bins, **numbers), np.ones(5), tmp_path / "reliability.png", title="t")
    assert len(drawn) == 4
    for name, figure in (drawn | training).items():
        figure.draw_without_rendering()
        areas = [axes.get_window_extent() for axes in figure.axes]
        boxes = [(text.get_text(), text.get_window_extent()) for axes in figure.axes for text in axes.texts if text.get_text()]
        boxes += [("legend", legend.get_window_extent()) for legend in figure.legends]
        assert not [axes for axes in figure.axes if axes.get_legend()], name
        for words, box in boxes:
            assert not any(box.overlaps(area) for area in areas), (name, words)
            assert figure.bbox.x0 <= box.x0, (name, words)
            assert box.x1 <= figure.bbox.x1, (name, words)
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0][1].overlaps(pair[1][1])], name


def test_every_line_of_a_panel_is_named_where_there_are_several(of_a_run):
    names = {text.get_text() for text in of_a_run[1]["rewards.png"].axes[0].texts}
    assert names >= {"chosen", "rejected", "margin", "reference", "beta x log(policy / reference), nats"}


def test_chosen_and_rejected_differ_in_gray_and_without_color():
    def gray(style):
        return sum(w * int(style.color[i : i + 2], 16) for w, i in zip((0.299, 0.587, 0.114), (1, 3, 5), strict=True)) / 255

    assert abs(gray(CHOSEN) - gray(REJECTED)) > 0.25
    assert (CHOSEN.line, CHOSEN.marker) != (REJECTED.line, REJECTED.marker)


def test_the_two_kls_have_two_names():
    titles = {panel.file: panel.title for panel in PANELS}
    assert titles["kl"] == "KL(policy || reference)"
    assert titles["kl_reference_policy"] == "KL(reference || policy)"


def test_an_svg_is_the_same_every_time(tmp_path):
    rows = [{"step": row["step"], "loss": row["loss"]} for row in dpo_rows(50) if "loss" in row]
    first, second = (plot_training(rows, tmp_path / name, format="svg") for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all(path.suffix == ".svg" for path in first)
