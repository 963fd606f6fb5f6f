"""One decoder for every supported family: GPT-2 to Gemma 3 differ only in the static fields of `DecoderConfig`.

`make_model` is the entry point; the rest of the package sees the decoder as a `types.Model` of pure functions. Only this file
and `models.layers` import Flax. Layers are stacked on a leading axis and scanned, so compile time does not depend on depth.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.attention import DENSE, AttentionPath
from dpo_jax.models.attention_lanes import lane_keys
from dpo_jax.models.attention_ring import along_context
from dpo_jax.models.axes import as_stored, by_row
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.context import context_parts, from_pieces, row_pieces, to_pieces
from dpo_jax.models.expert_mixture import Kernels
from dpo_jax.models.experts import Routed
from dpo_jax.models.layers import SCALED, VOCABULARY, Block, LayerInput, Norm, Shared, declare, last_axis
from dpo_jax.models.products import float32_product, precision_of, take_rows
from dpo_jax.routing import counted_tokens
from dpo_jax.sampling.lanes import rows_of
from dpo_jax.types import ROW_AXES, Array, Model, Routing, RowImages, Rows, SharedCache, Variables

NO_WINDOW = 1 << 30  # for a full-attention layer in a model with windows elsewhere


# What the backward pass keeps of a layer; the rest it computes again. Keeping all matrix products takes less than half of the
# memory of keeping everything, and no more time, on CPU too.
# "kernel" tags what a fused attention kernel saves for its backward pass. Without it, remat would run the kernel again.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names("kernel")
    ),
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention", "kernel"),
    "full": None,
}


class Decoder(nn.Module):
    config: DecoderConfig
    dtype: Any
    remat: str
    attention_path: AttentionPath

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        # Only declared here: trunk and head each use their part, or the head's gradient would carry zeros for the embedding.
        self.token_embedding = declare(self, "token_embedding", normal, (c.vocab_size, c.width), VOCABULARY)
        if c.image_width:
            self.image_norm = Norm("rms_plus_one", c.image_norm_eps)
            self.image_kernel = declare(self, "image_kernel", normal, (c.image_width, c.width), (None, "embed"))
        if not c.ropes:
            self.position_embedding = declare(self, "position_embedding", normal, (c.max_positions, c.width), (None, "embed"))
        self.layers = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat]),
            variable_axes={"params": 0, SCALED: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            # It traces the layer a second time. In `init` that moves the random keys: a seed keeps its weights.
            check_constancy_invariants=self.is_initializing(),
        )(c, self._path())
        self.final_norm = Norm(c.norm, c.norm_eps)
        if not c.tied:
            self.head_kernel = declare(self, "head_kernel", normal, (c.vocab_size, c.width), VOCABULARY)
        if c.head_bias:
            self.head_bias = declare(self, "head_bias", nn.initializers.zeros, (c.vocab_size,), ("vocab",))

    def __call__(
        self, rows: Rows, cache: Any = None, layers: tuple[Variables, ...] | None = None, counted: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """`layers`: the variables of each layer, if unstacked (`make_model`); then so is the cache. Without a cache they
        are stacks of layers, one after the other. With `counted`, which excludes a cache, the routers' decisions are
        returned in place of the cache: a `Routed` with a leading layer axis."""
        c, path, length, prepared = self.config, self._path(), rows.tokens.shape[1], None
        in_pieces = context_parts() > 1 and not self.is_initializing()
        if in_pieces and cache is not None:
            raise ValueError("mesh.context splits rows, but a key/value cache cannot be split: sample with mesh.context 1")
        if in_pieces and rows.images is not None:
            raise ValueError("mesh.context splits rows, which is not supported for rows with images: use mesh.context 1")
        if path.prepare is not None and cache is None and not self.is_initializing():
            prepared = path.prepare(rows.k_start, rows.k_end, _windows(c))
        rows = row_pieces(rows) if in_pieces else rows
        # An id or position outside its table reads NaN (jnp.take's rule), so that it is noticed; clamping would hide the error.
        # If the table is not sharded along D for the lookup, its gradient is a sum of parts, like that of a matrix.
        table = as_stored(as_stored(self.token_embedding, VOCABULARY), VOCABULARY, gathered=ROW_AXES)
        x = take_rows(table, jnp.asarray(rows.tokens)).astype(self.dtype)
        x = x if c.embedding_scale == 1.0 else x * c.embedding_scale
        if not c.ropes:
            table = as_stored(self.position_embedding, (None, "embed"))
            x = x + take_rows(table, jnp.asarray(rows.positions)).astype(self.dtype)
        x = by_row(self._with_images(x, rows))
        layer, angles = _per_layer(c, rows.positions)
        k_positions, write_at, store, lanes, own = rows.positions, None, None, None, cache
        if isinstance(cache, SharedCache):
            (lanes, write_at), own = lane_keys(rows, cache), cache.own
            store, k_positions = (own["key"], own["value"]), own["positions"]  # their distances are in `lanes`
        elif cache is not None:
            write_at, store = cache["length"], (cache["key"], cache["value"])
            k_positions = jax.lax.dynamic_update_slice(cache["positions"], jnp.asarray(rows.positions), (0, write_at))
        shared = Shared(rows.k_start, rows.k_end, rows.positions, k_positions, angles, write_at, prepared, lanes, counted)
        routed: Routed | None = None
        if layers is None:
            (x, store), routed = self.layers((x, store), layer, shared)
        elif cache is None:
            x, routed = self._in_stacks(layers, x, layer, shared)
        else:
            x, store = self._one_by_one(layers, x, store, layer, shared)
        if own is not None and store is not None:
            new = own["length"] + jnp.int32(rows.tokens.shape[1])
            own = {"key": store[0], "value": store[1], "positions": k_positions, "length": new}
        x = self.final_norm(x)
        x = from_pieces(x, length) if in_pieces else x
        if counted is not None:
            return x, routed
        return x, cache._replace(own=own) if isinstance(cache, SharedCache) else own

    def _path(self) -> AttentionPath:
        """The attention path for the device on which the program being traced runs."""
        return self.attention_path if self.is_initializing() else along_context(self.attention_path)

    def _with_images(self, x: jax.Array, rows: Rows) -> jax.Array:
        """Token embeddings, in which features, normed and projected to the model's width, replace those of image tokens."""
        images = rows.images
        if images is None:
            if not (self.config.image_width and self.is_initializing()):
                return x
            nothing = jnp.zeros((x.shape[0], 1, self.config.image_width), jnp.float32)
            images = RowImages(nothing, jnp.full(x.shape[:2], -1, jnp.int32))
        if images.features.shape[-1] != self.config.image_width:
            reads = f"features of width {self.config.image_width}" if self.config.image_width else "no images"
            raise ValueError(f"the rows have image features of width {images.features.shape[-1]}, but the model reads {reads}")
        kernel = as_stored(self.image_kernel, (None, "embed")).astype(self.dtype)
        soft = self.image_norm(jnp.asarray(images.features).astype(self.dtype))
        soft = jnp.einsum("rmw,wd->rmd", soft, kernel, precision=precision_of(self.dtype))
        index = jnp.asarray(images.index)[:, :, None]
        return jnp.where(index >= 0, jnp.take_along_axis(soft, jnp.maximum(index, 0), axis=1), x)

    def _one_by_one(
        self, layers: tuple[Variables, ...], x: jax.Array, store: Any, inputs: LayerInput, shared: Shared
    ) -> tuple[jax.Array, Any]:
        """The same as the scan, one layer at a time."""
        block, stores = Block(self.config, self.attention_path, parent=None), []
        for number, (variables, *of_layer) in enumerate(zip(layers, *store, strict=True)):
            layer = jax.tree.map(lambda array, number=number: array[number], inputs)
            (x, of_layer), _ = block.apply(variables, (x, tuple(of_layer)), layer, shared.of_layer(number))
            stores.append(of_layer)
        return x, tuple(zip(*stores, strict=True))

    def _in_stacks(
        self, stacks: tuple[Variables, ...], x: jax.Array, inputs: LayerInput, shared: Shared
    ) -> tuple[jax.Array, Routed | None]:
        """The same as the scan, in several scans: no gradient flows into stacks before the first trained one."""
        block, first, found = Block(self.config, self._path(), parent=None), 0, []

        def one(x: jax.Array, layer: tuple[Variables, LayerInput]) -> tuple[jax.Array, Routed | None]:
            (x, _), routed = block.apply(layer[0], (x, None), layer[1], shared)  # pyright: ignore[reportAssignmentType]
            return x, routed  # pyright: ignore[reportReturnType]

        one = jax.checkpoint(one, prevent_cse=False, policy=REMAT[self.remat])
        for stack in stacks:
            end = first + len(jax.tree.leaves(stack)[0])
            here = jax.tree.map(lambda array, first=first, end=end: array[first:end], inputs)
            x, routed = jax.lax.scan(one, x, (stack, here))
            found.append(routed)
            first = end
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        table = as_stored(self.token_embedding if c.tied else self.head_kernel, VOCABULARY).astype(self.dtype)
        logits = float32_product("...d,vd->...v", hidden.astype(self.dtype), table)
        if c.head_bias:
            logits = logits + last_axis(as_stored(self.head_bias, ("vocab",)).astype(jnp.float32), logits)
        return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

    def everything(self, rows: Rows) -> jax.Array:
        return self.unembed(self(rows)[0])


