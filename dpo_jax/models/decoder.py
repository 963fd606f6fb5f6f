"""One decoder for every supported family: GPT-2 to Gemma 3 differ only in the static fields of `DecoderConfig`.

`make_model` is the way in; everything else in this package meets the decoder as a `types.Model` of pure functions. This is the
only file that imports Flax modules. Layers are stacked on a leading axis and scanned, so the compile time does not depend on
the depth.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.activations import ACTIVATIONS
from dpo_jax.models.attention import DENSE, AttentionPath, attend, rotate
from dpo_jax.models.attention_paths import CHUNKED
from dpo_jax.models.axes import as_stored, by_row
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.products import float32_product, precision_of
from dpo_jax.types import ROW_AXES, Array, Model, Rows, Variables

NO_WINDOW = 1 << 30  # of a layer with full attention in a model that has windows elsewhere


# What the backward pass keeps of a layer; the rest it computes again. Keeping all matrix products takes less than half of the
# memory of keeping everything, and no more time, on CPU too.
# "kernel" is what a fused attention kernel names for its own backward pass: to compute it again would be to run it again.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names("kernel")
    ),
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention", "kernel"),
    "full": None,
}


class LayerInput(NamedTuple):
    """What differs from layer to layer: int32[layers] each, or None where the layers agree."""

    index: jax.Array
    window: jax.Array | None
    window_number: jax.Array | None  # which of the distinct windows that is
    rope: jax.Array | None


class Shared(NamedTuple):
    """What every layer reads: the key intervals, and the rotary angles of each distinct `Rope`, stacked.

    `prepared` is what the attention path has made of the intervals: the list of blocks of the kernel is the same in all layers.
    """

    k_start: Array
    k_end: Array
    q_positions: Array
    k_positions: Array
    angles: tuple[jax.Array, jax.Array] | None  # float32[ropes, R, L, size / 2] each
    write_at: jax.Array | None  # cache column of the first new token
    prepared: Any = None


Axes = tuple[str | None, ...]
VOCABULARY: Axes = ("vocab", "embed")  # of the token embedding and of the head


def _declare(module: nn.Module, name: str, first: Any, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """A parameter with its logical axes beside it; `Model.axes` collects them. Its user calls `as_stored`."""
    return module.param(name, nn.with_partitioning(first, axes), shape)  # pyright: ignore[reportReturnType]


def _param(module: nn.Module, name: str, first: Any, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """A parameter that is declared where it is used."""
    value = _declare(module, name, first, shape, axes)
    return value if module.is_initializing() else as_stored(value, axes)


def _last(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


class Norm(nn.Module):
    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = _param(self, "scale", first, (x.shape[-1],), (None,))
        # Statistics in float32: squares of bfloat16 activations lose the small ones.
        # Rows behind each other: over three axes XLA sums the gradient of the scale many times slower on a CPU. Heads stay
        # apart, as they may be on different devices.
        y = x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        weight = scale.astype(jnp.float32)
        y = y * _last(1.0 + weight if self.kind == "rms_plus_one" else weight, y)
        if self.kind == "layer":
            bias = _param(self, "bias", nn.initializers.zeros, (x.shape[-1],), (None,))
            y = y + _last(bias.astype(jnp.float32), y)
        return y.reshape(x.shape).astype(x.dtype)


class Linear(nn.Module):
    """A kernel with D first, whether it reads from the residual stream or, with `axes` that end in "embed", writes to it.

    So those of an MLP are never taller than wide: a CPU computes the gradient of a tall one a third slower, or turns it over.
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
        # Flat, because the gradient of the kernel is then one plain product: XLA turns round what has more axes first.
        y = jnp.dot(x.reshape(-1, width), kernel.T if writes else kernel, precision=precision_of(x.dtype))
        y = y.reshape(*x.shape[:-1], self.features)
        if self.bias:
            bias = _param(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])
            y = y + _last(bias.astype(x.dtype), y)
        return y + self._low_rank(x) if self.has_variable("lora", "a") else y

    def _low_rank(self, x: jax.Array) -> jax.Array:
        """The adapter of `models.lora` beside the kernel: `x A B`, of which B comes scaled."""
        a = as_stored(self.get_variable("lora", "a"), (self.axes[0], None)).astype(x.dtype)
        b = as_stored(self.get_variable("lora", "b"), (None, self.axes[1])).astype(x.dtype)
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
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_size) for y in (query, key, value))
        if c.qk_norm:
            q, k = Norm(c.norm, c.norm_eps, name="query_norm")(q), Norm(c.norm, c.norm_eps, name="key_norm")(k)
        if shared.angles is not None:
            cos, sin = (table[0 if layer.rope is None else layer.rope] for table in shared.angles)
            q, k = (rotate(y, cos, sin, interleaved=c.ropes[0].interleaved) for y in (q, k))
        if cache is not None:
            cache, k, v = _update_cache(cache, k, v, layer.index, shared.write_at)
        q, k, v = (checkpoint_name(y, "attention") for y in (q, k, v))
        # A kernel is for rows that attend to themselves. With a cache queries are few, and their scores small.
        path = CHUNKED if self.attention_path.prepare is not None and shared.prepared is None else self.attention_path
        mixed = attend(
            q,
            k,
            v,
            k_start=shared.k_start,
            k_end=shared.k_end,
            scale=c.attention_scale,
            q_positions=shared.q_positions,
            k_positions=shared.k_positions,
            window=c.windows[0] if c.windows and layer.window is None else layer.window,
            softcap=c.attention_softcap,
            path=path,
            prepared=shared.prepared,
            number=layer.window_number,
        )
        if path.prepare is None:
            mixed = checkpoint_name(mixed, "attention")  # a kernel names its own output, and both would be kept
        out = Linear(c.width, ("heads", "embed"), c.out_bias, _residual_std(c), name="out")
        return out(mixed.reshape(*x.shape[:2], -1)), cache


