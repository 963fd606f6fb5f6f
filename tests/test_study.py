"""The page for raters: what it shows, what it must not show, who gets which comparison, and what became of every row."""

import base64
import fnmatch
import hashlib
import itertools
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.cli import main as program
from dpo_jax.data.completion_files import Completion, read_completions
from dpo_jax.data.pairs import DataError, DataReport
from dpo_jax.judge.questions import Pair, question_of
from dpo_jax.study.page import WORDINGS, Comparison, deal, draw, join, make_study, one_each, render
from dpo_jax.study.ratings import KIND, read_key, read_verdicts

ROOT = Path(__file__).parent.parent
AWKWARD = [
    "</script><script>alert(1)</script>",
    "<!-- <script> -->",
    "<img src=x onerror=alert(1)> &lt; &amp;",
    "{{POLICY}} {{STUDY}} \\1 \\g<0>",
    "line\u2028separator\u2029 \"quotes\" 'and' \\back\\slashes\n\ttabs",
    "naïve ✓ 漢字 עברית 🙂",
]


def comparisons_of(count):
    return [Comparison(f"prompt {n}", (f"one of {n}", f"other of {n}")) for n in range(count)]


def make(comparisons, **changes):
    options = {"names": ("dpo-run-7", "the-baseline"), "title": "Which?", "wording": WORDINGS["summary"], "seed": 0}
    return make_study(comparisons, **{**options, "raters": 1, "twice": 0.0, **changes})


def completions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Who gets what


@pytest.mark.parametrize(("items", "raters", "twice"), [(7, 1, 0), (150, 12, 1), (101, 7, 0.3), (12, 12, 0.5), (40, 2, 1)])
def test_every_comparison_is_dealt_as_often_as_was_asked_for(items, raters, twice):
    lists = deal(items, raters, twice=twice, rng=np.random.default_rng(0))
    times = np.bincount(list(itertools.chain(*lists)), minlength=items)
    assert sorted(set(times)) == sorted({1, 2} if 0 < twice < 1 else {2 if twice else 1})
    assert (times == 2).sum() == round(twice * items)
    assert all(len(set(held)) == len(held) for held in lists)  # nobody rates anything twice
    assert max(map(len, lists)) - min(map(len, lists)) <= 1
    if twice == 1 and raters > 2:
        shared = [len(set(one) & set(other)) for one, other in itertools.combinations(lists, 2)]
        assert max(shared) - min(shared) <= 2


def test_two_cannot_share_what_one_rates():
    with pytest.raises(ValueError, match="there is one rater"):
        deal(4, 1, twice=0.5, rng=np.random.default_rng(0))


def test_sides_are_even_and_recorded():
    study = make(comparisons_of(101), raters=4, twice=1.0)
    methods = {item["id"]: item["methods"] for item in study.key["items"]}
    for assigned in study.key["raters"]:
        leading = [methods[item][first] for item, first in assigned]
        assert abs(leading.count("a") - leading.count("b")) <= 1
    assert study.key["raters"] == study.page["raters"]


def test_the_key_tells_what_the_page_does_not():
    comparisons = comparisons_of(40)
    study = make(comparisons)
    originals = {comparison.prompt: comparison for comparison in comparisons}
    for item, hidden in zip(study.page["items"], study.key["items"], strict=True):
        shown = dict(zip(hidden["methods"], item["texts"], strict=True))
        assert (shown["a"], shown["b"]) == originals[item["prompt"]].completions
        assert set(item) == {"id", "prompt", "texts"}
    assert study.page["study"] == study.key["study"]
    secrets = ("dpo-run-7", "the-baseline", "methods", "names", '"a"', '"b"', "seed")
    assert not [word for word in secrets if word in json.dumps(study.page)]
    assert embedded(render(study.page)) == study.page
    # Order and ids are of the shuffle, not of the files.
    prompts = [item["prompt"] for item in study.page["items"]]
    assert sorted(prompts) == sorted(originals)
    assert prompts != list(originals)
    assert [item["id"] for item in study.page["items"]] == [f"{n:03}" for n in range(1, 41)]


