"""Client of an OpenAI-compatible endpoint: sends one question over HTTP, and parses replies and errors.

The HTTP client follows no redirects, keeps no cookies and sends only the headers that HTTP needs, and the key. The bytes of a
reply are counted as they arrive, and again when unpacked, so that no reply takes more memory than `limits.reply_kb`. Proxies
and certificates come from the environment, as usual.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import email.utils
import http.cookiejar
import math
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax.judge.questions import Messages
from dpo_jax.judge.redaction import Redactor
from dpo_jax.judge.verdicts import Tokens
from dpo_jax.untrusted import LIMITS, Unreadable, kind_of, parse_object, reading

MOST_TOKENS = 10**9  # of one reply; a larger number is not a valid count
FAILED = {"length": "length", "max_tokens": "length", "content_filter": "content_filter", "error": "error"}
"""`finish_reason`, up to a colon ("content_filter: SAFETY") -> why the reply is not an answer."""
SHOWN = 300  # characters of an endpoint's message that are shown
ADVICE = "check judge.model, judge.base_url, the key and its permissions"


class Reply(NamedTuple):
    """A reply of the judge. `failure`: why it cannot count as an answer ("refusal", "length", "content_filter"), or ""."""

    text: str
    failure: str
    model: str  # as named by the endpoint
    tokens: Tokens | None  # None: the endpoint gives no counts
    said: str | None = None  # the raw text, which may repeat the key: only for parsing the choice, never written


class Fault(Exception):
    """A request without a usable reply. `wait`: seconds that the endpoint asks to wait; `said`: its message, if any."""

    def __init__(
        self,
        cause: str,
        *,
        wait: float | None = None,
        paid: bool = False,
        hopeless: bool = False,
        stop: str | None = None,
        said: str = "",
    ) -> None:
        super().__init__(cause)
        self.cause, self.wait, self.said = cause, wait, said
        self.paid = paid  # the endpoint may have done the work and charge for it
        self.hopeless = hopeless  # this question cannot be answered
        self.stop = stop  # no question can be answered; the text says what to do


class Endpoint:
    """`await endpoint(messages) -> Reply` by the client `httpx2` (extra `judge`: ImportError without it). Raises `Fault`.

    `timeout` is for the whole reply, in seconds, so that a server that sends a byte now and then cannot hold a slot for ever.
    `key` appears in no error and in no text to be written, even if the server repeats it, shortened or encoded (`Redactor`);
    None: the endpoint needs no key. Raises `Unreadable` for invalid proxies or certificates in the environment.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None,
        *,
        model: str,
        temperature: float | None,
        max_tokens: int,
        limit_name: str,
        timeout: float,
    ) -> None:
        import httpx2

        self._http, self._timeout, self._redacted = httpx2, timeout, Redactor(key)
        headers = {"user-agent": "dpo-jax", "accept": "application/json", "accept-encoding": "identity"}
        options: dict[str, Any] = {
            "headers": headers | ({"authorization": f"Bearer {key}"} if key else {}),
            "cookies": http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
            "follow_redirects": False,
            "timeout": None,  # our own covers the whole reply
            "limits": httpx2.Limits(max_connections=None),  # the caller limits concurrency
        }
        with reading("the environment", remedy="check its proxies (HTTPS_PROXY, ALL_PROXY) and certificates (SSL_CERT_FILE)"):
            self._client: Any = httpx2.AsyncClient(**options)
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._options: dict[str, Any] = {"model": model, limit_name: max_tokens}
        if temperature is not None:
            self._options["temperature"] = temperature

    async def __call__(self, messages: Messages) -> Reply:
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._post(messages)
        except Exception as error:  # whatever a library raises, this question got no reply
            answer = self._broken(error)
        # Not raised from the error, which holds the request and thus the key. Parsed in a thread, so that other questions go
        # on.
        outcome = answer if isinstance(answer, Fault) else await asyncio.to_thread(self._read, *answer)
        if isinstance(outcome, Fault):
            raise outcome
        return outcome

    async def _post(self, messages: Messages) -> tuple[int, Mapping[str, str], bytes | Unreadable]:
        """Status, headers and body; or what is wrong with the body."""
        async with self._client.stream("POST", self._url, json={**self._options, "messages": messages}) as response:
            try:
                return response.status_code, response.headers, await _body(response)
            except Unreadable as error:
                return response.status_code, response.headers, error

    def _broken(self, error: Exception) -> Fault:
        http = self._http
        if isinstance(error, TimeoutError):
            return Fault("timeout", paid=True)
        # A connection that was never made costs nothing; a broken one may have been charged.
        never = (http.ConnectError, http.ConnectTimeout, http.ProxyError, http.UnsupportedProtocol, http.InvalidURL)
        known = isinstance(error, http.TransportError | http.InvalidURL)
        return Fault("connection" if known else f"connection ({type(error).__name__})", paid=not isinstance(error, never))

    def _read(self, status: int, headers: Mapping[str, str], body: bytes | Unreadable) -> Reply | Fault:
        if not 200 <= status < 300:
            return self._refused(status, headers, body)
        try:
            if isinstance(body, Unreadable):
                raise body
            reply = read_reply(body)
        except Unreadable as error:
            said = "" if isinstance(body, Unreadable) else self.hide(read_error(body)[0])[:SHOWN]
            return Fault(self.hide(error)[:SHOWN], paid=True, said=said)
        return reply._replace(text=self.hide(reply.text), said=reply.text, model=self.hide(reply.model)[:SHOWN])

    def _refused(self, status: int, headers: Mapping[str, str], body: bytes | Unreadable) -> Fault:
        said, code = ("", None) if isinstance(body, Unreadable) else read_error(body)
        said = self.hide(said)[:SHOWN]
        if 300 <= status < 400:
            to = self.hide(headers.get("location", ""))[:SHOWN] or "nowhere"
            stop = f"the endpoint redirects to {to}: no redirect is followed; set judge.base_url to the address that answers"
            return Fault(str(status), stop=stop)
        if status in (401, 402, 403, 404) or code == "insufficient_quota":
            return Fault(str(status), stop=f"the endpoint refuses all questions ({status}: {said}): {ADVICE}")
        hopeless = status not in (408, 409, 425, 429) and status < 500
        return Fault(str(status), wait=wait_of(headers), hopeless=hopeless, said=said)

    def hide(self, text: object) -> str:
        """An endpoint's message made safe for a file: without the key, and without incomplete characters."""
        return self._redacted(str(text).encode("utf-8", "replace").decode())

    async def close(self) -> None:
        await self._client.aclose()


