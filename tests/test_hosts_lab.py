"""The laboratory, PPO and online DPO on two processes of two CPU devices each: the numbers of one process on the same mesh,
killed or not."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_judge import Say, fake_judge
from safetensors.numpy import load_file
from test_hosts import LIMIT, begin, end, free_port
from test_judge import KEY, A
from test_models import logits_of, text_rows
from tiny_run import TOY_WORLD, call

from dpo_jax.cli.main import main
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.lab.reward_model import save_reward_model
from dpo_jax.models.hf import load_config, load_hf
from dpo_jax.models.scorer import read_head
from dpo_jax.online.labels import LabelLog
from dpo_jax.online.stage import Stage
from dpo_jax.reward_model import HEAD
from dpo_jax.runtime import hosts
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

# Gloo's threads write one line each, in these pieces, and the pieces of two lines can mix: a number may stand alone.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+")

CONFIG = """\
run: {{dir: {dir}, devices: mesh, save_every_steps: 100}}
mesh: {{fsdp: 2, tensor: 2}}
data: {{source: reviews, reviews_train: 64, reviews_test: 24, max_length: 96, max_prompt_length: 48}}
model: {{path: {policy}}}
dpo: {{policy: {policy}, batch: 16, lr: 1.0e-3, warmup_steps: 2}}
frontier:
  methods: "dpo,ppo,online,best-of-n"
  prompts: 12
  test_prompts: 8
  optimum_prompts: 4
  optimum_samples: 8
  max_new_tokens: 12
  sample_batch: 16
  evaluations: 2
  dpo_betas: "0.5"
  online_betas: "0.5"
  ppo_kls: "3"
  best_of: "1,4"
  ppo_iterations: {rollouts}
  ppo_batch: 8
  ppo_epochs: 1
  ppo_minibatches: 2
online: {{rounds: 3, prompts: 4, completions: 3, candidates: 2, steps: 2}}
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder of a tiny policy that writes texts of some reward."""
    root = tmp_path_factory.mktemp("sft")
    (root / "toy.yaml").write_text(TOY_WORLD.format(dir=root / "run"))
    assert call("sft", root / "toy.yaml").code == 0
    return root / "run" / "sft" / "export"


def written(folder, policy, rollouts=2):
    """The same configuration for one process and for two."""
    files = []
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(CONFIG.format(dir=folder / name, policy=policy, rollouts=rollouts))
        files.append(folder / f"{name}.yaml")
    return files


def both(command, config, *flags):
    port = free_port()
    arguments = ["-m", "dpo_jax.cli.main", command, config, *flags, "--distributed", "auto", "--run.heartbeat-seconds", "20"]
    return [begin(arguments, process=number, port=port) for number in range(2)]


def until(happened, processes):
    deadline = time.monotonic() + LIMIT
    while not happened() and time.monotonic() < deadline and all(process.poll() is None for process in processes):
        time.sleep(0.1)


def finished(command, config, *flags):
    """What the first process says of a run that both end; the other one is heard only before it knows its number."""
    (first, said), (second, heard) = end(both(command, config, *flags))
    assert (first, second) == (0, 0), f"{said}\n{heard}"
    ours = [GLOO.sub("", line) for line in heard.splitlines() if "waiting for the other hosts" not in line]
    assert [line for line in ours if line.strip()] == []
    return said


def assert_close(found, expected):
    """JSON values: the same, numbers to 1e-5."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if isinstance(other, float):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        else:
            assert one == other


def assert_same_run(found, expected, *, steps):
    """Two folders of a run: results, metrics and logits to 1e-5, each step once. Returns rows of metrics, and weights."""
    runs, timed = (found, expected), ("seconds", "per_second", "_s", "time")
    assert_close(*(json.loads((run / "result.json").read_text()) for run in runs))
    rows, others = (read_metrics(run / "metrics.jsonl") for run in runs)
    assert [row["step"] for row in rows if not is_evaluation(row)] == list(range(steps))
    for row, other in zip(rows, others, strict=True):
        assert_close(*({k: v for k, v in each.items() if not k.endswith(timed)} for each in (row, other)))
    if found.name == "reward-model":  # no language model
        tensors = [load_file(run / "export" / "model.safetensors") for run in runs]
        assert_close(*({name: array.tolist() for name, array in one.items() if "bias" not in name} for one in tensors))
        return rows, tensors[0]
    assert_same_model(*(run / "export" for run in runs))
    return rows, load_hf(found / "export")[1]


