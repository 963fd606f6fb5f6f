"""The optimizers and schedules of `dpo_jax.optimizer_table`, from optax; the paper's RMSprop and warm-up among them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from dpo_jax import optimizer_table

Schedule = Callable[[Any], Any]
"""`schedule(step) -> learning rate`, `step` counted from 0: an int, or int32[] inside a compiled step."""


def linear_warmup(peak: float, *, warmup_steps: int, decay_steps: int | None = None) -> Schedule:
    """Learning rate `peak * min(1, (step + 1) / (warmup_steps + 1))`: never zero, and at `peak` from step `warmup_steps` on.

    Source: `LambdaLR` in trainers.py of github.com/eric-mitchell/direct-preference-optimization. With `decay_steps`, which the
    original lacks, the rate is also at most `peak * (1 - step / decay_steps)`: linear decay from the first step on, and still
    above 0 in the last of `decay_steps` steps.

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
        if isinstance(step, int):  # for the log: the same float32, without compiling a program
            falling = 1.0 if decay_steps is None else max(0.0, 1 - step / decay_steps)
            exact = min(1.0, (step + 1) / (warmup_steps + 1), falling)
            return np.float32(peak) * np.float32(exact)
        rate = jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))
        return peak * (rate if decay_steps is None else jnp.minimum(rate, jnp.maximum(0.0, 1 - step / decay_steps)))

    return schedule


