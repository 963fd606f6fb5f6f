"""Preference pairs of conversations and of single turns, and online DPO on conversations. Offline methods use `PairMethod`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.groups import PairGroup
from dpo_jax.data.loader import train_batches
from dpo_jax.lab.dialogue import Conversation, DialogueWorld
from dpo_jax.lab.methods import PairData, PairMethod, grouped_data, in_layout, policy_of
from dpo_jax.lab.world import Points
from dpo_jax.online.batches import prompt_groups, worst_case
from dpo_jax.online.choices import PairsHow, choose_pairs
from dpo_jax.runtime.fit import fit
from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Variables


class Sampling(NamedTuple):
    """Settings for sampling conversations and forming pairs."""

    starts: int  # of every opening
    completions: int  # conversations of a start, each with a user who thinks of its own object
    pairs: PairsHow  # of these


class Labeled(NamedTuple):
    groups: list[PairGroup]
    pairs: list[tuple[Conversation, Conversation]]  # chosen and rejected


def converse(world: DialogueWorld, variables: Variables, how: Sampling, *, seed: int, number: int) -> list[Conversation]:
    """`how.starts` times `how.completions` conversations of every opening, in this order. `number`: of the round."""
    users = world.users(how.starts, how.completions, np.random.default_rng([seed, number]))
    return world.sample(variables, *users, jax.random.fold_in(jax.random.key(seed + 1), number))


def label_conversations(conversations: Sequence[Conversation], how: Sampling, *, seed: int, name: str) -> Labeled:
    """Pairs of conversations with the same start, labeled by their rewards. Only the policy's tokens are scored."""
    found = _choose([(one.prompt, one.ids, one.scored, one.reward) for one in conversations], how, seed=seed, name=name)
    return Labeled(found.groups, [(conversations[a], conversations[b]) for a, b in found.pairs])


def label_turns(conversations: Sequence[Conversation], how: Sampling, *, seed: int, name: str) -> list[PairGroup]:
    """Pairs of single turns with the same history, labeled by the turn's own reward, whatever follows from it."""
    turns: dict[tuple[int, bytes], list[Any]] = {}
    for one in conversations:
        # The policy's turns are the runs of scored tokens.
        edges = np.flatnonzero(np.diff(np.concatenate([[False], one.scored, [False]])))
        for turn, begin, end in zip(one.turns, edges[::2], edges[1::2], strict=True):
            history = np.concatenate([one.prompt, one.ids[:begin]])
            example = history, one.ids[begin:end], None, turn.answer.reward
            turns.setdefault((one.opening, history.tobytes()), []).append(example)
    several = how.completions
    whole = [group[at : at + several] for group in turns.values() for at in range(0, len(group) - several + 1, several)]
    return _choose(list(itertools.chain(*whole)), how, seed=seed, name=name).groups


class _Chosen(NamedTuple):
    groups: list[PairGroup]
    pairs: list[tuple[int, int]]  # numbers of the examples


def _choose(examples: Sequence[Any], how: Sampling, *, seed: int, name: str) -> _Chosen:
    """Pairs of (prompt, ids, scored, reward) examples, where `how.completions` consecutive ones share a prompt."""
    k = how.completions
    # Keys that tell texts apart: reprs of token ids, which are never blank.
    texts = [[str(ids.tolist()) for _, ids, _, _ in examples[at : at + k]] for at in range(0, len(examples), k)]
    rewards = np.array([reward for *_, reward in examples]).reshape(-1, k)
    chosen, _ = choose_pairs(texts, rewards, how=how.pairs, seed=seed, keep_ties=True)
    pairs = [(int(group * k + a), int(group * k + b)) for group, a, b in chosen]
    encoded = []
    for number, (a, b) in enumerate(pairs):
        (prompt, chosen_ids, chosen_scored, _), (_, rejected_ids, rejected_scored, _) = examples[a], examples[b]
        encoded.append(
            Encoded(
                prompt,
                chosen_ids,
                rejected_ids,
                uid=f"{name}:{number}",
                chosen_scored=chosen_scored,
                rejected_scored=rejected_scored,
            )
        )
    return _Chosen(prompt_groups(encoded, chosen[:, 0]), pairs)


def trajectory_data(
    world: DialogueWorld, groups: Sequence[PairGroup], how: Sampling, *, batch: int, microbatches: int
) -> PairData:
    """`groups` with the reference's log-probabilities, in shapes large enough for the pairs of every later policy."""
    several = 2 if how.pairs == "best_worst" else how.completions
    openings = [world.ids(game.opening.text) for game in world.trees]
    tokens = world.width - min(map(len, openings))
    largest = worst_case(openings, completions=several, tokens=tokens)
    return grouped_data(world, groups, batch=batch, microbatches=microbatches, largest=[largest])


def turn_data(world: DialogueWorld, groups: Sequence[PairGroup], how: Sampling, *, batch: int, microbatches: int) -> PairData:
    """As `trajectory_data`, for groups of `label_turns`: shapes fit those of every other seed."""
    several = 2 if how.pairs == "best_worst" else how.completions
    history = np.zeros(world.width - world.new_tokens, np.int32)
    largest = worst_case([history], completions=several, tokens=world.new_tokens)
    return grouped_data(world, groups, batch=batch, microbatches=microbatches, largest=[largest])


def train_online(
    world: DialogueWorld,
    method: PairMethod,
    folder: Path,
    *,
    how: Sampling,
    rounds: int,
    settings: Mapping[str, float],
    seed: int,
) -> Points:
    """Online DPO: each round samples conversations from the current policy, labels them, and trains on all pairs so far.

    Returns a point after each round. The steps of `method.train` are divided among the rounds, with its optimizer and shapes;
    `how.starts` counts the starts of a round. The reference does not change. Pairs of earlier rounds are kept, because they
    show turns that the policy no longer takes.
    """
    steps = method.data.steps(method.epochs)
    state, points = method.start(settings), []
    so_far: list[PairData] = []
    with MetricsLog(folder / "metrics.jsonl") as log, reported("rounds", total=rounds, unit="rounds", brief=True) as task:
        for number in range(rounds):
            policy = policy_of(state)
            drawn = converse(world, policy, how, seed=seed, number=number)
            labeled = label_conversations(drawn, how, seed=1000 * seed + number, name=f"round {number}")
            so_far.append(in_layout(world, method.data, labeled.groups))
            begin, end = (steps * n // rounds for n in (number, number + 1))
            batches = train_batches(
                list(itertools.chain.from_iterable(data.groups for data in so_far)),
                layout=method.data.layout,
                batch=method.data.batch,
                seed=1000 * seed + number,  # seeds share no draws
                ref_logps=np.concatenate([data.ref_logps for data in so_far]),
                part=world.partitioner.host_part,
            )
            state = fit(
                method.step,
                state,
                lambda step, batches=batches, begin=begin: batches(step - begin),
                total_steps=end,
                log=log,
                get_state=world.partitioner.get_state,
            )
            points.append({"step": float(end), **world.measure(policy_of(state))})
            task.advance()
    return points


def messages(world: DialogueWorld, one: Conversation) -> list[dict[str, str]]:
    """A conversation as messages, the format of multi-turn preference data. Nonsense becomes a question mark."""
    opening = world.trees[one.opening].opening.text
    turns = [{"role": "user", "content": opening.split(":", 1)[1].split("\n")[0].strip()}]
    for turn in one.turns:
        turns.append({"role": "assistant", "content": (turn.said or "?").strip()})
        if turn.answer.reply:
            turns.append({"role": "user", "content": turn.answer.reply.split(":", 1)[1].split("\n")[0].strip()})
    return turns
