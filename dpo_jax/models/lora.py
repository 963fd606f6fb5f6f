"""LoRA (Hu et al. 2021): a trained product of two low-rank matrices beside each frozen kernel, `x W + scale x A B`.

`lora_model` turns a decoder into a model with variables `{"params": base, "lora": adapter}`. Freeze the first and train the
second (`step.init_state(..., frozen=...)`): gradients and optimizer state then exist for the adapter alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.layers import SCALED
from dpo_jax.models.logical_axes import axis_lengths
from dpo_jax.models.targets import lora_targets as lora_targets
from dpo_jax.models.targets import modules as modules
from dpo_jax.types import Model, Variables

LORA = "lora"
# Logical axes of input and output of each kernel.
KERNELS: Mapping[str, tuple[str, str]] = {
    "attention/query": ("embed", "heads"),
    "attention/key": ("embed", "kv_heads"),
    "attention/value": ("embed", "kv_heads"),
    "attention/out": ("heads", "embed"),
    "mlp/gate": ("embed", "mlp"),
    "mlp/up": ("embed", "mlp"),
    "mlp/down": ("mlp", "embed"),
}
WRITES = tuple(name for name, axes in KERNELS.items() if axes[1] == "embed")
"""Kernels that write to the residual stream; these are [out, in], as in `layers.Linear`."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """The size of an adapter. `targets` are names of kernels such as "attention/query" (`lora_targets`).

    >>> Lora(rank=4, alpha=8.0, targets=("attention/query", "attention/value")).scale
    2.0
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The adapter's scale: alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def outputs(config: DecoderConfig, kernel: str) -> int:
    """The outputs of a kernel such as "attention/query"."""
    return axis_lengths(config)[KERNELS[kernel][1]]


