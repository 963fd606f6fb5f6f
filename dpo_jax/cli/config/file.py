"""Strict YAML for nested dataclasses: every mistake is reported with its file, line, field and remedy.

This module knows nothing about the options themselves (the other modules here do). The document is composed into nodes with
PyYAML's safe loader and never constructed. Therefore no tag can run code, and nothing is converted silently: `no` is not a
string, `1e-6` (which YAML 1.1 takes for text) is a number, `true` is not 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpo_jax.untrusted import Unreadable, reading, regular

T = TypeVar("T")
TextMap = typing.NewType("TextMap", str)
"""A map from names to texts, written `a=b,c=d`; in YAML also as a mapping."""
if typing.TYPE_CHECKING:
    TextList: typing.TypeAlias = str
else:
    TextList = typing.NewType("TextList", str)
    """Several values, written `a,b`; in YAML also as a list, or one number. For type checkers a plain text."""
LARGEST = 2**18
"""Maximum size of a configuration, in bytes: PyYAML takes a second for each 100 kB."""
BRACKETS = 1000
SHOWN = 100  # characters of a wrong value
PROBLEMS = 20  # shown at once
Instead = Callable[[str, str | None], str | None]  # (dotted key, its value if the key is known) -> what to write instead
_DEEP = "nested too deeply; a configuration has only sections and options"
_SCALAR = "tag:yaml.org,2002:"
_WORDS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the field, and the file and line if there is one."""


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes the text None, because `read` takes an unquoted None for a slip of the pen."""


_Dumper.add_implicit_resolver(_SCALAR + "null", re.compile("^None$"), ["N"])


def read(path: str | Path, cls: type[T], *, instead: Instead = lambda key, value: None) -> tuple[T, dict[str, int]]:
    """An instance of `cls` (a dataclass, possibly nested) read from YAML, and the line of every dotted field the file sets.

    Fields that the file leaves out keep their defaults. `instead` may return the replacement for an unknown dotted key, and for
    a value of a known one. Raises `ConfigError` for an unreadable file, and for all unknown or repeated keys and values of the
    wrong type at once.
    """
    try:
        with regular(path).open("rb") as file:
            content = file.read(LARGEST + 1)
    except Unreadable as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    if len(content) > LARGEST:
        raise ConfigError(f"{path}: more than {LARGEST:,} bytes; a configuration has a few hundred lines")
    reader = _Reader(str(path), instead)
    node = _compose(content, str(path))
    found = reader.record(node, cls, "") if node else cls()
    if len(reader.problems) > PROBLEMS:
        reader.problems[PROBLEMS:] = [f"{path}: and {len(reader.problems) - PROBLEMS:,} more"]
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return found, reader.lines


def _compose(content: bytes, path: str) -> yaml.Node | None:
    if (brackets := content.count(b"[") + content.count(b"{")) > BRACKETS:  # for each token, PyYAML visits all open ones
        raise ConfigError(f"{path}: {_DEEP} ({brackets:,} brackets)")
    try:
        # Aliases are followed only when the reader asks, and it asks for sections and options only: they cannot multiply.
        with reading(path, error=ConfigError):
            return yaml.compose(content.decode("utf-8"), Loader=yaml.SafeLoader)
    except ConfigError as problem:
        match problem.__cause__:
            case yaml.MarkedYAMLError() as error:
                mark = error.problem_mark or error.context_mark
                line = f":{mark.line + 1}" if mark else ""
                raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
            case yaml.YAMLError() as error:  # a character that YAML does not have
                raise ConfigError(f"{path}: not valid YAML: {error}") from error
            case RecursionError():
                raise ConfigError(f"{path}: {_DEEP}") from None
            case UnicodeDecodeError() as error:
                raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
        raise


def text(instance: Any) -> str:
    """YAML of every field of a nested dataclass. `read` of it gives an equal instance."""
    return yaml.dump(dataclasses.asdict(instance), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """Field name -> type of a dataclass, with string annotations resolved."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def list_of(hint: Any) -> type | None:
    """The dataclass X of an option that is a list of them (`tuple[X, ...]`); None for any other."""
    args = typing.get_args(hint)
    return args[0] if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(args[0]) else None  # pyright: ignore


