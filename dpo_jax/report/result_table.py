"""The table of `dpo-jax eval`: policy and reference side by side in 80 columns, and the names of its measures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax.data.display import shown_prompt
from dpo_jax.data.terminal import printable
from dpo_jax.plotting.curves import KL_OF_SAMPLES

WIDTH = 80
LABEL, NUMBER = 36, 10  # columns
SHOWN = 220  # characters of a prompt or sample


class Measure(NamedTuple):
    label: str
    key: str  # in report.json
    form: str


MEASURES = (
    Measure("loss", "loss", ".4f"),
    Measure("preference accuracy", "rewards/accuracies", ".3f"),
    Measure("reward margin (nats)", "rewards/margins", ".3f"),
    Measure("chosen, log(policy / ref.) (nats)", "displacement/chosen", ".2f"),
    Measure("rejected, log(policy / ref.) (nats)", "displacement/rejected", ".2f"),
    Measure(f"{KL_OF_SAMPLES} (nats)", "kl", ".2f"),
    Measure("true reward of samples", "true_reward", ".2f"),
    Measure("tokens per sample", "tokens", ".1f"),
    Measure("samples cut by the token limit", "cut", ".0%"),
    Measure("repeated 4-grams of samples", "repetition", ".0%"),
)
CHOSEN = "The weights were chosen on these pairs (keep_best, patience): results on pairs are optimistic."
READING = f"{KL_OF_SAMPLES} is per completion, from samples of the policy. ±: one standard error."


def result_table(report: Mapping[str, Any]) -> str:
    """Policy against reference, one line per measure, and the first samples of each. No line is longer than 80 columns."""
    reference, policy = report["reference"], report["policy"]
    title = f"{report['pairs']:,} held-out {report.get('examples', 'pairs')}"
    lines = [f"{title:<{LABEL}}{'reference':>{NUMBER}}{'policy':>{NUMBER}}"]
    for label, key, form in MEASURES:
        if policy.get(key) is not None:
            before, after = (_number(values.get(key), form) for values in (reference, policy))
            lines.append(f"{label:<{LABEL}}{before:>{NUMBER}}{after:>{NUMBER}}  {_uncertainty(policy, key, form)}".rstrip())
    if report.get("chosen_on_these"):
        lines += textwrap.wrap(CHOSEN, WIDTH)
    if "kl" in policy:
        lines += textwrap.wrap(READING, WIDTH)
    for sample in report.get("samples", [])[:3]:
        lines += ["", *_text("prompt", shown_prompt(sample))]
        for who, name in (("reference", "before"), ("policy", "after")):
            lines += _text(f"  {name}", sample[who], cut=not sample.get(f"{who}_finished", True))
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, f"z{form}")


def _uncertainty(values: Mapping[str, Any], key: str, form: str) -> str:
    low, high, error = (values.get(f"{key}_{end}") for end in ("low", "high", "error"))
    if low is not None and high is not None:
        return f"{low:{form}} to {high:{form}} (95 %)"
    return f"± {error:{form}}" if error is not None else ""


def with_interval(values: Mapping[str, Any], name: str, form: str) -> str:
    """A value as a cell of the report, with its 95 % interval in brackets or its standard error."""
    if values.get(name) is None:
        return "-"
    text = format(values[name], f"z{form}")
    low, high, error = (values.get(f"{name}_{end}") for end in ("low", "high", "error"))
    if low is not None and high is not None:
        return f"{text} ({low:{form}} to {high:{form}})"
    return f"{text} ± {error:{form}}" if error is not None else text


def _text(name: str, text: str, *, cut: bool = False) -> list[str]:
    text = printable(" ".join(text.split()))
    if len(text) > SHOWN:
        text = f"{text[:SHOWN].rstrip()} … {len(text) - SHOWN} more characters"
    if cut:
        text += " [cut by the token limit]"
    head = f"{name:<12}"
    return textwrap.wrap(text or "(empty)", WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def wrapped(words: str, *, mark: str = "  ") -> str:
    """A paragraph of at most 80 columns, indented below its mark."""
    return textwrap.fill(words, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False)
