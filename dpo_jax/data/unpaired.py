"""Mismatched completions for single labeled completions, from which KTO estimates a KL divergence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dpo_jax.data.encode import Encoded, prompt_key


def mismatched(examples: Sequence[Encoded], *, max_length: int) -> list[Encoded]:
    """Single completions, in the order given, with a completion of another example as `rejected`.

    It is that of the next example (cyclically) with a different prompt and a different completion, cut to `max_length` tokens
    with this prompt. Its scored tokens stay the same. If all have one prompt or one completion, it is that of the next example.
    The rule depends only on the order of the data, so a resumed run and the reference cache find the same.

    >>> ids = [np.int32([i, 0]) for i in range(1, 9)]
    >>> one, two, three = (Encoded(ids[p], ids[c], ids[c], desirable=True) for p, c in ((0, 4), (0, 5), (1, 6)))
    >>> [one.rejected.tolist() for one in mismatched([one, two, three], max_length=8)]
    [[7, 0], [7, 0], [5, 0]]
    """
    count = len(examples)
    prompts, completions = (
        list(keys) for keys in zip(*((prompt_key(one), one.chosen.tobytes()) for one in examples), strict=True)
    )
    past_prompt, past_completion = _next_other(prompts), _next_other(completions)
    found = []
    for number, example in enumerate(examples):
        place = number + 1
        while place < number + count:
            here = place % count
            if prompts[here] == prompts[number]:
                place = past_prompt[place]
            elif completions[here] == completions[number]:
                place = past_completion[place]
            else:
                break
        else:
            place = number + 1
        other, scored = examples[place % count].sides[0]
        end = max(1, max_length - len(example.prompt))
        # If the cut leaves no scored token, for example after context turns, everything left is scored.
        scored = None if scored is None or not scored[:end].any() else scored[:end]
        found.append(dataclasses.replace(example, rejected=other[:end], rejected_scored=scored))
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
