"""launch/hh_pipeline.sh with a program in place of dpo-jax that writes down how it was called."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = ["audit", "sft", "refs", "dpo", "eval", "export"]
FAKE = """#!/usr/bin/env bash
case "$*" in *--check*)
  printf '%q ' "$@" >>"$CALLS.checks"
  echo >>"$CALLS.checks"
  [ "${REFUSED:-}" = "$1" ] && { echo "$1 is refused" >&2; exit 2; }
  exit 0 ;;
esac
printf '%q ' "$@" >>"$CALLS"
echo >>"$CALLS"
if [ "${HANG:-}" = "$1" ]; then
  trap 'exit 143' TERM
  touch "$CALLS.hangs"
  while :; do sleep 0.05; done
fi
[ "${FAIL:-}" = "$1" ] && exit "$CODE"
previous=''
for word in "$@"; do
  [ "$previous" != --run.dir ] || run=$word
  previous=$word
done
case $1 in
  sft | dpo) mkdir -p "$run/$1/export" && touch "$run/$1/export/config.json" ;;
  eval) mkdir -p "$run/eval" && touch "$run/eval/report.json" ;;
  export) mkdir -p "$run/export" && touch "$run/export/config.json" ;;
esac
"""
# Like dpo-jax it takes SIGINT and SIGTERM, which a shell cannot in the background.
COUNTS = f"""#!{sys.executable} -S
import os, signal, sys, time
if "--check" in sys.argv:
    sys.exit(0)
def heard(number, frame):
    with open(os.environ["CALLS"], "a") as calls:
        print(signal.Signals(number).name.removeprefix("SIG"), file=calls)
signal.signal(signal.SIGINT, heard)
signal.signal(signal.SIGTERM, heard)
with open(os.environ["CALLS"], "a") as calls:
    print("started", file=calls)
while open(os.environ["CALLS"]).read().count("\\n") < 2:
    time.sleep(0.02)
time.sleep(0.3)
sys.exit(143)
"""

# A mv that waits until two hosts have come to it.
TOGETHER = """#!/usr/bin/env bash
echo "$*" >>"$CALLS.moves"
for _ in {1..500}; do
  [ "$(grep -c . "$CALLS.moves")" -lt 2 ] || exec /usr/bin/env PATH="${PATH#*:}" mv "$@"
  sleep 0.02
done
exit 1
"""


class Chain:
    def __init__(self, folder):
        self.calls_file, self.run_dir = folder / "calls", folder / "run"
        program = folder / "venv" / "bin" / "dpo-jax"
        program.parent.mkdir(parents=True)
        program.write_text(FAKE)
        program.chmod(0o755)
        self.env = {"PATH": os.environ["PATH"], "DPO_JAX_VENV": str(folder / "venv"), "CALLS": str(self.calls_file)}

    def command(self, *arguments):
        return ["bash", str(ROOT / "launch" / "hh_pipeline.sh"), "--run.dir", str(self.run_dir), *arguments]

    def __call__(self, *arguments, **env):
        return subprocess.run(self.command(*arguments), env=self.env | env, capture_output=True, text=True, timeout=60)

    def calls(self):
        """The calls since the last time, as lists of words."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        self.calls_file.write_text("")
        return [shlex.split(line) for line in text.splitlines()]


@pytest.fixture
def chain(tmp_path):
    return Chain(tmp_path)


def test_a_dry_run_prints_the_commands_and_runs_nothing(chain):
    result = chain("--dry-run", "--data.path", "a b")
    assert result.returncode == 0
    printed = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [words[1] for words in printed] == STEPS
    assert printed[0][2:] == ["configs/hh_pythia28_sft.yaml", "--run.dir", str(chain.run_dir), "--data.path", "a b"]
    assert printed[3][2] == "configs/hh_pythia28_dpo.yaml"
    assert chain.calls() == []
    assert not chain.run_dir.exists()


def test_every_step_once_with_its_options_as_they_were_given(chain):
    odd = "a b; $HOME 'x'"
    assert chain("--data.path", odd).returncode == 0
    calls = chain.calls()
    assert [words[0] for words in calls] == STEPS
    assert all(words[-1] == odd for words in calls[:-1])
    assert "--data.path" not in calls[-1]
    again = chain("--data.path", odd)
    assert again.returncode == 0
    assert chain.calls() == []
    assert again.stderr.count("done before") == len(STEPS)


