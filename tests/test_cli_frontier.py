"""`dpo-jax frontier` from end to end in a toy world: every kind of run, the tables, and that nothing is done twice. And its
pieces as commands of their own: one after the other they do what the sweep did."""

import csv
import dataclasses
import functools
import json
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from chat_templates import CHATML
from tiny_run import TOY_WORLD, _compilation_cache, call  # noqa: F401  the second is a fixture

from dpo_jax.cli import splits
from dpo_jax.cli.config import load_config
from dpo_jax.cli.experiment import make_world, prompts_of
from dpo_jax.cli.frontier_runs import runs_of, shared_settings, to_mix
from dpo_jax.cli.rewards import learned_reward
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.evals.frontier import optimum
from dpo_jax.evals.intervals import by_prompt, score_interval
from dpo_jax.evals.reward_functions import vader_lexicon
from dpo_jax.lab import report
from dpo_jax.lab.methods import PairMethod, pair_data
from dpo_jax.lab.optimum import BETAS, to_json
from dpo_jax.lab.report import COLUMNS
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.losses import dpo_loss
from dpo_jax.models.hf import load_hf
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

CONFIG = (
    TOY_WORLD
    + """\
frontier:
  methods: "unlikelihood,dpo,rdpo,ppo,ppo-gt,best-of-n,online"
  second_reward: vader
  unlikelihood_alphas: "0.5"
  prompts: 12
  test_prompts: 8
  optimum_prompts: 4
  optimum_samples: 16
  max_new_tokens: 12
  sample_batch: 16
  evaluations: 2
  dpo_betas: "0.5"
  online_betas: "0.5"
  ppo_kls: "3"
  best_of: "1,4,64"
  ppo_iterations: 2
  ppo_batch: 8
  ppo_epochs: 1
  ppo_minibatches: 2
  jobs: 2
online: {{rounds: 2, prompts: 6, completions: 3, pairs: soft, steps: 2}}
"""
)


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
    runs = ("unlikelihood", "alpha 0.5"), ("dpo", "beta 0.5"), ("rdpo", "beta 0.5"), ("ppo", "KL 3"), ("ppo-gt", "KL 3")
    runs = *runs, ("online", "beta 0.5")
    trained = {(method, label, "0") for method, label in runs}
    log = (folder / "runs" / "online-beta-0.5-seed0" / "labels.jsonl").read_text().splitlines()[1:]
    asked = [sum(json.loads(line)["round"] <= number for line in log) for number in range(2)]
    assert [float(row["labels"]) for row in table if row["method"] == "online"] == asked
    assert 0 < asked[0] < asked[1] <= 36  # 6 prompts x 3 completions a round; equal ones are asked once
    assert {key: points[key] for key in trained} == dict.fromkeys(trained, 2)
    best_of_n = {(f"best-of-n, {by} reward", f"N {n}", "0") for by in ("true", "learned") for n in (1, 4)}  # 16 hold no 64
    assert {key for key in points if key not in trained} == {("reference", "", "0"), *best_of_n}
    assert "at equal KL" in out
    for name in ("frontier.png", "second_reward.png", "displacement.png", "summary.json", "optimum.json"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "reward_model" / "result.json").read_text())["held_out"] > 0


def test_the_labeled_pairs_are_preferences_like_any_other(study):
    root, out = study
    pairs = load_preferences(root / "run" / "frontier" / "pairs.jsonl", "train")
    assert f"{len(pairs)} of 72 pairs labeled" in out  # 12 prompts, 6 pairs each


def test_what_is_finished_is_not_done_again_also_where_the_folder_was_moved(study, tmp_path):
    root, _ = study
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(root / "run", moved)
    (moved / "frontier" / "runs" / "dpo-beta-0.5-seed0" / "result.json").unlink()
    kept = [*moved.rglob("result.json"), *(moved / "frontier" / "optimum").iterdir(), moved / "frontier" / "pairs.jsonl"]
    before = {path: path.stat().st_mtime_ns for path in kept if path.parent.name != "reward_model"}
    assert len(before) == 6 + 2 + 1  # the reference's samples, and those of one policy
    learned = [path for path in moved.glob("frontier/reward_model/checkpoints/*") if path.name.isdigit()]
    before |= {path: path.stat().st_mtime_ns for path in learned}
    assert learned
    code, out, err = call("frontier", root / "toy.yaml", "--run.dir", moved)
    assert code == 0, err
    assert "6 of 7 runs are finished already" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    tables = [(run / "frontier" / "results.jsonl").read_text().splitlines() for run in (root / "run", moved)]
    first, again = ([json.loads(row) | {"seconds": 0} for row in rows] for rows in tables)
    assert again == first
    identities = [json.loads(path.read_text()) for path in (*moved.rglob("result.json"), moved / "frontier" / "pairs.json")]
    assert str(root) not in json.dumps([found.get("shared") for found in identities])


