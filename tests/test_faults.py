"""What happens to a process: kills, signals, a full disk, a lost host. Each is done to a real one, and the figures are printed.

The long ones are behind `-m soak` (`pytest -m soak -s tests/test_faults.py`).
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from damage import FAULTS, damage
from test_checkpoint import abstract, losses, quarantined
from test_hosts import CONFIG, LIMIT, begin, end, free_port

from dpo_jax.cli.main import main
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.fit import EXIT_PREEMPTED
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[2])
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
from test_checkpoint import *
from dpo_jax.runtime.fit import EXIT_PREEMPTED, Preempted

directory, total, every, pause = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
compiled = jax.jit(train_step, donate_argnums=0)

def slow(state, rows):
    time.sleep(pause)
    result = compiled(state, rows)
    print("compiled", flush=True)
    return result

with Checkpoints(directory / "checkpoints") as checkpoints, MetricsLog(directory / "metrics.jsonl") as log:
    found = checkpoints.restore_latest(abstract())
    state = make_state() if found is None else jax.device_put(found[0])
    print(int(state.step), flush=True)
    try:
        state = fit(slow, state, Batch, total_steps=total, checkpoints=checkpoints, log=log, save_every=every)
    except Preempted as stop:
        print(stop)
        sys.exit(EXIT_PREEMPTED)
print(digest(state))
"""
TOTAL = 40


def start(directory, *, total=TOTAL, every=3, pause=0.0):
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PROGRAM, directory, Path(__file__).parent, total, every, pause]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(directory, **options):
    """Runs to the end. Returns (the step it started from, SHA-256 over all leaves of the last state)."""
    out, error = start(directory, **options).communicate(timeout=120)
    words = out.split()
    return (words[0], words[-1]) if len(words) > 1 else pytest.fail(error)


