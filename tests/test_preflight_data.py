"""`--check` of data and templates: what makes every run refuse them is found without a tokenizer."""

import json
import shutil

import pytest
from chat_templates import chat_tokenizer
from test_preflight import ROWS, check, make_place, write_config, write_rows

from dpo_jax.cli.build import with_template
from dpo_jax.cli.config import Config, ConfigError, TokenizerConfig
from dpo_jax.data.rendering import Refused, render

EQUAL = [{**row, "rejected": row["chosen"]} for row in ROWS]
TURNS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
    }
    for row in ROWS
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
WITH_TOOLS = [{**row, "tools": TOOLS} for row in TURNS]
TEMPLATE = "{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("rows", "flags", "expected"),
    [
        (EQUAL, [], "pairs [train], first 10 rows: 10 of 10 rows cannot be used (identical 10)"),
        (EQUAL, ["--data.on-bad", "drop"], "pairs [train]: none of the first 10 rows can be used:\n"),
        (ROWS[:-1] + EQUAL[-1:], [], "pairs [train], first 10 rows: 1 of 10 rows cannot be used (identical 1)"),
        (ROWS, ["--data.columns", "prompt=promt"], "10 of 10 rows cannot be used (missing_column 10)"),
        ([{**row, "chosen": 1} for row in ROWS], ["--data.on-bad", "drop"], "none of the first 10 rows can be used"),
    ],
)
def test_rows_that_the_run_refuses_are_refused(place, capsys, rows, flags, expected):
    write_rows(place / "pairs" / "train.jsonl", rows)
    code, told = check("dpo", "--check", *flags, capsys=capsys)
    assert code == 65
    assert expected in told


def test_bad_rows_that_are_dropped_and_counted_later_pass(place, capsys):
    """A warning, where others may come after the first hundred."""
    write_rows(place / "pairs" / "train.jsonl", [*ROWS, *EQUAL])
    assert check("dpo", "--check", "--data.on-bad", "drop", capsys=capsys)[0] == 0
    write_rows(place / "pairs" / "train.jsonl", [*EQUAL * 10, *ROWS * 9])
    code, told = check("dpo", "--check", "--data.on-bad", "drop", capsys=capsys)
    assert code == 0
    assert "pairs [train]: none of the first 100 rows can be used" in told


@pytest.mark.parametrize(
    ("template", "rows", "expected"),
    [
        (TEMPLATE, TURNS, None),
        ("{{ messages[0].content }", TURNS, "tokenizer.chat_template: t.jinja: line 1: not a Jinja template: "),
        (TEMPLATE, WITH_TOOLS, "train.jsonl:1 has tools, which the chat template does not write"),
        (TEMPLATE + "{{ tools }}", WITH_TOOLS, None),
    ],
)
@pytest.mark.parametrize("of_the_folder", [False, True])
def test_the_template_is_read(place, capsys, template, rows, expected, of_the_folder):
    for split in ("train", "test"):
        write_rows(place / "pairs" / f"{split}.jsonl", rows)
    if of_the_folder:
        (place / "runs/one/sft/export/chat_template.jinja").write_text(template)
    else:
        (place / "t.jinja").write_text(template)
        write_config(place, tokenizer={"chat_template": "t.jinja"})
    code, told = check("dpo", "--check", capsys=capsys)
    assert code == (2 if expected else 0), told
    assert (expected or "no problems found").replace("tokenizer.chat_template: t.jinja", "") in told


def test_the_run_names_the_template_of_the_option(place):
    tokenizer, config = chat_tokenizer(""), Config(tokenizer=TokenizerConfig(chat_template="t.jinja"))
    (place / "t.jinja").write_text("{{ messages[0].content }")
    with pytest.raises(ConfigError, match="^tokenizer.chat_template: t.jinja: line 1: not a Jinja template"):
        with_template(config, tokenizer)
    (place / "t.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(Refused, match="^tokenizer.chat_template t.jinja: TemplateError: no"):
        render(with_template(config, tokenizer), TURNS[0]["prompt"])


@pytest.mark.parametrize("indent", [None, 2])
def test_the_rows_of_an_array_are_not_counted_by_lines(place, capsys, indent):
    (place / "pairs" / "train.jsonl").unlink()
    (place / "pairs" / "train.json").write_text(json.dumps(ROWS, indent=indent))
    code, told = check("dpo", "--check", capsys=capsys)
    assert code == 0
    assert "pairs: train (trl, 1 file), test (trl, 1 file, 10 rows)" in told


def test_eval_names_the_loss_with_which_the_run_was_trained(place, capsys):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in ROWS]
    for split in ("train", "test"):
        write_rows(place / "pairs" / f"{split}.jsonl", rows)
    (place / "runs/one/dpo").mkdir()
    (place / "runs/one/dpo/config.yaml").write_text("dpo: {loss: kto}")
    for flags in (["--check"], ["--eval.reference", "runs/one/sft/export"]):
        shutil.copytree(place / "runs/one/sft/export", place / "runs/one/dpo/export", dirs_exist_ok=True)
        code, told = check("eval", *flags, capsys=capsys)
        assert code == 65
        assert "this run was trained with --dpo.loss kto: set it for eval, too" in told
    told = check("eval", "--check", "--eval.policy", "runs/one/dpo/export", capsys=capsys)[1]
    assert "pairs are needed here" in told
    assert "was trained with" not in told


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (["--run.num-processes", "8"], {}, "run.coordinator, run.process_id not given, but run.num_processes: give all"),
        (["--run.num-processes", "8"], {"JAX_PROCESS_ID": "0"}, "run.coordinator not given"),
        (["--run.num-processes", "8"], {"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, None),
        (["--run.num-processes", "8", "--check-elsewhere=/mnt"], {}, None),
        ([], {}, None),
    ],
)
def test_half_of_an_address_is_refused(place, capsys, monkeypatch, flags, environment, expected):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, told = check("dpo", "--check", "--run.distributed", "auto", *flags, capsys=capsys)
    assert code == (2 if expected else 0)
    assert (expected or "no problems found") in told