def test_the_name_of_a_classifier_folder_is_its_content(study, world_and_pairs, tmp_path):
    config = load_config(study[0] / "toy.yaml")

    def named(folder, content):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(content)
        section = dataclasses.replace(config.frontier, reward="hf", classifier=str(tmp_path / folder))
        return shared_settings(dataclasses.replace(config, frontier=section), "digest", world_and_pairs[0])

    first, moved, other = named("here", b"1"), named("there", b"1"), named("other", b"2")
    assert first == moved != other
    assert str(tmp_path) not in json.dumps(first)


def test_every_policy_is_judged_by_both_other_rewards(study):
    root, _ = study
    rows = [json.loads(line) for line in (root / "run" / "frontier" / "results.jsonl").read_text().splitlines()]
    for row in rows:
        names = ["second_reward"] if row["label"].startswith("N ") else ["second_reward", "learned_reward", "tokens"]
        for name in names:
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], (row["method"], name)
    (start,) = (row for row in rows if row["method"] == "reference")
    assert (start["kl"], start["step"]) == (0, 0)
    summary = json.loads((root / "run" / "frontier" / "summary.json").read_text())["second_reward"]
    assert summary["name"] == "vader"
    measured = ["unlikelihood", "dpo", "rdpo", "ppo", "ppo-gt", "online", "best-of-n, true reward", "best-of-n, learned reward"]
    assert [row["method"] for row in summary["gains"]][: len(measured)] == measured
    assert summary["words"] in study[1]
    code, _, err = call("report", root / "run", "--report.out", root / "page")
    assert code == 0, err
    page = (root / "page" / "report.md").read_text()
    for words in ("Lengths", "Learned reward", "Beside a second reward", summary["words"].split(".")[0]):
        assert words in page


def test_a_chat_model_learns_plain_snippets_and_its_policies_are_adapters(study, tmp_path):
    model, data, run = tmp_path / "model", tmp_path / "data", tmp_path / "run"
    shutil.copytree(study[0] / "run" / "sft" / "export", model)
    (model / "chat_template.jinja").write_text(CHATML)
    data.mkdir()
    rng = random.Random(0)
    for name, words in (("pos", "bright clever fine"), ("neg", "dull tired bad")):
        lines = [" ".join(rng.choices(f"the film plot is was {words}".split(), k=9)) + f" {i} ." for i in range(60)]
        (data / f"rt-polarity.{name}").write_text("\n".join(lines))
    flags = {
        **{"run.dir": run, "model.path": model, "data.source": "snippets", "data.path": data, "sft.epochs": 1, "lora.rank": 2},
        **{"frontier.reward": "linear", "frontier.methods": "dpo", "frontier.seeds": 2, "frontier.evaluations": 1},
        **{"frontier.optimum-samples": 8, "frontier.optimum-prompts": 2, "frontier.test-prompts": 4, "frontier.jobs": 1},
    }
    code, _, err = call("frontier", study[0] / "toy.yaml", *(x for name, value in flags.items() for x in (f"--{name}", value)))
    assert code == 0, err
    assert not (run / "sft" / "export" / "adapter_config.json").exists()
    assert (run / "sft" / "export" / "chat_template.jinja").read_text() == CHATML
    for seed in (0, 1):
        policy = run / "frontier" / "runs" / f"dpo-beta-0.5-seed{seed}" / "policy"
        assert json.loads((policy / "adapter_config.json").read_text())["r"] == 2
        assert not (policy / "model.safetensors").exists()
    # A policy of the sweep on other preferences: here the reviews.
    code, _, err = call("eval", study[0] / "toy.yaml", "--run.dir", run, "--eval.policy", policy, "--eval.max-new-tokens", 4)
    assert code == 0, err
    evaluated = json.loads((run / "eval" / "report.json").read_text())
    assert (evaluated["pairs"], evaluated["of_run"]) == (24, False)
    assert {row["seeds"] for row in json.loads((run / "frontier" / "summary.json").read_text())["at_equal_kl"]} <= {0, 1, 2}
    config = splits.with_data(load_config(study[0] / "toy.yaml"), source="snippets", path=str(data))
    tokenizer = load_tokenizer(model)
    texts = splits.load_texts(config, "train")
    learned = [ids.tolist() for _, ids in splits.encode_texts(config, texts, tokenizer)]
    assert learned == [[*tokenizer(text.text)["input_ids"], tokenizer.eos_token_id] for text in texts]


