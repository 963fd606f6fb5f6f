"""Asking a judge: an OpenAI-compatible endpoint, many questions at a time, within a budget, through its faults.

The official client speaks the protocol; its own retries are off. Only ours know the budget, write every request down before it
is sent, pause all questions when one of them is told to wait (the client would let the others run into the same limit), honour
waits of more than the client's one minute, and ask again where a reply of status 200 is no reply.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.evals.judge import Messages, Question, choice_of
from dpo_jax.evals.verdicts import Tokens, VerdictLog

LONGEST_WAIT = 600.0  # seconds; whoever asks us to wait for longer is left alone, and the command can be started again later
GIVE_UP = 10  # questions in a row without an answer, after all their tries
ENVELOPE = 64  # tokens that a chat adds to the texts, at most
FAILURES = {  # why an answer is no verdict
    "content_filter": "held back by the endpoint's filter",
    "empty": "empty",
    "format": "not in the format that was asked for",
    "length": "cut off at judge.max_tokens",
    "refusal": "refused",
}


class Unfinished(RuntimeError):
    """Not every question is answered. The same command continues where it stopped."""


class Reply(NamedTuple):
    """What the judge wrote. `failure`: why it is no answer whatever it says ("refusal", "length", "content_filter"), or ""."""

    text: str
    failure: str
    model: str  # that the endpoint says it is
    tokens: Tokens | None  # None: the endpoint does not count


class Fault(Exception):
    """A request that brought no reply. `wait`: seconds that the endpoint asked for."""

    def __init__(
        self, cause: str, *, wait: float | None = None, paid: bool = False, hopeless: bool = False, stop: str | None = None
    ) -> None:
        super().__init__(cause)
        self.cause, self.wait = cause, wait
        self.paid = paid  # the endpoint may have worked, and charge for it
        self.hopeless = hopeless  # this question cannot be answered
        self.stop = stop  # no question can be, and what to do


class Budget(NamedTuple):
    """Caps on everything that the log has seen, earlier starts included; infinity: none. Prices are per token."""

    requests: float = math.inf
    tokens: float = math.inf
    cost: float = math.inf
    price_read: float = 0.0
    price_written: float = 0.0

    def cost_of(self, tokens: Tokens) -> float:
        return tokens.read * self.price_read + tokens.written * self.price_written

    def exceeded_by(self, requests: int, tokens: Tokens) -> str | None:
        """The cap that so many requests and tokens would break, in words."""
        if requests > self.requests:
            return f"{self.requests:,.0f} requests"
        if sum(tokens) > self.tokens:
            return f"{self.tokens:,.0f} tokens"
        return f"a cost of {self.cost:,.2f}" if self.cost_of(tokens) > self.cost else None


class Endpoint:
    """`await endpoint(messages) -> Reply` by the client `openai` (extra `judge`: ImportError without it). Raises `Fault`.

    `timeout` is for the whole reply, in seconds: a server that sends a byte now and then does not keep a place for ever. `key`
    is in no error and in no text that comes back, even where the server repeats it; None: the endpoint wants none.
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
        import openai

        self._errors, self._key, self._timeout = openai, key, timeout
        # Without an explicit base_url the client would look for one in the environment.
        self._client: Any = openai.AsyncOpenAI(api_key=key or "none", base_url=base_url, max_retries=0, timeout=timeout)
        self._options: dict[str, Any] = {"model": model, limit_name: max_tokens}
        if temperature is not None:
            self._options["temperature"] = temperature

    async def __call__(self, messages: Messages) -> Reply:
        openai = self._errors
        fault = None
        try:
            async with asyncio.timeout(self._timeout):
                completion = await self._client.chat.completions.create(messages=messages, **self._options)
        except (TimeoutError, openai.APITimeoutError):
            fault = Fault("timeout", paid=True)
        except openai.APIStatusError as error:
            fault = self._refused(error)
        except openai.APIConnectionError as error:
            # A connection that was never made costs nothing; one that broke may have been worked on.
            fault = Fault("connection", paid=not type(error.__cause__).__name__.startswith("Connect"))
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON
            fault = Fault(f"malformed reply ({type(error).__name__})", paid=True)
        if fault is not None:
            raise fault from None  # the original holds the request, and with it the key
        return self._read(completion)

    def _refused(self, error: Any) -> Fault:
        said = self.hide(error.message)
        status, wait = error.status_code, wait_of(error.response.headers)
        if status in (401, 403, 404) or error.code == "insufficient_quota":
            advice = "check judge.model, judge.base_url, the key and what it may do"
            return Fault(str(status), stop=f"the endpoint refuses all questions ({said}): {advice}")
        return Fault(f"{status}", wait=wait, hopeless=status not in (408, 409, 425, 429) and status < 500)

    def _read(self, completion: Any) -> Reply:
        try:
            choice = completion.choices[0]
            text = choice.message.content
            refusal, finish = getattr(choice.message, "refusal", None), choice.finish_reason
            if not (text is None or isinstance(text, str)):
                raise TypeError(f"content is {type(text).__name__}")
        except (AttributeError, IndexError, TypeError):
            raise Fault("malformed reply", paid=True) from None
        usage, tokens = getattr(completion, "usage", None), None
        read, written = (getattr(usage, f"{kind}_tokens", None) for kind in ("prompt", "completion"))
        if isinstance(read, int) and isinstance(written, int) and min(read, written) >= 0:
            tokens = Tokens(read, written)
        failure = "refusal" if refusal else finish if finish in ("length", "content_filter") else ""
        return Reply(self.hide(text or refusal or ""), failure, self.hide(completion.model), tokens)

    def hide(self, text: object) -> str:
        """What the endpoint says, fit for a file: without the key, and without halves of characters."""
        whole = str(text).encode("utf-8", "replace").decode()
        return whole.replace(self._key, "[key]") if self._key else whole

    async def close(self) -> None:
        await self._client.close()


