"""`dpo-jax robust` from end to end in a toy world: each experiment, its table, and that nothing is done twice."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from test_online_rounds import make_parts
from tiny_run import TOY_WORLD, _compilation_cache, call  # noqa: F401  the second is a fixture

from dpo_jax.cli import frontier_runs
from dpo_jax.cli.config import load_config
from dpo_jax.cli.robust.runs import runs_of
from dpo_jax.cli.robust.setup import shared_settings
from dpo_jax.evals.reward_functions import LinearReward
from dpo_jax.lab.paired import read_prompts
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.parallel import single_device

CONFIG = (
    TOY_WORLD
    + """\
frontier:
  prompts: 24
  test_prompts: 8
  optimum_prompts: 4
  optimum_samples: 8
  max_new_tokens: 12
  sample_batch: 16
  evaluations: 2
  dpo_betas: "0.5"
  ppo_kls: "3"
  best_of: "2,4"
  seeds: 2
  ppo_iterations: 2
  ppo_batch: 8
  ppo_epochs: 1
  ppo_minibatches: 2
robust: {{flip_rates: "0,0.25", losses: "dpo,robust,ipo", widths: "32,48", train_prompts: "12,24"}}
"""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("robust")
    (root / "toy.yaml").write_text(CONFIG.format(dir=root / "run"))
    return root


def robust(place, experiment, *flags):
    """What the command prints, its rows, and its summary."""
    code, out, err = call("robust", place / "toy.yaml", "--robust.experiment", experiment, *flags)
    assert code == 0, err
    folder = place / "run" / f"robust-{experiment}"
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (folder / "robust.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert float(row["kl_low"]) <= float(row["kl"]) <= float(row["kl_high"])
    return out, rows, json.loads((folder / "summary.json").read_text())


def test_noise(place):
    out, rows, summary = robust(place, "noise")
    settings = [(row["method"], row["label"]) for row in rows]
    assert len(settings) == 1 + 2 * (2 + 3)  # the reference; two seeds of dpo and ipo without flips, and of all three with
    assert ("robust", "flipped 0 beta 0.5") not in settings
    for row in rows[1:]:
        share = 0.25 if "0.25" in row["label"] else 0
        assert int(float(row["flipped"])) == round(share * float(row["pairs"])) <= float(row["pairs"])
    found = {(row["rate"], row["loss"], row["kl"]) for row in summary["gains"]}
    assert found == {(rate, loss, at) for rate in (0, 0.25) for loss in ("dpo", "robust", "ipo") for at in (1, 3, None)}
    assert "robust DPO" in out
    before = {path: path.stat().st_mtime_ns for path in (place / "run" / "robust-noise" / "runs").rglob("result.json")}
    assert len(before) == len(rows)
    again, _, same = robust(place, "noise")
    assert "11 of 11 runs are finished already" in again
    assert same == summary
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_shift(place):
    out, rows, summary = robust(place, "shift", "--frontier.seeds", "1")
    assert summary["families"] == {"first": ["acting", "plot"], "second": ["craft", "film"]}
    runs = [
        ("reference", ""),
        *((m, f"trained on {f} {s}") for f in ("first", "second") for m, s in (("dpo", "beta 0.5"), ("ppo", "KL 3"))),
    ]
    assert [(row["method"], row["label"], row["tested"]) for row in rows] == [(*run, t) for run in runs for t in ("0.0", "1.0")]
    assert rows[0]["reward"] != rows[1]["reward"]  # other prompts
    assert {(row["tested"], row["method"]) for row in summary["gains"]} == {
        (f, m) for f in ("first", "second") for m in ("dpo", "ppo")
    }
    assert "lost by the shift" in out
    kept = read_prompts(place / "run" / "robust-shift" / "runs" / "reference-seed0", 2)
    assert [np.mean(row["reward"]) for row in kept] == pytest.approx([float(row["reward"]) for row in rows[:2]])
    for family, topics in (("first", ("acting", "plot")), ("second", ("craft", "film"))):
        assert (place / "run" / "robust-shift" / "pairs" / f"{family}.jsonl").stat().st_size > 0, topics


@pytest.fixture(scope="module")
def world(tokenizer):
    found = make_parts(tokenizer, lambda model: single_device()).world
    return found.with_prompts(train=found.train, test=found.test.of([0, 1, 2]))


def test_other_data_are_a_reason_to_repeat_all_runs(place, world):
    config = load_config(place / "toy.yaml")
    snippets = dataclasses.replace(config, data=dataclasses.replace(config.data, source="snippets"))

    def world_of(*, train=world.train, test=world.test, good=1.0):
        other = world.with_prompts(train=train, test=test)
        other.reward = LinearReward(0.5, {"good": good, "bad": -1.0})
        return other

    first, again = world_of(), world_of()
    others = [world_of(train=world.test), world_of(test=world.test.of([1, 0])), world_of(good=2.0)]
    for settings in (shared_settings, frontier_runs.shared_settings):
        same, *different = (json.dumps(settings(snippets, "digest", one)) for one in (first, again, *others))
        assert different.pop(0) == same
        assert len({same, *different}) == 1 + len(others)
        assert settings(config, "digest", world) == settings(config, "digest", others[0])  # reviews: the seed determines them


def test_other_topics_are_a_reason_to_repeat_all_runs(place, world):
    """Also the rewards learned from a family's pairs: their folders are named by these settings."""
    config = load_config(place / "toy.yaml")

    def settings(experiment, topics):
        section = dataclasses.replace(config.robust, experiment=experiment, topics=topics)
        return shared_settings(dataclasses.replace(config, robust=section), "digest", world)

    first, same, other = (settings("shift", topics) for topics in ("acting,plot", "plot,acting", "craft,film"))
    assert first == same != other
    assert settings("noise", "acting,plot") == settings("noise", "craft,film")


