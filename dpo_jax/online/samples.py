"""Completions sampled from a policy for the prompts of a round, with log-probabilities, and their file format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.lab.world import Prompts
from dpo_jax.types import Variables
from dpo_jax.untrusted import Unreadable

ROW = {"number": int, "prompt": str, "prompt_ids": [int], "completion": str, "ids": [int], "logp": float, "ref_logp": float}
"""A line of `samples.jsonl`; lines of the same prompt are consecutive."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """K completions of each of N prompts, drawn from a policy at temperature 1.

    numbers             int64[N]     numbers of these prompts in the pool
    prompts             N texts, and their token ids
    ids, texts          [N][K]       token ids as sampled, with the stop token if there was one; texts without it
    logps, ref_logps    float32[N, K]  log pi(y|x) of the policy that drew them, and of the reference, in nats
    """

    numbers: np.ndarray
    prompts: Prompts
    ids: Sequence[Sequence[np.ndarray]]
    texts: Sequence[Sequence[str]]
    logps: np.ndarray
    ref_logps: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, chosen: Sequence[int] | np.ndarray) -> Samples:
        """The samples of the prompts at positions `chosen`."""
        some = [int(i) for i in chosen]
        ids, texts = [self.ids[i] for i in some], [self.texts[i] for i in some]
        return Samples(self.numbers[some], self.prompts.of(some), ids, texts, self.logps[some], self.ref_logps[some])

    def implicit_rewards(self, beta: float) -> np.ndarray:
        """beta log(pi / pi_ref) of the policy that drew them: float64[N, K]; eq. 5 up to a constant per prompt."""
        return beta * (self.logps.astype(np.float64) - self.ref_logps.astype(np.float64))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of `samples.jsonl`."""
        for n, number in enumerate(self.numbers.tolist()):
            prompt = {"number": number, "prompt": self.prompts.texts[n], "prompt_ids": self.prompts.ids[n].tolist()}
            for k, (ids, text) in enumerate(zip(self.ids[n], self.texts[n], strict=True)):
                logps = {"logp": float(self.logps[n, k]), "ref_logp": float(self.ref_logps[n, k])}
                yield {**prompt, "completion": text, "ids": ids.tolist(), **logps}


def read_samples(rows: Sequence[Mapping[str, Any]], *, completions: int) -> Samples:
    """The samples in lines of `Samples.rows`, `completions` of each prompt. Raises `Unreadable` for other lines."""
    if not rows or len(rows) % completions:
        raise Unreadable(f"{len(rows)} lines are not {completions} completions of each prompt")
    first, shape = rows[::completions], (-1, completions)
    prompts = Prompts([row["prompt"] for row in first], [np.array(row["prompt_ids"], np.int32) for row in first])
    several = [rows[start : start + completions] for start in range(0, len(rows), completions)]
    return Samples(
        np.array([row["number"] for row in first], np.int64),
        prompts,
        [[np.array(row["ids"], np.int32) for row in its] for its in several],
        [[row["completion"] for row in its] for its in several],
        *(np.array([row[name] for row in rows], np.float32).reshape(shape) for name in ("logp", "ref_logp")),
    )


def sample_completions(
    complete: Callable[..., Any],
    logps: Callable[..., np.ndarray],
    variables: Variables,
    prompts: Prompts,
    completions: int,
    key: jax.Array,
    *,
    reference: Variables,
    at_reference: bool = False,
    numbers: np.ndarray | None = None,
) -> Samples:
    """Samples K = `completions` of each prompt from the policy `variables`, with log-probabilities of policy and reference.

    `complete(variables, ids, key)` is a `Completer`, `logps(variables, prompt_ids, ids) -> [B]` as `World.logps`. The policy's
    are those of the sampler, or with `at_reference`, if the policy has the weights of the reference, those of the reference, so
    that implicit rewards and KL are exactly 0. `numbers` are the numbers of the prompts in the pool.
    """
    repeated = prompts.repeated(completions)
    drawn = complete(variables, repeated.ids, key)
    ref = np.asarray(logps(reference, repeated.ids, drawn.ids), np.float32).reshape(-1, completions)
    own = ref if at_reference else np.asarray(drawn.logps, np.float32).reshape(-1, completions)
    places = range(0, len(drawn.ids), completions)
    ids, texts = ([all_of[i : i + completions] for i in places] for all_of in (drawn.ids, drawn.texts))
    numbers = np.arange(len(prompts.ids)) if numbers is None else numbers
    return Samples(np.asarray(numbers, np.int64), prompts, ids, texts, own, ref)


def encoded_pairs(samples: Samples, pairs: np.ndarray, *, name: str = "samples") -> tuple[list[Encoded], np.ndarray]:
    """`pairs[P, 3]` of `choose_pairs` as token ids, exactly as sampled, and their ref_logps, float32[P, 2].

    A completion that was truncated at the longest length gets no stop token: its probability is that of the sampled tokens.
    """
    encoded = [
        Encoded(samples.prompts.ids[n], samples.ids[n][chosen], samples.ids[n][rejected], uid=f"{name}:{n}:{chosen}-{rejected}")
        for n, chosen, rejected in pairs.tolist()
    ]
    ref_logps = np.stack([samples.ref_logps[pairs[:, 0], pairs[:, side]] for side in (1, 2)], axis=1)
    return encoded, ref_logps