def _per_layer(c: DecoderConfig, positions: Array) -> tuple[LayerInput, tuple[jax.Array, jax.Array] | None]:
    """Per-layer arrays to scan over, and the rotary angles, computed once per distinct `Rope` instead of once per layer."""
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


def _round_kernels(variables: Variables, dtype: Any, names: Collection[str] = ("kernel",)) -> Variables:
    """The kernels of all layers, the leaves `names`, rounded to the compute type once for the forward and the backward pass.

    Their gradients are then stacked in that type, which is the type of the products that made them, so nothing else is rounded.
    The copy takes memory, so only `remat="none"` does this; otherwise a layer rounds its own kernels each time it runs.
    Narrower kernels stay as they are: a wider copy of frozen weights would undo the memory that their type saves.
    """

    def wider(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return path[-1].key in names and jnp.finfo(leaf.dtype).bits > jnp.finfo(dtype).bits

    def rounded(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        # Before JAX 0.12, a transpose that adds to refs (`step.mean_grads`) takes parameters read as they are for computed ones
        # beside them. There all are computed, at the cost of their gradients beside the sum: those of experts are large.
        as_it_is = leaf if jax.__version_info__ >= (0, 12) else leaf * 1.0
        return leaf.astype(dtype) if wider(path, leaf) else as_it_is

    params = variables["params"]
    if not any(itertools.starmap(wider, jax.tree_util.tree_leaves_with_path(params["layers"]))):
        return variables  # whose gradients are added in place, not made beside their sum
    layers = jax.tree_util.tree_map_with_path(rounded, params["layers"])
    return {**variables, "params": {**params, "layers": layers}}


def _refuse_adapter(variables: Variables) -> None:
    """Raises ValueError for an adapter that nobody has scaled: the base model does not know its alpha."""
    if "lora" in variables:
        raise ValueError('variables hold an adapter, "lora": take the model of lora_model, which scales it, or merge_adapter')


@functools.lru_cache(maxsize=64)
def _init_of(config: DecoderConfig) -> tuple[Callable[[jax.Array], Variables], Callable[[], Any]]:
    """`init` and `axes` of a model. Models of equal `config` share them, so that JAX traces them once for all."""
    module = Decoder(config, jnp.float32, "none", DENSE)

    def boxed_init(key: jax.Array) -> Variables:
        one = jnp.zeros((1, 1), jnp.int32)
        rows = Rows(one, one, one, one + 1, one, one, one, jnp.ones(1), one[0])
        return module.init(key, rows, method="everything")

    def init(key: jax.Array) -> Variables:
        return nn.meta.unbox(boxed_init(key))

    return init, lambda: nn.get_partition_spec(jax.eval_shape(boxed_init, jax.eval_shape(lambda: jax.random.key(0))))


def make_model(
    config: DecoderConfig, *, dtype: Any = jnp.float32, remat: str = "none", attention: AttentionPath = DENSE
) -> Model:
    """The decoder as pure functions (`types.Model`).

    `dtype` is the type of activations and matrix products. `init` always makes float32 parameters; norms, softmax and logits
    are always float32. `remat` is what the backward pass recomputes: `"none"`, no matrix product; `"save_attention"`, all but
    the projections to queries, keys and values and the mixing of values; `"full"`, each layer's forward pass, keeping only the
    layers' inputs. `attention`: see `attention_paths.attention_path`.

    `axes()` returns a tree like the variables, of `jax.sharding.PartitionSpec`s over the logical axes "layers", "vocab",
    "embed" (D), "heads" (N x H), "kv_heads" (K x H), "mlp" and "experts".

    Cache (`init_cache(batch, length, cache_dtype)`): `length` columns per row. A `decode` beyond the last column cannot be
    detected under jit: the caller must make the cache long enough.

    A small model to try, without a download:

    >>> sizes = {"vocab_size": len(tokenizer), "width": 32, "layers": 2, "heads": 4, "max_positions": 128}
    >>> decoder = make_model(decoder_config(hf_config("llama", **sizes, eos_token_id=tokenizer.eos_token_id)))
    >>> weights = jax.jit(decoder.init)(jax.random.key(0))
    >>> reference_logps_of(decoder, weights, encoded, layout="packed").shape
    (2, 2)
    """
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {', '.join(REMAT)}, not {remat!r}")
    module = Decoder(config, dtype, remat, attention)
    init, names = _init_of(config)

    def init_cache(batch: int, length: int, cache_dtype: Any = None) -> dict[str, jax.Array]:
        cache_dtype = dtype if cache_dtype is None else cache_dtype
        shape = (config.layers, batch, config.kv_heads, length, config.head_size)
        return {
            "key": jnp.zeros(shape, cache_dtype),
            "value": jnp.zeros(shape, cache_dtype),
            "positions": jnp.zeros((batch, length), jnp.int32),
            "length": jnp.int32(0),
        }

    def apart(variables: Variables) -> tuple[Variables, ...]:
        """The variables of each layer, or of each stack of layers, if they are unstacked."""
        of_layers = {name: tree["layers"] for name, tree in variables.items() if "layers" in tree}
        return tuple(dict(zip(of_layers, one, strict=True)) for one in zip(*of_layers.values(), strict=True))

    def take_rows(cache: Any, index: jax.Array, held: Any = None, moved: jax.Array | None = None) -> Any:
        stores = {name: cache[name] for name in ("key", "value", "positions")}
        axes = jax.tree.map(lambda leaf: int(leaf.ndim == 5), stores)  # layers first, unless unstacked
        if held is None or moved is None or len(index) > 1:
            return {**cache, **jax.tree.map(lambda leaf, axis: rows_of(leaf, index, axis=axis), stores, axes)}
        order, index = jnp.argsort(~moved[0]), index[0]

        def put(number: jax.Array, held: Any) -> Any:
            to, at = order[number], index[order[number]]
            return jax.tree.map(
                lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(
                    old, jax.lax.dynamic_slice_in_dim(new, at, 1, axis), to, axis
                ),
                held,
                stores,
                axes,
            )

        old = {name: held[name] for name in stores}
        return {**cache, **jax.lax.fori_loop(0, moved.sum(), put, old)}

    def decode(variables: Variables, rows: Rows, cache: Any) -> tuple[jax.Array, Any]:
        _refuse_adapter(variables)
        own, new = cache.own if isinstance(cache, SharedCache) else cache, rows.tokens.shape[1]
        if new > 1 and isinstance(cache, SharedCache):
            raise ValueError(f"a SharedCache takes one token a row at a time, and these rows have {new}")
        if new > own["positions"].shape[1]:
            raise ValueError(f"{new} tokens do not fit a cache of {own['positions'].shape[1]} columns")
        layers = apart(variables) if isinstance(own["key"], tuple) else None
        return module.apply(variables, rows, cache, layers)  # pyright: ignore[reportReturnType]

    def rounded(variables: Variables) -> Variables:
        variables = _round_kernels(variables, dtype, ("kernel", "router", *Kernels._fields))
        table = "token_embedding" if config.tied else "head_kernel"
        params = variables["params"]
        wider = jnp.finfo(params[table].dtype).bits > jnp.finfo(dtype).bits
        return {**variables, "params": {**params, table: params[table].astype(dtype)}} if wider else variables

    def by_layer(variables: Variables, cache: Any) -> tuple[Variables, Any]:
        def cut(tree: Any) -> tuple[Any, ...]:
            return tuple(jax.tree.map(lambda leaf, n=number: leaf[n], tree) for number in range(config.layers))

        of_layers = {name: {**tree, "layers": cut(tree["layers"])} for name, tree in variables.items() if "layers" in tree}
        return {**variables, **of_layers}, {**cache, "key": cut(cache["key"]), "value": cut(cache["value"])}

    def trunk(variables: Variables, rows: Rows, counted: jax.Array | None = None) -> Any:
        _refuse_adapter(variables)
        variables = _round_kernels(variables, dtype) if remat == "none" else variables
        layers = apart(variables) if isinstance(variables["params"]["layers"], tuple) else None
        return module.apply(variables, rows, None, layers, counted)

    def route(variables: Variables, rows: Rows) -> tuple[jax.Array, Routing]:
        counted = counted_tokens(rows)
        counted = to_pieces([counted])[0] if context_parts() > 1 else counted
        hidden, routed = trunk(variables, rows, counted)
        return hidden, Routing(routed.chosen, routed.probability, routed.entropy, counted)

    return Model(
        init=init,
        forward=lambda variables, rows: trunk(variables, rows)[0],
        unembed=lambda variables, hidden: module.apply(variables, hidden, method="unembed"),  # pyright: ignore[reportArgumentType]
        init_cache=init_cache,
        decode=decode,
        take_rows=take_rows,
        rounded=rounded,
        by_layer=by_layer,
        route=route if config.experts else None,
        axes=names,
        config=config,
    )
