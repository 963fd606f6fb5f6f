"""Table 2: agreement and kappa by hand, intervals that cover, files of raters and judges, and books that add up."""

import dataclasses
import json
import os

import numpy as np
import pytest
from mutate import time_limit

from dpo_jax.cli import main as program
from dpo_jax.data.pairs import DataError
from dpo_jax.study.agreement import (
    agreement_over_items,
    among_people,
    counted,
    majority,
    table_2,
    votes_of,
    with_judge,
)
from dpo_jax.study.page import WORDINGS, Comparison, make_study
from dpo_jax.study.ratings import Judgment, read_key, read_raters, read_records, read_verdicts, sealed
from dpo_jax.untrusted import Unreadable

OTHER = {"a": "b", "b": "a", "tie": "tie", None: None}


def judged(*statements):
    return [Judgment(*statement.split()) for statement in statements]


# A study with known agreement, from the page's files to the table


NAMES = ("dpo", "ppo")


@pytest.fixture(scope="module")
def study():
    comparisons = [Comparison(f"prompt {n}", (f"first {n}", f"second {n}")) for n in range(300)]
    return make_study(comparisons, names=NAMES, title="t", wording=WORDINGS["summary"], raters=12, twice=0.5, seed=4)


@pytest.fixture
def key(study, tmp_path):
    path = tmp_path / "key.json"
    path.write_text(json.dumps(study.key))
    return read_key(path)


def rater_file(study, number, winner_of, *, rater=None, **changes):
    """What the page saves where the rater of a list prefers `winner_of(item)`: its choices are of sides, not of methods."""
    methods = {item["id"]: item["methods"] for item in study.key["items"]}
    ratings = []
    for item, first in study.page["raters"][number - 1]:
        shown = [methods[item][first], methods[item][1 - first]]
        winner = winner_of(item)
        choice = "same" if winner == "tie" else "AB"[shown.index(winner)]
        ratings.append({"item": item, "first": first, "choice": choice, "seconds": 3.2, "when": "2023-05-01T10:00:00Z"})
    head = {"kind": "dpo_jax ratings", "study": study.page["study"], "rater": rater or f"rater {number}", "number": number}
    saved = {"session": f"s{number}", "started": "2023-05-01T09:00:00Z", "saved": "2023-05-01T11:00:00Z"}
    return {**head, **saved, "ratings": ratings, **changes}


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_table_2_of_a_study_with_known_agreement(study, key, tmp_path):
    """People say what is better with probability 0.85, the judge with 0.75, independently: agreement is known exactly."""
    rng = np.random.default_rng(5)
    better = {item: "ab"[rng.random() > 0.6] for item in key.methods}

    def says(item, right):
        return better[item] if rng.random() < right else OTHER[better[item]]

    files = [
        write(tmp_path, f"{number}.json", rater_file(study, number, lambda item: says(item, 0.85))) for number in range(1, 13)
    ]
    raters = read_raters(files, key=key)
    verdicts = {item: says(item, 0.75) for item in key.methods}
    judgments = [judgment for file in raters for judgment in file.judgments]
    table = table_2(judgments, {"judge": verdicts}, seed=0)
    people, judge = table["people"], table["judges"]["judge"]
    assert (people["raters"], people["items"], people["kept"], people["ties"]) == (12, 300, 450, 0)
    share_a = np.mean([winner == "a" for winner in better.values()])

    def within(truth, estimate):
        assert estimate.low <= truth <= estimate.high, (truth, estimate)

    win = share_a * 0.85 + (1 - share_a) * 0.15
    within(win, people["win"])
    within(share_a * 0.75 + (1 - share_a) * 0.25, judge["win"])
    within(0.85**2 + 0.15**2, people["with_people"]["agree"])
    within(0.85 * 0.75 + 0.15 * 0.25, judge["with_people"]["agree"])
    chance = win**2 + (1 - win) ** 2
    within((0.85**2 + 0.15**2 - chance) / (1 - chance), people["with_people"]["kappa"])
    within(0.5, people["first"])  # sides were drawn, and these people look at the text alone
    assert people["with_people"]["agree"].trials == 150
    assert judge["with_people"]["agree"].trials == 450


