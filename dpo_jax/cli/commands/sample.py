"""`dpo-jax sample`: completions of held-out prompts, or of your own, printed or as JSON Lines."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.images import say_once, vision_of
from dpo_jax.cli.model_folders import refuse_other_lines
from dpo_jax.cli.prompts import ARTICLE_CUE, Prompt, held_out_prompts, is_chat, prompts_of_file
from dpo_jax.cli.rewards import learned_reward
from dpo_jax.data.display import shown_prompt
from dpo_jax.data.encode import PromptImages, Truncation, cut_prompt, token_ids, with_bos
from dpo_jax.data.terminal import json_text, printable, raw
from dpo_jax.evals.completions import Completer
from dpo_jax.evals.reward_functions import Reward, exact_reviews
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Variables
from dpo_jax.writing import write_text


def run(config: Config) -> int:
    section = config.sample
    refuse_other_lines(section.out)
    path = config.sample_policy()
    tokenizer = build.tokenizer_of(config, model_path=path, name="sample.policy")
    with reported("reading the prompts"):
        given = _prompts(config, path, tokenizer)
    texts = [prompt.text for prompt in given]
    say = functools.partial(say_once, file=sys.stderr)  # completions may go to standard output
    vision = vision_of(config, path, tokenizer, given, name="sample.policy", say=say)
    model = build.policy_model(config, path, tokenizer, name="sample.policy", images=vision is not None)
    partitioner = build.make_partitioner(config, model)
    variables, _ = build.load_weights(path, model, partitioner, name="sample.policy")
    cue = ARTICLE_CUE if config.data.source == "cnn_dailymail" and not section.prompts_file else ""
    bos, cue_ids = config.data.bos, token_ids(cue, tokenizer)
    read = [one.text if vision is None or not one.images else vision.expanded(one.text, tokenizer) for one in given]
    whole = [
        with_bos(token_ids(text, tokenizer), tokenizer, bos=bos, chat=one.chat) for text, one in zip(read, given, strict=True)
    ]
    limits = {"cue": cue_ids, "truncation": config.data.cut}
    prompts = [within(ids, config.data.max_prompt_length, tokenizer, **limits) for ids in whole]
    shown = [shown_text(*of_prompt, tokenizer) for of_prompt in zip(texts, prompts, whole, strict=True)]
    images = [None] * len(given) if vision is None else vision.shown(config, prompts, given, tokenizer)
    sampling = {name: getattr(section, name) for name in ("max_new_tokens", "top_k", "top_p")}
    temperatures = [float(part) for part in section.temperatures.split(",")] if section.temperatures else [section.temperature]
    best_of = sorted(int(part) for part in section.best_of.split(",")) if section.best_of else []
    if best_of and vision is not None:
        raise ConfigError("sample.best_of: the reward reads texts only, but these prompts show images")
    most, reward = max(best_of, default=1), reward_of(config) if best_of else None
    stop_ids = build.stop_ids(tokenizer, path)
    lines, unfinished = [], 0
    for temperature in temperatures:
        complete = Completer(partitioner, model, tokenizer, stop_ids=stop_ids, temperature=temperature, **sampling)
        # The same key for each temperature, so that other temperatures in the list do not change samples.
        drawn = _draw(complete, variables, prompts, images, jax.random.key(config.run.seed), repeats=most)
        unfinished += sum(not row.pop("finished") for row in drawn)
        rows = [{**_of_prompt(given[i // most]), **row, "temperature": temperature} for i, row in enumerate(drawn)]
        lines += best_rows(rows, shown, best_of, reward) if reward else rows
    if not is_first():
        return 0
    if cut := sum(len(x) > config.data.max_prompt_length for x in whole if config.data.cut != "completions"):
        kept = "first" if cue or config.data.truncation == "keep_start" else "last"
        limit = f"their {kept} {config.data.max_prompt_length - len(cue_ids)} tokens (data.max_prompt_length)"
        print(f"{cut:,} of {len(texts):,} prompts are too long, and the policy was shown only {limit}", file=sys.stderr)
    if unfinished:
        total = len(texts) * most * len(temperatures)
        limits = "by sample.max_new_tokens or at the model's last position"
        print(f"{unfinished:,} of {total:,} completions were cut off, {limits}", file=sys.stderr)
    if section.out:
        Path(section.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(section.out, "".join(json_text(line) + "\n" for line in lines))
        print(f"{len(lines)} completions in {section.out}")
        return 0
    out = raw(sys.stdout)
    for line in lines:
        print(for_terminal(line) if out.isatty() else json_text(line), file=out)
    return 0


def _prompts(config: Config, policy: str, tokenizer: Any) -> list[Prompt]:
    file = config.sample.prompts_file
    if file is None:
        return held_out_prompts(config, tokenizer)
    chat = is_chat(config, policy, tokenizer)
    if chat and config.sample.chat == "auto" and is_first():
        print(f"{printable(file)}: a text is rendered as a user's turn (--sample.chat off: as it stands)", file=sys.stderr)
    return prompts_of_file(file, tokenizer, chat=chat)


def _of_prompt(prompt: Prompt) -> dict[str, Any]:
    images = [one.source if isinstance(one.source, str) else one.digest for one in prompt.images]
    return {"prompt": prompt.text} | ({"turns": prompt.turns} if prompt.turns else {}) | ({"images": images} if images else {})


def for_terminal(line: Mapping[str, Any]) -> str:
    """A prompt and its completion, in bold; a conversation as turns. Control characters in the texts are escaped."""
    answer = "\nassistant: " if line.get("turns") else ""
    return f"\n{shown_prompt(line)}{answer}\033[1m{printable(line['completion'])}\033[0m"


def shown_text(text: str, ids: np.ndarray, whole: np.ndarray, tokenizer: Any) -> str:
    """What the policy is shown of a prompt, for the reward to read: the text; of a truncated one its `ids`, without BOS."""
    if len(ids) == len(whole):
        return text
    return tokenizer.decode(ids[int(ids[:1].tolist() == [tokenizer.bos_token_id]) :])


def within(ids: np.ndarray, limit: int, tokenizer: Any, *, cue: np.ndarray, truncation: Truncation) -> np.ndarray:
    """At most `limit` tokens of a prompt, cut as for training. An article, which has a `cue`, is always truncated at its end:
    news articles put the essentials first, and without the cue no policy would summarize.
    """
    if len(ids) <= limit or not len(cue):
        return cut_prompt(ids, limit, tokenizer, truncation=truncation)
    return np.concatenate([ids[: max(0, limit - len(cue))], cue])[-limit:]


def _draw(
    complete: Completer,
    variables: Variables,
    prompts: Sequence[np.ndarray],
    images: Sequence[PromptImages | None],
    key: jax.Array,
    *,
    repeats: int,
) -> list[dict[str, Any]]:
    """`repeats` completions of each prompt, those of a prompt side by side."""
    places = [number for number in range(len(prompts)) for _ in range(repeats)]
    try:
        samples = complete(variables, [prompts[i] for i in places], key, images=[images[i] for i in places])
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error
    return [
        {
            "completion": text,
            "logp": float(logp) if np.isfinite(logp) else None,  # null, because JSON has no NaN
            "tokens": len(ids),
            "finished": bool(finished),
        }
        for ids, text, finished, logp in zip(*samples, strict=True)
    ]


def reward_of(config: Config) -> Reward:
    """The reward for `sample.best_of`: the named learned reward, or the true one of generated reviews."""
    section = config.sample
    if jax.process_count() > 1:
        raise ConfigError("sample.best_of: runs on one host")
    if section.reward_model:
        return learned_reward(config, section.reward_model, name="sample.reward_model", batch=64, policy=config.sample_policy())
    if config.data.source != "reviews":
        raise ConfigError("sample.reward_model: best_of needs a reward model, unless data.source is reviews")
    return exact_reviews


def best_rows(
    rows: Sequence[dict[str, Any]], prompts: Sequence[str], best_of: Sequence[int], reward: Reward
) -> list[dict[str, Any]]:
    """For each n of `best_of` (ascending), the best by `reward` of the first n rows of each prompt, with two more columns.

    `rows` holds the largest n rows for each of `prompts`, side by side.
    """
    most = best_of[-1]
    asked = [prompt for prompt in prompts for _ in range(most)]
    values = reward(asked, [row["completion"] for row in rows]).reshape(-1, most)
    found = []
    for n in best_of:
        for number, best in enumerate(values[:, :n].argmax(axis=1)):
            row = rows[number * best_of[-1] + int(best)]
            found.append({**row, "best_of": n, "reward": float(values[number, best])})
    return found
