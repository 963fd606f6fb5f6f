"""Enumerated conversations: exact reward and KL of a policy, the best policy at every beta, and the limit of trajectory DPO.

A *node* is a conversation h in which the policy speaks next. An *edge* is an utterance available to the policy there. An
*outcome* of an edge is an answer of the user, with its probability; it pays a reward and leads to another node, or ends the
conversation.

The objective is that of the paper (eq. 3) with a whole conversation as the completion, of which the policy chooses only its own
turns: E[R] - beta * E[sum over turns of KL(pi(.|h) || ref(.|h))]. Soft dynamic programming solves it backwards over the turns:

    Q(h, a) = E_answer[reward + V(next h)]      V(h) = beta log sum_a ref(a|h) exp(Q(h, a) / beta)
    pi*(a|h) = ref(a|h) exp((Q(h, a) - V(h)) / beta)                                                      (`optimum`)

Trajectory DPO fits its implicit reward f = beta * sum_t log pi(a_t|h_t) / ref(a_t|h_t) to the rewards R of conversations. The
probabilities of the user's answers are the same under policy and reference and cancel. From pi* above,

    f*(conversation) = R - V(first h) - sum_t (reward_t + V(h_t+1) - Q(h_t, a_t))

If the user's answers are deterministic, the last sum is 0. Then f* = R - const., as for single completions, DPO's minimum is
pi*, and pi* = ref exp(R / beta) / Z over whole conversations (`tilted`). If they are random, that sum is the luck of the
conversation. No policy's f can represent it. DPO regresses on R, luck included, through a sigmoid, and ends at a policy other
than pi*, which `dpo_limit` computes. `tilted` is then not a policy, because it would have to choose the user's answers too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Tree(NamedTuple):
    """Conversations with one opening. Nodes are numbered from 0, parents first; edges are sorted by node, outcomes by edge."""

    node: np.ndarray  # int64[E]  where each edge begins, ascending; every node has an edge
    edge: np.ndarray  # int64[O]  of each outcome, ascending
    probability: np.ndarray  # float64[O]  sums to 1 over the outcomes of an edge
    reward: np.ndarray  # float64[O]
    next: np.ndarray  # int64[O]  node; -1: the conversation is over
    turns: int  # of the longest conversation

    @property
    def nodes(self) -> int:
        return int(self.node[-1]) + 1

    @property
    def starts(self) -> np.ndarray:
        """int64[nodes], the first edge of each node."""
        return np.searchsorted(self.node, np.arange(self.nodes))

    def expected(self, of_outcomes: np.ndarray) -> np.ndarray:
        """float64[E], means over the outcomes of each edge."""
        return np.bincount(self.edge, self.probability * of_outcomes, len(self.node))

    def reached(self, policy: np.ndarray) -> np.ndarray:
        """float64[E]: probability that a conversation takes each edge under `policy[E]`, which sums to 1 at each node."""
        inside = self.next >= 0
        at = np.eye(1, self.nodes)[0]
        for _ in range(self.turns):
            flow = (at[self.node] * policy)[self.edge] * self.probability
            at = np.bincount(self.next[inside], flow[inside], self.nodes)
            at[0] = 1.0
        return at[self.node] * policy


class Measured(NamedTuple):
    reward: float  # of a conversation
    kl: float  # to the reference, over the policy's turns only; nats a conversation


def evaluate(tree: Tree, policy: np.ndarray, reference: np.ndarray) -> Measured:
    """Exact reward and KL of `policy[E]`."""
    taken = tree.reached(policy)
    return Measured(float(taken @ tree.expected(tree.reward)), float(taken @ _log_ratio(policy, reference)))


def optimum(tree: Tree, reference: np.ndarray, beta: float) -> np.ndarray:
    """pi*[E], by soft dynamic programming."""
    value = np.zeros(tree.nodes + 1)  # the last entry is for conversations that are over
    policy = reference
    for _ in range(tree.turns):
        policy, value[:-1] = _tilt(tree, reference, tree.expected(tree.reward + value[tree.next]), beta)
    return policy


def myopic(tree: Tree, reference: np.ndarray, beta: float) -> np.ndarray:
    """float64[E]: the myopic policy, which maximizes only the reward of the current turn."""
    return _tilt(tree, reference, tree.expected(tree.reward), beta)[0]


def _tilt(tree: Tree, reference: np.ndarray, q: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """reference * exp(q / beta), normalized at each node, and beta times the log of the normalizer."""
    top = np.maximum.reduceat(q, tree.starts)
    weight = reference * np.exp((q - top[tree.node]) / beta)
    total = np.add.reduceat(weight, tree.starts)
    return weight / total[tree.node], top + beta * np.log(total)


class Leaves(NamedTuple):
    """All T whole conversations."""

    edges: np.ndarray  # int64[T, turns], -1 after the end
    luck: np.ndarray  # float64[T], probability of the user's answers
    reward: np.ndarray  # float64[T]

    def sums(self, of_edges: np.ndarray) -> np.ndarray:
        """float64[T], sums of `of_edges[E]` over the turns."""
        return np.append(of_edges, 0.0)[self.edges].sum(axis=1)


def leaves(tree: Tree) -> Leaves:
    edges, luck, reward = np.full((1, 0), -1), np.ones(1), np.zeros(1)
    at, ended = np.zeros(1, np.int64), []
    for turn in range(tree.turns):
        # Every outcome at the current node of each conversation.
        begun, outcome = np.nonzero(tree.node[tree.edge][None, :] == at[:, None])
        edges = np.column_stack([edges[begun], tree.edge[outcome]])
        luck, reward = luck[begun] * tree.probability[outcome], reward[begun] + tree.reward[outcome]
        at = tree.next[outcome]
        over = at < 0
        ended.append((np.pad(edges[over], ((0, 0), (0, tree.turns - turn - 1)), constant_values=-1), luck[over], reward[over]))
        edges, luck, reward, at = edges[~over], luck[~over], reward[~over], at[~over]
    return Leaves(*map(np.concatenate, zip(*ended, strict=True)))


def tilted(tree: Tree, reference: np.ndarray, beta: float) -> Measured:
    """ref exp(R / beta) / Z over whole conversations, the user's answers included: a bound that no policy may reach."""
    every = leaves(tree)
    likely = every.luck * np.exp(every.sums(np.log(reference)))
    weight = likely * np.exp((every.reward - every.reward.max()) / beta)
    weight /= weight.sum()
    return Measured(float(weight @ every.reward), float(weight @ _log_ratio(weight, likely)))


