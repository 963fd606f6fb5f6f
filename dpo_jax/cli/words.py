"""Looks up option names and values of TRL, transformers, PEFT and the original DPO code, and returns their equivalents here.

An unknown flag or key of a file is looked up in `word_table.WORDS`, in any spelling: `--learning-rate`, `learning_rate:`,
`--training.learning_rate`. An option of ours without its section (`--beta`) or its dot (`--eval-policy`) is found as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from dpo_jax.cli.word_table import VALUES, WORDS

TRAINED = ("sft", "dpo")
"""The sections that "*" stands for in an answer."""
OF_DATA = ("split", "name")
"""Words so common that they are looked up only for data: in section `data`, in an entry of its `mix`, or without a section."""
_OF_AN_ENTRY = ("data.train_split", "data.config", "data.columns", "data.revision")  # which an entry of data.mix has as well


def instead(word: str, options: Collection[str]) -> str | None:
    """The equivalent of an unknown flag or key `word`, or None if there is none.

    `options` are the dotted options to choose from, such as "dpo.lr": those that a command reads, or all.
    """
    name = word.lstrip("-").replace("-", "_").lower()
    section, _, last = name.rpartition(".")
    # "peft.r" is answered by "peft", but "lora.rnak" is a slip in a section of ours.
    above = [section] if section != "lora" else []
    in_data = section in ("", "data") or section.startswith("data.mix")
    family = ["vllm_*"] if last.startswith("vllm_") else []
    for key in (name.replace(".", "_"), *above, last, last.removeprefix("no_"), *family):
        if key in WORDS and (in_data or key not in OF_DATA):
            told = _told(WORDS[key], options, section=section)
            return told.removeprefix("data.") if section.startswith("data.mix") and told in _OF_AN_ENTRY else told
    own = [option for option in options if last in (option.partition(".")[2], option.replace(".", "_"))]
    return " or ".join(own) if own else None


def instead_of_value(option: str, value: str, options: Collection[str]) -> str | None:
    """Our equivalent of another program's value of `option`, such as "adamw_torch" of "dpo.optimizer"; None if it has none."""
    section = option.partition(".")[0]
    if answer := VALUES.get(option, {}).get(value.strip().lower()):
        return _told(answer, options, section=section)
    if option.endswith("warmup_steps") and re.fullmatch(r"0?\.\d+", value.strip()):
        return f"{section}.warmup_ratio {value.strip()}, which is a share of the run"
    if option == "dpo.loss" and not {*"+*:"} & {*value} and len(names := re.findall(r"\w+", value)) > 1:
        return f"a sum, written as one text: {' + '.join(names)} (weights: 0.8*sigmoid + sft)"
    return None


def as_flags(answer: str, options: Collection[str]) -> str:
    """An answer with its options as flags, ready to be typed: "dpo.max_grad_norm" becomes "--dpo.max-grad-norm"."""
    known = set(options)

    def flag(match: re.Match[str]) -> str:
        return f"--{match[0].replace('_', '-')}" if match[0] in known else match[0]

    return re.sub(r"\b[a-z_]+\.[a-z_]+\b", flag, answer)


def _told(answer: str, options: Collection[str], *, section: str) -> str:
    """The options in an answer that are among `options`; of these, those of `section`, if any."""
    listed, colon, rest = answer.partition(":")
    named = listed.split(", ")
    if not all(re.fullmatch(r"(\*|[a-z]+)\.[a-z_0-9]+", part) for part in named):
        return _expanded(answer, options, section)
    every = [option for part in named for option in _options_of(part)]
    return _chosen(every, options, section) + colon + _expanded(rest, options, section)


def _expanded(text: str, options: Collection[str], section: str) -> str:
    """`text` with each "*.lr" replaced by the options that it stands for."""
    return re.sub(r"\*\.[a-z_]+", lambda match: _chosen(_options_of(match[0]), options, section), text)


def _options_of(part: str) -> list[str]:
    return [f"{section}{part[1:]}" for section in TRAINED] if part.startswith("*.") else [part]


def _chosen(every: list[str], options: Collection[str], section: str) -> str:
    known = set(options)
    chosen = [option for option in every if option in known]
    if not chosen:
        return " or ".join(every) + ", which this command does not read"
    return " or ".join([option for option in chosen if option.startswith(f"{section}.")] or chosen)
