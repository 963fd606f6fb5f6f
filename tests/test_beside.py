"""What stands beside the columns that are read: read, refused with the option that settles it, or counted in a note."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_columns import ASKED, BAD, CHAT, GOOD, SYSTEM, Q, option_in, written
from test_sources import load, turn
from test_sources import tokenizer as tokenizer

from dpo_jax.data.pairs import DataError
from dpo_jax.data.sources import peek

SUFFIXES = pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
FRUIT = {"prompt": "A fruit:", "completions": [" a brick", " an apple", " a tomato"]}


@SUFFIXES
@pytest.mark.parametrize(
    ("beside", "option", "best"),
    [
        ({"rewards": [0.1, 0.9, 0.5]}, "scores=rewards", " an apple"),
        ({"ratings": [1, 5, 3], "seed": 3}, "scores=ratings", " an apple"),
        ({"rank": [3, 1, 2]}, "ranks=rank", " an apple"),
        ({"labels": [True, True, False]}, "scores=", " a brick"),
    ],
)
def test_what_may_rank_completions_is_not_passed_over(beside, option, best, suffix, tmp_path):
    path = written(tmp_path / f"train.{suffix}", FRUIT | beside)
    for reading in (lambda: load(path, on_bad="drop", rows="any"), lambda: peek(path, "train")):
        with pytest.raises(DataError, match="unread_column") as refusal:
            reading()
        assert option_in(str(refusal.value)) == option
        assert ("stepwise supervision" in str(refusal.value)) == ("labels" in beside)
    assert load(path, columns=option, rows="rankings")[0].chosen == best
    assert load(path, columns="scores=", rows="rankings")[0].chosen == " a brick"


def test_what_ranks_no_completions_is_only_listed(tmp_path):
    row = FRUIT | {"labels": ["a", "b", "c"], "turns": [1, 2], "models": [], "label": 1}
    read = load(written(tmp_path / "train.jsonl", row, row | {"scores": [1, 2, 3], "turns": [1, 2, 3]}), rows="rankings")
    assert [ranking.chosen for ranking in read] == [" a brick", " a tomato"]
    assert read.report.notes[-1] == "columns that are not read: 'labels', 'turns', 'models', 'label'"


def test_lists_that_are_as_long_as_the_completions_by_chance_rank_nothing(tmp_path):
    row = FRUIT | {"tag_ids": [7, 8, 9], "num_tokens": [2, 3, 3], "years": [1990]}
    path = written(tmp_path / "train.jsonl", row, row, row | {"years": [1990, 1991, 1992]})
    assert [ranking.chosen for ranking in load(path, rows="rankings")] == [" a brick"] * 3
    path = written(tmp_path / "train.jsonl", row, FRUIT | {"rewards": [1, 2, 3]}, FRUIT | {"rewards": None})
    with pytest.raises(DataError, match=r"train.jsonl:2: unread_column: .* rank the completions: 'rewards'"):
        load(path, rows="rankings")


def test_a_list_of_a_fixed_size_ranks_too(tmp_path):
    table = pa.Table.from_pylist([FRUIT])
    table = table.append_column("rewards", pa.array([[0.1, 0.9, 0.5]], pa.list_(pa.float32(), 3)))
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match="rank the completions: 'rewards'"):
        load(tmp_path / "train.parquet", rows="rankings")


def as_text(row, names):
    return {name: json.dumps(value) if name in names else value for name, value in row.items()}


@SUFFIXES
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "completion": [GOOD], "label": True},
        {"messages": [ASKED, GOOD]},
        {"prompt": [ASKED], "completions": [[GOOD], [BAD]]},
    ],
    ids=" ".join,
)
def test_messages_in_json_texts_are_messages(row, suffix, tmp_path, tokenizer):
    texts = as_text(row, row.keys() - {"label"})
    if "completions" in row:
        texts["completions"] = list(map(json.dumps, row["completions"]))
    path = written(tmp_path / f"train.{suffix}", texts)
    read = load(path, rows="any", tokenizer=tokenizer)
    assert [*read] == [*load(written(tmp_path / f"train.{suffix}", row), rows="any", tokenizer=tokenizer)]
    assert read[0].chat
    assert "messages that are stored as JSON text are read as messages (1 of 1 rows)" in read.report.notes


def test_other_json_texts_stay_texts(tmp_path):
    row = {"prompt": '[{"role"', "chosen": '[{"name": "a"}]', "rejected": '{"role": "user", "content": "a"}'}
    read = load(written(tmp_path / "train.jsonl", row))
    assert (read[0].prompt, read[0].chosen, read[0].rejected) == tuple(row.values())
    assert len(read.report.notes) == 1


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps([{"role": "Batman", "actor": "Bale"}]),
        json.dumps([ASKED, GOOD]) + " is the list.",
        str([{"role": "user", "rights": "read"}]),
        str([ASKED, GOOD]) + " is the list.",
    ],
)
def test_an_answer_that_begins_like_messages_stays_a_text(answer, tmp_path):
    row = {"prompt": "List the roles as JSON", "chosen": answer, "rejected": "None."}
    assert load(written(tmp_path / "train.jsonl", row))[0].chosen == answer


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (str([ASKED, GOOD]), "train.jsonl:1: chosen: wrong_type: messages in Python's notation"),
        (json.dumps([ASKED, GOOD])[:-9], "train.jsonl:1: chosen: invalid_json: messages must be valid JSON"),
    ],
)
def test_texts_that_should_be_messages_are_refused(chosen, words, tmp_path):
    with pytest.raises(DataError, match=words):
        load(written(tmp_path / "train.jsonl", {"prompt": "a", "chosen": chosen, "rejected": "b"}))


SYSTEM_ROWS = {
    "pku": {"prompt": Q, "response_0": "A.", "response_1": "B.", "better_response_id": 0},
    "rewardbench": {"prompt": Q, "chosen": "A.", "rejected": "B.", "chosen_model": "a", "rejected_model": "b", "subset": "c"},
    "helpsteer3": {"context": [ASKED], "response1": "A.", "response2": "B.", "overall_preference": -2},
    "openai": {"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "hh": {side: f"\n\nHuman: {Q}\n\nAssistant: {side}" for side in ("chosen", "rejected")},
}


@SUFFIXES
@pytest.mark.parametrize("format", SYSTEM_ROWS)
def test_a_system_text_beside_public_formats_is_read_or_refused(format, suffix, tmp_path, tokenizer):
    row = SYSTEM_ROWS[format]
    path = written(tmp_path / f"train.{suffix}", row | {"system_prompt": "Be short."})
    with pytest.raises(DataError, match="a system text: 'system_prompt'") as refusal:
        load(path, on_bad="drop", tokenizer=tokenizer)
    assert option_in(str(refusal.value)) == "system=system_prompt"
    assert ("--data.format hh_chat --data.columns system" in str(refusal.value)) == (format == "hh")
    asked = "hh_chat" if format == "hh" else "auto"
    read, without = (
        load(path, format=asked, columns=f"system={name}", tokenizer=tokenizer)[0] for name in ("system_prompt", "")
    )
    assert (read.prompt, without.prompt) == (SYSTEM + CHAT, CHAT)
    plain = load(written(tmp_path / "train.jsonl", row), tokenizer=tokenizer)
    assert load(path, format=format, columns="system=", tokenizer=tokenizer)[0].prompt == plain[0].prompt
    with pytest.raises(DataError, match="need a tokenizer with a chat template"):
        load(path, format=asked, columns="system=system_prompt")


def test_a_system_text_for_which_a_format_has_no_place_is_refused(tmp_path):
    path = written(tmp_path / "train.jsonl", {"text": "A text.", "system": "Be short."})
    with pytest.raises(DataError, match="a system text: 'system'; give messages to read it, --data.columns system= goes"):
        load(path, rows="any")
    assert len(load(path, rows="any", columns="system=")) == 1
    assert len(load(written(tmp_path / "train.jsonl", {"text": "Be short. A text.", "system": "Be short."}), rows="any")) == 1


def test_another_system_text_than_that_of_the_messages_is_refused(tmp_path, tokenizer):
    row = {"prompt": [turn("system", "Be short."), ASKED], "chosen": [GOOD], "rejected": [BAD]}
    for said in ("Be short.", " ", "short"):
        assert load(written(tmp_path / "train.jsonl", row | {"system": said}), tokenizer=tokenizer)[0].prompt == SYSTEM + CHAT
    path = written(tmp_path / "train.jsonl", row | {"system": "Be long."})
    with pytest.raises(DataError, match="a system text, while the messages begin with another one: 'system'"):
        load(path, tokenizer=tokenizer)
    assert load(path, columns="system=", tokenizer=tokenizer)[0].prompt == SYSTEM + CHAT


TWICE = {side: [ASKED, answer] for side, answer in (("chosen", GOOD), ("rejected", BAD))}


@pytest.mark.parametrize(
    ("row", "words", "option"),
    [
        ({"prompt": [], **TWICE}, "prompt: empty: no messages; if", "prompt="),
        ({"prompt": "", "chosen": f"{Q} A.", "rejected": f"{Q} B."}, "prompt: no_prompt: the prompt is blank; if", "prompt="),
        ({"prompt": [turn("system", "S"), ASKED], **TWICE}, "chosen: different_prompts: it begins with the last turns", None),
        (
            {"prompt": Q, "chosen": ["A."], "rejected": ["B.", "C."]},
            "chosen: wrong_type: expected a list of messages, got a list of texts; ",
            "chosen=chosen.0",
        ),
    ],
)
def test_rows_of_odd_shapes_are_answered_with_a_remedy(row, words, option, tmp_path, tokenizer):
    path = written(tmp_path / "train.jsonl", row)
    with pytest.raises(DataError, match=words) as refusal:
        load(path, tokenizer=tokenizer)
    if option:
        assert option_in(str(refusal.value)) == option
        columns = option + (",rejected=rejected.0" if "chosen" in option else "")
        assert len(load(path, columns=columns, tokenizer=tokenizer)) == 1


@pytest.mark.parametrize(
    ("row", "mapped", "option"),
    [
        ({"prompt": Q, "good": ["A."], "bad": ["B."]}, "chosen=good,rejected=bad", "chosen=good.0,rejected=bad"),
        ({"prompt": " ", "good": f"{Q} A.", "bad": f"{Q} B."}, "chosen=good,rejected=bad", "chosen=good,rejected=bad,prompt="),
        ({"prompt": [], "good": TWICE["chosen"], "rejected": TWICE["rejected"]}, "chosen=good", "chosen=good,prompt="),
        ({"messages": ["A.", "B."]}, None, None),
        ({"prompt": [ASKED], "completions": [["A."], ["B."]]}, None, None),
        (SYSTEM_ROWS["helpsteer3"] | {"context": [Q]}, None, None),
    ],
)
def test_a_remedy_keeps_the_mapped_columns(row, mapped, option, tmp_path, tokenizer):
    with pytest.raises(DataError) as refusal:
        load(written(tmp_path / "train.jsonl", row), columns=mapped, rows="any", tokenizer=tokenizer)
    assert option_in(str(refusal.value)) == option if option else "got a list of texts\n" in f"{refusal.value}\n"
    assert ("--data.columns" in str(refusal.value)) == bool(option)


@SUFFIXES
def test_the_columns_of_rewardbench_may_hold_messages(suffix, tmp_path, tokenizer):
    about = {"chosen_model": "a", "rejected_model": "b", "subset": "c"}
    read = load(written(tmp_path / f"train.{suffix}", TWICE | {"prompt": Q} | about), tokenizer=tokenizer)
    assert (read.report.format, read[0].prompt, read[0].subset) == ("trl", CHAT, "c")


def unused(note):
    return note.startswith("the text in the column prompt is not in the messages")


@pytest.mark.parametrize(
    ("prompt", "used"),
    [
        (Q, True),
        (f"Be  short.\n{Q}\n", True),
        (f"system: Be short.\nuser: {Q}", True),
        ("Be short.", True),
        (" ", True),
        (None, True),
        ("You are a pirate.", False),
        (f"You are a pirate. {Q}", False),
    ],
)
def test_a_text_prompt_that_is_not_in_the_messages_is_told(prompt, used, tmp_path, tokenizer):
    asked = [turn("system", "Be short."), ASKED]
    row = {"prompt": prompt, "chosen": [*asked, GOOD], "rejected": [*asked, BAD]}
    read = load(written(tmp_path / "train.jsonl", row), tokenizer=tokenizer)
    assert read[0].prompt == SYSTEM + CHAT
    assert [*filter(unused, read.report.notes)] == (
        [] if used else ["the text in the column prompt is not in the messages and is not used (1 of 1 pairs)"]
    )


REPEATED = {
    "pairs": {"chosen": f"{Q} An apple.", "rejected": f"{Q} A brick."},
    "unpaired": {"completion": f"{Q} An apple.", "label": True},
    "rankings": {"completions": [f"{Q} An apple.", f" {Q} A tomato.", f"{Q} A brick."]},
    "demonstrations": {"completion": f"{Q} An apple."},
}


@pytest.mark.parametrize("rows", REPEATED)
@pytest.mark.parametrize("columns", [None, "system=system"])
def test_a_repeated_prompt_is_removed_in_every_kind_of_row(rows, columns, tmp_path, tokenizer):
    row = REPEATED[rows] | {"prompt": Q} | ({"system": "Be short."} if columns else {})
    path = written(tmp_path / "train.jsonl", row, row | {"prompt": f"{Q}\n"}, row | {"prompt": f" {Q} "})
    read = load(path, rows=rows, columns=columns, tokenizer=tokenizer)
    assert [(one.prompt.strip(), one.chosen.strip(), *one.between) for one in read][0] == (
        *((SYSTEM + CHAT).strip() if columns else Q, "An apple."),
        *((" A tomato.",) if rows == "rankings" else ()),
    )
    assert not any(Q in text for one in read for text in (one.chosen, one.rejected))
    assert "the prompt is removed from the completions of all 3 rows, which repeat it" in read.report.notes


def test_a_row_that_does_not_repeat_its_prompt_where_most_do_is_named(tmp_path):
    row = REPEATED["unpaired"] | {"prompt": Q}
    odd, bad = row | {"completion": "An apple."}, row | {"completion": 3}
    path = written(tmp_path / "train.jsonl", *[row] * 9, odd, bad)
    words = r"train.jsonl:10: completion: different_prompts: 9 of the first 10 rows repeat .*\n.*:11: .*expected a string"
    with pytest.raises(DataError, match=words):
        load(path, rows="unpaired")
    read = load(path, rows="unpaired", on_bad="drop")
    assert (len(read), read.report.dropped) == (9, {"different_prompts": 1, "wrong_type": 1})


@pytest.mark.parametrize("counts", [(8, 2), (2, 1)])
def test_prompts_stay_where_fewer_rows_repeat_them(counts, tmp_path):
    row = REPEATED["unpaired"] | {"prompt": Q}
    rows = [row] * counts[0] + [row | {"completion": "An apple."}] * counts[1]
    read = load(written(tmp_path / "train.jsonl", *rows), rows="unpaired")
    assert [one.chosen for one in read] == [row["completion"] for row in rows]
    told = f"{counts[0]} of {sum(counts)} rows repeat their prompt in the completions; they are left unchanged"
    assert told in read.report.notes


PAIR = {"prompt": Q, "chosen": "An apple.", "rejected": "A brick."}


@SUFFIXES
@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"initial_reason_steps": "Step 1:"}, "--data.columns prompt=prompt+initial_reason_steps reads it"),
        ({"context": "Fruit grows."}, "--data.columns prompt=context+prompt reads it"),
        ({"history": [["Hi", "Hello"]]}, "to read it, give messages"),
        ({"functions": [{"name": "pick", "description": "Pick fruit"}]}, "to read it, give messages"),
        ({"history": []}, None),
        ({"context": Q, "full_prompt": f"user: {Q}"}, None),
        ({"prompt_id": "a b", "chosen_text": "More.", "answer": "Pear.", "source": "a page"}, None),
    ],
    ids=str,
)
def test_what_may_belong_to_the_prompt_is_named(beside, told, suffix, tmp_path):
    path = written(tmp_path / f"train.{suffix}", PAIR | beside, PAIR | beside)
    notes = [note for note in load(path).report.notes if "may belong" in note]
    [name] = [*beside][:1]
    assert notes == ([f"{name!r} may belong to the prompt, but is left out; {told} (2 of 2 rows)"] if told else [])
    if told and "--data" in told:
        [pair, _] = load(path, columns=option_in(notes[0]))
        assert beside[name] in pair.prompt


def test_messages_that_are_not_in_the_prompt_are_named(tmp_path, tokenizer):
    before = [turn("user", "Hi"), turn("assistant", "Hello")]
    rows = [PAIR | {"thread": thread} for thread in ([*before, ASKED], [ASKED, turn("assistant", "An apple.")])]
    notes = load(written(tmp_path / "train.jsonl", *rows), tokenizer=tokenizer).report.notes
    assert "'thread' may belong to the prompt, but is left out; to read it, give messages (1 of 2 rows)" in notes


def test_what_stands_beside_whole_conversations_needs_messages(tmp_path, tokenizer):
    answers = {"prompt": Q, "chosen": [GOOD], "rejected": [BAD]}
    for row, told in ((TWICE | {"prompt": Q}, "to read it, give messages"), (answers, "--data.columns prompt=context+prompt")):
        path = written(tmp_path / "train.jsonl", row | {"context": "Fruit grows."})
        [note] = [note for note in load(path, tokenizer=tokenizer).report.notes if "may belong" in note]
        assert f"'context' may belong to the prompt, but is left out; {told}" in note


@SUFFIXES
def test_scores_that_contradict_the_preference_are_counted(suffix, tmp_path):
    scores = [(2, 1), (1, 1), (0.5, 1.5), (3, 3), (None, 1), (float("inf"), 2)][: None if suffix == "parquet" else 5]
    rows = [PAIR | {"chosen_avg-rating": better, "rejected_avg-rating": worse, "score_a": 1} for better, worse in scores]
    read = load(written(tmp_path / f"train.{suffix}", *rows))
    assert len(read) == len(rows)
    notes = [note.split(" (") for note in read.report.notes if "completion" in note]
    told = {first: last for first, _, last in notes}
    assert told == {
        "both completions have the same score": f"2 of {len(rows)} rows)",
        "the rejected completion has the higher score": f"1 of {len(rows)} rows)",
    }


LISTS = {
    "Nectar": ({"prompt": Q, "answers": [{"answer": "B.", "rank": 2.0}, {"answer": "A.", "rank": 1.0}]}, "completions=answers"),
    "UltraFeedback": (
        {"instruction": Q, "completions": [{"response": "B.", "overall_score": 2}, {"response": "A.", "overall_score": 4.5}]},
        "prompt=instruction",
    ),
    "two texts": (
        {"instruction": "Name", "input": "a fruit.", "output": ["A.", "B."]},
        "prompt=instruction+input,chosen=output.0,rejected=output.1",
    ),
    "prompts and two texts": ({"prompt": Q, "responses": ["A.", "B."]}, "chosen=responses.0,rejected=responses.1"),
}


@pytest.mark.parametrize("name", LISTS)
def test_completions_in_a_list_are_answered_with_the_option_that_reads_them(name, tmp_path):
    row, option = LISTS[name]
    path = written(tmp_path / "train.jsonl", row)
    with pytest.raises(DataError) as refusal:
        load(path)
    assert option_in(str(refusal.value)) == option
    assert [(pair.chosen, pair.rejected) for pair in load(path, columns=option)] == [("A.", "B.")]


def test_prompts_alone_where_pairs_are_needed_name_the_other_columns(tmp_path):
    about = {"prompt_id": "a", "score": 3}
    path = written(tmp_path / "train.jsonl", {"prompt": Q, "response": "A.", "draft": "B."} | about)
    hint = "if other columns hold the completions ('response', 'draft'), write chosen and rejected from them"
    with pytest.raises(DataError, match=f"{re.escape(hint)}$"):
        load(path)
    assert peek(path, "train").hint == hint
    assert peek(written(tmp_path / "train.jsonl", {"prompt": Q} | about), "train").hint is None
    assert len(load(path, rows="prompts")) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "A."}, "completions: missing_column: these objects do not all have one of rank, score"),
        ({"text": "A.", "score": "high"}, "completions.1.score: wrong_type: expected a number"),
        ({"score": 1}, "completions.1.text: missing_column"),
        ({"text": 3, "score": 1}, "completions.1.text: wrong_type: expected a string"),
    ],
)
def test_bad_objects_of_a_ranking_are_named(change, words, tmp_path):
    row = {"prompt": Q, "completions": [{"text": "B.", "score": 2}, change]}
    with pytest.raises(DataError, match=words):
        load(written(tmp_path / "train.jsonl", row), rows="any")


def test_scores_of_its_own_rank_a_list_of_objects(tmp_path):
    row = {"prompt": Q, "completions": [{"text": "B.", "score": 2}, {"text": "A.", "score": 1}], "seeds": [1, 2]}
    assert load(written(tmp_path / "train.jsonl", row), rows="rankings")[0].chosen == "B."
    assert load(written(tmp_path / "train.jsonl", row | {"scores": [1, 2]}), rows="rankings")[0].chosen == "A."
