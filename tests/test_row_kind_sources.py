"""Single completions and rankings as conversations of several turns, from several sources, and with refreshed references."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML, chat_tokenizer
from test_row_kinds import BAD, FRUIT, GOOD, example, load

from dpo_jax.cli import splits
from dpo_jax.cli.config import Config, DataConfig, DpoConfig, MixConfig, RunConfig
from dpo_jax.cli.preflight import inputs
from dpo_jax.cli.preflight.scope import Scope
from dpo_jax.data.encode import Encoded
from dpo_jax.data.groups import group_pairs
from dpo_jax.data.layout import Layout
from dpo_jax.data.loader import plan_layout
from dpo_jax.data.pairs import DataError
from dpo_jax.data.prepare import data_digest, encode_all, encode_targets
from dpo_jax.data.repeats import find_repeats
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tfds import write_tfds
from dpo_jax.data.unpaired import mismatched
from dpo_jax.training.refresh import RefreshedReference

LIMITS: dict[str, Any] = {"max_length": 200, "max_prompt_length": 60}
PAIR = {"prompt": "Name a fruit.", "chosen": " An apple.", "rejected": " A brick."}


def asked(text):
    return [{"role": "user", "content": text}]


def said(text):
    return {"role": "assistant", "content": text}


SEVERAL = [said("4"), *asked("And 3 + 3?"), said("6, not 7")]
ROWS = [
    {"prompt": asked("2 + 2?"), "completion": SEVERAL, "label": True},
    {"prompt": asked("5 + 5?"), "completion": [said("10")], "label": False},
    {"prompt": asked("Hi"), "completion": [said("Ha"), *asked("What?"), said("Ho"), *asked("Bye")], "label": False},
]


@pytest.fixture(scope="module")
def chatty():
    return chat_tokenizer(CHATML)


def counted(tokenizer, ids, scored):
    """The texts of each run of scored tokens."""
    flags = np.ones(len(ids), bool) if scored is None else scored
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(flags)) + 1)
    return [tokenizer.decode(ids[run]) for run in runs if flags[run[0]]]


# Turns


def test_of_a_single_completion_the_turns_of_the_assistant_count_and_of_a_mismatched_one_as_well(tmp_path, chatty):
    read = load(tmp_path, *ROWS, rows="unpaired", tokenizer=chatty)
    assert any("turns after the assistant's last one are left out (1 of 3 pairs)" in note for note in read.report.notes)
    own = [["4<|im_end|>", "6, not 7<|im_end|>"], ["10<|im_end|>"], ["Ha<|im_end|>", "Ho<|im_end|>"]]
    encoded = encode_all(read, chatty, **LIMITS)
    assert [counted(chatty, one.chosen, one.chosen_scored) for one in encoded] == own
    assert [counted(chatty, one.rejected, one.rejected_scored) for one in encoded] == [own[1], own[2], own[1]]
    [text] = encode_targets(read, chatty, **LIMITS)[0]
    assert counted(chatty, *text[1:3]) == own[0]


def test_both_sides_of_a_split_pair_keep_their_turns(tmp_path, chatty):
    row = {"prompt": asked("2 + 2?"), "chosen": SEVERAL, "rejected": [said("5")]}
    chosen, rejected = load(tmp_path, row, rows="unpaired", tokenizer=chatty)
    [pair] = encode_all(load(tmp_path, row, tokenizer=chatty), chatty, **LIMITS)
    assert chosen.chosen_spans == chosen.rejected_spans
    assert rejected.chosen_spans is None
    alone = encode_all(load(tmp_path, row, rows="unpaired", tokenizer=chatty), chatty, **LIMITS)
    for one, side in zip(alone, pair.sides, strict=True):
        np.testing.assert_array_equal(one.sides[0][0], side[0])
        np.testing.assert_array_equal(one.sides[0][1], side[1])


def test_a_cut_that_leaves_context_only_scores_what_is_left():
    ids = [np.int32([i, i, i, 0]) for i in range(1, 5)]
    marks = np.array([False, False, True, True])
    one = Encoded(ids[0], ids[1], ids[1], desirable=True)
    other = Encoded(ids[2], ids[3], ids[3], desirable=False, chosen_scored=marks)
    assert mismatched([one, other], max_length=8)[0].rejected_scored.tolist() == marks.tolist()
    cut = mismatched([one, other], max_length=6)[0]
    assert cut.rejected.tolist() == [4, 4]
    assert cut.rejected_scored is None


def test_marks_tell_single_completions_apart():
    marks = np.array([True, False, True])
    ids = np.int32([5, 6, 0])
    plain, marked = (Encoded(ids, ids, ids, uid=f"{m}", desirable=True, chosen_scored=m) for m in (None, marks))
    assert data_digest([plain]) != data_digest([marked])
    assert find_repeats([plain, marked]).duplicates.pairs == 0
    assert find_repeats([marked, marked]).duplicates.pairs == 1


@pytest.mark.parametrize("rows", ["rankings", "pairs"])
def test_a_ranking_of_several_turns_is_refused(rows, tmp_path, chatty):
    row = {"prompt": asked("2 + 2?"), "completions": [[said("4")], SEVERAL]}
    with pytest.raises(DataError, match=r"train\.jsonl:1: completions\.1: too_long: .*several turns.*one"):
        load(tmp_path, row, rows=rows, tokenizer=chatty)


def test_texts_beside_messages_are_turns(tmp_path, chatty):
    [mixed] = load(tmp_path, ROWS[1] | {"completion": "10"}, rows="any", tokenizer=chatty)
    [whole] = load(tmp_path, ROWS[1], rows="any", tokenizer=chatty)
    assert mixed == whole
    assert mixed.chat


def test_pairs_of_a_ranking_keep_the_digest_of_their_prompt(tmp_path, chatty):
    row = {"prompt": asked("2 + 2?"), "completions": [[said(text)] for text in ("4", "5", "22")]}
    [ranking] = load(tmp_path, row, rows="rankings", tokenizer=chatty)
    pairs = load(tmp_path, row, tokenizer=chatty)
    assert ranking.prompt_digest
    assert {pair.prompt_digest for pair in pairs} == {ranking.prompt_digest}


@pytest.mark.parametrize("kind", ["plain", "shared", "packed"])
def test_rows_are_planned_for_masks_and_any_number_of_completions(kind):
    marks = np.array([True, False, False, True])
    single = Encoded(np.int32([5, 6]), np.int32([7, 8, 9, 0]), np.int32([4, 0]), desirable=True, chosen_scored=marks)
    layout = plan_layout([single] * 3, kind=kind, batch=2, length=12)
    rows = layout.rows([single])
    assert int((rows.slot < rows.slots).sum()) == 4  # two of each completion
    ranking = example(3, 0)
    tight = Layout("plain", length=40, scored=max(map(len, ranking.completions)))
    assert tight.rows([ranking]).tokens.shape[0] == 3


def test_groups_are_of_pairs():
    with pytest.raises(ValueError, match="7 is a ranking of 3 completions, not a pair"):
        group_pairs([example(2, 1), example(3, 7)])


# Sources


def mixture(tmp_path, *, loss_rows, **data):
    for name, rows in loss_rows.items():
        (tmp_path / name).mkdir(exist_ok=True)
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = tuple(MixConfig(str(tmp_path / name)) for name in loss_rows)
    return Config(run=RunConfig(dir=str(tmp_path / "run")), data=DataConfig(mix=parts, **data))


@pytest.mark.parametrize("rows", ["unpaired", "any"])
def test_pairs_beside_single_completions_are_single_completions(rows, tmp_path):
    config = mixture(tmp_path, loss_rows={"singles": [GOOD, BAD], "pairs": [PAIR]})
    loaded = splits.load_split(config, "train", rows=rows)
    assert sorted((one.uid.partition(":")[0], one.desirable) for one in loaded) == [
        *(("pairs", False), ("pairs", True), ("singles", False), ("singles", True)),
    ]
    assert loaded.report.sources["pairs"].kept == 2


def test_each_source_must_state_what_the_loss_reads(tmp_path):
    config = mixture(tmp_path, loss_rows={"pairs": [PAIR], "singles": [GOOD]})
    with pytest.raises(DataError, match=r"data\.mix, .*singles: .*pairs are needed here: .* as dpo\.loss: kto"):
        splits.load_split(config, "train")
    with pytest.raises(DataError, match=r"data\.mix, .*pairs: .*rankings are needed here"):
        splits.load_split(config, "train", rows="rankings")


@pytest.mark.parametrize(
    ("loss", "told"), [("dpo", "singles .*pairs are needed"), ("plackett_luce", "pairs .*rankings are needed")]
)
def test_a_check_looks_at_the_rows_of_each_source(loss, told, tmp_path):
    config = mixture(tmp_path, loss_rows={"pairs": [PAIR], "singles": [GOOD]})
    config = dataclasses.replace(config, dpo=DpoConfig(loss=loss))
    with pytest.raises(DataError, match=told):
        inputs.data("train")(inputs.Check("dpo", config, Scope()))
    both = dataclasses.replace(config, dpo=DpoConfig(loss="kto"))
    inputs.data("train", "test")(found := inputs.Check("dpo", both, Scope()))
    assert [what for what, _ in found.told] == ["data", "data"]
    assert found.rows is None


@pytest.mark.parametrize(("loss", "rows"), [("dpo", 7), ("kto", None)])
def test_a_check_counts_no_pairs_as_single_completions(loss, rows, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(7)))
    config = Config(data=DataConfig(path=str(tmp_path)), dpo=DpoConfig(loss=loss))
    inputs.data("train")(found := inputs.Check("dpo", config, Scope()))
    assert found.rows == rows


def test_rankings_of_all_sources_have_one_length(tmp_path):
    shorter = FRUIT | {"completions": [" A pear.", " A wall."], "ranks": [1, 2]}
    config = mixture(tmp_path, loss_rows={"long": [FRUIT], "short": [shorter]})
    with pytest.raises(
        DataError,
        match=r"data\.mix: the rankings of a run must have the same number(.|\n)*2 completions: 1(.|\n)*3 completions: 1",
    ):
        splits.load_split(config, "train", rows="rankings")
    cut = mixture(tmp_path, loss_rows={"long": [FRUIT], "short": [shorter]}, ranking_length=2)
    assert [one.between for one in splits.load_split(cut, "train", rows="rankings")] == [(), ()]


def test_a_prompt_has_all_its_single_completions_on_one_side(tmp_path):
    rows = [row | {"prompt": f"{i}?"} for i in range(40) for row in (GOOD, BAD)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(run=RunConfig(dir=str(tmp_path)), data=DataConfig(path=str(file), test_share=0.3))
    train, test = (splits.load_split(config, split, rows="unpaired") for split in ("train", "test"))
    assert len(train) + len(test) == 80
    assert test
    assert not {one.prompt for one in train} & {one.prompt for one in test}


@pytest.mark.parametrize(("row", "rows"), [(GOOD, "unpaired"), (FRUIT, "rankings")])
def test_a_tfds_folder_takes_pairs_only(row, rows, tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl:1: no_pair: a TFDS folder holds pairs"):
        write_tfds({"train": load(tmp_path, row, rows=rows)}, tmp_path / "tfds")


# Refreshed references


@pytest.mark.parametrize("completions", [2, 3])
@pytest.mark.parametrize("first_host", [True, False])
def test_references_of_all_completions_move(completions, first_host, tmp_path, monkeypatch):
    label = {"desirable": True} if completions == 2 else {}
    examples = [example(completions, number, **label) for number in range(5)]
    monkeypatch.setattr("dpo_jax.training.refresh.is_first", lambda: first_host)
    refresh = RefreshedReference(
        2,
        pairs=examples,
        values=np.ones((5, completions), np.float32),
        total_steps=4,
        read_by=lambda step: [step, step + 1],
        score=lambda variables, rows: variables["start"] + rows.index[:, None] + np.arange(completions) / 10,
        folder=tmp_path,
        layout=plan_layout(examples, kind="plain", batch=2, multiple=completions),
        batch=2,
        say=lambda line: None,
    )
    refresh.update(2, {"start": np.float32(-50)}, "digest", steps=[])
    told = np.isfinite(refresh.values)
    assert told.all(axis=1).tolist() == told.any(axis=1).tolist() == [False, False, True, True, True]
    # What other hosts hold is replaced by what the first one has found.
    steps = np.arange(completions) / 10 if first_host else np.zeros(completions)
    np.testing.assert_allclose(refresh.values[2] - refresh.values[2, 0], steps, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "row"),
    [
        ("unpaired", {"prompt": "2 + 2?", "completion": "4", "label": True}),
        ("rankings", {"prompt": "2 + 2?", "completions": ["4", "5", "6"]}),
    ],
)
def test_a_system_text_beside_them_is_read_or_refused(rows, row, chatty, tmp_path):
    """As beside pairs: never lost in silence, rendered by the template where it is mapped, left out where that is asked for."""
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(row | {"system": "Be brief."}) + "\n")
    options = {"tokenizer": chatty, "rows": rows}
    with pytest.raises(DataError, match=r"a system text: 'system'; --data.columns system=system reads it"):
        load_preferences(file, "train", **options)
    (read,) = load_preferences(file, "train", columns="system=system", **options)
    (without,) = load_preferences(file, "train", columns="system=", **options)
    assert read.chat
    assert read.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?")
    assert read.chosen.startswith("4")
    assert (without.prompt, without.chat) == ("2 + 2?", False)
