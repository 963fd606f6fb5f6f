"""Mismatched completions for single labeled completions, from which KTO estimates a KL divergence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dpo_jax.data.encode import Encoded, prompt_key


def mismatched(examples: Sequence[Encoded], *, max_length: int) -> list[Encoded]:
    """Single completions, in the order given, with a completion of another example as `rejected`.

    It is that of the next example (cyclically) with the same label, a different prompt and a different completion, cut to
    `max_length` tokens with this prompt. Its scored tokens stay the same. So the mismatched completions are as often desirable
    as the others: KTO's estimate of the KL would follow the desirable ones alone if each half of a pair took the next one's
    chosen completion. If there is none with this label, one with the other label is taken, and if there is none at all, that
    of the next example. The rule depends only on the order of the data, so a resumed run and the reference cache find the same.

    >>> ids = [np.int32([i, 0]) for i in range(1, 9)]
    >>> one, two, three = (Encoded(ids[p], ids[c], ids[c], desirable=True) for p, c in ((0, 4), (0, 5), (1, 6)))
    >>> [one.rejected.tolist() for one in mismatched([one, two, three], max_length=8)]
    [[7, 0], [7, 0], [5, 0]]
    """
    by_label: dict[bool, list[int]] = {}
    for number, example in enumerate(examples):
        by_label.setdefault(bool(example.desirable), []).append(number)
    source: list[int | None] = [None] * len(examples)
    for members in by_label.values():
        for number, place in zip(members, _next_mismatched([examples[number] for number in members]), strict=True):
            source[number] = None if place is None else members[place]
    if None in source:
        every = _next_mismatched(examples)
        source = [every[number] if place is None else place for number, place in enumerate(source)]
    following = [(number + 1) % len(examples) if place is None else place for number, place in enumerate(source)]
    return [
        _with_completion_of(example, examples[place], max_length) for example, place in zip(examples, following, strict=True)
    ]


def _with_completion_of(example: Encoded, other: Encoded, max_length: int) -> Encoded:
    """`example` with the completion of `other` as `rejected`, cut to the room after its own prompt."""
    completion, scored = other.sides[0]
    end = max(1, max_length - len(example.prompt))
    # If the cut leaves no scored token, for example after context turns, everything left is scored.
    scored = None if scored is None or not scored[:end].any() else scored[:end]
    return dataclasses.replace(example, rejected=completion[:end], rejected_scored=scored)


def _next_mismatched(examples: Sequence[Encoded]) -> list[int | None]:
    """For each example: the place of the next one (cyclically) with another prompt and another completion; None without one."""
    count = len(examples)
    prompts, completions = (
        list(keys) for keys in zip(*((prompt_key(one), one.chosen.tobytes()) for one in examples), strict=True)
    )
    past_prompt, past_completion = _next_other(prompts), _next_other(completions)
    found: list[int | None] = []
    for number in range(count):
        place = number + 1
        while place < number + count:
            here = place % count
            if prompts[here] == prompts[number]:
                place = past_prompt[place]
            elif completions[here] == completions[number]:
                place = past_completion[place]
            else:
                break
        found.append(place % count if place < number + count else None)
    return found


def one_prompt(examples: Sequence[Encoded]) -> bool:
    """Whether all have the same prompt, so that no completion is mismatched."""
    return len({prompt_key(one) for one in examples}) == 1


def _next_other(keys: Sequence[bytes]) -> list[int]:
    """For each place of the doubled sequence: the next place with a different key, or the end."""
    count = len(keys)
    following = [2 * count] * (2 * count)
    for place in range(2 * count - 2, -1, -1):
        same = keys[place % count] == keys[(place + 1) % count]
        following[place] = following[place + 1] if same else place + 1
    return following
