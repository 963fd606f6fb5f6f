"""Synthetic scenes of colored shapes with captions, in which every hallucinated object can be counted.

    a red circle, a blue square and a green cross.

A scene holds two or three objects of 16 kinds (four colors, four shapes) on a noisy gray ground, `SIZE` x `SIZE` RGB pixels.
Some kinds often occur together (`companion`). A language model learns to expect the companion, which is a source of
hallucinations in vision-language models (Rohrbach et al. 2018; their measure CHAIR is `Count.hallucinated` over
`Count.mentioned`).

A pure function of (n, seed, split). The vocabulary is `WORDS`: the token ids of a caption are word indices.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

COLORS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.75, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.9, 0.2),
}
SHAPES = ("circle", "square", "triangle", "cross")
CELLS, CELL, DIAMETER = 3, 8, 7  # objects are in a grid of CELLS x CELLS, each shifted by at most one pixel
SIZE = CELLS * CELL  # pixels per side
GROUND, NOISE = 0.35, 0.04
FEWEST, MOST = 2, 3  # objects per scene
_TOGETHER = 0.35  # probability that the next object is the companion of the previous one


class Thing(NamedTuple):
    """A kind of object: color and shape."""

    color: str
    shape: str


THINGS = tuple(itertools.starmap(Thing, itertools.product(COLORS, SHAPES)))
END = "<end>"
MARKS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
WORDS = (END, "a", ",", "and", ".", *COLORS, *SHAPES, *MARKS)
"""The vocabulary, by token id. A caption ends with END, which is not part of its text; MARKS form the prompt (`prompt_ids`)."""


class Scene(NamedTuple):
    """A scene: `things` are distinct kinds in the order drawn; `image` is float32[SIZE, SIZE, 3] in [0, 1]."""

    things: tuple[Thing, ...]
    image: np.ndarray


class Count(NamedTuple):
    """Counts of the object kinds in a caption, each kind once."""

    mentioned: int
    hallucinated: int  # mentioned but absent
    recalled: int  # mentioned and present
    there: int  # in the scene


def scenes(n: int, seed: int, *, split: Literal["train", "pairs", "test"] = "train") -> list[Scene]:
    """`n` scenes; other splits and seeds are drawn independently."""
    rng = np.random.default_rng([seed, ("train", "pairs", "test").index(split)])
    return [_scene(rng) for _ in range(n)]


def companion(thing: Thing) -> Thing:
    """The kind that often occurs with `thing`: the next color and the next shape."""
    colors = tuple(COLORS)
    after = colors[(colors.index(thing.color) + 1) % len(colors)]
    return Thing(after, SHAPES[(SHAPES.index(thing.shape) + 1) % len(SHAPES)])


def _scene(rng: np.random.Generator) -> Scene:
    things: list[Thing] = []
    for _ in range(rng.integers(FEWEST, MOST + 1)):
        expected = companion(things[-1]) if things and rng.random() < _TOGETHER else None
        things.append(expected if expected is not None and expected not in things else _other(things, rng))
    return Scene(tuple(things), render(things, rng))


def _other(things: Sequence[Thing], rng: np.random.Generator) -> Thing:
    """A kind that is not among `things`."""
    absent = [thing for thing in THINGS if thing not in things]
    return absent[rng.integers(len(absent))]


def render(things: Sequence[Thing], rng: np.random.Generator) -> np.ndarray:
    """A picture of `things`, each in its own cell: float32[SIZE, SIZE, 3] in [0, 1]."""
    image = np.full((SIZE, SIZE, 3), GROUND)
    for thing, cell in zip(things, rng.permutation(CELLS * CELLS), strict=False):
        corner = np.array(divmod(int(cell), CELLS)) * CELL + rng.integers(0, CELL - DIAMETER + 1, 2)
        top, left = corner.tolist()
        image[top : top + DIAMETER, left : left + DIAMETER][_mask(thing.shape)] = COLORS[thing.color]
    return np.clip(image + rng.normal(0, NOISE, image.shape), 0, 1).astype(np.float32)


def _mask(shape: str) -> np.ndarray:
    """The mask of a shape, bool[DIAMETER, DIAMETER]."""
    middle = (DIAMETER - 1) / 2
    y, x = np.mgrid[:DIAMETER, :DIAMETER] - middle
    radius = np.hypot(x, y)
    masks = {
        "circle": radius <= middle + 0.4,
        "square": np.maximum(abs(x), abs(y)) <= middle,
        "triangle": 2 * abs(x) <= y + middle + 0.5,
        "cross": np.minimum(abs(x), abs(y)) <= 1,
    }
    return masks[shape]


# Captions


def caption(things: Iterable[Thing]) -> str:
    """The sentence that names `things` (at least one) in order."""
    *before, last = (f"a {thing.color} {thing.shape}" for thing in things)
    return f"{' and '.join(filter(None, [', '.join(before), last]))}."


def careless(things: Sequence[Thing], rng: np.random.Generator, *, adds: float, omits: float) -> tuple[Thing, ...]:
    """What a careless annotator names, in random order: each of `things` is omitted with probability `omits` (one always
    stays), and with probability `adds` an absent kind is named."""
    kept = [thing for thing in things if rng.random() >= omits] or [things[int(rng.integers(len(things)))]]
    if rng.random() < adds:
        kept.append(absent(things, rng))
    return tuple(kept[number] for number in rng.permutation(len(kept)))


def absent(things: Sequence[Thing], rng: np.random.Generator, *, named: Sequence[Thing] = ()) -> Thing:
    """A kind that is neither present nor already `named`: half of the time a companion of a present one, if possible."""
    taken = {*things, *named}
    expected = [one for thing in things if (one := companion(thing)) not in taken]
    return expected[rng.integers(len(expected))] if expected and rng.random() < 0.5 else _other(list(taken), rng)


def spoilt(named: Sequence[Thing], things: Sequence[Thing], rng: np.random.Generator, *, omits: float) -> tuple[Thing, ...]:
    """A worse version of `named`, with one error: an absent kind is added or, with probability `omits`, a present one is left
    out."""
    found = list(named)
    right = [place for place, thing in enumerate(found) if thing in things]
    if rng.random() < omits and right and len(found) > 1:
        del found[right[rng.integers(len(right))]]
    else:
        found.insert(rng.integers(len(found) + 1), absent(things, rng, named=named))
    return tuple(found)


def mentioned(text: str) -> tuple[Thing, ...]:
    """The distinct kinds that a text names: a color followed by a shape. Anything else is ignored."""
    words = re.findall(r"\w+", text)
    pairs = (Thing(*pair) for pair in itertools.pairwise(words))
    return tuple(dict.fromkeys(thing for thing in pairs if thing.color in COLORS and thing.shape in SHAPES))


def count(text: str, things: Sequence[Thing]) -> Count:
    """The counts for a caption of a scene with `things`."""
    named = mentioned(text)
    right = sum(thing in things for thing in named)
    return Count(len(named), len(named) - right, right, len(things))


def prompt_ids(tokens: int) -> np.ndarray:
    """The prompt of every scene: the place of an image of `tokens` tokens, int32[tokens + 2]."""
    start, soft, end = map(WORDS.index, MARKS)
    return np.array([start, *[soft] * tokens, end], np.int32)


def caption_ids(text: str) -> np.ndarray:
    """Token ids of a caption followed by END: int32[n]. Raises ValueError for a word that is not in `WORDS`."""
    words = re.findall(r"\w+|[^\w\s]", text)
    if unknown := [word for word in words if word not in WORDS[1:]]:
        raise ValueError(f"{unknown[0]!r} is not a word of captions; they are {', '.join(WORDS[1:])}")
    return np.array([*(WORDS.index(word) for word in words), 0], np.int32)


def caption_text(ids: Iterable[int]) -> str:
    """The text of token ids up to END. Ids outside the vocabulary become '?'."""
    words = [WORDS[number] if 0 <= number < len(WORDS) else "?" for number in itertools.takewhile(bool, map(int, ids))]
    return re.sub(r" (?=[,.])", "", " ".join(words))