@pytest.mark.soak
def test_a_sweep_that_is_killed_ends_in_the_table_of_an_uninterrupted_one(study, tmp_path):
    root, _ = study
    run = tmp_path / "run"
    shutil.copytree(root / "run", run, ignore=shutil.ignore_patterns("frontier", "compiled"))
    line = [sys.executable, "-m", "dpo_jax.cli.main", "frontier", str(root / "toy.yaml"), "--run.dir", str(run)]
    for _ in range(3):
        before = set(run.rglob("result.json"))
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while set(run.rglob("result.json")) == before and process.poll() is None:
            time.sleep(0.02)
        process.kill()  # as soon as one result more is there
        process.wait()
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 7 runs are finished already" in done.stdout
    results = [(folder / "frontier" / "results.jsonl").read_text().splitlines() for folder in (root / "run", run)]
    whole, pieced = ([json.loads(row) | {"seconds": 0} for row in rows] for rows in results)
    assert pieced == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dpo.param-dtype", "bfloat16"), "--dpo.param-dtype: frontier does not read this option"),
        (("--frontier.methods", "dpo,magic"), "frontier.methods: must be some of preferred-ft, "),
        (("--frontier.dpo-betas", "0.1,x"), "frontier.dpo_betas: must be different numbers above 0"),
        (("--frontier.methods", "dpo,ipo,dpo"), "online-disagreement, online-uncertainty, each once, got dpo"),
        (("--frontier.ppo-kls", "3,3.0000001"), "frontier.ppo_kls: must be different numbers above 0"),
        (("--frontier.unlikelihood-alphas", "2"), "frontier.unlikelihood_alphas: alpha is at most 1"),
        (("--frontier.completions", "1"), "frontier.completions: must be at least 2"),
        (("--frontier.reward", "hf"), "frontier.classifier: is the model of frontier.reward hf: set both, or neither"),
        (("--frontier.best-of", "1.5"), "frontier.best_of: must be whole numbers"),
        (("--frontier.ppo-minibatches", "3"), "frontier.ppo_minibatches: must divide ppo_batch (8), got 3"),
        (("--frontier.max-new-tokens", "120"), "frontier.max_new_tokens: 120 and the longest prompt"),
        (
            ("--dpo.microbatches", "8"),
            "frontier.ppo_batch: 8 completions in 2 minibatches cannot be split over",
        ),
    ],
)
def test_what_cannot_be_is_refused(study, flags, message):
    written = study[0] / "run" / "frontier" / "config.yaml"
    before = written.read_bytes()
    code, _, err = call("frontier", study[0] / "toy.yaml", *flags)
    assert code == 2
    assert message in err
    assert written.read_bytes() == before  # it belongs to the results beside it


def test_a_file_that_asks_for_bfloat16_parameters_is_refused(tmp_path):
    lines = f"run: {{dir: {tmp_path}}}", "data: {source: reviews}", "model: {path: none}", "dpo: {param_dtype: bfloat16}"
    (tmp_path / "toy.yaml").write_text("\n".join(lines))
    code, _, err = call("frontier", tmp_path / "toy.yaml")
    assert (code, "dpo.param_dtype: frontier keeps parameters in float32; leave it out" in err) == (2, True), err


