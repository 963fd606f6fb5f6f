"""Prompts: those of the held-out data with their reference completions, and those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.data.chat import chat_prompt
from dpo_jax.data.columns import check_text
from dpo_jax.data.display import Turn, chat_turns
from dpo_jax.data.messages import read_messages
from dpo_jax.data.pairs import BadRow, Cause
from dpo_jax.data.special_tokens import special_tokens
from dpo_jax.data.terminal import json_text
from dpo_jax.runtime.progress import reported
from dpo_jax.untrusted import Unreadable, cause_of, parse_json, read_object, read_text

ARTICLE_CUE = "\nTL;DR:"  # makes a policy of Reddit summaries summarise an article


class Reference(NamedTuple):
    prompt: str
    completion: str
    where: str
    chat: bool = False  # the prompt was written by a chat template


def references(config: Config, tokenizer: Any, *, target: bool = False) -> list[Reference]:
    """Every pair's prompt and its chosen completion, or with `target` what SFT learns for it. Prompts may repeat.

    Of news articles (Table 1 of the paper): the article with `ARTICLE_CUE`, and its editors' summary.
    """
    data = config.data
    if data.source == "cnn_dailymail":
        assert data.path is not None  # checked with the configuration
        with build.needs_tfds("data.source: cnn_dailymail"):
            from dpo_jax.data.tfds import read_articles
        with reported("reading the articles"):
            articles = read_articles(data.path, data.test_split)[: data.max_test]
        return [Reference(f"{article.text}{ARTICLE_CUE}", f" {article.summary}", article.uid) for article in articles]
    rows = build.load_split(config, "test", tokenizer, rows="any")
    good = [p for p in rows if p.desirable is not False] or rows  # without any good one their prompts are left
    return [Reference(p.prompt, (p.sft_target if target else None) or p.chosen, p.uid, p.chat) for p in good]


class Prompt(NamedTuple):
    """What is completed: the text as the model reads it, and of a conversation its turns, for people."""

    text: str
    chat: bool = False  # written by a chat template
    turns: list[Turn] | None = None  # also None where the template does not tell them


def held_out_prompts(config: Config, tokenizer: Any) -> list[Prompt]:
    """The first distinct prompts of the held-out split, as in training: conversations are rendered already."""
    every = {one.prompt: one.chat for one in references(config, tokenizer)}
    first = list(every.items())[: config.sample.prompts]
    return [Prompt(text, chat, chat_turns(text, tokenizer) if chat else None) for text, chat in first]


def prompts_of_file(name: str, tokenizer: Any, *, chat: bool) -> list[Prompt]:
    """One prompt a line, or of each line of JSON Lines (.jsonl, .json) its "prompt" (a text, or messages) or its "messages".

    Messages are rendered by the tokenizer's chat template with its generation prompt, and with `chat` a text is rendered as
    what a user says. Raises `ConfigError` naming file, line and field.
    """
    prompts, rows = [], name.lower().endswith((".jsonl", ".json", ".ndjson"))
    try:
        content = read_text(name).removeprefix("\ufeff")  # a byte order mark, as some editors write one
    except (OSError, Unreadable) as error:
        raise ConfigError(f"sample.prompts_file: {error}") from error
    for number, line in enumerate(content.split("\n"), start=1):  # not splitlines(): JSON may hold U+2028 as it is
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        try:
            if "\0" in line:
                raise BadRow(Cause.NUL, f"NUL at character {line.index(chr(0))} of the line: save the file as UTF-8")
            prompts.append(_prompt(*(_field(line) if rows else ("", line, {})), tokenizer, chat=chat))
        except BadRow as problem:
            raise ConfigError(f"{name}:{number}: {problem}") from problem
    if not prompts:
        raise ConfigError(f"sample.prompts_file: {name} holds no prompts")
    return prompts


def _field(line: str) -> tuple[str, Any, dict[str, Any]]:
    """The field of a JSON line that holds the prompt, its value, and what else the chat template reads."""
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(Cause.INVALID_JSON, cause_of(error)) from error
    found = [name for name in ("prompt", "messages") if isinstance(row, dict) and row.get(name) is not None]
    if len(found) != 1:
        what = "both" if found else "neither"
        raise BadRow(Cause.MISSING_COLUMN, f'needs an object with a "prompt" or "messages", this has {what}')
    unread = [name for name in ("system", "instruction", "input") if row.get(name)]
    if unread:
        detail = "would be part of the prompt, and is not read here; give the whole prompt as messages, or as the rendered text"
        raise BadRow(Cause.WRONG_TYPE, detail, field=unread[0])
    return found[0], row[found[0]], {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}


def _prompt(field: str, value: Any, more: dict[str, Any], tokenizer: Any, *, chat: bool) -> Prompt:
    if isinstance(value, str) and value.strip() and field != "messages":
        check_text(value, field=field)
        if not chat:
            if more:
                raise BadRow(Cause.WRONG_TYPE, "a text that is not rendered has none; give messages", field=next(iter(more)))
            return Prompt(value)
        if rendered := [token for token in special_tokens(tokenizer) if token in value]:
            detail = f"the text contains the special token {rendered[0]!r}; a prompt that is rendered needs --sample.chat off"
            raise BadRow(Cause.EOS_IN_TEXT, detail, field=field)
        value = [{"role": "user", "content": value}]
    elif not isinstance(value, list) or not value:
        raise BadRow(Cause.WRONG_TYPE, "a text that is not empty or a list of messages is needed", field=field)
    if tokenizer.chat_template is None:
        raise BadRow(
            Cause.CHAT_TEMPLATE, "messages need a tokenizer with a chat template, and the policy's has none", field=field
        )
    text = chat_prompt(value, tokenizer=tokenizer, field=field, **more)
    turns = read_messages(value, field, tokenizer)
    return Prompt(text, True, [{"role": turn["role"], "content": _shown(turn)} for turn in turns])


def _shown(turn: dict[str, Any]) -> str:
    """The text of a message for people, its tool calls as JSON."""
    calls = [json_text(call.get("function", call)) for call in turn.get("tool_calls", ())]
    return "\n".join([*filter(None, [turn["content"]]), *calls])


def is_chat(config: Config, policy: str, tokenizer: Any) -> bool:
    """Whether a text of `sample.prompts_file` is a user's turn: as `sample.chat` says, or by how the policy was trained.

    A policy in a run directory was trained on conversations where the run's data report counts some. Another one is a chat
    model if its tokenizer has a chat template. Raises `ConfigError` for `sample.chat: on` without a template.
    """
    asked, template = config.sample.chat, tokenizer.chat_template is not None
    if asked == "on" and not template:
        raise ConfigError(f"sample.chat: is on, and the tokenizer of {policy} has no chat template")
    if asked != "auto" or not template:
        return asked == "on"
    record = Path(policy).expanduser().resolve().parent / "data_report.json"
    try:
        known = [report["chat"] for report in read_object(record).values()]
    except (OSError, Unreadable, KeyError, TypeError):  # no run, or one of an older version
        return True
    return any(known)
