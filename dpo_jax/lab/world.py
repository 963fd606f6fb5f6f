"""Experiment setup shared by all methods: the reference, the prompts, the true reward, and the measurement of a policy."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dpo_jax.data.loader import round_up
from dpo_jax.evals.completions import Completer, Completions, map_completions
from dpo_jax.evals.frontier import bootstrap_interval, sequence_kl
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.logps import sequence_logps
from dpo_jax.runtime import hosts
from dpo_jax.step import init_state
from dpo_jax.types import Model, Partitioner, TrainState, Variables

Points = list[dict[str, float]]
"""Measurements of a run by `World.measure`, in order, each with its `step`."""


SECOND, LEARNED = "second_reward", "learned_reward"
"""Names in a point: the reward that no policy trains on, and the reward learned from the labeled pairs."""


class TrainingWorld(Protocol):
    """Interface of an experiment for methods that learn from pairs: `World`, or `dialogue.DialogueWorld` for several turns."""

    partitioner: Partitioner
    model: Model
    reference: Variables
    begin: Callable[..., TrainState]  # (variables, tx=...) -> the state before the first step: says what is trained

    def measure(self, variables: Variables, /) -> dict[str, float]: ...


class Prompts(NamedTuple):
    texts: list[str]
    ids: list[np.ndarray]  # int32[n] each

    def repeated(self, times: int) -> Prompts:
        """Each prompt repeated `times` times in a row."""
        return Prompts([text for text in self.texts for _ in range(times)], [x for x in self.ids for _ in range(times)])

    def of(self, chosen: Iterable[int]) -> Prompts:
        """The prompts with the numbers `chosen`."""
        some = [int(number) for number in chosen]
        return Prompts([self.texts[number] for number in some], [self.ids[number] for number in some])

    def digest(self) -> str:
        """SHA-256 of the token ids, in order."""
        return hashlib.sha256(b"".join(np.append(ids, -1).astype("<i4").tobytes() for ids in self.ids)).hexdigest()


class Scored(NamedTuple):
    """Completions of prompts with their true rewards."""

    completions: Completions
    rewards: np.ndarray  # float64[B]


class Observed(NamedTuple):
    """A completion sampled from a policy for each of P prompts, and KL(policy || reference) in nats."""

    completions: Completions
    rewards: np.ndarray  # float64[P], true ones
    kl: np.ndarray  # float32[P]
    kl_sampled: np.ndarray  # float32[P], from the samples alone


def copy_of(variables: Variables) -> Variables:
    """The variables once more, on their devices: training consumes the weights that it starts from."""
    return jax.tree.map(lambda leaf: leaf.copy(), variables)


class World:
    """The fixed part of an experiment. All `variables` are the partitioner's.

    `width` is a row length that fits every prompt with its longest completion. Programs are compiled once and shared by all
    methods, so that a sweep of many short runs does not spend its time compiling.
    """

    def __init__(
        self,
        partitioner: Partitioner,
        model: Model,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        reference: Variables,
        reward: Reward,
        train: Prompts,
        test: Prompts,
        max_new_tokens: int,
        batch: int,
        seed: int,
        begin: Callable[..., TrainState] = init_state,
        beside: Mapping[str, Reward] | None = None,
    ) -> None:
        self.partitioner, self.model, self.tokenizer, self.reference = partitioner, model, tokenizer, reference
        self.reward, self.train, self.test = reward, train, test
        self.stop_ids, self.max_new_tokens, self.batch, self.seed = tuple(stop_ids), max_new_tokens, batch, seed
        self.begin = begin  # (variables, tx=...) -> the state before the first step: says what is trained
        self.beside = dict(beside or {})  # rewards measured in addition to the true one, by their names in a point
        self.width = round_up(max(map(len, [*train.ids, *test.ids])) + max_new_tokens, 8)
        sizes = {"max_new_tokens": max_new_tokens, "batch": batch, "width": self.width - max_new_tokens}
        self.complete = Completer(partitioner, model, tokenizer, stop_ids=stop_ids, **sizes)
        self._kl = partitioner.compile_map(functools.partial(_kl, model))
        self._logps = partitioner.compile_map(functools.partial(sequence_logps, model))

    def sample(self, variables: Variables, prompts: Prompts, key: jax.Array) -> Scored:
        drawn = self.complete(variables, prompts.ids, key)
        return Scored(drawn, hosts.from_first(np.asarray(self.reward(prompts.texts, drawn.texts))))

    def kl(
        self, variables: Variables, prompts: Sequence[np.ndarray], ids: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """KL (exact per step, and from the samples alone) of completions drawn from `variables`: float32[B] each, in nats."""
        both = {"policy": variables, "reference": self.reference}
        return self.over(self._kl, both, prompts, ids)

    def logps(self, variables: Variables, prompts: Sequence[np.ndarray], ids: Sequence[np.ndarray]) -> np.ndarray:
        """log pi(y|x) of completions: float64[B], in nats."""
        return self.over(self._logps, variables, prompts, ids).astype(np.float64)

    def over(self, compiled: Any, variables: Any, prompts: Sequence[np.ndarray], ids: Sequence[np.ndarray]) -> Any:
        """`compiled(variables, rows)` over completions, one a row."""
        return map_completions(self.partitioner, compiled, variables, prompts, ids, batch=self.batch, length=self.width)

    def with_prompts(self, *, train: Prompts, test: Prompts) -> World:
        """The same experiment on other prompts. Compiled programs are shared if the prompts are not longer.

        Raises ValueError for prompts that exceed the model's positions together with a completion.
        """
        other = copy.copy(self)
        other.train, other.test = train, test
        longest, positions = max(map(len, [*train.ids, *test.ids])), self.model.config.max_positions
        if longest + self.max_new_tokens > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and {self.max_new_tokens} new ones do not fit {positions} positions"
            )
        other.width = max(self.width, round_up(longest + self.max_new_tokens, 8))
        return other

    def observe(self, variables: Variables, *, draw: int = 0) -> Observed:
        """Samples a completion of each test prompt. The same `draw` uses the same random numbers for all policies."""
        scored = self.sample(variables, self.test, jax.random.fold_in(jax.random.key(self.seed), draw))
        return Observed(*scored, *self.kl(variables, self.test.ids, scored.completions.ids))

    def measure(self, variables: Variables, *, draw: int = 0) -> dict[str, float]:
        """True reward, KL to the reference and mean tokens of a policy on the test prompts, with 95 % intervals over prompts.

        Rewards of `beside` are measured on the same completions; `cut` is the share of completions without a stop token. All
        policies get the same prompts and random numbers, so their differences are less noisy than the values.
        """
        return self.point(self.observe(variables, draw=draw))

    def point(self, found: Observed) -> dict[str, float]:
        """Means over prompts, with 95 % intervals."""
        drawn = found.completions
        values = {"reward": found.rewards, "kl": found.kl, "tokens": np.array([len(ids) for ids in drawn.ids])}
        values |= {name: reward(self.test.texts, drawn.texts) for name, reward in self.beside.items()}
        means = {end: mean for name, of in values.items() for end, mean in with_interval(name, of, self.seed).items()}
        return {**means, "kl_sampled": float(found.kl_sampled.mean()), "cut": float(1 - drawn.finished.mean())}


def _kl(model: Model, both: Mapping[str, Variables], rows: Any) -> tuple[jax.Array, jax.Array]:
    return sequence_kl(model, both["policy"], both["reference"], rows)


def with_interval(name: str, values: np.ndarray, seed: int) -> dict[str, float]:
    """The mean of values `[P]` as `name`, with its 95 % interval over prompts as `name`_low and `name`_high."""
    low, high = bootstrap_interval(values, seed=seed)
    return {name: float(np.mean(values, dtype=np.float64)), f"{name}_low": low, f"{name}_high": high}