def test_overoptimization(place):
    out, rows, summary = robust(place, "overoptimization", "--frontier.seeds", "1")
    assert len(rows) == 2 * 2 * 3 * 2  # widths, sizes of data, methods, points: N of 2 and 4, or evaluations
    assert all(float(row["proxy_low"]) <= float(row["proxy"]) <= float(row["proxy_high"]) for row in rows)
    cells = [(row["width"], row["prompts"], row["method"], row["form"]) for row in summary["fits"]]
    methods = (("best-of-n", "bon"), ("dpo", "rl"), ("ppo", "rl"))
    assert cells == [(w, n, *method) for w in (32, 48) for method in methods for n in (12, 24)]
    for width in (32, 48):
        config = json.loads((place / "run" / f"width-{width}" / "sft" / "export" / "config.json").read_text())
        assert config["hidden_size"] == width
    folder = place / "run" / "robust-overoptimization"
    for pattern in ("runs/dpo-width-32-*", "runs/dpo-width-48-*", "width-32/reward_models/*", "width-48/reward_models/*"):
        paths = sorted(folder.glob(f"{pattern}/metrics.jsonl"))
        of_12, of_24 = (max(row["step"] for row in read_metrics(path)) for path in paths)
        assert of_24 <= of_12 <= of_24 + 1, "twice the prompts take the same number of steps"
    assert "true reward falls" in out
    (place / "run" / "robust-overoptimization" / "runs" / "best-of-n-width-32-prompts-12-seed0" / "prompts.jsonl").write_text(
        ""
    )
    code, _, err = call("robust", place / "toy.yaml", "--robust.experiment", "overoptimization", "--frontier.seeds", "1")
    assert code != 0
    assert "lines are missing; delete the folder" in err


FITS = ("--robust.experiment", "overoptimization")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--robust.flip-rates", "0,0.5"), "robust.flip_rates: must be different shares in [0, 0.5)"),
        (("--robust.losses", "dpo,hinge"), "robust.losses: must be some of dpo, cdpo, robust, ipo"),
        (("--robust.losses", "dpo,dpo"), "robust.losses: must be some of dpo, cdpo, robust, ipo, each once"),
        (("--frontier.dpo-betas", "1,1.0"), "frontier.dpo_betas: must be different numbers above 0"),
        ((*FITS, "--frontier.evaluations", "1", "--frontier.seeds", "1"), "frontier.evaluations: 1, with one seed"),
        ((*FITS, "--frontier.best-of", "1,2,16"), "frontier.best_of: the fit needs two values above 1 and up to"),
        (("--robust.widths", "16,16"), "robust.widths: must be different whole numbers above 0"),
        (("--frontier.labels", "argmax"), "frontier.labels: the theory of label noise is that of bradley_terry"),
        (
            ("--robust.experiment", "shift", "--robust.topics", "plots"),
            "robust.topics: must be some but not all of acting, plot",
        ),
        (("--robust.experiment", "overoptimization", "--robust.widths", "33"), "robust.widths: 33 is not divisible by"),
        (("--robust.experiment", "overoptimization", "--frontier.prompts", "8"), "robust.train_prompts: 24 are more than"),
        (("--frontier.methods", "dpo"), "--frontier.methods: robust does not read this option"),
    ],
)
@pytest.mark.parametrize("check", [(), ("--check",)], ids=["run", "check"])
def test_what_does_not_go_together_is_refused(place, flags, words, check):
    code, out, err = call("robust", place / "toy.yaml", *flags, *check)
    assert (code, words in err) == (2, True), (out, err)


def test_check_counts_the_runs(place):
    code, out, err = call("robust", place / "toy.yaml", "--check")
    assert code == 0, err
    assert "11 of experiment noise" in out


def test_without_flips_a_loss_that_is_dpo_is_run_once(place):
    config = load_config(place / "toy.yaml")
    runs = [(run.method, run.settings.get("rate")) for run in runs_of(config) if run.seed == 0]
    assert runs == [("reference", None), ("dpo", 0), ("ipo", 0), ("dpo", 0.25), ("robust", 0.25), ("ipo", 0.25)]
