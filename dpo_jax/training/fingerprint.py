"""Run fingerprints: values that must not change when a run is resumed. Saved with each checkpoint and compared on resume.

A fingerprint is a flat dict of JSON values: settings, digests of data and weights. Some names have a special meaning: `data`, a
digest of the token ids; `epochs`, `steps`, `schedule` and `warmup_ratio`, because a run whose learning rate does not depend on
its length may be extended; `behind`, see the function.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dpo_jax.types import Model

HELD_OUT = "token ids held out"
"""The key of the held-out data's digest in a data record."""


class RunMismatch(ValueError):
    """The folder holds a run with different settings, data or weights."""


class SavedRun(NamedTuple):
    """The run in a folder: its place, the step of its newest checkpoint, and the `meta` saved with it."""

    place: str
    step: int
    meta: Mapping[str, Any]

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return self.meta["fingerprint"]

    @property
    def data(self) -> Mapping[str, Any]:
        return self.meta.get("data", {})


def json_values(values: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """`values` as a resumed run will read them: JSON makes lists of tuples. `name`: that of the argument, for messages.

    Raises TypeError, naming the entry, for a value that JSON does not have, such as a numpy number.
    """
    found = {}
    for key, value in values.items():
        try:
            found |= json.loads(json.dumps({key: value}))
        except TypeError as error:
            raise TypeError(
                f"{name}[{key!r}] cannot be saved: {error}. Use texts, numbers (int, float), True, False, None, lists and dicts"
            ) from error
    return found


def architecture(model: Model) -> str:
    """A digest of everything that determines a decoder's output except the weights: rotary base, window, epsilon, ..."""
    config = model.config
    fields = dataclasses.asdict(config) | {"hf_json": ""}  # it also names the library and version that saved it
    for field in dataclasses.fields(config):
        if field.metadata.get("later") and fields[field.name] == field.default:
            del fields[field.name]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def behind(saved: SavedRun | None, *, examples: int, batch: int) -> int:
    """How many examples fewer than `step * batch` a saved run has seen, because it ended with a smaller batch.

    An extended run continues with the next example, so none is left out.
    """
    if saved is None:
        return 0
    was = saved.fingerprint
    if was.get("steps"):  # all batches were full
        return was.get("behind", 0)
    seen = min(saved.step * batch - was.get("behind", 0), _seen_in(was["epochs"], examples))
    return saved.step * batch - seen


def _seen_in(epochs: float, examples: int) -> int:
    from dpo_jax.data.loader import seen_in  # imported here: it imports JAX, and `--check` does without

    return seen_in(epochs, examples)


def run_length(fingerprint: Mapping[str, Any]) -> str:
    """The planned length of the run, in words."""
    steps = fingerprint.get("steps")
    return f"{fingerprint.get('epochs') or 0:g} epochs" if steps is None else f"{steps} steps"


def check_length(saved: SavedRun | None, *, steps: int) -> None:
    """Raises `RunMismatch` if the run would be shorter than it already is."""
    if saved is not None and steps < saved.step:
        raise RunMismatch(
            f"{saved.place} has taken {saved.step} steps, but {steps} are asked for: a run can be made longer, not shorter"
        )


def check_epochs(saved: SavedRun | None, *, epochs: float | None, examples: int, batch: int) -> None:
    """Raises `RunMismatch` if the run has seen more examples than `epochs` passes hold; None: its length is in steps.

    `check_length` does not find this: two lengths in epochs may round up to the same number of steps.
    """
    if saved is None or epochs is None:
        return
    seen, asked = saved.step * batch - behind(saved, examples=examples, batch=batch), _seen_in(epochs, examples)
    if asked < seen:
        raise RunMismatch(
            f"{saved.place} has seen {seen:,} examples, but {asked:,} are asked for ({epochs:g} epochs of {examples:,}): "
            "a run can be made longer, not shorter"
        )


def check_weights(saved: SavedRun | None, **digests: str) -> None:
    """Raises `RunMismatch` if weights differ from those of the saved run. `digests`: by name, such as `start` and
    `reference`."""
    if saved is not None:
        check_settings(saved.place, saved.fingerprint, digests)


def check_data(saved: SavedRun | None, digest: str, data: Mapping[str, Any]) -> None:
    """Raises `RunMismatch` saying how the training data changed. `data`: a record of the sources of the token ids."""
    if saved is not None and saved.fingerprint.get("data") != digest:
        lines = data_changes(saved.data, data) if saved.data else []
        words = lines or ["  the token ids differ, but nothing else that is recorded"]
        raise RunMismatch(_message(saved.place, "data", words))


def other_held_out(saved: SavedRun | None, data: Mapping[str, Any]) -> bool:
    """Whether the held-out data differ from those used to evaluate a saved run."""
    return saved is not None and bool(saved.data) and saved.data.get(HELD_OUT) != data.get(HELD_OUT)


def check_held_out(saved: SavedRun | None, data: Mapping[str, Any]) -> None:
    """Raises `RunMismatch` saying how the held-out data changed, if early stopping has already chosen a best step on them.

    No evaluation on other data can be compared with that of the best step. `data`: a data record.
    """
    if saved is not None and "best" in saved.meta.get("early_stopping", {}) and other_held_out(saved, data):
        message = _message(saved.place, "held-out data, on which its best step was chosen", data_changes(saved.data, data))
        raise RunMismatch(message)


def check_settings(place: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `RunMismatch`, naming each setting that differs from the run in `place`. `saved`, `now`: fingerprints.

    Only common names are compared, so that settings can be checked before any data are read. A run may be extended if its
    learning rate does not depend on its length.
    """
    differing = {name: (saved[name], now[name]) for name in now if name in saved and saved[name] != now[name]}
    differing.pop("behind", None)
    differing.pop("data", None)  # `check_data` gives details
    constant = now.get("schedule") == saved.get("schedule") == "constant"
    if constant and now.get("warmup_ratio") is None and saved.get("warmup_ratio") is None:
        for name in ("epochs", "steps"):
            differing.pop(name, None)
    if not differing:
        return
    lines = [f"  {name}: was {_shown(old)}, is {_shown(new)}" for name, (old, new) in differing.items()]
    if {"epochs", "steps"} & differing.keys():
        why = f"schedule {now.get('schedule')}" if not constant else "a warmup_ratio"
        lines.append(f"  (with {why} the learning rate depends on the length of the run, which is fixed)")
    raise RunMismatch(_message(place, "settings", lines))


def check_same_data(place: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `RunMismatch`, naming the differences from the data of the run in `place`. `saved`, `now`: parts of data
    records."""
    if lines := data_changes(saved, now):
        raise RunMismatch(_message(place, "data", lines))


def data_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Changes of the data, one line each. `saved`, `now`: data records."""
    lines = []
    for name in sorted({*saved, *now}):
        old, new = saved.get(name), now.get(name)
        if old == new:
            continue
        if name.startswith("file "):
            lines.append(f"  {name}: " + ("is gone" if new is None else "is new" if old is None else "has other contents"))
        else:
            lines.append(f"  {name}: was {_shown(old)}, is {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    # Enough of a digest to distinguish two.
    return repr(f"{value[:12]}…") if isinstance(value, str) and len(value) == 64 else repr(value)


def _message(place: str, what: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{place} holds a run with other {what}:", *lines])
