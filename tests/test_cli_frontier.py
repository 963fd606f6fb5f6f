"""`dpo-jax frontier` from end to end in a toy world: every kind of run, the tables, and that nothing is done twice."""

import csv
import json

import pytest
from test_cli_runs import _compilation_cache, call  # noqa: F401  the first is a fixture

from dpo_jax.data.sources import load_preferences
from dpo_jax.lab.report import COLUMNS

CONFIG = """\
run: {{dir: {dir}}}
data: {{source: reviews, reviews_train: 64, reviews_test: 24, max_length: 96, max_prompt_length: 48}}
tokenizer: {{vocab_size: 450}}
model: {{family: gpt_neox, width: 32, layers: 1, heads: 2, max_positions: 128}}
sft: {{batch: 16, scored: all, lr: 1.0e-2, optimizer: adamw, warmup_steps: 2, epochs: 8}}
dpo: {{batch: 16, lr: 1.0e-3, warmup_steps: 2}}
frontier:
  methods: "unlikelihood,dpo,ppo,ppo-gt,best-of-n"
  unlikelihood_alphas: "0.5"
  prompts: 12
  test_prompts: 8
  optimum_prompts: 4
  optimum_samples: 16
  max_new_tokens: 12
  sample_batch: 16
  evaluations: 2
  dpo_betas: "0.5"
  ppo_kls: "3"
  best_of: "1,4,64"
  ppo_iterations: 2
  ppo_batch: 8
  ppo_epochs: 1
  ppo_minibatches: 2
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("frontier")
    (root / "toy.yaml").write_text(CONFIG.format(dir=root / "run"))
    code, out, err = call("frontier", root / "toy.yaml")
    assert code == 0, err
    return root, out


def test_every_run_is_measured_and_in_the_table(study):
    root, out = study
    folder = root / "run" / "frontier"
    with open(folder / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    points = {(row["method"], row["label"], row["seed"]): 0 for row in table}
    for row in table:
        points[row["method"], row["label"], row["seed"]] += 1
        assert float(row["kl_low"]) <= float(row["kl"]) <= float(row["kl_high"])
        assert -20 <= float(row["reward"]) <= 20
    runs = ("unlikelihood", "alpha 0.5"), ("dpo", "beta 0.5"), ("ppo", "KL 3"), ("ppo-gt", "KL 3")
    trained = {(method, label, "0") for method, label in runs}
    assert {key: points[key] for key in trained} == dict.fromkeys(trained, 2)
    assert {key for key in points if key not in trained} == {
        ("best-of-n", f"N {n}", "0") for n in (1, 4)
    }  # 16 samples hold no 64
    assert "at equal KL" in out
    for name in ("frontier.png", "displacement.png", "summary.json", "optimum.json"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "reward_model" / "result.json").read_text())["held_out"] > 0


def test_the_labelled_pairs_are_preferences_like_any_other(study):
    root, out = study
    pairs = load_preferences(root / "run" / "frontier" / "pairs.jsonl", "train")
    assert f"{len(pairs)} of 72 pairs labelled" in out  # 12 prompts, 6 pairs each


def test_what_is_finished_is_not_done_again(study):
    root, _ = study
    before = {path: path.stat().st_mtime_ns for path in (root / "run" / "frontier" / "runs").rglob("result.json")}
    table = (root / "run" / "frontier" / "results.jsonl").read_bytes()
    code, out, _ = call("frontier", root / "toy.yaml")
    assert code == 0
    assert "4 of 4 runs are finished already" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (root / "run" / "frontier" / "results.jsonl").read_bytes() == table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--frontier.methods", "dpo,magic"), "frontier.methods: must be some of preferred-ft, "),
        (("--frontier.dpo-betas", "0.1,x"), "frontier.dpo_betas: must be numbers above 0"),
        (("--frontier.unlikelihood-alphas", "2"), "frontier.unlikelihood_alphas: alpha is at most 1"),
        (("--frontier.completions", "1"), "frontier.completions: must be at least 2"),
        (("--frontier.reward", "hf"), "frontier.classifier: names the model of frontier.reward hf"),
        (("--frontier.best-of", "1.5"), "frontier.best_of: must be whole numbers"),
        (("--frontier.ppo-minibatches", "3"), "frontier.ppo_minibatches: must divide ppo_batch (8), got 3"),
        (("--frontier.max-new-tokens", "120"), "frontier.max_new_tokens: 120 more than the longest prompt"),
        (("--run.devices", "mesh"), "run.devices: frontier trains small models on one device or by pmap"),
    ],
)
def test_what_cannot_be_is_refused(study, flags, message):
    code, _, err = call("frontier", study[0] / "toy.yaml", *flags)
    assert code == 2
    assert message in err