def test_swapping_the_methods_mirrors_the_win_rates_and_nothing_else():
    rng = np.random.default_rng(6)
    judgments = [Judgment(str(n), f"r{r}", "abb"[rng.integers(3)]) for n in range(60) for r in range(3)]
    verdicts = {str(n): "ab"[rng.integers(2)] for n in range(60)}
    table = table_2(judgments, {"j": verdicts}, seed=0)
    mirrored = table_2(
        [j._replace(winner=OTHER[j.winner]) for j in judgments], {"j": {item: OTHER[w] for item, w in verdicts.items()}}, seed=0
    )
    for path in (("people", "win"), ("people", "majority_win")):
        here, there = (table_[path[0]][path[1]] for table_ in (table, mirrored))
        assert here.value == pytest.approx(1 - there.value)
        assert here.low == pytest.approx(1 - there.high)
    for one, other in (
        (table["people"], mirrored["people"]),
        (table["judges"]["j"], mirrored["judges"]["j"]),
    ):
        for measure in ("agree", "kappa"):
            here, there = (side["with_people"][measure] for side in (one, other))
            assert (here.value, here.trials) == (pytest.approx(there.value), there.trials)
            # Kappa's interval is resampled: its ends move in the second digit.
            assert here[1:3] == pytest.approx(there[1:3], abs=0.02 if measure == "kappa" else 1e-12)


def test_ties_are_set_aside_and_everything_is_counted():
    judgments = judged("1 ann a", "1 bob b", "2 ann a", "2 bob tie", "3 ann tie", "4 ann b", "5 cy a", "6 cy b")
    verdicts = {"1": "a", "2": "a", "4": "a", "5": None}
    table = table_2(judgments, {"gpt": verdicts}, seed=0)
    people, judge = table["people"], table["judges"]["gpt"]
    assert (people["read"], people["kept"], people["ties"], people["items"], people["raters"]) == (8, 6, 2, 6, 3)
    assert people["win"][0] == pytest.approx(3 / 6)
    assert people["with_people"]["agree"][::3] == (0, 1)  # only item 1 has two statements
    assert (judge["decided"], judge["undecided"], judge["unjudged"]) == (3, 1, 2)
    assert judge["decided"] + judge["undecided"] + judge["unjudged"] == judge["items"] == people["items"]
    # Of the six statements kept, those on 1 (twice), 2 and 4 meet a verdict, and two of the four are its.
    assert (judge["compared"], judge["not_compared"]) == (4, 2)
    assert judge["with_people"]["agree"].value == 0.5
    assert judge["win"].value == 1
    votes = votes_of(judgments)
    assert majority(votes) == {"1": "tie", "2": "a", "3": "tie", "4": "b", "5": "a", "6": "b"}
    assert judge["with_majority"]["agree"][::3] == (0.5, 2)  # 2 and 4
    np.testing.assert_array_equal(with_judge(votes, verdicts).sum(axis=0), [[2, 2], [0, 0]])
    assert counted(votes).sum() == people["kept"]


def test_two_people_keep_their_margins_and_more_are_exchangeable():
    two = judged(*(f"{n} ann a" for n in range(4)), "0 bob a", "1 bob b", "2 bob b", "3 bob b")
    np.testing.assert_array_equal(among_people(votes_of(two)).sum(axis=0), [[1, 3], [0, 0]])
    three = [*two, *judged("9 cy a", "9 ann a")]
    np.testing.assert_array_equal(among_people(votes_of(three)).sum(axis=0), [[2, 1.5], [1.5, 0]])


def test_no_data_no_figure():
    table = table_2(judged("1 ann a", "2 bob b"), {"gpt": {}}, seed=0)
    assert np.isnan(table["people"]["with_people"]["agree"].value)
    assert np.isnan(table["judges"]["gpt"]["win"].value)
    always_a = agreement_over_items(np.tile([[5.0, 0], [0, 0]], (3, 1, 1)), seed=0)
    assert (always_a["agree"].value, always_a["kappa"].trials) == (1, 15)
    assert np.isnan(always_a["kappa"][:3]).all()