def test_people_are_shown_the_prompt_that_a_judge_is_shown(tmp_path):
    """Without the words that ask for a completion; and the judge's verdicts are still found by the prompt as it was."""
    prompts = ["POST: It rains.\nTL;DR:", "\n\nHuman: Hello?\n\nAssistant:", "TL;DR: is what I want\n"]
    study = make([Comparison(prompt, (f"{n}", f"not {n}")) for n, prompt in enumerate(prompts)])
    shown = {item["prompt"] for item in study.page["items"]}
    assert shown == {"POST: It rains.", "Human: Hello?", "TL;DR: is what I want"}
    for item, prompt in (
        (hidden["prompt"], page["prompt"]) for hidden, page in zip(study.key["items"], study.page["items"], strict=True)
    ):
        pair = Pair("x:1", "x", None, item, "a", "b")
        assert (
            f"Post:\n{prompt}\n\nSummary A"
            in question_of(pair, prompt="summary-simple", a="policy", fence=False).messages[0]["content"]
        )
    (tmp_path / "key.json").write_text(json.dumps(study.key))
    lines = [{"prompt": prompt, "policy": f"{n}", "baseline": f"not {n}", "outcome": "won"} for n, prompt in enumerate(prompts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdicts = read_verdicts(tmp_path / "pairs.jsonl", key=read_key(tmp_path / "key.json"))
    assert (list(verdicts.winners.values()), verdicts.foreign) == (["a", "a", "a"], 0)


def test_where_a_text_stands_says_nothing_of_whose_it_is():
    sides = [item["methods"][0] == "a" for item in make(comparisons_of(2000)).key["items"]]
    assert abs(np.mean(sides) - 0.5) < 0.04
    # With the seed alone nobody can draw the sides again: other texts, other sides.
    other = [item["methods"][0] == "a" for item in make(comparisons_of(2000)[::-1]).key["items"]]
    assert abs(np.mean(np.equal(sides, other)) - 0.5) < 0.04


def test_the_same_study_twice_and_another_by_any_change():
    comparisons = comparisons_of(20)
    study = make(comparisons)
    assert make(comparisons) == study
    changes = {"seed": 1, "title": "Other", "wording": WORDINGS["dialogue"], "raters": 2, "names": ("x", "y")}
    others = [make(comparisons, **{name: value}) for name, value in changes.items()] + [make(comparisons[::-1])]
    assert len({study.key["study"], *(other.key["study"] for other in others)}) == len(others) + 1


# The page


def embedded(html):
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', html, re.DOTALL)[1])


def test_texts_are_data_whatever_they_say():
    comparisons = [Comparison(f"{n} {text}", (text, text[::-1])) for n, text in enumerate(AWKWARD)]
    study = make(comparisons, title=AWKWARD[0])
    html = render(study.page)
    assert embedded(html) == study.page
    assert len(re.findall("<script", html)) == len(re.findall("</script>", html)) == 2
    assert "alert(1)" in html
    assert "<img" not in html


def test_the_page_needs_and_reaches_nothing_outside():
    html = render(make(comparisons_of(3)).page)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        [inline] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|sendBeacon|WebSocket|innerHTML|\bstyle=", html)
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,"]  # an empty icon: browsers would ask for one
    assert f'"{KIND}"' in html
    assert "{{" not in html


def test_what_is_no_python_is_part_of_the_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dpo_jax"]
    others = [path for path in (ROOT / "dpo_jax").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    others = [
        path for path in others if path.parent.name == "templates" or path.suffix not in (".md", ".png")
    ]  # of the READMEs
    names = {path.relative_to(ROOT / "dpo_jax").as_posix() for path in others}
    assert "study/templates/study.html" in names
    for name in names:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in listed), name


# Files of completions


def test_prompts_of_both_files_are_joined_and_the_rest_is_counted(tmp_path):
    report = DataReport()
    a = completions(tmp_path / "a.jsonl", [{"prompt": p, "completion": f"{p}!", "logp": -1.0} for p in "pqrs"])
    b = completions(
        tmp_path / "b.jsonl", [{"prompt": p, "completion": c} for p, c in (("r", " r!\n"), ("q", ""), ("p", "P"), ("t", ""))]
    )
    joined = join(*(one_each(read_completions(path, report=report)) for path in (a, b)), report=report)
    assert joined == [Comparison("p", ("p!", "P")), Comparison("q", ("q!", ""))]
    assert (report.rows, report.read, report.kept, report.dropped) == (8, 5, 2, {"no_pair": 2, "identical": 1})
    assert [Path(file["path"]).name for file in report.files] == ["a.jsonl", "b.jsonl"]
    drawn = draw(comparisons_of(9), 4, seed=0, report=DataReport(read=9, kept=9))
    assert len(set(drawn)) == 4
    assert drawn != draw(comparisons_of(9), 4, seed=1, report=DataReport(read=9, kept=9))


def test_one_completion_of_each_prompt():
    twice = [
        Completion("p", "c", None, "a.jsonl:1"),
        Completion("q", "c", None, "a.jsonl:2"),
        Completion("p", "d", None, "a.jsonl:3"),
    ]
    assert one_each(twice[:2]) == {"p": "c", "q": "c"}
    with pytest.raises(DataError, match=r"a.jsonl:3: prompt: the same as in a.jsonl:1; keep one of each prompt"):
        one_each(twice)


def test_nothing_in_common_is_told():
    with pytest.raises(DataError, match="(?s)nothing to compare .*only the first file has this prompt.*character by character"):
        join({"p": "x"}, {"p ": "y"}, report=DataReport())


# The command


def run(tmp_path, *flags, rows=10):
    a, b = (
        completions(tmp_path / f"{name}.jsonl", [{"prompt": f"p{n}", "completion": f"{name}{n}"} for n in range(rows)])
        for name in ("one", "two")
    )
    files = ("--study.a", str(a), "--study.b", str(b))
    return program.main(["study", "configs/quickstart.yaml", "--run.dir", str(tmp_path / "run"), *files, *flags])


def test_the_command_writes_page_and_key_and_keeps_a_key_that_raters_need(tmp_path, capsys):
    assert run(tmp_path, "--study.raters", "3", "--study.items", "8", "--study.question", "Which is shorter?") == 0
    shown = capsys.readouterr().out
    assert "3 lists of 5 or 6 comparisons" in shown
    assert re.search(r"dropped, over_limit +2\n", shown)
    folder = tmp_path / "run" / "study"
    page, key = embedded((folder / "study.html").read_text()), json.loads((folder / "key.json").read_text())
    assert page["study"] == key["study"]
    assert (page["question"], page["completion"], len(page["items"])) == ("Which is shorter?", "Summary", 8)
    assert key["names"] == {"a": "policy", "b": "baseline"}
    assert all(text.startswith(("one", "two")) for item in page["items"] for text in item["texts"])
    report = json.loads((folder / "data_report.json").read_text())["study"]
    assert report["read"] == report["kept"] + sum(report["dropped"].values()) == 10
    before = (folder / "key.json").read_bytes()
    assert run(tmp_path, "--study.raters", "3", "--study.items", "8", "--study.question", "Which is shorter?") == 0
    assert (folder / "key.json").read_bytes() == before
    assert run(tmp_path, "--study.raters", "2") == 2
    assert f"is the key of study {key['study']}, and this would be" in capsys.readouterr().err
    assert (folder / "key.json").read_bytes() == before
    (folder / "key.json").write_bytes(before[:-3])  # of which study it is, nobody can say any more
    assert run(tmp_path, "--study.raters", "3") == 74
    assert "restore it, or move that folder away: a study may depend on it" in capsys.readouterr().err
    assert (folder / "key.json").read_bytes() == before[:-3]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--study.twice", "0.5"), "study.twice: needs several lists: set study.raters to at least 2"),
        (("--study.twice", "1.5", "--study.raters", "2"), "study.twice: must be a share between 0 and 1"),
        (("--study.raters", "0"), "study.raters: must be at least 1"),
        (("--study.raters", "11"), "study.raters: 11 lists cannot be made of 10 comparisons"),
        (("--study.items", "11"), "study.items: 11 comparisons are wanted, but there are 10"),
        (("--study.name-b", "policy"), "study.name_b: must differ from name_a"),
        (("--study.title", " "), "study.title: must not be empty"),
        (("--study.b", "None"), "study.b: name a file of completions: dpo-jax sample"),
    ],
)
def test_what_makes_no_study_is_told(tmp_path, capsys, flags, expected):
    assert run(tmp_path, *flags) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run" / "study" / "study.html").exists()
