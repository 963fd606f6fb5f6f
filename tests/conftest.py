"""Four CPU devices, strict numerics, and compiled things shared by the whole session."""

import gc
import os
import shutil
import signal
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

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


def xla_flags(devices):
    """XLA_FLAGS of a process that has so many CPU devices, and compiles as this one does."""
    return f"{COMPILER_FLAGS} {DEVICES}={devices}"


QUIET = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


# The files that take longest, longest first: a long file that starts last keeps one process waiting for the other.
LONGEST = (
    *(
        "golden",
        "cli_resume",
        "hosts",
        "faults",
        "cli_frontier",
        "cli_runs",
        "lora_runs",
        "cli_refusals",
        "bench",
        "multidevice",
    ),
    *("models", "check", "checkpoint", "notebook", "sampling"),
    *("attention", "step", "judge", "chat_runs", "groups", "reward_model", "ppo", "interrupts", "implicit_rewards"),
    *("pods", "report"),
)


def pytest_configure():
    gc.set_threshold(50_000, 20, 20)  # tracing makes many objects: a sixth of its time would go into looking for garbage


def pytest_addoption(parser):
    parser.addoption("--within", type=float, help="skip what has not begun after so many seconds; files in the order given")


def pytest_runtest_setup(item):
    within = item.config.getoption("--within")
    if within is not None and time.monotonic() - STARTED > within:
        pytest.skip("no time left")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--within") is not None:
        return
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


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
