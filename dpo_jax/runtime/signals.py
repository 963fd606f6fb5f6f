"""SIGINT and SIGTERM: noticed at once, also while the main thread is in compiled code, and always the same exit codes.

Python runs its signal handlers between bytecodes of the main thread. A compilation or a long computation is one call, so a
handler alone would answer minutes later. `Listener` therefore hears of signals in a thread.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

NUMBERS = (signal.SIGTERM, signal.SIGINT)

ECHO_SECONDS = 0.3
"""A machine that shuts down, or a terminal with a script in between, may deliver one wish twice: so soon is the same wish."""

PATIENCE_SECONDS = 5.0
"""How long an interrupted command may take to end by itself. Compiled code does not return sooner because of a signal."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. A `KeyboardInterrupt`, so that whatever cleans up after Ctrl-C cleans up after it."""


def exit_code(number: int) -> int:
    """What a shell says of a process that a signal has ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


class Listener:
    """Calls `heard(number)` in a thread for each SIGINT and SIGTERM, before Python's handlers run. Main thread only.

    Listeners nest: the newest one hears, until it is stopped.
    """

    def __init__(self, heard: Callable[[int], None]) -> None:
        self._heard, self._drained = heard, threading.Event()

    def start(self) -> None:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Returns when `heard` has been called for every signal so far."""
        self._drained.clear()
        os.write(self._write, b"\0")
        self._drained.wait(timeout=1.0)

    def stop(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write)
        self._thread.join(timeout=1.0)

    def _listen(self, read: int) -> None:
        while numbers := os.read(read, 64):
            for number in numbers:
                if number in NUMBERS:
                    self._heard(number)
                elif number == 0:
                    self._drained.set()
        os.close(read)


class _Interruption:
    """Ends the process for a signal: after the command has cleaned up, or after `PATIENCE_SECONDS`, or at the second signal."""

    def __init__(self) -> None:
        self.received, self._since = 0, 0.0

    def heard(self, number: int) -> None:
        if _at_once:
            os.write(2, b"\ndpo-jax: interrupted\n" if number == signal.SIGINT else b"\ndpo-jax: stopped by SIGTERM\n")
            leave(exit_code(number))
        if not self.received:
            self.received, self._since = number, time.monotonic()
            timer = threading.Timer(PATIENCE_SECONDS, self._give_up)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:  # the process is ending anyhow
                leave(exit_code(number))
        elif time.monotonic() - self._since > ECHO_SECONDS:
            leave(exit_code(number))

    def _give_up(self) -> None:
        os.write(2, b"\ndpo-jax: interrupted\n")
        leave(exit_code(self.received))


class StopSignals:
    """While training: the first SIGTERM or SIGINT sets `received`, a second one ends the process at once.

    A context manager; the handlers that were there before come back at its end.
    """

    def __init__(self) -> None:
        self.received, self._first, self._since = 0, 0, 0.0
        self._previous = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in NUMBERS}
            self._listener = Listener(self._heard)
            self._listener.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous:
            self._listener.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.received = self.received or number

    def _heard(self, number: int) -> None:
        """In a thread: a step that is being compiled hears of no signal."""
        if self._first:
            if time.monotonic() - self._since > ECHO_SECONDS:
                os._exit(exit_code(number))
            return
        self._first, self._since = number, time.monotonic()
        # Not print(): the signal may have interrupted a print, and buffered files are not re-entrant.
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving. A second signal stops at once.\n"
        os.write(2, text.encode())


_at_once = False


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Where nothing has begun that must be cleaned up: a signal ends the process, without an exception in the main thread.

    For importing: an exception that is raised inside the initialization of an extension module can crash it.
    """
    global _at_once
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not _terminate:
        yield  # not in `run_program`
        return
    before = {number: signal.signal(number, lambda number, frame: None) for number in NUMBERS}
    _at_once = True
    try:
        yield
    finally:
        _at_once = False
        for number, handler in before.items():
            signal.signal(number, handler)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `main()`; with 130 or 143 if SIGINT or SIGTERM came, with 1 for an exception.

    The last steps of a Python process, in which modules are torn down, are left out: threads of XLA still run then, and now and
    then they crash (139). What is registered with `atexit` is done before, except after a signal: it may wait for other hosts.
    """
    code = 1
    atexit.register(lambda: leave(code))  # the first to be registered is the last to be called
    interruption = _Interruption()
    listener = Listener(interruption.heard)
    listener.start()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # not where the parent had it ignored
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
    except KeyboardInterrupt:
        pass
    except BaseException:
        listener.drain()
        if not interruption.received:  # C code may answer a signal with an error of its own
            traceback.print_exc()
    # An interrupt can also be lost, in a callback of C code.
    with contextlib.suppress(KeyboardInterrupt):
        listener.drain()
    if interruption.received:
        leave(exit_code(interruption.received))
    sys.exit(code)


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def leave(code: int) -> NoReturn:
    """Ends the process now, with what was printed. A success whose output could not be written becomes 74."""
    failed: list[OSError] = []
    # In a thread: an interrupted print may hold the lock of its file.
    flush = threading.Thread(target=_flush, args=(failed,), daemon=True)
    try:
        flush.start()
        flush.join(timeout=1.0)
    except RuntimeError:  # Python 3.12 starts no thread once it is on its way out
        _flush(failed)
    if code == 0 and failed:
        os.write(2, f"dpo-jax: standard output: {failed[0].strerror}\n".encode())
        code = 74
    os._exit(code)


def _flush(failed: list[OSError]) -> None:
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError as error:
            if error.errno != errno.EPIPE:  # the reader has seen enough
                failed.append(error)
        except (AttributeError, ValueError):  # None, or closed
            pass
