"""The model card: a header that the Hub's own client reads, nothing guessed in it, and the commit of the code that made it."""

import dataclasses
import hashlib
import json
import shutil
import subprocess

import pytest
from huggingface_hub import ModelCard

from dpo_jax.cli import data_sources
from dpo_jax.cli.card import dpo_card, merged_card, sft_card, with_digest
from dpo_jax.cli.commands.export import _card_of
from dpo_jax.cli.config import Config, DataConfig, DpoConfig, LoraConfig, MixConfig, ModelConfig, RunConfig
from dpo_jax.models import origin
from dpo_jax.models.origin import License, Origin, hub_id_of_folder, model_origin
from dpo_jax.report.result_table import result_table
from dpo_jax.runtime.rundir import RunDir, checkout, write_json

BASE_CARD = "---\nlanguage:\n- en\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags: [a]\n---\n# Base\n"
EVALUATED = {"eval/loss": 34.9, "eval/nll_per_token": 1.25}
REPORT = {
    "pairs": 1_234_567,
    "reference": {"loss": 0.6931, "rewards/accuracies": 0.5, "kl": 0.0, "cut": 0.0},
    "policy": {
        "loss": 12345.1254,
        "rewards/accuracies": 0.956,
        "rewards/accuracies_low": 0.934,
        "rewards/accuracies_high": 0.971,
        "rewards/margins": -1234.5678,
        "kl": 16.66,
        "kl_error": 0.93,
        "cut": 0.34,
    },
    "samples": [
        {"prompt": "What? " * 90, "reference": "x" * 300, "policy": "```\nbye", "policy_finished": False},
        {"prompt": "a", "reference": "", "policy": "c"},
    ],
}
REPORT["reference"] |= {"rewards/margins": 0.0}


@pytest.fixture
def run(tmp_path):
    with RunDir(tmp_path / "run" / "dpo") as run:
        run.metrics.write_text(json.dumps({"step": 7, **EVALUATED}) + "\n")
        counts = {"read": 12, "kept": 10, "dropped": {"empty": 2}, "truncated": {"prompt": 3}}
        write_json(run.data_report, {"train": counts})
        env = {"packages": {"dpo_jax": "0.1.0", "jax": "0.10.2"}, "git": {"commit": "c0ffee" * 6, "dirty": True}}
        write_json(run.env, env | {"devices": ["H100", "H100"]})
        yield run


def configured(run, *, model=None, policy=None, data=None):
    return dataclasses.replace(
        Config(),
        run=RunConfig(dir=str(run.path.parent)),
        model=ModelConfig(path=model, family=None if model else "gpt2"),
        dpo=DpoConfig(policy=policy),
        data=DataConfig(path=data) if data else DataConfig(source="reviews"),
    )


def folder_with(path, **files):
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("_", ".", 1)).write_text(text)
    return path


def test_the_hub_reads_the_header_of_a_card(run, tmp_path):
    base = folder_with(tmp_path / "hub" / "models--meta-llama--Llama-3-8B" / "snapshots" / "abc", README_md=BASE_CARD)
    data = folder_with(tmp_path / "hub" / "datasets--Anthropic--hh-rlhf" / "snapshots" / "def")
    card = sft_card(configured(run, model=str(base), data=str(data)), run)
    header = ModelCard(card).data.to_dict()
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "meta-llama/Llama-3-8B",
        "datasets": ["Anthropic/hh-rlhf"],
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "tags": ["dpo_jax", "sft"],
    }
    assert "# Llama-3-8B after supervised fine-tuning" in card
    assert "[Anthropic/hh-rlhf](https://huggingface.co/datasets/Anthropic/hh-rlhf)" in card
    # The policy of DPO starts from that folder: where it comes from is in its card.
    start = folder_with(run.path.parent / "sft" / "export", README_md=card)
    card = dpo_card(configured(run), run, report=REPORT)
    header = ModelCard(card).data.to_dict()
    assert (header["base_model"], header["license"], header["tags"]) == ("meta-llama/Llama-3-8B", "other", ["dpo_jax", "dpo"])
    assert "the SFT model of this run, `sft/export`, from [meta-llama/Llama-3-8B]" in card
    assert str(start) not in card
    assert str(tmp_path) not in card


def test_what_is_not_known_is_left_out_of_the_header(run):
    for card in (sft_card(configured(run), run), dpo_card(configured(run), run)):
        assert set(ModelCard(card).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}


def test_a_card_says_how_the_model_was_made_and_how_to_load_it(run):
    card = dpo_card(configured(run), run, report=REPORT)
    for words in (
        "made with: dpo_jax 0.1.0, jax 0.10.2 (commit c0ffeec0ffee, changed), on 2 x H100",
        "AutoModelForCausalLM.from_pretrained(path)",
        "| beta | 0.1 |",
        "| max\\_grad\\_norm | 10 |",
        "| train | 12 | 10 | 2 empty | 3 prompt |",
        "- **KL**: KL(policy \\|\\| reference) is 16.7 nats",
        "Nothing unusual in: accuracy",
    ):
        assert words in card
    assert card.count("\n````\n") == 2  # a sample that holds ``` does not end the block
    sft = sft_card(configured(run), run)
    assert "| loss (nats per text) | 34.90 |\n| loss per token (nats) | 1.2500 |\n| perplexity per token | 3.49 |" in sft


