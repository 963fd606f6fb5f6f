"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, in a folder without the base model.

Hugging Face fuses query, key and value of GPT-2, GPT-NeoX and Phi-3 into one module; we keep three. A fused adapter of rank
`n r` represents `n` of our adapters of rank `r` exactly: A is stacked, and B has a block for each and zeros elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from dpo_jax.models.checkpoint_stream import Piece
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.digest import WeightsDigest
from dpo_jax.models.fields import Fields, shown
from dpo_jax.models.folder import ADAPTER, name_and_revision
from dpo_jax.models.generation import GENERATION, generation_config
from dpo_jax.models.lora import LORA, WRITES, Lora, modules, outputs
from dpo_jax.models.tensor_layouts import Layout
from dpo_jax.models.tensors import canonical_name, module_name, tensors
from dpo_jax.models.weights import open_safetensors
from dpo_jax.types import Variables
from dpo_jax.untrusted import Unreadable, read_object, read_text, reading
from dpo_jax.writing import write_text, write_whole

WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_MADE = "dpo_jax."  # prefix of our additional metadata: the base's digest and type, and the adapted kernels
_MUST_BE_OFF = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that change the base


class Delta(NamedTuple):
    """The update of one module's weight: `scale * b @ a`."""

    a: np.ndarray  # [rank, in]
    b: np.ndarray  # [out, rank]
    scale: float


class Adapter(NamedTuple):
    """The content of an adapter folder. `deltas`: updates by the name of the Hugging Face weight that each changes."""

    folder: Path
    base: str
    deltas: Mapping[str, Delta]
    settings: Fields
    base_digest: str | None  # if we wrote it
    base_dtype: str
    targets: tuple[str, ...] | None

    def rounded(self, weight: np.ndarray) -> np.ndarray:
        """A base weight, rounded to the type in which the adapter was trained on it."""
        return weight if self.base_dtype == "float32" else weight.astype(np.dtype(self.base_dtype))

    def applied(self, name: str, weight: np.ndarray, config: DecoderConfig) -> np.ndarray:
        """The checkpoint tensor `name` plus the adapter's update, in float32; unchanged if there is none."""
        weight, delta = self.rounded(weight), self.deltas.get(name)
        if delta is None:
            return weight
        change = delta.scale * (delta.b.astype(np.float32) @ delta.a.astype(np.float32))
        change = change.T if _is_transposed(config) else change
        if change.shape != weight.shape:
            raise ValueError(
                f"{self.folder}: the adapter of {name} is of shape {change.shape}, but its base has {weight.shape}"
            )
        return weight.astype(np.float32) + change

    def check_base(self, digest: str) -> None:
        """Raises ValueError unless `digest` is that of the base on which the adapter was trained."""
        if self.base_digest not in (None, digest):
            raise ValueError(
                f"{self.folder} was trained on different weights from those of {self.base} now (SHA-256 "
                f"{self.base_digest[:12]}, and not {digest[:12]}): give it the base that it was trained on"
            )

    def digest_into(self, digest: WeightsDigest) -> None:
        """Adds the adapter to the digest of its base."""
        digest.base = digest.hexdigest()
        for name, delta in sorted(self.deltas.items()):
            for part in (Piece(("adapter", name, "a"), None, delta.a), Piece(("adapter", name, "b"), None, delta.b)):
                digest.add(part)
            digest.add(Piece(("adapter", name, "scale"), None, np.array([delta.scale])))
        if self.base_dtype != "float32":
            digest.add(Piece(("adapter", "base", self.base_dtype), None, np.zeros(0, np.uint8)))


def read_adapter(folder: Path, config: DecoderConfig) -> Adapter:
    """The adapter in `folder`, for a base of this `config`.

    Raises ValueError or FileNotFoundError for an adapter of another kind (DoRA, other trained modules, an initialization that
    changes the base) or for another model; `Unreadable` for damaged files, naming file and field.
    """
    settings = Fields(read_object(folder / ADAPTER), folder / ADAPTER)
    _refuse_other_kinds(settings)
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}; pickled adapters (adapter_model.bin) can run code and are not read"
        )
    handle = open_safetensors(file)
    known = {name: t for t in tensors(config) for name, _ in t.of_layers(config.layers)}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for stored in handle.keys():  # noqa: SIM118 (not a dict)
        found = _NAME.fullmatch(stored)
        name = canonical_name(f"{found['module']}.weight", config) if found else None
        if found is None or name not in known or not known[name].paths[0].endswith("/kernel"):
            raise ValueError(f"{file}: {stored[:200]} is not a LoRA weight of a linear layer of a {config.family}")
        with reading(f"{file}: tensor {stored}", remedy="fetch or save it again"):
            parts.setdefault(name, {})[found["part"]] = np.asarray(handle.get_tensor(stored))
    if not parts:
        raise ValueError(f"{file} holds no LoRA weights")
    said = handle.metadata() or {}
    targets = said.get(f"{_MADE}targets")
    return Adapter(
        folder,
        settings.text("base_model_name_or_path"),
        {name: _delta(file, name, both, settings) for name, both in parts.items()},
        settings,
        said.get(f"{_MADE}base_sha256"),
        said.get(f"{_MADE}base_dtype", "float32"),
        tuple(targets.split(",")) if targets else None,
    )