def make_schedule(
    name: str,
    peak: float,
    *,
    warmup_steps: int,
    total_steps: int,
    min_lr_ratio: float | None = None,
    decay_ratio: float | None = None,
) -> Schedule:
    """The learning rate of a run of `total_steps`: after linear warm-up `constant`, `linear`, `cosine` or `wsd`.

    Warm-up is that of `linear_warmup`. `cosine` then falls to `min_lr_ratio * peak`, which step `total_steps` would have. `wsd`
    stays at `peak` and falls linearly to the same value in the last `decay_ratio` of all steps.

    Raises ValueError for an unknown name, a setting out of range, and one that the schedule does not use.

    >>> rate = make_schedule("wsd", 1.0, warmup_steps=1, total_steps=8, decay_ratio=0.5)
    >>> [float(rate(step)) for step in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    given = {"schedule": name, "min_lr_ratio": min_lr_ratio, "decay_ratio": decay_ratio}
    _check(optimizer="rmsprop", **{option: value for option, value in given.items() if value is not None})
    options = optimizer_table.options_of(name, given)
    if name in ("constant", "linear"):
        return linear_warmup(peak, warmup_steps=warmup_steps, decay_steps=total_steps if name == "linear" else None)
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    linear_warmup(peak, warmup_steps=warmup_steps)  # checks both arguments
    low = options["min_lr_ratio"] * peak
    if name == "cosine":
        falling = max(1, total_steps - warmup_steps)
        parts, starts = [optax.cosine_decay_schedule(peak, falling, alpha=options["min_lr_ratio"])], []
    else:
        falling = max(1, round(options["decay_ratio"] * total_steps))
        starts = [max(warmup_steps, total_steps - falling)]
        parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, low, max(1, total_steps - starts[0]))]
    if warmup_steps:
        parts.insert(0, optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps))
        starts.insert(0, warmup_steps)
    return _with_log(optax.join_schedules(parts, starts), total_steps)


def _with_log(schedule: Schedule, total_steps: int) -> Schedule:
    """`schedule` with a look-up table for ints, so that logging the rate runs no program per step."""

    def promoting(step):  # optax mixes a float and an int32 in a minimum
        with jax.numpy_dtype_promotion("standard"):
            return schedule(step)

    table = functools.cache(lambda: np.asarray(jax.jit(promoting)(jnp.arange(total_steps + 1)), np.float32))
    return lambda step: table()[min(step, total_steps)] if isinstance(step, int) else promoting(step)


def make_optimizer(
    learning_rate: float | Schedule,
    *,
    name: str = "rmsprop",
    max_grad_norm: float | None = 10.0,
    weight_decay: float = 0.0,
    decay_embeddings: bool = True,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    momentum: float | None = None,
) -> optax.GradientTransformation:
    """Clip by global norm (`None`: no clipping), then apply an optimizer of `dpo_jax.optimizer_table`; `rmsprop` is the
    paper's.

    The options are those of the table; None is the optimizer's default. RMSprop is torch's: decay 0.99, epsilon outside the
    square root (optax's default is inside). Weight decay applies to matrices, not to norms and biases nor, without
    `decay_embeddings`, to embeddings. It is an L2 term in the gradient (rmsprop, sgd, as in torch) or decoupled.

    Raises ValueError for an unknown name, a setting out of range, and an option that the optimizer does not use.

    >>> tx = make_optimizer(linear_warmup(1e-6, warmup_steps=150), max_grad_norm=10.0)
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> print(f"{updates['w'][0]:.3e}")  # the rate of step 0, divided by sqrt(0.01)
    -6.623e-08
    """
    # A traced value cannot be checked.
    if isinstance(learning_rate, int | float | np.number) and not 0 <= learning_rate < np.inf:
        raise ValueError(f"learning_rate must be a finite number, at least 0, got {learning_rate}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive, or None for no clipping, got {max_grad_norm}")
    given = {"weight_decay": weight_decay, "decay_embeddings": decay_embeddings}
    given |= {"b1": b1, "b2": b2, "eps": eps, "momentum": momentum}
    _check(optimizer=name, **given)
    rate: Any = learning_rate
    clip: list[Any] = [] if max_grad_norm is None else [_clip_by_global_norm(max_grad_norm)]
    options = optimizer_table.options_of(name, given)
    decay, mask = options.pop("weight_decay"), functools.partial(decay_mask, embeddings=options.pop("decay_embeddings", False))
    if name in ("rmsprop", "sgd"):
        coupled = [optax.add_decayed_weights(decay, mask)] if decay else []
        last = optax.sgd(rate, **options) if name == "sgd" else optax.rmsprop(rate, decay=0.99, eps=1e-8, eps_in_sqrt=False)
        return optax.chain(*clip, *coupled, last)
    if name == "adamw":
        last = optax.adamw(rate, weight_decay=decay, mask=mask, **options)
    elif name == "lion":
        last = optax.lion(rate, weight_decay=decay, mask=mask, **options)
    elif name == "adafactor":
        # optax expects the decay per step; others multiply it by the learning rate.
        each: Any = (lambda step: decay * rate(step)) if callable(learning_rate) else decay * rate
        last = optax.adafactor(
            rate,
            multiply_by_parameter_scale=False,
            weight_decay_rate=each if decay else None,
            weight_decay_mask=mask,
        )
    else:
        last = _muon(rate, decay, **options)
    return _promoting(optax.chain(*clip, last))


def _muon(rate: Any, decay: float, *, momentum: float, eps: float, b1: float, b2: float) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate,
        beta=momentum,
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        weight_decay=decay,
        consistent_rms=0.2,  # updates as large as AdamW's, so that both parts can share a learning rate
        muon_weight_dimension_numbers=muon_axes,
    )


def decay_mask(params: Any, *, embeddings: bool = True) -> Any:
    """Mask of leaves with weight decay: a tree of bools like `params`. Norms and biases have none, embeddings optionally.

    >>> decay_mask({"norm": {"scale": 0}, "up": {"kernel": 0, "bias": 0}, "token_embedding": 0}, embeddings=False)
    {'norm': {'scale': False}, 'token_embedding': False, 'up': {'bias': False, 'kernel': True}}
    >>> decay_mask({"head_kernel": 0, "head_bias": 0})  # GPT-J
    {'head_bias': False, 'head_kernel': True}
    """

    def of(path: Any, leaf: Any) -> bool:
        name = _name(path)
        return not _is_vector(name) and (embeddings or "embedding" not in name)

    return jax.tree_util.tree_map_with_path(of, params)


def muon_axes(params: Any) -> Any:
    """The axes of each matrix that Muon orthogonalizes; None for leaves updated by AdamW: embeddings, heads, norms and biases.

    The last two axes form the matrix; axes before them (layers) are batch axes.
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def of(path: Any, leaf: Any) -> Any:
        name = _name(path)
        outer = "embedding" in name or "head" in name.split(".")[-1] or "head" in name.split(".")[:1]
        return None if leaf.ndim < 2 or _is_vector(name) or outer else matrix

    return jax.tree_util.tree_map_with_path(of, params)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_vector(name: str) -> bool:
    """Whether a leaf is a norm or a bias; with stacked layers the number of axes does not show it."""
    last = name.rpartition(".")[2]
    return last == "scale" or last.endswith("bias") or any(part.endswith("norm") for part in name.split("."))


def _check(**values: Any) -> None:
    wrong = [f"{option}: {words}" for option, words in optimizer_table.problems({"schedule": "constant", **values})]
    if wrong:
        raise ValueError("; ".join(wrong))


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """torch's `clip_grad_norm_`. The norm is always computed in float32; optax uses the gradients' dtype."""

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
