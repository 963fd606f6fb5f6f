# ruff: noqa: F811
"""Samples on the page about a run: what is cut is marked and kept, and what differs stays apart."""

import json
import re

import pytest
from test_report import HOSTILE, Seen, change, copy, finished, report  # noqa: F401  two are fixtures

from dpo_jax.report.page import beginning, ending


def test_a_long_sample_is_cut_with_a_mark_and_nothing_of_it_is_lost(copy, tmp_path):
    long = " ".join(f"word{i}" for i in range(400))
    line = {"prompt": long, "reference": "short", "policy": long, "reference_finished": True, "policy_finished": False}
    (copy / "eval" / "samples.jsonl").write_text(json.dumps(line) + "\n")
    change(copy / "eval" / "report.json", sampling={"max_new_tokens": 64})
    _, page, markdown = report(copy, out=tmp_path / "out")
    seen = Seen(page)
    hidden, earlier = (re.search(rf"([\d,]+) {which} characters", seen.text) for which in ("more", "earlier"))
    assert f"… {hidden[0]}" in seen.text
    for shown, limit in ((hidden, 600), (earlier, 400)):
        assert 0 <= len(long) - int(shown[1].replace(",", "")) - limit + 60 <= 60
    assert seen.tags.count("details") == 2
    assert re.sub(r"(… [\d,]+ more|[\d,]+ earlier) characters( …)?", "", seen.text).count(long) == 2
    assert seen.text.count("cut by the limit of 64 tokens") == 1
    assert markdown.count(long) == 2
    assert "cut by the limit of 64 tokens" in markdown


def test_samples_of_training_are_shown_at_up_to_four_steps(copy, tmp_path):
    folder = copy / "dpo" / "samples"
    folder.mkdir()
    for step in (0, 100, 200, 300, 400, 123456789):
        line = {"prompt": HOSTILE, "completion": f"word{step} {HOSTILE}", "finished": step > 0}
        (folder / f"step-{step:08}.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "step-00000200.jsonl").write_text("torn")
    _, page, markdown = report(copy, out=tmp_path / "out")
    seen = Seen(page)
    for shown in (seen.text, markdown):
        assert [step for step in (0, 100, 200, 300, 400, 123456789) if f"word{step}" in shown] == [0, 300, 123456789]
        assert "1 of 1 prompts, at 4 of 6 steps." in shown
    assert seen.text.count("cut by the token limit") == 1
    assert "script" not in seen.tags
    assert "samples/step-00000200.jsonl: " in seen.text


@pytest.mark.parametrize("text", ["", "short", "x" * 659, "x" * 5000, "ab " * 900])
def test_a_cut_text_is_whole_when_unfolded(text):
    assert "".join(beginning(text, 600)) == "".join(ending(text, 400)) == text
    assert len(beginning(text, 600)[0]) <= 660
    assert len(ending(text, 400)[1]) <= 460


def test_samples_of_other_images_are_kept_apart(copy, tmp_path):
    lines = [{"prompt": "Describe it.", "images": [f"{i}" * 64], "reference": "a dot", "policy": f"dot {i}"} for i in range(3)]
    (copy / "eval" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, _, markdown = report(copy, "--report.samples", 2, out=tmp_path / "out")
    assert "2 of 3 prompts" in markdown
    assert "dot 1" in markdown
    assert "dot 2" not in markdown