def test_a_reference_that_is_not_the_start_is_named(run):
    assert "- reference:" not in dpo_card(Config(), run)
    second = Config(dpo=DpoConfig(policy="first/dpo/export", reference="org/sft@0f1e"))
    card = dpo_card(second, run)
    refresh = dpo_card(Config(dpo=DpoConfig(refresh_reference_steps=200)), run)
    assert "- refreshed reference: the policy itself after every 200 steps (" in refresh
    assert "- start: `dpo/export`\n- reference: [org/sft](https://huggingface.co/org/sft), revision `0f1e`\n" in card


def test_the_result_table_fits_80_columns_and_marks_what_is_cut():
    table = result_table(REPORT)
    assert max(map(len, table.splitlines())) <= 80
    assert "KL(policy || reference) (nats)" in table
    assert "± 0.93" in table
    assert "0.934 to 0.971 (95 %)" in table
    flat = " ".join(table.split())
    assert f"… {len(('What? ' * 90).strip()) - 220} more characters" in flat
    assert "… 80 more characters" in flat
    assert "bye [cut by the token limit]" in flat
    assert "(empty)" in flat
    assert "chosen on these pairs" not in table
    chosen = result_table({**REPORT, "chosen_on_these": True})
    assert "The weights were chosen on these pairs" in chosen
    assert max(map(len, chosen.splitlines())) <= 80


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Origin()),
        ({"config_json": '{"_name_or_path": "EleutherAI/pythia-2.8b"}'}, Origin("EleutherAI/pythia-2.8b")),
        ({"config_json": '{"_name_or_path": "/home/me/models/pythia"}'}, Origin()),
        ({"config_json": "torn"}, Origin()),
        ({"README_md": "no header\nlicense: mit\n"}, Origin()),
        (
            {"README_md": "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-8B\n---\n"},
            Origin("Qwen/Qwen3-8B", License("apache-2.0")),
        ),
        ({"README_md": "---\nlicense:\n- mit\nbase_model:\n- a/b\n- c/d\n---\n"}, Origin()),
    ],
)
def test_the_origin_of_a_folder_is_what_its_files_say(tmp_path, files, expected):
    assert model_origin(str(folder_with(tmp_path / "model", **files))) == expected


def test_the_origin_of_a_hub_id_is_itself_with_the_license_of_its_cached_card(monkeypatch):
    cards = {("a/b", None): "---\nlicense: mit\n---\n", ("a/b", "v1"): "---\nlicense: llama3\n---\n"}
    monkeypatch.setattr(origin, "_cached_card", lambda hub_id, revision: cards.get((hub_id, revision)))
    assert model_origin("a/b") == Origin("a/b", License("mit"))
    assert model_origin("a/b@v1") == Origin("a/b", License("llama3"))
    assert model_origin("c/d") == Origin("c/d")
    assert model_origin("runs/x/sft/export") == model_origin("../x/y") == model_origin(None) == Origin()


def test_a_clone_of_a_hub_repository_knows_its_id(tmp_path):
    remote = '[remote "origin"]\n\turl = https://huggingface.co/{}\n'
    data = folder_with(tmp_path / "d" / ".git", config=remote.format("datasets/Anthropic/hh-rlhf")).parent
    model = folder_with(tmp_path / "m" / ".git", config=remote.format("EleutherAI/pythia-2.8b.git")).parent
    (data / "harmless-base").mkdir()
    assert hub_id_of_folder(data / "harmless-base", "datasets") == "Anthropic/hh-rlhf"
    assert hub_id_of_folder(model, "models") == "EleutherAI/pythia-2.8b"
    assert hub_id_of_folder(data, "models") is None
    assert hub_id_of_folder(model, "datasets") is None
    space = folder_with(tmp_path / "s" / ".git", config=remote.format("spaces/me/app")).parent
    assert hub_id_of_folder(space, "models") is None