# Files


def test_rater_files_give_back_what_was_meant(study, key, tmp_path):
    wanted = {item: ("a", "b", "tie")[n % 3] for n, item in enumerate(key.methods)}
    (file,) = read_raters([write(tmp_path, "r.json", rater_file(study, 3, wanted.get, rater="Zoë"))], key=key)
    assert (file.rater, file.number, file.assigned) == ("Zoë", 3, len(study.page["raters"][2]))
    assert {j.item: j.winner for j in file.judgments} == {item: wanted[item] for item, _ in study.page["raters"][2]}
    methods = {item["id"]: item["methods"] for item in study.key["items"]}
    leading = {item: methods[item][first] == "a" for item, first in study.page["raters"][2]}
    assert {j.item: j.leading for j in file.judgments} == leading


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"study": "0123456789abcdef"},
            r"r.json: study: bad_layout: of the study 0123456789abcdef, but the key is of \w+; give",
        ),
        ({"kind": "something"}, "r.json: kind: bad_layout: not 'dpo_jax ratings'"),
        ({"rater": " "}, "r.json: rater: empty: the rater has no name"),
        ({"rater": 7}, "r.json: rater: wrong_type"),
        ({"number": 13}, "r.json: number: out_of_range: 13 is not one of the 12 lists"),
        ({"ratings": {}}, "r.json: ratings: wrong_type: expected a list"),
        ({"ratings": [7]}, r"r.json: ratings\[0\].item: wrong_type: expected an object"),
    ],
)
def test_a_rater_file_that_does_not_fit_is_refused(study, key, tmp_path, change, expected):
    path = write(tmp_path, "r.json", rater_file(study, 1, lambda item: "a") | change)
    with pytest.raises(DataError, match=expected):
        read_raters([path], key=key)


