"""Load-balancing loss and router metrics of a mixture of experts. See `types.Routing`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.step import Objective
from dpo_jax.types import Metrics, Model, Routing, Rows, Variables

OfModel = Callable[..., tuple[jax.Array, Metrics]]
"""(variables, rows, model=...) -> losses and metrics of the examples, like `step.Objective`."""


def with_router(objective: OfModel, model: Model, *, coefficient: float = 0.0, axis_name: str | None = None) -> Objective[Rows]:
    """`objective` of `model` plus the load-balancing loss, and with router metrics; unchanged for a model without experts.

        router/balance   `balance_loss`; if all experts are used equally, the number of experts per token
        router/aux_loss  `coefficient` times that, which is added to the loss; only with a coefficient
        router/load_max  tokens of the fullest expert of any layer, relative to equal use of all experts
        router/entropy   entropy of the probabilities over experts, mean over tokens and layers, nats; at most ln(experts)

    All are computed over the tokens of the batch on all devices, counting a shared prompt once and padding not at all. Every
    example gets the same value; with microbatches, the mean over them. No token is dropped. The model's trunk runs once.

    Raises ValueError if a coefficient is given and the model has no routers.
    """
    route = model.route
    if route is None:
        if coefficient:
            raise ValueError(f"router_aux_loss is {coefficient}, but the model has no router (Model.route): leave it out")
        return functools.partial(objective, model=model)

    def routed(variables: Variables, rows: Rows) -> tuple[jax.Array, Metrics]:
        hidden, routing = route(variables, rows)

        def forward(_: Variables, again: Rows) -> jax.Array:
            assert again.tokens is rows.tokens, "an objective must read the rows that it was given"
            return hidden

        losses, metrics = objective(variables, rows, model=model._replace(forward=forward))
        found = _statistics(_sums(routing, axis_name), taken=routing.chosen.shape[-1])
        if coefficient:
            found["router/aux_loss"] = coefficient * found["router/balance"]
            losses = losses + found["router/aux_loss"]
        return losses, {**metrics, **{name: jnp.broadcast_to(value, losses.shape) for name, value in found.items()}}

    return routed


def balance_loss(routing: Routing, *, axis_name: str | None = None) -> jax.Array:
    """The load-balancing loss of a batch (Fedus et al. 2021, eq. 4 to 6), as transformers computes it: a float32 scalar.

    With E experts it is `E * sum_e f_e p_e`: f_e is the fraction of tokens that take expert e and p_e the mean probability of
    e, both over all tokens of all layers, without padding. It is a product of means, not a mean of products, so it needs the
    whole batch: `axis_name` sums over mapped devices. Differentiable in p; f has no gradient.
    """
    return _balance(_sums(routing, axis_name))


def switch_rate(routing: Routing, other: Routing) -> jax.Array:
    """The fraction of (token, layer, expert) choices in `routing` that `other`, for the same rows, does not make: float32[]."""
    kept = (routing.chosen[..., :, None] == other.chosen[..., None, :]).any(axis=-1)
    gone = jnp.where(routing.counted[None, :, :, None], ~kept, False).sum(dtype=jnp.float32)
    layers, *_, taken = routing.chosen.shape
    return _mean(gone, layers * taken * routing.counted.sum(dtype=jnp.float32))


def counted_tokens(rows: Rows) -> jax.Array:
    """Mask of the tokens that are not padding: bool[R, L]. A padding token sees only itself, and neither neighbor sees it."""
    k_start, k_end = jnp.asarray(rows.k_start), jnp.asarray(rows.k_end)
    x = jnp.arange(k_start.shape[1], dtype=jnp.int32)[None]
    seen = jnp.pad(k_start[:, 1:] <= x[:, :-1], ((0, 0), (0, 1))) | jnp.pad(k_end[:, :-1] > x[:, 1:], ((0, 0), (1, 0)))
    return seen | (k_start != x) | (k_end != x + 1)


class _Sums(NamedTuple):
    """Sums over the rows of all mapped devices."""

    chosen: jax.Array  # [layers, experts]
    probability: jax.Array  # [experts], over layers, too
    entropy: jax.Array  # [], over layers, too
    tokens: jax.Array  # []


def _sums(routing: Routing, axis_name: str | None) -> _Sums:
    experts = jnp.arange(routing.probability.shape[-1], dtype=jnp.int32)
    hits = (routing.chosen[..., None] == experts[None, None, None, None]) & routing.counted[None, :, :, None, None]
    sums = _Sums(
        hits.sum(axis=(1, 2, 3), dtype=jnp.float32),
        routing.probability.sum(axis=(0, 1)),
        routing.entropy.sum(),
        routing.counted.sum(dtype=jnp.float32),
    )
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def _statistics(sums: _Sums, *, taken: int) -> Metrics:
    layers, experts = sums.chosen.shape
    return {
        "router/balance": _balance(sums),
        "router/load_max": _mean(sums.chosen.max() * experts, taken * sums.tokens),
        "router/entropy": _mean(sums.entropy, layers * sums.tokens),
    }


def _balance(sums: _Sums) -> jax.Array:
    layers, experts = sums.chosen.shape
    frequency, probability = (_mean(x, layers * sums.tokens) for x in (sums.chosen.sum(axis=0), sums.probability))
    return experts * (frequency * probability).sum()


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """Mean; 0 for a microbatch of nothing but padding."""
    return total / jnp.maximum(count, 1)
