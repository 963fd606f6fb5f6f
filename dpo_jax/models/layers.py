"""The parts of one decoder layer as Flax modules: norm, linear map, attention, MLP, and the block that holds them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.activations import ACTIVATIONS
from dpo_jax.models.attention import AttentionPath, Scoring, VisibleKeys, attend, rotate
from dpo_jax.models.attention_lanes import LaneKeys, attend_lanes
from dpo_jax.models.attention_paths import CHUNKED
from dpo_jax.models.axes import as_stored, by_row
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.experts import Experts, Routed
from dpo_jax.models.products import precision_of
from dpo_jax.types import Array

SCALED = "scaled_lora"
"""The collection of an adapter whose B is scaled, as `models.lora.lora_model` gives it to a decoder."""


class LayerInput(NamedTuple):
    """Settings that differ from layer to layer: int32[layers] each, or None if all layers agree."""

    index: jax.Array
    window: jax.Array | None
    window_number: jax.Array | None  # index among the distinct windows
    rope: jax.Array | None


class Shared(NamedTuple):
    """Inputs shared by all layers: the key intervals, and the rotary angles of each distinct `Rope`, stacked.

    `prepared` is the attention path's result of `prepare`: the kernel's block lists are the same in all layers.
    """

    k_start: Array
    k_end: Array
    q_positions: Array
    k_positions: Array
    angles: tuple[jax.Array, jax.Array] | None  # float32[ropes, R, L, size / 2] each
    write_at: jax.Array | None  # cache column of the first new token
    prepared: Any = None
    lanes: LaneKeys | None = None  # for one token per row with a `SharedCache`
    counted: jax.Array | None = None  # bool[R, L], not padding; given if router decisions are requested

    def of_layer(self, number: int) -> Shared:
        """The same with the prompts' keys and values of one layer only, if layers are unstacked."""
        if self.lanes is None:
            return self
        keys, values = self.lanes.prompts
        return self._replace(lanes=self.lanes._replace(prompts=(keys[number], values[number])))


Axes = tuple[str | None, ...]
VOCABULARY: Axes = ("vocab", "embed")  # of the token embedding and of the head


