"""`dpo-jax sample`: completions of held-out prompts, or of your own, printed or as JSON Lines."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.ppo import learned_reward
from dpo_jax.cli.prompts import ARTICLE_CUE, references
from dpo_jax.data.encode import cut_prompt, token_ids, with_bos
from dpo_jax.evals.completions import Completer
from dpo_jax.evals.rewards import Reward, exact_reviews
from dpo_jax.runtime.hosts import is_first
from dpo_jax.types import Variables


def run(config: Config) -> int:
    section = config.sample
    path = config.sample_policy()
    tokenizer = build.tokenizer_of(config, model_path=path, name="sample.policy")
    own = prompts_of_file(section.prompts_file) if section.prompts_file else []
    from_template = dict.fromkeys(own, False) or held_out_prompts(config, tokenizer)
    texts = own or list(from_template)
    model = build.policy_model(config, path, tokenizer, name="sample.policy")
    partitioner = build.make_partitioner(config, model)
    variables, _ = build.load_weights(path, model, partitioner, name="sample.policy")
    cue = ARTICLE_CUE if config.data.source == "cnn_dailymail" and not section.prompts_file else ""
    bos, cue_ids = config.data.bos, token_ids(cue, tokenizer)
    whole = [with_bos(token_ids(text, tokenizer), tokenizer, bos=bos, chat=from_template[text]) for text in texts]
    prompts = [within(ids, config.data.max_prompt_length, tokenizer, cue=cue_ids) for ids in whole]
    sampling = {name: getattr(section, name) for name in ("max_new_tokens", "top_k", "top_p")}
    temperatures = [float(part) for part in section.temperatures.split(",")] if section.temperatures else [section.temperature]
    best_of = sorted(int(part) for part in section.best_of.split(",")) if section.best_of else []
    most, reward = max(best_of, default=1), reward_of(config) if best_of else None
    lines, unfinished = [], 0
    for temperature in temperatures:
        complete = Completer(partitioner, model, tokenizer, temperature=temperature, **sampling)
        # The same key: more temperatures, or none but this one, change no sample.
        drawn = _draw(complete, variables, prompts, jax.random.key(config.run.seed), repeats=most)
        unfinished += sum(not row.pop("finished") for row in drawn)
        rows = [{"prompt": texts[i // most], **row, "temperature": temperature} for i, row in enumerate(drawn)]
        lines += best_rows(rows, best_of, reward) if reward else rows
    if not is_first():
        return 0
    if cut := sum(len(x) > config.data.max_prompt_length for x in whole):
        kept = "first" if cue else "last"
        limit = f"their {kept} {config.data.max_prompt_length - len(cue_ids)} tokens (data.max_prompt_length)"
        print(f"{cut:,} of {len(texts):,} prompts are longer than the policy was shown: {limit}", file=sys.stderr)
    if unfinished:
        total = len(texts) * most * len(temperatures)
        limits = "by sample.max_new_tokens, or where the model has no more positions"
        print(f"{unfinished:,} of {total:,} completions were stopped before their end, {limits}", file=sys.stderr)
    if section.out:
        Path(section.out).parent.mkdir(parents=True, exist_ok=True)
        Path(section.out).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        print(f"{len(lines)} completions in {section.out}")
        return 0
    for line in lines:
        print(
            f"\n{line['prompt']}\033[1m{line['completion']}\033[0m"
            if sys.stdout.isatty()
            else json.dumps(line, ensure_ascii=False)
        )
    return 0


def within(ids: np.ndarray, limit: int, tokenizer: Any, *, cue: np.ndarray) -> np.ndarray:
    """At most `limit` of the tokens of a prompt: BOS, if it has one, and the last ones. An article, which has a `cue`, loses
    its end instead: news say first what matters, and without the cue no policy would summarise.
    """
    if len(ids) <= limit or not len(cue):
        return cut_prompt(ids, limit, tokenizer)
    return np.concatenate([ids[: max(0, limit - len(cue))], cue])[-limit:]


def _draw(
    complete: Completer, variables: Variables, prompts: Sequence[np.ndarray], key: jax.Array, *, repeats: int
) -> list[dict[str, Any]]:
    """`repeats` completions of each prompt, those of a prompt side by side."""
    try:
        samples = complete(variables, [ids for ids in prompts for _ in range(repeats)], key)
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error
    eos = complete.tokenizer.eos_token_id
    return [
        {"completion": text, "logp": float(logp), "tokens": len(ids), "finished": bool(len(ids)) and int(ids[-1]) == eos}
        for text, logp, ids in zip(samples.texts, samples.logps, samples.ids, strict=True)
    ]


def reward_of(config: Config) -> Reward:
    """What `sample.best_of` chooses by: the learned reward that is named, or the true one of generated reviews."""
    section = config.sample
    if jax.process_count() > 1:
        raise ConfigError("sample.best_of: runs on one host")
    if section.reward_model:
        return learned_reward(config, section.reward_model, name="sample.reward_model", batch=64)
    if config.data.source != "reviews":
        raise ConfigError("sample.reward_model: best_of needs a reward, and only that of the generated reviews is known")
    return exact_reviews


def best_rows(rows: Sequence[dict[str, Any]], best_of: Sequence[int], reward: Reward) -> list[dict[str, Any]]:
    """For each n of `best_of` (ascending) the best by `reward` of the first n rows of each prompt, told in two more columns.

    `rows` has as many for each prompt as the last n says, side by side.
    """
    values = reward([row["prompt"] for row in rows], [row["completion"] for row in rows]).reshape(-1, best_of[-1])
    found = []
    for n in best_of:
        for number, best in enumerate(values[:, :n].argmax(axis=1)):
            row = rows[number * best_of[-1] + int(best)]
            found.append({**row, "best_of": n, "reward": float(values[number, best])})
    return found


def held_out_prompts(config: Config, tokenizer: Any) -> dict[str, bool]:
    """The first distinct prompts of the held-out split, and whether a chat template wrote each."""
    every = {one.prompt: one.chat for one in references(config, tokenizer)}
    return dict(itertools.islice(every.items(), config.sample.prompts))


def prompts_of_file(name: str) -> list[str]:
    """One prompt a line, or the "prompt" field of each line of a .jsonl file. Raises `ConfigError` naming file and line."""
    prompts = []
    try:
        lines = Path(name).read_text(encoding="utf-8").split("\n")  # not splitlines(): JSON may hold U+2028 as it is
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sample.prompts_file: {name}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt: Any = line
        if name.endswith(".jsonl"):
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f'{name}:{number}: needs a JSON object with a "prompt" ({error})') from error
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"{name}:{number}: a prompt is a text that is not empty")
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"sample.prompts_file: {name} holds no prompts")
    return prompts
