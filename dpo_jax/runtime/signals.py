"""Handling of SIGINT and SIGTERM: immediate, even while the main thread is in compiled code, with consistent exit codes.

Python runs its signal handlers between bytecodes of the main thread. A compilation or a long computation is one call, so a
handler alone would react minutes later. `Listener` therefore receives signals in a thread.
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
"""A shutdown, or a terminal with a script in between, may deliver a signal twice: within this time it counts once."""

PATIENCE_SECONDS = 5.0
"""Time that an interrupted command has to end by itself. A signal does not interrupt compiled code."""


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. A `KeyboardInterrupt`, so that cleanup for Ctrl-C also runs for it."""


def exit_code(number: int) -> int:
    """The shell's exit code for a process ended by a signal: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


class Listener:
    """Calls `heard(number)` in a thread for each SIGINT and SIGTERM, before Python's handlers run. Main thread only.

    Listeners nest: the newest one receives signals until it is stopped.
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
        """Returns once `heard` has been called for every signal so far."""
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
    """Ends the process on a signal: after the command's cleanup, after `PATIENCE_SECONDS`, or at the second signal."""

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
            except RuntimeError:  # the process is ending anyway
                leave(exit_code(number))
        elif time.monotonic() - self._since > ECHO_SECONDS:
            leave(exit_code(number))

    def _give_up(self) -> None:
        os.write(2, b"\ndpo-jax: interrupted\n")
        leave(exit_code(self.received))


class StopSignals:
    """Signal handling during training: the first SIGTERM or SIGINT sets `received`, a second one ends the process at once.

    A context manager that restores the previous handlers.
    """

    def __init__(self) -> None:
        self.received, self._first, self._since = 0, 0, 0.0
        self._previous = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
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
        """Called in a thread, because a running compilation blocks Python's handlers."""
        if self._first:
            if time.monotonic() - self._since > ECHO_SECONDS:
                os._exit(exit_code(number))
            return
        self._first, self._since = number, time.monotonic()
        # Not print(): the signal may have interrupted a print, and buffered files are not reentrant.
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving. A second signal stops at once.\n"
        os.write(2, text.encode())


_at_once = False


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Context manager in which a signal ends the process at once, without an exception in the main thread.

    For imports, which need no cleanup: an exception during the initialization of an extension module can crash it.
    """
    global _at_once
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not _terminate:
        yield  # outside of `run_program`
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
    """Run `main()` and end the process with its exit code; with 130 or 143 after SIGINT or SIGTERM, with 1 for an exception.

    Python's module teardown is skipped, because XLA's threads still run then and sometimes crash (139). `atexit` callbacks are
    run before, except after a signal, because they may wait for other hosts.
    """
    code = 1
    atexit.register(lambda: leave(code))  # the first one registered is called last
    interruption = _Interruption()
    listener = Listener(interruption.heard)
    listener.start()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # not if the parent ignored it
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
    except KeyboardInterrupt:
        pass
    except SystemExit as error:  # of argparse: after --help, or a wrong flag that it has named
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        listener.drain()
        if not interruption.received:  # C code may turn a signal into its own error
            traceback.print_exc()
    # An interrupt can also be lost in a C callback.
    with contextlib.suppress(KeyboardInterrupt):
        listener.drain()
    if interruption.received:
        leave(exit_code(interruption.received))
    sys.exit(code)


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def leave(code: int) -> NoReturn:
    """End the process now, after flushing output. If a successful command's output cannot be written, the code becomes 74."""
    failed: list[OSError] = []
    # In a thread, because an interrupted print may hold the lock of its file.
    flush = threading.Thread(target=_flush, args=(failed,), daemon=True)
    try:
        flush.start()
        flush.join(timeout=1.0)
    except RuntimeError:  # Python 3.12 starts no threads during shutdown
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
            if error.errno != errno.EPIPE:  # EPIPE: the reader has closed the pipe
                failed.append(error)
        except (AttributeError, ValueError):  # None, or closed
            pass
