"""Rendering of conversations by a chat template, which is a program from outside: bounded in time and memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.untrusted import LIMITS, Unreadable, reading

_ONE = threading.Lock()


class Refused(ValueError):
    """A chat template does not take a conversation. Others it may take."""


class _Late(BaseException):
    """The time is over. No Exception: Jinja catches those where it computes constants."""


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, generate: bool = False, **options: Any) -> str:
    """A conversation as the chat template of `tokenizer` writes it, with the generation prompt if asked to `generate`.

    `options` are those of `apply_chat_template`. Raises `Refused` where the template raises anything or writes nothing, and
    `Unreadable` where it takes longer, or more memory, than the limits allow. Both name it.
    """
    where = f"chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'}"
    with reading(where, error=Refused), bounded(where):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **options)
        if not isinstance(text, str) or not text:
            raise ValueError("writes no text")
        return text


@contextlib.contextmanager
def bounded(where: str) -> Iterator[None]:
    """Ends what exceeds `limits.template_s` or `limits.template_mb`, with an `Unreadable`. Other errors pass.

    Time is limited in the main thread, where Python handles signals, and memory on Linux, for the whole process: whatever
    another thread allocates meanwhile counts.
    """
    with _ONE:
        memory = _limit_memory(LIMITS.template_mb * 2**20)
        timer = _Timer(LIMITS.template_s) if threading.current_thread() is threading.main_thread() else None
        try:
            yield
        except _Late as error:
            raise Unreadable(f"{where}: did not end; {LIMITS.remedy('template_s')}") from error
        except MemoryError as error:
            raise Unreadable(f"{where}: too much memory; {LIMITS.remedy('template_mb')}") from error
        finally:
            if timer is not None:
                timer.stop()
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_AS, memory)


class _Timer:
    """Raises `_Late` in the main thread after some seconds."""

    def __init__(self, seconds: float) -> None:
        self._running, self._start = True, time.monotonic()
        self._handler = signal.signal(signal.SIGALRM, self._ring)
        # Again and again: an exception may fall where Python ignores it, such as a finalizer.
        self._other = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)

    def _ring(self, number: int, frame: Any) -> None:
        if self._running:
            raise _Late

    def stop(self) -> None:
        self._running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)
        left, every = self._other
        if left:  # somebody else's timer
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - self._start)), every)


def _limit_memory(more: int) -> tuple[int, int] | None:
    """Lets this process take so many bytes more than it has. Returns the limits before, None if they stay."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:  # no Linux
        return None
    try:
        pages = int(os.read(file, 64).split()[0])
    finally:
        os.close(file)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + more
    if soft != resource.RLIM_INFINITY and soft <= most:
        return None
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    return soft, hard
