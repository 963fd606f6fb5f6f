"""The common ground of all readers of untrusted input: limits, JSON, lines, and one error whatever a library raises."""

import gc
import io
import json
import math
import random

import pytest
from mutate import mutants, mutations, outcome

from dpo_jax import untrusted
from dpo_jax.cli import main as program
from dpo_jax.untrusted import (
    LIMITS,
    LongLine,
    Unreadable,
    depth_of,
    lines_of,
    parse_json,
    parse_object,
    read_bytes,
    read_text,
    reading,
)

GOOD = json.dumps(
    {"a": [1, 2.5, -3e10, {"b": "text é"}], "c": None, "d": {"e": [[], {}], "f": True}}, ensure_ascii=False
).encode()


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.setattr(untrusted, "LIMITS", LIMITS)
    before = dict(vars(LIMITS))
    yield LIMITS
    vars(LIMITS).update(before)


def finite(value):
    match value:
        case dict():
            return all(map(finite, value.values()))
        case list():
            return all(map(finite, value))
        case int() | float():
            return math.isfinite(float(value))
    return True


def test_json_is_read_as_it_was_written_or_refused_by_name():
    assert parse_object(GOOD, "a.json") == json.loads(GOOD)
    refused = 0
    for mutant in mutations(GOOD, count=mutants(600)):
        found = outcome(lambda: parse_object(mutant, "a.json"), names="a.json: ")  # noqa: B023
        if isinstance(found, dict):
            assert found == json.loads(mutant)
            assert finite(found)
        refused += isinstance(found, Unreadable)
    assert refused > 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1]", "a.json: ValueError: expected a JSON object, got an array; write an object"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "1e999 is too large a number"),
        ('{"a": ' + "9" * 400 + "}", "a number of 400 digits"),
        ('{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        ("{" + '"a":{' * 100 + "}" * 101, "101 levels deep; the limit is 100 (raise it with --limits.depth)"),
        (b'{"a": "\xff"}', "a.json: not UTF-8: byte 0xff at byte 7; write an object"),
        ("", "a.json: JSONDecodeError: Expecting value"),
    ],
)
def test_what_is_not_json_says_why(text, expected):
    with pytest.raises(Unreadable) as caught:
        parse_object(text, "a.json", remedy="write an object")
    assert expected in str(caught.value)


def test_brackets_in_strings_are_not_depth():
    assert depth_of('{"a": "[[[[\\"[[", "b": [[1]]}') == 3
    assert parse_json(json.dumps({"a": "[" * 500})) == {"a": "[" * 500}
    assert depth_of('"' + '\\"' * 200_000) == 0  # in linear time


def test_a_text_of_many_small_values_is_read_without_looking_for_garbage():
    """Python would look at all of them again and again: 20 million empty arrays took 15 s."""
    looked = []
    gc.callbacks.append(lambda phase, info: looked.append(phase))
    try:
        found = parse_json('{"a": [' + "[]," * 400_000 + "[]]}")
    finally:
        gc.callbacks.pop()
    assert (len(found["a"]), len(looked) <= 4) == (400_001, True)
    assert gc.isenabled()


def test_depth_is_that_of_the_parsed_value():
    generator = random.Random(0)

    def value(depth):
        if depth > 6 or generator.random() < 0.3:
            return "".join(generator.choice('a"\\[]{}é,\n') for _ in range(generator.randrange(6)))
        items = [value(depth + 1) for _ in range(generator.randrange(4))]
        return {str(item): item for item in items} if generator.random() < 0.5 else items

    def depth(found):
        inside = list(found.values()) if isinstance(found, dict) else found
        return 1 + max(map(depth, inside), default=0) if isinstance(found, dict | list) else 0

    for _ in range(300):
        found = value(0)
        assert depth_of(json.dumps(found, ensure_ascii=False)) == depth(found)


@pytest.mark.parametrize(
    "error", [ValueError("no\n good"), TypeError(), MemoryError(), RecursionError("x"), KeyError("rope"), OSError("bad magic")]
)
def test_whatever_a_library_raises_becomes_one_error(error):
    with pytest.raises(Unreadable, match="^w.json: .+; fetch it again$") as caught, reading("w.json", remedy="fetch it again"):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_bugs_in_rust_are_errors_and_interrupts_are_not():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(Unreadable, match="PanicException: index out of bounds"), reading("tokenizer.json"):
        raise panic("index out of bounds")
    for passing in (KeyboardInterrupt(), FileNotFoundError(2, "No such file", "here"), Unreadable("said already")):
        with pytest.raises(type(passing)) as caught, reading("tokenizer.json"):
            raise passing
        assert caught.value is passing


def test_a_file_larger_than_the_limit_is_not_read(tmp_path, limits):
    file = tmp_path / "large.json"
    with file.open("wb") as content:
        content.truncate(2**31)  # a hole: it takes no space
    with pytest.raises(Unreadable, match=r"2,147,483,648 bytes; the limit is 1,024 MB \(raise it with --limits.file-mb\)"):
        read_bytes(file)
    limits.file_mb = 1
    with pytest.raises(Unreadable, match="/dev/zero: 1,048,577 bytes or more"):
        read_bytes("/dev/zero")


def test_text_that_is_not_utf_8_names_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(Unreadable, match="a.txt: not UTF-8: byte 0xe9 at byte 3; save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_of_a_line_that_is_too_long_nothing_is_kept_and_the_next_follows(limits):
    limits.line_mb = 1
    long = b"x" * (2**20 + 5) + b"\n"
    lines = list(lines_of(io.BytesIO(b"a\n" + long + b"\xe2\x80\xa8b\n" + long * 2 + b"c")))
    assert [line for line in lines if isinstance(line, bytes)] == [b"a\n", b"\xe2\x80\xa8b\n", b"c"]
    assert [isinstance(line, LongLine) for line in lines] == [False, True, False, True, True, False]
    assert str(lines[1]) == "a line of 1,048,582 bytes; the limit is 1 MB (raise it with --limits.line-mb)"


def test_the_limits_are_options(tmp_path, monkeypatch, limits, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("data: {path: x}\nlimits: {depth: 7}\n")
    monkeypatch.setattr(program, "_execute", lambda name, config: 0)
    assert program.main(["audit", str(config), "--limits.line-mb", "3"]) == 0
    assert (limits.depth, limits.line_mb) == (7, 3)
    assert program.main(["audit", str(config), "--limits.depth", "0"]) == 2
    assert "limits.depth: must be greater than 0, got 0" in capsys.readouterr().err
