"""A whole run of the program on a tiny model, for the tests that look at it, continue it or are refused."""

import contextlib
import fcntl
import io
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.cli.main import main

ROOT = Path(__file__).parent.parent


COMMANDS = ("audit", "sft", "refs", "dpo", "eval", "sample", "export")


STEPS = 8  # 64 pairs, 16 a step, twice


CONFIG = """\
run: {{dir: {dir}, save_every_steps: 3, eval_every_examples: 64}}
data: {{source: reviews, reviews_train: 64, reviews_test: 24, max_length: 96, max_prompt_length: 48, layout: shared}}
tokenizer: {{vocab_size: 450}}
model: {{family: gpt_neox, width: 32, layers: 1, heads: 2, max_positions: 128}}
sft: {{batch: 16, lr: 1.0e-3, optimizer: adamw, warmup_steps: 2}}
refs: {{batch: 16}}
dpo: {{batch: 16, epochs: 2, lr: 1.0e-3, warmup_steps: 2}}
eval: {{batch: 16, samples: 4, max_new_tokens: 6}}
sample: {{prompts: 2, max_new_tokens: 6, temperature: 0}}
"""


TOY_WORLD = """\
run: {{dir: {dir}}}
data: {{source: reviews, reviews_train: 64, reviews_test: 24, max_length: 96, max_prompt_length: 48}}
tokenizer: {{vocab_size: 450}}
model: {{family: gpt_neox, width: 32, layers: 1, heads: 2, max_positions: 128}}
sft: {{batch: 16, scored: all, lr: 1.0e-2, optimizer: adamw, warmup_steps: 2, epochs: 8}}
dpo: {{batch: 16, lr: 1.0e-3, warmup_steps: 2}}
"""
"""What experiments on a tiny model share; the sections that are theirs follow."""


class Run(NamedTuple):
    dir: Path
    config: str  # path of the YAML file
    printed: dict[str, str]  # command -> standard output

    def __truediv__(self, name):
        return self.dir / name


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(command, config, *flags):
    """`dpo-jax COMMAND CONFIG FLAGS` in this process. In a run that several pytests look at, one after the other."""
    out, err = io.StringIO(), io.StringIO()
    shared = None if "--run.dir" in flags else next((p for p in Path(config).parents if (p / "lock").is_file()), None)
    with contextlib.ExitStack() as held:
        if shared is not None:
            fcntl.flock(held.enter_context((shared / "calls").open("w")), fcntl.LOCK_EX)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([command, str(config), *map(str, flags)])
    return Result(code, out.getvalue(), err.getvalue())


def refused(code, command, config, *flags):
    """The message with which a command ends that must end with `code`, without a traceback."""
    result = call(command, config, *flags)
    assert (result.code, "Traceback" in result.err) == (code, False), result
    return result.err


def bytes_of(folder):
    """Content by name of the files of a folder, model cards apart."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "README.md"}


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(autouse=True)
def _plots_once(monkeypatch):
    """Only `done`, which is made before this, draws its plots: a third of the time of a run that has nothing to compile."""

    def stand_in(rows, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "loss.png").touch()

    monkeypatch.setattr("dpo_jax.plotting.training_curves.plot_training", stand_in)


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A whole run: every command once, in order. All tests look at the same one, also where they run in several processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "whole"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "printed.json").exists():
            before = jax.config.jax_compilation_cache_dir
            printed = whole_run(folder).printed
            jax.config.update("jax_compilation_cache_dir", before)
            (folder / "printed.json").write_text(json.dumps(printed))
    return Run(folder / "run", str(folder / "tiny.yaml"), json.loads((folder / "printed.json").read_text()))


def whole_run(folder):
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(dir=folder / "run"))
    printed, stamps = {}, {}
    for command in COMMANDS:
        result = call(command, config)
        assert result.code == 0, (command, result)
        printed[command] = result.out
        if command == "refs":
            stamps = {path: path.stat().st_mtime_ns for path in (folder / "run" / "refs").glob("logps-*")}
        if command == "dpo":
            assert stamps
            assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "run" / "refs").glob("logps-*")}
    return Run(folder / "run", str(config), printed)


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the whole run, to go on with or to damage."""
    shutil.copytree(done.dir, tmp_path / "run")
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run"))
    return Run(tmp_path / "run", str(config), {})


def with_weights(source, target, change):
    """A copy of a model folder whose tensors went through `change`."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    save_file({name: np.ascontiguousarray(change(name, x)) for name, x in load_file(file).items()}, file)
    return target
