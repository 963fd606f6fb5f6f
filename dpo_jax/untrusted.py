"""Readers of untrusted input: files and replies that this program did not write, or that may be damaged.

Each kind of input has one reader (JSON here; data rows in `data`, model folders in `models`, replies of a judge in `judge`). A
reader checks size and depth first, wraps library calls in `reading`, and raises `Unreadable` for anything that is wrong. Code
that uses a reader's result does not check again.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gc
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from dpo_jax.writing import of_the_system

_CAUSE = 300  # characters of a library's message that are repeated
_CHUNK = 2**20


class Unreadable(ValueError):
    """Untrusted input that cannot be used. The message says where, what is wrong, and what to do about it."""


@dataclasses.dataclass
class Limits:
    """Limits on untrusted input. Each is an option `--limits.NAME` of the program."""

    line_mb: int = 64  # one line of a text file, decompressed
    file_mb: int = 1024  # a file that is read whole
    reply_kb: int = 1024  # one reply of an endpoint
    depth: int = 100  # nesting of JSON and HTML
    layers: int = 1000  # of a model
    model_b: int = 10_000  # parameters of a model, in billions
    template_s: float = 5  # a chat template over one conversation
    template_mb: int = 1024  # its memory
    growth: int = 100  # growth factor of a text in a tokenizer's steps
    pattern_s: float = 5  # a tokenizer's regular expressions over some texts

    def check(self, name: str, found: float, where: str | Path, *, what: str) -> None:
        """Raises `Unreadable` if `found` exceeds the limit `name`. `what` names what was measured: "bytes in one line"."""
        units = {"mb": 2**20, "kb": 2**10}.get(name.rpartition("_")[2], 1)
        if found > getattr(self, name) * units:
            raise Unreadable(f"{where}: {found:,} {what}; {self.remedy(name)}")

    def remedy(self, name: str) -> str:
        """The remedy at the end of a message about the limit `name`."""
        unit = {"mb": " MB", "kb": " kB", "s": " s"}.get(name.rpartition("_")[2], "")
        return f"the limit is {getattr(self, name):,}{unit} (raise it with --limits.{name.replace('_', '-')})"


LIMITS = Limits()
"""The limits of this process, like `csv.field_size_limit` or `PIL.Image.MAX_IMAGE_PIXELS`. The program sets them once."""


@contextlib.contextmanager
def reading(where: object, *, remedy: str = "", error: Callable[[str], Exception] = Unreadable) -> Iterator[None]:
    """A context that turns whatever a library raises about its input into one `error`: "where: cause; remedy".

    `Unreadable` and its subclasses pass unchanged, as do system errors that name a file (missing, no permission, disk full).
    """
    try:
        yield
    except Unreadable:
        raise
    except OSError as problem:
        if problem.errno is not None and problem.filename is not None:
            raise
        raise error(_message(where, problem, remedy)) from problem
    except Exception as problem:
        raise error(_message(where, problem, remedy)) from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":  # how a library in Rust says that it has a bug
            raise
        raise error(_message(where, problem, remedy)) from problem


def _message(where: object, problem: BaseException, remedy: str) -> str:
    return f"{where}: {cause_of(problem)}" + (f"; {remedy}" if remedy else "")


def cause_of(problem: BaseException) -> str:
    """The message of a library's exception, in one short line."""
    match problem:
        case MemoryError():
            return "needs more memory than this machine has"
        case RecursionError():
            return "nested too deep"
        case UnicodeDecodeError():
            return f"not UTF-8: byte {problem.object[problem.start]:#04x} at byte {problem.start}"
        case KeyError():
            return f"has no {problem.args[0]!r}" if problem.args else "lacks an entry"
        case _:
            text = " ".join(str(problem).split())
            text = text if len(text) <= _CAUSE else text[:_CAUSE] + "..."
            return (
                text
                if isinstance(problem, Unreadable)
                else f"{type(problem).__name__}: {text}"
                if text
                else type(problem).__name__
            )


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file that is small enough to be read whole. Raises `Unreadable`, or OSError naming the file."""
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        LIMITS.check("file_mb", size, path, what="bytes")
        # A pipe, or a file of /proc, has no size. With a limit Python reserves as much memory.
        content = file.read(-1 if size else LIMITS.file_mb * 2**20 + 1)
    LIMITS.check("file_mb", len(content), path, what="bytes or more")
    return content


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a UTF-8 text file. Raises `Unreadable`, or OSError naming the file."""
    with reading(Path(path), remedy="save it as UTF-8"):
        return read_bytes(path).decode("utf-8")


