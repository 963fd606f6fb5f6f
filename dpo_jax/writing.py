"""Files being written, and the name in the error where that fails.

Python names a file that it cannot open, but not one whose write, flush or fsync fails on a full disk; libraries in Rust and C++
raise errors of their own. Every writer of this package opens its file with `writing`, or stands in `naming`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
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


def error_number(text: str) -> int | None:
    """The number of the system's error that the message of a library tells of, if it does."""
    if match := re.search(r"\(os error (\d+)\)", text):  # Rust
        return int(match[1])
    return next((number for number, words in FULL.items() if words in text), None)  # TensorStore, array_record


@contextmanager
def writing(path: str | os.PathLike[str], mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """A file open for writing, in UTF-8 if it is text. Errors name it, those of closing it as well."""
    options = options if "b" in mode else {"encoding": "utf-8", **options}
    with naming(path), open(path, mode, **options) as file:
        yield file


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes all of a text file, as `Path.write_text` does, in UTF-8."""
    with writing(Path(path)) as file:
        file.write(text)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """All of the new content or all of the old: a reader never sees half of it, also after a crash of the machine."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        descriptor = os.open(path.parent, os.O_RDONLY)  # a rename is only on disk once its folder is
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
