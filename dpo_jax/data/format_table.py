"""The table of data formats: columns, what they hold, an example. Detection, `--help`, messages and the README come from it.

To add a format, write its function in `formats.py`, under the format's name, and add a line to `FORMATS`. Imports are
light, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo_jax.loss_table import RowKind

Kind = RowKind | Literal["demonstrations", "prompts"]
"""The kind of example in a row: those that losses read, texts that only supervised fine-tuning reads, and prompts alone."""


class Column(NamedTuple):
    """A column of a format: what it holds, and whether every row must have it."""

    holds: str
    needed: bool = True


class Format(NamedTuple):
    """A public format of preferences, of texts for supervised fine-tuning, or of prompts.

    reads      the columns that its function reads; "info.title" is a field inside a column
    told_by    columns by which the format is detected (none: only data.format selects it) ...
    lacks      ... provided that the row has none of these ...
    begins     ... and that these hold texts that begin so, leading white space ignored
    rows       the kind of example in a row
    """

    name: str
    title: str
    reads: Mapping[str, Column]
    told_by: tuple[str, ...]
    example: Mapping[str, Any]
    lacks: tuple[str, ...] = ()
    begins: Mapping[str, str] = {}
    rows: Kind = "pairs"

    @property
    def needs(self) -> list[str]:
        """The columns that every row must have."""
        return [name for name, column in self.reads.items() if column.needed]

    @property
    def candidates(self) -> Callable[..., Any]:
        """(rows, *, tokenizer) -> candidates: the function of the same name in `formats`."""
        from dpo_jax.data import formats

        return getattr(formats, self.name)


_PROMPT = Column("the prompt, a text or messages")
_SYSTEM = Column("a system message, if `data.columns` names its column", needed=False)
_SUBSET = Column("subset of the data; evaluation also reports by subset", needed=False)
_CHAT_OPTIONS = {
    "tools": Column("schemas of tools, for the chat template", needed=False),
    "chat_template_kwargs": Column("other variables of the chat template, such as `enable_thinking`", needed=False),
}
_NO_IMAGES = {name: Column("not supported here; format `trl` reads images", needed=False) for name in ("images", "image")}
_BETTER, _WORSE = Column("the better completion"), Column("the worse one")

# Detection takes the first that fits.
_FORMATS = (
    Format(
        "tldr",
        "TL;DR comparisons of OpenAI (`summarize_from_feedback`)",
        {
            "info.subreddit": Column("the subreddit of the post"),
            "info.title": Column("its title"),
            "info.post": Column("its text"),
            "summaries.text": Column("two summaries"),
            "choice": Column("number of the better one: 0 or 1"),
            "subset": _SUBSET,
        },
        ("info", "summaries", "choice"),
        {
            "info": {"subreddit": "tifu", "title": "by baking", "post": "I burned it."},
            "summaries": [{"text": " Baked."}, {"text": " Burned the bread."}],
            "choice": 1,
        },
    ),
    Format(
        "shp",
        "Stanford Human Preferences; pairs whose scores are a factor of 2 apart",
        {
            "history": Column("the question"),
            "human_ref_A": Column("one answer"),
            "human_ref_B": Column("the other"),
            "labels": Column("1 if A is better, 0 if B is"),
            "score_A": Column("score of A, above 0"),
            "score_B": Column("score of B, above 0"),
            "subset": _SUBSET,
        },
        ("history", "human_ref_A", "human_ref_B", "labels"),
        {"history": "How long?", "human_ref_A": "An hour.", "human_ref_B": "Long.", "labels": 1, "score_A": 9, "score_B": 3},
    ),
    Format(
        "stack_exchange",
        "StackExchange preferences; every two answers whose scores differ form a pair",
        {
            "question": Column("HTML"),
            "answers.text": Column("two or more answers, HTML"),
            "answers.pm_score": Column("their scores"),
        },
        ("question", "answers"),
        {
            "question": "<p>Why?</p>",
            "answers": [{"text": "<p>So.</p>", "pm_score": 2}, {"text": "<p>Because.</p>", "pm_score": 5}],
        },
    ),
    Format(
        "helpsteer3",
        "HelpSteer3 of NVIDIA; rendered with the tokenizer's chat template",
        {
            "context": Column("messages, the last by the user"),
            "system": _SYSTEM,
            "response1": Column("an answer"),
            "response2": Column("another"),
            "overall_preference": Column("-3 (the first is much better) to 3 (the second is); 0 gives no pair"),
            "domain": Column("used as the subset", needed=False),
        },
        ("context", "response1", "response2", "overall_preference"),
        {
            "context": [{"role": "user", "content": "2 + 2?"}],
            **{"response1": "4", "response2": "5", "overall_preference": -2, "domain": "stem"},
        },
    ),
    Format(
        "rewardbench",
        "RewardBench; rendered with the tokenizer's chat template",
        {"prompt": Column("the question"), "system": _SYSTEM, "chosen": _BETTER, "rejected": _WORSE, "subset": _SUBSET},
        ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "subset"),
        {
            **{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
            **{"chosen_model": "a", "rejected_model": "b", "subset": "math-prm"},
        },
        begins={"prompt": "", "chosen": "", "rejected": ""},  # with messages it is the format trl
    ),
    Format(
        "openai",
        "OpenAI's preference fine-tuning format; rendered with the tokenizer's chat template",
        {
            "input.messages": Column("messages, the last by the user"),
            "input.tools": Column("tools that the assistant may call", needed=False),
            "system": _SYSTEM,
            "preferred_output": Column("the better completion: messages of the assistant"),
            "non_preferred_output": Column("the worse one"),
            "subset": _SUBSET,
        },
        ("input", "preferred_output", "non_preferred_output"),
        {
            "input": {"messages": [{"role": "user", "content": "2 + 2?"}], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [{"role": "assistant", "content": "4"}],
            "non_preferred_output": [{"role": "assistant", "content": "5"}],
        },
    ),
    Format(
        "pku",
        "PKU-SafeRLHF; rendered with the tokenizer's chat template",
        {
            "prompt": Column("the question"),
            "system": _SYSTEM,
            "response_0": Column("an answer"),
            "response_1": Column("another"),
            "better_response_id": Column("number of the better one: 0 or 1"),
            "subset": _SUBSET,
        },
        ("prompt", "response_0", "response_1", "better_response_id"),
        {"prompt": "2 + 2?", "response_0": "4", "response_1": "5", "better_response_id": 0, "safer_response_id": 1},
    ),
    Format(
        "arena",
        "Chatbot Arena of LMSYS; rendered with the tokenizer's chat template",
        {
            "conversation_a": Column("messages, which begin with the same question"),
            "conversation_b": Column("others"),
            "winner": Column("`model_a` or `model_b`; `tie`, `tie (bothbad)` and `both_bad` give no pair"),
            "subset": _SUBSET,
        },
        ("conversation_a", "conversation_b", "winner"),
        {
            "conversation_a": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
            "conversation_b": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}],
            "winner": "model_a",
        },
    ),
    Format(
        "hh",
        "Anthropic HH: two transcripts that differ after their last `Assistant:`",
        {"chosen": Column("the better transcript"), "rejected": Column("the worse one"), "subset": _SUBSET},
        ("chosen", "rejected"),
        {side: f"\n\nHuman: Hello\n\nAssistant:{text}" for side, text in (("chosen", " Hi!"), ("rejected", " What?"))},
        lacks=("prompt",),
        begins={"chosen": "Human:", "rejected": "Human:"},
    ),
    Format(
        "hh_chat",
        "Anthropic HH as chats, rendered with the tokenizer's chat template; never detected, so set `data.format: hh_chat`",
        {"system": _SYSTEM, "chosen": Column("the better transcript"), "rejected": Column("the worse one"), "subset": _SUBSET},
        (),
        {side: f"\n\nHuman: Hello\n\nAssistant:{text}" for side, text in (("chosen", " Hi!"), ("rejected", " What?"))},
    ),
    Format(
        "chat_texts",
        "texts as turns of a chat, rendered with the tokenizer's template; never detected, so set `data.format: chat_texts`",
        {"prompt": Column("the user's turn"), "system": _SYSTEM, "chosen": _BETTER, "rejected": _WORSE, "subset": _SUBSET},
        (),
        {"prompt": "What is 2 + 2?", "chosen": "4.", "rejected": "5."},
    ),
    Format(
        "trl",
        "TRL's four forms: texts or messages, the prompt in its own column or implicit",
        {
            "prompt": Column("the prompt, a text or messages", needed=False),
            "system": _SYSTEM,
            "chosen": _BETTER,
            "rejected": _WORSE,
            **_CHAT_OPTIONS,
            "images": Column("images of the prompt: paths, bytes, or {bytes, path} each", needed=False),
            "image": Column("a single image", needed=False),
            "unended": Column("of texts: sides (`chosen`, `rejected`) cut off by a limit, without EOS", needed=False),
            "subset": _SUBSET,
        },
        ("chosen", "rejected"),
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    Format(
        "unpaired",
        "single completions with a label, for the losses kto and apo_zero_unpaired",
        {
            "prompt": _PROMPT,
            "system": _SYSTEM,
            "completion": Column("a completion, a text or messages"),
            "label": Column("true if it is desirable, false if not (or 1 and 0)"),
            **_CHAT_OPTIONS,
            **_NO_IMAGES,
            "subset": _SUBSET,
        },
        ("prompt", "completion", "label"),
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        rows="unpaired",
    ),
    Format(
        "ranked",
        "rankings, for the loss plackett_luce; for other losses every two completions of different rank form a pair",
        {
            "prompt": _PROMPT,
            "system": _SYSTEM,
            "completions": Column(
                "two or more completions: texts, messages, or objects with text and rank or score; "
                "best first unless ranks or scores are given"
            ),
            "ranks": Column("their ranks, 1 is the best", needed=False),
            "scores": Column("their scores, more is better", needed=False),
            **_CHAT_OPTIONS,
            **_NO_IMAGES,
            "subset": _SUBSET,
        },
        ("prompt", "completions"),
        {"prompt": "The sky is", "completions": [" blue.", " gray.", " green."], "ranks": [1, 2, 3]},
        rows="rankings",
    ),
    Format(
        "sft_completion",
        "prompts with a completion, for `sft`; TRL's prompt-completion form",
        {
            "prompt": _PROMPT,
            "system": _SYSTEM,
            "completion": Column("the completion to learn, a text or messages"),
            **_CHAT_OPTIONS,
            **_NO_IMAGES,
            "subset": _SUBSET,
        },
        ("prompt", "completion"),
        {"prompt": "The sky is", "completion": " blue."},
        lacks=("label",),
        rows="demonstrations",
    ),
    Format(
        "sft_messages",
        "conversations, for `sft`: all turns of the assistant are learned",
        {
            "messages": Column("messages, of which at least one is the assistant's"),
            "system": _SYSTEM,
            **_CHAT_OPTIONS,
            **_NO_IMAGES,
            "subset": _SUBSET,
        },
        ("messages",),
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
        rows="demonstrations",
    ),
    Format(
        "sft_text",
        "plain texts without prompts, for `sft`; TRL's language-modeling form",
        {"text": Column("the text to learn"), "subset": _SUBSET},
        ("text",),
        {"text": "The sky is blue."},
        rows="demonstrations",
    ),
    Format(
        "prompts",
        "prompts alone, for commands that sample completions: `online`, `ppo`, `label`, `frontier`, `optimum`, `sample`",
        {"prompt": _PROMPT, "system": _SYSTEM, **_CHAT_OPTIONS, **_NO_IMAGES, "subset": _SUBSET},
        ("prompt",),
        {"prompt": "The sky is"},
        lacks=("chosen", "rejected", "completion", "completions", "messages"),
        rows="prompts",
    ),
)
FORMATS: Mapping[str, Format] = {format.name: format for format in _FORMATS}

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[("auto", *FORMATS)]
"""The values of `data.format`."""

_NEEDED = "; ".join(f"{format.name}: {', '.join(format.needs)}" for format in _FORMATS)
HELP = f"Format of the files. auto detects it from the column names; the audit report shows it. Columns: {_NEEDED}"
"""The text of `--help`."""


def detect_format(row: Mapping[str, Any]) -> str | None:
    """The format that a row's columns fit, a key of `FORMATS`, or `None`."""
    return next((name for name, format in FORMATS.items() if _fits(format, row)), None)


