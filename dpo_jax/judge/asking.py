"""Asks a judge many questions concurrently, with retries and caps on requests, tokens and cost.

Retries are made here and not in the client, because this module knows the budget, logs every request before it is sent, and can
pause all questions when one of them is told to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from dpo_jax.judge.endpoint import Fault, Reply
from dpo_jax.judge.questions import Messages, Question, choice_of
from dpo_jax.judge.verdict_lines import FAILURES
from dpo_jax.judge.verdicts import Tokens, VerdictLog

LONGEST_WAIT = 600.0  # seconds; if the endpoint asks for more, the command stops and can be started again later
GIVE_UP = 10  # stop after so many questions in a row without an answer, each after all its tries
ENVELOPE = 64  # upper bound on the tokens that a chat adds to the texts


class Unfinished(RuntimeError):
    """Not every question is answered. The same command continues where it stopped."""

    agreed = True  # the first host tells the others


class Refused(Unfinished):
    """The endpoint answers, but refuses some questions as they are (a filter, a text too long for it). It will again."""


class Budget(NamedTuple):
    """Caps on all requests in the log, earlier starts included; infinity means no cap. Prices are per token."""

    requests: float = math.inf
    tokens: float = math.inf
    cost: float = math.inf
    price_read: float = 0.0
    price_written: float = 0.0

    def cost_of(self, tokens: Tokens) -> float:
        return tokens.read * self.price_read + tokens.written * self.price_written

    def exceeded_by(self, requests: int, tokens: Tokens) -> str | None:
        """The cap that so many requests and tokens would exceed, in words; None if none."""
        if requests > self.requests:
            return f"{self.requests:,.0f} requests"
        if sum(tokens) > self.tokens:
            return f"{self.tokens:,.0f} tokens"
        return f"a cost of {self.cost:,.2f}" if self.cost_of(tokens) > self.cost else None


def failures_of(counts: Mapping[str, int]) -> str:
    """`counts` (keyed as `FAILURES`) in words."""
    return ", ".join(f"{count:,} {FAILURES[cause]}" for cause, count in sorted(counts.items()))


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
    """Asks every question without an answer in `log` and adds the answers. Questions are made from `questions.PROMPTS[prompt]`.

    A question is tried up to `tries` times, after waits of `first_wait` seconds, twice that, and so on, each multiplied by a
    random number, so that clients that failed together do not retry together. `settled()` is called after each answer and each
    fault. Raises `Unfinished` if a cap of `budget` would be exceeded, if the endpoint refuses everything or stays silent, or
    if a question is left without an answer, and `Refused` if only refused ones are; it waits for requests in flight first.
    """
    todo = {question.key: question for question in questions if question.key not in log.verdicts}
    asker = _Asker(ask, log, prompt, max_tokens, tries, budget, settled, first_wait)
    await asker.run(list(todo.values()), concurrency)
    if not asker.stopped and 0 < asker.unanswered == asker.refused and log.verdicts:
        raise Refused(f"{asker.refused:,} questions are refused by the endpoint ({asker.faults()})")
    if asker.stopped or asker.unanswered:
        left = f"{asker.unanswered:,} questions have no answer after {tries} tries each ({asker.faults()})"
        raise Unfinished(asker.stopped or left)


class _Asker:
    """State shared by the questions in flight."""

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
        self.stopped, self.said, self.unanswered, self.refused, self.in_a_row = "", "", 0, 0, 0
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
        except ExceptionGroup as errors:  # a full disk, for example, ends all of them
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
                self.refused += 1
                break
            if fault.wait is not None:
                self.not_before = max(self.not_before, time.monotonic() + fault.wait)
            if number + 1 < self.tries:
                backoff = min(self.first_wait * 2**number, LONGEST_WAIT) if fault.wait is None else self.first_wait
                await self.rest((fault.wait or 0.0) + backoff * random.random())
        self.unanswered += 1
        self.in_a_row += 1
        if self.in_a_row >= GIVE_UP:
            left = f"{GIVE_UP} questions in a row have no answer ({self.faults()})"
            self.stop(f"{left}: is the address right, is the endpoint up, and does it take these options?")

    def faults(self) -> str:
        """Counts of faults by kind, and the endpoint's last message."""
        counts = ", ".join(f"{count:,} {cause}" for cause, count in self.log.faults.items())
        return f"faults: {counts}" + (f"; the endpoint said: {self.said}" if self.said else "")

    def stop(self, why: str) -> None:
        self.stopped = self.stopped or why
        self.over.set()

    async def pause(self) -> None:
        """Waits as long as the endpoint has asked for."""
        while (left := self.not_before - time.monotonic()) > 0 and not self.stopped:
            await self.rest(left)

    async def rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)

    async def affordable(self, most: Tokens) -> bool:
        """Whether one more request fits the budget at its maximal cost. Waits for requests in flight that may free some."""
        async with self.landed:
            while not self.stopped:
                cap = self.budget.exceeded_by(self.log.requests + 1, self.log.committed.plus(most))
                if cap is None:
                    self.in_flight += 1
                    return True
                if not self.in_flight:
                    self.stop(f"the next question could exceed {cap}: raise the cap, then rerun the command to continue")
                    self.landed.notify_all()
                    return False
                await self.landed.wait()
            return False

    async def send(self, question: Question, most: Tokens) -> Fault | None:
        self.log.sent(question.key, most)
        fault = None
        try:
            reply = await self.ask(question.messages)
            choice = None if reply.failure else choice_of(self.prompt, reply.text if reply.said is None else reply.said)
            failure = "" if choice else reply.failure or ("format" if reply.text.strip() else "empty")
            verdict = {"choice": choice, "failure": failure, "text": reply.text, "model": reply.model}
            await self.log.answered(question.key, reply.tokens or most, **verdict)
        except Fault as error:
            fault = error
            self.said = error.said or self.said
            self.log.fault(question.key, fault.cause, most if fault.paid else Tokens())
        async with self.landed:
            self.in_flight -= 1
            self.landed.notify_all()
        return fault