def test_a_card_in_a_clone_of_something_else_says_what_its_model_is(tmp_path):
    remote = '[remote "origin"]\n\turl = https://huggingface.co/me/mine\n'
    clone = folder_with(tmp_path / "clone" / ".git", config=remote).parent
    (clone / "sft" / "export").mkdir(parents=True)
    assert model_origin(str(clone / "sft" / "export")).hub_id == "me/mine"
    (clone / "sft" / "export" / "README.md").write_text("---\nbase_model: org/base\n---\n")
    assert model_origin(str(clone / "sft" / "export")).hub_id == "org/base"
    (clone / "README.md").write_text("---\nbase_model: org/base\n---\n")
    assert model_origin(str(clone)).hub_id == "me/mine"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    package = tmp_path / "dpo_jax"
    elsewhere = tmp_path / "env" / "dpo_jax"  # as installed into an environment inside of a checkout
    for folder in (package, elsewhere):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("1\n")
    assert checkout(package) is None  # no repository
    git("init")
    assert checkout(package) is None  # no commit yet
    git("add", "dpo_jax")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert checkout(package) == {"commit": head, "dirty": False}
    assert checkout(elsewhere) is None
    (package / "__init__.py").write_text("2\n")
    assert checkout(package) == {"commit": head, "dirty": True}
    monkeypatch.setenv("PATH", str(elsewhere))
    assert checkout(package) is None  # no git


def test_a_card_names_each_source_with_its_revision_and_weight(run, tmp_path, monkeypatch):
    monkeypatch.setattr(data_sources, "_COMMITS", {("org/one", None): "0f" * 20})
    parts = (MixConfig("org/one", 2.0), MixConfig("org/two", config="en", revision="v1"), MixConfig(str(tmp_path / "own")))
    config = dataclasses.replace(configured(run), data=DataConfig(mix=parts, test_share=0.05))
    card = dpo_card(config, run)
    assert ModelCard(card).data.to_dict()["datasets"] == ["org/one", "org/two"]
    link = "[{0}](https://huggingface.co/datasets/{0})"
    told = [f"{link.format('org/one')}, revision `{'0f' * 20}`, weight 2", f"{link.format('org/two')}, `en`, revision `v1`"]
    assert f"- data: {', '.join(told)}, `own` (files); 5.0% of the prompts of sources without a test split are held out" in card


@pytest.mark.parametrize(("best", "own"), [(None, 16), (8, 8)])
def test_an_export_takes_the_card_of_the_run_only_for_the_weights_that_the_run_exported(run, best, own):
    run.metrics.write_text("".join(json.dumps({"step": step, **EVALUATED}) + "\n" for step in (8, 16)))
    run.card.write_text("the card of the run")
    cards = {step: _card_of(configured(run), run, "dpo", step, best=best) for step in (8, 16)}
    assert [step for step, card in cards.items() if card == "the card of the run"] == [own]
    other = 24 - own
    assert f"Held out, after {other} steps:" in cards[other]


def test_the_card_of_a_merged_adapter_is_that_of_a_whole_model(run):
    config = dataclasses.replace(configured(run), lora=LoraConfig(rank=4))
    adapter = dpo_card(config, run)
    assert 'library_name: "peft"' in adapter
    assert "AutoPeftModelForCausalLM" in adapter
    merged = merged_card(adapter)
    assert 'library_name: "transformers"' in merged
    assert "peft" not in merged.lower()
    assert "AutoModelForCausalLM.from_pretrained(path)" in merged
    assert "LoRA of rank 4" in merged


def test_options_that_did_not_apply_are_not_in_a_card(run):
    config = configured(run)
    card = dpo_card(dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, steps=5, warmup_ratio=0.1)), run)
    assert "| steps | 5 |" in card
    assert "| warmup\\_ratio | 0.1 |" in card or "| warmup_ratio | 0.1 |" in card
    assert "epochs" not in card
    assert "warmup_steps" not in card.replace("\\", "")


def test_a_step_of_an_online_run_has_the_card_of_one(run):
    run.metrics.write_text(json.dumps({"step": 2, "eval/kl": 0.25}) + "\n")
    (run.path / "rounds.jsonl").write_text(json.dumps({"round": 0, "pairs": 8}) + "\n")
    card = _card_of(configured(run), run, "online", 2, best=None)
    assert "trained by online preference optimization" in card
    assert "On held-out prompts, after 2 steps:" in card
    assert "8 rounds, each with 4 completions" in card
    run.metrics.unlink()
    (run.path / "rounds.jsonl").unlink()
    assert "after 2 steps:" not in _card_of(configured(run), run, "online", 2, best=None)


def test_a_card_names_the_digest_of_the_weights_beside_it(run, tmp_path):
    folder = folder_with(tmp_path / "one", model_safetensors="weights")
    card = with_digest(sft_card(configured(run), run), folder)
    expected = hashlib.sha256(b"weights").hexdigest()  # as the Hub shows it
    assert f"\n- weights: SHA-256 `{expected}` of `model.safetensors`\n" in card
    assert with_digest(card, folder) == card
    (folder / "second.safetensors").write_text("more")
    listed = subprocess.run(
        "sha256sum *.safetensors | sha256sum", shell=True, cwd=folder, capture_output=True, text=True
    ).stdout
    again = with_digest(card, folder)
    assert f"- weights: SHA-256 `{listed.split()[0]}` of `the output of sha256sum *.safetensors`" in again
    assert again.count("- weights:") == 1
