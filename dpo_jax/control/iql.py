"""P-IQL, the preference-based RL baseline: a reward learned from preferences by partial return, then implicit Q-learning.

reward   -log sigmoid(sum_t gamma^t r(s+_t, a+_t) - sum_t gamma^t r(s-_t, a-_t))
V        |tau - 1[u < 0]| u^2,  u = min(Q1, Q2)(s, a) - V(s), of the targets            Kostrikov et al. 2021, eq. 5
Q        (r + gamma V(s') - Q(s, a))^2                                                  eq. 6
policy   -min(exp(beta u), 100) log pi(a | s)                                           eq. 7
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.control.policies import Network, Policy
from dpo_jax.cpl import SegmentPairs, discounted_sum
from dpo_jax.rounding import Optimizer
from dpo_jax.step import train_step
from dpo_jax.types import Array, Metrics, TrainState, Variables

HIGHEST_WEIGHT = 100.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """Transitions: states and next states `after` float32[N, *S]; actions float32[N, A]; rewards, weight float32[N]."""

    states: Array
    actions: Array
    after: Array
    rewards: Array
    weight: Array


def _beside(states: Array, actions: Array) -> jax.Array:
    return jnp.concatenate([jnp.asarray(states), jnp.asarray(actions)], axis=-1)


def reward_of(network: Network, variables: Variables, states: Array, actions: Array) -> jax.Array:
    """r(s, a): float32[...]."""
    return network.apply(variables, _beside(states, actions))[..., 0]  # type: ignore[index]


def segment_reward_step(
    state: TrainState,
    batch: SegmentPairs,
    *,
    network: Network,
    tx: Optimizer,
    gamma: float,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of a reward r(s, a) on preferences by partial return (Christiano et al. 2017). Pure."""

    def objective(variables: Variables, batch: SegmentPairs) -> tuple[jax.Array, Metrics]:
        returns = discounted_sum(reward_of(network, variables, batch.states, batch.actions), gamma)
        margins = returns[:, 0] - returns[:, 1]
        return -jax.nn.log_sigmoid(margins), {"accuracy": (1 + jnp.sign(margins)) / 2}

    return train_step(state, batch, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)


class Critics:
    """MLPs for V and two Q; `init(key, policy)` gives all variables of `iql_step`, including the targets of Q."""

    def __init__(self, state: int, actions: int, hidden: Sequence[int]) -> None:
        self.value, self.q = Network(1, tuple(hidden)), Network(1, tuple(hidden))
        self.state, self.actions = state, actions

    def init(self, key: jax.Array, policy: Policy) -> Variables:
        of_policy, of_q, of_value = jax.random.split(key, 3)
        pair = jnp.zeros(self.state + self.actions)
        q = jax.vmap(lambda key: self.q.init(key, pair))(jax.random.split(of_q))  # two networks that share nothing
        value = self.value.init(of_value, jnp.zeros(self.state))
        return {"policy": policy.init(of_policy), "value": value, "q": q, "target": jax.tree.map(jnp.copy, q)}

    def q_of(self, variables: Any, pairs: Array) -> jax.Array:
        """Both values of each pair of state and action: float32[..., 2]."""
        values = jax.vmap(lambda one: self.q.apply(one, pairs, mutable=False))(variables)  # [2, ..., 1]
        return jnp.moveaxis(jnp.asarray(values)[..., 0], 0, -1)


def iql_step(
    state: TrainState,
    batch: Experience,
    *,
    critics: Critics,
    log_prob: Callable[[Variables, Array, Array], jax.Array],
    tx: Optimizer,
    gamma: float,
    expectile: float = 0.7,
    beta: float = 3.0,
    target_rate: float = 0.005,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of implicit Q-learning on V, Q and the policy together; then targets move by `target_rate`. Pure.

    `tx` must not change variables without a gradient (no weight decay): the targets are among the trained variables, so that
    checkpoints contain them.
    """
    stop = jax.lax.stop_gradient

    def objective(variables: Variables, batch: Experience) -> tuple[jax.Array, Metrics]:
        pairs = _beside(batch.states, batch.actions)
        value = critics.value.apply(variables["value"], batch.states)[..., 0]  # type: ignore[index]
        after = stop(critics.value.apply(variables["value"], batch.after)[..., 0])  # type: ignore[index]
        target = stop(jnp.min(critics.q_of(variables["target"], pairs), axis=-1))  # type: ignore[arg-type]
        advantage = target - value
        of_value = jnp.where(advantage < 0, 1 - expectile, expectile) * jnp.square(advantage)
        aim = batch.rewards + gamma * after
        of_q = jnp.square(critics.q_of(variables["q"], pairs) - aim[..., None]).sum(axis=-1)  # type: ignore[operator]
        weight = stop(jnp.minimum(jnp.exp(beta * advantage), HIGHEST_WEIGHT))
        of_policy = -weight * log_prob(variables["policy"], batch.states, batch.actions)
        parts = {"loss/value": of_value, "loss/q": of_q, "loss/policy": of_policy}
        return of_value + of_q + of_policy, {**parts, "value": value}

    after, metrics = train_step(state, batch, objective=objective, tx=tx, microbatches=microbatches, axis_name=axis_name)
    moved = jax.tree.map(lambda old, new: old + target_rate * (new - old), after.params["target"], after.params["q"])
    return after.replace(params={**after.params, "target": moved}), metrics
