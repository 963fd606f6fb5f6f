"""What makes a training run the same run: settings, data and start. Kept with each checkpoint, compared on resume."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_jax.cli.config import Config, ConfigError, TrainingConfig
from dpo_jax.data.chat_date import writes_date
from dpo_jax.data.pairs import DataReport
from dpo_jax.data.tokenizer import tokenizer_digest

if TYPE_CHECKING:
    from dpo_jax.types import Model

HELD_OUT = "token ids held out"
NEITHER = {"policy", "reference", "microbatches"}
"""Options of a section that are no setting: paths, whose weights have digests, and what does not change a result."""
LIMITS = ("max_length", "max_prompt_length", "truncation", "bos", "format", "on_bad", "max_train")


def settings(config: Config, section: TrainingConfig) -> dict[str, Any]:
    """The options that decide what a training run computes; where it runs and what it logs is left out."""
    options = {name: value for name, value in dataclasses.asdict(section).items() if name not in NEITHER}
    lora = dataclasses.asdict(config.lora) if config.lora.rank is not None else {"rank": None}
    options |= {f"lora.{name}": value for name, value in lora.items()}
    return {**options, "seed": config.run.seed, "precision": config.run.precision}


def architecture(model: Model) -> str:
    """A digest of everything but the weights that decides what a decoder computes: rotary base, window, epsilon, ..."""
    fields = dataclasses.asdict(model.config) | {"hf_json": ""}  # which also says who saved it, and in which version
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


class Earlier(NamedTuple):
    """The run that a directory holds: where that is, the step of its newest checkpoint, and what was kept with it."""

    place: str
    step: int
    meta: Mapping[str, Any]

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return self.meta["fingerprint"]

    @property
    def data(self) -> Mapping[str, Any]:
        return self.meta.get("data", {})


def behind(earlier: Earlier | None, *, examples: int, batch: int) -> int:
    """By how many examples the steps of a run lag behind `step * batch`: what the last, smaller batches of its parts lacked.

    A run that has become longer after its end continues with the next example, and none is left out.
    """
    if earlier is None:
        return 0
    saved = earlier.fingerprint
    seen = min(earlier.step * batch - saved.get("behind", 0), round(examples * saved["epochs"]))
    return earlier.step * batch - seen


def check_length(earlier: Earlier | None, *, steps: int) -> None:
    """Raises `ConfigError` for a run that is to become shorter than it is already."""
    if earlier is not None and steps < earlier.step:
        raise ConfigError(
            f"{earlier.place} has taken {earlier.step} steps, and is to have {steps}: a run can become longer, not shorter. "
            "Choose another --run.dir, or export an earlier step (--export.step)."
        )


def check_weights(earlier: Earlier | None, **digests: str) -> None:
    """Raises `ConfigError` where weights differ from those of the earlier run. `start`, `reference`: their digests."""
    if earlier is not None:
        refuse_other_settings(earlier.place, earlier.fingerprint, digests)


def check_data(earlier: Earlier | None, digest: str, data: Mapping[str, Any]) -> None:
    """Raises `ConfigError` saying what about the data to train on changed. `data`: of `data_record`."""
    if earlier is not None and earlier.fingerprint["data"] != digest:
        lines = other_data(earlier.data, data) if earlier.data else []
        words = lines or ["  the token ids differ, and nothing else that is recorded"]
        raise ConfigError(_message(earlier.place, "data", words))


def other_held_out(earlier: Earlier | None, data: Mapping[str, Any]) -> bool:
    """Whether the held-out pairs differ from those that an earlier run was judged on."""
    return earlier is not None and bool(earlier.data) and earlier.data.get(HELD_OUT) != data[HELD_OUT]


def data_record(config: Config, tokenizer: Any, reports: Sequence[DataReport], *, held_out: str) -> dict[str, Any]:
    """All that token ids are made of, a field each: where two digests of data differ, this says why. `held_out`: a digest."""
    record: dict[str, Any] = {HELD_OUT: held_out}
    for report in reports:
        record |= {f"{report.split} split, {name}": getattr(report, name) for name in ("rows", "read", "kept")}
        record |= {f"file {file['path']}": file["sha256"] for file in report.files}
    record |= {f"data.{name}": getattr(config.data, name) for name in LIMITS}
    record["chat template"] = (
        hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest() if tokenizer.chat_template else None
    )
    record["tokenizer"] = tokenizer_digest(tokenizer)
    if writes_date(tokenizer):
        record["data.date (the chat template writes it)"] = config.data.date
    return record | {f"package {name}": importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")}


def refuse_other_settings(place: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming each setting that differs from that of the run in `place`. `saved`, `now`: fingerprints.

    Only what is in both is compared, so that settings can be refused before any data are read. A run may become longer where
    its learning rate does not depend on its length.
    """
    differing = {name: (saved[name], now[name]) for name in now if name in saved and saved[name] != now[name]}
    differing.pop("behind", None)
    differing.pop("data", None)  # `check_data` says more
    if "epochs" in differing and now["schedule"] == saved["schedule"] == "constant":
        del differing["epochs"]
    if not differing:
        return
    lines = [f"  {name}: was {_shown(old)}, is {_shown(new)}" for name, (old, new) in differing.items()]
    if "epochs" in differing:
        lines.append("  (with schedule linear the learning rate falls to 0 at the end of the run, so its length is fixed)")
    raise ConfigError(_message(place, "settings", lines))


def refuse_other_data(place: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming what differs from the data of the run in `place`. `saved`, `now`: parts of `data_record`."""
    if lines := other_data(saved, now):
        raise ConfigError(_message(place, "data", lines))


def other_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What about the data changed, a line each. `saved`, `now`: of `data_record`."""
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
    # Enough of a digest to tell two apart.
    return repr(f"{value[:12]}…") if isinstance(value, str) and len(value) == 64 else repr(value)


def _message(place: str, what: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{place} holds a run with other {what}:", *lines]) + (
        "\nContinue it with its own settings (its config.yaml), or choose another --run.dir."
    )
