"""Losses of a file of one's own: `dpo.loss FILE.py:FUNCTION`, alone, in a sum, in a whole run, and what is wrong with them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import _compilation_cache as _compilation_cache
from tiny_run import _plots_once as _plots_once
from tiny_run import bytes_of, call, refused
from tiny_run import done as done

from dpo_jax import loss_table, own_loss
from dpo_jax.cli import build, identity
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, load_config
from dpo_jax.losses import dpo_loss, named_loss, required_inputs
from dpo_jax.runtime.metrics import read_metrics

LOGPS = np.array([[-10.0, -12.0], [-9.0, -7.0], [-4.0, -4.0]], np.float32)
REF = np.array([[-11.0, -11.0], [-8.0, -8.0], [-4.0, -4.0]], np.float32)
MINE = """\
import jax
import jax.numpy as jnp


def again(logps, ref_logps, *, beta):
    rewards = beta * (logps - ref_logps)
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1]), jax.lax.stop_gradient(rewards)


def hinge(logps, ref_logps, lengths, *, beta, margin=1.0):
    rewards = beta * (logps - ref_logps) / jnp.maximum(lengths, 1)
    return jnp.maximum(margin - rewards[:, 0] + rewards[:, 1], 0), rewards
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_loss_of_a_file_gets_its_options_and_inputs(file):
    loss = named_loss(f"{file}:again", beta=0.3)
    for one, other in zip(loss(LOGPS, REF), dpo_loss(LOGPS, REF, beta=0.3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    hinge, lengths = named_loss(f"{file}:hinge", beta=0.5), np.array([[2.0, 4.0]] * 3, np.float32)
    assert required_inputs(hinge) == {"lengths"}
    rewards = 0.5 * (LOGPS - REF) / lengths
    np.testing.assert_allclose(hinge(LOGPS, REF, lengths=lengths)[0], np.maximum(1 - rewards[:, 0] + rewards[:, 1], 0))
    both = named_loss(f"0.5*{file}:again + ipo", beta=0.3)
    expected = 0.5 * loss(LOGPS, REF)[0] + named_loss("ipo", beta=0.3)(LOGPS, REF)[0]
    np.testing.assert_allclose(both(LOGPS, REF)[0], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="tau: loss .*hinge does not read it|label_smoothing: loss .*hinge does not read it"):
        named_loss(f"{file}:hinge", label_smoothing=0.1)


def test_a_file_is_compiled_as_python_would_import_it(tmp_path):
    file = tmp_path / "typed.py"
    file.write_text("def f(logps: float, ref_logps: float): ...\n")
    assert own_loss.load(f"{file}:f").__annotations__ == {"logps": float, "ref_logps": float}  # objects, not texts


def test_its_arguments_say_what_it_reads(tmp_path):
    file = tmp_path / "kinds.py"
    file.write_text(
        "def labeled(logps, ref_logps, *, desirable): ...\n"
        "def whole(logps, ref_logps, *, weight): ...\n"
        "def free(logps, ref_logps, scale=2.0, *, other=1): ...\n"
    )
    labeled, whole, free = (f"{file}:{name}" for name in ("labeled", "whole", "free"))
    assert [loss_table.rows_of(name) for name in (labeled, whole, free)] == ["unpaired", "pairs", "pairs"]
    assert [loss_table.whole_batch(name) for name in (labeled, whole, free)] == [False, True, False]
    assert loss_table.terms(free)[0].loss.options == ()


def test_a_file_is_a_module_and_known_as_it_was_loaded(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Gain:\n    value: float = 2.0\n"
        "def f(logps, ref_logps):\n    return Gain().value * (logps - ref_logps).sum(1), logps\n"
    )
    config = Config(dpo=DpoConfig(loss=f"{file}:f"))
    first = identity.settings(config, config.dpo)
    np.testing.assert_allclose(build.make_loss(config.dpo)(LOGPS, REF)[0], 2 * (LOGPS - REF).sum(1))
    file.write_text(file.read_text().replace("2.0", "3.0"))  # while a command computes the reference pass
    assert identity.settings(config, config.dpo) == first
    build.make_loss(config.dpo)
    assert identity.settings(config, config.dpo)[f"loss file {file}"] != first[f"loss file {file}"]


@pytest.mark.parametrize(
    ("content", "named", "message"),
    [
        ("def f(a, b):\n  assert len(a) == 3", "f", r"mine.py:2: AssertionError$"),
        ("def f(a, b): return \0", "f", r"mine.py: source code string cannot contain null bytes"),
        (None, "f", r"mine.py: No such file or directory"),
        ("def g(a, b): ...", "f", r"mine.py has no function 'f' at its top level; it has g"),
        ("def f(a, b):\n  return (", "f", r"mine.py:2: '\(' was never closed"),
        ("def f(a): ...", "f", r"mine.py:f: the first two arguments of a loss are \(logps, ref_logps\)"),
        ("def f(a, b, gain): ...", "f", r"mine.py:f: gain: neither an option \(beta, .* nor an input that the step has"),
        ("def f(a, b, *, gain): ...", "f", r"mine.py:f: gain: neither an option"),
        ("import nowhere_at_all\ndef f(a, b): ...", "f", r"mine.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        (
            "def f(a, b, *, lengths=None):\n  return a.sum(1), a",
            "f",
            r"lengths=None: the step supplies lengths",
        ),
        ("def f(a, b):\n  return a @ b[:1]", "f", r"mine.py:2: TypeError: .*"),
        ("def f(a, b):\n  return a.sum()", "f", r"mine.py:f must return \(losses float\[P\], rewards float\[P, 2\]\)"),
        ("def f(a, b):\n  return a.mean(1), a[:, :1]", "f", r"for 2 pairs it returns \[\(2,\), \(2, 1\)\]"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_read(tmp_path, content, named, message, monkeypatch):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, "."):
        with pytest.raises(ConfigError, match=f"dpo.loss: .*{message}"):
            build.make_loss(DpoConfig(loss=f"{folder}/mine.py:{named}"))


def test_a_run_with_a_loss_of_a_file_is_that_of_the_named_one_until_the_file_changes(done, tmp_path, file):
    start = ("--run.dir", tmp_path / "run", "--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs")
    words = ("dpo", done.config, *start, "--dpo.loss", f"{file}:again")
    assert call(*words).code == 0
    ours, theirs = (read_metrics(run / "dpo" / "metrics.jsonl") for run in (tmp_path / "run", done))
    for name in ("loss", "grad_norm", "rewards/margins"):
        one, other = ([row[name] for row in rows if name in row] for rows in (ours, theirs))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    card = (tmp_path / "run/dpo/README.md").read_text()
    assert "`again`, a user-defined loss" in card
    assert "with DPO" not in card
    assert "is finished after" in call(*words).out
    export = bytes_of(tmp_path / "run/dpo/export")
    file.write_text(MINE.replace("rewards[:, 0] -", "0.9 * rewards[:, 0] -"))
    assert f"loss file {file}: was " in refused(2, *words)
    assert bytes_of(tmp_path / "run/dpo/export") == export
    file.unlink()
    assert "mine.py: No such file or directory" in refused(2, *words)
    config = load_config(tmp_path / "run/dpo/config.yaml")  # other commands read this record of the run
    assert (config.dpo.loss, loss_table.own_files(config.dpo.loss)) == (f"{file}:again", [file])
    file.write_text(MINE)
    assert (
        call("eval", done.config, *start, "--eval.policy", tmp_path / "run/dpo/export", *words[-2:], "--eval.samples", 0).code
        == 0
    )
    report = json.loads((tmp_path / "run/eval/report.json").read_text())
    assert report["settings"]["loss"] == f"{file}:again"
    assert report["reference"]["loss"] == pytest.approx(float(jnp.log(2)), abs=1e-5)
