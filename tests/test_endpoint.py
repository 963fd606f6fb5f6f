"""The endpoint of a judge: what is sent, which replies are taken, and that no trace of the key comes back."""

import asyncio
import base64
import gzip
import itertools
import json
import re
import threading

import pytest
from fake_judge import Fail, Raw, Say, fake_judge

from dpo_jax.judge.endpoint import Endpoint, Fault, Reply
from dpo_jax.judge.questions import choice_of
from dpo_jax.judge.verdicts import Tokens
from dpo_jax.untrusted import Unreadable

KEY = "sk-planted-0123456789abcdef"
A = "Comparison: the first is clearer.\nPreferred: A"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint_at(url, *, timeout=5.0, key=KEY):
    return Endpoint(url, key, model="m", temperature=0.0, max_tokens=20, limit_name="max_tokens", timeout=timeout)


def asked_once(act, *, key=KEY, timeout=5.0):
    """What one question brings, a reply or a fault, and the requests that the judge got."""

    async def run(url):
        endpoint = endpoint_at(url, key=key, timeout=timeout)
        try:
            return await endpoint([{"role": "user", "content": "x"}])
        except Fault as fault:
            return fault
        finally:
            await endpoint.close()

    with fake_judge(lambda asked, number: act) as judge:
        return asyncio.run(run(judge.url)), judge


def reply_of(text=A, **changes):
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "model": "m", **changes}).encode()


TOO_LARGE = r"^reply too large; the limit is 1,024 kB \(raise it with --limits.reply-kb\)$"
MEGABYTE = b" " * 2**20


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (Raw(reply_of("x" * 2**20)), TOO_LARGE),
        (Raw(itertools.repeat(MEGABYTE)), TOO_LARGE),
        (Raw(gzip.compress(MEGABYTE * 100), {"Content-Encoding": "gzip"}), TOO_LARGE),
        (
            Raw(itertools.chain([gzip.compress(b"{}")], itertools.repeat(MEGABYTE)), {"Content-Encoding": "gzip"}),
            "^reply with damaged gzip$",
        ),
        (Raw(itertools.repeat(gzip.compress(MEGABYTE)), {"Content-Encoding": "gzip"}), TOO_LARGE),
        (Raw(b"\x1f\x8b nothing", {"Content-Encoding": "gzip"}), "^reply with damaged gzip$"),
        (Raw(b"\x0b\x02\x80{}\x03", {"Content-Encoding": "br"}), "^reply compressed in a way that was not asked for"),
        (Raw(b"{}", {"Content-Encoding": "gzip, gzip"}), "^reply compressed in a way that was not asked for"),
        (Raw(b"[" * 10**6), r"^malformed reply \(no sound JSON object\)$"),
        (Raw(reply_of(usage={"prompt_tokens": 10**400})), r"^malformed reply \(no sound JSON object\)$"),
        (Raw(reply_of(choices={"0": 1})), r"^malformed reply \(no choices\[0\].message\)$"),
        (Raw(reply_of(["x"])), r"^malformed reply \(content is an array\)$"),
    ],
)
def test_a_reply_that_is_none_is_a_fault_that_may_have_cost(act, expected):
    fault, _ = asked_once(act)
    assert re.search(expected, fault.cause)
    assert fault.paid
    assert not fault.stop


def test_a_reply_is_taken_as_it_is_written():
    reply, _ = asked_once(
        Raw(gzip.compress(reply_of(usage={"prompt_tokens": 3, "completion_tokens": 4})), {"Content-Encoding": "gzip"})
    )
    assert reply == Reply(A, "", "m", Tokens(3, 4), A)
    for usage in (
        {"prompt_tokens": 3},
        {"prompt_tokens": 3, "completion_tokens": 10**200},
        {"prompt_tokens": True},
        [3, 4],
        None,
    ):
        assert asked_once(Raw(reply_of(usage=usage, model=None)))[0] == Reply(A, "", "unnamed", None, A)


MESSAGE = {"role": "assistant", "content": A}
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Preferred: B"}]}


