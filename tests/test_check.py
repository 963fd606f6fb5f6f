"""The self-test passes on CPUs, finds faults that are planted, and needs nothing but jax, flax, optax and numpy."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import xla_flags

from dpo_jax import check, cpl, head, step
from dpo_jax.checks import attention, bench, control, diffusion, machine, training
from dpo_jax.checks.report import Report, Result, Row
from dpo_jax.cli.main import main as program
from dpo_jax.diffusion import step as diffusion_step
from dpo_jax.models import attention_paths
from dpo_jax.models.attention import AttentionPath, dense
from dpo_jax.models.decoder import REMAT

ROOT = Path(__file__).parent.parent
OPTIONAL = ("tyro", "tensorflow_datasets", "array_record", "transformers", "tokenizers", "matplotlib", "datasets")


@pytest.fixture(autouse=True)
def _few_attention_cases(monkeypatch):
    """One case of attention, small matrices, and programs that are compiled for a few calls."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.setattr(attention, "SMALL", attention.SMALL[:1])
    monkeypatch.setattr(machine, "EXACT_SIDE", 128)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def checked(folder, only, *flags):
    """(exit code, what check.json says) of the rows in `only`."""
    path = folder / "check.json"
    code = check.main(["--json", str(path), "--only", only, *flags])
    return code, json.loads(path.read_text())


def test_rows_pass_here(tmp_path, capsys):
    """All but those of several devices and of bfloat16, which take long to compile: CI runs the whole program."""
    code, told = checked(
        tmp_path, "versions,memory,matmul,attention,start.float32,log_softmax,control,checkpoint,parallel.fsdp"
    )
    assert (code, told["ok"], told["failed"]) == (0, True, []), told
    shown = capsys.readouterr().out
    assert all(f"\n{row['name']} " in shown for row in told["rows"])
    assert told["environment"]["packages"]["jax"] == jax.__version__
    names = [row["name"] for row in told["rows"]]
    assert names[:3] == ["devices", "versions", "memory"]
    here = [name for name, path in attention_paths.PATHS.items() if path.platform is None]
    assert {f"attention.{name}.{dtype}" for name in here for dtype in ("float32", "bfloat16")} <= set(names)
    assert names[-2:] == ["parallel.fsdp", "checkpoint"]
    assert all(row["failure"] and row["figure"] and row["seconds"] >= 0 for row in told["rows"])


def test_a_mask_that_shows_one_key_too_many_is_found(tmp_path, monkeypatch, capsys):
    def sees_more(q, k, v, keys, scoring):
        return dense(q, k, v, keys._replace(end=jnp.minimum(keys.end + 1, k.shape[1])), scoring)

    broken = attention_paths.PATHS["chunked"]._replace(make=lambda: AttentionPath("chunked", sees_more))
    monkeypatch.setitem(attention_paths.PATHS, "chunked", broken)
    code, told = checked(tmp_path, "attention.chunked")
    assert (code, told["failed"]) == (1, ["attention.chunked.float32", "attention.chunked.bfloat16"])
    assert "what to do: attention chunked in float32 differs from dense: do not train with it" in capsys.readouterr().out


def test_a_log_softmax_in_bfloat16_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "at_least_float32", lambda x: x.astype(jnp.bfloat16))
    assert checked(tmp_path, "log_softmax")[1]["failed"] == ["log_softmax"]


def test_a_score_of_cpl_that_forgets_its_discount_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cpl, "discounted_sum", lambda values, gamma: values.sum(axis=-1))
    assert checked(tmp_path, "control")[1]["failed"] == ["control.cpl"]


def test_noise_that_depends_on_the_seed_alone_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion_step, "_key", lambda seed, uid, epoch: jax.random.key(seed))
    assert checked(tmp_path, "diffusion")[1]["failed"] == ["diffusion"]


def test_steps_of_control_and_diffusion_repeat_their_stored_numbers(tmp_path):
    code, told = checked(tmp_path, "control,diffusion")
    assert (code, told["failed"], len(control.EXPECTED), len(diffusion.EXPECTED)) == (0, [], control.STEPS, diffusion.STEPS)
    assert [row["name"] for row in told["rows"][-2:]] == ["control.cpl", "diffusion"]


