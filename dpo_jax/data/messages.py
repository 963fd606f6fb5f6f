"""Messages, tools and template options of a conversation, checked and converted to the form that the chat template reads."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.data.columns import check_text, text, without_nulls
from dpo_jax.data.image_rows import Place
from dpo_jax.data.pairs import BadRow, Cause, DataError, check_length
from dpo_jax.data.rendering import Refused, render
from dpo_jax.data.roles import KNOWN, names_role, unknown_role, with_roles
from dpo_jax.data.special_tokens import special_tokens
from dpo_jax.untrusted import parse_json

Message = dict[str, Any]
_COLUMNS = ("prompt", "chosen", "rejected", "completion")  # which may also be texts
MAX_MESSAGES = 10_000
_SAID = ("name", "reasoning_content", "reasoning", "thinking")


class Template(NamedTuple):
    """The chat template of `tokenizer` with its further inputs: tool schemas and template variables."""

    tokenizer: Any
    tools: list[Any] | None
    variables: Mapping[str, Any]

    def render(self, messages: Sequence[Message], *, generate: bool = False, tools: bool = True) -> str:
        """The conversation as text, with the generation prompt if asked to `generate`. Raises `BadRow`."""
        options = {"tools": self.tools} if self.tools and tools else {}
        try:
            return render(self.tokenizer, messages, generate=generate, **options, **self.variables)
        except Refused as error:
            raise BadRow(Cause.CHAT_TEMPLATE, f"the template refuses these messages: {error}") from error

    @property
    def source(self) -> str:
        """The source of the template, or of all templates of the tokenizer."""
        return source_of(self.tokenizer)

    def notes(self) -> list[str]:
        """Notes for the report on what the template omits."""
        unread = [name for name in self.variables if not re.search(rf"\b{re.escape(name)}\b", self.source)]
        return [f"chat_template_kwargs: the chat template does not read {name[:60]!r}" for name in unread]


def source_of(tokenizer: Any) -> str:
    """The source of a tokenizer's template, or of all its templates."""
    template: Any = tokenizer.chat_template
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template)


def read_template(tokenizer: Any, *, tools: Any = None, variables: Any = None, where: str) -> Template:
    """The template with the columns `tools` and `chat_template_kwargs` of a row; each may be JSON text.

    Raises `DataError` for a tokenizer without a template, and `BadRow` for invalid columns.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where}: {Cause.CHAT_TEMPLATE}: conversational rows need a tokenizer with a chat template: pass a folder whose "
            "tokenizer has one: --tokenizer.path FOLDER",
            causes=[Cause.CHAT_TEMPLATE],
        )
    return Template(tokenizer, _tools(tools, tokenizer), _variables(variables, tokenizer))


def read_messages(value: Any, field: str, tokenizer: Any) -> list[Message]:
    """Messages `{"role", "content", ...}` as new dictionaries: nulls removed, also inside tool calls, content parts
    joined, roles and tool calls in the template's form.

    Raises `BadRow`, also for a text that contains a special token."""
    if not isinstance(value, list) or not value:
        detail = "expected a list of messages, got " + ("an empty list" if value == [] else type(value).__name__)
        raise BadRow(Cause.EMPTY if value == [] else Cause.WRONG_TYPE, detail, field=field)
    if len(value) > MAX_MESSAGES:
        raise BadRow(Cause.TOO_LONG, f"{len(value):,} messages, but the limit is {MAX_MESSAGES:,}", field=field)
    if all(isinstance(message, str) for message in value):
        remedy = ("to read the first one", {field: f"{field}.0"}) if field in _COLUMNS else None
        raise BadRow(Cause.WRONG_TYPE, "expected a list of messages, got a list of texts", field=field, remedy=remedy)
    turns = with_roles(value, source_of(tokenizer))
    return [_message(message, f"{field}.{index}", tokenizer) for index, message in enumerate(turns)]


def _message(message: Any, place: str, tokenizer: Any) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow(Cause.WRONG_TYPE, f"expected a message, got {type(message).__name__}", field=place)
    role = text(message, "role", inside=f"{place}.")
    if role not in KNOWN and not names_role(source_of(tokenizer), role):
        raise unknown_role(role, field=f"{place}.role")
    # parquet gives every message every key that any message has
    kept = {key: item for key, item in message.items() if item is not None}
    if kept.get("weight", 1) not in (0, 1):
        raise BadRow(Cause.OUT_OF_RANGE, f"expected 0 or 1, got {kept['weight']!r}", field=f"{place}.weight")
    calls = kept.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise BadRow(Cause.WRONG_TYPE, "a list of tool calls (objects) is needed", field=f"{place}.tool_calls")
    joined = _joined(kept["content"], f"{place}.content") if isinstance(kept.get("content"), list) else None
    if joined is None and (not calls or "content" in kept):
        text(message, "content", inside=f"{place}.")
    for path, string in _strings(kept, place):  # before images are inserted as special tokens
        _check_string(string, path, tokenizer)
    if joined is not None:
        check_length(joined, field=f"{place}.content")
        kept["content"] = joined
    if calls:
        form = _call_form(tokenizer, str(tokenizer.chat_template))
        if form is None:
            detail = "the chat template does not write tool calls; use a tokenizer whose template does, or drop such rows"
            raise BadRow(Cause.CHAT_TEMPLATE, detail, field=f"{place}.tool_calls")
        kept["tool_calls"] = [_call(without_nulls(call), as_text=form.arguments_as_text) for call in calls]
        if not kept.get("content"):  # null, absent and empty mean the same
            kept["content"] = form.content
    elif calls is not None:
        del kept["tool_calls"]
    return kept


def _joined(parts: list[Any], place: str) -> str:
    """The joined text of content parts `{"type": "text", "text": ...}` and of images (`image_rows.Place`)."""
    texts = []
    for index, part in enumerate(parts):
        inside = f"{place}.{index}"
        if isinstance(part, Place):
            texts.append(part.mark)
            continue
        if not isinstance(part, Mapping):
            raise BadRow(Cause.WRONG_TYPE, f"expected a content part, got {type(part).__name__}", field=inside)
        kind = text(part, "type", inside=f"{inside}.")
        if kind != "text":
            raise BadRow(
                Cause.WRONG_TYPE, f"content parts of type {kind!r} are not read here, only those of type 'text'", field=inside
            )
        texts.append(text(part, "text", inside=f"{inside}."))
    return "".join(texts)


def is_learned(message: Message) -> bool:
    """Whether a turn of the assistant is scored: OpenAI's fine-tuning files mark the others with `"weight": 0`."""
    return message.get("weight", 1) != 0


