"""Progress display of commands: one updating line on a terminal, separate lines in a log file.

`reported` names anything that may take long; `training_progress` does the same for training. Both write to standard error. A
thread reports after `SILENCE_SECONDS` without output, so no phase is silent for longer, whatever it waits for.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

from dpo_jax.data.terminal import one_line, printable

SILENCE_SECONDS = 10.0
FIRST_WORD_SECONDS = 4.0  # of silence before the first line in a log file
NOTABLE_SECONDS = 2.0  # shorter tasks get no line at their end
REDRAW_SECONDS = 0.5
SAY = functools.partial(print, flush=True)
"""Default output of a run's messages: standard output, one line each."""
NARROW = 80  # columns if the terminal's width is unknown


class Shown(Protocol):
    """Something that a board shows: a line of at most `width` characters (None: no limit), and when to write it to a log
    file."""

    began: float

    def line(self, width: int | None = None) -> str: ...
    def due(self, silent: float) -> bool: ...


class Task:
    """A task and its progress. With `total` 0 only its duration is shown."""

    def __init__(self, board: Board, what: str, *, total: int = 0, unit: str = "") -> None:
        self._board, self.what, self.total, self.unit = board, what, total, unit
        self.done, self.note, self.began, self.mentioned = 0, "", board.clock(), False
        self._pace = Pace(board)

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """`count` more of `total` are done. `note` is shown after the numbers."""
        self.done, self.note = self.done + count, note
        self._pace.tick(count)

    def due(self, silent: float) -> bool:
        first = not self.mentioned and self.seconds() >= FIRST_WORD_SECONDS <= silent
        self.mentioned = self.mentioned or first or silent >= SILENCE_SECONDS
        return first or silent >= SILENCE_SECONDS

    def line(self, width: int | None = None) -> str:
        left = self._pace.seconds(self.total - self.done)
        parts = [
            f"{self.done:,} of {self.total:,} {self.unit}".rstrip() if self.total else "",
            self.note,
            f"{rate(1 / self._pace.each)}/s" if self.total and self._pace.each else "",
            f"ETA {duration(left)}" if left is not None and self.total > self.done else f"{self.seconds():.0f} s",
            self._board.compilation() if "compil" not in self.what else "",
        ]
        return cut(f"{self.what}: {', '.join(part for part in parts if part)}", width)

    def seconds(self) -> float:
        return self._board.clock() - self.began

    def result(self) -> str:
        count = f"{self.done:,} {self.unit} in " if self.total else ""
        return f"{self.what}: {count}{duration(self.seconds())}"


class Board:
    """The running tasks, innermost last. One line of a terminal, or a log file, shows the innermost.

    `file` defaults to the current standard error. Times are seconds of `clock`. With `alone` no thread is started, and the
    caller must call `tick`.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        columns: int | None = None,
        alone: bool = False,
    ) -> None:
        self._file, self._columns, self._alone, self.clock = file, columns, alone, clock
        self.quiet = False  # True on all hosts but the first
        self.compiled = 0.0  # seconds of compilation in this process so far
        self._compiling: float | None = None  # start time of the current compilation
        self._tasks: list[Shown] = []
        self._lock = threading.RLock()
        self._drawn, self._last = False, clock()
        self._thread: threading.Thread | None = None

    def push(self, task: Shown) -> None:
        with self._lock:
            if not self._tasks:
                self._last = self.clock()
            self._tasks.append(task)
            if self._thread is None and not self._alone:
                self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self._thread.start()

    def pop(self, task: Shown) -> None:
        with self._lock:
            self._tasks.remove(task)
            self._compiling = None
            self._erase()

    def say(self, line: str) -> None:
        """Print a permanent line."""
        with self._lock:
            self._erase()
            self._write(f"{printable(line)}\n")
            self._last = self.clock()

    def draw(self) -> None:
        """Redraw the innermost task on a terminal."""
        with self._lock:
            if self._tasks and self.terminal:
                line = one_line(self._tasks[-1].line(self.columns - 1))
                self._write(f"\r{cut(line, self.columns - 1)}\x1b[K")
                self._drawn = True

    def tick(self) -> None:
        """Periodic update: redraw on a terminal, or a line in a log file after too long a silence."""
        with self._lock:
            if not self._tasks:
                return
            task = self._tasks[-1]
            if self.terminal:
                if self.clock() - task.began >= REDRAW_SECONDS or self._drawn:
                    self.draw()
            elif task.due(self.silent_for()):
                self.say(task.line())

    def silent_for(self) -> float:
        return self.clock() - self._last

    @property
    def terminal(self) -> bool:
        try:
            return self._to.isatty()
        except (AttributeError, ValueError):
            return False

    @property
    def columns(self) -> int:
        return self._columns or shutil.get_terminal_size((NARROW, 24)).columns

    def compile_began(self) -> None:
        self._compiling = self.clock()

    def compile_ended(self, seconds: float) -> None:
        self._compiling = None
        if seconds > 0.1:  # single operations outside of programs compile faster
            self.compiled += seconds

    def compilation(self) -> str:
        """Text about a running compilation; empty for a short one."""
        since = self._compiling
        if since is None or self.clock() - since < NOTABLE_SECONDS:
            return ""
        return f"compiling for {duration(self.clock() - since)}"

    @property
    def _to(self) -> TextIO:
        return self._file or sys.stderr

    def _erase(self) -> None:
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn = False

    def _write(self, text: str) -> None:
        # A run must not fail because its progress output cannot be written.
        if not self.quiet:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._to.write(text)
                self._to.flush()

    def _run(self) -> None:
        while True:
            time.sleep(REDRAW_SECONDS)
            with self._lock:
                if not self._tasks:
                    self._thread = None
                    return
            self.tick()


BOARD = Board()
"""The board of this process."""


@contextlib.contextmanager
def reported(what: str, *, total: int = 0, unit: str = "", brief: bool = False, board: Board | None = None) -> Iterator[Task]:
    """Context manager that shows a task such as "loading weights" while it runs, and its duration at the end unless short.

    With a `total`, `advance` counts, and speed and remaining time are shown once they are steady. `brief` omits the line at the
    end, for tasks that print something else or repeat often.
    """
    board = board or BOARD
    task = Task(board, what, total=total, unit=unit)
    board.push(task)
    try:
        yield task
    except BaseException:
        board.pop(task)
        raise
    board.pop(task)
    if not brief and (task.mentioned or task.seconds() >= NOTABLE_SECONDS):
        board.say(task.result())


class Pace:
    """Duration of one of many equal parts. The first part, and parts with a compilation, are ignored."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._now, self._compiled = board.clock(), board.compiled
        self._parts, self._spent, self._count, self._steady = 0, 0.0, 0, 0

    def tick(self, count: int = 1) -> None:
        now = self._board.clock()
        self._parts += 1
        if self._parts > 1 and not self.compiled():
            self._spent, self._count, self._steady = self._spent + now - self._now, self._count + count, self._steady + 1
        self._now, self._compiled = now, self._board.compiled

    def compiled(self) -> bool:
        """Whether something was compiled since the last part."""
        return self._board.compiled != self._compiled

    @property
    def each(self) -> float | None:
        """Seconds per part; None until two steady parts are done."""
        return self._spent / self._count if self._steady >= 2 else None

    def seconds(self, count: int) -> float | None:
        """Estimated seconds for `count` more parts."""
        return None if self.each is None else self.each * count


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """`12 s`, `3:05` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cut(text: str, width: int | None) -> str:
    return text if width is None else text[: max(0, width)]