def assert_same_model(found, expected):
    """By logits: no probability depends on a bias of keys, so its gradient is rounding errors, of which RMSprop makes steps."""
    rows = text_rows(np.arange(40, dtype=np.int32).reshape(2, 20) * 11 % 450)
    logits = [logits_of(*load_hf(folder), rows) for folder in (found, expected)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_ppo_on_two_processes_is_that_of_one_also_when_one_of_them_was_stopped(policy, tmp_path):
    one, two = written(tmp_path, policy, rollouts=6)
    model, start = load_hf(policy)
    head = {"kernel": np.random.default_rng(0).normal(size=model.config.width), "bias": np.zeros(())}
    learned = ("--ppo.reward-model", str(save_reward_model(tmp_path / "reward", model, {**start, HEAD: head})))
    save_tokenizer(load_tokenizer(policy), tmp_path / "reward")
    assert main(["ppo", str(one), *learned]) == 0
    processes, metrics = both("ppo", two, *learned), tmp_path / "two" / "ppo" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 1, processes)
    processes[1].send_signal(signal.SIGTERM)
    (first, said), (second, heard) = end(processes)
    assert (first, second) == (143, 143), f"{said}\n{heard}"
    said = finished("ppo", two, *learned)
    assert f"continuing {tmp_path / 'two' / 'ppo'} after" in said
    rows, export = assert_same_run(*(tmp_path / name / "ppo" for name in ("two", "one")), steps=6)
    assert len({row["rollout/reward"] for row in rows if not is_evaluation(row)}) > 3
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), export, start))) > 1e-3


def test_a_frontier_on_two_processes_is_that_of_one_also_when_they_were_killed(policy, tmp_path):
    one, two = written(tmp_path, policy)
    assert main(["frontier", str(one)]) == 0
    processes, runs = both("frontier", two), tmp_path / "two" / "frontier" / "runs"
    until(lambda: len(list(runs.glob("*/result.json"))) >= 2, processes)
    for process in processes:
        process.kill()
    ended = end(processes)
    assert -signal.SIGKILL in [code for code, _ in ended], ended
    kept = {file: file.read_bytes() for file in runs.glob("*/result.json")}
    assert len(kept) >= 2
    said = finished("frontier", two)
    assert "of 4 runs are finished already" in said
    assert kept == {file: file.read_bytes() for file in kept}
    for name in ("results.jsonl", "pairs.jsonl"):
        lines = [(tmp_path / run / "frontier" / name).read_text().splitlines() for run in ("two", "one")]
        assert_close(*([json.loads(line) | {"seconds": 0} for line in side] for side in lines))
    assert_close(*(json.loads((tmp_path / run / "frontier" / "optimum.json").read_text()) for run in ("two", "one")))
    for name in ("frontier.png", "displacement.png", "reward_model/result.json", "runs/dpo-beta-0.5-seed0/policy/config.json"):
        assert (tmp_path / "two" / "frontier" / name).is_file()


