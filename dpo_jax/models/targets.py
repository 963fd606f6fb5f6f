"""Parses parameter selections: kernels that get an adapter (`lora.targets`), and parameters to train (`trainable`).

Needs no JAX, so that `--check` refuses what training refuses.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import NamedTuple

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.tensors import tensors


def lora_targets(names: str, config: DecoderConfig) -> tuple[str, ...]:
    """The kernels named in `names`, separated by commas: "all", "attention", "mlp", ours ("query"), or Hugging Face's
    ("q_proj"; a fused "query_key_value" is three of ours). Raises ValueError for a name that this model does not have.

    >>> decoder, _ = load_hf(folder)
    >>> lora_targets("attention", decoder.config)
    ('attention/query', 'attention/key', 'attention/value', 'attention/out')
    """
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"config: expected that of a model of load_hf or make_model, got {type(config).__name__}")
    known: dict[str, list[str]] = {"all": [], "attention": [], "mlp": []}
    for hf, ours in modules(config).items():
        for kernel in ours:
            room, name = kernel.split("/")
            for key in ("all", room, name):
                known.setdefault(key, []).append(kernel)
            known.setdefault(hf.rpartition(".")[2], []).append(kernel)
    asked = [name.strip() for name in names.split(",") if name.strip()]
    wrong = [name for name in asked if not known.get(name)]
    if wrong or not asked:
        what = f"a {config.family} has no {', '.join(wrong)}" if wrong else "no target is named"
        raise ValueError(f"{what}; it has {', '.join(name for name in known if known[name])}")
    chosen = {kernel for name in asked for kernel in known[name]}
    return tuple(kernel for kernel in known["all"] if kernel in chosen)


def modules(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """{name of a Hugging Face module, "{}" for the layer: our kernels in it}, for all linear layers but the head.

    Routers and experts are not included: adapters do not change them.
    """
    kernels = (t for t in tensors(config) if t.stacked and t.name.endswith(".weight") and t.paths[0].endswith("/kernel"))
    return {
        t.name.removesuffix(".weight"): tuple(path.removeprefix("layers/").removesuffix("/kernel") for path in t.paths)
        for t in kernels
    }


def parameters(config: DecoderConfig) -> list[str]:
    """The dotted names of all parameters of a decoder, in the order of its variables."""
    return [".".join(path) for path in sorted(tuple(path.split("/")) for t in tensors(config) for path in t.paths)]


class Chosen(NamedTuple):
    """The trained parameters: whole ones by dotted name, and those of the last `layers` layers."""

    names: frozenset[str]
    layers: int


def chosen_names(text: str, every: Sequence[str], *, layers: int) -> Chosen:
    """The parameters among `every` named in `text`, separated by commas: "last_layer", "last_layers:N", or patterns of dotted
    names such as "final_norm.*" or "*.bias". Raises ValueError for a pattern that matches nothing, and for too many layers.
    """
    names, last = set(), 0
    for term in (part.strip() for part in text.split(",")):
        if found := re.fullmatch(r"last_layer|last_layers:(\d+)", term):
            last = int(found[1] or 1)
            if not 0 < last < layers:
                raise ValueError(f"{term}: the model has {layers} layers; name 1 to {layers - 1}, or leave it out to train all")
            continue
        matching = fnmatch.filter(every, term)
        if not matching:
            raise ValueError(f"no parameter matches {term!r}; there are last_layer, last_layers:N, {', '.join(every)}")
        names |= set(matching)
    if last and any(name.startswith("layers.") for name in names):
        raise ValueError("last layers cannot be combined with a pattern that matches parameters of all layers")
    if len(names) == len(every):
        raise ValueError("all parameters are named: leave it out to train all")
    return Chosen(frozenset(names), last)
