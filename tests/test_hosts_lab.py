"""PPO and the frontier on two processes of two CPU devices each: the numbers of one process on the same mesh, killed or not."""

import dataclasses
import json
import signal
import time

import jax
import numpy as np
import pytest
from test_hosts import LIMIT, begin, end, free_port
from tiny_run import TOY_WORLD, call

from dpo_jax.cli.commands import frontier
from dpo_jax.cli.config import ConfigError, RunConfig, load_config
from dpo_jax.cli.main import main
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.lab.reward_model import save_reward_model
from dpo_jax.models.hf import load_hf
from dpo_jax.reward_model import HEAD
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

CONFIG = """\
run: {{dir: {dir}, devices: mesh, save_every_steps: 100}}
mesh: {{fsdp: 2, tensor: 2}}
data: {{source: reviews, reviews_train: 64, reviews_test: 24, max_length: 96, max_prompt_length: 48}}
model: {{path: {policy}}}
dpo: {{policy: {policy}, batch: 16, lr: 1.0e-3, warmup_steps: 2}}
frontier:
  methods: "dpo,ppo,best-of-n"
  prompts: 12
  test_prompts: 8
  optimum_prompts: 4
  optimum_samples: 8
  max_new_tokens: 12
  sample_batch: 16
  evaluations: 2
  dpo_betas: "0.5"
  ppo_kls: "3"
  best_of: "1,4"
  ppo_iterations: {rollouts}
  ppo_batch: 8
  ppo_epochs: 1
  ppo_minibatches: 2
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
    """What the first process says of a run that both bring to its end; of the other one only the library for links is heard."""
    (first, said), (second, heard) = end(both(command, config, *flags))
    assert (first, second) == (0, 0), f"{said}\n{heard}"
    assert [line for line in heard.splitlines() if not line.startswith("[Gloo]")] == []
    return said


def assert_close(found, expected):
    """JSON values: the same, numbers to 1e-5."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if isinstance(other, float):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        else:
            assert one == other


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
    runs = [tmp_path / name / "ppo" for name in ("two", "one")]
    assert_close(*(json.loads((run / "result.json").read_text()) for run in runs))
    found, expected = (read_metrics(run / "metrics.jsonl") for run in runs)
    assert [row["step"] for row in found if not is_evaluation(row)] == list(range(6))
    timed = ("seconds", "per_second", "_s", "time")
    for row, other in zip(found, expected, strict=True):
        assert_close(*({k: v for k, v in each.items() if not k.endswith(timed)} for each in (row, other)))
    exports = [load_hf(run / "export")[1] for run in runs]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *exports)
    assert len({row["rollout/reward"] for row in expected if not is_evaluation(row)}) > 3
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), exports[0], start))) > 1e-3


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
    assert "of 3 runs are finished already" in said
    assert kept == {file: file.read_bytes() for file in kept}
    for name in ("results.jsonl", "pairs.jsonl"):
        lines = [(tmp_path / run / "frontier" / name).read_text().splitlines() for run in ("two", "one")]
        assert_close(*([json.loads(line) | {"seconds": 0} for line in side] for side in lines))
    assert_close(*(json.loads((tmp_path / run / "frontier" / "optimum.json").read_text()) for run in ("two", "one")))
    for name in ("frontier.png", "displacement.png", "reward_model/result.json", "runs/dpo-beta-0.5-seed0/policy/config.json"):
        assert (tmp_path / "two" / "frontier" / name).is_file()
    assert "2 of 3" in said or "3 of 3" in said


@pytest.mark.parametrize("methods", ["online", "dpo,online-uncertainty"])
def test_online_runs_of_a_frontier_are_refused_on_several_hosts(methods, tmp_path):
    _, config = written(tmp_path, tmp_path)
    refused = dataclasses.replace(load_config(config), run=RunConfig(dir=str(tmp_path), distributed="auto"))
    refused = dataclasses.replace(refused, frontier=dataclasses.replace(refused.frontier, methods=methods))
    with pytest.raises(ConfigError, match=f"frontier.methods: {methods.split(',')[-1]} runs on one host"):
        frontier.run(refused)