def test_a_microbatch_that_is_dropped_is_found(tmp_path, monkeypatch):
    split = step.split

    def without_the_last(rows, count):
        parts = split(rows, count)
        return dataclasses.replace(parts, weight=parts.weight.at[-1].set(0.0))

    monkeypatch.setattr(step, "split", without_the_last)
    assert checked(tmp_path, "microbatches")[1]["failed"] == ["microbatches"]


def test_a_row_that_raises_fails_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    def broken(dtype):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS\nand much more")

    monkeypatch.setattr(machine, "_matmul", broken)
    code, told = checked(tmp_path, "matmul,log_softmax")
    assert (code, told["failed"]) == (1, ["matmul.bfloat16", "matmul.float32"])
    assert "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS\n" in capsys.readouterr().out
    assert "and much more" in told["rows"][1]["error"]
    assert told["rows"][-1]["ok"]


def test_without_a_device_nothing_else_is_tried(tmp_path, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(machine, "_devices", none)
    assert checked(tmp_path, "")[1]["failed"] == ["devices"]


def test_an_interrupt_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "_memory", interrupted)
    code, told = checked(tmp_path, "versions,memory")
    assert (code, told["interrupted"]) == (130, True)
    assert [row["name"] for row in told["rows"]] == ["devices", "versions"]
    assert "interrupted: 2 checks in" in capsys.readouterr().out


def test_a_long_row_is_not_silent_and_a_crash_says_in_which_row_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dpo_jax.checks.report.SILENCE", 0.05)
    report = Report(tmp_path / "check.json")

    def slow():
        time.sleep(0.2)
        return Result(json.loads((tmp_path / "check.json").read_text())["running"])

    assert report.run(Row("slow", "", slow)).figure == "slow"
    assert "slow: compiling or running" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--only", "atention"], 2, "--only atention: there is no such row; rows begin with devices, versions, memory, matmul"),
        (["--json", "absent/check.json"], 74, "absent/check.json: No such file or directory"),
    ],
)
def test_wrong_flags_are_told(flags, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check.main(flags) == code
    assert message in capsys.readouterr().err


def test_what_xla_is_told_on_a_machine_with_a_gpu(tmp_path, monkeypatch):
    """Numbers need no tuned products; times do; and a trace needs operations that are started one by one."""
    monkeypatch.setattr(check, "plugin_is_here", lambda: True)
    told = []
    for flags in ([], ["--bench"], ["--bench", "--profile", str(tmp_path / "trace")]):
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
        assert check.main(["--only", "devices", "--json", str(tmp_path / "check.json"), *flags]) == 0
        told.append(os.environ["XLA_FLAGS"])
    assert check.UNTUNED == "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    assert told == [
        f"--xla_cpu_enable_fast_math=false {check.UNTUNED}",
        "--xla_cpu_enable_fast_math=false",
        f"--xla_cpu_enable_fast_math=false {check.TRACEABLE}",
    ]
    monkeypatch.setattr(check, "plugin_is_here", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "")
    check.main(["--only", "devices", "--json", str(tmp_path / "check.json")])
    assert os.environ["XLA_FLAGS"] == ""


def test_a_folder_with_an_older_trace_is_refused(tmp_path, capsys):
    (tmp_path / "old").write_text("")
    assert program(["check", "--profile", str(tmp_path)]) == 2
    assert "the folder is not empty" in capsys.readouterr().err


