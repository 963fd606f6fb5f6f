"""Losses of your own, named `FILE.py:FUNCTION`. They are found and described without running the file.

This module imports neither JAX nor numpy, so that `--help` and checks answer at once.
"""

from __future__ import annotations

import ast
import importlib.util
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


def find(name: str) -> OwnLoss:
    """The function with this name. ValueError, with the place, if the file cannot be read or has no such function."""
    path, _, function = name.rpartition(":")
    file = Path(path).expanduser()
    try:
        tree = ast.parse(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
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
    return OwnLoss(file, function, tuple(required), tuple(optional))


def load(name: str) -> Callable[..., Any]:
    """Runs the file and returns its function. ValueError, naming the line, for any error in it."""
    found = find(name)
    spec = importlib.util.spec_from_file_location(f"own_loss_{found.file.stem}", found.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{place_of(error, found.file)}: {type(error).__name__}: {error}") from error
    return getattr(module, found.function)


def place_of(error: BaseException, file: Path) -> str:
    """`FILE:LINE` of the last line of `file` in the traceback of an error; the file alone if it is not there."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"{file}:{lines[-1]}" if lines else f"{file}"