async def _body(response: Any) -> bytes:
    """The unpacked body of a reply. Raises `Unreadable` once it exceeds the byte limit, packed or unpacked."""
    most, arrived, body = LIMITS.reply_kb * 2**10, 0, bytearray()
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity", "utf-8", "gzip", "x-gzip"):  # we ask for none, but some proxies add gzip
        raise Unreadable("reply compressed in a way that was not asked for (Content-Encoding)")
    unzip = zlib.decompressobj(zlib.MAX_WBITS | 16) if "gzip" in coding else None
    async for chunk in response.aiter_raw():
        arrived += len(chunk)
        try:
            while unzip is not None and chunk:
                if unzip.eof:  # another member follows (RFC 1952, 2.2)
                    unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
                body += unzip.decompress(chunk, most + 1 - len(body))
                chunk = unzip.unused_data if len(body) <= most else b""
        except zlib.error:
            raise Unreadable("reply with damaged gzip") from None
        body += chunk
        if max(arrived, len(body)) > most:
            raise Unreadable(f"reply too large; {LIMITS.remedy('reply_kb')}")
    if unzip is not None and not unzip.eof:  # its checksum comes last
        raise Unreadable("reply with damaged gzip")
    return bytes(body)


def read_reply(body: bytes) -> Reply:
    """Parses the reply in the body of a response with status 200. Raises `Unreadable`, with nothing of the body in its message.

    The text may come in parts, of which those of type "text" are used. A provider that failed midway reports `finish_reason`
    "error": the text until then does not count as a reply.
    """
    try:
        found = parse_object(body, "reply")
    except Unreadable:
        raise Unreadable("malformed reply (no sound JSON object)") from None
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    finish = choice.get("finish_reason") if isinstance(choice, dict) else None
    failure = FAILED.get(finish.partition(":")[0], "") if isinstance(finish, str) else ""
    message = choice.get("message") if isinstance(choice, dict) else None
    if message is None and failure:  # some endpoints send no message for withheld content
        message = {}
    if failure == "error" or (found.get("error") and not choices):
        raise Unreadable("an error in a reply with status 200")
    if not isinstance(message, dict):
        raise Unreadable("malformed reply (no choices[0].message)")
    text, refusal = _text_of(message.get("content")), message.get("refusal") or None
    for name, value in (("content", text), ("refusal", refusal), ("finish_reason", finish)):
        if not (value is None or isinstance(value, str)):
            raise Unreadable(f"malformed reply ({name} is {kind_of(value)})")
    model = found.get("model")
    tokens = _tokens(found.get("usage"))
    failure = "refusal" if refusal else failure
    return Reply(text or refusal or "", failure, model if isinstance(model, str) else "unnamed", tokens)


def _text_of(content: Any) -> Any:
    """The text of parts such as {"type": "text", "text": "..."} (reasoning has other types); any other content unchanged."""
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in content
    ):
        return content
    texts = [part.get("text") for part in content if part["type"] == "text"]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _tokens(usage: Any) -> Tokens | None:
    usage = usage if isinstance(usage, dict) else {}
    counts: list[Any] = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Tokens(*counts) if all(type(count) is int and 0 <= count < MOST_TOKENS for count in counts) else None


def read_error(body: bytes) -> tuple[str, object]:
    """The message of an error response in one line, and its error code, if any.

    Understands {"error": {"message": "...", "code": ...}}, the same in an array, {"error": "..."} and {"message": "..."}.
    """
    try:
        found = parse_object(body.strip().removeprefix(b"[").removesuffix(b"]"), "reply")
    except Unreadable:
        found = {}
    error = found.get("error") or found
    said, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
    if not isinstance(said, str):
        said = body[: 4 * SHOWN].decode("utf-8", "replace")
    return " ".join(said.split()), code


def wait_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as a date.

    A date refers to the endpoint's clock, so it is compared with the `Date` of the response.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return seconds if seconds >= 0 and math.isfinite(seconds) else None
    until = _seconds_of(headers.get("retry-after", ""))
    if until is None:
        return None
    now = _seconds_of(headers.get("date", ""))
    return max(0.0, until - (time.time() if now is None else now))


def _seconds_of(date: str) -> float | None:
    """An HTTP date as seconds since 1970; None if it is invalid."""
    try:
        parts = email.utils.parsedate_tz(date[:100])
        return None if parts is None else float(email.utils.mktime_tz(parts))
    except Exception:  # several kinds: the 31st of February, the year 99999
        return None
