"""The log of a judge: what is read is what was written, whatever became of the file; and what was paid is counted."""

import asyncio
import json
import os

import pytest

from dpo_jax.judge.verdicts import ForeignVerdicts, Tokens, VerdictLog
from dpo_jax.untrusted import Unreadable


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    path = tmp_path / "log"
    written_log(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"answered": "c", "cho')
    with VerdictLog(path, {}) as log:
        assert (list(log.verdicts), log.interrupted, log.lost, log.spent) == (["a", "b"], 1, 0, Tokens(15, 14))
    assert path.read_bytes() == whole
    assert not log.set_aside.exists()


def written_log(path, settings=None):
    """Six lines: the settings, a and b asked and answered, c on its way."""
    verdict = {"failure": "", "text": "words", "model": "m"}
    with VerdictLog(path, settings or {}) as log:
        log.sent("a", Tokens(5, 5))
        asyncio.run(log.answered("a", Tokens(3, 2), choice="A", **verdict))
        log.sent("b", Tokens(9, 9))
        asyncio.run(log.answered("b", Tokens(5, 5), choice="B", **verdict))
        log.sent("c", Tokens(7, 7))
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "verdicts", "damaged", "lost"),
    [
        pytest.param(lambda lines: [*lines[:2], lines[2].replace(b'"A"', b'"B"'), *lines[3:]], "b", 1, 1, id="another letter"),
        pytest.param(lambda lines: [*lines[:2], lines[2].replace(b'"A"', b'"C"'), *lines[3:]], "b", 1, 1, id="no letter"),
        pytest.param(lambda lines: [*lines[:2], lines[2].replace(b'd": "a"', b'd": "c"'), *lines[3:]], "b", 1, 1, id="key"),
        pytest.param(lambda lines: [*lines[:2], b"\xff\0" + lines[2], *lines[3:]], "b", 1, 1, id="bytes"),
        pytest.param(lambda lines: [*lines[:2], *lines[3:]], "b", 0, 1, id="removed"),
        pytest.param(
            lambda lines: [*lines[:3], lines[2], *lines[3:]], "ab", 1, 1, id="twice"
        ),  # of two processes, both have paid
        pytest.param(lambda lines: [lines[i] for i in (0, 4, 3, 2, 1, 5)], "ab", 0, 0, id="another order"),
        pytest.param(lambda lines: [*lines[:4], lines[4][:20] + b"\n" + lines[4][20:], lines[5]], "a", 2, 1, id="split"),
        pytest.param(lambda lines: [*lines[:2], lines[2][:-1] + lines[3], *lines[4:]], "b", 1, 2, id="joined"),
        pytest.param(lambda lines: [b"?" + lines[0], *lines[1:]], "ab", 1, 0, id="settings damaged"),
        pytest.param(lambda lines: lines[1:], "ab", 0, 0, id="settings removed"),
    ],
)
def test_a_verdict_that_is_read_is_the_one_that_was_written(tmp_path, change, verdicts, damaged, lost):
    """A damaged line is told, copied to a file beside and used for nothing; the others stand, and the money counts."""
    path = tmp_path / "verdicts.jsonl"
    lines = written_log(path)
    with VerdictLog(path, {}) as log:
        sound = log.verdicts
    path.write_bytes(b"".join(change(lines)))
    before = path.read_bytes()
    for _ in range(2):  # opening it changes nothing
        with VerdictLog(path, {}) as log:
            assert log.verdicts == {key: verdict for key, verdict in sound.items() if key in verdicts}
            assert (len(log.damaged), log.lost, path.read_bytes()) == (damaged, lost, before)
            assert log.requests >= 3
            assert min(log.spent) >= 14  # as it was, or more: a question without its answer may have cost all it could
    assert log.set_aside.name == "verdicts.damaged.jsonl"
    copied = [json.loads(line) for line in log.set_aside.read_text().splitlines()] if damaged else []
    assert [(line["line"], line["cause"] != "") for line in copied] == [(line.place, True) for line in log.damaged]
    with VerdictLog(path, {}) as log:  # it goes on
        for key in set("abc") - set(log.verdicts):
            log.sent(key, Tokens(1, 1))
            asyncio.run(log.answered(key, Tokens(1, 1), choice=None, failure="empty", text="", model="m"))
    with VerdictLog(path, {}) as log:
        assert (set(log.verdicts), log.lost, log.interrupted) == (set("abc"), lost, 0)


def test_lines_of_another_log_are_no_lines_of_this_one(tmp_path):
    mine, other = (written_log(tmp_path / name, {"model": name}) for name in ("m", "n"))
    (tmp_path / "m").write_bytes(b"".join([*mine[:2], other[2], *mine[3:]]))
    with VerdictLog(tmp_path / "m", {"model": "m"}) as log:
        assert (list(log.verdicts), log.lost) == (["b"], 1)
    (tmp_path / "m").write_bytes(b"".join([mine[0], *other[1:]]))
    with pytest.raises(Unreadable, match="m: line 2: its checksum is not that .*, and no other line is valid"):
        VerdictLog(tmp_path / "m", {"model": "m"})


@pytest.mark.parametrize("content", [b"{}\n", b"\0" * 500, b"{}", b"[1]\n", b'{"line": 1}\n\n', b'{"line": 1, "settings": {"x'])
def test_what_is_no_log_is_left_alone(tmp_path, content):
    path = tmp_path / "verdicts.jsonl"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match="verdicts.jsonl: .*; restore it, or move it away to judge again"):
        VerdictLog(path, {"model": "m"})
    assert path.read_bytes() == content
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Unreadable, match="verdicts.jsonl: not a file"):
        VerdictLog(path, {})


def test_a_log_cut_off_in_its_first_line_begins_anew(tmp_path):
    first = written_log(tmp_path / "whole", {"model": "m"})[0]
    for size in range(len(first)):
        (tmp_path / "log").write_bytes(first[:size])
        VerdictLog(tmp_path / "log", {"model": "m"}).close()
        assert (tmp_path / "log").read_bytes() == first


def test_a_log_without_checksums_is_taken_whole_or_not_at_all(tmp_path):
    """As versions before them wrote it. What was paid is not thrown away; but one bad line says that others may be."""
    path = tmp_path / "log"
    sealed = written_log(path)
    old = [{k: v for k, v in json.loads(line).items() if k not in ("line", "check")} for line in sealed]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in old) + '{"answ')
    with VerdictLog(path, {}) as log:
        assert (set(log.verdicts), log.requests, log.spent) == ({"a", "b"}, 3, Tokens(15, 14))
    assert path.read_bytes() == b"".join(sealed)
    for field, value in (("choice", "C"), ("tokens_in", 10**400), ("tokens_in", True), ("failure", "x"), ("extra", 1)):
        path.write_text("".join(json.dumps(record) + "\n" for record in [*old[:2], old[2] | {field: value}, *old[3:]]))
        with pytest.raises(Unreadable, match="log: line 3: .*, but this log of an earlier version has no checksums"):
            VerdictLog(path, {})
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    with pytest.raises(ForeignVerdicts, match="model was None and is 'm'"):
        VerdictLog(path, {"model": "m"})


def test_nothing_is_written_behind_half_a_line(tmp_path, monkeypatch):
    with VerdictLog(tmp_path / "log", {}) as log:
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:10]))
        with pytest.raises(OSError, match="No space left"):
            log.sent("a", Tokens(5, 5))
        monkeypatch.undo()
        log.sent("b", Tokens(5, 5))
    with VerdictLog(tmp_path / "log", {}) as log:
        assert (log.requests, log.damaged, log.lost) == (1, [], 0)
