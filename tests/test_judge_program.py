"""`dpo-jax judge` from files to win rates, through kills and wrong use."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from fake_judge import Fail, Say, fake_judge
from test_judge import KEY, ROOT, A, B, draw, scripted
from test_pairing import completions

from dpo_jax.cli.agree_files import judge_files
from dpo_jax.cli.config import Config
from dpo_jax.cli.config.judge import JudgeConfig
from dpo_jax.cli.config.study import AgreeConfig
from dpo_jax.cli.main import main
from dpo_jax.extras import install_command
from dpo_jax.judge.win_rates_plot import plot_win_rates


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def a_plot():
    """Asked for by the test that looks at the plot: its first one is drawn. Most of the time of the others would be theirs."""


@pytest.fixture(autouse=True)
def _few_plots(request, monkeypatch):
    def stand_in(points, path, **options):
        if "a_plot" in request.fixturenames and not path.exists():
            return plot_win_rates(points, path, **options)
        path.touch()
        return path

    monkeypatch.setattr("dpo_jax.cli.commands.judge.plot_win_rates", stand_in)


def run_files(tmp_path, prompts=30):
    """A configuration, and completions of three policies: one at two temperatures, and two to compare it with."""
    config = tmp_path / "judge.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}}}\n")
    for name, temperatures in (("dpo", (0, 1)), ("sft", (0, 1)), ("base", (0,))):
        rows = [
            {"prompt": f"post {i}\nTL;DR:", "completion": f" {name} {i} {t}", "temperature": t, "tokens": 3}
            for t in temperatures
            for i in range(prompts)
        ]
        completions(tmp_path / f"{name}.jsonl", rows)
    flags = ["--judge.a", f"{tmp_path}/dpo.jsonl,SFT={tmp_path}/sft.jsonl", "--judge.b", f"{tmp_path}/base.jsonl"]
    return [str(config), *flags, "--judge.prompt", "summary-concise", "--judge.model", "gpt-4", "--judge.by", "temperature"]


def call(*args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["judge", *map(str, args)])
    return code, out.getvalue()


def prefers(name):
    def script(asked, number):
        a = asked[-1]["content"].split("Summary A:")[1].split("Summary B:")[0]
        return Say(A if name in a else B)

    return script


@pytest.mark.usefixtures("a_plot")
def test_from_files_to_win_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    flags = run_files(tmp_path)
    with fake_judge(prefers("dpo")) as judge:
        code, out = call(*flags, "--base-url", judge.url, "--judge.max-requests", 7)
        assert (code, len(judge.headers)) == (75, 7), out
        assert "the next question could exceed 7 requests: raise the cap" in out
        outcomes = json.loads((tmp_path / "run/judge/report.json").read_text())["outcomes"]
        assert (outcomes["unanswered"] >= 116, sum(outcomes.values())) == (True, 120)
        code, out = call(*flags, "--base-url", judge.url, "--judge.price-in", 10, "--judge.price-out", 30)
        assert code == 0, out
        assert "7 already have an answer" in out
        assert "cost 0.38" in out
        assert len(judge.headers) == 240
        assert judge.headers[0]["authorization"] == f"Bearer {KEY}"
        assert call(*flags, "--base-url", judge.url)[0] == 0
        assert len(judge.headers) == 240
        code, out = call(*flags, "--base-url", judge.url, "--judge.no-fence")
        assert (code, len(judge.headers)) == (2, 240)
        assert "fence was True and is False" in out
    folder = tmp_path / "run" / "judge"
    report = json.loads((folder / "report.json").read_text())
    assert report["outcomes"] == {"won": 60, "lost": 0, "flipped": 60, "failed": 0, "unanswered": 0}
    assert [(p["series"], p["at"], p["pairs"], p["win_rate"]) for p in report["points"]] == [
        ("dpo", 0.0, 30, 1.0),
        ("dpo", 1.0, 30, 1.0),
        ("SFT", 0.0, 30, 0.5),
        ("SFT", 1.0, 30, 0.5),
    ]
    assert report["models"] == {"gpt-4-0314": 240}
    assert report["tokens"] == {"read": 24000, "written": 4800}
    assert [file["path"] for file in report["files"]] == [f"{tmp_path}/{name}.jsonl" for name in ("dpo", "sft", "base")]
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 120
    assert pairs[0] | {"outcome": "won", "policy": " dpo 0 0", "baseline": " base 0 0", "uid": "dpo:0:1"} == pairs[0]
    assert (folder / "win_rates.csv").read_text().count("\n") == 5
    assert (folder / "win_rates.png").read_bytes().startswith(b"\x89PNG")
    # A damaged line is told, and asked again; nothing else is.
    log = folder / "verdicts.jsonl"
    lines = log.read_bytes().split(b"\n")
    place = next(place for place, line in enumerate(lines, start=1) if b'"answered"' in line)
    lines[place - 1] = lines[place - 1].replace(b'"choice": "', b'"choice": "C')
    log.write_bytes(b"\n".join(lines))
    with fake_judge(prefers("dpo")) as judge:
        code, out = call(*flags, "--base-url", judge.url)
        assert (code, len(judge.headers)) == (0, 1), out
    assert f"{log}: not used, and copied to verdicts.damaged.jsonl: line {place}; its questions are asked again" in out
    assert "1 lines are damaged or missing; each counts as a request of the largest size" in out
    again = json.loads((folder / "report.json").read_text())
    assert (again["outcomes"], again["requests"], again["lost_lines"]) == (report["outcomes"], 242, 1)


def test_answers_that_are_no_verdicts_are_told_by_their_cause(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    acts = itertools.cycle([Say(A, finish="length"), Say("Both."), Say(None, refusal="No."), Say("")])
    with fake_judge(lambda asked, number: next(acts)) as judge:
        code, out = call(*run_files(tmp_path, prompts=2), "--base-url", judge.url, "--judge.concurrency", 1)
    assert code == 0, out
    told = "4 empty, 4 not in the format that was asked for, 4 cut off at judge.max_tokens, 4 refused"
    assert f"answers without a verdict: {told}\n" in out
    assert re.search(r"^dpo 0 +2 +0 +0 +0 +2 +- +\d+ / \d+ +-$", out, re.MULTILINE)
    report = json.loads((tmp_path / "run/judge/report.json").read_text())
    assert (report["outcomes"]["failed"], report["first_preferred"]) == (8, None)


def test_files_named_by_numbers_are_one_series(tmp_path, monkeypatch):
    """Checkpoints: --judge.a 200=s200.jsonl,1000=s1000.jsonl. And references of the data as the baseline."""
    monkeypatch.setenv("MY_KEY", KEY)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"p{i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(4)]
    completions(data / "test.jsonl", [*rows, rows[0] | {"rejected": " worse"}])
    for step in (200, 1000):
        completions(tmp_path / f"s{step}.jsonl", [{"prompt": f"p{i}", "completion": f" {step} {i}"} for i in (0, 1, 2, 7)])
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}}}\ndata: {{path: {data}}}\njudge: {{prompt: dialogue, model: m}}\n")
    a = f"1000={tmp_path}/s1000.jsonl,200={tmp_path}/s200.jsonl"
    with fake_judge(lambda asked, number: Say("Comparison: x.\nMore helpful: B")) as judge:
        code, out = call(config, "--judge.a", a, "--base-url", judge.url, "--judge.key-env", "MY_KEY", "--one-order")
    assert code == 0, out
    assert "chosen" in out or "baseline" in out
    assert "2 of 8 completions left out, the baseline lacks this prompt: s1000.jsonl:4, s200.jsonl:4" in out
    assert "1 of 5 completions left out, repeated prompt: test.jsonl:5" in out
    points = json.loads((tmp_path / "run/judge/report.json").read_text())["points"]
    assert [(p["series"], p["at"], p["pairs"]) for p in points] == [("policy", 200.0, 3), ("policy", 1000.0, 3)]
    assert len(judge.headers) == 6


@pytest.mark.parametrize("heeds_fence", [True, False])
def test_injections_are_tried_on_the_judge_that_is_asked(tmp_path, monkeypatch, heeds_fence):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name, word in (("policy", "bad"), ("base", "good")):
        completions(tmp_path / f"{name}.jsonl", [{"prompt": f"post {i}", "completion": f"a {word} text {i}"} for i in range(5)])
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}}}\njudge: {{prompt: summary-simple, model: m}}\n")
    flags = [config, "--judge.a", tmp_path / "policy.jsonl", "--judge.b", tmp_path / "base.jsonl"]
    with fake_judge(lambda asked, number: Say(scripted(asked, heeds_fence=heeds_fence))) as judge:
        flags += ["--base-url", judge.url]
        code, out = call(*flags, "--judge.injections", 3, "--judge.max-requests", 20)
        assert (code, len(judge.headers)) == (75, 20), out
        code, out = call(*flags, "--judge.injections", 3)
        assert (code, len(judge.headers)) == (0, 10 + 3 * 10 * 2), out
        report = json.loads((tmp_path / "run/judge/report.json").read_text())
        achieved = {row["injection"]: {name: n for name, n in row.items() if n == 3} for row in report["injections"]}
        obeyed = (
            dict.fromkeys(achieved, {"flipped": 3})
            | {"itself": {"won": 3}, "neutral": {"lost": 3}}
            | dict.fromkeys(("no answer", "a tie"), {"failed": 3})
        )
        assert achieved == (dict.fromkeys(achieved, {"lost": 3}) if heeds_fence else obeyed)
        assert re.search(r"^itself +(3 +0 +0 +0 +0 +0.00 +0.00|0 +0 +3 +0 +0 +1.00 +1.00) \(", out, re.MULTILINE)
        # They are in no win rate, and the log that holds them is still that of these texts.
        assert (report["questions"], report["answers"], report["outcomes"]["lost"], report["requests"]) == (10, 10, 5, 70)
        assert call(*flags)[0] == 0
        assert len(judge.headers) == 70


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (("--judge.injections", "-1"), 2, "judge.injections: must not be negative"),
        (("--judge.model", "None"), 2, "judge.model: name the judge"),
        (("--judge.prompt", "None"), 2, "judge.prompt: choose one"),
        (("--judge.b", "chosen"), 2, "data.path: source files needs a file or folder"),
        (("--judge.a", "nothing.jsonl"), 65, "nothing.jsonl: no such file; `dpo-jax sample --sample.out"),
        (("--judge.key-env", KEY), 2, "judge.key_env: must be the NAME of an environment variable"),
        (("--base-url", f"https://me:{KEY}@host/v1"), 2, "judge.base_url: must be http"),
        (("--base-url", f"https://host/v1?key={KEY}"), 2, "judge.base_url: must be http"),
        (("--judge.max-cost", "5"), 2, "judge.max_cost: needs judge.price_in"),
        (("--judge.concurrency", "0"), 2, "judge.concurrency: must be greater than 0"),
        (("--judge.max-tokens", str(10**13)), 2, "judge.max_tokens: must be at most 1,000,000,000"),
        (("--judge.a", "a/x.jsonl,b/x.jsonl"), 2, "judge.a: two files are named 'x'"),
        (("--judge.a", "chosen.jsonl", "--judge.b", "chosen"), 2, "judge.a: a file has the name of the baseline, 'chosen'"),
        (("--judge.key-env", "ODD_KEY"), 2, "judge.key_env: the variable ODD_KEY contains characters that no key can have"),
        ((), 2, "judge.key_env: https://api.openai.com/v1 needs a key, but the variable OPENAI_API_KEY is empty"),
    ],
)
def test_wrong_use_is_told_and_no_key_shown(tmp_path, monkeypatch, flags, code, expected):
    monkeypatch.setenv("OPENAI_API_KEY", KEY if flags else "")
    monkeypatch.setenv("ODD_KEY", f"{KEY}\n{KEY}")
    found, out = call(*run_files(tmp_path, prompts=1), *flags)
    assert (found, KEY in out) == (code, False), out
    assert expected in out
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out = call(*run_files(tmp_path, prompts=1))
    assert (code, install_command("judge") in out) == (2, True)


def test_a_kill_costs_no_second_question_and_the_key_is_nowhere(tmp_path, monkeypatch):
    """SIGKILL in the middle of 240 questions; and the endpoint repeats the key, in answers and in errors."""

    def script(asked, number):
        drawn = draw(asked, 10)
        if number == 1 and drawn == 0:
            return Fail(500, body=json.dumps({"error": {"message": f"you are {KEY}"}}))
        return Say(f"Comparison: {KEY} and\nPreferred: A" if drawn < 5 else f"Your key is {KEY}.", delay=0.002)

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("DPO_JAX_TRACEBACK", "1")
    verdicts = tmp_path / "run" / "judge" / "verdicts.jsonl"
    with fake_judge(script) as judge:
        flags = [*run_files(tmp_path), "--base-url", judge.url, "--judge.concurrency", "4"]
        words = [sys.executable, "-m", "dpo_jax.cli.main", "judge", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, **pipes)
        while len(judge.answered) < 100:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        shown = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL
        known = {line["answered"] for line in map(json.loads, verdicts.read_bytes().split(b"\n")[:-1]) if "answered" in line}
        assert 240 > len(known) >= 100 - 4
        asked_before = dict(judge.asked)
        code, out = call(*flags)
        assert code == 0, out
    lines = [json.loads(line) for line in verdicts.read_text().splitlines()[1:]]
    answered = [line["answered"] for line in lines if "answered" in line]
    assert len(answered) == len(set(answered)) == 240
    # By the log: an answered question is never sent again, and what was sent without any word since was on its way at the kill.
    assert not any(line.get("sent") in answered[: answered.index(key) + 1] for key, line in after_answers(lines))
    sent, told = (collections.Counter(line[kind] for line in lines if kind in line) for kind in ("sent", "fault"))
    assert sum((sent - told - collections.Counter(answered)).values()) <= 4
    # By the server: it answered nothing twice but what was on its way, and heard nothing again of what the log knew.
    assert sum(number - 1 for number in judge.answered.values()) <= 4
    key_of = {key: hashlib.sha256(key.encode()).hexdigest() for key in judge.asked}
    assert {key_of[key] for key in judge.asked if judge.asked[key] > asked_before.get(key, 0)}.isdisjoint(known)
    assert set(key_of.values()) == set(answered)
    # The key. The command line is in env.json.
    assert KEY not in shown + out
    assert json.loads((tmp_path / "run/judge/env.json").read_text())["argv"]
    assert "[key]" in verdicts.read_text()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def after_answers(lines):
    """(last question answered before it, line) of each line."""
    last = None
    for line in lines:
        if last is not None:
            yield last, line
        last = line.get("answered", last)


def test_files_in_folders_with_an_equals_sign_can_be_named():
    given = "runs/lr=1e-6/s.jsonl,200=runs/lr=1e-6/t.jsonl"
    assert JudgeConfig(a=given).series() == [("s", "runs/lr=1e-6/s.jsonl"), ("200", "runs/lr=1e-6/t.jsonl")]
    found = judge_files(dataclasses.replace(Config(), agree=AgreeConfig(judge=given)))
    assert {name: str(path) for name, path in found.items()} == dict(JudgeConfig(a=given).series())
