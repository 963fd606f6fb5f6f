"""Sampling of completions for many prompts in batches of one compiled shape."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.data.encode import PromptImages, image_bytes
from dpo_jax.data.layout import Completion, completion_rows
from dpo_jax.data.loader import image_shape_of, round_up
from dpo_jax.data.tokenizer import decode_completion
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.progress import reported
from dpo_jax.sampling import Samples, generate, left_pad, left_pad_images
from dpo_jax.types import Model, Partitioner, Variables

WIDTHS = 16  # rows of given completions have lengths in steps of so many tokens
QUEUE = 8  # completions per call, as a multiple of those drawn at a time: the rest queue for a free lane
COLUMNS = 1 << 15  # columns of cache beyond which no completions are queued


class Completions(NamedTuple):
    ids: list[np.ndarray]  # up to and including the stop token, if one was drawn
    texts: list[str]  # the text added to the prompt, without the stop token
    finished: np.ndarray  # bool[B]  a stop token was drawn
    logps: np.ndarray  # float32[B], in nats


class Completer:
    """`complete(variables, prompts, key) -> Completions`, about `batch` completions at a time.

    Consecutive equal prompts are several completions of one prompt, with a single prefill. A completion that has ended frees
    its lane for the next one (`sampling.generate`). A completion depends only on `key` and its number in `prompts`, not on
    batches.

    `variables` are the partitioner's. `stop_ids` are the tokens that end a completion: `models.hf.end_tokens` and the
    tokenizer's EOS. `width`: columns for prompts. Longer prompts take the columns they need, with a program for each number.
    `sampling`: `temperature`, `top_k` and `top_p` of `sampling.generate`.
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
        width: int = 0,
        **sampling: Any,
    ) -> None:
        self.partitioner, self.model, self.tokenizer, self.stop_ids = partitioner, model, tokenizer, tuple(stop_ids)
        self.max_new_tokens, self.batch, self.width, self.sampling = max_new_tokens, batch, width, sampling
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        variables: Variables,
        prompts: Sequence[np.ndarray],
        key: jax.Array,
        *,
        images: Sequence[PromptImages | None] | None = None,
    ) -> Completions:
        """`images`: those of each prompt. Raises ValueError if the longest prompt leaves no room in the position table."""
        longest, images = max(prompts, key=len), images or [None] * len(prompts)
        room = self.model.config.max_positions - len(longest)
        if room < 1:
            raise ValueError(
                f"the longest prompt has {len(longest)} tokens, but the model reads {self.model.config.max_positions}"
            )
        new_tokens, columns = min(self.max_new_tokens, room), round_up(max(self.width, len(longest)), 8)
        shards, (part, parts) = self.partitioner.row_shards, self.partitioner.host_part
        told = [np.frombuffer(ids.tobytes() + image_bytes(one), np.uint8) for ids, one in zip(prompts, images, strict=True)]
        shape = call_shape(told, batch=self.batch, columns=columns, new_tokens=new_tokens, shards=shards)
        largest = max((one for one in images if one is not None), key=lambda one: one.columns, default=None)
        draw, size = self._draw(new_tokens, shape), shape.prompts * shape.completions
        keys = np.asarray(jax.random.key_data(jax.random.split(key, round_up(len(prompts), size))))
        mine = slice(part * shape.prompts // parts, (part + 1) * shape.prompts // parts)
        ids, logps = [], []
        with reported("sampling", total=len(prompts), unit="completions", brief=True) as task:
            for start in range(0, len(prompts), size):
                here = slice(start, start + size, shape.completions)
                # Full batches and one width, so that the loop compiles once; the padding is discarded.
                filled = [*prompts[here], *[longest] * shape.prompts][: shape.prompts]
                tokens, lengths = left_pad(filled, multiple_of=columns)
                of_prompt = keys[start : start + size].reshape(shape.prompts, shape.completions, -1)
                rows: dict[str, Any] = {"tokens": tokens[mine], "lengths": lengths[mine], "keys": of_prompt[mine]}
                if largest is not None:
                    shown = [*images[here], *[None] * shape.prompts][: shape.prompts][mine]
                    image_shape = largest.columns, largest.width
                    rows["images"] = left_pad_images(shown, lengths[mine], columns=columns, image_shape=image_shape)
                samples = draw(variables, rows)
                count = min(size, len(prompts) - start)
                ids += [samples.tokens[row, : int(samples.lengths[row])] for row in range(count)]
                logps.append(samples.logps[:count])
                task.advance(count)
                pause()
        texts = [
            decode_completion(self.tokenizer, prompt, row, stop_ids=self.stop_ids)
            for prompt, row in zip(prompts, ids, strict=True)
        ]
        finished = np.array([int(row[-1]) in self.stop_ids for row in ids])
        return Completions(ids, texts, finished, np.concatenate(logps))

    def _draw(self, new_tokens: int, shape: CallShape) -> Any:
        def draw(variables: Variables, rows: dict[str, Any]) -> Samples:
            here = rows["tokens"].shape[0]  # under pmap, the rows of one device
            keys = jax.random.wrap_key_data(rows["keys"].reshape(here * shape.completions, -1))
            return generate(
                self.model,
                variables,
                rows["tokens"],
                rows["lengths"],
                keys,
                max_new_tokens=new_tokens,
                eos_id=self.stop_ids,
                completions=shape.completions,
                lanes=max(1, shape.lanes * here // shape.prompts),
                images=rows.get("images"),
                **self.sampling,
            )

        if (new_tokens, shape) not in self._compiled:
            self._compiled[new_tokens, shape] = self.partitioner.compile_map(draw)
        return self._compiled[new_tokens, shape]


class CallShape(NamedTuple):
    """The sizes of one call of `sampling.generate`, for all devices together."""

    prompts: int  # a multiple of the row shards
    completions: int  # of each
    lanes: int  # drawn at a time


def call_shape(prompts: Sequence[np.ndarray], *, batch: int, columns: int, new_tokens: int, shards: int) -> CallShape:
    """Shape of the calls into which `prompts`, repeated for several completions, are cut.

    About `batch` completions are drawn at a time, and up to `QUEUE` times as many are in a call: the others are queued. None
    are queued if the columns of their prompts would make the cache larger than `COLUMNS`.
    """
    lanes, rest = round_up(min(batch, len(prompts)), shards), len(prompts)
    times, most = repeats(prompts), max(1, min(rest, QUEUE * lanes) // shards)
    completions = max(n for n in range(1, min(times, most) + 1) if times % n == 0)
    free = COLUMNS - lanes * (columns + new_tokens - 1)
    at_once = min(QUEUE * lanes // completions, free // columns)
    if at_once * completions < 2 * lanes:
        at_once = lanes // completions
    at_once = max(shards, at_once - at_once % shards)
    calls = -(-rest // (completions * at_once))
    each = round_up(-(-rest // (completions * calls)), shards)
    turns = -(-each * completions // lanes)
    return CallShape(each, completions, round_up(-(-each * completions // turns), shards))


def repeats(prompts: Sequence[np.ndarray]) -> int:
    """The largest K for which `prompts` consist of runs of K equal prompts.

    >>> repeats([np.array([5]), np.array([5]), np.array([6]), np.array([6])])
    2
    """
    changes = [
        number for number, (a, b) in enumerate(itertools.pairwise(prompts), 1) if a is not b and not np.array_equal(a, b)
    ]
    return functools.reduce(math.gcd, np.diff([0, *changes, len(prompts)]).tolist())


def map_completions(
    partitioner: Partitioner,
    compiled: Any,
    variables: Variables,
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    *,
    scored: Sequence[np.ndarray | None] | None = None,
    images: Sequence[PromptImages | None] | None = None,
    batch: int = 64,
    length: int | None = None,
) -> Any:
    """Applies `compiled(variables, rows)` of `Partitioner.compile_map` to given completions: arrays [B, ...], in their order.

    `scored`: for each completion bool[n], its scored tokens (None: all). `images`: those of each prompt. About `batch`
    completions at a time, one per row, grouped by length: a program for each step of `WIDTHS` tokens, up to `length`.
    """
    none = [None] * len(prompts)
    every = [Completion(*text) for text in zip(prompts, completions, scored or none, images or none, strict=True)]
    image_shape = image_shape_of(every)
    sizes = np.array([len(text.prompt) + len(text.completion) for text in every])
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
            width = width if length is None else min(width, length)
            rows = completion_rows(mine, length=width, image_shape=image_shape)
            found.append(compiled(variables, rows))
            task.advance(len(here))
            pause()
    back = np.argsort(order)
    return jax.tree.map(lambda *batches: np.concatenate(batches)[: len(every)][back], *found)