def test_all_steps_are_checked_before_the_first(chain):
    for how in ([], ["--dry-run"], ["--check"]):
        refused = chain("--data.path", "one", *how, REFUSED="eval")
        assert (refused.returncode, refused.stdout, chain.calls()) == (2, "", [])
        assert "eval is refused" in refused.stderr
    assert chain("--check", "--check-elsewhere=/mnt").returncode == 0
    last = chain.calls_file.with_name("calls.checks").read_text().splitlines()[-len(STEPS) :]
    assert [line.split()[0] for line in last] == STEPS
    assert "--check-after=audit\\,sft\\,refs" in last[3]
    assert all("--check-elsewhere=/mnt" in line for line in last)
    assert chain("--steps", "audit,sft").returncode == 0
    chain.calls_file.with_name("calls.checks").unlink()
    assert chain("--check").returncode == 0  # what is done is there to be looked at
    first = chain.calls_file.with_name("calls.checks").read_text().splitlines()[0].split()
    assert first[0] == "refs"
    assert not [word for word in first if word.startswith("--check-after")]


def test_a_check_that_cannot_check_says_so(chain):
    nothing = {"DPO_JAX_VENV": "/nowhere", "PATH": "/usr/bin:/bin"}
    alone = chain("--check", **nothing)
    assert alone.returncode == 1
    assert "there is no dpo-jax here to check with: run ./launch/env.sh first" in alone.stderr
    printed = chain("--dry-run", **nothing)
    assert (printed.returncode, len(printed.stdout.splitlines())) == (0, len(STEPS))
    assert printed.stderr.count("not options, data and models: dpo-jax is missing") == 1


def test_what_was_asked_differently_is_done_again(chain):
    chain("--data.path", "one")
    chain.calls()
    chain("--data.path", "two")
    assert [words[0] for words in chain.calls()] == STEPS


def test_a_step_whose_output_is_gone_or_that_was_begun_differently_is_done_again(chain):
    chain("--data.path", "one")
    (chain.run_dir / "eval" / "report.json").unlink()
    chain.calls()
    chain("--data.path", "one")
    assert [words[0] for words in chain.calls()] == ["eval"]
    chain("--data.path", "one", "--steps", "eval", "--run.seed", "2", FAIL="eval", CODE="137")
    chain.calls()
    chain("--data.path", "one")  # what the other attempt left is not taken for the result of this command
    assert [words[0] for words in chain.calls()] == ["eval"]


@pytest.mark.parametrize("code", [65, 143])
def test_a_step_that_ends_early_ends_the_chain_with_its_code_and_is_where_it_continues(chain, code):
    assert chain(FAIL="dpo", CODE=str(code)).returncode == code
    assert [words[0] for words in chain.calls()] == STEPS[:4]
    assert chain().returncode == 0
    assert [words[0] for words in chain.calls()] == STEPS[3:]


