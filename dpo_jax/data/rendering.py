"""Rendering of conversations by a chat template, an untrusted program bounded in time and memory."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.untrusted import LIMITS, Unreadable, reading

_ONE = threading.Lock()


class Refused(ValueError):
    """A chat template rejects a conversation. It may accept others."""


class _Late(BaseException):
    """The time limit is exceeded. Not an Exception: Jinja catches those while it folds constants."""


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, generate: bool = False, **options: Any) -> str:
    """A conversation as the chat template of `tokenizer` writes it, with the generation prompt if `generate`.

    `options` are those of `apply_chat_template`. Raises `Refused` if the template raises anything or writes nothing, and
    `Unreadable` if it exceeds the limits of time or memory. Both messages name it.
    """
    file = getattr(tokenizer, "template_file", None)  # set where a file replaces the tokenizer's own template
    where = file or f"chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'}"
    with reading(where, error=Refused), bounded(where):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **options)
        if not isinstance(text, str) or not text:
            raise ValueError("writes no text")
        return text


def check_syntax(where: str, source: str) -> None:
    """Raises ValueError with the line of a template's first error of syntax, and `Unreadable` if it exceeds the limits."""
    import jinja2

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # a tag that transformers adds
    try:
        with bounded(where):
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: not a Jinja template: {error.message}") from error


@contextlib.contextmanager
def bounded(where: str) -> Iterator[None]:
    """Aborts the block with `Unreadable` if it exceeds `limits.template_s` or `limits.template_mb`. Other errors pass through.

    Time is limited in the main thread only, where Python handles signals. Memory is limited on Linux only, for the whole
    process, so allocations of other threads count.
    """
    try:
        with _ONE, _memory_limit(LIMITS.template_mb * 2**20), _time_limit(LIMITS.template_s):
            yield
    except _Late as error:
        raise Unreadable(f"{where}: did not end; {LIMITS.remedy('template_s')}") from error
    except MemoryError as error:
        raise Unreadable(f"{where}: too much memory; {LIMITS.remedy('template_mb')}") from error


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises `_Late` after `seconds`, and again each second, because Python may ignore it once, in a finalizer for example."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    running, start = True, time.monotonic()

    def ring(number: int, frame: Any) -> None:
        if running:
            raise _Late

    # Set the timer before the handler, which must not catch someone else's timer.
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    handler = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left or every:  # a timer that has just fired and that the kernel has not restarted yet has nothing left
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, left - (time.monotonic() - start)), every)


@contextlib.contextmanager
def _memory_limit(more: int) -> Iterator[None]:
    """Limits this process to `more` bytes above its current size."""
    used = _memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if used is None or (soft != resource.RLIM_INFINITY and soft <= used + more):
        yield
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _memory() -> int | None:
    """Address space of this process in bytes; None if the system is not Linux."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(file, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)
