"""Runs of the program on single completions and on rankings."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from tiny_run import _compilation_cache as _compilation_cache
from tiny_run import _plots_once as _plots_once
from tiny_run import bytes_of, call, refused

from dpo_jax.cli.commands.sft import _targets
from dpo_jax.cli.config import load_config
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import save_hf
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

CONFIG = """\
run: {{dir: {dir}, save_every_steps: 2}}
data: {{path: {data}, max_length: 40, max_prompt_length: 24}}
dpo: {{policy: {model}, loss: {loss}, batch: 4, lr: 1.0e-3, warmup_steps: 0}}
refs: {{batch: 4}}
eval: {{batch: 4, samples: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and files: nine single completions and nine rankings of three, four held out."""
    folder = tmp_path_factory.mktemp("kinds")
    sizes: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "max_positions": 64}
    model = make_model(decoder_config(hf_config("gpt_neox", vocab_size=511, eos_token_id=0, **sizes)))
    save_hf(folder / "model", model, jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0))))
    save_tokenizer(load_tokenizer(GOLDEN / "tokenizer"), folder / "model")
    for split, count in (("train", 9), ("test", 4)):
        rows = {"unpaired": [], "ranked": []}
        for i in range(count):
            prompt, worst = f"{split} {i}:", f" {'no' * (1 + i % 3)}"
            rows["unpaired"].append({"prompt": prompt, "completion": worst if i % 2 else " yes", "label": i % 2 == 0})
            rows["ranked"].append({"prompt": prompt, "completions": [worst, " yes", " yes!"], "ranks": [3, 1, 2]})
        for kind, lines in rows.items():
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def configured(folder, kind, loss, run):
    config = folder / f"{run}.yaml"
    config.write_text(CONFIG.format(dir=folder / run, data=folder / kind, model=folder / "model", loss=loss))
    return config


def timeless(rows):
    return [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in rows]


def test_kto_from_audit_to_evaluation_and_after_a_kill(folder):
    config, run = configured(folder, "unpaired", "kto", "kto"), folder / "kto"
    printed = call("audit", config).out
    assert [line.split() for line in printed.splitlines() if line.strip().startswith(("desirable", "train completion"))][0] == [
        "desirable",
        "5",
        "2",
    ]
    assert "train.jsonl:1, desirable, tokens" in printed
    assert "desirable completions weigh 5 (weight times number)" not in printed  # 5 of 4: between 1 and 4/3
    printed = " ".join(call("audit", config, "--dpo.desirable-weight", 2).out.split())
    assert (
        "desirable completions weigh 10 (weight times number) and undesirable ones 4: the KTO paper recommends a ratio"
        in printed
    )
    result = call("dpo", config)
    assert result.code == 0, result
    assert "9 completions to train on, 4 held out" in result.out
    rows = read_metrics(run / "dpo" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["eval/loss"] < 0.5
    refs = {path: path.read_bytes() for path in (run / "refs").glob("logps-*")}
    whole = shutil.copytree(run, folder / "whole")
    for gone in ("export", "checkpoints/3"):
        shutil.rmtree(run / "dpo" / gone)
    result = call("dpo", config)
    assert f"continuing {run / 'dpo'} after 2 steps" in result.out
    assert "refs: 13 of 13 pairs are already cached" in result.out
    assert bytes_of(run / "dpo" / "export") == bytes_of(whole / "dpo" / "export")
    assert timeless(read_metrics(run / "dpo" / "metrics.jsonl")) == timeless(rows)
    result = call("eval", config)
    assert result.code == 0, result
    assert "4 held-out completions" in result.out
    report = json.loads((run / "eval" / "report.json").read_text())
    last = [row for row in rows if is_evaluation(row)][-1]
    assert report["policy"]["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert report["policy"]["rewards/margins"] == pytest.approx(last["eval/rewards/margins"], rel=1e-4)
    assert refs == {path: path.read_bytes() for path in (run / "refs").glob("logps-*")}
    assert call("report", run).code == 0
    assert "eval.rewards: judges pairs, but loss kto reads unpaired" in refused(2, "eval", config, "--rewards")
    for number, parts in enumerate((("--run.devices", "pmap"), ("--dpo.microbatches", 2, "--run.devices", "single"))):
        run = folder / f"parts{number}"
        assert call("dpo", config, "--run.dir", run, *parts).code == 0
        for row, whole_row in zip(read_metrics(run / "dpo" / "metrics.jsonl"), rows, strict=True):
            assert {*row} == {*whole_row}
            for name in {*row} & {"loss", "eval/loss", "kl", "grad_norm"}:
                assert row[name] == pytest.approx(whole_row[name], rel=1e-4, abs=1e-4), (parts, row)


def test_plackett_luce_from_a_file_of_rankings(folder):
    config, run = configured(folder, "ranked", "plackett_luce", "ranked_run"), folder / "ranked_run"
    assert "train between" in call("audit", config).out
    result = call("dpo", config, "--data.layout", "shared")
    assert result.code == 0, result
    assert "9 rankings to train on, 4 held out" in result.out
    rows = read_metrics(run / "dpo" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(6), abs=1e-5)
    assert rows[-1]["eval/loss"] < np.log(6) - 0.01


@pytest.mark.parametrize(
    ("kind", "loss", "told"),
    [
        ("unpaired", "dpo", "holds single completions with labels, but pairs are needed here: `dpo-jax dpo` .* dpo.loss: kto"),
        ("ranked", "kto", "holds rankings, but single completions .*: plackett_luce"),
    ],
)
def test_a_loss_of_other_rows_is_refused_before_anything_is_read(kind, loss, told, folder):
    config = configured(folder, kind, loss, f"{kind}_{loss}")
    for flags in (["--check"], []):
        message = refused(65, "dpo", config, *flags)
        assert re.search(told, message), message
    if loss == "dpo":
        printed = call("audit", config).out  # which looks at anything
        assert "the rows are single completions with a label, which loss dpo does not read" in " ".join(printed.split())


def test_an_audit_shows_splits_of_different_kinds_side_by_side(folder):
    data = folder / "both_kinds"
    shutil.copytree(folder / "unpaired", data)
    pair = {"prompt": "0:", "chosen": " yes", "rejected": " no, not at all"}
    (data / "test.jsonl").write_text(json.dumps(pair) + "\n")
    printed = call("audit", configured(folder, data.name, "dpo", "audit_kinds")).out
    for row, cells in {"desirable": ["5", "-"], "undesirable": ["4", "-"], "chosen is longer": ["-", "0.0%"]}.items():
        assert re.findall(rf"^  {row} +(\S+) +(\S+)$", printed, re.M) == [tuple(cells)]


def test_supervised_fine_tuning_learns_the_good_completions(folder):
    """Desirable ones, and the best of each ranking, whatever the loss of dpo is."""
    tokenizer = load_tokenizer(folder / "model")
    for kind, loss, texts in (("unpaired", "kto", 5), ("ranked", "plackett_luce", 9), ("ranked", "dpo", 9)):
        found = _targets(load_config(configured(folder, kind, loss, f"sft_{kind}_{loss}")), tokenizer)
        assert len(found.train) == texts
        assert {str(tokenizer.decode(ids)) for _, ids in found.train} == {" yes<|endoftext|>"}


@pytest.mark.parametrize("empty", ["train", "test"])
def test_supervised_fine_tuning_needs_a_desirable_completion_in_each_split(empty, folder):
    data = folder / f"none_in_{empty}"
    shutil.copytree(folder / "unpaired", data)
    bad = [{"prompt": f"{i}:", "completion": " no", "label": False} for i in range(4)]
    (data / f"{empty}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    config = configured(folder, data.name, "kto", f"sft_{data.name}")
    message = refused(65, "sft", config, "--model.path", folder / "model", "--sft.steps", 1)
    assert f"{data} [{empty}]: no text for supervised fine-tuning in 4 kept rows" in message
    assert not list(folder.glob(f"sft_{data.name}/sft/metrics.jsonl"))


def test_a_check_counts_no_steps_where_a_row_is_several_pairs(folder):
    for loss, steps in (("dpo", False), ("plackett_luce", True)):
        result = call("dpo", configured(folder, "ranked", loss, f"check_{loss}"), "--check")
        assert "(ranked, 1 file, 9 rows)" in result.out, result
        assert ("at most 3 steps" in result.out) == steps


def test_options_that_do_not_fit_the_rows_are_refused(folder):
    config = configured(folder, "unpaired", "kto", "options")
    message = refused(2, "dpo", config, "--dpo.ld-alpha", 0.5, "--data.ranking-length", 1)
    assert "dpo.ld_alpha: compares lengths within a pair, and loss kto does not read pairs" in message
    assert "data.ranking_length: a ranking has at least 2 completions, got 1" in message
    assert not Path(folder / "options").exists()
