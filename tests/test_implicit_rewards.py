"""`dpo-jax eval --rewards` on the golden models: subsets of rows and folders, RewardBench's layout, every pair written."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN
from tiny_run import _compilation_cache, call  # noqa: F401  the first is a fixture

from dpo_jax.cli.commands.report import weights_digest_of
from dpo_jax.cli.config import DpoConfig
from dpo_jax.cli.implicit_rewards import NO_LOGIT, beta_of, fits_logit, subset_names
from dpo_jax.data.encode import encode
from dpo_jax.data.format_table import detect_format
from dpo_jax.data.layout import plain_rows
from dpo_jax.data.pairs import Cause, DataError, Preference
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tfds import read_tfds, write_tfds
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.models.hf import load_hf
from dpo_jax.reference import reference_logps

BETA = 0.25
TEXTS = json.loads((GOLDEN / "hh_prompt_split.json").read_text())[:24]


def bare(number):
    """A pair as TRL has it."""
    text = TEXTS[number]
    return {"prompt": text["prompt"], **{side: text[side][len(text["prompt"]) :] for side in ("chosen", "rejected")}}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bench_row(number, subset):
    names = {"chosen_model": "a", "rejected_model": "b"}
    return {"id": number, "prompt": f"Question {number}?", "chosen": f"Yes, {number}.", "rejected": "No.", **names} | {
        "subset": subset
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    write(root / "hh" / "one" / "test.jsonl", [bare(i) for i in range(16)])
    write(root / "hh" / "two" / "test.jsonl", [bare(i) for i in range(16, 24)])
    (root / "config.yaml").write_text(f"""\