def _update_cache(cache: Any, k: jax.Array, v: jax.Array, layer: jax.Array, write_at: Any) -> tuple[Any, jax.Array, jax.Array]:
    """Write one layer's new keys and values; return the cache and that layer's full keys and values, typed as `k`.

    `cache` is that of all layers, or of this one alone. Heads come before columns, as the products with queries and weights
    have them: otherwise each token would turn round the whole cache.
    """
    alone = cache[0].ndim == 4
    at = (0, 0, write_at, 0) if alone else (layer, 0, 0, write_at, 0)

    def write(store: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2).astype(store.dtype)
        return jax.lax.dynamic_update_slice(store, new if alone else new[None], at)

    cache = (write(cache[0], k), write(cache[1], v))
    of_layer = cache if alone else (jax.lax.dynamic_index_in_dim(store, layer, keepdims=False) for store in cache)
    keys, values = (store.swapaxes(1, 2).astype(k.dtype) for store in of_layer)
    return cache, keys, values


def _residual_std(c: DecoderConfig) -> float:
    # GPT-2's rule: the variance of the residual stream shall not grow with depth.
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
    """One layer. The carry is the residual stream `x[R, L, D]` and the key/value cache (None without one)."""

    config: DecoderConfig
    attention_path: AttentionPath

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, Any], layer: LayerInput, shared: Shared) -> tuple[tuple[jax.Array, Any], None]:
        c = self.config
        x, cache = carry

        def norm(name: str) -> Norm:
            return Norm(c.norm, c.norm_eps, name=name)

        normed = norm("attention_norm")(x)
        mixed, cache = Attention(c, self.attention_path, name="attention")(normed, cache, layer, shared)
        if c.post_norms:
            mixed = norm("post_attention_norm")(mixed)
        if c.parallel_residual:
            mlp_input = normed if c.shared_norm else norm("mlp_norm")(x)
            x = x + mixed + Mlp(c, name="mlp")(mlp_input)
        else:
            x = x + mixed
            update = Mlp(c, name="mlp")(norm("mlp_norm")(x))
            x = x + (norm("post_mlp_norm")(update) if c.post_norms else update)
        return (by_row(x), cache), None


