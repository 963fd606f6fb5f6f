"""Reads prompts: from the held-out data, with reference completions, or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.cli import splits
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.data.chat import chat_prompt
from dpo_jax.data.columns import check_text
from dpo_jax.data.display import Turn, chat_turns
from dpo_jax.data.image_rows import COLUMNS, check_count, image_marks, take_images
from dpo_jax.data.images import ImageFile, open_image
from dpo_jax.data.messages import read_messages
from dpo_jax.data.pairs import BadRow, Cause
from dpo_jax.data.row_kinds import Wanted
from dpo_jax.data.special_tokens import special_tokens
from dpo_jax.data.terminal import json_text
from dpo_jax.runtime.progress import reported
from dpo_jax.untrusted import Unreadable, cause_of, parse_json, read_object, read_text

TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".xlsx")
IMAGE = "[image]"
ARTICLE_CUE = "\nTL;DR:"  # makes a policy trained on Reddit summaries summarize an article


class Reference(NamedTuple):
    prompt: str
    completion: str
    where: str
    chat: bool = False  # the prompt was written by a chat template
    images: tuple[ImageFile, ...] = ()


def references(
    config: Config, tokenizer: Any, *, target: bool = False, images: bool = False, rows: Wanted = "any"
) -> list[Reference]:
    """Every pair's prompt with its chosen completion, or with `target`, with its SFT target. Prompts may repeat.

    `rows`: "prompts" also reads prompts alone, whose completions are empty.

    For news articles (Table 1 of the paper): the article with `ARTICLE_CUE`, and the editors' summary.
    """
    data = config.data
    if data.source == "cnn_dailymail":
        assert data.path is not None  # checked with the configuration
        with splits.needs_tfds("data.source: cnn_dailymail"):
            from dpo_jax.data.tfds import read_articles
        with reported("reading the articles"):
            articles = read_articles(data.path, data.test_split)[: data.max_test]
        return [Reference(f"{article.text}{ARTICLE_CUE}", f" {article.summary}", article.uid) for article in articles]
    found = splits.load_split(config, "test", tokenizer, rows=rows, images=images)
    good = [p for p in found if p.desirable is not False] or found  # without a good completion their prompts remain
    good = [p for p in good if p.prompt]
    if not good:
        raise ConfigError(f"data.path: {found.report.source} [{found.report.split}] holds plain texts, which have no prompts")
    return [Reference(p.prompt, (p.sft_target if target else None) or p.chosen, p.uid, p.chat, p.images) for p in good]


class Prompt(NamedTuple):
    """A prompt to complete: the text as the model reads it, without images; and for a conversation its turns, for display."""

    text: str
    chat: bool = False  # written by a chat template
    turns: list[Turn] | None = None  # also None if the template does not show them
    images: tuple[ImageFile, ...] = ()
    uid: str = ""  # its source


def held_out_prompts(config: Config, tokenizer: Any) -> list[Prompt]:
    """The first distinct prompts of the held-out split, as in training: conversations are rendered already."""
    first: dict[tuple[str, ...], Reference] = {}
    for one in references(config, tokenizer, images=True, rows="prompts"):
        first.setdefault((one.prompt, *(image.digest for image in one.images)), one)
    chosen = list(first.values())[: config.sample.prompts]
    return [Prompt(one.prompt, one.chat, turns_of(one, tokenizer), one.images, one.where) for one in chosen]


def turns_of(prompt: Reference, tokenizer: Any) -> list[Turn] | None:
    """The turns of a prompt for display, with an image as `IMAGE`; None if there are none, or they cannot be recovered."""
    if not prompt.chat:
        return None
    text = prompt.prompt.replace(image_marks(tokenizer).place, IMAGE) if prompt.images else prompt.prompt
    return chat_turns(text, tokenizer)


def prompts_of_file(name: str, tokenizer: Any, *, chat: bool) -> list[Prompt]:
    """Prompts of a file: one per line, or in JSON Lines (.jsonl, .json) each line's "prompt" (text, or messages) or "messages".

    A line of JSON may show images, as rows of preferences do; their paths are relative to the file's folder. Messages are
    rendered by the tokenizer's chat template with its generation prompt; with `chat`, a text is rendered as a user turn. Raises
    `ConfigError` naming file, line and field.
    """
    if name.lower().endswith(TABLES):
        raise ConfigError(
            f"sample.prompts_file: {name} is a table; write its prompts as lines of a text file, or as JSON Lines "
            '({"prompt": ...}), or read it as data: --data.path'
        )
    prompts, rows = [], name.lower().endswith((".jsonl", ".json", ".ndjson"))
    try:
        content = read_text(name).removeprefix("\ufeff")  # a byte order mark, as some editors write one
    except (OSError, Unreadable) as error:
        raise ConfigError(f"sample.prompts_file: {error}") from error
    for number, line in enumerate(content.split("\n"), start=1):  # not splitlines(): JSON may contain U+2028 unescaped
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        try:
            if "\0" in line:
                raise BadRow(Cause.NUL, f"NUL at character {line.index(chr(0))} of the line: save the file as UTF-8")
            asked = _field(line) if rows else Asked("", line, {}, {})
            found = _prompt(asked, tokenizer, chat=chat, root=Path(name).parent)
            prompts.append(found._replace(uid=f"{name}:{number}"))
        except BadRow as problem:
            raise ConfigError(f"{name}:{number}: {problem}") from problem
    if not prompts:
        raise ConfigError(f"sample.prompts_file: {name} holds no prompts")
    return prompts


class Asked(NamedTuple):
    """One line of a prompts file."""

    field: str  # field that holds the prompt, and its value: a text, or messages
    value: Any
    more: dict[str, Any]  # further fields that the chat template reads
    images: dict[str, Any]  # column of images


def _field(line: str) -> Asked:
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
        detail = "would be part of the prompt, but is not read here; give the whole prompt as messages, or as the rendered text"
        raise BadRow(Cause.WRONG_TYPE, detail, field=unread[0])
    more, images = ({name: row[name] for name in of if row.get(name)} for of in (("tools", "chat_template_kwargs"), COLUMNS))
    return Asked(found[0], row[found[0]], more, images)


def _prompt(asked: Asked, tokenizer: Any, *, chat: bool, root: Path) -> Prompt:
    field, value, more, _ = asked
    shown, sources = take_images({"prompt": value, **asked.images}, tokenizer) if field else ({}, ())
    value = shown["prompt"] if sources else value
    if isinstance(value, str) and value.strip() and field != "messages":
        check_text(value, field=field)
        if not chat:
            if more:
                raise BadRow(Cause.WRONG_TYPE, "applies to chat messages only; give messages", field=next(iter(more)))
            return Prompt(value)
        if rendered := [token for token in special_tokens(tokenizer) if token in value]:
            detail = f"the text contains the special token {rendered[0]!r}; a prompt that is rendered needs --sample.chat off"
            raise BadRow(Cause.EOS_IN_TEXT, detail, field=field)
        value = [{"role": "user", "content": value}]
    elif not isinstance(value, list) or not value:
        raise BadRow(Cause.WRONG_TYPE, "expected a non-empty string or a list of messages", field=field)
    if tokenizer.chat_template is None:
        raise BadRow(
            Cause.CHAT_TEMPLATE,
            "messages need a tokenizer with a chat template, and this one has none: --tokenizer.path FOLDER",
            field=field,
        )
    text = chat_prompt(value, tokenizer=tokenizer, field=field, **more)
    turns = [{"role": turn["role"], "content": _shown(turn)} for turn in read_messages(value, field, tokenizer)]
    if not sources:
        return Prompt(text, True, turns)
    place = image_marks(tokenizer).place
    check_count(text, sources, tokenizer)
    images = tuple(open_image(source, root=root, field=f"images.{number}") for number, source in enumerate(sources))
    return Prompt(text, True, [{**turn, "content": turn["content"].replace(place, IMAGE)} for turn in turns], images)


def _shown(turn: dict[str, Any]) -> str:
    """The text of a message for display, its tool calls as JSON."""
    calls = [json_text(call.get("function", call)) for call in turn.get("tool_calls", ())]
    return "\n".join([*filter(None, [turn["content"]]), *calls])


def is_chat(config: Config, policy: str, tokenizer: Any) -> bool:
    """Whether a text of `sample.prompts_file` is a user turn: as set in `sample.chat`, or by how the policy was trained.

    A policy in a run directory was trained on conversations if the run's data report counts any. Any other policy is a chat
    model if its tokenizer has a chat template. Raises `ConfigError` for `sample.chat: on` without a template.
    """
    asked, template = config.sample.chat, tokenizer.chat_template is not None
    if asked == "on" and not template:
        raise ConfigError(f"sample.chat: is on, but the tokenizer of {policy} has no chat template")
    if asked != "auto" or not template:
        return asked == "on"
    record = Path(policy).expanduser().resolve().parent / "data_report.json"
    try:
        known = [report["chat"] for report in read_object(record).values()]
    except (OSError, Unreadable, KeyError, TypeError):  # not a run, or one of an older version
        return True
    return any(known)
