"""Points at which long work can be interrupted: between two batches of an evaluation, a reference pass or a round of samples.

A training loop that is told to stop must not wait for the end of a long evaluation: preemption leaves half a minute. So such
work calls `pause()` after each batch, and the surrounding loop decides what happens then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_PAUSE: ContextVar[Callable[[], None]] = ContextVar("pause", default=lambda: None)


def pause() -> None:
    """Raises if the surrounding `pausing` wants the work to end here. Outside of one it does nothing.

    With several hosts it may wait for them: all must call it equally often.
    """
    _PAUSE.get()()


@contextlib.contextmanager
def pausing(call: Callable[[], None]) -> Iterator[None]:
    """Context manager in which each `pause()` is `call()`."""
    token = _PAUSE.set(call)
    try:
        yield
    finally:
        _PAUSE.reset(token)
