"""A world so small that every completion can be counted, so that what the paper proves can be measured.

A prompt is one token. A completion is any text that ends in EOS after at most `length` tokens, or is cut there, so that the
probabilities of all completions of a prompt sum to 1. The policy is a table with the logits of every (prompt, prefix): it can
be any distribution over completions. Letters: X prompts, Y completions of a prompt. What is computed here, in float64, is what
the package is held against.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import completion_rows, plain_rows, ranking_rows
from dpo_jax.logps import sequence_logps
from dpo_jax.types import Model, Variables

EOS = 0


def completions_of(vocab, length):
    """All completions: no EOS but at the end, after at most `length` tokens; those of full length also without."""
    unfinished, finished = [()], []
    for _ in range(length):
        finished += [(*text, EOS) for text in unfinished]
        unfinished = [(*text, token) for text in unfinished for token in range(1, vocab)]
    return [np.array(text, np.int32) for text in finished + unfinished]


def tabular_model(vocab, length):
    """Logits[context, V]. A context, prompt and prefix, is the number with these tokens as digits; none of them is EOS, 0."""

    def init(key):
        return {"params": {"logits": jax.random.normal(key, (vocab**length, vocab))}}

    def forward(variables, rows):
        keys = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None, None, :]
        seen = (keys >= rows.k_start[:, :, None]) & (keys < rows.k_end[:, :, None])
        digits = rows.tokens * vocab**rows.positions
        context = jnp.where(seen, digits[:, None, :], 0).sum(axis=-1)
        # The last token of a completion predicts nothing, and its context has a digit too many for the table.
        return jnp.take(variables["params"]["logits"], context, axis=0, mode="clip")

    return Model(init=init, forward=forward, unembed=lambda variables, hidden: hidden)


_score = jax.jit(sequence_logps, static_argnums=0)


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    vocab: int
    length: int
    beta: float
    model: Model
    prompts: list[np.ndarray]
    completions: list[np.ndarray]
    reference: Variables
    rewards: np.ndarray  # float64[X, Y]

    def logps(self, variables):
        """log pi(y|x) of every completion, by the package itself: float64[X, Y]."""
        texts = [(prompt, completion) for prompt in self.prompts for completion in self.completions]
        rows = completion_rows(texts, length=1 + self.length)
        return np.asarray(_score(self.model, variables, rows), np.float64).reshape(len(self.prompts), -1)

    @functools.cached_property
    def ref_logps(self):
        return self.logps(self.reference)

    @functools.cached_property
    def optimal_logps(self):
        """log pi*: pi_ref exp(r / beta) / Z, the optimum of eq. 3 (eq. 4)."""
        return self.ref_logps + projected(self.rewards, self.ref_logps, beta=self.beta) / self.beta

    def with_rewards(self, rewards):
        return dataclasses.replace(self, rewards=rewards)

    def table_of(self, logps):
        """The variables of the policy with exactly these log-probabilities of the completions."""
        mass = np.zeros((self.vocab**self.length, self.vocab))
        for prompt, of_prompt in zip(self.prompts, np.exp(logps), strict=True):
            for completion, chance in zip(self.completions, of_prompt, strict=True):
                context = int(prompt[0])
                for place, token in enumerate(completion):
                    mass[context, token] += chance
                    context += int(token) * self.vocab ** (place + 1)
        logits = np.log(mass, where=mass > 0, out=np.zeros_like(mass))
        return {"params": {"logits": jnp.asarray(logits, jnp.float32)}}


def make_world(*, vocab, length, beta, seed=0):
    """Two prompts, a reference with random logits, and normal rewards around a mean that differs from prompt to prompt."""
    rng = np.random.default_rng(seed)
    model, completions = tabular_model(vocab, length), completions_of(vocab, length)
    return World(
        vocab=vocab,
        length=length,
        beta=beta,
        model=model,
        prompts=[np.array([token], np.int32) for token in (1, 2)],
        completions=completions,
        reference=model.init(jax.random.key(seed)),
        rewards=rng.normal(size=(2, len(completions))) + np.array([[-3.0], [5.0]]),
    )


def log_partition(rewards, ref_logps, *, beta):
    """log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta): float64[X, 1]."""
    exponents = ref_logps + rewards / beta
    top = exponents.max(axis=1, keepdims=True)
    return top + np.log(np.exp(exponents - top).sum(axis=1, keepdims=True))


def projected(rewards, ref_logps, *, beta):
    """Eq. 8: r(x, y) - beta log Z(x), the one reward in the class of r that is the implicit reward of a policy."""
    return rewards - beta * log_partition(rewards, ref_logps, beta=beta)


def total_variation(logps, others):
    """The larger of the prompts' distances: half the sum of |p - q| over completions."""
    return 0.5 * np.abs(np.exp(logps) - np.exp(others)).sum(axis=1).max()


def kl(logps, others):
    """KL(p || q) for each prompt: float64[X], in nats."""
    return (np.exp(logps) * (logps - others)).sum(axis=1)


def orders(world, size):
    """Every ordered choice of `size` completions of every prompt, best first: x int[P, 1] and y int[P, size]."""
    ranked = np.array(list(itertools.permutations(range(len(world.completions)), size)))
    x = np.repeat(np.arange(len(world.prompts)), len(ranked))[:, None]
    return x, np.tile(ranked, (len(world.prompts), 1))


def preference_chance(rewards):
    """Eq. 18, and for two completions eq. 1: the probability of each ranking [P, K] with these rewards, best first."""
    exp = np.exp(rewards - rewards.max(axis=1, keepdims=True))
    return np.prod([exp[:, k] / exp[:, k:].sum(axis=1) for k in range(exp.shape[1] - 1)], axis=0)


def pair_rows(world, *, asked="evenly"):
    """Every pair of completions in both orders, weighted with the Bradley-Terry probability of that order.

    The mean over these rows is the expectation of eq. 7 itself. The two completions are any two `evenly`, or come from the
    `reference`, one independent of the other.
    """
    x, y = orders(world, 2)
    weight = preference_chance(world.rewards[x, y])
    if asked == "reference":
        weight = weight * np.exp(world.ref_logps[x, y].sum(axis=1))
    pairs = [Encoded(world.prompts[i], world.completions[w], world.completions[l]) for (i,), (w, l) in zip(x, y, strict=True)]
    rows = plain_rows(pairs, length=1 + world.length, ref_logps=world.ref_logps[x, y])
    return rows.replace(weight=weight.astype(np.float32))


def rows_of_rankings(world, size):
    """Every ranking of every `size` completions, weighted with its Plackett-Luce probability."""
    x, y = orders(world, size)
    rankings = [(world.prompts[i], [world.completions[j] for j in ranked]) for (i,), ranked in zip(x, y, strict=True)]
    rows = ranking_rows(rankings, length=1 + world.length, ref_logps=world.ref_logps[x, y])
    return rows.replace(weight=preference_chance(world.rewards[x, y]).astype(np.float32))