def _refuse_other_kinds(settings: Fields) -> None:
    if settings.text("peft_type") != "LORA":
        settings.wrong("peft_type", '"LORA"')
    on = [name for name in _MUST_BE_OFF if settings.all.get(name)]
    if settings.text("bias", "none") != "none":
        on.append("bias")
    if settings.all.get("init_lora_weights", True) not in _KEEP_THE_BASE:
        on.append("init_lora_weights")
    if on:
        raise ValueError(f"{settings.where}: {on[0]} = {shown(settings.all[on[0]])} is not supported; merge it with peft first")


def _delta(file: Path, name: str, both: Mapping[str, np.ndarray], settings: Fields) -> Delta:
    if missing := {"A", "B"} - both.keys():
        raise ValueError(f"{file}: lora_{missing.pop()} of {name} is missing")
    a, b = both["A"], both["B"]
    module = name.removesuffix(".weight")
    rank, alpha = (_of_module(settings, *keys, module) for keys in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise ValueError(f"{file}: {name} has lora_A {a.shape} and lora_B {b.shape}, where rank {rank:g} is expected")
    return Delta(a, b, alpha / (math.sqrt(rank) if settings.flag("use_rslora") else rank))


def _of_module(settings: Fields, key: str, pattern: str, module: str) -> float:
    """A numeric setting of one module: the first pattern that matches the end of its name, as in PEFT, or the general value."""
    patterns = settings.part(pattern)
    for name in patterns.all:
        try:
            matches = re.fullmatch(rf"(.*\.)?({name})", module)
        except re.error as error:
            raise Unreadable(f"{patterns.where}: {shown(name)} is not a regular expression: {error}") from error
        if matches:
            return patterns.number(name)
    return settings.number(key)


def resumed(adapter: Adapter, config: DecoderConfig) -> tuple[Lora, Iterator[Piece]]:
    """The adapter in our form, to be trained further: its size, and the arrays of the collection "lora".

    Raises ValueError for what our form cannot represent: several ranks or scales, or a module not adapted in every layer.
    """
    layouts = {t.name: t.layout for t in tensors(config)}
    adapted = {hf: kernels for hf, kernels in modules(config).items() if f"{hf}.weight".format(0) in adapter.deltas}
    every = {f"{hf}.weight".format(layer) for hf in adapted for layer in range(config.layers)}
    if every != set(adapter.deltas):
        raise ValueError(f"{adapter.folder}: the adapter is not on the same modules in every layer; merge it instead")
    targets = adapter.targets or tuple(kernel for kernels in adapted.values() for kernel in kernels)
    rank = int(adapter.settings.number("r"))
    scales = {delta.scale for delta in adapter.deltas.values()}
    lora = Lora(rank, adapter.settings.number("lora_alpha"), targets, adapter.settings.flag("use_rslora"))
    if max(abs(scale - lora.scale) for scale in scales) > 1e-6 * lora.scale:
        raise ValueError(f"{adapter.folder}: modules have several scales (alpha_pattern); merge it instead")

    def pieces() -> Iterator[Piece]:
        for hf, kernels in adapted.items():
            ours = [kernel for kernel in kernels if kernel in targets]
            for layer in range(config.layers):
                delta = adapter.deltas[f"{hf}.weight".format(layer)]
                both = _ours(delta, ours, kernels, layouts[f"{hf}.weight"], rank, config, adapter.targets is not None)
                for kernel, (a, b) in zip(ours, both, strict=True):
                    path = (LORA, "layers", *kernel.split("/"))
                    yield Piece((*path, "a"), layer, a)
                    yield Piece((*path, "b"), layer, b)

    return lora, pieces()


def _ours(
    delta: Delta, ours: list[str], kernels: tuple[str, ...], layout: Layout, rank: int, config: DecoderConfig, blocks: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A and B of each of our kernels in a Hugging Face module."""
    parts = layout.to_ours(delta.b.T if _is_transposed(config) else delta.b)
    count = len(ours) if blocks else 1  # for A; a fused module of PEFT has one for all three
    if delta.a.shape[0] != count * rank:
        raise ValueError(f"{', '.join(ours)}: rank {delta.a.shape[0]} where {count * rank} is expected (rank_pattern)")
    for number, kernel in enumerate(ours):
        block = slice(number * rank, (number + 1) * rank) if blocks else slice(None)
        b = parts[kernels.index(kernel)]
        yield delta.a[block].T, (b.T if kernel in WRITES else b)[block]


def write_adapter(
    folder: Path,
    config: DecoderConfig,
    lora: Lora,
    adapter: Variables,
    *,
    base: str,
    source: Path,
    base_digest: str,
    base_dtype: str = "float32",
    dtype: Any = np.float32,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
    write: bool = True,
) -> Path:
    """Writes the collection "lora" in PEFT's format. Returns the folder.

    `base` is the name under which others load the base model: a folder or a Hub id, optionally with "@revision". `source` is
    its folder. The digest and type of the base's weights, which PEFT does not use, go into the adapter's metadata, so that
    `hf.read_weights` can refuse another base. All hosts call this, one with `write`. Raises FileExistsError for a folder that
    holds a whole model.
    """
    tensors_, ranks = _in_peft_form(config, lora, adapter["layers"], np.dtype(dtype), fetch)
    if not write:
        return folder
    if folder.is_dir() and any(f for f in folder.glob("*.safetensors") if f.name != WEIGHTS):
        raise FileExistsError(f"{folder} holds a whole model; choose another place for the adapter")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)  # the weights are written last: a folder without them is refused
    alphas = {name: lora.scale * (math.sqrt(rank) if lora.rslora else rank) for name, rank in ranks.items()}
    own = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    name, revision = name_and_revision(base)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _is_transposed(config),
        "init_lora_weights": True,
        "target_modules": _targets(sorted(ranks), config),
        "rank_pattern": own,
        "alpha_pattern": {module: alphas[module] for module in own},
    }
    write_text(folder / ADAPTER, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if generation_config(source) is not None:
        write_text(folder / GENERATION, read_text(source / GENERATION))
    said = {"format": "pt", f"{_MADE}base_sha256": base_digest, f"{_MADE}base_dtype": base_dtype}
    said[f"{_MADE}targets"] = ",".join(lora.targets)
    write_whole(folder / WEIGHTS, _in_order(save(tensors_, metadata=said)))
    return folder


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its header in a fixed order: safetensors itself shuffles the metadata."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _in_peft_form(
    config: DecoderConfig, lora: Lora, layers: Any, dtype: np.dtype, fetch: Callable[[Any], np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Tensors by PEFT's names, and the rank of each adapted module."""
    layouts = {t.name: t.layout for t in tensors(config)}
    tensors_: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for hf, kernels in modules(config).items():
        ours = [kernel for kernel in kernels if kernel in lora.targets]
        if not ours:
            continue
        rank = ranks[_short(hf, config)] = lora.rank * len(ours)
        leaves = {kernel: layers[kernel.split("/")[0]][kernel.split("/")[1]] for kernel in ours}
        whole = {kernel: (fetch(leaf["a"]), fetch(leaf["b"])) for kernel, leaf in leaves.items()}
        for layer in range(config.layers):
            a = np.concatenate([whole[kernel][0][layer].T for kernel in ours])
            blocks = []
            for kernel in kernels:
                block = np.zeros((rank, outputs(config, kernel)), np.float32)
                if kernel in ours:
                    number = ours.index(kernel)
                    block[number * lora.rank : (number + 1) * lora.rank] = whole[kernel][1][layer]
                blocks.append(block.T if kernel in WRITES else block)
            b = layouts[f"{hf}.weight"].to_hf(blocks)
            b = b.T if _is_transposed(config) else b
            module = f"base_model.model.{module_name(hf.format(layer), config)}"
            for part, array in (("A", a), ("B", b)):
                tensors_[f"{module}.lora_{part}.weight"] = np.ascontiguousarray(array.astype(dtype))
    return tensors_, ranks


def _short(hf: str, config: DecoderConfig) -> str:
    """The shortest end of a module's name that distinguishes it from all others in PEFT."""
    parts = hf.split(".")
    alone = sum(other.rpartition(".")[2] == parts[-1] for other in modules(config)) == 1
    return parts[-1] if alone else ".".join(parts[-2:])


def _targets(names: list[str], config: DecoderConfig) -> list[str] | str:
    """The adapted modules: ends of their names, or a pattern if a vision encoder has modules with the same names."""
    if not config.image_width:
        return names
    return rf".*\.language_model\..*\.({'|'.join(map(re.escape, names))})"


def _is_transposed(config: DecoderConfig) -> bool:
    """Whether Hugging Face stores linear weights as [in, out], as GPT-2 does (`Conv1D`)."""
    return config.family == "gpt2"