class Decoder(nn.Module):
    config: DecoderConfig
    dtype: Any
    remat: str
    attention_path: AttentionPath

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        # Only declared: trunk and head each touch what they use, or the head's gradient would carry zeros for the embedding.
        self.token_embedding = _declare(self, "token_embedding", normal, (c.vocab_size, c.width), VOCABULARY)
        if not c.ropes:
            self.position_embedding = _declare(self, "position_embedding", normal, (c.max_positions, c.width), (None, "embed"))
        self.layers = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat]),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.attention_path)
        self.final_norm = Norm(c.norm, c.norm_eps)
        if not c.tied:
            self.head_kernel = _declare(self, "head_kernel", normal, (c.vocab_size, c.width), VOCABULARY)
        if c.head_bias:
            self.head_bias = _declare(self, "head_bias", nn.initializers.zeros, (c.vocab_size,), ("vocab",))

    def __call__(self, rows: Rows, cache: Any = None, layers: tuple[Variables, ...] | None = None) -> tuple[jax.Array, Any]:
        """`layers`: the variables of each layer, if they are apart (`make_model`); then so is the cache. Without a cache they
        are stacks of layers, one after the other."""
        c = self.config
        # An id or position outside its table reads NaN (jnp.take's rule), so that it is noticed; clamping would hide it.
        # Looked up in a table that is whole along D, its gradient is a sum of parts, as that of a matrix is.
        table = as_stored(as_stored(self.token_embedding, VOCABULARY), VOCABULARY, gathered=ROW_AXES)
        x = jnp.take(table, jnp.asarray(rows.tokens), axis=0).astype(self.dtype)
        x = x if c.embedding_scale == 1.0 else x * c.embedding_scale
        if not c.ropes:
            table = as_stored(self.position_embedding, (None, "embed"))
            x = x + jnp.take(table, jnp.asarray(rows.positions), axis=0).astype(self.dtype)
        x = by_row(x)
        layer, angles = _per_layer(c, rows.positions)
        k_positions, write_at, store, prepared = rows.positions, None, None, None
        if cache is not None:
            write_at, store = cache["length"], (cache["key"], cache["value"])
            k_positions = jax.lax.dynamic_update_slice(cache["positions"], jnp.asarray(rows.positions), (0, write_at))
        elif self.attention_path.prepare is not None and not self.is_initializing():
            prepared = self.attention_path.prepare(rows.k_start, rows.k_end, _windows(c))
        shared = Shared(rows.k_start, rows.k_end, rows.positions, k_positions, angles, write_at, prepared)
        if layers is None:
            (x, store), _ = self.layers((x, store), layer, shared)
        elif cache is None:
            x = self._in_stacks(layers, x, layer, shared)
        else:
            x, store = self._one_by_one(layers, x, store, layer, shared)
        if cache is not None and store is not None:
            new = jnp.int32(rows.tokens.shape[1])
            cache = {"key": store[0], "value": store[1], "positions": k_positions, "length": write_at + new}
        return self.final_norm(x), cache

    def _one_by_one(
        self, layers: tuple[Variables, ...], x: jax.Array, store: Any, inputs: LayerInput, shared: Shared
    ) -> tuple[jax.Array, Any]:
        """What the scan does, each layer by itself."""
        block, stores = Block(self.config, self.attention_path, parent=None), []
        for number, (variables, *of_layer) in enumerate(zip(layers, *store, strict=True)):
            layer = jax.tree.map(lambda array, number=number: array[number], inputs)
            (x, of_layer), _ = block.apply(variables, (x, tuple(of_layer)), layer, shared)
            stores.append(of_layer)
        return x, tuple(zip(*stores, strict=True))

    def _in_stacks(self, stacks: tuple[Variables, ...], x: jax.Array, inputs: LayerInput, shared: Shared) -> jax.Array:
        """What the scan does, in several scans: no gradient goes into a stack before the first that is trained."""
        block, first = Block(self.config, self.attention_path, parent=None), 0

        def one(x: jax.Array, layer: tuple[Variables, LayerInput]) -> tuple[jax.Array, None]:
            (x, _), _ = block.apply(layer[0], (x, None), layer[1], shared)
            return x, None

        one = jax.checkpoint(one, prevent_cse=False, policy=REMAT[self.remat])
        for stack in stacks:
            end = first + len(jax.tree.leaves(stack)[0])
            here = jax.tree.map(lambda array, first=first, end=end: array[first:end], inputs)
            x, _ = jax.lax.scan(one, x, (stack, here))
            first = end
        return x

    def unembed(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        table = as_stored(self.token_embedding if c.tied else self.head_kernel, VOCABULARY).astype(self.dtype)
        logits = float32_product("...d,vd->...v", hidden.astype(self.dtype), table)
        if c.head_bias:
            logits = logits + _last(as_stored(self.head_bias, ("vocab",)).astype(jnp.float32), logits)
        return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

    def everything(self, rows: Rows) -> jax.Array:
        return self.unembed(self(rows)[0])


def _per_layer(c: DecoderConfig, positions: Array) -> tuple[LayerInput, tuple[jax.Array, jax.Array] | None]:
    """Arrays to scan over, and the rotary angles, computed once per distinct `Rope` and not once per layer."""
    window = number = rope = angles = None
    if len(_windows(c)) > 1:
        window = jnp.array([NO_WINDOW if w is None else w for w in c.windows], jnp.int32)
        number = jnp.array([_windows(c).index(w) for w in c.windows], jnp.int32)
    distinct = list(dict.fromkeys(c.ropes))
    if distinct:
        cos, sin = zip(*(r.angles(positions) for r in distinct), strict=True)
        angles = (jnp.stack(cos), jnp.stack(sin))
    if len(distinct) > 1:
        rope = jnp.array([distinct.index(r) for r in c.ropes], jnp.int32)
    return LayerInput(jnp.arange(c.layers, dtype=jnp.int32), window, number, rope), angles


def _windows(c: DecoderConfig) -> list[int | None]:
    """The distinct windows of the layers."""
    return list(dict.fromkeys(c.windows)) or [None]


def make_model(
    config: DecoderConfig, *, dtype: Any = jnp.float32, remat: str = "none", attention: AttentionPath = DENSE
) -> Model:
    """The decoder as pure functions (`types.Model`).

    `dtype` is the type of activations and matrix products; `init` makes float32 parameters whatever it is, norms, softmax and
    logits are always float32. `remat="none"`: the backward pass repeats no matrix product; `"save_attention"`: it
    repeats all but the projections to queries, keys and values and the mixing of values; `"full"`: it repeats each layer's
    forward pass and keeps only the layers' inputs. `attention`: see `attention_paths.attention_path`.

    `axes()` gives a tree like the variables of `jax.sharding.PartitionSpec`s over the logical axes "layers", "vocab", "embed"
    (D), "heads" (N x H), "kv_heads" (K x H) and "mlp".

    Cache (`init_cache(batch, length, dtype)`): `length` columns per row. A `decode` beyond the last column cannot be seen under
    jit: it is the caller's duty to make the cache long enough.

    A small model for a trial, without a download:

    >>> sizes = {"vocab_size": len(tokenizer), "width": 32, "layers": 2, "heads": 4, "max_positions": 128}
    >>> decoder = make_model(decoder_config(hf_config("llama", **sizes, eos_token_id=tokenizer.eos_token_id)))
    >>> weights = jax.jit(decoder.init)(jax.random.key(0))
    >>> reference_logps_of(decoder, weights, encoded, layout="packed").shape
    (2, 2)
    """
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {', '.join(REMAT)}, not {remat!r}")
    module = Decoder(config, dtype, remat, attention)

    def boxed_init(key: jax.Array) -> Variables:
        one = jnp.zeros((1, 1), jnp.int32)
        rows = Rows(one, one, one, one + 1, one, one, one, jnp.ones(1), one[0])
        return module.init(key, rows, method="everything")

    def init_cache(batch: int, length: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        shape = (config.layers, batch, config.kv_heads, length, config.head_size)
        return {
            "key": jnp.zeros(shape, dtype),
            "value": jnp.zeros(shape, dtype),
            "positions": jnp.zeros((batch, length), jnp.int32),
            "length": jnp.int32(0),
        }

    def apart(variables: Variables) -> tuple[Variables, ...]:
        """The variables of each layer, or of each stack of layers, where they are apart."""
        of_layers = {name: tree["layers"] for name, tree in variables.items() if "layers" in tree}
        return tuple(dict(zip(of_layers, one, strict=True)) for one in zip(*of_layers.values(), strict=True))

    def decode(variables: Variables, rows: Rows, cache: Any) -> tuple[jax.Array, Any]:
        if rows.tokens.shape[1] > cache["positions"].shape[1]:
            raise ValueError(f"{rows.tokens.shape[1]} tokens do not fit a cache of {cache['positions'].shape[1]} columns")
        layers = apart(variables) if isinstance(cache["key"], tuple) else None
        return module.apply(variables, rows, cache, layers)  # pyright: ignore[reportReturnType]

    def by_layer(variables: Variables, cache: Any) -> tuple[Variables, Any]:
        def cut(tree: Any) -> tuple[Any, ...]:
            return tuple(jax.tree.map(lambda leaf, n=number: leaf[n], tree) for number in range(config.layers))

        of_layers = {name: {**tree, "layers": cut(tree["layers"])} for name, tree in variables.items() if "layers" in tree}
        return {**variables, **of_layers}, {**cache, "key": cut(cache["key"]), "value": cut(cache["value"])}

    def forward(variables: Variables, rows: Rows) -> jax.Array:
        layers = apart(variables) if isinstance(variables["params"]["layers"], tuple) else None
        return module.apply(variables, rows, None, layers)[0]  # pyright: ignore[reportReturnType, reportIndexIssue]

    return Model(
        init=lambda key: nn.meta.unbox(boxed_init(key)),
        forward=forward,
        unembed=lambda variables, hidden: module.apply(variables, hidden, method="unembed"),  # pyright: ignore[reportArgumentType]
        init_cache=init_cache,
        decode=decode,
        by_layer=by_layer,
        axes=lambda: nn.get_partition_spec(jax.eval_shape(lambda: boxed_init(jax.random.key(0)))),
        config=config,
    )
