"""Signals to real processes, in each phase of a command: the documented exit code, no traceback, and files that are whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, xla_flags

ROOT = Path(__file__).parent.parent
LIMIT = 240  # seconds; a process takes a twentieth of it
CONFIG = """\
run: {{dir: {dir}}}
data: {{source: reviews, reviews_train: 48, reviews_test: 8, max_length: 128, max_prompt_length: 96, layout: shared}}
tokenizer: {{path: {golden}/tokenizer}}
refs: {{batch: 16}}
dpo: {{policy: {golden}/gpt_neox/init, batch: 8, lr: 1.0e-5}}
eval: {{policy: {golden}/gpt_neox/init, reference: {golden}/gpt_neox/init, batch: 8, samples: 4, max_new_tokens: 6}}
sample: {{policy: {golden}/gpt_neox/init, prompts: 4, max_new_tokens: 6}}
"""
# Runs a command, and sends this process a signal when a function is called for the `count`-th time.
DRIVER = """
import functools, importlib, os, signal, sys
from dpo_jax.cli import main as cli

where, count, name, *sys.argv[1:] = sys.argv[1:]
module, _, function = where.partition(":")
calls = 0

def strike():
    os.kill(os.getpid(), signal.Signals[name])

def striking(inner):
    @functools.wraps(inner)
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(count):
            strike()
        return inner(*args, **kwargs)
    return call

if module == "compiling":  # from now on the main thread is in XLA
    import jax
    def traced(event, seconds, fun_name="", **_):
        if event.endswith("mlir_module_duration") and function in fun_name:
            strike()
    jax.monitoring.register_event_duration_secs_listener(traced)
else:
    owner = importlib.import_module(module)
    *classes, function = function.split(".")
    for part in classes:
        owner = getattr(owner, part)
    setattr(owner, function, striking(getattr(owner, function)))
cli.program()
"""


def environment():
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}


def start(folder, command, *, where, count=1, name="SIGINT"):
    folder.mkdir()
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(dir=folder / "run", golden=GOLDEN))
    words = [sys.executable, "-c", DRIVER, where, count, name, command, config]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in words], env=environment(), **pipes)


def end(process):
    try:
        _, error = process.communicate(timeout=LIMIT)
        return process.returncode, error
    finally:
        process.kill()


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_who_goes_away_does_not_end_the_work(tmp_path, both):
    """As by `2>&1 | tee log`, when tee is killed. A run must not end with code 0 halfway."""
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run", golden=GOLDEN))
    words = [sys.executable, "-c", "from dpo_jax.cli.main import program; program()", "refs", config]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if both else subprocess.PIPE, "text": True}
    process = subprocess.Popen([str(word) for word in words], env=environment(), **pipes)
    process.stdout.close()
    process.stdout = None
    code, error = end(process)
    assert code == 0, error
    assert both or "standard output was closed" in error
    [values] = tmp_path.rglob("logps-*.bin")
    assert values.stat().st_size > 0
    assert (tmp_path / "run" / "refs" / "data_report.json").is_file()


IMPORTING = ("audit", "dpo_jax.cli.main:_execute", 1)
ENCODING = ("dpo", "dpo_jax.cli.splits:encode_split", 2)
COMPILING = ("refs", "compiling:reference_logps", 1)
REFERENCE = ("refs", "dpo_jax.reference:ReferenceCache.add", 2)
SAMPLING = ("sample", "compiling:draw", 1)
EVALUATING = ("eval", "dpo_jax.cli.commands.eval:preference_summary", 1)
SAVING = ("dpo", "dpo_jax.cli.exports:save_hf", 1)


@pytest.mark.parametrize(
    "phases",
    [
        [(COMPILING, "SIGINT"), (REFERENCE, "SIGTERM"), (SAMPLING, "SIGINT")],
        pytest.param(
            [
                (phase, name)
                for phase in (IMPORTING, ENCODING, COMPILING, REFERENCE, SAMPLING, EVALUATING, SAVING)
                for name in ("SIGINT", "SIGTERM")
            ],
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_signal_outside_of_training_ends_with_its_code(tmp_path, phases):
    """Where threads of XLA are still at work, Python's own way out now and then ends with 139."""
    for begin in range(0, len(phases), 3):  # some at a time
        here = phases[begin : begin + 3]
        processes = [
            start(tmp_path / str(begin + n), command, where=where, count=count, name=name)
            for n, ((command, where, count), name) in enumerate(here)
        ]
        for ((command, where, _), name), process in zip(here, processes, strict=True):
            code, error = end(process)
            assert code == {"SIGINT": 130, "SIGTERM": 143}[name], (command, where, name, error)
            assert "Traceback" not in error
            said = {"SIGINT": "dpo-jax: interrupted", "SIGTERM": "dpo-jax: stopped by SIGTERM"}[name]
            assert error.endswith(f"{said}\n"), error


PLAIN = """
import os, signal, sys, threading, time
from dpo_jax.runtime.signals import run_program

class Crash:
    def __del__(self):  # when modules are torn down
        os.kill(os.getpid(), signal.SIGSEGV)

crash = Crash()

def later(seconds, name):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.Signals[name])).start()

def busy(seconds):  # about; as compiled code is: Python's handlers have to wait
    import hashlib
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(seconds * 1e6))
"""


def plain(code, **options):
    """Exit code, output and errors of a program that Python's own way out would crash."""
    options = {"stdout": subprocess.PIPE} | options
    command = [sys.executable, "-c", f"{PLAIN}\n{code}\nrun_program(main)"]
    done = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True, timeout=LIMIT, check=False, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "code", "out", "error"),
    [
        ("print('done'); return 0", 0, "done\n", ""),
        ("import atexit; atexit.register(print, 'left'); return 65", 65, "left\n", ""),
        ("raise ZeroDivisionError('a bug')", 1, "", "ZeroDivisionError: a bug\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", 130, "", ""),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", 143, "", ""),
        # An interrupt that somebody has swallowed.
        ("try: os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n    except KeyboardInterrupt: return 0", 130, "", ""),
        ("later(0.1, 'SIGINT'); later(0.6, 'SIGINT'); busy(60)", 130, "", ""),
        ("later(0.1, 'SIGTERM'); later(0.2, 'SIGTERM'); busy(1.5); return 0", 143, "", ""),
    ],
)
def test_the_end_of_a_process_is_its_exit_code(body, code, out, error):
    done = plain(f"def main():\n    {body}")
    assert done[:2] == (code, out), done
    assert done[2].endswith(error), done


def test_an_interrupted_program_that_does_not_return_is_ended():
    code, _, error = plain("def main():\n    later(0.1, 'SIGINT')\n    busy(120)")
    assert (code, error) == (130, "\ndpo-jax: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_output_that_could_not_be_written_is_no_success():
    with open("/dev/full", "w") as full:
        code, _, error = plain("def main():\n    print('done')\n    return 0", stdout=full)
    assert (code, error) == (74, "dpo-jax: standard output: No space left on device\n")
