"""`dpo-jax scenes` from end to end: a toy model, nothing done twice, and what is refused."""

import csv
import json

from tiny_run import _compilation_cache, call  # noqa: F401  the second is a fixture

from dpo_jax.cli.config import load_config

CONFIG = """\
run: {{dir: {dir}}}
scenes:
  {{train: 24, test: 12, pairs: 12, width: 8, layers: 1, encoder_width: 8, encoder_steps: 2, sft_steps: 2, sft_batch: 8,
  batch: 8, epochs: 2, betas: "0.1", ft_lrs: "0.001", evaluations: 2, seeds: 2}}
"""


def scenes(place, *flags):
    (place / "toy.yaml").write_text(CONFIG.format(dir=place / "run"))
    return call("scenes", place / "toy.yaml", *flags)


def test_scenes(tmp_path):
    code, out, err = scenes(tmp_path)
    assert code == 0, err
    folder = tmp_path / "run" / "scenes"
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = [("dpo", "careless"), ("preferred-ft", "careless"), ("dpo", "true"), ("preferred-ft", "true")]
    assert [(row["method"], row["chosen"], row["seed"]) for row in rows] == [
        *(("sft", "", seed) for seed in "01"),
        *((*setting, seed) for setting in settings for seed in "01" for _ in range(2)),
    ]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("hallucinated", "recalled"))
    assert (folder / "scenes.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert [table["caption"] for table in summary["tables"]] == ["at equal recall", "where runs ended"]
    captions = (folder / "runs" / "sft-seed0" / "captions.txt").read_text().splitlines()
    assert len(captions) == 12
    features = {path: path.stat().st_mtime_ns for path in (folder / "features").glob("*/*.features")}
    assert len(features) == 1
    code, out, err = scenes(tmp_path)
    assert code == 0, err
    assert "10 of 10 runs are finished already" in out
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {path: path.stat().st_mtime_ns for path in features} == features
    code, out, err = scenes(tmp_path, "--scenes.width", "12")
    assert code == 2
    assert "width" in err
    assert load_config(folder / "config.yaml").scenes.width == 8  # the record of what is there


def test_what_is_refused(tmp_path):
    for flag, value, words in (
        ("--scenes.chosen", "true,other", "one or several of careless, true"),
        ("--scenes.betas", "0.1,0.1", "different numbers above 0"),
        ("--scenes.width", "10", "multiple of 4"),
        ("--scenes.adds", "1", "a share in [0, 1)"),
    ):
        code, _, err = scenes(tmp_path, flag, value, "--check")
        assert (code, words in err) == (2, True), err
    code, out, err = scenes(tmp_path, "--check")
    assert (code, "no problems found" in out, "10, of 2 seeds" in out) == (0, True, True), err
