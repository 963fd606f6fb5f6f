"""Files of completions that are damaged or of another kind: refused with file and line, or read as they were written."""

import gzip
import json
import os

import pytest
from mutate import mutants, mutations, outcome

from dpo_jax.cli.prompts import prompts_of_file
from dpo_jax.data.completion_files import read_completions
from dpo_jax.data.pairs import DataError, DataReport
from dpo_jax.data.terminal import json_text
from dpo_jax.judge.pairing import pair_up
from dpo_jax.judge.questions import question_of
from dpo_jax.study.page import WORDINGS, join, make_study, one_each, render

ROWS = [
    {"prompt": "POST: It rains.\nTL;DR:", "completion": " Rain.", "logp": -3.25, "tokens": 4, "temperature": 0.25},
    {
        "prompt": "\n\nHuman: Hello?\n\nAssistant:",
        "completion": " Hi \0 \x1b[2J\u202e",
        "logp": None,
        "tokens": 9,
        "temperature": 1,
    },
    {"prompt": "naïve 漢字", "completion": "", "turns": [{"role": "user", "content": "naïve"}], "temperature": 0.0},
]
GOOD = "".join(json_text(row) + "\n" for row in ROWS).encode()
OTHERS = [{"prompt": row["prompt"], "completion": f"other {number}"} for number, row in enumerate(ROWS)]


@pytest.fixture
def others(tmp_path):
    (tmp_path / "others.jsonl").write_text("".join(json_text(row) + "\n" for row in OTHERS))
    return read_completions(tmp_path / "others.jsonl")


def written(content):
    """(prompt, completion) of each line, by no code of ours."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [tuple(json.loads(line)[name] for name in ("prompt", "completion")) for line in lines if line.strip()]


@pytest.mark.parametrize("by", [None, "temperature"])
def test_a_damaged_file_is_refused_or_read_as_it_was_written(by, tmp_path, others):
    file = tmp_path / "a.jsonl"
    refused = kept = 0
    for content in mutations(GOOD, count=mutants(80), seed=0 if by is None else 1):
        file.write_bytes(content)
        report = DataReport()
        found = outcome(lambda report=report: read_completions(file, by=by, report=report), names="a.jsonl")
        if isinstance(found, Exception):
            refused += 1
            continue
        assert [(one.prompt, one.text) for one in found] == written(content)
        assert report.rows == len(found)
        assert len({one.where for one in found}) == len(found)
        used = outcome(lambda found=found: used_for_everything(found, others))
        assert used is None or isinstance(used, DataError)
        kept += content != GOOD
    assert refused > 10
    assert kept > 10


def used_for_everything(completions, others):
    """The questions of a judge and the page of a study: nothing behind the reader fails."""
    for pair in pair_up({"a": completions}, others).pairs:
        for fence in (True, False):
            question_of(pair, prompt="summary-simple", a="policy", fence=fence)
    report = DataReport(source="a")
    comparisons = join(one_each(completions), one_each(others), report=report)
    assert report.read == report.kept + sum(report.dropped.values())
    render(make_study(comparisons, names=("a", "b"), title="t", wording=WORDINGS["summary"], raters=1, twice=0, seed=0).page)


def test_a_damaged_archive_is_refused_or_read_as_it_was_written(tmp_path):
    """Damaged itself, and of damaged lines."""
    file = tmp_path / "a.jsonl.gz"
    of_lines = [gzip.compress(lines, mtime=0) for lines in mutations(GOOD, count=mutants(60), seed=2)]
    for archives in (mutations(gzip.compress(GOOD, mtime=0), count=mutants(60)), of_lines):
        refused = kept = 0
        for content in archives:
            file.write_bytes(content)
            found = outcome(lambda: read_completions(file), names="a.jsonl.gz")
            refused += isinstance(found, Exception)
            if not isinstance(found, Exception):
                assert [(one.prompt, one.text) for one in found] == written(plain := gzip.decompress(content))
                kept += archives is not of_lines or plain != GOOD
        assert refused > 10
        assert kept > 5


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_a_damaged_file_of_prompts_is_refused_or_read_as_it_was_written(name, tokenizer, tmp_path):
    file = tmp_path / name
    good = (
        b'{"prompt": "Say \\u0000."}\n{"prompt": "na\xc3\xafve", "id": 7}\n' if name == "p.jsonl" else b"Hello.\nna\xc3\xafve\n"
    )
    kept = 0
    for content in mutations(good, count=mutants(60)):
        file.write_bytes(content)
        found = outcome(lambda: prompts_of_file(str(file), tokenizer, chat=False), names=name)
        if not isinstance(found, Exception):
            lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
            lines = [line for line in lines if line.strip()]
            assert [one.text for one in found] == [json.loads(line)["prompt"] if name == "p.jsonl" else line for line in lines]
            kept += content != good
    assert kept > 5


def test_what_is_no_file_of_completions_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "text.jsonl").write_text("Once upon a time\n")
    (tmp_path / "table.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    for name in ("none.jsonl", *(path.name for path in tmp_path.iterdir())):
        assert isinstance(outcome(lambda name=name: read_completions(tmp_path / name), names=name), DataError)