def test_a_signal_reaches_the_step_which_saves(chain):
    process = subprocess.Popen(chain.command(), env=chain.env | {"HANG": "sft"}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not chain.calls_file.with_name("calls.hangs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert "has saved and stopped" in process.stderr.read()
    process.stderr.close()
    chain.calls()
    assert chain().returncode == 0
    assert [words[0] for words in chain.calls()] == STEPS[1:]


def test_ctrl_c_reaches_the_step_once(chain):
    """A terminal signals the whole process group. A second signal would stop dpo-jax before it has saved."""
    program = Path(chain.env["DPO_JAX_VENV"]) / "bin" / "dpo-jax"
    program.write_text(COUNTS)
    process = subprocess.Popen(chain.command(), env=chain.env, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (chain.calls_file.exists() and chain.calls_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 143
    assert chain.calls_file.read_text().split() == ["started", "TERM"]


def test_selected_steps_and_many_hosts(chain):
    assert chain("--steps", "audit,sft").returncode == 0
    assert [words[0] for words in chain.calls()] == ["audit", "sft"]
    printed = chain("--dry-run", "--distributed", "auto").stdout.splitlines()
    assert [shlex.split(line)[1] for line in printed] == ["sft", "refs", "dpo", "eval"]
    refused = chain("--steps", "audit,train")
    assert refused.returncode == 2
    assert "train: no such step" in refused.stderr
    assert chain.calls() == []


HOST = (("coordinator", "h:1"), ("num-processes", "2"), ("process-id", "0"))


@pytest.mark.parametrize("spelled", ["--{}", "--run.{}"])
@pytest.mark.parametrize("letter", "-_")
def test_what_tells_hosts_apart_asks_for_nothing_else(chain, spelled, letter):
    names = [spelled.format(name.replace("-", letter)) for name, _ in HOST]
    apart = [word for name, (_, value) in zip(names, HOST, strict=True) for word in (name, value)]
    assert chain("--steps", "sft", *apart, "--data.path", "one").returncode == 0
    assert len(chain.calls()) == 1
    assert chain("--steps", "sft", *(f"{name}=7" for name in names), "--data.path", "one").returncode == 0
    assert chain.calls() == []
    assert chain("--steps", "sft", *apart, "--data.path", "two").returncode == 0
    assert len(chain.calls()) == 1


def test_hosts_that_finish_a_step_together_all_leave_its_mark(chain):
    """Two hosts, here subshells of one process, which therefore have the same process id, as containers do."""
    move = Path(chain.env["DPO_JAX_VENV"]) / "bin" / "mv"
    move.write_text(TOGETHER)
    move.chmod(0o755)
    both = '(. "$0" "$@") & one=$!; (. "$0" "$@") & two=$!; code=0; wait "$one" || code=1; wait "$two" || code=1; exit "$code"'
    words = ["bash", "-c", both, *chain.command("--steps", "sft")[1:]]
    env = chain.env | {"PATH": f"{move.parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert chain.calls()
    assert [path.name for path in (chain.run_dir / "pipeline").iterdir()] == ["sft.done"]
    assert chain("--steps", "sft").returncode == 0
    assert chain.calls() == []


def test_help_names_the_steps():
    result = subprocess.run(["bash", str(ROOT / "launch" / "hh_pipeline.sh"), "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "The steps: audit, sft, refs, dpo, eval, export." in result.stdout


@pytest.mark.parametrize("name", ['"runs/my run"', "'runs/hh'", "*runs"])
def test_a_quoted_run_dir_is_not_guessed(chain, tmp_path, name):
    config = tmp_path / "mine.yaml"
    config.write_text(f"run:\n  dir: {name}\n")
    command = ["bash", str(ROOT / "launch" / "hh_pipeline.sh")]
    done = subprocess.run(command, env=chain.env | {"DPO_JAX_DPO_CONFIG": str(config)}, capture_output=True, text=True)
    assert f"run.dir in {config} is quoted: give --run.dir DIR" in done.stderr
    assert done.returncode == 2
    assert not chain.calls_file.exists()


@pytest.mark.parametrize(
    ("written", "name"), [("runs/my run  # mine", "runs/my run"), ("runs/a#1", "runs/a#1"), ("/data/x/hh", "/data/x/hh")]
)
def test_the_run_dir_of_the_configuration_is_read_whole(chain, tmp_path, written, name):
    config = tmp_path / "mine.yaml"
    config.write_text(f"run:\n  dir: {written}\n")
    command = ["bash", str(ROOT / "launch" / "hh_pipeline.sh"), "--dry-run"]
    done = subprocess.run(command, env=chain.env | {"DPO_JAX_DPO_CONFIG": str(config)}, capture_output=True, text=True)
    assert f"--run.dir {shlex.quote(name)}\n" in done.stdout.replace(" --steps", "\n") + "\n", done.stdout + done.stderr


def test_a_run_dir_that_was_given_may_be_any(chain, tmp_path):
    command = ["bash", str(ROOT / "launch" / "hh_pipeline.sh"), "--dry-run", "--run.dir", f"{tmp_path}/R&D"]
    done = subprocess.run(command, env=chain.env, capture_output=True, text=True)
    assert f"--run.dir '{tmp_path}/R&D'" in done.stdout, done.stderr