def dpo_limit(tree: Tree, reference: np.ndarray, beta: float, *, iterations: int = 400) -> np.ndarray:
    """float64[E]: the policy of least expected DPO loss, over pairs of conversations between the reference and this user,
    labeled with P(first chosen) = sigmoid(R_first - R_second). The policy is a table with one logit per edge, not a network.
    """
    from scipy.optimize import minimize  # JAX brings it

    every = leaves(tree)
    likely = every.luck * np.exp(every.sums(np.log(reference)))
    first, second = np.triu_indices(len(likely), 1)  # each pair once; a conversation against itself teaches nothing
    pairs = 2 * likely[first] * likely[second]
    wins = _sigmoid(every.reward[first] - every.reward[second])
    place, inside = np.append(np.arange(len(tree.node)), 0)[every.edges], every.edges >= 0
    # Rescales the logits so that steps have similar effect on the loss: rarely taken edges would otherwise hardly move.
    scale = 1 / np.sqrt(np.maximum(tree.reached(reference), 1e-12))

    def logits_to_policy(x: np.ndarray) -> np.ndarray:
        return _tilt(tree, reference, x * scale, 1.0)[0]

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        policy = logits_to_policy(x)
        f = beta * every.sums(_log(policy) - np.log(reference))
        margins = f[first] - f[second]
        small = np.exp(-np.abs(margins))
        # -wins log sigmoid(m) - (1 - wins) log sigmoid(-m), and its derivative by m
        value = float(pairs @ (np.maximum(margins, 0.0) + np.log1p(small) - wins * margins))
        slope = beta * pairs * (np.where(margins >= 0, 1.0, small) / (1 + small) - wins)
        of_leaves = np.bincount(first, slope, len(likely)) - np.bincount(second, slope, len(likely))
        of_edges = np.bincount(place[inside], np.repeat(of_leaves, inside.sum(axis=1)), len(tree.node))
        at_nodes = np.add.reduceat(of_edges, tree.starts)
        return value, (of_edges - policy * at_nodes[tree.node]) * scale

    options = {"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 1e-14, "gtol": 1e-9}
    return logits_to_policy(minimize(loss, np.zeros(len(tree.node)), jac=True, method="L-BFGS-B", options=options).x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2


def _log(x: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(x, np.finfo(np.float64).tiny))


def _log_ratio(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """log(policy / reference); 0 where the policy has no probability."""
    return np.where(policy > 0, _log(policy) - _log(reference), 0.0)