def failures_of(counts: Mapping[str, int]) -> str:
    """`counts` by the keys of `FAILURES`, in words."""
    return ", ".join(f"{count:,} {FAILURES[cause]}" for cause, count in sorted(counts.items()))


def wait_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait for: `retry-after-ms`, or `Retry-After` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return seconds if seconds >= 0 and math.isfinite(seconds) else None
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


async def ask_all(
    questions: Sequence[Question],
    ask: Callable[[Messages], Awaitable[Reply]],
    log: VerdictLog,
    *,
    prompt: str,
    max_tokens: int,
    concurrency: int,
    tries: int,
    budget: Budget,
    settled: Callable[[], object] = lambda: None,
    first_wait: float = 1.0,
) -> None:
    """Puts an answer to every question into `log`, but for those it has. They are made of `judge.PROMPTS[prompt]`.

    A question is tried up to `tries` times, after waits of `first_wait` seconds, twice that, and so on, each multiplied by a
    random number: clients that failed together should not return together. `settled()` is called after each answer and each
    fault. Raises `Unfinished` where a cap of `budget` would be broken, the endpoint refuses everything or stays silent, or a
    question is left without an answer; what is on its way is waited for first.
    """
    todo = {question.key: question for question in questions if question.key not in log.verdicts}
    asker = _Asker(ask, log, prompt, max_tokens, tries, budget, settled, first_wait)
    await asker.run(list(todo.values()), concurrency)
    if asker.stopped or asker.unanswered:
        raise Unfinished(asker.stopped or f"{asker.unanswered:,} questions have no answer after {tries} tries each")


class _Asker:
    """What the questions that are asked at the same time share."""

    def __init__(
        self,
        ask: Callable[[Messages], Awaitable[Reply]],
        log: VerdictLog,
        prompt: str,
        max_tokens: int,
        tries: int,
        budget: Budget,
        settled: Callable[[], object],
        first_wait: float,
    ) -> None:
        self.ask, self.log, self.prompt, self.budget, self.settled = ask, log, prompt, budget, settled
        self.max_tokens, self.tries, self.first_wait = max_tokens, tries, first_wait
        self.stopped, self.unanswered, self.in_a_row = "", 0, 0
        self.over, self.not_before = asyncio.Event(), 0.0
        self.in_flight, self.landed = 0, asyncio.Condition()

    async def run(self, todo: list[Question], concurrency: int) -> None:
        waiting = iter(todo)

        async def work() -> None:
            for question in waiting:
                if not self.stopped:
                    await self.decide(question)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(todo))):
                    group.create_task(work())
        except ExceptionGroup as errors:  # a full disk, say: what ends one ends all
            raise errors.exceptions[0] from None

    async def decide(self, question: Question) -> None:
        most = Tokens(sum(len(part["content"].encode()) for part in question.messages) + ENVELOPE, self.max_tokens)
        for number in range(self.tries):
            await self.pause()
            if not await self.affordable(most):
                return
            fault = await self.send(question, most)
            self.settled()
            if fault is None:
                self.in_a_row = 0
                return
            if fault.stop or (fault.wait or 0.0) > LONGEST_WAIT:
                self.stop(fault.stop or f"the endpoint asks to wait for {fault.wait:,.0f} seconds: start again after that")
            if self.stopped:
                return
            if fault.hopeless:
                break
            if fault.wait is not None:
                self.not_before = max(self.not_before, time.monotonic() + fault.wait)
            if number + 1 < self.tries:
                backoff = min(self.first_wait * 2**number, LONGEST_WAIT) if fault.wait is None else self.first_wait
                await self.rest((fault.wait or 0.0) + backoff * random.random())
        self.unanswered += 1
        self.in_a_row += 1
        if self.in_a_row >= GIVE_UP:
            faults = ", ".join(f"{count:,} {cause}" for cause, count in self.log.faults.items())
            self.stop(
                f"{GIVE_UP} questions in a row have no answer (faults: {faults}): is the address right, the endpoint well?"
            )

    def stop(self, why: str) -> None:
        self.stopped = self.stopped or why
        self.over.set()

    async def pause(self) -> None:
        """While the endpoint wants to be left alone."""
        while (left := self.not_before - time.monotonic()) > 0 and not self.stopped:
            await self.rest(left)

    async def rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)

    async def affordable(self, most: Tokens) -> bool:
        """Whether one more request fits the budget, at its worst. What others may still give back is waited for."""
        async with self.landed:
            while not self.stopped:
                cap = self.budget.exceeded_by(self.log.requests + 1, self.log.committed.plus(most))
                if cap is None:
                    self.in_flight += 1
                    return True
                if not self.in_flight:
                    self.stop(f"the next question could exceed {cap}: raise the cap, and the same command continues")
                    self.landed.notify_all()
                    return False
                await self.landed.wait()
            return False

    async def send(self, question: Question, most: Tokens) -> Fault | None:
        self.log.sent(question.key, most)
        fault = None
        try:
            reply = await self.ask(question.messages)
            choice = None if reply.failure else choice_of(self.prompt, reply.text)
            failure = "" if choice else reply.failure or ("format" if reply.text.strip() else "empty")
            verdict = {"choice": choice, "failure": failure, "text": reply.text, "model": reply.model}
            await self.log.answered(question.key, reply.tokens or most, **verdict)
        except Fault as error:
            fault = error
            self.log.fault(question.key, fault.cause, most if fault.paid else Tokens())
        async with self.landed:
            self.in_flight -= 1
            self.landed.notify_all()
        return fault
