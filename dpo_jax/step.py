"""The training step: gradients of an objective over microbatches and devices, then one optimizer update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from dpo_jax.head import at_least_float32
from dpo_jax.microbatches import split
from dpo_jax.models.axes import parts_of
from dpo_jax.rounding import Optimizer, StochasticRounding, warn_of_lost_updates
from dpo_jax.types import ROW_AXES, Array, Metrics, TrainState, Variables


class Weighted(Protocol):
    """A batch: a pytree of arrays that can be split by rows, with the weight of each example (`Rows`, `ppo.Rollout`)."""

    @property
    def weight(self) -> Array: ...


Batch = TypeVar("Batch", bound=Weighted)
Objective = Callable[[Variables, Batch], tuple[jax.Array, Metrics]]
"""(variables, batch) -> losses and metrics, all of the shape of `batch.weight` (for `Rows`: float32[E])."""


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective[Batch],
    tx: Optimizer,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the weighted mean of `objective` over the global batch. Pure: jit, pmap or shard_map it.

    `objective(variables, batch)` takes all variables, trained and frozen, and returns losses and metrics, one number for each
    weight of the batch: float32[E] for `Rows`. The step returns their means, with `loss` and `grad_norm`, as float32 scalars.
    `dpo_step`, `sft_step`, `reward_step` and `ppo_step` are this step with their own objectives.

    Args:
      microbatches: number of equal parts over which gradients are accumulated. The result is the same, with less memory
        (a load-balancing loss of experts is then the mean of the parts).
      axis_name: the mapped axis under pmap or shard_map; None under jit, also over a sharded mesh.

    >>> def objective(variables, rows):
    ...     logps = completion_logps(model, variables, rows)  # [P, 2], chosen first
    ...     return -logps[:, 0], {"length": completion_lengths(rows)[:, 0]}
    >>> after, metrics = jax.jit(partial(train_step, objective=objective, tx=optax.sgd(0.1)))(state, rows)
    >>> sorted(metrics), float(metrics["length"])
    (['grad_norm', 'length', 'loss'], 4.5)
    """

    def of_trained(trained: Variables, batch: Batch) -> tuple[jax.Array, Metrics]:
        return objective({**state.frozen, **trained}, batch)

    grads, metrics = mean_grads(of_trained, state.params, batch, microbatches=microbatches, axis_name=axis_name)
    return apply_gradients(state, grads, metrics, tx=tx)


def init_state(variables: Variables, tx: Optimizer, *, frozen: Variables | None = None) -> TrainState:
    """The training state before the first step: `variables` are trained, `frozen` are only read.

    Both are nested dicts {collection: {name: array[...]}}, as `Model.init` and `load_hf` return them, and must not share a
    collection; `tx` is any optax transformation that needs no value of the loss. Returns a `TrainState` with step int32[] 0.
    `model.forward` gets `{**frozen, **variables}`: for LoRA, freeze {"params": base} and train {"lora": ...}. The arrays are
    not copied: a step that donates its state deletes `variables` as well. To use them later, pass a copy.

    >>> state = init_state(variables, tx)
    >>> int(state.step), state.variables.keys()
    (0, dict_keys(['params']))
    """
    if frozen and (shared := sorted({*variables} & {*frozen})):
        raise ValueError(f"{', '.join(shared)}: a collection is trained or frozen, not both; name the trained ones differently")
    warn_of_lost_updates(variables, tx)
    return TrainState(step=jnp.zeros((), jnp.int32), params=variables, opt_state=tx.init(variables), frozen=frozen or {})