def test_methods_train_adapters_beside_the_reference(study, tmp_path):
    reference = study[0] / "run" / "sft" / "export"
    flags = (
        "--run.dir",
        tmp_path,
        "--dpo.policy",
        reference,
        "--frontier.methods",
        "dpo,ppo",
        "--frontier.reward-model-epochs",
        2,
    )
    code, _, err = call("frontier", study[0] / "toy.yaml", *flags, "--lora.rank", 2, "--lora.targets", "mlp")
    assert code == 0, err
    results = [json.loads(path.read_text()) for path in (tmp_path / "frontier" / "runs").glob("*/result.json")]
    assert {result["shared"]["lora"]["rank"] for result in results} == {2}
    assert len(results) == 3
    assert all(
        point["kl"] > 0 or result["run"]["method"] == "reference"
        for result in results
        for point in result["measured"]["points"]
    )
    policy = next((tmp_path / "frontier" / "runs").glob("dpo-*/policy"))
    before, after = (load_hf(folder)[1]["params"] for folder in (reference, policy))
    changed = {
        "/".join(key.key for key in path): np.linalg.matrix_rank(np.asarray(change)[0], tol=1e-6)
        for path, change in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.subtract, after, before))
        if np.any(change)
    }
    assert len(changed) == 2
    assert set(changed.values()) == {2}


@pytest.fixture(scope="module")
def world_and_pairs(study):
    config = load_config(study[0] / "toy.yaml")
    world, _ = make_world(config, train=None, test="test_prompts")
    preferences = load_preferences(study[0] / "run" / "frontier" / "pairs.jsonl", "train")
    return world, splits.encode_split(config, preferences, world.tokenizer)


def test_other_options_of_ppo_are_no_reason_to_repeat_the_rest(study, world_and_pairs):
    config = load_config(study[0] / "toy.yaml")
    other = dataclasses.replace(config, frontier=dataclasses.replace(config.frontier, ppo_lr=1e-3, ppo_epochs=2))
    pairs = zip(*(runs_of(one.frontier, seed=0) for one in (config, other)), strict=True)
    assert [run.method for run, its in pairs if run != its] == ["ppo", "ppo-gt"]
    settings = [shared_settings(one, "digest", world_and_pairs[0]) for one in (config, other)]
    assert settings[0] == settings[1]


def test_all_settings_of_a_method_are_one_program(world_and_pairs, tmp_path):
    world, pairs = world_and_pairs
    traced = []

    def loss(logps, ref_logps, *, beta):
        traced.append(beta)
        return dpo_loss(logps, ref_logps, beta=beta)

    def trained(method, name, **settings):
        (tmp_path / name).mkdir()
        return method.train(tmp_path / name, settings=settings, evaluations=1, seed=0)

    def method(loss, microbatches):
        data = pair_data(world, pairs, batch=16, microbatches=microbatches)
        return PairMethod(world, data, loss=loss, tx=optax.sgd(1e-2), epochs=1)

    of_all = method(loss, 1)
    points, of_half = trained(of_all, "half", beta=0.5)
    programs = len(traced)
    _, of_two = trained(of_all, "two", beta=2.0)
    assert len(traced) == programs > 0
    assert len(points) == 1
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), of_two, of_half))) > 1e-3
    # A constant of the program in place of the setting gives the same, and so do microbatches.
    _, bound = trained(method(functools.partial(dpo_loss, beta=2.0), 4), "bound")
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), of_two, bound)


# The pieces.

HEALTH = {"ratio", "clip_share", "value_clip_share", "entropy", "explained_variance", "approx_kl", "kl_coef", "rollout/kl"}


@pytest.fixture(scope="module")
def pieces(study):
    """The run directory of the study after label, reward-model, ppo and optimum, and what each printed."""
    root, printed = study[0], {}
    labels = root / "run" / "label"
    learned = ("--data.source", "files", "--data.path", labels)
    against = ("--ppo.reward-model", root / "run" / "reward-model" / "export")
    on_mesh = ("--run.devices", "mesh")  # and the sweep on one device: the numbers are the same
    ppo = ("ppo", *against, *on_mesh, "--run.save-every-steps", 1)
    for command, *flags in (("label",), ("reward-model", *learned, *on_mesh), ppo, ("optimum",)):
        code, printed[command], err = call(command, root / "toy.yaml", *flags)
        assert code == 0, (command, err)
    return root / "run", printed