def read_object(path: str | os.PathLike[str], *, remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises `Unreadable`, or OSError naming the file."""
    return parse_object(read_bytes(regular(path)), path, remedy=remedy)


class Lines(NamedTuple):
    """The content of a log: its valid rows, and what is wrong with each of the other lines ("line 3: ...")."""

    rows: list[dict[str, Any]]
    damaged: list[str]

    @property
    def words(self) -> str:
        """The lines that were skipped, in one sentence; empty if there are none."""
        if not self.damaged:
            return ""
        more = f"; and {len(self.damaged) - 3} more" if len(self.damaged) > 3 else ""
        count = len(self.damaged)
        lines = f"{count:,} damaged line{'s are' if count > 1 else ' is'} left out, {len(self.rows):,} rows are used"
        return f"{lines}: {'; '.join(self.damaged[:3])}{more}"


def read_lines(path: str | os.PathLike[str], check: Callable[[dict[str, Any]], Any] = lambda row: None) -> Lines:
    """The objects of a JSON Lines file, one per line. `check(row)` raises `Unreadable` for an unusable one.

    Raises OSError naming the file, and `Unreadable` if it is not a regular file.
    """
    found = Lines([], [])
    with regular(path).open("rb") as file:
        for number, line in enumerate(lines_of(file), start=1):
            try:
                if isinstance(line, LongLine):
                    raise line
                if line.strip():
                    check(row := parse_object(line, "no JSON object"))
                    found.rows.append(row)
            except Unreadable as error:
                found.damaged.append(f"line {number}: {error}")
    return found


def regular(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is a regular file; reading a pipe would block. Otherwise raises `Unreadable`, or OSError.

    Names such as /dev/fd/63 and /dev/stdin, which a shell has just opened, may be pipes.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode) and not of_the_system(path):
        raise Unreadable(f"{path}: expected a file, got {special_kind(path)}")
    return path


def special_kind(path: Path) -> str:
    """The kind of a path that is not a regular file: "a folder", "a pipe", "a socket", "a device"."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(path.stat().st_mode), "a device")


def check_name(path: str | os.PathLike[str]) -> None:
    """Raises `Unreadable` if `path` is not UTF-8: Rust and C++ libraries (tokenizers, TensorStore, TFDS) could not open it."""
    name = os.fsencode(os.path.abspath(path))
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        shown = name.decode("utf-8", "backslashreplace")
        raise Unreadable(
            f"{shown}: the name is not UTF-8, as tokenizers, checkpoints and TFDS need it; rename the folder"
        ) from None


def parse_object(content: bytes | str, where: str | os.PathLike[str], *, remedy: str = "") -> dict[str, Any]:
    """The JSON object in `content`, which came from `where`. Raises `Unreadable`."""
    with reading(str(where), remedy=remedy):
        found = parse_json(content)
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, got {kind_of(found)}")
        return found


def parse_json(content: bytes | str, *, nan: bool = False) -> Any:
    """The value of a JSON text (RFC 8259). Errors: NaN, infinity, duplicate keys, too large numbers, too deep nesting.

    With `nan`, NaN and infinity are numbers, as Python's `json` and pandas write them.
    A byte order mark at the start, as editors on Windows write it, is ignored.
    Raises ValueError (including UnicodeDecodeError) or RecursionError; call it inside `reading`.
    """
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8") if isinstance(content, bytes) else content
    # Counting is fast, and few texts have so many brackets; only for these is the depth measured.
    if text.count("[") + text.count("{") > LIMITS.depth and (deep := depth_of(text, LIMITS.depth)) > LIMITS.depth:
        raise TooDeep(f"at least {deep} levels deep; {LIMITS.remedy('depth')}")
    with without_garbage() if len(text) > _CHUNK else contextlib.nullcontext():
        constant = float if nan else _constant
        return json.loads(text, object_pairs_hook=_unique, parse_constant=constant, parse_int=_integer, parse_float=_float)


@contextlib.contextmanager
def without_garbage() -> Iterator[None]:
    """A context without garbage collection: for a large text, most of the time would go into scanning the many new objects."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def depth_of(text: str, enough: float = float("inf")) -> int:
    """Maximum nesting of brackets in a JSON text, ignoring those in strings. Counting stops beyond `enough`."""
    import numpy as np  # imported here: only long texts need it

    plain = text.replace("\\\\", "").replace('\\"', "").encode("ascii", "replace")  # now each quote begins or ends a string
    step = np.zeros(256, np.int8)
    step[list(b"[{")], step[list(b"]}")] = 1, -1
    deepest = depth = quotes = 0
    for start in range(0, len(plain), _CHUNK):
        part = np.frombuffer(plain, np.uint8)[start : start + _CHUNK]
        strings = quotes + np.cumsum(part == ord('"'))
        depths = depth + np.cumsum(np.where(strings % 2, 0, step[part]))
        deepest = max(deepest, int(depths.max()))
        if deepest > enough:
            return int(enough) + 1
        depth, quotes = int(depths[-1]), int(strings[-1])
    return deepest


class TooDeep(ValueError):
    """Nested deeper than `limits.depth`."""


class DuplicateKey(ValueError):
    """An object of a JSON text has the same key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} occurs twice")
        self.key = key


class BadNumber(ValueError):
    """A number in a JSON text is not a number (NaN), or too large for a float."""


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        seen: set[str] = set()
        raise DuplicateKey(next(key for key, _ in items if key in seen or seen.add(key)))
    return found


def _constant(literal: str) -> NoReturn:
    raise BadNumber(f"{literal} is not a JSON number")


def _integer(literal: str) -> int:
    if len(literal) > 300:  # float() of it may overflow, and int() takes quadratic time
        raise BadNumber(f"a number of {len(literal)} digits")
    return int(literal)


def _float(literal: str) -> float:
    value = float(literal)
    if value in (float("inf"), float("-inf")):
        raise BadNumber(f"{literal[:40]} is too large a number")
    return value


def kind_of(value: Any) -> str:
    """The name of a JSON value's type: "an array", "a number", "null"."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case dict():
            return "an object"
        case _:
            return type(value).__name__


class LongLine(Unreadable):
    """A line longer than `limits.line_mb`."""


def lines_of(file: IO[bytes]) -> Iterator[bytes | LongLine]:
    """The lines of an open file, each with its newline. A line that is too long is skipped, and the next one follows.

    Lines end at newlines only, because U+2028 and similar characters may occur inside a JSON string.
    """
    most = LIMITS.line_mb * 2**20
    while line := file.readline(most + 1):
        if len(line) <= most:
            yield line
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := file.readline(_CHUNK)):
            length += len(line)
        yield LongLine(f"a line of {length:,} bytes; {LIMITS.remedy('line_mb')}")