def declare(module: nn.Module, name: str, first: Any, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """A parameter with its logical axes; `Model.axes` collects them. Its user calls `as_stored`."""
    if not module.has_variable("params", name):
        return module.param(name, nn.with_partitioning(first, axes), shape)  # pyright: ignore[reportReturnType]
    # `param` would trace `first` again for the shape of each parameter: a fifth of the time to trace a model.
    value = nn.meta.unbox(module.get_variable("params", name))
    if value.shape != shape:
        raise flax.errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


def _param(module: nn.Module, name: str, first: Any, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """A parameter declared where it is used."""
    value = declare(module, name, first, shape, axes)
    return value if module.is_initializing() else as_stored(value, axes)


def last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


class Norm(nn.Module):
    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = _param(self, "scale", first, (x.shape[-1],), (None,))
        # Statistics in float32: a sum of squares in bfloat16 loses the small ones.
        # Rows flattened: over three axes XLA sums the gradient of the scale many times slower on a CPU. Heads stay
        # apart, as they may be on different devices.
        y = x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        weight = scale.astype(jnp.float32)
        y = y * last_axis(1.0 + weight if self.kind == "rms_plus_one" else weight, y)
        if self.kind == "layer":
            bias = _param(self, "bias", nn.initializers.zeros, (x.shape[-1],), (None,))
            y = y + last_axis(bias.astype(jnp.float32), y)
        return y.reshape(x.shape).astype(x.dtype)


class Linear(nn.Module):
    """A linear map whose kernel has D first, whether it reads the residual stream or (`axes` ending in "embed") writes to it.

    MLP kernels are then never taller than wide: a CPU computes the gradient of a tall one a third slower, or transposes it.
    """

    features: int
    axes: tuple[str | None, str | None]  # of input and output
    bias: bool
    std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, writes = x.shape[-1], self.axes[1] == "embed"
        shape, axes = ((self.features, width), self.axes[::-1]) if writes else ((width, self.features), self.axes)
        kernel = _param(self, "kernel", nn.initializers.normal(self.std), shape, axes).astype(x.dtype)
        # Flat, so that the kernel's gradient is one plain product: XLA transposes operands with more axes first.
        y = jnp.dot(x.reshape(-1, width), kernel.T if writes else kernel, precision=precision_of(x.dtype))
        y = y.reshape(*x.shape[:-1], self.features)
        if self.bias:
            bias = _param(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])
            y = y + last_axis(bias.astype(x.dtype), y)
        return y + self._low_rank(x) if self.has_variable(SCALED, "a") else y

    def _low_rank(self, x: jax.Array) -> jax.Array:
        """The adapter of `models.lora` beside the kernel: `x A B`; B is already scaled."""
        a = as_stored(self.get_variable(SCALED, "a"), (self.axes[0], None)).astype(x.dtype)
        b = as_stored(self.get_variable(SCALED, "b"), (None, self.axes[1])).astype(x.dtype)
        precision = precision_of(x.dtype)
        y = jnp.dot(jnp.dot(x.reshape(-1, x.shape[-1]), a, precision=precision), b, precision=precision)
        return y.reshape(*x.shape[:-1], self.features)


class Attention(nn.Module):
    config: DecoderConfig
    attention_path: AttentionPath

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, layer: LayerInput, shared: Shared) -> tuple[jax.Array, Any]:
        c = self.config
        query = Linear(c.heads * c.head_size, ("embed", "heads"), c.qkv_bias, c.init_std, name="query")(x)
        key = Linear(c.kv_heads * c.head_size, ("embed", "kv_heads"), c.qkv_bias, c.init_std, name="key")(x)
        value = Linear(c.kv_heads * c.head_size, ("embed", "kv_heads"), c.qkv_bias, c.init_std, name="value")(x)
        if c.qk_norm and c.qk_norm_whole:
            query, key = Norm(c.norm, c.norm_eps, name="query_norm")(query), Norm(c.norm, c.norm_eps, name="key_norm")(key)
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_size) for y in (query, key, value))
        if c.qk_norm and not c.qk_norm_whole:
            q, k = Norm(c.norm, c.norm_eps, name="query_norm")(q), Norm(c.norm, c.norm_eps, name="key_norm")(k)
        if shared.angles is not None:
            cos, sin = (table[0 if layer.rope is None else layer.rope] for table in shared.angles)
            q, k = (rotate(y, cos, sin, interleaved=c.ropes[0].interleaved) for y in (q, k))
        out = Linear(c.width, ("heads", "embed"), c.out_bias, _residual_std(c), name="out")
        if cache is not None:
            cache, k, v = _update_cache(cache, k, v, layer.index, shared.write_at)
        if shared.lanes is not None:
            return out(self._of_lanes(q, k, v, layer, shared.lanes).reshape(*x.shape[:2], -1)), cache
        q, k, v = (checkpoint_name(y, "attention") for y in (q, k, v))
        # Kernels are for rows that attend to themselves. With a cache there are few queries, and few scores.
        path = CHUNKED if self.attention_path.prepare is not None and shared.prepared is None else self.attention_path
        window = c.windows[0] if c.windows and layer.window is None else layer.window
        keys = VisibleKeys(shared.k_start, shared.k_end, shared.q_positions, shared.k_positions, window)
        scoring = Scoring(c.attention_scale, c.attention_softcap)
        mixed = attend(q, k, v, keys, scoring, path=path, prepared=shared.prepared, number=layer.window_number)
        if path.prepare is None:
            mixed = checkpoint_name(mixed, "attention")  # a kernel names its own output already, and both would be kept
        return out(mixed.reshape(*x.shape[:2], -1)), cache

    def _of_lanes(self, q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerInput, lanes: LaneKeys) -> jax.Array:
        """Attention of new tokens [R, 1, N, H] to their prompts and to their own keys and values `k`, `v` [R, C, K, H]."""
        c, visible = self.config, lanes.visible
        window = c.windows[0] if c.windows and layer.window is None else layer.window
        if window is not None:
            visible &= lanes.distance < window
        of_prompts = (store if store.ndim == 4 else _one_layer(store, layer.index) for store in lanes.prompts)
        pairs = zip(of_prompts, (k, v), strict=True)
        keys, values = ((prompts.astype(q.dtype), own.swapaxes(1, 2)) for prompts, own in pairs)
        return attend_lanes(q, keys, values, visible=visible, scoring=Scoring(c.attention_scale, c.attention_softcap))