def is_count(text: str) -> bool:
    """Whether a text is a whole number above 0, of at most nine digits: an int32 holds it."""
    return text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean "x"?` when something similar is known, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


class _Reader:
    """Converts nodes to records. Problems inside a record are collected, so that one message tells all of them."""

    def __init__(self, path: str, instead: Instead):
        self.path = path
        self.instead = instead
        self.lines: dict[str, int] = {}
        self.problems: list[str] = []

    def fail(self, node: yaml.Node, message: str) -> typing.NoReturn:
        raise ConfigError(f"{self.path}:{node.start_mark.line + 1}: {message}")

    def record(self, node: yaml.Node, cls: type[T], prefix: str) -> T:
        if isinstance(node, yaml.ScalarNode) and node.tag == _SCALAR + "null":
            return cls()
        what = f"{'entry' if prefix.endswith('].') else 'section'} {prefix[:-1]}" if prefix else "the configuration"
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} must be `key: value` lines, not {_describe(node)}")
        known, values, listed = types_of(cls), {}, f" ({what} has: {', '.join(types_of(cls))})"
        for key_node, value_node in node.value:
            key = shortened(key_node.value) if isinstance(key_node, yaml.ScalarNode) else _describe(key_node)
            try:
                if key not in known:
                    full, more = self.unknown(prefix + key, value_node, known), listed
                    if "; instead: " not in full:  # the list is told once
                        full, listed = full + more, ""
                    self.fail(key_node, full)
                if key in values:
                    first = self.lines[prefix + key]
                    self.fail(key_node, f"{prefix}{key}: set twice, first on line {first}; keep one of them")
                self.lines[prefix + key] = key_node.start_mark.line + 1
                values[key] = None  # it was here, whatever it holds
                values[key] = self.field(value_node, known[key], prefix + key)
            except ConfigError as problem:
                self.problems.append(str(problem))
        return cls() if self.problems else cls(**values)

    def unknown(self, name: str, value: yaml.Node, known: typing.Iterable[str]) -> str:
        """What is wrong with an unknown key. Beyond `PROBLEMS` nothing similar is looked for, which takes time."""
        few = len(self.problems) < PROBLEMS
        answer = self.instead(name, None) if few else None
        hint = f"; instead: {answer}" if answer else suggest(name.rpartition(".")[2], known) if few else ""
        section = "." not in name and (isinstance(value, yaml.MappingNode) or not answer)
        return f"{name}: unknown {'section' if section else 'key' if '.' in name else 'option'}{hint}"

    def field(self, node: yaml.Node, hint: Any, name: str) -> Any:
        if (of := list_of(hint)) is not None:
            return self.records(node, of, name)
        if dataclasses.is_dataclass(hint):
            return self.record(node, typing.cast(type, hint), f"{name}.")
        return self.value(node, hint, name)

    def records(self, node: yaml.Node, cls: type[T], name: str) -> tuple[T, ...]:
        if isinstance(node, yaml.ScalarNode) and node.tag == _SCALAR + "null":
            return ()
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"{name} must be a list of `- {', '.join(types_of(cls))}` entries, not {_describe(node)}")
        inside = _Reader(self.path, self.instead)  # with lines of its own: messages point to the list
        inside.problems = self.problems
        return tuple(inside.record(item, cls, f"{name}[{number}].") for number, item in enumerate(node.value, 1))

    def value(self, node: yaml.Node, hint: Any, name: str) -> Any:
        choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        if answer := self.instead(name, _written(node)):
            self.fail(node, f"{name}: unknown value {shortened(_written(node))!r}; instead: {answer}")
        if isinstance(node, yaml.ScalarNode):
            if node.value == "None" and node.style is None:
                self.fail(node, f'{name}: YAML writes none as null, and None is text; write null (or quote a real "None")')
            for choice in choices:
                found, value = _convert(node, choice)
                if found:
                    return value
        if isinstance(node, yaml.MappingNode) and TextMap in choices:
            return ",".join(self.entry(key, value, name) for key, value in node.value)
        if isinstance(node, yaml.SequenceNode) and TextList in choices:
            if not node.value:
                self.fail(node, f"{name}: an empty list; name at least one value, or leave the option out")
            return ",".join(self.item(item, name) for item in node.value)
        wanted = " or ".join(_name(choice) for choice in choices)
        advice = ""
        if isinstance(node, yaml.ScalarNode):
            if str in choices and node.tag.removeprefix(_SCALAR) in ("int", "float", "bool"):
                advice = f'; put it in quotes: "{shortened(node.value)}"'
            options = [option for choice in choices for option in typing.get_args(choice)]
            advice = suggest(node.value, options) or advice
        self.fail(node, f"{name}: expected {wanted}, got {_describe(node)}{advice}")

    def item(self, node: Any, name: str) -> str:
        """One value of a list."""
        if not isinstance(node, yaml.ScalarNode) or node.tag.removeprefix(_SCALAR) not in ("str", "int", "float"):
            self.fail(node, f"{name}: expected a text or a number in the list, got {_describe(node)}")
        if "," in node.value:
            self.fail(node, f"{name}: a comma separates values, so {shortened(node.value)!r} cannot be one of the list")
        return node.value

    def entry(self, key: Any, value: Any, name: str) -> str:
        """One entry of a mapping of texts, as `key=text`; null is an empty text."""
        for node in (key, value):
            if not isinstance(node, yaml.ScalarNode):
                self.fail(node, f"{name}: expected a name and a text, got {_describe(node)}")
            if bad := next((sign for sign in (",=" if node is key else ",") if sign in node.value), None):
                self.fail(node, f"{name}: a name with {bad!r} cannot be given: rename {shortened(node.value)!r}")
        return f"{key.value}={'' if value.tag == _SCALAR + 'null' else value.value}"


def _convert(node: yaml.ScalarNode, hint: Any) -> tuple[bool, Any]:
    plain = node.style is None
    tag = node.tag.removeprefix(_SCALAR)
    if hint is type(None):
        return tag == "null", None
    if typing.get_origin(hint) is typing.Literal:
        # YAML reads the word off as a boolean; among these choices it is a word.
        return tag in ("str", "bool") and node.value in typing.get_args(hint), node.value
    if hint is str or hint is TextMap:
        return tag in ("str", "timestamp"), node.value  # a day is written without quotes
    if hint is TextList:
        return tag in ("str", "int", "float"), node.value
    if hint is bool:
        return tag == "bool", _WORDS.get(node.value.lower())
    if plain and hint in (int, float) and tag in ("int", "float", "str"):
        try:
            return True, hint(node.value)
        except ValueError:
            pass
    return False, None


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    names = {
        str: "text",
        TextMap: "a mapping of texts (or a text, a=b,c=d)",
        TextList: "a text with commas (or a list)",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    return names[hint]


def _written(node: yaml.Node) -> str:
    """A value as text; that of a list, its texts separated by commas."""
    if isinstance(node, yaml.SequenceNode):
        return ", ".join(item.value for item in node.value[:BRACKETS] if isinstance(item, yaml.ScalarNode))
    return node.value if isinstance(node, yaml.ScalarNode) else ""


def shortened(value: str) -> str:
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}..."


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    kinds = {"int": "the number", "float": "the number", "bool": "the truth value", "null": "nothing", "str": "the text"}
    kind = kinds.get(node.tag.removeprefix(_SCALAR), f"a value tagged {node.tag}")
    return kind if kind == "nothing" else f"{kind} {shortened(node.value)!r}"
