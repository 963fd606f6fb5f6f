"""A reader for the Hugging Face `config.json` settings that families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dpo_jax.models.fields import Fields, shown
from dpo_jax.models.rope import LongRope, Rope, Yarn
from dpo_jax.untrusted import LIMITS, Unreadable

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Reader(Fields):
    """The fields of a `config.json`, with the defaults of its family.

    A value that no model of the family can have raises `Unreadable`. One that transformers supports and the decoder does not
    raises a plain ValueError.
    """

    def __init__(self, family: str, hf: Mapping[str, Any], where: str | Path, *, defaults: Mapping[str, Any]):
        super().__init__(hf, where, defaults=defaults)
        self.family = family

    def refuse(self, key: str, supported: str = "") -> NoReturn:
        """Raises ValueError: the decoder does not support this setting."""
        what = f"; supported: {supported}" if supported else ""
        raise ValueError(f"{self.where}: {key} = {shown(self.all[key])} is not supported in a {self.family}{what}")

    def layers(self, key: str) -> int:
        """The number of layers. It is checked before anything is made per layer."""
        layers = self.size(key)
        LIMITS.check("layers", layers, self.where, what=f"layers ({key})")
        return layers

    def activation(self, key: str) -> str:
        name = self.text(key)
        if name not in _ACTIVATIONS:
            self.refuse(key, ", ".join(_ACTIVATIONS))
        return _ACTIVATIONS[name]

    def head_size(self, width: int, heads: int) -> int:
        if width % heads:
            raise Unreadable(f"{self.where}: the width {width} is not a multiple of the {heads} attention heads")
        return width // heads

    def rope_settings(self) -> Fields:
        """The rotary settings, under whichever key a version of transformers wrote them."""
        return self.part("rope_scaling" if self.all.get("rope_scaling") else "rope_parameters")

    def rope(self, size: int, *, theta: str | float, settings: Fields, interleaved: bool = False) -> Rope:
        """`theta` is the name of the field that holds the base if `settings` does not, or the value itself."""
        kind = settings.text("rope_type" if settings.has("rope_type") else "type", "default")
        if size < 2 or size % 2:
            raise Unreadable(f"{self.where}: rotary size {size} is not a positive even number")
        if settings.has("rope_theta"):
            base = settings.number("rope_theta")
        else:
            base = self.number(theta) if isinstance(theta, str) else theta
        kind = _OLDER_KINDS.get(kind, kind)
        if kind in ("default", "dynamic"):  # dynamic: only changes texts longer than any we read
            return Rope(base, size, interleaved)
        if kind not in _SCALINGS:
            raise ValueError(
                f"{settings.where}: rope_type = {shown(kind)} is not supported in a {self.family}; "
                f"supported: default, dynamic, {', '.join(_SCALINGS)}"
            )
        original = "original_max_position_embeddings"
        owner = settings if settings.has(original) else self
        positions = owner.size(original) if owner.has(original) else self.size("max_position_embeddings")
        return _SCALINGS[kind](self, settings, base, size, interleaved, positions)


def _linear(read: Reader, settings: Fields, base: float, size: int, interleaved: bool, positions: int) -> Rope:
    return Rope(base, size, interleaved, "linear", settings.number("factor"), original_max_positions=positions)


def _llama3(read: Reader, settings: Fields, base: float, size: int, interleaved: bool, positions: int) -> Rope:
    scaling = {key: settings.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        settings.wrong("high_freq_factor", f"above low_freq_factor = {scaling['low_freq_factor']:g}")
    return Rope(base, size, interleaved, "llama3", original_max_positions=positions, **scaling)


def _yarn(read: Reader, settings: Fields, base: float, size: int, interleaved: bool, positions: int) -> Rope:
    if base <= 1.0:
        settings.wrong("rope_theta", "above 1, which yarn needs")
    factor = settings.number("factor") if settings.has("factor") else read.size("max_position_embeddings") / positions
    fast, slow = (settings.optional_number(key) or usual for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    scales = [settings.optional_number(key) for key in ("mscale", "mscale_all_dim")]
    if (amplitude := settings.optional_number("attention_factor")) is None:
        above, below = scales if all(scales) else (1.0, 0.0)
        amplitude = _yarn_amplitude(factor, above or 1.0) / _yarn_amplitude(factor, below or 0.0)
    return Yarn(
        base,
        size,
        interleaved,
        "yarn",
        factor,
        original_max_positions=positions,
        beta_fast=fast,
        beta_slow=slow,
        truncate=settings.flag("truncate") if settings.has("truncate") else True,
        attention_factor=amplitude,
    )


def _yarn_amplitude(factor: float, scale: float) -> float:
    """Equation 22 of the YaRN paper, with its constant."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(read: Reader, settings: Fields, base: float, size: int, interleaved: bool, positions: int) -> Rope:
    divisors = tuple(settings.numbers("short_factor"))
    if len(divisors) != size // 2:
        settings.wrong("short_factor", f"an array of {size // 2} numbers above 0")
    factor = settings.number("factor") if settings.has("factor") else read.size("max_position_embeddings") / positions
    if (amplitude := settings.optional_number("attention_factor")) is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(positions)) if factor > 1 and positions > 1 else 1.0
    return LongRope(
        base, size, interleaved, "longrope", original_max_positions=positions, divisors=divisors, attention_factor=amplitude
    )


_OLDER_KINDS = {"su": "longrope"}
_SCALINGS: Mapping[str, Callable[..., Rope]] = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def older_rotary_keys(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of transformers 5 (`rope_parameters`) under the keys of transformers 4, except those `hf` has.

    Programs that know only the older keys would silently use the default base. transformers 5 reads both. `defaults` are those
    of the family, which has these keys.
    """
    now = hf.get("rope_parameters")
    if not isinstance(now, Mapping):
        return {}
    wide, narrow = now.get("full_attention", now), now.get("sliding_attention", {})
    scaling = {key: value for key, value in wide.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older = {
        "rotary_emb_base" if "rotary_emb_base" in defaults else "rope_theta": wide.get("rope_theta"),
        "rotary_pct" if "rotary_pct" in defaults else "partial_rotary_factor": wide.get("partial_rotary_factor"),
        "rope_local_base_freq": narrow.get("rope_theta"),
        "rope_scaling": scaling if wide.get("rope_type", "default") != "default" else None,
    }
    return {key: value for key, value in older.items() if value is not None and hf.get(key) is None}
