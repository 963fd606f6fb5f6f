"""A run is the same run tomorrow: what is fixed when it begins, and what is compared when it continues."""

import dataclasses
import datetime
import json
from pathlib import Path

import numpy as np
import pytest
import transformers.utils.chat_template_utils as templates

from dpo_jax.cli import build, fixed, identity, splits
from dpo_jax.cli.config import (
    Config,
    ConfigError,
    DataConfig,
    DpoConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    dump_config,
    load_config,
)
from dpo_jax.cli.model_folders import eval_reference
from dpo_jax.data.chat_date import at_date, writes_date
from dpo_jax.data.loader import batch_indices, total_steps
from dpo_jax.data.pairs import DataReport
from dpo_jax.data.tokenizer import load_tokenizer, tokenizer_digest, train_tokenizer
from dpo_jax.models import hub
from dpo_jax.models.folder import is_hub_id
from dpo_jax.training import fingerprint
from dpo_jax.training.fingerprint import RunMismatch

DATED = (
    "{% set form = '%A %-d %b, 100 %%' %}Today is {{ strftime_now('%d %B %Y') }}, {{ strftime_now(form) }}.\n"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Line breaks and blanks that Jinja strips at tags, and macros that see the clock.
STRIPPED = "  {% if true %}\n x{% endif %}\n{{ strftime_now('%d %m %y') }}{{ strftime_now is defined }}" + DATED
IN_A_MACRO = "{{ strftime_now('%H') }}{% macro f() %}{{ strftime_now('%j') }}{% endmacro %}{{ f() }}"
QUESTION, GOOD, BAD = ({"role": role, "content": text} for role, text in zip(("user", *["assistant"] * 2), "abc", strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["some text"] * 3, vocab_size=260)
    made.chat_template = DATED
    return made


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(days=1)


# The date of chat templates.


def test_a_fixed_date_is_written_by_every_way_of_asking(tokenizer):
    at = at_date(tokenizer, datetime.datetime(2024, 7, 6))
    assert (
        at.apply_chat_template([QUESTION], tokenize=False)
        == "Today is 06 July 2024, Saturday 6 Jul, 100 %.\nuser: a<|endoftext|>"
    )
    ids = at.apply_chat_template([QUESTION])["input_ids"]
    assert tokenizer.decode(ids) == "Today is 06 July 2024, Saturday 6 Jul, 100 %.\nuser: a<|endoftext|>"


@pytest.mark.parametrize("template", [DATED, STRIPPED, "\n" + STRIPPED, IN_A_MACRO])
def test_a_fixed_clock_renders_as_the_real_one(tokenizer, template):
    real = load_copy(tokenizer, template)

    def rendered(one):
        return one.apply_chat_template([QUESTION], tokenize=False)

    before = rendered(at_date(real, datetime.datetime.now()))
    by_the_clock = rendered(real)
    assert by_the_clock in (before, rendered(at_date(real, datetime.datetime.now())))


def load_copy(tokenizer, template):
    made = train_tokenizer(["some text"] * 3, vocab_size=260)
    made.chat_template = template
    return made


def test_the_template_itself_is_saved_as_it_was(tokenizer, tmp_path):
    at = at_date(tokenizer, datetime.datetime(2024, 7, 6))
    at.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == DATED
    assert tokenizer_digest(at) == tokenizer_digest(tokenizer)


def test_a_template_without_a_date_is_left_alone(tokenizer):
    plain = load_copy(tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert (writes_date(tokenizer), writes_date(plain)) == (True, False)
    assert at_date(plain, datetime.datetime(2024, 7, 6)) is plain


@pytest.fixture
def chat_run(tokenizer, tmp_path):
    """A run on conversations, with a tokenizer whose template writes the date."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    row = {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        data=DataConfig(path=str(tmp_path / "data")),
        tokenizer=dataclasses.replace(Config().tokenizer, path=str(tmp_path / "tokenizer")),
    )


def prompts(config):
    config = fixed.fix(config)
    with build.open_run(config, "refs"):
        pass
    return [p.prompt for p in splits.load_split(config, "train", build.tokenizer_of(config, model_path=None))]


def test_the_prompts_of_a_run_are_the_same_tomorrow(chat_run, monkeypatch):
    today = prompts(chat_run)
    assert str(datetime.date.today().year) in today[0]
    monkeypatch.setattr(templates, "datetime", Tomorrow)
    monkeypatch.setattr(fixed.datetime, "date", type("date", (datetime.date,), {"today": lambda: Tomorrow.now().date()}))
    assert prompts(chat_run) == today
    elsewhere = dataclasses.replace(chat_run, run=RunConfig(dir=chat_run.run.dir + "-2"))
    assert prompts(elsewhere) != today


def test_the_date_can_be_set_and_is_written_down(chat_run, tmp_path):
    chosen = fixed._with(chat_run, "data.date", "2024-07-06")
    assert "06 July 2024" in prompts(chosen)[0]
    with build.open_run(fixed.fix(chat_run), "refs") as run:
        assert load_config(run.config).data.date == "2024-07-06"
    (tmp_path / "dated.yaml").write_text("data: {date: 2024-07-06}")
    assert load_config(tmp_path / "dated.yaml").data.date == "2024-07-06"
    (tmp_path / "wrong.yaml").write_text("data:\n  date: July")
    with pytest.raises(ConfigError, match=r"wrong.yaml:2: data.date: must be a day, such as 2026-11-27, .* got 'July'"):
        load_config(tmp_path / "wrong.yaml")


def test_the_date_of_the_first_command_holds_for_all(chat_run):
    first = fixed._with(chat_run, "data.date", "2024-07-06")
    assert prompts(first) == prompts(chat_run)
    assert fixed.fix(chat_run).data.date == "2024-07-06"


def test_nothing_is_kept_before_a_command_begins(chat_run):
    assert fixed.fix(chat_run).data.date == datetime.date.today().isoformat()
    assert not Path(chat_run.run.dir).exists()


def test_a_damaged_record_of_the_date_is_named(chat_run):
    Path(chat_run.run.dir).mkdir()
    file = f"{chat_run.run.dir}/fixed.json"
    for content in ("{", '{"date": "soon", "revisions": {}}', "[]"):
        with open(file, "w") as out:
            out.write(content)
        with pytest.raises(ConfigError, match="fixed.json: damaged"):
            fixed.fix(chat_run)


# Revisions of Hub models.


def test_a_hub_model_stays_at_its_revision(tmp_path, monkeypatch):
    newest, asked = ["aaa"], []

    def snapshot(path, *, local_files_only=False):
        name, _, revision = path.partition("@")
        asked.append(path)
        folder = tmp_path / "hub" / "snapshots" / (revision or newest[0])
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run")), model=ModelConfig(path="org/name"), dpo=DpoConfig(policy="org/b@v1")
    )
    (tmp_path / "run").mkdir()
    fixed.keep(fixed.fix(config))
    assert fixed.fix(config).model.path == "org/name"  # nothing was loaded yet
    assert fixed.pin_revisions(config).model.path == "org/name@aaa"
    newest[0] = "bbb"
    later = fixed.fix(config)
    assert (later.model.path, later.dpo.policy) == ("org/name@aaa", "org/b@v1")
    assert hub.resolve(later.model.path).name == "aaa"
    assert fixed.pin_revisions(config).model.path == "org/name@aaa"


@pytest.mark.parametrize("name", ["org/name", "org/na.me-2", "org/name@main", "org/name@0f1e"])
def test_hub_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["./org/name", "/org/name", "name", "a/b/c", "org/name@", "runs/x/sft/export"])
def test_no_hub_ids(name):
    assert not is_hub_id(name)


# What is compared.


def settings(**changes):
    return identity.settings(Config(), dataclasses.replace(DpoConfig(), **changes))


def refusal(saved, now):
    with pytest.raises(ConfigError) as caught, identity.refusing_mismatch():
        fingerprint.check_settings("runs/x/dpo", saved, now)
    return str(caught.value)


def test_every_setting_that_differs_is_named():
    told = refusal(settings(beta=0.1, batch=32), settings(beta=0.2, batch=64))
    assert "runs/x/dpo holds a run with other settings:\n  batch: was 32, is 64\n  beta: was 0.1, is 0.2\n" in told
    assert "choose another --run.dir" in told
    fingerprint.check_settings("", settings(policy="a", microbatches=2), settings(policy="b", reference="c"))


def test_a_run_may_become_longer_where_its_rate_does_not_depend_on_its_length():
    fingerprint.check_settings("", settings(epochs=1), settings(epochs=2))
    told = refusal(settings(epochs=1, schedule="linear"), settings(epochs=2, schedule="linear"))
    assert "epochs: was 1, is 2" in told
    assert "with schedule linear the learning rate depends on the length of the run" in told


def data(tokenizer, config=None, **changes):
    report = DataReport(split="train", rows=3, read=3, kept=3, files=[{"path": "train.jsonl", "bytes": 1, "sha256": "a" * 64}])
    return identity.data_record(config or Config(), tokenizer, [dataclasses.replace(report, **changes)], held_out="d")


def test_what_changed_about_the_data_is_named(tokenizer):
    before = data(tokenizer)
    assert fingerprint.data_changes(before, data(tokenizer)) == []
    file = [{"path": "train.jsonl", "bytes": 1, "sha256": "b" * 64}]
    assert fingerprint.data_changes(before, data(tokenizer, rows=4, files=file)) == [
        "  file train.jsonl: has other contents",
        "  train split, rows: was 3, is 4",
    ]
    dated = fixed._with(Config(), "data.date", "2024-07-06")
    [line] = fingerprint.data_changes(before, data(tokenizer, dated))
    assert line == "  data.date (the chat template writes it): was None, is '2024-07-06'"
    [template, whole] = fingerprint.data_changes(before, data(load_copy(tokenizer, "{{ messages }}")))[:2]
    assert template.startswith("  chat template: was '")
    limit = dataclasses.replace(Config(), data=DataConfig(max_length=100, max_prompt_length=50))
    assert "  data.max_length: was 512, is 100" in fingerprint.data_changes(before, data(tokenizer, limit))
    before["package transformers"] = "4.0"
    assert any(
        line.startswith("  package transformers: was '4.0'") for line in fingerprint.data_changes(before, data(tokenizer))
    )


def earlier(step=4, *, data=None, **changes):
    meta = {"fingerprint": {**settings(), "data": "x", "start": "s", "reference": "r", **changes}}
    return fingerprint.SavedRun("runs/x/dpo", step, meta if data is None else {**meta, "data": data})


def test_another_data_set_is_refused_for_what_changed(tokenizer):
    before, now = earlier(data=data(tokenizer)), data(tokenizer, kept=2)
    fingerprint.check_data(before, "x", now)
    fingerprint.check_data(None, "y", now)
    with pytest.raises(RunMismatch, match=r"holds a run with other data:\n  train split, kept: was 3, is 2$"):
        fingerprint.check_data(before, "y", now)
    with pytest.raises(RunMismatch, match="the token ids differ, but nothing else that is recorded"):
        fingerprint.check_data(earlier(), "y", now)  # a checkpoint of an older version


def test_other_weights_are_refused_by_name():
    fingerprint.check_weights(earlier(), reference="r")
    fingerprint.check_weights(None, reference="q")
    with pytest.raises(RunMismatch, match="reference: was 'r', is 'q'"):
        fingerprint.check_weights(earlier(), reference="q")


def test_a_run_cannot_become_shorter_than_it_is():
    fingerprint.check_length(earlier(4), steps=4)
    with pytest.raises(RunMismatch, match="runs/x/dpo has taken 4 steps, but 3 are asked for: .* longer, not shorter"):
        fingerprint.check_length(earlier(4), steps=3)


def test_other_held_out_pairs_are_noticed(tokenizer):
    now = data(tokenizer)
    assert not fingerprint.other_held_out(earlier(data=now), now)
    assert fingerprint.other_held_out(earlier(data={**now, fingerprint.HELD_OUT: "other"}), now)
    assert not fingerprint.other_held_out(earlier(), now)
    assert not fingerprint.other_held_out(None, now)


# A longer run sees every example as often as it should, whatever was left of its batches.


@pytest.mark.parametrize(
    ("examples", "batch", "parts"),
    [
        *((10, 4, (1, 2)), (10, 4, (1, 3, 4)), (7, 7, (1, 2)), (5, 8, (1, 2, 4)), (9, 2, (2, 3))),
        *((10, 4, (0.01, 0.5, 0.6, 2)), (11, 4, (0.3, 1.5, 3)), (5, 8, (0.1, 0.5, 1))),
    ],
)
def test_no_example_is_lost_or_doubled_when_a_run_becomes_longer(examples, batch, parts):
    seen, saved, taken = [], None, 0
    for epochs in parts:
        behind = fingerprint.behind(saved, examples=examples, batch=batch)
        steps = total_steps(examples, batch=batch, epochs=epochs, behind=behind)
        for step in range(taken, steps):
            seen += [*batch_indices(examples, batch=batch, seed=0, step=step, epochs=epochs, behind=behind)]
        saved, taken = earlier(steps, epochs=epochs, behind=behind), steps
    assert seen == [
        *np.concatenate([batch_indices(examples, batch=examples, seed=0, step=epoch) for epoch in range(parts[-1])])
    ]


def test_a_run_that_saw_more_examples_does_not_become_shorter_in_as_many_steps():
    saved = earlier(2, epochs=0.75)  # 18 of 24 examples, in batches of 16 and 2
    assert total_steps(24, batch=16, epochs=0.5, behind=fingerprint.behind(saved, examples=24, batch=16)) == 2
    with pytest.raises(RunMismatch, match="has seen 18 examples, but 12 are asked for .0.5 epochs of 24.: a run can be made"):
        fingerprint.check_epochs(saved, epochs=0.5, examples=24, batch=16)
    for epochs in (0.75, 1, None):
        fingerprint.check_epochs(saved, epochs=epochs, examples=24, batch=16)
    fingerprint.check_epochs(earlier(1, epochs=0.75), epochs=0.7, examples=24, batch=16)
    fingerprint.check_epochs(None, epochs=0.5, examples=24, batch=16)


def test_a_run_extended_before_its_end_is_as_if_it_had_always_been_longer():
    assert fingerprint.behind(earlier(2, epochs=1), examples=10, batch=4) == 0
    assert fingerprint.behind(earlier(3, epochs=1), examples=10, batch=4) == 2
    assert fingerprint.behind(earlier(5, epochs=2, behind=2), examples=10, batch=4) == 2
    assert fingerprint.behind(None, examples=10, batch=4) == 0


def test_the_reference_is_the_start_unless_another_is_named():
    config = Config(run=RunConfig(dir="r"))
    assert config.dpo_reference() == config.dpo_policy() == "r/sft/export"
    second = dataclasses.replace(config, dpo=DpoConfig(policy="first/dpo/export", reference="sft"))
    assert (second.dpo_policy(), second.dpo_reference(), second.eval_reference()) == ("first/dpo/export", "sft", "sft")
    assert dataclasses.replace(second, eval=EvalConfig(reference="x")).eval_reference() == "x"


def test_an_evaluation_takes_the_reference_that_the_run_was_trained_against(tmp_path):
    config = Config(run=RunConfig(dir=str(tmp_path)))
    assert eval_reference(config) == f"{tmp_path}/sft/export"
    (tmp_path / "dpo").mkdir()
    trained = dataclasses.replace(config, dpo=DpoConfig(policy="first/dpo/export", reference="first/sft/export"))
    (tmp_path / "dpo" / "config.yaml").write_text(dump_config(trained))
    assert eval_reference(config) == "first/sft/export"
    assert eval_reference(dataclasses.replace(config, eval=EvalConfig(reference="x"))) == "x"
    assert eval_reference(dataclasses.replace(config, eval=EvalConfig(policy="y"))) == f"{tmp_path}/sft/export"