def test_label_writes_what_the_sweep_learns_from_and_counts_every_pair(pieces):
    run, printed = pieces
    assert (run / "label" / "train.jsonl").read_bytes() == (run / "frontier" / "pairs.jsonl").read_bytes()
    counts = json.loads((run / "label" / "data_report.json").read_text())
    for split, pairs in (("train", 12 * 6), ("test", 8 * 6)):
        assert counts[split]["read"] == pairs == counts[split]["kept"] + sum(counts[split]["dropped"].values())
        assert len(load_preferences(run / "label", split)) == counts[split]["kept"]
    assert f"--data.path {run / 'label'}" in printed["label"]


def test_a_reward_model_says_the_same_when_it_is_read_again(pieces):
    run, printed = pieces
    folder = str(run / "reward-model" / "export")
    how = {"name": "ppo.reward_model", "batch": 16, "policy": str(run / "sft" / "export")}
    reward = learned_reward(load_config(run.parent / "toy.yaml"), folder, **how)

    def of(split):
        pairs = load_preferences(run / "label", split)
        prompts = [pair.prompt for pair in pairs]
        return np.stack([reward(prompts, [getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")], axis=1)

    assert of("train").mean() == pytest.approx(0, abs=1e-6)
    margins = -np.diff(of("test"))
    found = json.loads((run / "reward-model" / "result.json").read_text())["test"]
    assert found["loss"] == pytest.approx(np.logaddexp(0, -margins).mean(), abs=1e-6)
    assert found["accuracy"] == (margins > 0).mean()
    prompts = [pair.prompt for pair in load_preferences(run / "label", "test")]
    expected = score_interval(*by_prompt((margins > 0).ravel(), prompts))
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(expected, abs=1e-9)
    assert found["pairs"] == len(margins)
    assert f"accuracy {found['accuracy']:.1%}" in printed["reward-model"]


def test_ppo_against_that_reward_is_the_ppo_of_the_sweep(pieces):
    run, printed = pieces
    found = json.loads((run / "ppo" / "result.json").read_text())["points"]
    swept = json.loads((run / "frontier" / "runs" / "ppo-KL-3-seed0" / "result.json").read_text())["measured"]["points"]
    assert [point["step"] for point in found] == [0, 2, 4]
    for point, its in zip(found[1:], swept, strict=True):
        assert point == pytest.approx(its, abs=1e-4)
    rows = [row for row in read_metrics(run / "ppo" / "metrics.jsonl") if not is_evaluation(row)]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row.keys() >= HEALTH and None not in row.values() for row in rows)
    for name in ("reward", "ratio", "clipped", "entropy", "explained_variance"):
        assert (run / "ppo" / "plots" / f"{name}.png").stat().st_size > 0
    weights = [load_hf(run / task / "export")[1]["params"] for task in ("sft", "ppo")]
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, weights), strict=True))
    sampled = call("sample", run.parent / "toy.yaml", "--sample.policy", run / "ppo" / "export", "--sample.max-new-tokens", 4)
    assert len([json.loads(line)["completion"] for line in sampled.out.splitlines()]) == 8


def test_ppo_continues_from_its_last_checkpoint_and_refuses_other_settings(pieces):
    run, _ = pieces
    folder, against = run / "ppo", ("--ppo.reward-model", run / "reward-model" / "export", "--run.devices", "mesh")

    def left():
        weights = (folder / "export" / "model.safetensors").read_bytes()
        return weights, (folder / "result.json").read_bytes(), read_metrics(folder / "metrics.jsonl")

    before = left()
    shutil.rmtree(folder / "checkpoints" / "2")  # as a run leaves it that was killed after its first rollout
    code, out, err = call("ppo", run.parent / "toy.yaml", *against)
    assert (code, f"continuing {folder} after 1 steps" in out) == (0, True), err
    assert left() == before
    config = (folder / "config.yaml").read_bytes()
    code, _, err = call("ppo", run.parent / "toy.yaml", "--ppo.target-kl", 4)
    assert code == 2
    for line in ("ppo.target_kl: was 3.0, is 4.0", "ppo.reward_model: was '", "choose another --run.dir"):
        assert line in err
    assert (folder / "config.yaml").read_bytes() == config


