"""Atomic file writing, with the file's name in every error.

Python names a file that it cannot open, but not one whose write, flush or fsync fails on a full disk. Libraries in Rust and C++
raise their own errors. Every writer of this package opens its file with `writing` (a log with `appending`, a library's file
with `placing`), or runs inside `naming`.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded", errno.EROFS: "Read-only file system"}


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context that adds the name `path` to write errors without one; a library's error becomes an `OSError` with number."""
    try:
        yield
    except OSError as error:
        if error.filename is None and (error.errno is not None or error_number(str(error))):
            error.filename = str(path)
        raise
    except Exception as error:  # of safetensors, tokenizers, array_record
        if (number := error_number(str(error))) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def naming_errors(file: IO[Any], name: str) -> None:
    """Makes an open file add its name to its errors; for standard output, for example, to which `print` writes."""

    def named(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with naming(name):
                return work(*arguments)

        return call

    for method in ("write", "flush"):
        setattr(file, method, named(getattr(file, method)))


def error_number(text: str) -> int | None:
    """The number of the system error that a library's message mentions, if any."""
    if match := re.search(r"\(os error (\d+)\)", text):  # Rust
        return int(match[1])
    return next((number for number, words in FULL.items() if words in text), None)  # TensorStore, array_record


def with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it: a full disk, for example, arrives wrapped in the writer's own exception."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


@contextmanager
def writing(path: str | os.PathLike[str], mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """A file open for writing (text is UTF-8) that appears under its name once it is complete and on disk.

    It is written beside its place and then moved in. A reader sees all of the new file or all of the old; after an error or a
    kill the old one remains. A link is replaced, not its target. A terminal, a pipe or /dev/null is written directly. Mode "x"
    raises FileExistsError if the file exists. Errors name the file.
    """
    path = Path(path)
    options = options if "b" in mode else {"encoding": "utf-8", **options}
    with naming(path):
        before = _to_be_replaced(path)
        if before is not None and "x" in mode:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if before is not None and not _is_file(path, before):
            if stat.S_ISFIFO(before.st_mode) and not of_the_system(path):
                _check_reader(path)
            with open(path, mode, **options) as file:
                yield file
            return
        temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name[-60:]}")
        try:
            with open(temporary, mode.replace("w", "x"), **options) as file:
                if before is not None:  # a file that only its owner may read stays so
                    os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename == str(temporary):
                error.filename, error.filename2 = str(path), None
            raise


@contextmanager
def placing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`writing` for a library that takes a path: a file of the same name in a temporary folder beside, moved in at the end."""
    path = Path(path)
    folder = path.with_name(f".{secrets.token_hex(4)}-{path.name[-60:]}")
    with naming(path):
        _to_be_replaced(path)
        try:
            folder.mkdir()
            yield folder / path.name
            os.replace(folder / path.name, path)
        except OSError as error:
            if error.filename in (str(folder), str(folder / path.name)):
                error.filename, error.filename2 = str(path), None
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _to_be_replaced(path: Path) -> os.stat_result | None:
    """The status of what a new file will replace; None if there is nothing. Raises OSError if it may not be replaced."""
    try:
        before = path.stat()
    except OSError:
        return None
    if stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return before


def _check_reader(path: Path) -> None:
    """Raises OSError for a pipe without a reader: opening it would block for ever."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(errno.ENXIO, "is a pipe without a reader; remove it", str(path)) from None


def _is_file(path: Path, status: os.stat_result) -> bool:
    """Whether `path` is the name of a regular file. /dev/stdout is not, even where the shell redirects it to one (`> file`)."""
    return stat.S_ISREG(status.st_mode) and not of_the_system(path)


def same_place(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths name one place, also through links and "~"."""
    one, two = (os.path.realpath(os.path.expanduser(each)) for each in (path, other))
    return one == two


def of_the_system(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a name of the system for a device or an open file, such as /dev/stdout, /dev/fd/63 or /proc/self/fd/1.

    /dev/shm is a disk in memory like any other.
    """
    return str(path).startswith(("/dev/", "/proc/")) and not str(path).startswith("/dev/shm/")


@contextmanager
def appending(path: str | os.PathLike[str], mode: str = "a") -> Iterator[IO[Any]]:
    """A log open for appending (text is UTF-8). All its errors name the file, including those on closing."""
    with naming(path), open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


def leftovers(folder: str | os.PathLike[str], *names: str) -> list[Path]:
    """Unfinished files of `writing` that killed processes left in `folder`. `names`: patterns (`fnmatch`) to look for.

    Hold a lock while calling this: a file that another process is still writing looks the same.
    """
    found = [(path, re.fullmatch(r"\.[0-9a-f]{8}-(.+)", path.name)) for path in sorted(Path(folder).iterdir())]
    return [path for path, name in found if name and any(fnmatch.fnmatchcase(name[1], pattern) for pattern in names)]


MARK = ".made_by_dpo_jax"


def empty_folder(folder: str | os.PathLike[str], *, ours: Sequence[str] = ()) -> Path:
    """A new empty folder. One that an earlier call made is deleted first, with its content.

    Raises FileExistsError for any other folder that is not empty: only a folder with the mark of an earlier call is deleted, or
    one with a file named in `ours` (left by versions without marks).
    """
    folder = Path(folder)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or not _made_here(folder, ours)):
        words = "already exists and was not made by dpo-jax; move it away, or choose another folder"
        raise FileExistsError(errno.EEXIST, words, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    # The mark is written first and stays, so that a folder left by a kill can be emptied again.
    write_text(folder / MARK, "dpo-jax deletes this folder before it writes it again\n")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    return folder


def _made_here(folder: Path, ours: Sequence[str]) -> bool:
    names = [
        name for name in os.listdir(folder) if not (name.startswith(".") and name.endswith(f"-{MARK}"))
    ]  # a half-written mark
    return not names or bool({MARK, *ours} & set(names))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file, completely or not at all."""
    with writing(path) as file:
        file.write(text)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces a file's content atomically, even if the machine crashes."""
    path = Path(path)
    with writing(path, "wb") as file:
        file.write(content)
    with naming(path):
        descriptor = os.open(path.parent, os.O_RDONLY)  # a rename is only on disk once its folder is
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