def test_online_on_two_processes_is_that_of_one_also_when_one_of_them_was_killed(policy, tmp_path):
    one, two = written(tmp_path, policy)
    flags = ("--online.elicitation", "uncertainty", "--online.refresh-reference-rounds", "2", "--online.rounds", "4")
    assert main(["online", str(one), *flags]) == 0
    processes, folder = both("online", two, *flags), tmp_path / "two" / "online"
    until((folder / "round-001" / "samples.jsonl").is_file, processes)
    processes[1].kill()
    (first, said), (second, heard) = end(processes)
    assert second == -signal.SIGKILL, f"{said}\n{heard}"
    assert first != 0, said
    assert not (folder / "result.json").exists()
    said = finished("online", two, *flags)
    assert f"continuing {folder} after" in said
    once = tmp_path / "one" / "online"
    assert_same_run(folder, once, steps=8)
    assert (folder / "labels.jsonl").read_bytes() == (once / "labels.jsonl").read_bytes()  # none was asked twice
    assert_close(*(lines_of(run / "rounds.jsonl") for run in (folder, once)))
    for name in ("samples.jsonl", "prompts.jsonl", "scores.jsonl", "pairs.jsonl"):
        assert_close(*(lines_of(run / "round-003" / name) for run in (folder, once)))
    assert_same_model(*(run / "references" / "round-002" for run in (folder, once)))


def test_labels_a_learned_reward_and_the_optimum_on_two_processes_are_those_of_one(policy, tmp_path, monkeypatch):
    """One pair of processes makes all calls."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    one, two = written(tmp_path, policy)

    def lab(config, run):
        learned = ("--data.source", "files", "--data.path", str(tmp_path / run / "label"))
        calls = (("label", config), ("reward-model", config, *learned), ("optimum", config))
        return [[name, str(file), *rest] for name, file, *rest in calls]

    assert [main(arguments) for arguments in lab(one, "one")] == [0, 0, 0]
    with fake_judge(lambda asked, number: Say(A)) as judge:
        flags = ("--online.reward", "judge", "--online.completions", "2", "--online.rounds", "1", "--judge.model", "m")
        judged = ["online", str(two), *flags, "--judge.prompt", "summary-simple", "--judge.base-url", judge.url]
        calls = [*lab(two, "two"), [*judged, "--judge.max-requests", "5"]]
        (tmp_path / "calls.json").write_text(json.dumps(calls))
        port = free_port()
        ended = end([begin([__file__, tmp_path / "calls.json"], process=number, port=port) for number in range(2)])
        assert [code for code, _ in ended] == [0, 0], ended
        codes = [json.loads((tmp_path / f"codes-{number}.json").read_text()) for number in range(2)]
        assert codes == [[0, 0, 0, 75]] * 2, ended
        assert sum(judge.asked.values()) == 5  # the other host asked nobody, and ended like the first one
    for split in ("train", "test"):
        assert_close(*(lines_of(tmp_path / run / "label" / f"{split}.jsonl") for run in ("two", "one")))
    assert_same_run(*(tmp_path / run / "reward-model" for run in ("two", "one")), steps=2)
    exports = [tmp_path / run / "reward-model" / "export" for run in ("two", "one")]
    heads = [read_head(folder, load_config(folder), width=32) for folder in exports]
    np.testing.assert_allclose(heads[0]["kernel"], heads[1]["kernel"], rtol=1e-5, atol=1e-5)
    assert abs(heads[0]["kernel"]).max() > 1e-3
    assert_close(*(json.loads((tmp_path / run / "optimum" / "optimum.json").read_text()) for run in ("two", "one")))
    assert (tmp_path / "two" / "optimum" / "optimum.png").is_file()


def test_only_the_first_host_writes_labels_and_rounds(tmp_path, monkeypatch):
    for module in ("labels", "stage", "references"):
        monkeypatch.setattr(f"dpo_jax.online.{module}.is_first", lambda: False)
    log = LabelLog(tmp_path / "labels.jsonl", {})
    log.add(0, {("prompt", "text"): 1.0})
    assert (log["prompt", "text"], log.count(0)) == (1.0, 1)
    stage = Stage(tmp_path / "round-000", settings={}, weights={"policy": "a"})
    stage.put("scores.jsonl", [{"number": 0, "score": 1.0}])
    stage.finish({"labels": 1})
    assert stage.record == {"labels": 1}
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    calls, _, address, _, count, _, number = sys.argv[1:]
    hosts.start(address, int(count), int(number), heartbeat_seconds=20)
    codes = [main(arguments) for arguments in json.loads(Path(calls).read_text())]
    Path(calls).with_name(f"codes-{number}.json").write_text(json.dumps(codes))
