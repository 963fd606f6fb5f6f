"""launch/tpu_pod.sh and the other scripts for many hosts: hosts, locks and connections that are lost on the way."""

import pytest
from test_pods import SLICE
from test_pods import cloud as cloud
from test_pods import pod as pod


@pytest.mark.parametrize(("codes", "checks"), [([73, 73, 73, 0], 4), ([73], 10), ([73, 65], 2)])
def test_the_lock_of_a_lost_host_is_waited_for(pod, codes, checks):
    """NFS keeps it until the server notices the loss."""
    (pod.path / "check").write_text("".join(f"{code}\n" for code in codes))
    done = pod.run(*pod.command)
    assert done.returncode == codes[-1], done.stderr
    assert [pod.verbs().count(verb) for verb in ("create", "ssh check")] == [1, checks]
    assert "the run directory is locked, perhaps still by a host that is lost: checking again (try 1 of 10)" in done.stderr


@pytest.mark.parametrize(("times", "code"), [(2, 1), (9, 134), (9, 1)])
def test_a_run_that_lost_a_host_starts_again_on_the_same_slice(pod, times, code):
    """An error of the program looks the same: it is not repeated for ever."""
    lost = f'[ "$(grep -c . "$CLOUD/steps")" -gt {times} ] || {{ echo gone >>"$CLOUD/steps"; exit {code}; }}\n'
    pod.program(f"case $HOME in */0) {lost};; esac\n")
    done = pod.run(*pod.command)
    assert done.returncode == (0 if times == 2 else code), done.stderr
    restarts = min(times + 1, 5)
    assert [pod.verbs().count(verb) for verb in ("create", "scp", "ssh start")] == [1, 1 + restarts, 1 + restarts]
    assert f"hh is still there: starting again ({restarts} of 5)" in done.stderr


def test_a_worker_that_is_not_ready_yet_is_set_up_once_more(pod):
    uv = (pod.bin / "uv").read_text()
    pod.add("uv", 'echo once >>"$CLOUD/tries"; [ "$(grep -c . "$CLOUD/tries")" -gt 3 ] || exit 1\n' + uv)  # two workers
    done = pod.run(*pod.command)
    assert done.returncode == 0, done.stderr
    assert "could not set up hh (try 1 of 3)" in done.stderr
    assert [pod.verbs().count(verb) for verb in ("create", "scp", "ssh start")] == [1, 3, 1]


@pytest.mark.parametrize("script", ["tpu_pod", "gcluster"])
def test_settings_that_are_no_secrets_reach_the_hosts(pod, script):
    """A folder only if the hosts have it."""
    chosen = {"JAX_COMPILATION_CACHE_DIR": "/mnt/dpo_jax/a b", "WANDB_ENTITY": "us", "HF_HOME": "/home/me/hf", "HF_TOKEN": "no"}
    words = {"tpu_pod": ["run", "hh", *SLICE], "gcluster": ["submit", "hh"]}[script]
    command = ["--", "hh_pipeline.sh", "--run.dir=/mnt/dpo_jax/hh"]
    chosen |= {"DPO_JAX_MOUNT": "/mnt/dpo_jax", "DPO_JAX_SFT_CONFIG": "configs/hh.yaml"}
    done = pod.run(f"launch/{script}.sh", "--dry-run", *words, *command, **chosen)
    assert done.returncode == 0, done.stderr
    given = "env DPO_JAX_SFT_CONFIG=configs/hh.yaml env 'JAX_COMPILATION_CACHE_DIR=/mnt/dpo_jax/a b' WANDB_ENTITY=us ./"
    assert given in done.stdout.replace("'\\''", "'")
    assert "HF_" not in done.stdout
    assert "HF_HOME=/home/me/hf is not set on the hosts: it is not on /mnt/dpo_jax" in done.stderr


def test_settings_are_there_when_the_program_runs(pod):
    pod.program('echo "$LIBTPU_INIT_ARGS" >"$HOME/seen"\n')
    done = pod.run(*pod.command, LIBTPU_INIT_ARGS="--a=1 --b")
    assert done.returncode == 0, done.stderr
    assert (pod.worker(1) / "seen").read_text() == "--a=1 --b\n"