def wait_for_rows(path, count, *processes):
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    for process in processes:
        process.kill()
    pytest.fail(f"no {count} rows in {path}: {[process.communicate() for process in processes]}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(directory, SHA-256 over all leaves) of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, finish(directory)[1]


# Signals.


def test_sigterm_saves_and_the_next_run_continues_bit_for_bit(tmp_path, uninterrupted):
    process = start(tmp_path, pause=0.1)
    wait_for_rows(tmp_path / "metrics.jsonl", 4, process)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, error
    assert "SIGTERM: finishing this step, then saving" in error
    done = int(out.split(" after ")[1].split()[0])
    assert len(losses(tmp_path)) == done
    assert finish(tmp_path) == (str(done), uninterrupted[1])
    assert losses(tmp_path) == losses(uninterrupted[0])


def test_a_second_sigterm_ends_the_process_in_the_middle_of_its_step(tmp_path):
    process = start(tmp_path, pause=1000)
    assert process.stdout.readline() == "0\n"
    time.sleep(0.5)  # into the step
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert "A second signal stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)  # an echo of the first
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED == 143
    assert not any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


# Kills.


def newest_good(directory):
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore_latest(abstract())
    return 0 if found is None else int(found[0].step)


def moment(directory):
    """What a killed process was doing, by what it left."""
    checkpoints = directory / "checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    if any((checkpoints / "deleting").glob("*")):
        return "deleting"
    if any("tmp" in name for name in names):
        return "saving"
    return "sealing" if "unsealed" in names else "training"


def kill_until_done(directory, generator, *, tries, every):
    """Kills at random times until `tries` are used up, then runs to the end. Returns (SHA-256, moments, steps lost)."""
    moments, lost, expected = [], 0, 0
    for _ in range(tries):
        process = start(directory, every=every, pause=0.01)
        assert process.stdout.readline() == f"{expected}\n", "continues from the newest step that verifies"
        assert process.stdout.readline() == "compiled\n"
        time.sleep(generator.random() * 0.25)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had not ended by itself"
        moments.append(moment(directory))
        expected = newest_good(directory)
        rows = (directory / "metrics.jsonl").read_bytes().count(b"\n")
        assert rows >= expected, "a checkpoint of step n promises the rows before n"
        lost += rows - expected
    began, sha = finish(directory, every=every)
    assert began == str(expected)
    return sha, moments, lost


@pytest.mark.parametrize(
    ("rounds", "every"), [(1, 2), pytest.param(6, 3, marks=pytest.mark.soak), pytest.param(10, 1, marks=pytest.mark.soak)]
)
def test_kill_9_at_random_times(tmp_path, uninterrupted, rounds, every):
    """Of two saves kept, every further one deletes: with `every` 1 most of the time is spent in saving and deleting."""
    tries, moments, lost = 2 if rounds == 1 else 5, [], 0
    for number in range(rounds):
        directory = tmp_path / f"run{number}"
        sha, when, steps = kill_until_done(directory, random.Random(number), tries=tries, every=every)
        assert sha == uninterrupted[1]
        assert losses(directory) == losses(uninterrupted[0])
        assert quarantined(directory / "checkpoints") == []
        moments, lost = moments + when, lost + steps
    seen = ", ".join(f"{moments.count(name)} while {name}" for name in ("training", "saving", "sealing", "deleting"))
    print(f"kill -9, a save every {every}: {len(moments)} kills ({seen}), 0 steps wrong, {lost} steps taken again")


# A host is lost.


def launch(folder, *, heartbeat=5, epochs=15, save_every=5):
    """Both processes of a run on two hosts, in `folder`."""
    config = folder / "tiny.yaml"
    text = CONFIG.format(dir=folder / "run", golden=GOLDEN).replace("heartbeat_seconds: 20", f"heartbeat_seconds: {heartbeat}")
    config.write_text(text.replace("steps: 100", f"steps: {save_every}").replace("epochs: 30", f"epochs: {epochs}"))
    port = free_port()
    return [begin(["-m", "dpo_jax.cli.main", "dpo", config], process=i, port=port) for i in range(2)]


def lose(folder, *, victim, how, heartbeat):
    """Loses one of two hosts in the middle of training. Returns the seconds in which the other one noticed, and its code."""
    both = launch(folder, heartbeat=heartbeat)
    wait_for_rows(folder / "run" / "dpo" / "metrics.jsonl", 7, *both)
    deadline = time.monotonic() + LIMIT
    while not (folder / "run" / "dpo" / "checkpoints" / "5").exists():  # it is saved while training goes on
        assert time.monotonic() < deadline
        time.sleep(0.05)
    both[victim].send_signal(how)
    began = time.monotonic()
    try:
        code = both[1 - victim].wait(timeout=LIMIT)
        return time.monotonic() - began, code
    finally:
        end([process for process in both if process.kill() is None])


def leaf_hashes(folder):
    """(last step, digest of every leaf of it)."""
    steps = [path for path in (folder / "run" / "dpo" / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(steps, key=lambda path: int(path.name))
    leaves = json.loads((last / "record" / "metadata").read_text())["leaves"]
    return int(last.name), {name: leaf["tiles"] for name, leaf in leaves.items()}


def test_a_host_that_is_killed_ends_the_other_and_leaves_nothing_in_the_way(tmp_path):
    seconds, code = lose(tmp_path, victim=1, how=signal.SIGKILL, heartbeat=5)
    assert code != 0
    assert seconds < 5 + 5
    print(f"SIGKILL of host 1, heartbeat 5 s: the other ended with {code} after {seconds:.1f} s")
    done, hashes = leaf_hashes(tmp_path)
    assert done >= 5
    assert 0 in (done % 5, done % 3)  # saved as asked, or where the reference moved
    assert hashes
    flags = ["--distributed", "off", "--run.devices", "single", "--run.no-resume"]
    assert main(["dpo", str(tmp_path / "tiny.yaml"), *flags]) == 2  # no lock is held: it gets as far as seeing the checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What `leaf_hashes` says of a run on two hosts that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert [code for code, _ in end(launch(folder))] == [0, 0]
    return leaf_hashes(folder)


@pytest.mark.soak
@pytest.mark.parametrize("heartbeat", [5, 10])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_host_ends_the_other_and_a_relaunch_gives_the_same_weights(tmp_path, whole, how, victim, heartbeat):
    seconds, code = lose(tmp_path, victim=victim, how=how, heartbeat=heartbeat)
    assert code != 0
    assert seconds < heartbeat + 5
    for code_of_relaunch, output in end(launch(tmp_path)):
        assert code_of_relaunch == 0, output
    assert leaf_hashes(tmp_path) == whole
    rows = read_metrics(tmp_path / "run" / "dpo" / "metrics.jsonl")
    assert [row["step"] for row in rows if not is_evaluation(row)] == list(range(30))
    print(f"{how.name} of host {victim}, heartbeat {heartbeat} s: the other ended with {code} after {seconds:.1f} s; same SHA")


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_to_the_part_of_the_second_host_is_found_by_both(tmp_path, whole, fault):
    assert [code for code, _ in end(launch(tmp_path))] == [0, 0]
    newest = tmp_path / "run" / "dpo" / "checkpoints" / "30"
    damage(max((newest / "state" / "ocdbt.process_1").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()), fault)
    for code, output in end(launch(tmp_path)):
        assert code == 0, output
    assert quarantined(newest.parent) == ["30-0"]
    assert leaf_hashes(tmp_path) == whole
    print(f"two hosts, a file of the second, {fault}: found, step 25 used; same SHA")


# The disk is full.

LIMITED = """
import os, resource, signal, sys, time
sys.path.insert(0, sys.argv[2])
from test_checkpoint import *
from dpo_jax.runtime.checkpoint import CheckpointWriteError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {"w": np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
try:
    checkpoints.save(2, state, {})
    for _ in range(500):
        checkpoints.check_errors()
        time.sleep(0.01)
    print("no error seen")
except CheckpointWriteError as error:
    print("seen by polling:", isinstance(error, OSError), str(error)[:60])
os._exit(0)
"""


def test_a_save_that_cannot_be_written_is_seen_by_polling_and_older_steps_survive(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "seen by polling: True saving to" in result.stdout, result.stdout + result.stderr
    assert result.stderr == "", "the error is raised, and one message is enough"
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore_latest({"w": jax.ShapeDtypeStruct((64, 1024), np.float32)})
        assert checkpoints.latest_step() == 1
    np.testing.assert_array_equal(state["w"], np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32))


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]  # a mount that nobody else sees, and that ends with its process
MOUNT = """
import errno, os, subprocess, sys
from pathlib import Path

def mount(path, size):
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)
    return path

def fill(path, leave=0):
    # Page by page until nothing fits, then `leave` pages less.
    ballast = path / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(0, (file.tell() // 4096 - leave) * 4096))
    return ballast
"""


def on_tmpfs(program, *arguments, timeout=LIMIT):
    """Runs a Python program that may `mount` and `fill` small disks. Returns what it printed."""
    try:
        subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk needs the right to mount one (unshare -rm): {error}")
    command = [*NAMESPACE, sys.executable, "-c", MOUNT + program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


TOY_ON_FULL_DISK = """
from test_checkpoint import *
from test_reference import IDENTITY, PAIRS, VALUES, ReferenceCache, random_pairs
from dpo_jax.cli.exit_codes import exit_code

folder, small = Path(sys.argv[1]), mount(Path(sys.argv[1]) / "small", "1m")
compiled = jax.jit(train_step, donate_argnums=0)
rows = lambda path: [row["step"] for row in read_metrics(path)]

def run(checkpoints_at, metrics_at, fill_at=None):
    def check(step, metrics):
        if step == fill_at:
            fill(small)
    with Checkpoints(checkpoints_at) as checkpoints, MetricsLog(metrics_at) as log:
        found = checkpoints.restore_latest(abstract())
        state = make_state() if found is None else jax.device_put(found[0])
        began = int(state.step)
        state = fit(compiled, state, Batch, total_steps=40, checkpoints=checkpoints, log=log, save_every=2, check=check)
    return began, digest(state)

for name, checkpoints_at, metrics_at in (("checkpoint", small, folder / "m"), ("metrics", folder / "c", small / "m")):
    try:
        run(checkpoints_at, metrics_at, fill_at=9)
    except OSError as error:
        code, last = exit_code(error), rows(metrics_at)[-1]
    with Checkpoints(checkpoints_at, read_only=True) as checkpoints:
        newest = checkpoints.restore_latest(abstract())[1], checkpoints.latest_step()
    (small / "ballast").unlink()
    began, sha = run(checkpoints_at, metrics_at)
    assert rows(metrics_at) == list(range(40))
    print(name, code, newest[1], last, began, sha)

for path in small.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
more, values = random_pairs(400, seed=5), np.zeros((400, 2), np.float32)
cache = ReferenceCache(small / "refs", IDENTITY)
cache.add(PAIRS, VALUES)
for leave in (0, 1):  # first there is no room for the number of records, then none for all of the records
    fill(small, leave)
    try:
        cache.add(more[:20] if leave == 0 else more[20:], values[:20] if leave == 0 else values[20:])
        code = 0
    except OSError as error:
        code = exit_code(error)
    (small / "ballast").unlink()
    again = ReferenceCache(small / "refs", IDENTITY)
    print("cache", code, len(again), again.damaged)
cache.add(more, values)
again = ReferenceCache(small / "refs", IDENTITY)
print("cache", 0, len(again), again.damaged, (again.lookup(PAIRS) == VALUES).all())
"""


def test_a_full_disk_ends_the_run_and_with_space_it_continues_bit_for_bit(tmp_path, uninterrupted):
    lines = [line.split() for line in on_tmpfs(TOY_ON_FULL_DISK, tmp_path).splitlines()]
    (_, code, newest, last, began, sha), metrics = lines[0], lines[1]
    assert (code, newest, sha) == ("74", began, uninterrupted[1])
    assert 9 <= int(last) < int(newest) + 2 * 2 + 1  # the save that failed, or at most the next, saw it
    assert (metrics[1], metrics[2], metrics[5]) == ("74", metrics[4], uninterrupted[1])
    assert lines[2:] == [["cache", "74", "33", "0"], ["cache", "74", "33", "0"], ["cache", "0", "413", "0", "True"]]
    print(f"disk full: code 74 three times; checkpoint {newest} intact, the error came after row {last}; same SHA")


PROGRAM_ON_FULL_DISK = """
import hashlib, time

folder, config = Path(sys.argv[1]), sys.argv[2]
small = mount(folder / "small", "32m")

def begin(command, *flags):
    line = [sys.executable, "-m", "dpo_jax.cli.main", command, config, *map(str, flags)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def train(name, *flags):
    metrics = Path(flags[1]) / "dpo" / "metrics.jsonl"
    process = begin("dpo", *flags)
    while not (metrics.exists() and metrics.read_bytes().count(b"\\n") >= 12):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    fill(small)
    out = process.communicate()[0]
    assert "Traceback" not in out and out.count("No space left on device") == 1, out
    message = out.splitlines()[-1]
    print(name, process.returncode, metrics.read_bytes().count(b"\\n"), message, sep="|")
    (small / "ballast").unlink()
    process = begin("dpo", *flags)
    out = process.communicate()[0]
    weights = hashlib.sha256((Path(flags[1]) / "dpo" / "export" / "model.safetensors").read_bytes()).hexdigest()
    print(name, process.returncode, next(line for line in out.splitlines() if "continuing" in line), weights, sep="|")

train("checkpoint", "--run.dir", folder / "a", "--run.checkpoints", small)
train("metrics", "--run.dir", small / "b", "--run.checkpoints", folder / "b")
for leave in (4, None):
    if leave:
        fill(small, leave)
    process = begin("refs", "--run.dir", folder / "c", "--refs.cache", small / "refs", "--data.reviews-train", 600)
    out = process.communicate()[0]
    there = [line.split(": ")[1] for line in out.splitlines() if "already cached" in line]
    print("cache", process.returncode, out.splitlines()[-1], *there, sep="|")
    (small / "ballast").unlink(missing_ok=True)
"""


@pytest.mark.soak
def test_the_program_on_a_full_disk(tmp_path):
    config = tmp_path / "tiny.yaml"
    text = CONFIG.format(dir=tmp_path / "whole", golden=GOLDEN).replace("steps: 100", "steps: 4")
    config.write_text(text.replace("devices: mesh, distributed: auto", "devices: single"))
    assert main(["dpo", str(config)]) == 0
    weights = hashlib.sha256((tmp_path / "whole" / "dpo" / "export" / "model.safetensors").read_bytes()).hexdigest()
    said = [line.split("|") for line in on_tmpfs(PROGRAM_ON_FULL_DISK, tmp_path, config).splitlines()]
    print(*said, sep="\n")
    assert [line[:2] for line in said] == [[name, code] for name in ("checkpoint", "metrics", "cache") for code in ("74", "0")]
    for name in ("checkpoint", "metrics"):
        (_, _, rows, message), (_, _, continuing, sha) = (line for line in said if line[0] == name)
        assert sha == weights
        assert "No space left on device; free some space, then run the same command again: it continues" in message
        assert 8 <= int(continuing.split(" after ")[1].split()[0]) <= int(rows)
