"""Runs that outlive their terminal, and SLURM: with two real processes that JAX joins by SLURM's five variables."""

import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest
from fake_cloud import RECORD, ROOT, Cloud, wait_for

DETACHED, GPU, BATCH = "launch/detached.sh", "launch/gpu_node.sh", "launch/slurm.sbatch"
UNTIL_ASKED = ["bash", "-c", "echo begins; while :; do sleep 0.02; done"]
SMI = 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"; echo "CUDA Version: 12.8"\n'
# What srun does, on one machine: $PLACES are the SLURM_LOCALIDs of the processes.
SRUN = (
    RECORD
    + """while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=127.0.0.1 SLURM_PROCID=-1
for SLURM_LOCALID in $PLACES; do
  SLURM_PROCID=$((SLURM_PROCID + 1))
  export SLURM_LOCALID SLURM_PROCID
  "$@" &
  all+=("$!")
done
code=0
for one in "${all[@]}"; do wait "$one" || code=$?; done
exit "$code"
"""
)
JOIN = """
import os, sys
from dpo_jax.runtime import hosts
hosts.start(heartbeat_seconds=20)
import jax
from jax.experimental import multihost_utils
assert sys.argv[1:] == ["dpo", "c.yaml", "--distributed", "auto"], sys.argv
seen = multihost_utils.process_allgather(jax.numpy.array(jax.process_index())).tolist()
with open(f"seen-{jax.process_index()}", "w") as file:
    print(jax.process_count(), seen, jax.config.values["jax_cuda_visible_devices"], file=file)
"""


@pytest.fixture
def node(tmp_path):
    node = Cloud(tmp_path)
    node.folder = node.clone / "runs" / "detached"
    yield node
    if (node.folder / "pid").exists():
        node.run(DETACHED, "stop")
    node.end()


def status(node):
    return node.run(DETACHED, "status", HOSTNAME="here").stdout.split()[1:]


def test_a_program_outlives_the_terminal_and_tells_how_it_ended(node):
    assert status(node) == ["nothing"]
    terminal = node.popen(DETACHED, "start", *UNTIL_ASKED)
    assert terminal.wait(timeout=30) == 0
    (pid,) = status(node)[1:]
    with pytest.raises(ProcessLookupError):  # it is not in the terminal's group, to which a hangup goes
        os.killpg(terminal.pid, signal.SIGHUP)
    terminal.communicate()
    again = node.run(DETACHED, "start", "true")
    assert (again.returncode, status(node)) == (2, ["running", pid])
    assert f"a program is running (process {pid})" in again.stderr
    follower = node.popen(DETACHED, "follow")
    assert follower.stdout.readline() == "begins\n"
    assert node.run(DETACHED, "stop", HOSTNAME="here").stdout == "here ended 143\n"
    assert follower.wait(timeout=30) == 143
    follower.communicate()
    assert node.run(DETACHED, "start", "bash", "-c", "echo second; exit 7").returncode == 0
    followed = node.run(DETACHED, "follow")
    assert (followed.returncode, followed.stdout, status(node)) == (7, "second\n", ["ended", "7"])


def test_whoever_asks_is_not_taken_for_a_program(node):
    node.run(DETACHED, "start", "true")
    wait_for(lambda: status(node) == ["ended", "0"])
    with open(node.folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as a follower's question does
        assert status(node) == ["ended", "0"]


def test_what_went_down_with_its_machine_is_not_taken_for_done(node):
    node.run(DETACHED, "start", *UNTIL_ASKED)
    os.killpg(os.getpgid(int((node.folder / "pid").read_text())), signal.SIGKILL)
    wait_for(lambda: status(node) == ["lost"])
    followed = node.run(DETACHED, "follow")
    assert followed.returncode == 1
    assert "the machine went down while the program ran" in followed.stderr
    assert node.run(DETACHED, "start", "bash", "-c", "exit 0").returncode == 0


def test_a_signal_to_all_processes_reaches_the_program_once(node):
    """As when a machine shuts down. The second signal would stop dpo-jax before it has saved."""
    note = 'trap "echo heard; heard=yes" TERM; echo begins; until [ "${heard:-}" ]; do sleep 0.02; done; sleep 0.3; exit 143'
    node.run(DETACHED, "start", "bash", "-c", note)
    wait_for(lambda: (node.folder / "log").read_text() == "begins\n")
    os.killpg(os.getpgid(int((node.folder / "pid").read_text())), signal.SIGTERM)
    followed = node.run(DETACHED, "follow")
    assert (followed.returncode, followed.stdout.count("heard")) == (143, 1)


def test_keys_are_kept_from_others_and_only_until_the_start(node):
    def send(text):
        command = [node.clone / DETACHED, "keys"]
        return subprocess.run(command, input=text, env=node.environment, text=True, capture_output=True).returncode

    assert send("HF_TOKEN=a b\n") == 1  # the connection broke
    assert not list(node.folder.glob("keys*"))
    assert send("HF_TOKEN=a $b 'c\nend\n") == 0
    assert (node.folder / "keys").stat().st_mode & 0o777 == 0o600
    node.run(DETACHED, "start", "bash", "-c", 'echo "$HF_TOKEN"')
    assert node.run(DETACHED, "follow").stdout == "a $b 'c\n"
    assert not list(node.folder.glob("keys*"))


def test_a_gpu_node_is_set_up_and_starts(node):
    node.program('echo "$*"\n')
    without = node.run(GPU, "start", "dpo", "c.yaml")
    assert without.returncode == 1
    assert "nvidia-smi finds no GPU on this machine" in without.stderr
    node.add("nvidia-smi", SMI)
    started = node.run(GPU, "start", "dpo", "c.yaml", "--run.devices", "mesh")
    assert started.returncode == 0, started.stderr
    assert "dpo_jax[cuda12,test]" in started.stderr
    followed = node.run(GPU, "follow")
    assert (followed.returncode, followed.stdout) == (0, "dpo c.yaml --run.devices mesh\n")
    assert node.run(GPU, "status").stdout.endswith(" ended 0\n")
    assert node.run(GPU, "start").returncode == 2


def test_a_run_is_not_stopped_by_a_question(node):
    node.run(DETACHED, "start", *UNTIL_ASKED)
    for words in ([GPU, "stop", "--dry-run"], [DETACHED, "--dry-run", "stop"], [DETACHED, "stop", "--help"]):
        assert node.run(*words).returncode == 2
        assert status(node)[0] == "running"


@pytest.fixture
def job(node):
    (node.clone / ".venv" / "bin").mkdir(parents=True)
    node.add("srun", SRUN)
    node.add("squeue", 'cat "$CLOUD/state"\n')
    node.add("scontrol", RECORD)
    (node.path / "state").write_text("RUNNING\n")

    def submit(**environment):
        spooled = node.clone.parent / "slurm_script"  # slurmd runs a copy
        spooled.write_bytes((node.clone / BATCH).read_bytes())
        slurm = {"SLURM_SUBMIT_DIR": str(node.clone), "SLURM_JOB_ID": str(free_job()), "SLURM_NTASKS": "2"}
        slurm |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "PLACES": "0 0"} | environment
        command = ["bash", spooled, "dpo", "c.yaml"]
        return subprocess.run(command, env=node.environment | slurm, capture_output=True, text=True, timeout=120)

    node.submit = submit
    return node


