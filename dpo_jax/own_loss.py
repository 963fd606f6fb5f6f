"""Losses of your own, named `FILE.py:FUNCTION`. They are found and described without running the file.

This module imports neither JAX nor numpy, so that `--help` and checks answer at once.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class OwnLoss(NamedTuple):
    """A function `(logps, ref_logps, ...)` of a file."""

    file: Path
    function: str
    required: tuple[str, ...]  # arguments after the first two that have no default
    optional: tuple[str, ...]  # those that have one


def is_own(name: str) -> bool:
    """Whether a name of a loss is that of a file and a function."""
    return ".py:" in name


def file_of(name: str) -> Path:
    return Path(name.rpartition(":")[0]).expanduser()


def find(name: str) -> OwnLoss:
    """The function with this name. ValueError, with the place, if the file cannot be read or has no such function."""
    return _find(name, _content(name))


def _content(name: str) -> bytes:
    try:
        return file_of(name).read_bytes()
    except OSError as error:
        raise ValueError(f"{name.rpartition(':')[0]}: {error.strerror}") from error


def _find(name: str, content: bytes) -> OwnLoss:
    path, _, function = name.rpartition(":")
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(f"{path}{line}: {error.args[0]}") from error
    found = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in found:
        others = f"; it has {', '.join(found)}" if found else ""
        raise ValueError(f"{path} has no function {function!r} at its top level{others}")
    arguments = found[function]
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if len(positional) < 2:
        raise ValueError(f"{name}: the first two arguments of a loss are (logps, ref_logps)")
    defaults = len(arguments.defaults)
    optional = positional[len(positional) - defaults :]
    required = positional[2 : len(positional) - defaults]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        (required if default is None else optional).append(argument.arg)
    return OwnLoss(file_of(name), function, tuple(required), tuple(optional))


_LOADED: dict[Path, str] = {}  # SHA-256 of each file as it was loaded last


def load(name: str) -> Callable[..., Any]:
    """Runs the file and returns its function. ValueError, naming the line, for any error in it."""
    content = _content(name)  # once: what is described, run and recorded is the same
    found, file = _find(name, content), file_of(name).absolute()
    digest = hashlib.sha256(content).hexdigest()
    module = types.ModuleType(f"own_loss_{digest[:12]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(content, str(file), "exec", dont_inherit=True), module.__dict__)
        function = getattr(module, found.function)
    except Exception as error:
        del sys.modules[module.__name__]
        raise ValueError(described(error, found.file)) from error
    _LOADED[file] = digest
    return function


def digest_of(file: Path) -> str | None:
    """SHA-256 of a file as it was loaded last, even if it has changed since; else as it is. None if it is not there."""
    if (known := _LOADED.get(file.absolute())) is not None:
        return known
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def described(error: BaseException, file: Path) -> str:
    """An error in one line, after the last line of `file` in its traceback: `mine.py:3: TypeError: ...`."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file.absolute():
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    place = f"{file}:{lines[-1]}" if lines else f"{file}"
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{place}: {type(error).__name__}" + (f": {message}" if message else "")
