"""Sample completions of many prompts in batches of one compiled shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.data.layout import completion_rows
from dpo_jax.data.loader import round_up
from dpo_jax.data.tokenizer import decode_completion
from dpo_jax.runtime.progress import reported
from dpo_jax.sampling import Samples, generate, left_pad
from dpo_jax.types import Model, Partitioner, Variables

WIDTHS = 16  # tokens by which the rows of given completions differ


class Completions(NamedTuple):
    ids: list[np.ndarray]  # without what comes after a stop token; that itself included where it was drawn
    texts: list[str]  # what each adds to its prompt's text; without the stop token
    finished: np.ndarray  # bool[B]  a stop token was drawn
    logps: np.ndarray  # float32[B], in nats


class Completer:
    """`complete(variables, prompts, key) -> Completions`, about `batch` prompts at a time. One program per width of prompts.

    `variables` are the partitioner's. A prompt's completion depends on `key` and the prompt's number alone, not on batches.
    `stop_ids` are the tokens that end a completion: `models.hf.end_tokens` and the tokenizer's EOS. `sampling`: `temperature`,
    `top_k` and `top_p` of `sampling.generate`.
    """

    def __init__(
        self,
        partitioner: Partitioner,
        model: Model,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        batch: int = 64,
        **sampling: Any,
    ) -> None:
        self.partitioner, self.model, self.tokenizer, self.stop_ids = partitioner, model, tokenizer, tuple(stop_ids)
        self.max_new_tokens, self.batch, self.sampling = max_new_tokens, batch, sampling
        self._compiled: dict[int, Any] = {}

    def __call__(self, variables: Variables, prompts: Sequence[np.ndarray], key: jax.Array) -> Completions:
        """Raises ValueError where the longest prompt leaves no room in the position table."""
        longest = max(prompts, key=len)
        room = self.model.config.max_positions - len(longest)
        if room < 1:
            raise ValueError(
                f"the longest prompt has {len(longest)} tokens, and the model reads {self.model.config.max_positions}"
            )
        draw = self._draw(min(self.max_new_tokens, room))
        # Whole batches and one width, so that the loop compiles once; the fillers are thrown away.
        batch = round_up(min(self.batch, len(prompts)), self.partitioner.row_shards)
        part, parts = self.partitioner.host_part
        mine = slice(part * batch // parts, (part + 1) * batch // parts)
        keys = np.asarray(jax.random.key_data(jax.random.split(key, round_up(len(prompts), batch))))
        ids, logps = [], []
        with reported("sampling", total=len(prompts), unit="completions", brief=True) as task:
            for start in range(0, len(prompts), batch):
                here = prompts[start : start + batch]
                tokens, lengths = left_pad([*here, *[longest] * (batch + 1 - len(here))])
                rows = {"tokens": tokens[:-1][mine], "lengths": lengths[:-1][mine], "keys": keys[start : start + batch][mine]}
                samples = draw(variables, rows)
                ids += [samples.tokens[row, : int(samples.lengths[row])] for row in range(len(here))]
                logps.append(samples.logps[: len(here)])
                task.advance(len(here))
        texts = [
            decode_completion(self.tokenizer, prompt, row, stop_ids=self.stop_ids)
            for prompt, row in zip(prompts, ids, strict=True)
        ]
        finished = np.array([int(row[-1]) in self.stop_ids for row in ids])
        return Completions(ids, texts, finished, np.concatenate(logps))

    def _draw(self, new_tokens: int) -> Any:
        def draw(variables: Variables, rows: dict[str, Any]) -> Samples:
            keys = jax.random.wrap_key_data(rows["keys"])
            options = {"max_new_tokens": new_tokens, "eos_id": self.stop_ids, **self.sampling}
            return generate(self.model, variables, rows["tokens"], rows["lengths"], keys, **options)

        if new_tokens not in self._compiled:
            self._compiled[new_tokens] = self.partitioner.compile_map(draw)
        return self._compiled[new_tokens]


def map_completions(
    partitioner: Partitioner,
    compiled: Any,
    variables: Variables,
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    *,
    batch: int = 64,
    length: int | None = None,
) -> Any:
    """`compiled(variables, rows)` of `Partitioner.compile_map`, over given completions: its arrays [B, ...], in their order.

    About `batch` at a time, one completion a row, those of like length together: a program for each step of `WIDTHS` tokens, up
    to `length`.
    """
    every = list(zip(prompts, completions, strict=True))
    sizes = np.array([len(p) + len(c) for p, c in every])
    order = np.argsort(sizes, kind="stable")
    batch = round_up(min(batch, len(every)), partitioner.row_shards)
    part, parts = partitioner.host_part
    found = []
    with reported("scoring", total=len(every), unit="completions", brief=True) as task:
        for start in range(0, len(every), batch):
            here = order[start : start + batch]
            filled = [every[i] for i in (*here, *[here[0]] * (batch - len(here)))]
            mine = filled[part * batch // parts : (part + 1) * batch // parts]
            width = round_up(sizes[here].max(), WIDTHS)
            rows = completion_rows(mine, length=width if length is None else min(width, length))
            found.append(compiled(variables, rows))
            task.advance(len(here))
    back = np.argsort(order)
    return jax.tree.map(lambda *batches: np.concatenate(batches)[: len(every)][back], *found)
