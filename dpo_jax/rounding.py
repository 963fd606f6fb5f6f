"""Stochastic rounding: parameters in bfloat16 that are updated in float32.

bfloat16 has 8 significant bits. An update smaller than 1/512 of its parameter is lost when the sum is rounded to the nearest
value, and many up to 1/256 are. At the learning rates of fine-tuning nearly all updates are that small. Stochastic rounding
rounds up with a probability equal to the part that is cut off. This keeps the expected value, so many small updates add up.
"""

from __future__ import annotations

import warnings
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax.types import Array


class StochasticRounding(NamedTuple):
    """An optax transformation with a third function, `apply(params, updates, step) -> params`, which keeps their types."""

    init: Any
    update: Any
    apply: Any


Optimizer = optax.GradientTransformation | StochasticRounding
"""The optimizers that `train_step` accepts."""


def stochastic_rounding(tx: optax.GradientTransformation, *, seed: int = 0) -> StochasticRounding:
    """`tx` for parameters in bfloat16, to pass instead of `tx` to `train_step` and the steps built on it.

    The optimizer sees parameters and keeps its state in float32. Sums of parameters and updates are rounded by
    `round_to_bfloat16`, with random bits that depend only on `seed`, the step and the name of the parameter. They are the same
    on any number of devices, and a resumed run equals the uninterrupted one. Parameters of other types are updated as usual.

    >>> tx = stochastic_rounding(optax.sgd(1e-3))
    >>> state = init_state({"w": jnp.ones(10_000, jnp.bfloat16)}, tx)
    >>> state, _ = apply_gradients(state, {"w": jnp.ones(10_000)}, {}, tx=tx)
    >>> params = np.asarray(state.params["w"], np.float32)
    >>> np.unique(params).tolist(), f"{params.mean():.3f}"
    ([0.99609375, 1.0], '0.999')
    """

    def wide(params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, params)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return tx.update(grads, state, None if params is None else wide(params))

    def apply(params: Any, updates: Any, step: Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)

        def rounded(path: Any, old: Array, new: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if old.dtype != jnp.bfloat16:
                return new
            return round_to_bfloat16(new, jax.random.fold_in(key, zlib.crc32(name.encode())))

        return jax.tree_util.tree_map_with_path(rounded, params, optax.apply_updates(wide(params), updates))

    return StochasticRounding(lambda params: tx.init(wide(params)), update, apply)


def warn_of_lost_updates(params: Any, tx: Optimizer) -> None:
    """Warns if `tx` would round most updates of parameters in 16 bits away."""
    narrow = sorted({str(getattr(leaf, "dtype", None)) for leaf in jax.tree.leaves(params)} & {"bfloat16", "float16"})
    if narrow and not isinstance(tx, StochasticRounding):
        warnings.warn(
            f"trained parameters are {' and '.join(narrow)}: most updates are smaller than their rounding, and are lost. Train "
            "float32 parameters, or bfloat16 ones with tx=dpo_jax.stochastic_rounding(tx)",
            stacklevel=3,
        )


def round_to_bfloat16(x: Array, key: Array) -> jax.Array:
    """Stochastic rounding: float32 `x` as one of its two neighbors in bfloat16, with expected value `x`.

    Values that bfloat16 holds exactly stay unchanged, and so do infinities and NaN. Numbers beyond its range become infinite.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of a float32: a random number is added to the lower half, which is then cut off.
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = jax.lax.shift_right_logical(carried, jnp.uint32(16)).astype(jnp.uint16)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(upper, jnp.bfloat16), x.astype(jnp.bfloat16))
