"""Completions of held-out prompts: a few at each evaluation of training, and the prompts that evaluation shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.prompts import IMAGE
from dpo_jax.data.display import chat_turns, shown_prompt
from dpo_jax.data.encode import Encoded, prompt_key
from dpo_jax.data.image_rows import image_marks
from dpo_jax.data.terminal import json_text, printable
from dpo_jax.evals.completions import Completer
from dpo_jax.report.health import repetition
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.types import Model, Partitioner, Variables
from dpo_jax.writing import writing

Sampler = Callable[[Variables, int], dict[str, float]]
"""(variables, steps taken) -> measures of the samples by name."""
_SHOWN = 200  # characters of the printed sample


def sampler_of(
    config: Config,
    run_dir: RunDir,
    partitioner: Partitioner,
    model: Model,
    tokenizer: Any,
    held_out: Sequence[Encoded],
) -> Sampler:
    """A function that completes the first `dpo.eval_samples` held-out prompts and writes `samples/step-00000400.jsonl`.

    It takes the same random numbers each time, so that completions of two steps differ by the policy alone. It returns their
    mean length in tokens (`samples/tokens`), the share that did not end within `eval.max_new_tokens` (`samples/cut`), and the
    mean share of 4-grams that occurred before in their sample (`samples/repetition`).
    """
    if not config.dpo.eval_samples:
        return lambda variables, step: {}
    shown = distinct_prompts(held_out, config.dpo.eval_samples)
    prompts, images = [pair.prompt for pair in shown], [pair.images for pair in shown]
    if (longest := max(map(len, prompts))) >= (most := model.config.max_positions):
        raise ConfigError(
            f"dpo.eval_samples: the longest prompt has {longest} tokens, but the model reads {most}; "
            "lower --data.max-prompt-length, or set it to 0"
        )
    stop_ids = build.stop_ids(tokenizer, config.dpo_policy())
    complete = Completer(partitioner, model, tokenizer, stop_ids=stop_ids, max_new_tokens=config.eval.max_new_tokens)
    lines, key = [prompt_line(pair, tokenizer) for pair in shown], jax.random.key(config.run.seed)

    def sample(variables: Variables, step: int) -> dict[str, float]:
        found = complete(variables, prompts, key, images=images)
        if is_first():
            _write(run_dir, step, lines, found.texts, found.finished)
        return {
            "samples/tokens": float(np.mean([len(ids) for ids in found.ids])),
            "samples/cut": 1 - float(np.mean(found.finished)),
            "samples/repetition": float(np.mean([repetition(ids) for ids in found.ids])),
        }

    return sample


def _write(run_dir: RunDir, step: int, lines: Sequence[dict[str, Any]], texts: Sequence[str], finished: np.ndarray) -> None:
    """One file for each step: an evaluation that is repeated after a kill replaces its own."""
    folder = run_dir.path / "samples"
    folder.mkdir(exist_ok=True)
    with writing(folder / f"step-{step:08}.jsonl") as file:
        for line, text, ended in zip(lines, texts, finished, strict=True):
            file.write(json_text({**line, "completion": text, "finished": bool(ended)}) + "\n")
    prompt, completion = " ".join(shown_prompt(lines[0]).split()), " ".join(printable(texts[0]).split())
    more = "..." if len(completion) > _SHOWN else ""
    print(f"sample @{step}: {'...' * (len(prompt) > 80)}{prompt[-80:]} -> {completion[:_SHOWN]}{more}", flush=True)


def distinct_prompts(held_out: Sequence[Encoded], count: int) -> list[Encoded]:
    """The first `count` pairs that differ in prompt or images."""
    return list({prompt_key(pair): pair for pair in held_out}.values())[:count]


def prompt_line(pair: Encoded, tokenizer: Any) -> dict[str, Any]:
    """A pair's prompt as text, without a BOS that the text does not contain; its turns, and digests of its images, if any."""
    text = tokenizer.decode(pair.prompt[int(pair.bos_added) :])
    images = {} if pair.images is None else {"images": list(pair.images.names)}
    place = image_marks(tokenizer).place if images else ""
    text = image_marks(tokenizer).collapsed(text) if images else text
    turns = chat_turns(text.replace(place, IMAGE) if images else text, tokenizer)
    return {"prompt": text} | ({"turns": turns} if turns else {}) | images