def test_the_optimum_is_that_of_the_samples(pieces):
    run, printed = pieces
    world, _ = make_world(load_config(run.parent / "toy.yaml"), train=None, test="optimum_prompts")
    repeated = world.test.repeated(16)
    scored = world.sample(world.reference, repeated, jax.random.fold_in(jax.random.key(0), 0))
    rewards = scored.rewards.reshape(len(world.test.ids), 16)
    beside = vader_lexicon()(repeated.texts, scored.completions.texts).reshape(rewards.shape)
    found = json.loads((run / "optimum" / "optimum.json").read_text())
    best_of_n = found.pop("best_of_n")
    for name, values in to_json(optimum(rewards, BETAS, seed=0, beside=beside)).items():
        assert found.pop(name) == pytest.approx(values, abs=1e-9)
    assert not found
    assert best_of_n == [{"n": n, **report.best_of(rewards, n, seed=0, beside=beside)} for n in (1, 4)]
    assert f"reward of {rewards.mean():.2f}" in printed["optimum"]
    assert (run / "optimum" / "optimum.png").stat().st_size > 0


def test_a_prompt_that_is_cut_is_the_text_that_is_left(pieces, capsys):
    run, _ = pieces
    config, tokenizer = load_config(run.parent / "toy.yaml"), load_tokenizer(run / "sft" / "export")
    whole, cut = (prompts_of(splits.with_data(config, max_prompt_length=n), "test_prompts", tokenizer) for n in (48, 6))
    assert capsys.readouterr().out == "8 of 8 prompts are cut to their last 6 tokens (data.max_prompt_length)\n"
    assert [ids[-6:].tolist() for ids in whole.ids] == [ids.tolist() for ids in cut.ids]
    assert all(text.endswith(left) and len(left) < len(text) for text, left in zip(whole.texts, cut.texts, strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("ppo", "--ppo.target-kl", "0"), "ppo.target_kl: must be greater than 0"),
        (
            ("ppo", "--ppo.reward-model", "{run}/sft/export"),
            "sft/export: is not a reward model (...ForSequenceClassification",
        ),
        (("ppo", "--ppo.reward-model", "nowhere"), "ppo.reward_model: no model folder nowhere"),
        (("label", "--data.source", "files", "--data.path", "{run}/label"), "/label is where label writes; choose another"),
        (
            ("label", "--frontier.ppo-lr", "1"),
            "--frontier.ppo-lr: label does not read this option (ppo, frontier, robust would)",
        ),
        (("reward-model", "--data.source", "imdb", "--data.path", "x"), "texts, not preferences; sft, ppo, optimum and fron"),
        (("optimum", "--dpo.policy", "{run}/no/sft/export"), "dpo.policy: no model folder"),
    ],
)
def test_a_piece_refuses_what_cannot_be(pieces, flags, message):
    run, _ = pieces
    command, *rest = (flag.format(run=run) for flag in flags)
    code, _, err = call(command, run.parent / "toy.yaml", *rest)
    assert code == 2
    assert message in err


def test_the_policies_mixed_into_the_optimum_are_those_nearest_to_its_reach():
    def ended(method, kl):
        return Result(Run(method, f"KL {kl:g}", {}, 0), [{"kl": 100.0}, {"kl": kl}], 0.0)

    results = [ended("dpo", kl) for kl in (0.5, 1.4, 5.0, 40.0)] + [
        ended("ppo-gt", 3.2),
        ended("ppo", 6.0),
        ended("ppo-gt", 8.0),
    ]
    assert [kept.run.name for kept in to_mix(results)] == [
        "dpo-KL-1.4-seed0",
        "dpo-KL-5-seed0",
        "ppo-gt-KL-3.2-seed0",
        "ppo-gt-KL-8-seed0",
    ]
    assert to_mix([ended("ppo", 6.0)]) == []
    # An online run keeps policies on its way.
    points = [{"kl": 1.6, "kept": 1.5}, {"kl": 2.0}, {"kl": 3.1, "kept": 3.0}, {"kl": 4.0}]
    kept = to_mix([Result(Run("online", "", {}, 0), points, 0.0)])
    assert [one.folder for one in kept] == ["policy", "policy-1.5", "policy-3"]