def content_of(message: Message) -> Message:
    """What a message says, without ids, times and other facts about it, and independent of the form a template reads it in."""
    said = {name: message[name] for name in _SAID if message.get(name) not in (None, "")}
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    if calls:
        said["tool_calls"] = [_call(call, as_text=False) for call in calls if isinstance(call, Mapping)]
    return {"role": message["role"], "content": message.get("content") or "", **said}


def call_names(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    functions = (call.get("function", call) for call in message.get("tool_calls") or ())
    return [str(function.get("name", "")) for function in functions if isinstance(function, Mapping)]


class _CallForm(NamedTuple):
    content: str | None  # of a message with tool calls and no text
    arguments_as_text: bool  # as JSON text, not as an object


@functools.lru_cache(maxsize=8)
def _call_form(tokenizer: Any, template: str) -> _CallForm | None:
    """The form of a tool call for which the template writes name and argument; None if there is none.

    Some templates write null as "None"; others write a call only if the content is null. Some take arguments only as JSON text;
    others would write such a text as a quoted JSON string. Templates do not declare this, so all forms are tried.
    """
    arguments = {"key": "VALUE"}
    for form in (_CallForm(content, as_text) for as_text in (False, True) for content in (None, "")):
        function = {"name": "NAMED", "arguments": json.dumps(arguments) if form.arguments_as_text else arguments}
        call = {"id": "abcdefghi", "type": "function", "function": function}  # Mistral's templates want nine letters
        turns = [{"role": "user", "content": "ASKED"}, {"role": "assistant", "content": form.content, "tool_calls": [call]}]
        try:
            written = render(tokenizer, turns)
        except Refused:
            continue
        if "NAMED" in written and "VALUE" in written and (form.content == "" or "None" not in written):
            return form
    return None


def _call(call: Mapping[str, Any], *, as_text: bool) -> Message:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], as_text=as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            parsed = parse_json(arguments)
        except (ValueError, RecursionError):  # a model's output may not be JSON
            return dict(call)
        return {**call, "arguments": parsed} if isinstance(parsed, Mapping) else dict(call)
    return dict(call)


def _tools(value: Any, tokenizer: Any) -> list[Any] | None:
    value = _parsed(without_nulls(value), "tools")
    if isinstance(value, list):
        value = [_parsed(tool, f"tools.{index}") for index, tool in enumerate(value)]
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(Cause.WRONG_TYPE, "a list of tool schemas (objects), or that list as JSON text, is needed", field="tools")
    for path, string in _strings(value, "tools"):
        _check_string(string, path, tokenizer)
    return value


def _variables(value: Any, tokenizer: Any) -> dict[str, Any]:
    field = "chat_template_kwargs"
    value = _parsed(value, field)
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise BadRow(Cause.WRONG_TYPE, f"expected an object, got {type(value).__name__}", field=field)
    for name in value:
        if name in _reserved(tokenizer):
            raise BadRow(Cause.WRONG_TYPE, f"{name!r} cannot be set by a row", field=field)
    for path, string in _strings(value, field):
        _check_string(string, path, tokenizer)
    return {name: item for name, item in value.items() if item is not None}  # parquet gives every row every name


def _reserved(tokenizer: Any) -> set[str]:
    """Reserved names: parameters of `apply_chat_template` and `render`, and the special tokens that a template reads."""
    own = {"messages", "tokenizer", "generate", "strftime_now", "raise_exception"}
    taken = set(inspect.signature(type(tokenizer).apply_chat_template).parameters) - {"documents", "kwargs"}
    return own | taken | set(tokenizer.special_tokens_map)


def _parsed(value: Any, field: str) -> Any:
    """The value of a JSON text; any other value unchanged."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(Cause.INVALID_JSON, f"a string here must be valid JSON: {error}", field=field) from error


def _strings(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text inside a value, field names included, with its path."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield place, str(key)
            yield from _strings(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _strings(item, f"{place}.{index}")


def _check_string(string: str, place: str, tokenizer: Any) -> None:
    # A special token in a user's text would end or fake a turn.
    check_text(string, field=place)
    check_length(string, field=place)
    for token in special_tokens(tokenizer):
        if token in string:
            raise BadRow(Cause.EOS_IN_TEXT, f"the text contains the special token {token!r}", field=place)
