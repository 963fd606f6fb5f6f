"""Mutations of good files, and the invariants that every reader of untrusted input keeps.

A fuzz test takes a good file, and for each mutation of it calls the reader (or a whole command):

    @pytest.mark.parametrize("content", [pytest.param(c, id=str(i)) for i, c in enumerate(mutations(GOOD, count=mutants(60)))])

`mutants` gives many more under `-m soak`. `outcome` runs one and checks: the error is one that the program documents and names
the file; it takes at most `SECONDS`. Wrong meanings are for the test itself to check: what is accepted means what was written.
"""

import contextlib
import json
import os
import random
import re
import signal
import string
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dpo_jax.cli.exit_codes import EXIT_CODES, exit_code, message

SECONDS = 10.0
SOAK = "DPO_JAX_SOAK_MUTANTS"  # how many mutations a reader gets; the default of each test otherwise
COUNTS = "DPO_JAX_SOAK_COUNTS"  # a file to which the number of those that were tried is added

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**399, -(10**399), 0.5, -0.0, 1e308, 5e-324),
    *(
        "",
        " ",
        "0",
        "null",
        "A",
        "C",
        "\0",
        "\ud800",
        "\u202e",
        "\x1b[2J",
        "é",
        "x" * 3000,
        "/etc/passwd",
        "../..",
        "{}",
        "[",
        "{{",
    ),
    *([], {}, [[]], [None], {"": None}, [0] * 40, {"a": {"b": {"c": []}}}),
]
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 5000, '{"a":' * 300, '"\\ud800"', "tru", "01", "'x'", ""]
BYTES = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n\n",
    b"\xe2\x80\xa8",
    b"\x1b[2J",
    b"<![X[",
    b"&#x110000;",
]


def mutations(good: bytes, *, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged or foreign versions of a good file, the same ones for the same `seed`."""
    for number in range(count):
        generator = random.Random(f"{seed}:{number}")
        mutant = good
        for _ in range(generator.choice([1, 1, 1, 2, 4])):
            change = generator.choice(
                [_cut, _flip, _insert, _delete, _repeat, _swap, _number, _json_value, _json_key, _json_literal]
            )
            mutant = change(mutant, generator)
        yield mutant
    if COUNTS in os.environ:
        with open(os.environ[COUNTS], "a") as file:
            file.write(f"{count}\n")


def mutants(few: int) -> int:
    """How many mutations a test is to try: `few`, or what the environment says for a long run (`-m soak`)."""
    return max(few, int(os.environ.get(SOAK, few)))


def outcome(work: Callable[[], Any], *, names: str = "") -> Any:
    """What `work` returns, or the exception that it ends with, which is one of those that the program documents.

    `names`: what its message has to name, such as the file.
    """
    try:
        with time_limit():
            return work()
    except Exception as problem:
        error = problem
    code = exit_code(error)
    if code not in {code for *_, code in EXIT_CODES}:
        raise AssertionError(f"not a documented error: {type(error).__name__}: {error}") from error
    said = message(error)
    assert names in said, f"{names!r} is not named in: {said}"
    assert len(said) < 4000, f"a message of {len(said)} characters"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said), f"control characters in: {said!r}"
    return error


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS):
    """Fails what computes for longer than `seconds`, or waits for ten times that: other work may share the cores."""

    def late(number, frame):
        pytest.fail(f"took longer than {seconds} s")  # a BaseException: no reader takes it for an error of a library

    limits = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 10 * seconds)}
    before = {number: signal.signal(number, late) for number in limits}
    for timer, most in limits.values():
        signal.setitimer(timer, most)
    try:
        yield
    finally:
        for timer, _ in limits.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


# Bytes


def _span(content: bytes, generator: random.Random, longest: int = 64) -> tuple[int, int]:
    start = generator.randrange(len(content) + 1)
    return start, min(len(content), start + generator.randrange(1, longest))


def _cut(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content) + 1)]


def _flip(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 8])):
        if changed:
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _insert(content: bytes, generator: random.Random) -> bytes:
    at = generator.randrange(len(content) + 1)
    odd = generator.choice([*BYTES, generator.randbytes(8), generator.choice(string.printable).encode()])
    return content[:at] + odd + content[at:]


def _delete(content: bytes, generator: random.Random) -> bytes:
    start, end = _span(content, generator)
    return content[:start] + content[end:]


def _repeat(content: bytes, generator: random.Random) -> bytes:
    start, end = _span(content, generator)
    return content[:end] + content[start:end] * generator.choice([1, 3, 200]) + content[end:]


def _swap(content: bytes, generator: random.Random) -> bytes:
    lines = content.split(b"\n")
    a, b = generator.randrange(len(lines)), generator.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _number(content: bytes, generator: random.Random) -> bytes:
    """Another number in the place of one."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not found:
        return content
    place = generator.choice(found)
    other = generator.choice([b"0", b"-1", b"1", b"7", b"1e400", b"1000000000000", b"0.1", b"9" * 400, b"null"])
    return content[: place.start()] + other + content[place.end() :]


# JSON: the whole content, or one of its lines


def _json_value(content: bytes, generator: random.Random) -> bytes:
    return _with_json(content, generator, lambda root: _replace(root, generator, generator.choice(ODD_VALUES)))


def _json_literal(content: bytes, generator: random.Random) -> bytes:
    """A value that no `json.dumps` writes."""
    mark = "\x01literal\x01"
    changed = _with_json(content, generator, lambda root: _replace(root, generator, mark))
    return changed.replace(json.dumps(mark).encode(), generator.choice(LITERALS).encode())


def _json_key(content: bytes, generator: random.Random) -> bytes:
    """An object that lacks a key, has another one, or has one twice."""

    def change(root: Any) -> Any:
        objects = [node for node in _nodes(root) if isinstance(node, dict) and node]
        if objects:
            node = generator.choice(objects)
            key = generator.choice(list(node))
            value = node.pop(key)
            if (other := generator.choice(["", None, key.upper(), "x" + key])) is not None:
                node[other] = value
        return root

    if generator.random() < 0.2:
        keys = re.findall(rb'"\w+"\s*:\s*[^,{}\[\]]+', content)
        return content.replace(keys[0], keys[0] + b"," + generator.choice(keys), 1) if keys else content
    return _with_json(content, generator, change)


def _with_json(content: bytes, generator: random.Random, change: Callable[[Any], Any]) -> bytes:
    lines = content.split(b"\n")
    for whole in (True, False):
        number = generator.randrange(len(lines))
        with contextlib.suppress(ValueError, RecursionError):
            root = change(json.loads(content if whole else lines[number]))
            text = json.dumps(root, ensure_ascii=generator.random() < 0.5).encode("utf-8", "surrogatepass")
            return text if whole else b"\n".join([*lines[:number], text, *lines[number + 1 :]])
    return content


def _nodes(root: Any) -> Iterator[Any]:
    yield root
    children = root.values() if isinstance(root, dict) else root if isinstance(root, list) else ()
    for child in list(children):
        yield from _nodes(child)


def _replace(root: Any, generator: random.Random, value: Any) -> Any:
    """`root` with another value somewhere."""
    places = [
        (node, key)
        for node in _nodes(root)
        for key in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ())
    ]
    if not places or generator.random() < 0.02:
        return value
    node, key = generator.choice(places)
    node[key] = value
    return root