def test_it_is_a_command_and_its_help_loads_nothing(capsys):
    assert program(["check", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: dpo-jax check")
    code = """
import sys
from dpo_jax.check import main
try: main(["--help"])
except SystemExit: pass
assert not {"jax", "numpy", "flax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("flag", "code", "said"), [("--help", 0, "usage: "), ("--wrong", 2, "unrecognized arguments: --wrong")]
)
def test_as_a_module_its_help_and_a_wrong_flag_end_without_a_traceback(flag, code, said):
    done = subprocess.run([sys.executable, "-m", "dpo_jax.check", flag], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, said in done.stdout + done.stderr, "Traceback" in done.stderr) == (code, True, False), done


def without(packages, code, *args, cwd):
    """A process in which `packages` are not installed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}
    return subprocess.run([sys.executable, "-c", block + code, *args], cwd=cwd, env=environment, capture_output=True, text=True)


def test_jax_flax_optax_and_numpy_are_enough(tmp_path):
    run = "import runpy; runpy.run_module('dpo_jax.check', run_name='__main__')"
    orbax = ("orbax", "orbax.checkpoint")
    done = without((*OPTIONAL, *orbax), run, "--only", "devices,versions,log_softmax,checkpoint", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = {row["name"]: row for row in json.loads((tmp_path / "check.json").read_text())["rows"]}
    assert told["log_softmax"]["ok"]
    assert told["checkpoint"]["figure"].startswith("skipped: orbax is missing")


def test_the_oldest_versions_are_those_that_the_package_asks_for():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {
        name: oldest for name, oldest in (re.match(r"([\w-]+)>=([\d.]+)", text).groups() for text in asked if ">=" in text)
    }
    assert machine.OLDEST.items() <= found.items()


def test_expected_numbers_start_at_ln_2():
    assert training.EXPECTED[0][:2] == pytest.approx((math.log(2), 0.0), abs=1e-6)
    assert len(training.EXPECTED) == training.STEPS


def test_settings_of_the_bench_begin_with_the_automatic_attention(monkeypatch):
    names = [setting.name for setting in bench.settings()]
    assert names[0] == f"bench.dpo256.{attention_paths.path_name('auto', 'cpu')}.{next(iter(REMAT))}"
    assert len(names) == len(set(names))


def test_the_bench_times_a_step_and_traces_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "STEPS", 1)
    _, told = checked(tmp_path, "bench", "--profile", str(tmp_path / "trace"))
    *_, timed, traced = told["rows"]
    assert timed["values"]["examples_per_second"] == pytest.approx(16 / timed["values"]["step_seconds"])
    assert timed["values"]["shape"] == bench.TINY
    assert traced["figure"].startswith("two steps of bench.dpo256.")
    assert "slowest operations:" in capsys.readouterr().out


def test_a_bench_that_runs_out_of_memory_or_time_says_so(tmp_path, monkeypatch):
    def full(self, setting):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: 9 bytes for {setting.remat}")

    monkeypatch.setattr(bench._Bench, "_timed", full)
    code, told = checked(tmp_path, "bench", "--bench", "--seconds", "1e9")
    assert code == 0
    assert all(row["figure"].startswith("out of memory: RESOURCE_EXHAUSTED") for row in told["rows"][1:])
    _, told = checked(tmp_path, "bench", "--bench", "--seconds", "0")
    assert {row["figure"] for row in told["rows"][2:]} == {"skipped: --seconds are over"}


PLAIN_FILES = """
from dpo_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "source", "message"),
    [
        ("audit", "files", ""),  # all other commands on plain files start with the same imports
        ("audit", "tfds", "data.source: tfds: needs the package tensorflow-datasets, which is not installed: pip install"),
        ("prepare", "files", "prepare: needs the package tensorflow-datasets, which is not installed: pip install"),
    ],
)
def test_plain_files_need_no_tensorflow_datasets(command, source, message, tmp_path):
    pair = {"prompt": "Which color is the sky?", "chosen": " Blue.", "rejected": " Green."}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair | {"chosen": f" Blue {i}."}) + "\n" for i in range(8)))
    config = tmp_path / "c.yaml"
    config.write_text(
        "tokenizer: {vocab_size: 300}\nmodel: {family: llama, width: 8, layers: 1, heads: 1, max_positions: 512}\n"
    )
    flags = ("--data.source", source, "--data.path", str(tmp_path), "--run.dir", str(tmp_path / "run"))
    blocked = ("tensorflow_datasets", "array_record", "importlib_resources")
    done = without(blocked, PLAIN_FILES, command, str(config), *flags, cwd=tmp_path)
    assert done.returncode == (2 if message else 0), done.stderr
    assert message in done.stderr