@pytest.mark.parametrize(
    "act",
    [
        *(
            Raw(reply_of(choices=[{"index": 0, "message": MESSAGE, "finish_reason": f}]))
            for f in ("eos", None, "end_turn", "STOP")
        ),
        Raw(reply_of(choices=[{"message": MESSAGE}], usage={"prompt_tokens": 1, "prompt_tokens_details": None})),
        Raw(reply_of([{"type": "text", "text": A}])),
        Raw(reply_of([THOUGHT, {"type": "text", "text": A[:9]}, {"type": "text", "text": A[9:]}])),
        Raw(reply_of(choices=[{"message": {**MESSAGE, "reasoning_content": "x", "tool_calls": []}, "stop_reason": None}])),
        Raw(reply_of(), {"Content-Encoding": ""}),
        Raw(reply_of(), {"Content-Encoding": "utf-8", "Content-Type": "text/plain; charset=latin-1"}),
        Raw(b"\xef\xbb\xbf" + reply_of()),
        Raw(b"\n        \n" * 50 + reply_of() + b"\r\n", status=201),
    ],
)
def test_replies_of_many_servers_are_taken(act):
    reply, _ = asked_once(act)
    assert (reply.text, reply.failure) == (A, "")


@pytest.mark.parametrize(
    ("choice", "failure"),
    [
        ({"message": {"content": A[:-5]}, "finish_reason": "max_tokens"}, "length"),
        ({"message": {"role": "assistant"}, "finish_reason": "content_filter: SAFETY"}, "content_filter"),
        ({"finish_reason": "content_filter"}, "content_filter"),
        ({"message": {"content": None, "reasoning_content": A}, "finish_reason": "length"}, "length"),
    ],
)
def test_what_was_held_back_or_cut_off_is_no_answer(choice, failure):
    reply, _ = asked_once(Raw(reply_of(choices=[choice])))
    assert (reply.text, reply.failure) == ((choice.get("message") or {}).get("content") or "", failure)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"error": {"code": 502, "message": f"upstream {KEY} is down"}}).encode(),
        reply_of(choices=[{"message": MESSAGE, "finish_reason": "error"}], error={"message": f"upstream {KEY} is down"}),
    ],
)
def test_a_provider_that_failed_has_not_answered(body):
    """Also where it had written all or some of an answer: nobody knows whether it would have gone on."""
    fault, _ = asked_once(Raw(body))
    assert (fault.cause, fault.paid, fault.stop) == ("an error in a reply with status 200", True, None)
    assert fault.said == "upstream [key] is down"


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no credits", "code": 402}},
        [{"error": {"message": "no credits", "status": "X"}}],
        {"error": "no credits"},
        {"object": "error", "message": "no credits", "code": 404},
    ],
)
def test_errors_of_many_servers_are_told(body):
    for status in (402, 404):
        fault, _ = asked_once(Fail(status, body=json.dumps(body)))
        assert f"({status}: no credits)" in fault.stop
    assert asked_once(Fail(400, body=json.dumps(body)))[0].said == "no credits"


def test_gzip_may_have_several_members():
    reply = reply_of(usage={"prompt_tokens": 3, "completion_tokens": 4})
    packed = gzip.compress(reply[:20]) + gzip.compress(b"") + gzip.compress(reply[20:])
    for parts in (packed, [packed[:9], packed[9:41], packed[41:]], (packed[i : i + 1] for i in range(len(packed)))):
        answer, _ = asked_once(Raw(parts, {"Content-Encoding": "gzip"}))
        assert (answer.failure, answer.tokens) == ("", Tokens(3, 4))
    fault, _ = asked_once(Raw(packed[:-8], {"Content-Encoding": "gzip"}))
    assert fault.cause == "reply with damaged gzip"


def test_gzip_without_its_checksum_is_damaged():
    fault, _ = asked_once(Raw(gzip.compress(reply_of())[:-8], {"Content-Encoding": "gzip"}))
    assert (fault.cause, fault.paid) == ("reply with damaged gzip", True)


def test_a_large_error_is_an_error():
    fault, _ = asked_once(Raw(itertools.repeat(MEGABYTE), status=503))
    assert (fault.cause, fault.paid, fault.hopeless) == ("503", False, False)


