"""The table of optimizers and schedules by name: options and papers. `--help` and checks are made from it.

`dpo_jax/runtime/optim.py` builds them with optax. To add an optimizer, add a line to `OPTIMIZERS` and a branch in that module;
a new option gets a line in `OPTIONS`. This module imports neither JAX nor numpy, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from dpo_jax.option import Option

Optimizer = Literal["rmsprop", "adamw", "adafactor", "lion", "muon", "sgd"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]


class Choice(NamedTuple):
    """An optimizer or a schedule: its title, the options it reads with their defaults, and its paper."""

    title: str
    options: Mapping[str, Any]
    source: str


_share = lambda x: 0 <= x < 1  # noqa: E731
_SHARE = "must be at least 0 and below 1"

OPTIONS: Mapping[str, Option] = {
    "weight_decay": Option(
        float,
        0.0,
        lambda x: x >= 0,
        "must not be negative",
        "Weight decay of all matrices; norms and biases have none. It is decoupled and multiplied by the learning rate; "
        "rmsprop and sgd add it to the gradient, as in torch.",
    ),
    "decay_embeddings": Option(
        bool, True, lambda x: True, "", "Also apply weight decay to embeddings, as in transformers; muon never does."
    ),
    "b1": Option(float | None, None, _share, _SHARE, "Decay rate of the gradient mean (beta1)."),
    "b2": Option(float | None, None, _share, _SHARE, "Decay rate of the mean squared gradient (beta2; lion: of its momentum)."),
    "eps": Option(float | None, None, lambda x: x > 0, "must be greater than 0", "Added to the root mean square of gradients."),
    "momentum": Option(float | None, None, _share, _SHARE, "Momentum: fraction of the last update to keep."),
}

SCHEDULE_OPTIONS: Mapping[str, Option] = {
    "min_lr_ratio": Option(float, 0.0, _share, _SHARE, "Final learning rate, as a fraction of lr."),
    "decay_ratio": Option(
        float, 0.1, lambda x: 0 < x <= 1, "must be above 0 and at most 1", "Fraction of the run in which the rate decays."
    ),
}

_DECAY = {"weight_decay": 0.0, "decay_embeddings": True}
_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}

OPTIMIZERS: Mapping[str, Choice] = {
    "rmsprop": Choice("RMSprop as in the original DPO code: decay 0.99, eps 1e-8", _DECAY, "2305.18290"),
    "adamw": Choice("AdamW", {**_DECAY, **_ADAM}, "1711.05101"),
    "adafactor": Choice(
        "Adafactor with second moments by row and column, at the rate `lr` (as TRL: no relative steps, no parameter scale; "
        "updates are clipped over all layers together)",
        _DECAY,
        "1804.04235",
    ),
    "lion": Choice("Lion; use an lr 3 to 10 times lower than for AdamW", {**_DECAY, "b1": 0.9, "b2": 0.99}, "2302.06675"),
    "muon": Choice(
        "Muon for the matrices of layers, with updates of AdamW's size; AdamW with Nesterov momentum for the rest",
        {"weight_decay": 0.0, **_ADAM, "momentum": 0.95},
        "2502.16982",
    ),
    "sgd": Choice("SGD with momentum", {**_DECAY, "momentum": 0.9}, ""),
}

SCHEDULES: Mapping[str, Choice] = {
    "constant": Choice("constant lr, as in the original", {}, "2305.18290"),
    "linear": Choice("linear decay to 0 at the end of the run", {}, ""),
    "cosine": Choice("cosine decay to min_lr_ratio", {"min_lr_ratio": 0.0}, "1608.03983"),
    "wsd": Choice(
        "warm-up, stable, decay: linear decay in the last part of the run",
        {"min_lr_ratio": 0.0, "decay_ratio": 0.1},
        "2404.06395",
    ),
}


def _all(table: Mapping[str, Choice]) -> str:
    return "; ".join(f"{name}: {choice.title}" for name, choice in table.items()) + "."


def _of(name: str, table: Mapping[str, Choice]) -> str:
    """A sentence naming the optimizers or schedules that read an option, with its default for each; empty if all do."""
    readers = {choice: found.options[name] for choice, found in table.items() if name in found.options}
    if len(readers) == len(table):
        return ""
    shown = [choice if isinstance(value, bool) else f"{choice} ({value:g})" for choice, value in readers.items()]
    return f" Used by {', '.join(shown)}."


HELP: Mapping[str, str] = {
    "optimizer": _all(OPTIMIZERS),
    "schedule": "Learning rate after warm-up. " + _all(SCHEDULES),
    **{name: option.help + _of(name, OPTIMIZERS) for name, option in OPTIONS.items()},
    **{name: option.help + _of(name, SCHEDULES) for name, option in SCHEDULE_OPTIONS.items()},
}
"""The help texts of `--help`."""


def options_of(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an optimizer or a schedule reads, with its own defaults where `values` has None or nothing."""
    defaults = {**OPTIMIZERS, **SCHEDULES}[name].options
    return {option: default if values.get(option) is None else values[option] for option, default in defaults.items()}


def problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Problems with `values` of `optimizer`, `schedule` and their options, as (option, what is wrong and what to do)."""
    yield from _problems("optimizer", values, OPTIMIZERS, OPTIONS)
    yield from _problems("schedule", values, SCHEDULES, SCHEDULE_OPTIONS)


def _problems(
    kind: str, values: Mapping[str, Any], table: Mapping[str, Choice], options: Mapping[str, Option]
) -> Iterator[tuple[str, str]]:
    chosen = values[kind]
    if chosen not in table:
        yield kind, f"must be one of {', '.join(table)}, got {chosen!r}"
        return
    for name, option in options.items():
        value = values.get(name, option.default)
        if name not in table[chosen].options and value != option.default:
            readers = ", ".join(choice for choice in table if name in table[choice].options)
            yield name, f"{kind} {chosen} does not read it: leave it out, or use one that does ({readers})"
        elif value is not None and not option.inside(value):
            yield name, f"{option.expected}, got {value}"


def markdown() -> str:
    """The table as Markdown, for the documentation."""
    lines = ["| optimizer or schedule | what it is | options and defaults | paper |", "|---|---|---|---|"]
    for name, choice in {**OPTIMIZERS, **SCHEDULES}.items():
        paper = f"[{choice.source}](https://arxiv.org/abs/{choice.source})" if choice.source else ""
        options = ", ".join(f"`{option}` {str(value).lower()}" for option, value in choice.options.items())
        lines.append(f"| `{name}` | {choice.title} | {options} | {paper} |")
    return "\n".join(lines) + "\n"