run: {{dir: {root}/run}}
data: {{path: {root}/hh, max_length: 128, max_prompt_length: 64, layout: packed}}
tokenizer: {{path: {GOLDEN}/tokenizer}}
dpo: {{beta: {BETA}, policy: {GOLDEN}/gpt2/init}}
refs: {{batch: 8}}
eval: {{policy: {GOLDEN}/gpt2/dpo_final, batch: 8}}
""")
    result = call("eval", root / "config.yaml", "--rewards")
    assert result.code == 0, result.err
    return root, result.out


def report_of(folder, name="rewards"):
    return json.loads((folder / name / "report.json").read_text())


def test_every_pair_is_written_and_the_table_follows_from_it(root):
    folder, out = root
    report = report_of(folder / "run")
    lines = [json.loads(line) for line in (folder / "run" / "rewards" / "rewards.jsonl").read_text().splitlines()]
    assert [line["uid"] for line in lines] == [f"one/test.jsonl:{i}" for i in range(1, 17)] + [
        f"two/test.jsonl:{i}" for i in range(1, 9)
    ]
    assert [line["subset"] for line in lines] == ["one"] * 16 + ["two"] * 8
    logps, ref_logps, tokens = (np.array([line[name] for line in lines]) for name in ("logps", "ref_logps", "tokens"))
    rewards = np.array([[line["chosen"], line["rejected"]] for line in lines])
    np.testing.assert_allclose(rewards, BETA * (logps - ref_logps), atol=1e-12)
    margins = rewards[:, 0] - rewards[:, 1]
    implicit = report["rewards"]["implicit"]
    assert implicit["accuracy"] == np.mean(margins > 0)
    assert implicit["accuracy"] > 0.7  # these are pairs that the golden run has trained on
    assert [row["accuracy"] for row in implicit["subsets"]] == [np.mean(margins[:16] > 0), np.mean(margins[16:] > 0)]
    assert implicit["macro"]["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in implicit["subsets"]]))
    per_token = BETA * (logps - ref_logps) / tokens
    assert report["rewards"]["per_token"]["accuracy"] == np.mean(per_token[:, 0] > per_token[:, 1])
    assert report["rewards"]["reference_free"]["accuracy"] == np.mean(logps[:, 0] > logps[:, 1])
    of = {"policy": "dpo_final", "reference": "init"}
    assert report["weights"] == {role: weights_digest_of(GOLDEN / "gpt2" / folder) for role, folder in of.items()}
    assert (folder / "run" / "rewards" / "reliability.png").stat().st_size > 2000
    for text in ("24 held-out pairs", "reference-free, per token", "mean over subsets", "overconfidence", "chosen longer"):
        assert text in out
    assert not (folder / "run" / "eval").exists()  # the table of the run's own data stays as it is


def test_log_probabilities_are_those_of_the_models(root):
    """Against a plain forward pass over the two texts."""
    folder, _ = root
    line = json.loads((folder / "run" / "rewards" / "rewards.jsonl").read_text().splitlines()[0])
    (preference,) = load_preferences(folder / "hh", "test").take(1)
    pair = encode(preference, load_tokenizer(GOLDEN / "tokenizer"), max_length=128, max_prompt_length=64)
    assert line["tokens"] == [len(pair.chosen), len(pair.rejected)]
    rows = plain_rows([pair], length=128)
    model, _ = load_hf(GOLDEN / "gpt2" / "init")
    logps = jax.jit(functools.partial(reference_logps, model))
    for name, weights in (("logps", "dpo_final"), ("ref_logps", "init")):
        np.testing.assert_allclose(line[name], logps(load_hf(GOLDEN / "gpt2" / weights)[1], rows)[0], atol=1e-3)


def test_swapped_sides_mirror_every_number(root, tmp_path):
    folder, out = root
    names = {"chosen": "rejected", "rejected": "chosen"}
    swapped = [{names.get(name, name): value for name, value in bare(i).items()} | {"subset": i % 3} for i in range(24)]
    write(tmp_path / "swapped" / "test.jsonl", swapped)
    flags = ("--data.path", tmp_path / "swapped", "--run.dir", tmp_path / "run", "--rewards")
    result = call("eval", folder / "config.yaml", *flags, "--dpo.loss", "ipo")
    assert result.code == 0
    assert NO_LOGIT in result.out
    assert NO_LOGIT not in out
    ours, theirs = report_of(tmp_path / "run"), report_of(folder / "run")
    for name in ours["rewards"]:
        mirrored = ours["rewards"][name]
        assert mirrored["accuracy"] == pytest.approx(1 - theirs["rewards"][name]["accuracy"])
        assert mirrored["margin"] == pytest.approx(-theirs["rewards"][name]["margin"], abs=1e-5)
    assert [row["subset"] for row in ours["rewards"]["implicit"]["subsets"]] == ["0", "1", "2"]
    assert ours["calibration"]["overconfidence"] > theirs["calibration"]["overconfidence"]


def test_calibration_of_a_loss_whose_margin_is_no_logit_has_a_note():
    kinds = {"dpo": True, "robust": True, "ipo": False, "hinge": False, "dpo + 0.5*sft": True}
    assert {loss: fits_logit(DpoConfig(loss=loss)) for loss in kinds} == kinds
    assert not fits_logit(DpoConfig(f_divergence="forward_kl"))
    assert not fits_logit(DpoConfig(label_smoothing=0.1))


def test_rewardbench_is_read_as_it_is(root, tmp_path):
    folder, _ = root
    rows = [
        bench_row(i, subset) for i, subset in enumerate(["math-prm", "math-prm", "hep-go", "donotanswer", "alpacaeval-easy"])
    ]
    (tmp_path / "bench" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bench" / "data" / "filtered-00000-of-00001.parquet")
    flags = ("--data.path", tmp_path / "bench", "--data.test-split", "filtered", "--run.dir", tmp_path / "run")
    assert "rewards_out: is the folder of --rewards" in call("eval", folder / "config.yaml", "--eval.rewards-out", "x").err
    flags += ("--rewards", "--eval.rewards-out", tmp_path / "run" / "rewards-bench")  # beside the one of the run's own data
    result = call("eval", folder / "config.yaml", *flags)
    assert result.code == 0, result.err
    data = json.loads((tmp_path / "run" / "rewards-bench" / "data_report.json").read_text())["filtered"]
    assert data["format"] == "rewardbench"
    assert "questions and answers are rendered with Human: and Assistant:, as there is no chat template" in data["notes"]
    bench = report_of(tmp_path / "run", "rewards-bench")["rewards"]["implicit"]["rewardbench"]
    assert [row["section"] for row in bench["sections"]] == ["Chat", "Safety", "Reasoning"]
    assert len(bench["missing"]) == 19
    assert "note: not in this set: alpacaeval-length" in result.out
    assert call("report", tmp_path / "run").code == 0
    assert "| RewardBench section | pairs | accuracy |" in (tmp_path / "run" / "report" / "report.md").read_text()


# How `subset` travels.


def test_the_subset_of_a_row_reaches_the_preference(tmp_path, tokenizer):
    write(tmp_path / "test.jsonl", [bare(0) | {"subset": "a"}, bare(1) | {"subset": 7}, bare(2) | {"subset": None}, bare(3)])
    assert [preference.subset for preference in load_preferences(tmp_path, "test")] == ["a", "7", None, None]
    write(tmp_path / "test.jsonl", [bare(0) | {"subset": ["a"]}])
    with pytest.raises(DataError, match=r"test.jsonl:1: subset: wrong_type") as refusal:
        load_preferences(tmp_path, "test")
    assert refusal.value.causes == (Cause.WRONG_TYPE,)
    assert detect_format(bench_row(0, "a")) == "rewardbench"
    assert detect_format(bare(0) | {"subset": "a"}) == "trl"


def test_rewardbench_in_a_chat_template(tmp_path, tokenizer):
    write(tmp_path / "test.jsonl", [bench_row(1, "hep-go")])
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        (preference,) = load_preferences(tmp_path, "test", tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = before
    assert preference.prompt_digest is not None
    assert dataclasses.replace(preference, prompt_digest=None) == Preference(
        "<user>Question 1?\n<assistant>", "Yes, 1.\n", "No.\n", "test.jsonl:1", chat=True, subset="hep-go"
    )


def test_subsets_survive_tfds_and_sets_without_them_are_written_as_before(tmp_path):
    plain = [Preference("p", " c", " r", f"{i}") for i in range(3)]
    marked = [*plain[:2], Preference("p", " c", " r", "2", subset="käse")]
    folder = write_tfds({"test": marked}, tmp_path, name="marked")
    assert list(read_tfds(folder, "test")) == marked
    folder = write_tfds({"test": plain}, tmp_path, name="plain")
    assert list(read_tfds(folder, "test")) == plain
    assert "subset" not in (folder / "features.json").read_text()
    digest = "6512cd4cdac5bfc1"  # of the rows as they were written before there were subsets
    assert json.loads((folder / "metadata.json").read_text())["test"].startswith(digest)


def test_without_subsets_of_their_own_pairs_are_told_apart_by_folder():
    def of(*uids, subset=None):
        return [Preference("p", " c", " r", uid, subset=subset) for uid in uids]

    assert subset_names(of("one/test.jsonl:1", "two/test.jsonl:1")) == ["one", "two"]
    assert subset_names(of("data/test.parquet:1", "data/test.parquet:2")) == []
    assert subset_names(of("test.jsonl:1", "test.jsonl:2")) == []
    assert subset_names([*of("x/test.jsonl:1", subset="a"), *of("test.jsonl:2")]) == ["a", "none"]


def test_rewards_of_baselines_are_in_nats():
    assert beta_of(DpoConfig(loss="preferred_ft")) == beta_of(DpoConfig(loss="unlikelihood", alpha=0.5)) == 1
    assert beta_of(DpoConfig(beta=0.3)) == beta_of(DpoConfig(loss="ipo", beta=0.3)) == 0.3
