"""launch/skypilot.yaml: what each machine runs, and what its exit codes mean."""

import re
import shlex
import shutil
import subprocess

import yaml
from test_pods import LAUNCH
from test_pods import cloud as cloud

from dpo_jax.runtime.rundir import RunDir


def test_skypilot_tells_each_machine_who_it_is(cloud):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [1, 74, 134, 137, 143]
    (mount,) = task["file_mounts"]
    assert task["file_mounts"][mount]["mode"] == "MOUNT"
    venv = cloud.clone / ".venv" / "bin"
    venv.mkdir(parents=True)
    cloud.add("dpo-jax", 'printf "%s\\0" "$@" "$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$JAX_PROCESS_ID"', folder=venv)
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-euc", task["run"]], env=cloud.environment | sky, cwd=cloud.clone, capture_output=True, text=True, check=True
    )
    words = done.stdout.split("\0")[:-1]
    assert words[:4] == ["dpo", "configs/hh_pythia28_dpo.yaml", "--run.dir", "runs/hh"]  # a bucket has no append and no locks
    given = dict(zip(words[2::2], words[3::2], strict=False))
    assert given["--run.checkpoints"] == f"gs://{task['file_mounts'][mount]['name']}/hh"
    assert given["--dpo.policy"].startswith(mount)  # only read
    assert "gcs" in re.search(r"DPO_JAX_EXTRAS=(\S+)", task["setup"])[1].split(",")
    assert words[-5:] == ["--distributed", "auto", "10.0.0.1:8476", "2", "1"]
    results = cloud.clone / "runs" / "hh" / "dpo"
    results.mkdir(parents=True)
    for name in ("env.json", "metrics.jsonl"):
        (results / name).write_text("{}")
    first = task["run"].replace(mount, str(cloud.share))
    sky["SKYPILOT_NODE_RANK"] = "0"
    cloud.add("dpo-jax", "exit 143", folder=venv)
    ended = subprocess.run(["bash", "-c", first], env=cloud.environment | sky, cwd=cloud.clone, capture_output=True)
    assert ended.returncode == 143  # so that it is started again
    assert (cloud.share / "hh" / "dpo" / "metrics.jsonl").is_file()  # what the first host has written is kept

    def code():
        return subprocess.run(
            ["bash", "-c", first], env=cloud.environment | sky, cwd=cloud.clone, capture_output=True
        ).returncode

    # Another host is gone: started again, but not for ever if no start gets to a new checkpoint.
    cloud.add("dpo-jax", "exit 134", folder=venv)
    assert [code() for _ in range(5)] == [134] * 4 + [70]
    cloud.add("dpo-jax", f"mkdir -p {cloud.share}/hh/dpo/500; exit 134", folder=venv)
    assert [code() for _ in range(4)] == [134] * 4
    # Starts that cannot be counted would have no end.
    counted = cloud.share / "hh" / "starts.0"
    counted.unlink()
    counted.mkdir()
    assert code() == 70
    counted.rmdir()
    counted.write_text("1")
    # Results that cannot be copied are not lost without a word: their machine is deleted after code 0.
    cloud.add("dpo-jax", "exit 0", folder=venv)
    assert code() == 0
    # On a new machine the curve goes on, in a folder that dpo-jax takes for its own.
    records = [results / name for name in ("wandb_run_id", "trackio_run_name", "resumes.jsonl", "writers/wandb.json")]
    for record in records:
        record.parent.mkdir(exist_ok=True)
        record.write_text("kept")
    assert code() == 0
    shutil.rmtree(cloud.clone / "runs")
    assert code() == 0
    assert all(record.read_text() == "kept" for record in records)  # no new page at wandb
    with RunDir(results) as run:
        assert run.metrics.read_text() == "{}"
    shutil.rmtree(results)
    shutil.rmtree(cloud.share / "hh" / "dpo")
    (cloud.share / "hh" / "starts.0").unlink()
    assert code() == 74
    assert shlex.split(task["setup"])[-1] == "./launch/env.sh"