@pytest.mark.parametrize(
    ("place", "change", "expected"),
    [
        (2, {"item": "999"}, r"ratings\[2\].item: out_of_range: '999' is not on the list of this rater"),
        (1, {"choice": "C"}, r"ratings\[1\].choice: out_of_range: must be one of A, B, same, is 'C'"),
        (0, {"first": 7}, r"ratings\[0\].first: out_of_range: text \d stood first, not 7"),
        (0, {"first": None}, r"ratings\[0\].first: wrong_type"),
    ],
)
def test_an_edited_rating_is_refused(study, key, tmp_path, place, change, expected):
    content = rater_file(study, 1, lambda item: "a")
    content["ratings"][place] |= change
    with pytest.raises(DataError, match=expected):
        read_raters([write(tmp_path, "r.json", content)], key=key)
    content = rater_file(study, 1, lambda item: "a")
    content["ratings"].append(content["ratings"][0])
    with pytest.raises(DataError, match=r"is rated twice; ask for the file as it was saved"):
        read_raters([write(tmp_path, "r.json", content)], key=key)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"kind":\n "dpo_jax', "r.json: JSONDecodeError: Unterminated string starting at: line 2 column 2"),
        ("[]", "r.json: ValueError: expected a JSON object, got an array"),
        ("\udcff", "r.json: not UTF-8: byte 0xff at byte 0"),
        ("[" * 20000, r"r.json: \w+: at least 101 levels deep; the limit is 100"),
        ('{"kind": 1, "kind": 2}', "r.json: \\w+: the key 'kind' occurs twice"),
        ('{"number": NaN}', "r.json: \\w+: NaN is not a JSON number"),
    ],
)
def test_a_damaged_file_is_named(key, tmp_path, text, expected):
    (tmp_path / "r.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=expected):
        read_raters([tmp_path / "r.json"], key=key)
    with pytest.raises(DataError, match=expected):
        read_key(tmp_path / "r.json")


def test_one_rater_twice_is_found_by_name_and_by_sitting(study, key, tmp_path):
    half = rater_file(study, 1, lambda item: "a", rater="Ann", saved="2023-05-01T10:30:00Z")
    half["ratings"] = half["ratings"][:5]
    first = write(tmp_path, "half.json", half)
    for name, session in (("ann", "another"), ("Anna", "s1"), ("A nn ", "spaces"), ("\uff21nn", "another width")):
        again = write(tmp_path, "full.json", rater_file(study, 1, lambda item: "a", rater=name, session=session))
        with pytest.raises(DataError, match=r"half.json \(Ann, 5 ratings; .*keep one of them, .*full.json was saved last"):
            read_raters([first, again], key=key)


def test_an_accent_in_two_encodings_is_one_name(study, key, tmp_path):
    files = [
        write(tmp_path, f"{number}.json", rater_file(study, number, lambda item: "a", rater=name, session=name))
        for number, name in enumerate(("Zo\u00eb", "Zoe\u0308"), start=1)
    ]
    with pytest.raises(DataError, match="rater: the same as in"):
        read_raters(files, key=key)


def test_a_byte_order_mark_is_no_damage_and_a_page_long_name_is(study, key, tmp_path):
    content = json.dumps(rater_file(study, 1, lambda item: "a", rater="Ann")).encode()
    (tmp_path / "r.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert read_raters([tmp_path / "r.json"], key=key)[0].rater == "Ann"
    (tmp_path / "key.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(study.key).encode())
    assert read_key(tmp_path / "key.json") == key
    (tmp_path / "r.json").write_bytes(content.replace(b'"Ann"', b'"' + b"x" * 1000 + b'"'))
    with pytest.raises(DataError, match="r.json: rater: out_of_range: a name of 1,000 characters"):
        read_raters([tmp_path / "r.json"], key=key)


@pytest.mark.parametrize("read", [read_records, read_verdicts])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "said.jsonl")
    with time_limit(5), pytest.raises(Unreadable, match="said.jsonl: expected a file, got a pipe"):
        read(tmp_path / "said.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        {"raters": [[["999", 0]]]},
        {"raters": [[["001", 2]]]},
        {"raters": [[["001", 0], ["001", 0]]]},
        {"raters": []},
        {"items": [{"id": "1"}]},
        {"items": [{"id": "001", "prompt": "p", "texts": ["x", "y"], "methods": ["a", "a"]}]},
        {"items": [{"id": "001", "prompt": "p", "texts": "xy", "methods": ["a", "b"]}]},
        {"names": None},
        {"names": {"a": "x", "b": 3}},
        {"study": 7},
        {"extra": 1},
        {"check": "0" * 16},
    ],
    ids=json.dumps,
)
def test_a_file_that_is_no_key_is_told(study, tmp_path, change):
    with pytest.raises(DataError, match="key.json: not a key that dpo-jax study wrote, or damaged .*make the study again"):
        read_key(write(tmp_path, "key.json", study.key | change))


def test_a_changed_letter_of_a_key_is_noticed(study, key, tmp_path):
    """It decides who won."""
    content = sealed(study.key)
    assert read_key(write(tmp_path, "key.json", content)) == key
    for place, item in enumerate(content["items"]):
        items = [*content["items"][:place], item | {"methods": item["methods"][::-1]}, *content["items"][place + 1 :]]
        with pytest.raises(DataError, match="check: bad_layout: the checksum is not that of the content"):
            read_key(write(tmp_path, "key.json", content | {"items": items}))


def test_records_of_any_origin(key, tmp_path):
    lines = ['{"item": "001", "winner": "a", "rater": "ann"}', "", '{"item": "001", "winner": "tie", "rater": "bob"}']
    path = write(tmp_path, "r.jsonl", "\n".join(lines))
    assert read_records(path, key=key) == judged("001 ann a", "001 bob tie") == read_records(path)
    for line, expected in (
        ('{"item": "001", "winner": "c", "rater": "x"}', r"r.jsonl:4: winner: out_of_range: must be a, b or tie, is 'c'"),
        ('{"item": "001", "winner": "a"}', r"r.jsonl:4: rater: missing_column"),
        ('{"item": "001", "winner": "b", "rater": "ann"}', r"r.jsonl:4: item: duplicate_key: ann has rated 001 in .*r.jsonl:1"),
        ('{"item": "x9", "winner": "b", "rater": "ann"}', r"r.jsonl:4: item: out_of_range: the study \w+ has no item 'x9'"),
        ('{"item": "001"', r"r.jsonl:4: invalid_json"),
    ):
        with pytest.raises(DataError, match=expected):
            read_records(write(tmp_path, "r.jsonl", "\n".join([*lines, line])), key=key)


def pair(prompt, policy, baseline, outcome):
    """A line of a judge's pairs.jsonl."""
    return {"uid": "1", "series": "s", "at": None, "prompt": prompt, "policy": policy, "baseline": baseline, "outcome": outcome}


def test_verdicts_find_their_items_by_what_was_compared(key, tmp_path):
    (one, (item, a, b)), (other, (second, c, d)), (_, (last, *_)) = list(key.texts.items())[:3]
    lines = [
        pair(one, b, a, "won"),  # the judge's policy is the second method
        pair(other, c, d, "flipped"),
        pair(other, c, d, "failed"),
        pair(one, a, "a text of another temperature", "won"),
        pair("a prompt of another study", a, b, "lost"),
        {"item": last, "winner": "a", "rater": "judge"},
    ]
    path = write(tmp_path, "v.jsonl", "\n".join(map(json.dumps, lines)))
    verdicts = read_verdicts(path, key=key)
    assert verdicts.winners == {item: "b", second: None, last: "a"}
    assert (verdicts.repeated, verdicts.foreign) == (1, 2)
    for line, expected in (
        (pair(one, a, b, "won"), rf"v.jsonl:7: outcome: duplicate_key: {item} has another verdict in .*v.jsonl:1;"),
        (pair(one, a, b, "tied"), r"v.jsonl:7: outcome: out_of_range: must be one of won, lost, flipped, failed, unanswered"),
        ({"prompt": one, "outcome": "won"}, r"v.jsonl:7: policy: missing_column"),
    ):
        with pytest.raises(DataError, match=expected):
            read_verdicts(write(tmp_path, "v.jsonl", "\n".join(map(json.dumps, [*lines, line]))), key=key)
    with pytest.raises(DataError, match="without a key of the study a verdict must name its item"):
        read_verdicts(path)
    with pytest.raises(DataError, match="none of its 1 verdicts is on a pair of this study; let the judge compare the same"):
        read_verdicts(write(tmp_path, "v.jsonl", json.dumps(lines[4])), key=key)


# The command


@pytest.fixture
def run_dir(study, tmp_path):
    folder = tmp_path / "run"
    (folder / "study" / "ratings").mkdir(parents=True)
    (folder / "study" / "key.json").write_text(json.dumps(study.key))
    return folder


def agree(run_dir, *flags):
    return program.main(["agree", "configs/quickstart.yaml", "--run.dir", str(run_dir), *flags])


def test_the_command_prints_the_table_and_what_it_left_out(study, run_dir, capsys):
    ratings = run_dir / "study" / "ratings"
    for number in (1, 2):
        write(ratings, f"{number}.json", rater_file(study, number, lambda item: "ab"[int(item) % 4 == 0]))
    unfinished = rater_file(study, 2, lambda item: "tie", rater="late", session="x")
    unfinished["ratings"] = unfinished["ratings"][:3]
    write(ratings, "late.json", unfinished)
    items = {item["id"]: item for item in study.key["items"]}
    verdicts = []
    for item in items.values():
        of = dict(zip(item["methods"], item["texts"], strict=True))
        verdicts.append(pair(item["prompt"], of["a"], of["b"], "won"))
    write(run_dir / "judge", "pairs.jsonl", "\n".join(map(json.dumps, verdicts)))
    assert agree(run_dir) == 0
    shown = capsys.readouterr().out
    assert "dpo / ppo" in shown
    assert f"late has rated 3 of {len(study.page['raters'][1])}" in shown
    assert "list 2 was rated by rater 2 and late" in shown
    assert "nobody has rated list 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 of 12" in shown
    column = json.loads((run_dir / "agree" / "agreement.json").read_text())
    people, judge = column["people"], column["judges"]["judge"]
    assert people["read"] == people["kept"] + people["ties"] == 3 + sum(map(len, study.page["raters"][:2]))
    assert judge["win"]["value"] == 1
    assert judge["with_people"]["agree"]["value"] == pytest.approx(people["win"]["value"])
    # A judge of the run who compared other texts is left out; one who was asked for is missed.
    other = write(run_dir / "judge", "pairs.jsonl", json.dumps(pair("another prompt", "x", "y", "won")))
    assert agree(run_dir) == 0
    shown = capsys.readouterr().out
    assert "note: " in shown
    assert "none of its 1 verdicts is on a pair of this study" in shown
    assert json.loads((run_dir / "agree" / "agreement.json").read_text()) == column | {"judges": {}}
    assert agree(run_dir, "--agree.judge", str(other)) == 65
    write(run_dir / "judge", "pairs.jsonl", "\n".join(map(json.dumps, verdicts)))
    assert agree(run_dir) == 0
    capsys.readouterr()
    # A second column, and a judge that the first has not.
    renamed = dataclasses.asdict(study)["key"] | {"names": {"a": "sft", "b": "ppo"}}
    second = run_dir.parent / "second"
    (second / "study").mkdir(parents=True)
    (second / "study" / "key.json").write_text(json.dumps(renamed))
    records = write(second, "records.jsonl", "\n".join(f'{{"item": "{n}", "winner": "b", "rater": "ann"}}' for n in items))
    flags = ("--agree.ratings", str(records), "--agree.beside", str(run_dir))
    assert agree(second, *flags) == 0
    shown = capsys.readouterr().out
    (judge_row,) = [line for line in shown.splitlines() if line.startswith("judge win %")]
    assert judge_row.split()[3] == "-"
    assert "sft / ppo" in shown
    assert "dpo / ppo" in shown


def test_what_is_missing_is_told(study, run_dir, capsys):
    for flags, expected in (
        ((), "agree.ratings:"),
        (
            ("--agree.ratings", str(run_dir / "study" / "key.json"), "--agree.key", "nowhere.json"),
            "agree.key: nowhere.json does not",
        ),
        (("--agree.judge", "a=x.jsonl,a=y.jsonl", "--agree.ratings", "RECORDS"), "agree.judge: two judges are called 'a'"),
        (("--agree.beside", "nowhere", "--agree.ratings", "RECORDS"), "agree.beside: nowhere/agree/agreement.json: "),
        (("--agree.ratings", "a,,b"), "agree.ratings: names nothing between two commas"),
    ):
        records = write(run_dir, "records.jsonl", '{"item": "001", "winner": "b", "rater": "ann"}')
        assert agree(run_dir, *(str(records) if flag == "RECORDS" else flag for flag in flags)) == 2
        assert expected in capsys.readouterr().err
    for column in ("[1]", '{"judges": {"j": 7}}', '{"names": '):
        write(run_dir / "agree", "agreement.json", column)
        assert agree(run_dir, "--agree.ratings", str(records), "--agree.beside", str(run_dir)) == 2
        shown = capsys.readouterr().err
        assert f"agree.beside: {run_dir}/agree/agreement.json: " in shown
        assert f"run dpo-jax agree --run.dir {run_dir} first" in shown
    os.mkfifo(run_dir / "study" / "ratings" / "pipe.json")
    assert agree(run_dir) == 2
    assert "ratings/pipe.json: not a file" in capsys.readouterr().err
    (run_dir / "study" / "ratings" / "pipe.json").unlink()
    write(run_dir / "study" / "ratings", "1.json", rater_file(study, 1, lambda item: "a") | {"study": "0" * 16})
    assert agree(run_dir) == 65
    assert "give its own key with --agree.key" in capsys.readouterr().err
    write(run_dir / "study" / "ratings", "notes.txt", "hello")
    assert agree(run_dir) == 2
    assert "notes.txt: neither .json" in capsys.readouterr().err