def program(node, text):
    check = 'case " $* " in *" --check "*) echo "$*" >>"$CLOUD/checked"; '
    check += 'exit "${REFUSED:-$(take_line "$CLOUD/check" || echo 0)}" ;; esac\n'
    node.add("dpo-jax", check + text, folder=node.clone / ".venv" / "bin")


def free_job():
    """A job id whose port, which JAX derives from it, is free."""
    for job in range(os.getpid() % 4096, 2 * 4096):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 65535 - 2**12 + 1 + job % 2**12))
            except OSError:
                continue
            return job
    raise AssertionError("no port is free")


@pytest.mark.parametrize(
    ("slurm", "devices"),
    [
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "PLACES": "0 0"}, ["0,1,2,3", "0,1,2,3"]),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "PLACES": "0 1"}, ["0", "1"]),
    ],
    ids=["a process a node", "a process a GPU"],
)
def test_two_processes_find_each_other_through_slurm(job, slurm, devices):
    (job.clone / "join.py").write_text(JOIN)
    program(job, f'exec "{sys.executable}" join.py "$@"')
    done = job.submit(**slurm, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        assert (job.clone / f"seen-{number}").read_text() == f"2 [0, 1] {devices[number]}\n"
    assert "scontrol" not in (job.path / "calls").read_text()


@pytest.mark.parametrize(
    ("code", "state", "queued"), [(143, "RUNNING", True), (143, "COMPLETING", False), (65, "RUNNING", False)]
)
def test_what_saved_before_the_time_limit_is_queued_again(job, code, state, queued):
    program(job, f"exit {code}\n")
    (job.path / "state").write_text(f"{state}\n")
    done = job.submit(SLURM_JOB_ID="77")
    assert done.returncode == code
    assert ("scontrol requeue 77" in (job.path / "calls").read_text()) == queued


def test_a_job_is_checked_before_it_takes_all_nodes(job):
    program(job, "exit 0\n")
    done = job.submit(REFUSED="65")
    assert done.returncode == 65
    assert not (job.path / "calls").exists()  # no srun
    assert (job.path / "checked").read_text() == "dpo c.yaml --distributed auto --check --check-devices=8\n"


def test_a_queued_job_waits_for_the_lock_of_a_lost_node(job):
    program(job, 'echo "$DPO_JAX_JOIN_SECONDS" >>"$CLOUD/seconds"\n')
    (job.path / "check").write_text("73\n73\n0\n")
    done = job.submit()
    assert done.returncode == 0, done.stderr
    assert (job.path / "checked").read_text().count("--check ") == 3
    assert "checking again (try 2 of 10)" in done.stderr
    assert (job.path / "seconds").read_text() == "300\n300\n"


def test_a_gpu_node_is_checked_before_it_installs(job):
    job.add("nvidia-smi", SMI)
    program(job, "exit 0\n")
    done = job.run(GPU, "start", "dpo", "c.yaml", REFUSED="2")
    assert (done.returncode, status(job)) == (2, ["nothing"])
    assert "installing" not in done.stderr


def test_slurm_refuses_what_does_not_fit(job):
    program(job, "exit 0\n")
    done = job.submit(SLURM_NTASKS="4")
    assert done.returncode == 2
    assert "4 processes on 2 nodes of 4 GPUs: --ntasks-per-node must be 4 or 1" in done.stderr
    outside = job.run(BATCH, "dpo", "c.yaml")
    assert outside.returncode == 2
    assert "this is a batch script: sbatch" in outside.stderr
    assert not (job.path / "calls").exists()


def test_the_head_of_the_batch_script_lets_the_steps_save():
    head = (ROOT / BATCH).read_text().split("set -euo")[0]
    assert "#SBATCH --signal=TERM@300\n" in head
    assert "#SBATCH --requeue\n" in head
    assert head.startswith("#!/usr/bin/env bash\n#SBATCH ")  # SLURM stops reading at the first command
