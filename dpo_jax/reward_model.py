"""The reward model: a scalar head on the decoder, trained on preferences. PPO's value function uses the same kind of head.

    p(y_w > y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))      Bradley and Terry 1952; Rafailov et al. 2023, eq. 1

Preferences leave a constant per prompt undetermined; `center_rewards` fixes the mean reward afterwards.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.head import at_least_float32
from dpo_jax.logps import slots_to_pairs
from dpo_jax.step import train_step
from dpo_jax.types import Array, Metrics, Model, Rows, TrainState, Variables

HEAD = "head"


def with_scalar_head(model: Model) -> Model:
    """`model` with a second head, which maps a hidden state to one number; its variables gain the collection "head".

    All functions but `init` and `axes` are unchanged and do not read this collection; `scalar` does.

    >>> sorted(with_scalar_head(model).init(jax.random.key(0)))
    ['head', 'params']
    """

    def init(key: jax.Array) -> Variables:
        variables = model.init(key)
        return {**variables, HEAD: scalar_head(getattr(model.config, "width", None) or _width(model, variables))}

    names, spec = model.axes, jax.sharding.PartitionSpec
    if names is None:
        return model._replace(init=init)
    return model._replace(init=init, axes=lambda: {**names(), HEAD: {"kernel": spec("embed"), "bias": spec()}})


def scalar_head(width: int) -> dict[str, jax.Array]:
    """A head of zeros for hidden states of `width`: {"kernel": float32[D], "bias": float32[]}. Its output is 0 everywhere."""
    return {"kernel": jnp.zeros(width, jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def scalar(variables: Variables, hidden: Array) -> jax.Array:
    """The scalar head's output for each hidden state: `hidden[..., D]` -> float32[...]."""
    head = variables[HEAD]
    # An accelerator would multiply in bfloat16, too coarse for comparing rewards and subtracting values.
    return jnp.einsum("...d,d->...", at_least_float32(jnp.asarray(hidden)), head["kernel"], precision="highest") + head["bias"]


def completion_rewards(model: Model, variables: Variables, rows: Rows) -> jax.Array:
    """r(x, y) of every completion slot: float32[R * slots], the head's output at the last token. Pure: compile and map it.

    In `rows` each completion must follow its own prompt: `plain_rows`, `completion_rows`, or a plain layout of groups. Pairs
    around a shared prompt raise ValueError, or give NaN if the shape of the rows does not show them. Values of empty slots are
    meaningless.

    >>> judge = with_scalar_head(model)
    >>> rewards = jax.jit(partial(completion_rewards, judge))
    >>> print(rewards(judge.init(jax.random.key(0)), plain_rows(encoded, length=64)))  # untrained
    [0. 0. 0. 0.]
    """
    if rows.slots == 2 and rows.pairs is None:
        raise ValueError("rewards are read from plain rows, not from pairs that share a prompt: use the layout plain")
    hidden = model.forward(variables, rows)
    in_slot = rows.slot[:, :, None] == jnp.arange(rows.slots, dtype=jnp.int32)[None, None, :]
    last = jnp.where(in_slot, rows.source[:, :, None] + 1, 0).max(axis=1)  # [R, slots]
    rewards = scalar(variables, jnp.take_along_axis(hidden, last[:, :, None], axis=1))
    backwards = rows.k_end > jnp.arange(1, rows.tokens.shape[1] + 1, dtype=jnp.int32)[None, :]
    if rows.images is not None:  # tokens of an image see each other both ways
        backwards &= rows.images.index < 0
    return jnp.where(backwards.any(), jnp.nan, rewards).reshape(-1)


def reward_step(
    state: TrainState,
    rows: Rows,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of the reward model on pairs (Rafailov et al. 2023, eq. 2). Pure, like `dpo_step`.

    `model` comes from `with_scalar_head`; `rows` are `plain_rows` or a plain layout of groups. Metrics are means over the pairs
    of the global batch, before the update; `accuracy` counts a tie as half, so a new head has 0.5.

    >>> judge = with_scalar_head(model)
    >>> state = init_state(judge.init(jax.random.key(0)), tx)
    >>> state, metrics = jax.jit(partial(reward_step, model=judge, tx=tx))(state, plain_rows(encoded, length=64))
    >>> print(f"{metrics['loss']:.4f}")
    0.6931
    """
    if rows.pairs is None and rows.tokens.shape[0] != 2 * rows.weight.shape[0]:
        raise ValueError(
            f"{rows.tokens.shape[0]} rows with {rows.weight.shape[0]} examples are not plain rows of pairs: use plain_rows"
        )

    def objective(variables: Variables, rows: Rows) -> tuple[jax.Array, Metrics]:
        rewards = slots_to_pairs(completion_rewards(model, variables, rows), rows)
        margins = rewards[:, 0] - rewards[:, 1]
        return -jax.nn.log_sigmoid(margins), {
            "accuracy": (1 + jnp.sign(margins)) / 2,
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "margin": margins,
        }

    return train_step(state, rows, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)


def center_rewards(variables: Variables, rewards: Array) -> dict[str, Any]:
    """`variables` with the head's bias shifted so that the mean of `rewards`, which they gave, becomes 0.

    Section 3 of the paper does this, over completions of the data or of the reference. No preference changes.
    """
    head = variables[HEAD]
    return {**variables, HEAD: {**head, "bias": head["bias"] - jnp.mean(jnp.asarray(rewards, head["bias"].dtype))}}


def _width(model: Model, variables: Variables) -> int:
    one = jnp.zeros((1, 1), jnp.int32)
    rows = Rows(one, one, one, one + 1, one, one, one, jnp.ones(1, jnp.float32), one[0])
    return jax.eval_shape(model.forward, variables, rows).shape[-1]
