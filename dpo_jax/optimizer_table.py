"""The table of optimizers and schedules by name: their options and where they come from. `--help` and checks are made from it.

`dpo_jax/runtime/optim.py` builds them, from optax. To add an optimizer, add a line to `OPTIMIZERS` and a branch there; a new
option gets a line in `OPTIONS`. It imports neither JAX nor numpy, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from dpo_jax.option import Option

Optimizer = Literal["rmsprop", "adamw", "adafactor", "lion", "muon", "sgd"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]


class Choice(NamedTuple):
    """An optimizer or a schedule: the options that it reads with their values where None is given, and where it comes from."""

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
        "Weight decay of all matrices; norms and biases have none. Times the learning rate, and decoupled; "
        "rmsprop and sgd add it to the gradient, as in torch.",
    ),
    "decay_embeddings": Option(
        bool, True, lambda x: True, "", "Whether embeddings decay as well, as in transformers; those of muon never do."
    ),
    "b1": Option(float | None, None, _share, _SHARE, "Decay of the mean of gradients."),
    "b2": Option(float | None, None, _share, _SHARE, "Decay of the mean of their squares (lion: of what is kept for later)."),
    "eps": Option(float | None, None, lambda x: x > 0, "must be greater than 0", "Added to the root of the mean square."),
    "momentum": Option(float | None, None, _share, _SHARE, "Share of the last update that is kept."),
}

SCHEDULE_OPTIONS: Mapping[str, Option] = {
    "min_lr_ratio": Option(float, 0.0, _share, _SHARE, "Share of lr that is left at the end of the run."),
    "decay_ratio": Option(
        float, 0.1, lambda x: 0 < x <= 1, "must be above 0 and at most 1", "Share of the run in which the rate falls."
    ),
}

_DECAY = {"weight_decay": 0.0, "decay_embeddings": True}
_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}

OPTIMIZERS: Mapping[str, Choice] = {
    "rmsprop": Choice("RMSprop as in the original DPO code: decay 0.99, eps 1e-8", _DECAY, "2305.18290"),
    "adamw": Choice("AdamW", {**_DECAY, **_ADAM}, "1711.05101"),
    "adafactor": Choice(
        "Adafactor with second moments by row and column, at the rate `lr` (as TRL: no relative steps, no parameter scale)",
        _DECAY,
        "1804.04235",
    ),
    "lion": Choice("Lion; lr 3 to 10 times below that of AdamW", {**_DECAY, "b1": 0.9, "b2": 0.99}, "2302.06675"),
    "muon": Choice(
        "Muon for the matrices of layers, with updates of AdamW's size; AdamW with Nesterov momentum for the rest",
        {"weight_decay": 0.0, **_ADAM, "momentum": 0.95},
        "2502.16982",
    ),
    "sgd": Choice("SGD with momentum", {**_DECAY, "momentum": 0.9}, ""),
}

SCHEDULES: Mapping[str, Choice] = {
    "constant": Choice("stays at lr, as in the original", {}, "2305.18290"),
    "linear": Choice("falls on a line that ends at 0 with the run", {}, ""),
    "cosine": Choice("falls on half a cosine", {"min_lr_ratio": 0.0}, "1608.03983"),
    "wsd": Choice(
        "warm-up, stable, decay: falls on a line in the last part of the run",
        {"min_lr_ratio": 0.0, "decay_ratio": 0.1},
        "2404.06395",
    ),
}


def _all(table: Mapping[str, Choice]) -> str:
    return "; ".join(f"{name}: {choice.title}" for name, choice in table.items()) + "."


def _of(name: str, table: Mapping[str, Choice]) -> str:
    """Who reads an option, with the defaults where they differ."""
    readers = {choice: found.options[name] for choice, found in table.items() if name in found.options}
    if len(readers) == len(table):
        return ""
    shown = [choice if isinstance(value, bool) else f"{choice} ({value:g})" for choice, value in readers.items()]
    return f" Of {', '.join(shown)}."


HELP: Mapping[str, str] = {
    "optimizer": _all(OPTIMIZERS),
    "schedule": "The learning rate after warm-up. " + _all(SCHEDULES),
    **{name: option.help + _of(name, OPTIMIZERS) for name, option in OPTIONS.items()},
    **{name: option.help + _of(name, SCHEDULES) for name, option in SCHEDULE_OPTIONS.items()},
}
"""The texts of `--help`."""


def options_of(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the options that an optimizer or a schedule reads, its own where None or nothing is given."""
    defaults = {**OPTIMIZERS, **SCHEDULES}[name].options
    return {option: default if values.get(option) is None else values[option] for option, default in defaults.items()}


def problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with `values`, which hold `optimizer`, `schedule` and their options: (option, what and what to do)."""
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
