"""Four CPU devices, strict numerics, and compiled things shared by the whole session."""

import gc
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from long_tests import LONG

DEVICES = "--xla_force_host_platform_device_count"
# Most of the time goes into compiling programs that then run for milliseconds, so XLA compiles them without optimizing.
# The last flag chooses the older, faster emitters where XLA still has them (JAX 0.10); later versions do not read it.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:  # `=3` compiles as users do
    flags += f" {QUICK}"
COMPILER_FLAGS = " ".join(flag for flag in flags.split() if DEVICES not in flag)
if DEVICES not in flags:  # a process of a test says how many itself
    flags += f" {DEVICES}=4"
os.environ["XLA_FLAGS"] = flags

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A script's background ignores Ctrl-C, and so would every program that a test starts there to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
STARTED = time.monotonic()
TEMPORARY: list[str] = []  # the temporary folder of this run, which goes with it


def xla_flags(devices):
    """XLA_FLAGS of a process that has so many CPU devices, and compiles as this one does."""
    return f"{COMPILER_FLAGS} {DEVICES}={devices}"


QUIET = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


# The files that take longest, longest first: a long file that starts last keeps one process waiting for the other.
LONGEST = (
    *("cli_resume", "models", "step", "multidevice", "cli_refusals", "golden", "lora", "sampling"),
    *("functional", "loss_signals", "loss_names", "images_model", "attention", "flash", "diffusion", "ppo"),
    *("training", "config", "routing", "online_rounds", "pods", "chat_runs", "cli_runs", "context"),
    *("reward_model", "model_check", "refresh", "emitted", "check", "row_kinds", "win_rates", "theory"),
    *("report", "sampling_lanes", "groups", "expert_mesh", "image_runs", "implicit_rewards", "control", "checkpoint"),
    *("judge", "interrupts", "lora_runs", "bench", "notebook", "hosts", "faults", "cli_frontier"),
)


def pytest_configure(config):
    gc.set_threshold(50_000, 20, 20)  # tracing makes many objects: a sixth of its time would go into looking for garbage
    if not hasattr(config, "workerinput"):  # processes of xdist, and those that tests start, inherit it
        TEMPORARY.append(tempfile.mkdtemp(prefix="dpo-", dir=_in_memory()))
        os.environ["TMPDIR"], tempfile.tempdir = TEMPORARY[0], None


def _in_memory():
    """A folder of memory with room for the tests' files, most of which are synced to disk; None if there is none."""
    try:
        room = shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
    return "/dev/shm" if room > 4e9 and os.access("/dev/shm", os.W_OK | os.X_OK) else None


def pytest_sessionfinish(exitstatus):
    if exitstatus != pytest.ExitCode.OK:
        TEMPORARY.clear()  # what failed can be looked at


def pytest_unconfigure():
    for folder in TEMPORARY:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--within", type=float, help="skip what has not begun after so many seconds")
    parser.addoption("--as-given", action="store_true", help="files in the order given, not the longest first")


def pytest_runtest_setup(item):
    within = item.config.getoption("--within")
    if within is not None and time.monotonic() - STARTED > within:
        pytest.skip("no time left")


APART = {"soak", "parity", "plan", "browser", "writers"}
"""Marks of tests that run only where they are asked for: these are not long as well."""


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    mark_long(items, whole=not any("::" in argument for argument in config.args))
    if config.getoption("--as-given"):
        return
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def mark_long(items, *, whole):
    """Marks the tests of `LONG`. Where `whole` files were collected, a beginning that no name has is an error."""
    files = {}
    for item in items:
        files.setdefault(item.path.stem.removeprefix("test_"), []).append(item)
    for name in files.keys() & LONG.keys():
        for entry in LONG[name]:
            beginning, *kept = entry if isinstance(entry, tuple) else (entry,)
            found = {item.name: item for item in files[name] if item.name.startswith(beginning)}
            quick = [found.pop(beginning + end, None) for end in kept]
            if whole and (not found or None in quick):
                raise pytest.UsageError(f"tests/long_tests.py: test_{name}.py has no {entry}")
            for item in found.values():
                if not APART & {mark.name for mark in item.iter_markers()}:
                    item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer the golden numbers were made with: byte-level BPE, 511 entries, eos = bos = 0, no pad token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window, for the tests that `-m browser` chooses."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    assert path, "these tests drive a Chromium that is installed: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()
