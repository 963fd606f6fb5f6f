"""Damaged and foreign replies, logs, ratings and keys: a documented error or what was written, never something else."""

import asyncio
import itertools
import json
import random
import re

import pytest
from fake_judge import Raw, fake_judge
from mutate import mutants, mutations, outcome, time_limit

from dpo_jax.judge.endpoint import Endpoint, Fault, Reply, read_error, read_reply, wait_of
from dpo_jax.judge.questions import choice_of, label_of
from dpo_jax.judge.redaction import PIECE, Redactor
from dpo_jax.judge.verdicts import ForeignVerdicts, Tokens, VerdictLog
from dpo_jax.study.page import WORDINGS, Comparison, make_study
from dpo_jax.study.ratings import KIND, read_key, read_raters, read_records, read_verdicts, sealed
from dpo_jax.untrusted import Unreadable

KEY = "sk-planted-0123456789abcdef"
REPLY = json.dumps(
    {
        "id": "x",
        "model": "gpt-4-0314",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Comparison: é.\nPreferred: A", "refusal": None},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "details": {"cached": [1, 2]}},
    },
    ensure_ascii=False,
).encode()


# Replies


def test_a_reply_is_what_was_said_or_refused():
    taken = 0
    for mutant in mutations(REPLY, count=mutants(400)):
        found = outcome(lambda: read_reply(mutant), names="malformed reply (")  # noqa: B023
        if isinstance(found, Reply):
            taken += 1
            message = json.loads(mutant)["choices"][0]["message"]
            assert found.text == (message.get("content") or message.get("refusal") or "")
            assert found.tokens is None or all(0 <= count < 10**9 for count in found.tokens)
        said, _ = read_error(mutant)
        assert isinstance(said, str)
    assert taken > 50


