"""A synthetic question game of three turns with an exact reward: training data and a test bed for multi-turn preferences.

    User: I am thinking of something small.
    Player: Is it alive?
    User: Yes.
    Player: Is it fast?
    User: No.
    Player: It is the snail.

The user thinks of one of eight objects, distinguished by three attributes (`ATTRIBUTES`); the opening names one of the three.
In turns 1 and 2 the player asks about an attribute or how the user is; in turn 3 it guesses. The user is truthful. The object
is random, uniform among those that fit the opening.

    asking how the user is   +1      the guess is right   +8
    asking for an attribute  -0.5    the guess is wrong    0      anything else  -2, and the user ends the conversation

A courtesy is the best single turn. A question costs points, and only the two unknown attributes together identify the object. A
player that guesses well expects 4 points after two courtesies, 4.5 after one courtesy and one question, and 7 after both
questions. So credit must be assigned from the guess back to the questions.

A pure function of (n, seed, split). A player's turn ends in the end-of-text token, as with chat templates.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from dpo_jax.data.pairs import Preference, Spans

ATTRIBUTES = (("alive", "lifeless"), ("large", "small"), ("fast", "slow"))
THINGS = {
    "horse": ("alive", "large", "fast"),
    "elephant": ("alive", "large", "slow"),
    "mouse": ("alive", "small", "fast"),
    "snail": ("alive", "small", "slow"),
    "train": ("lifeless", "large", "fast"),
    "house": ("lifeless", "large", "slow"),
    "arrow": ("lifeless", "small", "fast"),
    "pebble": ("lifeless", "small", "slow"),
}
TURNS = 3
COURTESY, QUESTION, RIGHT, WRONG, NONSENSE = 1.0, -0.5, 8.0, 0.0, -2.0  # rewards
END = "<|endoftext|>"  # of a player's turn
TALK = " How are you today?"
_PLAYER = "\nPlayer:"
_OPENINGS = ("User: I am thinking of something {}.", "User: Guess what I have in mind. It is {}.")
_QUESTIONS = {f" Is it {yes}?": yes for yes, _ in ATTRIBUTES}
_GUESSES = {f" It is the {thing}.": thing for thing in THINGS}
_TALKS, _KNOWS = 0.55, 0.5  # probabilities that the weak player is courteous, and that its guess uses the answers


class Opening(NamedTuple):
    """The start of a conversation: the text up to the player's first turn, and the objects that the user may think of."""

    text: str
    things: tuple[str, ...]


class Answer(NamedTuple):
    """The result of a player's turn: reward, and the user's reply up to where the player's next turn begins.

    An empty reply ends the conversation.
    """

    reward: float
    reply: str = ""


class Turn(NamedTuple):
    said: str | None  # the player's utterance; None: nonsense
    answer: Answer


def openings() -> list[Opening]:
    """All twelve openings: six hints, each in two wordings. Each leaves four objects."""
    hints = [hint for pair in ATTRIBUTES for hint in pair]
    return [
        Opening(form.format(hint) + _PLAYER, tuple(thing for thing, has in THINGS.items() if hint in has))
        for hint in hints
        for form in _OPENINGS
    ]


def utterances(turn: int) -> tuple[str, ...]:
    """What a player can say in turn 0, 1 or 2. Anything else is nonsense."""
    return (TALK, *_QUESTIONS) if turn < TURNS - 1 else tuple(_GUESSES)


def answer(thing: str, turn: int, said: str | None) -> Answer:
    """The answer of a user who thinks of `thing`. `said` None: nonsense."""
    if said not in utterances(turn):
        return Answer(NONSENSE)
    if said in _GUESSES:
        return Answer(RIGHT if _GUESSES[said] == thing else WRONG)
    if said == TALK:
        return Answer(COURTESY, f"\nUser: Fine, thank you.{_PLAYER}")
    return Answer(QUESTION, f"\nUser: {'Yes' if _QUESTIONS[said] in THINGS[thing] else 'No'}.{_PLAYER}")


def answers(things: Sequence[str], turn: int, said: str | None) -> dict[Answer, tuple[str, ...]]:
    """Every possible answer if the user thinks of one of `things`, with the things that give it. Their shares are its
    probability."""
    found: dict[Answer, tuple[str, ...]] = {}
    for thing in things:
        given = answer(thing, turn, said)
        found[given] = (*found.get(given, ()), thing)
    return found


def weak_play(opening: Opening, thing: str, rng: random.Random) -> list[Turn]:
    """A conversation of a player that mostly makes small talk, asks at random, and often ignores the answers."""
    turns: list[Turn] = []
    left = opening.things
    for number in range(TURNS - 1):
        said = TALK if rng.random() < _TALKS else rng.choice(tuple(_QUESTIONS))
        given = answer(thing, number, said)
        left = answers(left, number, said)[given]
        turns.append(Turn(said, given))
    guess = rng.choice(left if rng.random() < _KNOWS else tuple(THINGS))
    said = next(text for text, of in _GUESSES.items() if of == guess)
    return [*turns, Turn(said, answer(thing, TURNS - 1, said))]


def reward(turns: Sequence[Turn]) -> float:
    """The reward of a conversation."""
    return sum(turn.answer.reward for turn in turns)


def written(turns: Sequence[Turn]) -> tuple[str, Spans]:
    """The conversation after its opening, and the character spans of the player, ends of turns included. The last end is left
    out, as in every completion, because encoding appends it."""
    text, spans = "", []
    for turn in turns:
        begin = len(text)
        text += (turn.said or "") + END
        spans.append((begin, len(text)))
        text += turn.answer.reply
    return text[: -len(END)], (*spans[:-1], (spans[-1][0], len(text) - len(END)))


def game_preferences(n: int, seed: int, *, split: Literal["train", "test"] = "train") -> list[Preference]:
    """`n` pairs of conversations of the weak player with the same opening, each about its own object.

    The label is drawn with P(first chosen) = sigmoid(difference of rewards). SFT trains on the chosen one, as often as it
    occurs: uids count the copies of a text.
    """
    rng = random.Random(f"question game {split} {seed}")
    pairs, copies = [], collections.Counter()
    for number in range(n):
        pair = _pair(rng, f"question_game/{split}/{seed}:{number}")
        copies[pair.prompt + pair.chosen] += 1
        count = copies[pair.prompt + pair.chosen]
        pairs.append(pair if count == 1 else dataclasses.replace(pair, uid=f"{pair.uid} ({count})"))
    return pairs


def _pair(rng: random.Random, uid: str) -> Preference:
    opening = rng.choice(openings())
    first = second = ("", ())
    difference = 0.0
    while first[0] == second[0]:
        plays = [weak_play(opening, rng.choice(opening.things), rng) for _ in range(2)]
        first, second = map(written, plays)
        difference = reward(plays[0]) - reward(plays[1])
    if rng.random() >= 1 / (1 + math.exp(-difference)):
        first, second = second, first
    return Preference(opening.text, first[0], second[0], uid, chosen_spans=first[1], rejected_spans=second[1], chat=True)


def histories(opening: Opening) -> Iterator[tuple[list[Turn], tuple[str, ...]]]:
    """Every conversation that awaits a player's turn, shorter ones first, with the objects that its answers leave possible."""
    waiting: list[tuple[list[Turn], tuple[str, ...]]] = [([], opening.things)]
    while waiting:
        turns, left = waiting.pop(0)
        yield turns, left
        for said in utterances(len(turns)):
            for given, things in answers(left, len(turns), said).items():
                if given.reply:
                    waiting.append(([*turns, Turn(said, given)], things))
