"""The optimizer of the paper, and the schedule of the original implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule = Callable[[Any], Any]
"""`schedule(step) -> learning rate`, `step` counted from 0: an int, or int32[] inside a compiled step."""


def linear_warmup(peak: float, *, warmup_steps: int, decay_steps: int | None = None) -> Schedule:
    """Learning rate `peak * min(1, (step + 1) / (warmup_steps + 1))`: never zero, and at `peak` from step `warmup_steps` on.

    Source: `LambdaLR` in trainers.py of github.com/eric-mitchell/direct-preference-optimization. With `decay_steps`, which the
    original has not, the rate is also at most `peak * (1 - step / decay_steps)`: it falls on a line from the first step on, and
    the last of `decay_steps` steps still has a part of it.

    >>> rate = linear_warmup(1e-6, warmup_steps=3)
    >>> [f"{rate(step):.2e}" for step in range(5)]
    ['2.50e-07', '5.00e-07', '7.50e-07', '1.00e-06', '1.00e-06']
    """
    if not 0 <= peak < np.inf:
        raise ValueError(f"peak must be a finite learning rate, at least 0, got {peak}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
    if decay_steps is not None and decay_steps < 1:
        raise ValueError(f"decay_steps must be at least 1, or None for no decay, got {decay_steps}")

    def schedule(step):
        if isinstance(step, int):  # what the log shows: the same float32, without a program to compile for it
            falling = 1.0 if decay_steps is None else max(0.0, 1 - step / decay_steps)
            exact = min(1.0, (step + 1) / (warmup_steps + 1), falling)
            return np.float32(peak) * np.float32(exact)
        rate = jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))
        return peak * (rate if decay_steps is None else jnp.minimum(rate, jnp.maximum(0.0, 1 - step / decay_steps)))

    return schedule


def make_optimizer(
    learning_rate: float | Schedule,
    *,
    name: str = "rmsprop",
    max_grad_norm: float | None = 10.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Clip by global norm (`None`: do not), then `rmsprop`, which is the paper's, or `adamw`, which `b1` and `b2` belong to.

    RMSprop is torch's: decay 0.99, epsilon outside of the square root, where optax has it inside by default. Weight decay is
    what torch does under each name, for all parameters alike: an L2 term in the gradient (rmsprop), or decoupled (adamw).

    Raises ValueError for an unknown name or a negative setting.

    >>> tx = make_optimizer(linear_warmup(1e-6, warmup_steps=150), max_grad_norm=10.0)
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> print(f"{updates['w'][0]:.3e}")  # the rate of step 0, divided by sqrt(0.01)
    -6.623e-08
    """
    rate: Any = learning_rate
    if isinstance(rate, int | float | np.number) and not 0 <= rate < np.inf:  # one that is traced cannot be asked
        raise ValueError(f"learning_rate must be a finite number, at least 0, got {learning_rate}")
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(f"b1 and b2 must lie in [0, 1), got {b1} and {b2}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive, or None for no clipping, got {max_grad_norm}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    clip = [] if max_grad_norm is None else [_clip_by_global_norm(max_grad_norm)]
    if name == "rmsprop":
        decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
        return optax.chain(*clip, *decay, optax.rmsprop(learning_rate, decay=0.99, eps=1e-8, eps_in_sqrt=False))
    if name == "adamw":
        return _promoting(optax.chain(*clip, optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)))
    raise ValueError(f"unknown optimizer {name!r}: choose rmsprop or adamw")


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """torch's `clip_grad_norm_`. The norm is in float32 whatever the gradients are; optax sums squares in their own type."""

    def update(updates, state, params=None):
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(updates)))
        factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _promoting(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    # optax computes Adam's bias correction as float ** int32, an error under jax_numpy_dtype_promotion=strict.
    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)
