"""`dpo-jax diffusion` from end to end: a toy network on the digits, nothing done twice, and what is refused."""

import csv
import json

import numpy as np
from tiny_run import _compilation_cache, call  # noqa: F401  the second is a fixture

from dpo_jax.cli.config import load_config

CONFIG = """\
run: {{dir: {dir}}}
diffusion:
  {{steps: 4, width: 16, layers: 1, heads: 2, pretrain_steps: 4, pretrain_batch: 16, pairs: 12, samples: 10, batch: 8,
  epochs: 2, evaluations: 2, seeds: 2, betas: "0.1", ft_lrs: "0.001", gaussian_steps: 8, gaussian_draws: "1"}}
"""


def diffusion(place, *flags):
    (place / "toy.yaml").write_text(CONFIG.format(dir=place / "run"))
    return call("diffusion", place / "toy.yaml", *flags)


def test_digits(tmp_path):
    code, out, err = diffusion(tmp_path)
    assert code == 0, err
    folder = tmp_path / "run" / "diffusion-digits"
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        *(("reference", seed) for seed in "01"),
        *((method, seed) for method in ("diffusion-dpo", "preferred-ft") for seed in "01" for _ in range(2)),
    ]
    assert all(float(row["kl"]) < 1e-6 for row in rows[:2])
    assert all(float(row["kl_low"]) <= float(row["kl"]) <= float(row["kl_high"]) for row in rows)
    assert all(float(row["kl"]) > 0 for row in rows[2:])
    assert {row["step"] for row in rows[2:]} == {"2.0", "3.0"}
    for figure in ("digits.png", "diffusion.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert [table["caption"] for table in summary["tables"]] == ["gain at path KL", "where runs ended"]
    assert np.load(folder / "runs" / "reference-seed0" / "samples.npy").shape == (10, 8, 8)
    refs = {path: path.stat().st_mtime_ns for path in (folder / "reference_errors").rglob("logps-*.bin")}
    assert len(refs) == 2
    again = diffusion(tmp_path)
    assert "6 of 6 runs are finished already" in again[1]
    assert "continuing" in again[1]
    assert json.loads((folder / "summary.json").read_text()) == summary
    code, out, err = diffusion(tmp_path, "--diffusion.betas", "0.1,0.2")  # the same noise: the reference pass is not repeated
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in refs} == refs
    code, out, err = diffusion(tmp_path, "--diffusion.width", "20")
    assert code == 2
    assert "width" in err
    assert load_config(folder / "config.yaml").diffusion.betas == "0.1,0.2"  # the record of what is there


def test_what_is_refused(tmp_path):
    for flag, value, words in (
        ("--diffusion.loss", "sft", "must be one of dpo"),
        ("--diffusion.betas", "0.1,x", "different numbers above 0"),
        ("--diffusion.gaussian-draws", "1,3", "whole numbers, 1 or even, above 0"),
        ("--diffusion.width", "10", "multiple of twice the heads (4)"),
        ("--diffusion.label-dropout", "1", "a share in [0, 1)"),
    ):
        code, _, err = diffusion(tmp_path, flag, value, "--check")
        assert (code, words in err) == (2, True), err
    code, out, err = diffusion(tmp_path, "--check")
    assert (code, "no problems found" in out) == (0, True), err