def mean_grads(
    objective: Objective[Batch], params: Variables, rows: Batch, *, microbatches: int = 1, axis_name: str | None = None
) -> tuple[Variables, Metrics]:
    """Gradient, loss and metrics of the weighted mean of `objective(params, batch)` over the *global* batch. Variables that
    are not trained must be bound in `objective`, and so must numbers of the whole batch (`dpo_objective(means=...)`).

    Every term is first divided by the global weight, then summed over microbatches (one after the other, in float32) and over
    the devices of `axis_name`. The result therefore does not depend on how the batch is split, and a padding example of weight
    0 counts for nothing wherever it lies. On one device a microbatch of padding examples is skipped. With `axis_name=None` the
    batch is already global (`jit`, also over a sharded mesh).

    `train_step` is this followed by `apply_gradients`. Between the two you can inspect or change gradients:

    >>> def objective(params, rows):  # losses [P], and metrics of that shape
    ...     logps = completion_logps(model, params, rows)
    ...     return -logps[:, 0], {"length": completion_lengths(rows)[:, 0]}
    >>> grads, metrics = jax.jit(partial(mean_grads, objective))(state.params, rows)
    >>> sorted(metrics), float(metrics["length"])
    (['length', 'loss'], 4.5)
    >>> state, metrics = apply_gradients(state, grads, metrics, tx=optax.sgd(0.1))
    """
    total = _psum(rows.weight.sum(), axis_name)
    params = _one_copy_per_device(params, axis_name)

    def weighted(params: Variables, part: Batch) -> tuple[jax.Array, Metrics]:
        losses, metrics = objective(params, part)
        _check_shapes({"loss": losses, **metrics}, part.weight)
        return jax.tree.map(lambda x: jnp.sum(x * (part.weight / total)), (losses, {"loss": losses, **metrics}))

    if microbatches == 1:
        grads, metrics = jax.grad(weighted, has_aux=True)(params, rows)
        return _psum((jax.tree.map(at_least_float32, grads), metrics), axis_name)

    wide = jax.tree.map(at_least_float32, params)
    parts = split(rows, microbatches)
    # The backward pass adds to these in place, layer by layer, so there is never a second copy of all gradients.
    sums = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), wide)

    def add(metrics: Metrics, part: Batch) -> Metrics:
        def of_wide(wide: Variables) -> tuple[jax.Array, Metrics]:
            return weighted(jax.tree.map(lambda x, like: x.astype(like.dtype), wide, params), part)

        loss, add_gradients, here = jax.vjp(of_wide, wide, has_aux=True)
        add_gradients.with_refs(sums)(jnp.ones_like(loss))
        return jax.tree.map(jnp.add, metrics, here)

    def add_if_used(metrics: Metrics, part: Batch) -> Metrics:
        return jax.lax.cond(part.weight.any(), add, lambda metrics, _: metrics, metrics, part)

    # Over several devices a microbatch is rarely empty, and a condition would separate collectives.
    visit = add_if_used if parts_of(ROW_AXES) == 1 and axis_name is None else add
    shapes = jax.eval_shape(weighted, params, _first(parts))[1]
    none = _one_copy_per_device(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), axis_name)
    metrics, _ = jax.lax.scan(lambda metrics, part: (visit(metrics, part), None), none, parts)
    return _psum((jax.tree.map(jax.freeze, sums), metrics), axis_name)


def apply_gradients(state: TrainState, grads: Variables, metrics: Metrics, *, tx: Optimizer) -> tuple[TrainState, Metrics]:
    """The next state, and the metrics with `grad_norm` added: the global L2 norm before clipping (clipping is part of `tx`).

    >>> tx = optax.sgd(0.5)
    >>> state = init_state({"w": jnp.ones(4)}, tx)
    >>> state, metrics = apply_gradients(state, {"w": jnp.ones(4)}, {}, tx=tx)
    >>> int(state.step), state.params["w"].tolist(), float(metrics["grad_norm"])
    (1, [0.5, 0.5, 0.5, 0.5], 2.0)
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    if isinstance(tx, StochasticRounding):
        params = tx.apply(state.params, updates, state.step)
    else:
        params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, {**metrics, "grad_norm": optax.tree.norm(grads)}


def _psum(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _one_copy_per_device(tree: Any, axis_name: str | None) -> Any:
    """The same values, but one copy per device under `shard_map`: the gradient of a shared copy would already be summed."""
    return tree if axis_name is None else jax.tree.map(lambda x: jax.lax.pcast(x, axis_name, to="varying"), tree)


def _check_shapes(terms: Metrics, weight: Array) -> None:
    """Raises ValueError for a term whose shape is not that of `weight`: broadcasting would give a wrong sum."""
    for name, value in terms.items():
        if jnp.shape(value) != jnp.shape(weight):
            raise ValueError(f"{name}: expected a value for each of {jnp.size(weight)} examples, got shape {jnp.shape(value)}")


def _first(parts: Batch) -> Batch:
    return jax.tree.map(lambda x: x[0], parts)
