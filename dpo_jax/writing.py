"""Files being written, and the name in the error where that fails.

Python names a file that it cannot open, but not one whose write, flush or fsync fails on a full disk; libraries in Rust and C++
raise errors of their own. Every writer of this package opens its file with `writing` (a log with
`appending`, what a library writes with `placing`), or stands in `naming`.
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
    """Gives an error of writing that names no file the name `path`; one of a library becomes an `OSError` with its number."""
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
    """Makes an open file name itself in its errors: standard output, say, which `print` writes."""

    def named(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with naming(name):
                return work(*arguments)

        return call

    for method in ("write", "flush"):
        setattr(file, method, named(getattr(file, method)))


def error_number(text: str) -> int | None:
    """The number of the system's error that the message of a library tells of, if it does."""
    if match := re.search(r"\(os error (\d+)\)", text):  # Rust
        return int(match[1])
    return next((number for number, words in FULL.items() if words in text), None)  # TensorStore, array_record


@contextmanager
def writing(path: str | os.PathLike[str], mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """A file open for writing, in UTF-8 if it is text, that appears under its name once it is complete and on disk.

    It is written beside and moved in: a reader sees all of the new file or all of the old, and after an error or a kill the old
    one. A link in its place is replaced, and what it points to left alone. A terminal, a pipe or /dev/null is written directly.
    With mode "x" FileExistsError is raised where there is a file. Errors name the file.
    """
    path = Path(path)
    options = options if "b" in mode else {"encoding": "utf-8", **options}
    with naming(path):
        before = _to_be_replaced(path)
        if before is not None and "x" in mode:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if before is not None and not _is_file(path, before):
            if stat.S_ISFIFO(before.st_mode) and not str(path).startswith(("/dev/", "/proc/")):
                _check_reader(path)
            with open(path, mode, **options) as file:
                yield file
            return
        temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name[-60:]}")
        try:
            with open(temporary, mode.replace("w", "x"), **options) as file:
                if before is not None:  # a file that only its owner may read stays one
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
    """`writing` for a library that takes a path: one of the same name in a folder beside, whose file is moved in at the end."""
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
    """What a file is to take the place of; None if that is nothing. Raises OSError where it may not."""
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
    """Raises OSError for a pipe that nobody reads: opening it would wait for ever."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(errno.ENXIO, "is a pipe that nobody reads; remove it", str(path)) from None


def _is_file(path: Path, status: os.stat_result) -> bool:
    """Whether `path` is the name of a file: /dev/stdout is none, though a shell may have made it one (`> file`)."""
    return stat.S_ISREG(status.st_mode) and not str(path).startswith(("/dev/", "/proc/"))


@contextmanager
def appending(path: str | os.PathLike[str], mode: str = "a") -> Iterator[IO[Any]]:
    """A log open for appending, in UTF-8 if it is text. Errors name it, those of closing it as well."""
    with naming(path), open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


def leftovers(folder: str | os.PathLike[str], *names: str) -> list[Path]:
    """What kills have left in `folder` of files that `writing` had begun. `names`: patterns (`fnmatch`) of those to look for.

    While another process may be writing one of them, they are not left but being written: hold a lock.
    """
    found = [(path, re.fullmatch(r"\.[0-9a-f]{8}-(.+)", path.name)) for path in sorted(Path(folder).iterdir())]
    return [path for path, name in found if name and any(fnmatch.fnmatchcase(name[1], pattern) for pattern in names)]


MARK = ".made_by_dpo_jax"


def empty_folder(folder: str | os.PathLike[str], *, ours: Sequence[str] = ()) -> Path:
    """An empty folder, made here. One that an earlier call made is deleted with all that lies in it.

    Raises FileExistsError for any other that holds something: only a folder with the mark of an earlier call, or with a file of
    a name in `ours` (those that versions without marks left), is deleted.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or not _made_here(folder, ours)):
        words = "is there already, and dpo-jax has not made it; move it away, or choose another folder"
        raise FileExistsError(errno.EEXIST, words, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    # The mark comes first and stays: whatever a kill leaves here can be emptied again.
    write_text(folder / MARK, "dpo-jax deletes this folder before it writes it anew\n")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    return folder


def _made_here(folder: Path, ours: Sequence[str]) -> bool:
    names = [
        name for name in os.listdir(folder) if not (name.startswith(".") and name.endswith(f"-{MARK}"))
    ]  # a mark half written
    return not names or bool({MARK, *ours} & set(names))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes all of a text file or nothing, in UTF-8."""
    with writing(path) as file:
        file.write(text)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """All of the new content or all of the old, also after a crash of the machine."""
    path = Path(path)
    with writing(path, "wb") as file:
        file.write(content)
    with naming(path):
        descriptor = os.open(path.parent, os.O_RDONLY)  # a rename is only on disk once its folder is
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
