"""SigLIP's vision encoder (Zhai et al. 2023, arXiv 2303.15343), as in Gemma 3: from pixels to features of image tokens.

It is frozen: features are computed once for each image and cached. Its outputs, one for each patch, are averaged over squares
of patches here, because this needs no weights. The norm and the matrix after that belong to the decoder and are trained with
it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.activations import ACTIVATIONS
from dpo_jax.models.products import precision_of
from dpo_jax.models.tensor_layouts import Layout, Tensor, linear, norm
from dpo_jax.models.vision_config import VisionConfig
from dpo_jax.types import Array, Variables

ROOT = "vision_tower.vision_model"
"""Prefix of the encoder's tensor names in the official checkpoints of Gemma 3."""


def encode_images(variables: Variables, pixels: Array, *, config: VisionConfig) -> jax.Array:
    """Features of the image tokens: `pixels` float32[B, size, size, 3] to float32[B, T, W]. Pure: jit it.

    Pixels are normalized as by the model's processor. The T tokens are averages over T squares of patches, row by row.
    """
    c, params = config, variables["params"]
    x = jnp.asarray(pixels, jnp.float32)
    if x.shape[1:] != (c.image_size, c.image_size, 3):
        raise ValueError(f"pixels have shape {x.shape}, but the encoder reads [B, {c.image_size}, {c.image_size}, 3]")
    patches = x.reshape(-1, c.side, c.patch_size, c.side, c.patch_size, 3).transpose(0, 1, 3, 5, 2, 4)  # torch's order
    x = _linear(params["patches"], patches.reshape(len(x), c.side**2, -1)) + params["positions"][None]

    def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
        x = x + _attention(own["attention"], _norm(own["attention_norm"], x, c.eps), heads=c.heads)
        hidden = ACTIVATIONS[c.activation](_linear(own["up"], _norm(own["mlp_norm"], x, c.eps)))
        return x + _linear(own["down"], hidden), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    x = _norm(params["final_norm"], x, c.eps)
    squares = math.isqrt(c.tokens)
    of_square = c.side // squares
    x = x.reshape(-1, squares, of_square, squares, of_square, c.width)
    return x.mean(axis=(2, 4)).reshape(-1, c.tokens, c.width)


def _linear(own: Any, x: jax.Array) -> jax.Array:
    return jnp.dot(x, own["kernel"], precision=precision_of(x.dtype)) + own["bias"][None, None]


def _norm(own: Any, x: jax.Array, eps: float) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return x * own["scale"][None, None] + own["bias"][None, None]


def _attention(own: Any, x: jax.Array, *, heads: int) -> jax.Array:
    q, k, v = (_linear(own[name], x).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value"))
    exact = precision_of(x.dtype)
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k, precision=exact) / math.sqrt(q.shape[-1])
    mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v, precision=exact)
    return _linear(own["out"], mixed.reshape(x.shape))


def init_encoder(key: jax.Array, config: VisionConfig) -> Variables:
    """New weights for the encoder, float32: {"params": {...}}."""
    shapes = encoder_shapes(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))

    def leaf(path: Any, like: Any, key: jax.Array) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            return jax.random.normal(key, like.shape) / math.sqrt(like.shape[-2])
        if name == "positions":
            return jax.random.normal(key, like.shape) / math.sqrt(config.width)
        return jnp.ones(like.shape) if name == "scale" else jnp.zeros(like.shape)

    return jax.tree.unflatten(tree, [leaf(path, like, one) for (path, like), one in zip(leaves, keys, strict=True)])


def encoder_shapes(config: VisionConfig) -> Variables:
    """The tree of the encoder's variables as `ShapeDtypeStruct`s."""
    c = config

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def maps(*shape: int) -> dict[str, Any]:
        return {"kernel": of(*shape), "bias": of(*shape[:-2], shape[-1])}

    def norms(*shape: int) -> dict[str, Any]:
        return {"scale": of(*shape), "bias": of(*shape)}

    attention = {name: maps(c.layers, c.width, c.width) for name in ("query", "key", "value", "out")}
    layers = {
        "attention_norm": norms(c.layers, c.width),
        "attention": attention,
        "mlp_norm": norms(c.layers, c.width),
        "up": maps(c.layers, c.width, c.mlp_width),
        "down": maps(c.layers, c.mlp_width, c.width),
    }
    patches = maps(3 * c.patch_size**2, c.width)
    return {
        "params": {
            "patches": patches,
            "positions": of(c.side**2, c.width),
            "layers": layers,
            "final_norm": norms(c.width),
        }
    }


def encoder_tensors(config: VisionConfig) -> list[Tensor]:
    """The encoder's tensors in a checkpoint, under the names of the official Gemma 3."""
    c = config
    layer = f"{ROOT}.encoder.layers.{{}}"
    convolution = Layout(
        lambda a: [a.reshape(len(a), -1).T],
        lambda ours: ours[0].T.reshape(c.width, 3, c.patch_size, c.patch_size),
        lambda shapes: (c.width, 3, c.patch_size, c.patch_size),
    )
    table = [
        Tensor(f"{ROOT}.embeddings.patch_embedding.weight", ("patches/kernel",), convolution),
        Tensor(f"{ROOT}.embeddings.patch_embedding.bias", ("patches/bias",)),
        Tensor(f"{ROOT}.embeddings.position_embedding.weight", ("positions",)),
        *norm(f"{ROOT}.post_layernorm", "final_norm", True),
        *norm(f"{layer}.layer_norm1", "layers/attention_norm", True),
        *norm(f"{layer}.layer_norm2", "layers/mlp_norm", True),
        *linear(f"{layer}.mlp.fc1", "layers/up", True),
        *linear(f"{layer}.mlp.fc2", "layers/down", True),
    ]
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
        table += linear(f"{layer}.self_attn.{theirs}", f"layers/attention/{ours}", True)
    return table