def test_whatever_an_endpoint_sends_is_a_reply_or_a_fault_and_fits_the_log(tmp_path, monkeypatch):
    """Through HTTP, with any status and headers. The log, and so the money, can be read again."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bodies = list(mutations(REPLY, count=mutants(80), seed=1))
    generator = random.Random(0)
    headers = [{}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "\xff, br"}, {"Retry-After": "-1e999"}, {"Location": KEY}]
    acts = iter(
        [
            Raw(body, generator.choice(headers), generator.choice([200, 200, 200, 204, 302, 404, 429, 500, 999]))
            for body in bodies
        ]
    )

    told = []

    async def run(url, log):
        endpoint = Endpoint(url, KEY, model="m", temperature=None, max_tokens=9, limit_name="max_tokens", timeout=5.0)
        for number in range(len(bodies)):
            log.sent(str(number), Tokens(9, 9))
            try:
                reply = await endpoint([{"role": "user", "content": "x"}])
                verdict = {"choice": "A", "failure": "", "text": reply.text, "model": reply.model}
                await log.answered(str(number), reply.tokens or Tokens(9, 9), **verdict)
            except Fault as fault:
                told.append(f"{fault.cause} {fault.stop}")
                log.fault(str(number), fault.cause, Tokens())
        await endpoint.close()

    with fake_judge(lambda asked, number: next(acts)) as judge, VerdictLog(tmp_path / "log", {}) as log:
        asyncio.run(run(judge.url, log))
        written = log.verdicts, log.requests, log.faults, log.spent
    assert log.verdicts
    assert told
    assert not any(KEY in words for words in told)
    with VerdictLog(tmp_path / "log", {}) as log:
        assert (log.verdicts, log.requests, log.faults, log.spent) == written
        assert not log.damaged


def test_a_wait_is_a_finite_time_or_none():
    for mutant in mutations(b"Thu, 01 Jan 1970 00:02:00 GMT", count=mutants(300)):
        said = mutant.decode("latin-1")
        for headers in ({"retry-after": said}, {"retry-after": "Thu, 01 Jan 2090 00:02:00 GMT", "date": said}):
            wait = wait_of(headers)
            assert wait is None or 0 <= wait < float("inf")


def test_the_choice_is_that_of_the_pattern():
    """The answer that was asked for, as one pattern: it takes quadratic time, and says what is right for short answers."""
    generator = random.Random(0)
    parts = [
        "Comparison:",
        "Preferred:",
        "More helpful:",
        "A",
        "B",
        '"',
        "\n",
        "\r\n",
        "\r",
        " ",
        "\t",
        "x",
        "\u2028",
        "\x1c",
        "C",
    ]
    chosen = 0
    for _ in range(mutants(3000)):
        answer = ["Comparison:", " ", "x", "\n", "Preferred:", " ", "A"]
        for _ in range(generator.randrange(5)):
            place = generator.randrange(len(answer))
            answer[place : place + generator.randrange(2)] = [generator.choice(parts)]
        said = "".join(answer)
        pattern = rf'Comparison:[^\n]*\S[^\n]*\n\s*{label_of("summary-simple")}: *("?)([AB])\1'
        found = re.fullmatch(pattern, said.replace("\r\n", "\n").strip())
        assert choice_of("summary-simple", said) == (found and found[2]), repr(said)
        chosen += found is not None
    assert chosen > 500
    with time_limit(5):
        assert choice_of("summary-simple", "Comparison:" + " x" * 200_000 + "\nPreferred: C") is None
        assert choice_of("summary-simple", "Comparison: x" + "\n" * 400_000 + "Preferred: A") == "A"


def test_a_secret_leaves_no_piece_and_other_texts_stay():
    generator = random.Random(0)
    letters = "abcdefgh0123-_.*xX"
    for _ in range(mutants(300)):
        secret = "".join(generator.choices(letters, k=generator.randrange(4, 60)))
        start = generator.randrange(len(secret))
        echo = generator.choice([secret, secret.upper(), secret[start:], secret[: start + 1], secret[:4] + "***" + secret[-4:]])
        shown = Redactor(secret)(f"Say {echo}; {secret}!")
        size = min(PIECE, len(secret))
        assert not any(secret[i : i + size].lower() in shown.lower() for i in range(len(secret) - size + 1)), (secret, shown)
        assert shown.startswith("Say ")
        assert shown.endswith("!")
    with time_limit(5):
        for text in ("sk-" * 100_000, "." * 300_000, "sk-p..." * 40_000, "..a" * 100_000):
            Redactor(KEY)(text)


# The log

SETTINGS = {"model": "m", "fence": True, "temperature": 0.0}


def write_log(path):
    with VerdictLog(path, SETTINGS) as log:
        for number in range(6):
            key = f"{number:064x}"
            log.sent(key, Tokens(300 + number, 20))
            if number % 3 == 1:
                log.fault(key, "429", Tokens())
                log.sent(key, Tokens(300 + number, 20))
            choice = "A" if number % 2 else "B"
            verdict = {"failure": "", "text": f'Comparison: é "{number}".\nPreferred: {choice}', "model": "m-0314"}
            asyncio.run(log.answered(key, Tokens(100, 10 + number), choice=choice, **verdict))
        log.sent("f" * 64, Tokens(300, 20))


def test_every_verdict_of_a_damaged_log_is_the_one_that_was_written(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    write_log(path)
    good = path.read_bytes()
    with VerdictLog(path, SETTINGS) as log:
        verdicts, requests, spent = log.verdicts, log.requests, log.spent
    opened = harmed = 0
    for mutant in mutations(good, count=mutants(500)):
        path.write_bytes(mutant)
        log = outcome(lambda: VerdictLog(path, SETTINGS), names="verdicts.jsonl")
        if isinstance(log, Unreadable | ForeignVerdicts):
            assert path.read_bytes() == mutant
            continue
        log.close()
        opened, harmed = opened + 1, harmed + bool(log.lost)
        assert log.verdicts.items() <= verdicts.items()
        if mutant.endswith(b"\n") and mutant.count(b"\n") >= good.count(b"\n"):  # nothing is cut off at its end
            assert log.requests >= requests
            assert log.spent.read >= spent.read
            assert log.spent.written >= spent.written
        assert mutant.startswith(path.read_bytes()) or b"\n" not in mutant  # but for a last line that was cut off
        with VerdictLog(path, SETTINGS) as again:
            assert (again.verdicts, again.requests, again.spent) == (log.verdicts, log.requests, log.spent)
            log_on(again, verdicts)
        with VerdictLog(path, SETTINGS) as again:
            assert again.verdicts == verdicts
    assert opened > 300
    assert harmed > 100


def log_on(log, verdicts):
    """Asks again what has no verdict, and gets the same."""
    for key in verdicts.keys() - log.verdicts.keys():
        log.sent(key, Tokens(300, 20))
        said = {name: value for name, value in verdicts[key].items() if name not in ("answered", "tokens_in", "tokens_out")}
        tokens = Tokens(verdicts[key]["tokens_in"], verdicts[key]["tokens_out"])
        asyncio.run(log.answered(key, tokens, **said))


def test_what_two_logs_in_one_file_have_paid_is_counted(tmp_path):
    """Also in a file to which two processes have written at the same time, on a file system without locks."""
    path, other = tmp_path / "verdicts.jsonl", tmp_path / "other.jsonl"
    write_log(path)
    with VerdictLog(other, SETTINGS) as log:
        for number in range(10, 20):
            log.sent(f"{number:064x}", Tokens(200, 20))
            log.fault(f"{number:064x}", "timeout", Tokens(200, 20))
    one, two = (file.read_bytes().splitlines(keepends=True) for file in (path, other))
    by_turns = [line for both in itertools.zip_longest(one, two, fillvalue=b"") for line in both]
    with VerdictLog(path, SETTINGS) as log, VerdictLog(other, SETTINGS) as second:
        verdicts, requests, spent = log.verdicts, log.requests + second.requests, log.spent.plus(second.spent)
    for lines in (one + two, two + one, by_turns, one + one):
        path.write_bytes(b"".join(lines))
        with VerdictLog(path, SETTINGS) as log:
            assert log.verdicts.items() <= verdicts.items()
            assert lines == one + one or log.requests >= requests
            assert lines == one + one or (log.spent.read >= spent.read and log.spent.written >= spent.written)
            assert lines != one + one or log.lost == len(one)


def test_lines_that_stand_in_one_line_at_the_end_count_as_each(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    write_log(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-4], *(line.rstrip(b"\n") for line in lines[-4:]), b"\n"]))
    with VerdictLog(path, SETTINGS) as log:
        assert (len(log.damaged), log.lost) == (1, 4)


def test_blank_lines_are_nothing_and_too_many_bad_ones_no_log(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    write_log(path)
    good = path.read_bytes()
    with VerdictLog(path, SETTINGS) as log:
        verdicts, requests = log.verdicts, log.requests
    path.write_bytes(good.replace(b"\n", b"\n\n") + b"\n" * 1000)
    with VerdictLog(path, SETTINGS) as log:
        assert (log.verdicts, log.requests, log.damaged) == (verdicts, requests, [])
    path.write_bytes(good + b"x\n" * 1_000_000)
    with time_limit(5), pytest.raises(Unreadable, match="verdicts.jsonl: more than 100,000 damaged lines; restore it"):
        VerdictLog(path, SETTINGS)
    assert path.stat().st_size == len(good) + 2_000_000


def test_another_log_is_not_taken_for_this_one(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    write_log(path)
    with pytest.raises(ForeignVerdicts, match="model was 'm' and is 'n'"):
        VerdictLog(path, SETTINGS | {"model": "n"})


# Ratings and keys


@pytest.fixture(scope="module")
def study():
    comparisons = [Comparison(f"prompt {n} é", (f"first {n}", f"second {n}")) for n in range(5)]
    return make_study(comparisons, names=("dpo", "ppo"), title="t", wording=WORDINGS["summary"], raters=2, twice=0.4, seed=4)


def test_a_key_is_the_one_that_was_written(study, tmp_path):
    path = tmp_path / "key.json"
    path.write_text(json.dumps(sealed(study.key | {"files": [{"path": "a.jsonl"}]})))
    key, good = read_key(path), path.read_bytes()
    refused = 0
    for mutant in mutations(good, count=mutants(300)):
        path.write_bytes(mutant)
        found = outcome(lambda: read_key(path), names="key.json")
        refused += isinstance(found, Exception)
        assert isinstance(found, Exception) or found == key or b'"check"' not in mutant
    assert refused > 150


def test_ratings_are_what_a_rater_could_have_saved(study, tmp_path):
    (tmp_path / "key.json").write_text(json.dumps(sealed(study.key)))
    key = read_key(tmp_path / "key.json")
    ratings = [{"item": item, "first": first, "choice": "A"} for item, first in study.page["raters"][0]]
    content = {"kind": KIND, "study": study.key["study"], "rater": "Zoë", "session": "s", "number": 1, "saved": "2023-05-01"}
    path = tmp_path / "rater.json"
    taken = 0
    for mutant in mutations(json.dumps(content | {"ratings": ratings}).encode(), count=mutants(300)):
        path.write_bytes(mutant)
        found = outcome(lambda: read_raters([path], key=key), names="rater.json")
        if isinstance(found, list):
            taken += 1
            (file,) = found
            assert {judgment.item for judgment in file.judgments} <= key.lists[file.number - 1].keys()
            assert all(judgment.winner in ("a", "b", "tie") for judgment in file.judgments)
    assert taken > 20


def test_records_and_verdicts_are_read_or_refused(study, tmp_path):
    (tmp_path / "key.json").write_text(json.dumps(sealed(study.key)))
    key = read_key(tmp_path / "key.json")
    pairs = [
        {"uid": "1", "at": 0.5, "prompt": prompt, "policy": a, "baseline": b, "outcome": "won"}
        for prompt, (_, a, b) in key.texts.items()
    ]
    records = [{"item": item, "winner": "a", "rater": "ann"} for item in key.methods]
    path = tmp_path / "said.jsonl"
    for rows, read in ((records, read_records), (pairs, read_verdicts)):
        good = "".join(json.dumps(row) + "\n" for row in rows).encode()
        taken, refused = 0, 0
        for mutant in mutations(good, count=mutants(150)):
            path.write_bytes(mutant)
            found = outcome(lambda: read(path, key=key), names="said.jsonl")  # noqa: B023
            refused += isinstance(found, Exception)
            taken += not isinstance(found, Exception)
        assert min(taken, refused) > 10
