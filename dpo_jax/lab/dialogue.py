"""Question game experiment: samples whole conversations, enumerates them, measures a policy exactly.

`DialogueWorld` is `World` for whole conversations, with the interface that `PairMethod` trains on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.data.encode import token_ids
from dpo_jax.data.loader import round_up
from dpo_jax.data.question_game import (
    COURTESY,
    END,
    NONSENSE,
    RIGHT,
    TURNS,
    Opening,
    Turn,
    answer,
    answers,
    histories,
    utterances,
)
from dpo_jax.data.question_game import openings as all_openings
from dpo_jax.data.question_game import reward as reward_of
from dpo_jax.evals.completions import Completer, map_completions
from dpo_jax.evals.frontier import sequence_kl
from dpo_jax.lab.conversation_tree import Tree, evaluate
from dpo_jax.lab.world import with_interval
from dpo_jax.logps import sequence_logps
from dpo_jax.step import init_state
from dpo_jax.types import Model, Partitioner, TrainState, Variables

LEAST = 1e-9
"""Smallest probability of nonsense: below the float32 rounding error of the sum of the others."""


class GameTree(NamedTuple):
    """All conversations with one opening, and the utterance of each edge."""

    opening: Opening
    tree: Tree
    histories: list[list[Turn]]  # of each node
    said: list[str | None]  # of each edge; None: nonsense, all of it in one edge


def game_tree(opening: Opening) -> GameTree:
    """The tree of an opening. The user thinks of any of `opening.things`; with a single one the answers are deterministic."""
    every = list(histories(opening))
    number = {tuple(turns): node for node, (turns, _) in enumerate(every)}
    nodes, said, outcomes = [], [], []
    for node, (turns, things) in enumerate(every):
        for words in (*utterances(len(turns)), None):
            for given, of in answers(things, len(turns), words).items():
                after = number[(*turns, Turn(words, given))] if words and given.reply else -1
                outcomes.append((len(said), len(of) / len(things), given.reward, after))
            nodes.append(node)
            said.append(words)
    edge, probability, reward, after = (np.array(column) for column in zip(*outcomes, strict=True))
    return GameTree(opening, Tree(np.array(nodes), edge, probability, reward, after, TURNS), [t for t, _ in every], said)


class Conversation(NamedTuple):
    """A sampled conversation between a policy and a user."""

    opening: int  # number of the opening
    thing: str  # the object the user thought of
    turns: list[Turn]  # `said` is None for nonsense
    prompt: np.ndarray  # int32[n], the opening
    ids: np.ndarray  # int32[n], all turns of both; the last answer, after which the policy says nothing, is left out
    scored: np.ndarray  # bool[n], the policy's tokens

    @property
    def reward(self) -> float:
        return reward_of(self.turns)


class DialogueWorld:
    """The fixed part of an experiment with the question game. All `variables` are the partitioner's.

    Raises ValueError for a tokenizer whose end of text differs from the game's, and for a model with too few positions.
    """

    def __init__(
        self,
        partitioner: Partitioner,
        model: Model,
        tokenizer: Any,
        *,
        reference: Variables,
        batch: int,
        test: int,
        seed: int,
        begin: Callable[..., TrainState] = init_state,
    ) -> None:
        self.partitioner, self.model, self.tokenizer, self.reference = partitioner, model, tokenizer, reference
        self.batch, self.seed, self.begin, self.test = batch, seed, begin, test
        if tokenizer.eos_token != END:
            raise ValueError(
                f"the tokenizer ends texts with {tokenizer.eos_token!r}, and turns of the question game with {END!r}"
            )
        self.trees = [game_tree(opening) for opening in all_openings()]
        self._ids: dict[str, np.ndarray] = {}
        self._meant = [{tuple(self.ids(said + END).tolist()): said for said in utterances(turn)} for turn in range(TURNS)]
        self.new_tokens = max(len(ids) for meant in self._meant for ids in meant)
        widths = [len(self.history(game, turns)) for game in self.trees for turns in game.histories]
        self.width = round_up(max(widths) + self.new_tokens, 8)
        if self.width > model.config.max_positions:
            raise ValueError(f"a conversation takes {self.width} positions, but the model has {model.config.max_positions}")
        options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": self.new_tokens, "batch": batch}
        # One width for all turns, so that they share one program.
        self._complete = Completer(partitioner, model, tokenizer, width=max(widths), **options)
        self._kl = partitioner.compile_map(functools.partial(_kl, model))
        self._logps = partitioner.compile_map(functools.partial(sequence_logps, model))

    def ids(self, text: str) -> np.ndarray:
        """Tokens of an opening, a turn or a reply: int32[n]. The tokens of a conversation are their concatenation."""
        if text not in self._ids:
            self._ids[text] = token_ids(text, self.tokenizer)
        return self._ids[text]

    def history(self, game: GameTree, turns: Sequence[Turn]) -> np.ndarray:
        """Tokens of a conversation up to the policy's next turn: int32[n]."""
        parts = [self.ids(part) for turn in turns for part in ((turn.said or "") + END, turn.answer.reply)]
        return np.concatenate([self.ids(game.opening.text), *parts])

    def sample(
        self, variables: Variables, openings: Sequence[int], things: Sequence[str], key: jax.Array
    ) -> list[Conversation]:
        """A conversation with each of B users, given the number of the opening and the object each user thinks of.

        Consecutive equal openings share one prefill. All B conversations take each turn together.
        """
        every = [
            Conversation(number, thing, [], start := self.ids(self.trees[number].opening.text), start[:0], np.zeros(0, bool))
            for number, thing in zip(openings, things, strict=True)
        ]
        over = np.zeros(len(every), bool)
        for turn in range(TURNS):
            # A finished conversation stays in the batch as its opening, and its samples are discarded.
            so_far = [
                one.prompt if done else np.concatenate([one.prompt, one.ids]) for one, done in zip(every, over, strict=True)
            ]
            drawn = self._complete(variables, so_far, jax.random.fold_in(key, turn))
            for number in np.flatnonzero(~over):
                one, new = every[number], drawn.ids[number]
                said = self._meant[turn].get(tuple(new.tolist()))
                given = answer(one.thing, turn, said)
                reply = self.ids(given.reply)
                over[number] = not len(reply)
                every[number] = one._replace(
                    turns=[*one.turns, Turn(said, given)],
                    ids=np.concatenate([one.ids, new, reply]),
                    scored=np.concatenate([one.scored, np.ones(len(new), bool), np.zeros(len(reply), bool)]),
                )
        return every

    def users(self, starts: int, times: int, rng: np.random.Generator) -> tuple[list[int], list[str]]:
        """Openings and objects: `starts` of every opening, and for each start `times` users, each with its own object."""
        openings = np.repeat(np.arange(len(self.trees)), starts * times).tolist()
        return openings, [str(rng.choice(self.trees[number].opening.things)) for number in openings]

    def policy(self, variables: Variables) -> list[np.ndarray]:
        """Probabilities of each edge of each tree under `variables`, float64[E]. Anything but an utterance is nonsense."""
        texts = [
            (self.history(game, game.histories[node]), self.ids(said + END))
            for game in self.trees
            for node, said in zip(game.tree.node, game.said, strict=True)
            if said is not None
        ]
        prompts, completions = zip(*texts, strict=True)
        found = np.exp(self.over(self._logps, variables, prompts, completions).astype(np.float64))
        policies, at = [], 0
        for game in self.trees:
            known = np.array([said is not None for said in game.said])
            policy = np.zeros(len(known))
            policy[known] = found[at : (at := at + int(known.sum()))]
            total = np.bincount(game.tree.node, policy)
            policy[~known] = np.maximum(1 - total, LEAST)  # one nonsense edge at each node
            policies.append(policy / np.bincount(game.tree.node, policy)[game.tree.node])
        return policies

    @functools.cached_property
    def reference_policy(self) -> list[np.ndarray]:
        return self.policy(self.reference)

    def over(self, compiled: Any, variables: Any, prompts: Any, completions: Any, scored: Any = None) -> Any:
        """`compiled(variables, rows)` over completions, one a row."""
        return map_completions(
            self.partitioner, compiled, variables, prompts, completions, scored=scored, batch=self.batch, length=self.width
        )

    def kl(self, variables: Variables, conversations: Sequence[Conversation]) -> tuple[np.ndarray, np.ndarray]:
        """KL over the policy's tokens (exact per token, and from the samples alone) of its conversations: float32[B], nats."""
        both = {"policy": variables, "reference": self.reference}
        columns = zip(*((one.prompt, one.ids, one.scored) for one in conversations), strict=True)
        return self.over(self._kl, both, *columns)

    def measure(self, variables: Variables, /) -> dict[str, float]:
        """Exact reward and KL of a policy, averaged over openings, and its right guesses, courtesies and nonsense.

        `reward_sampled` and `kl_sampled` are from `test` conversations, with 95 % intervals; they check the first two.
        The exact ones need no interval: only the training of the policy is random. The exact KL counts all nonsense as one
        utterance, so it is a lower bound; `kl_sampled`, over all texts, is not.
        """
        point = self.exact(self.policy(variables))
        openings, things = self.users(max(1, self.test // len(self.trees)), 1, np.random.default_rng(self.seed))
        drawn = self.sample(variables, openings, things, jax.random.key(self.seed))
        point |= with_interval("reward_sampled", np.array([one.reward for one in drawn]), self.seed)
        return point | with_interval("kl_sampled", self.kl(variables, drawn)[0], self.seed)

    def exact(self, policies: Sequence[np.ndarray]) -> dict[str, float]:
        """`measure` without the sampled figures, for policies given as probabilities at each edge of each tree."""
        found = []
        for game, policy, reference in zip(self.trees, policies, self.reference_policy, strict=True):
            tree, taken = game.tree, game.tree.reached(policy)
            paid = {name: float(taken @ tree.expected(tree.reward == of)) for name, of in _PAID.items()}
            found.append({**evaluate(tree, policy, reference)._asdict(), **paid})
        means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
        return means | {f"{name}{end}": means[name] for name in ("reward", "kl") for end in ("_low", "_high")}


_PAID = {"right": RIGHT, "courtesies": COURTESY, "nonsense": NONSENSE}
"""The events that `exact` counts, each identified by its reward."""


def _kl(model: Model, both: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
    return sequence_kl(model, both["policy"], both["reference"], rows)