def test_no_redirect_is_followed():
    with fake_judge(lambda asked, number: Say(A)) as elsewhere:
        fault, judge = asked_once(Fail(307, {"Location": f"{elsewhere.url}/chat/completions", "Retry-After": "1"}))
        assert (len(judge.headers), elsewhere.headers) == (1, [])
    assert re.search(rf"redirects to {elsewhere.url}/chat/completions: no redirect is followed; set judge.base_url", fault.stop)


def test_no_header_is_sent_but_those_that_http_needs_and_the_key(monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "planted: planted")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    needed = {"host", "connection", "content-length", "content-type", "accept", "accept-encoding", "user-agent"}

    async def run(url, key):
        endpoint = endpoint_at(url, key=key)
        try:
            for _ in range(2):  # the first reply sets a cookie
                await endpoint([{"role": "user", "content": "x"}])
        finally:
            await endpoint.close()

    for key in (KEY, None):
        with fake_judge(lambda asked, number: Raw(reply_of(), {"Set-Cookie": "a=b; Path=/"})) as judge:
            asyncio.run(run(judge.url, key))
        for headers in judge.headers:
            sent = {name.lower(): value for name, value in headers.items()}
            assert sent.pop("authorization", None) == (key and f"Bearer {key}")
            assert sent.keys() == needed
            assert (sent["user-agent"], sent["accept-encoding"]) == ("dpo-jax", "identity")


@pytest.mark.parametrize("proxy", ["socks5://localhost:1", "nonsense://x", "http://[::1"])
def test_a_proxy_that_is_none_is_told(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(Unreadable, match="^the environment: .*; check its proxies"):
        endpoint_at("http://127.0.0.1:9/v1")


def test_other_questions_go_on_while_a_reply_is_read(monkeypatch):
    """Reading stands in a thread of its own: it waits here for the event loop to do something else."""
    went_on = threading.Event()

    def slow(body):
        assert went_on.wait(10)
        return Reply(A, "", "m", None)

    monkeypatch.setattr("dpo_jax.judge.endpoint.read_reply", slow)

    async def run(url):
        endpoint = endpoint_at(url)
        asking = asyncio.create_task(endpoint([{"role": "user", "content": "x"}]))
        while not asking.done():
            await asyncio.sleep(0.01)
            if judge.answered:
                went_on.set()
        await endpoint.close()
        return asking.result()

    with fake_judge(lambda asked, number: Say(A)) as judge:
        assert asyncio.run(run(judge.url)).said == A


@pytest.mark.parametrize(
    "echo",
    [
        KEY,
        KEY.upper(),
        f"Bearer {KEY}",
        KEY[:12],
        KEY[5:20],
        "sk-pl...def",
        "sk-p****************cdef",
        "sk-planted-\u2026bcdef",
        "ends in ...cdef",
        KEY.encode().hex(),
        base64.b64encode(KEY.encode()).decode(),
        base64.b64encode(f"Bearer {KEY}".encode()).decode(),
        base64.urlsafe_b64encode(f"me:{KEY}".encode()).decode(),
        "".join(f"%{byte:02X}" for byte in KEY.encode()),
    ],
)
def test_no_trace_of_the_key_is_written(echo):
    words = "The first is clearer... and shorter, the second xxx repeats (\u2026) itself."
    for act in (Say(f"{words} {echo} {words}"), Fail(401, body=json.dumps({"error": {"message": f"{words} {echo} {words}"}}))):
        outcome, _ = asked_once(act)
        shown = outcome.text if isinstance(outcome, Reply) else outcome.stop
        assert shown.count(words) == 2  # what others say stays
        assert "[key]" in shown
        for piece in (KEY[:5], KEY[-5:], KEY.encode().hex()[:8], echo[10:18] or KEY):
            assert piece.lower() not in shown.replace(words, "").lower().replace("the endpoint refuses", "")


def test_a_key_may_be_any_word():
    """The choice is read in what the judge said, where nothing is hidden."""
    for key in ("comparison-judge", "Preferred", "A", "none"):
        reply, _ = asked_once(Say(A), key=key)
        assert choice_of("summary-simple", reply.said) == "A"