def _update_cache(cache: Any, k: jax.Array, v: jax.Array, layer: jax.Array, write_at: Any) -> tuple[Any, jax.Array, jax.Array]:
    """Write one layer's new keys and values; return the cache and that layer's full keys and values, typed as `k`.

    `cache` holds all layers, or only this one. Heads come before columns, the order in which the products with queries and
    weights read them; otherwise the whole cache would be transposed for each token.
    """
    alone = cache[0].ndim == 4
    at = (0, 0, write_at, 0) if alone else (layer, 0, 0, write_at, 0)

    def write(store: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2).astype(store.dtype)
        # A token past the position table gives NaN. In the cache it would reach the next completion of its lane: a weight of 0
        # times NaN is NaN.
        new = jnp.where(jnp.isnan(new), 0, new)
        return jax.lax.dynamic_update_slice(store, new if alone else new[None], at)

    cache = (write(cache[0], k), write(cache[1], v))
    of_layer = cache if alone else (_one_layer(store, layer) for store in cache)
    keys, values = (store.swapaxes(1, 2).astype(k.dtype) for store in of_layer)
    return cache, keys, values


def _one_layer(store: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(store, layer, keepdims=False)


def _residual_std(c: DecoderConfig) -> float:
    # GPT-2's rule: keeps the variance of the residual stream from growing with depth.
    return c.init_std / math.sqrt(2 * c.layers)


class Mlp(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        act = ACTIVATIONS[c.activation]
        up = Linear(c.mlp_width, ("embed", "mlp"), c.mlp_bias, c.init_std, name="up")(x)
        if c.gated_mlp:
            hidden = act(Linear(c.mlp_width, ("embed", "mlp"), c.mlp_bias, c.init_std, name="gate")(x)) * up
        else:
            hidden = act(up)
        return Linear(c.width, ("mlp", "embed"), c.mlp_bias, _residual_std(c), name="down")(hidden)


class Block(nn.Module):
    """One decoder layer. The scan carry is the residual stream `x[R, L, D]` and the key/value cache (None without one).

    It also returns the router's decisions, if `shared.counted` is given.
    """

    config: DecoderConfig
    attention_path: AttentionPath

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Any], layer: LayerInput, shared: Shared
    ) -> tuple[tuple[jax.Array, Any], Routed | None]:
        c = self.config
        x, cache = carry

        def norm(name: str) -> Norm:
            return Norm(c.norm, c.norm_eps, name=name)

        def mlp(x: jax.Array) -> tuple[jax.Array, Routed | None]:
            return Experts(c, name="mlp")(x, shared.counted) if c.experts else (Mlp(c, name="mlp")(x), None)

        normed = norm("attention_norm")(x) if c.pre_norms else x
        mixed, cache = Attention(c, self.attention_path, name="attention")(normed, cache, layer, shared)
        if c.post_norms:
            mixed = norm("post_attention_norm")(mixed)
        if c.parallel_residual:
            update, routed = mlp(normed if c.shared_norm else norm("mlp_norm")(x))
            x = x + mixed + update
        else:
            x = x + mixed
            update, routed = mlp(norm("mlp_norm")(x) if c.pre_norms else x)
            x = x + (norm("post_mlp_norm")(update) if c.post_norms else update)
        return (by_row(x), cache), routed