def lora_model(model: Model, lora: Lora) -> Model:
    """`model` with an adapter: its variables gain the collection "lora", `{"layers": {...: {"a": [layers, in, rank], "b":
    [layers, rank, out]}}}`. B starts at zero, so that the adapted model equals the base. Variables without "lora" give the
    base.

    >>> decoder, _ = load_hf(folder)
    >>> adapted = lora_model(decoder, Lora(4, 8.0, lora_targets("attention", decoder.config)))
    >>> sorted(adapted.init(jax.random.key(0)))
    ['lora', 'params']

    LoRA training with the functions: the base is frozen, and also gives the reference log-probabilities.

    >>> lora = Lora(4, 8.0, lora_targets("attention", decoder.config))
    >>> adapted, tx = lora_model(decoder, lora), make_optimizer(1e-3)
    >>> both = adapted.init(jax.random.key(0))  # or {**weights of load_hf, "lora": ...}
    >>> state = init_state({"lora": both["lora"]}, tx, frozen={"params": both["params"]})
    >>> step = jax.jit(partial(dpo_step, model=adapted, tx=tx, loss=partial(dpo_loss, beta=0.1)))
    >>> ref_logps = reference_logps_of(decoder, state.frozen, encoded)
    >>> state, metrics = step(state, shared_rows(encoded, length=96, ref_logps=ref_logps))
    >>> print(f"{metrics['loss']:.4f}", save_hf("merged", decoder, merge_adapter(state.variables, lora)))
    0.6931 merged
    """

    if not isinstance(model.config, DecoderConfig):
        raise ValueError(
            f"lora_model: expected a model of load_hf or make_model, got one with config {type(model.config).__name__}: "
            "dpo_jax/README.md shows LoRA on a model of your own"
        )
    if isinstance(lora.targets, str) or not {*lora.targets} <= {*KERNELS}:
        raise ValueError(
            f"lora.targets are {lora.targets!r}, but kernels are named {', '.join(KERNELS)}: give a tuple of them, as from "
            "lora_targets, which also takes names of modules such as q_proj"
        )

    def scaled(variables: Variables) -> Variables:
        if LORA not in variables:
            return variables
        _check_adapter(variables[LORA], lora)

        def of(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
            # Both are computed: where a scan reads parameters as they are beside computed ones, the transpose that adds to refs
            # (`step.mean_grads`) takes one for the other (jax 0.10.2).
            return leaf * (lora.scale if path[-1].key == "b" else 1.0)

        others = {name: tree for name, tree in variables.items() if name != LORA}
        return {**others, SCALED: jax.tree_util.tree_map_with_path(of, variables[LORA])}

    def init(key: jax.Array) -> Variables:
        return {**model.init(key), LORA: new_adapter(model.config, lora, jax.random.fold_in(key, 1))}

    decode, route, names = model.decode, model.route, model.axes
    return model._replace(
        init=init,
        forward=lambda variables, rows: model.forward(scaled(variables), rows),
        decode=None if decode is None else lambda variables, rows, cache: decode(scaled(variables), rows, cache),
        route=None if route is None else lambda variables, rows: route(scaled(variables), rows),
        axes=None if names is None else lambda: {**names(), LORA: _axes(lora)},
    )


def merge_adapter(variables: Variables, lora: Lora) -> Variables:
    """`variables` with the collection "lora", if any, merged into its kernels, which become float32 copies.

    >>> decoder, _ = load_hf(folder)
    >>> lora = Lora(4, 8.0, lora_targets("mlp", decoder.config))
    >>> merged = merge_adapter(lora_model(decoder, lora).init(jax.random.key(0)), lora)
    >>> sorted(merged)
    ['params']
    """
    if LORA not in variables:
        return variables
    _check_adapter(variables[LORA], lora)
    layers = {room: dict(parts) for room, parts in variables["params"]["layers"].items()}
    for target in lora.targets:
        room, name = target.split("/")
        pair, module = variables[LORA]["layers"][room][name], layers[room][name]
        change = jnp.einsum("lir,lro->loi" if target in WRITES else "lir,lro->lio", pair["a"], pair["b"], precision="highest")
        layers[room][name] = {**module, "kernel": module["kernel"].astype(jnp.float32) + lora.scale * change}
    others = {name: tree for name, tree in variables.items() if name != LORA}
    return {**others, "params": {**variables["params"], "layers": layers}}


def _check_adapter(adapter: Variables, lora: Lora) -> None:
    """Raises ValueError if an adapter is not one of `lora`: kernels would be left out, or scaled by another rank."""
    layers = adapter["layers"][0] if isinstance(adapter["layers"], tuple) else adapter["layers"]  # unstacked, for decoding
    kernels = {f"{room}/{name}": pair for room, pairs in layers.items() for name, pair in pairs.items()}
    if different := sorted({*kernels} ^ {*lora.targets}):
        where = [f"{kernel} only in {'the adapter' if kernel in kernels else 'lora.targets'}" for kernel in different]
        raise ValueError(f"the adapter in variables['lora'] is not one of this Lora: {', '.join(where)}")
    ranks = sorted({pair["a"].shape[-1] for pair in kernels.values()})
    if ranks != [lora.rank]:
        found = ", ".join(map(str, ranks))
        raise ValueError(f"the adapter in variables['lora'] has rank {found}, but lora.rank is {lora.rank}")


def adapter_shapes(config: DecoderConfig, lora: Lora) -> Variables:
    """The collection "lora" of a model of `config` as `ShapeDtypeStruct`s of float32. Nothing is computed."""
    lengths = axis_lengths(config)

    def of(target: str) -> dict[str, jax.ShapeDtypeStruct]:
        inputs, outputs = (lengths[axis] for axis in KERNELS[target])
        shapes = {"a": (config.layers, inputs, lora.rank), "b": (config.layers, lora.rank, outputs)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    return _tree({target: of(target) for target in lora.targets})


def new_adapter(config: DecoderConfig, lora: Lora, key: jax.Array) -> Variables:
    """A new collection "lora": A uniform in +-1/sqrt(in), as PEFT draws it (Kaiming uniform with a = sqrt(5)); B zero."""

    def of(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        number = lora.targets.index(f"{path[1].key}/{path[2].key}")
        bound = 1 / math.sqrt(leaf.shape[1])
        return jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, -bound, bound)

    return jax.tree_util.tree_map_with_path(of, adapter_shapes(config, lora))


def _axes(lora: Lora) -> Variables:
    """Logical axes of the adapter: those of the kernel, and none for the rank."""

    def of(target: str) -> dict[str, PartitionSpec]:
        inputs, outputs = KERNELS[target]
        return {"a": PartitionSpec("layers", inputs, None), "b": PartitionSpec("layers", None, outputs)}

    return _tree({target: of(target) for target in lora.targets})


def _tree(by_target: Mapping[str, Any]) -> Variables:
    tree: dict[str, dict[str, Any]] = {}
    for target, leaf in by_target.items():
        room, name = target.split("/")
        tree.setdefault(room, {})[name] = leaf
    return {"layers": tree}