def _fits(format: Format, row: Mapping[str, Any]) -> bool:
    texts = {name: row.get(name) for name in format.begins}
    begins = all(isinstance(text, str) and text.lstrip().startswith(format.begins[name]) for name, text in texts.items())
    return bool(format.told_by) and begins and row.keys() >= set(format.told_by) and not row.keys() & set(format.lacks)


def format_of(format: str, names: Sequence[str]) -> str | None:
    """The format used to read columns `names`: `format`, or with "auto" the one that they fit; None if none fits.

    Formats that are also detected by their texts are skipped: another format with the same columns reads at least as many.
    """
    if format != "auto":
        return format
    return next((one.name for one in _FORMATS if one.told_by and not one.begins and set(one.told_by) <= set(names)), None)


def markdown() -> str:
    """The table as Markdown, for the README."""
    lines = ["| `data.format` | what it is | columns (in brackets: optional) | example line |", "|---|---|---|---|"]
    for format in sorted(_FORMATS, key=lambda one: one.name):
        columns = (f"`{name}`: {column.holds}" for name, column in format.reads.items())
        shown = "; ".join(
            text if column.needed else f"({text})" for text, column in zip(columns, format.reads.values(), strict=True)
        )
        lines.append(f"| `{format.name}` | {format.title} | {shown} | `{json.dumps(format.example)}` |")
    order = ", ".join(f"`{format.name}`" for format in _FORMATS if format.told_by)
    return "\n".join(lines) + f"\n\nThe first format of {order} whose columns match is used.\n"
