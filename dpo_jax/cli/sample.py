"""`dpo-jax sample`: completions of held-out prompts, or of your own, printed or as JSON Lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.evals.completions import Completer
from dpo_jax.runtime.hosts import is_first


def run(config: Config) -> int:
    section = config.sample
    path = config.sample_policy()
    tokenizer = build.tokenizer_of(config, model_path=path, name="sample.policy")
    texts = prompts_of_file(section.prompts_file) if section.prompts_file else held_out_prompts(config, tokenizer)
    model = build.policy_model(config, path, tokenizer, name="sample.policy")
    partitioner = build.make_partitioner(config, model)
    variables, _ = build.load_weights(path, model, partitioner, name="sample.policy")
    prompts = [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts]
    prompts = [ids[-config.data.max_prompt_length :] for ids in prompts]
    sampling = {name: getattr(section, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    complete = Completer(partitioner, model, tokenizer, **sampling)
    try:
        samples = complete(variables, prompts, jax.random.key(config.run.seed))
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error
    if not is_first():
        return 0
    lines = [
        {"prompt": text, "completion": completion, "logp": float(logp), "tokens": len(ids)}
        for text, completion, logp, ids in zip(texts, samples.texts, samples.logps, samples.ids, strict=True)
    ]
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


def held_out_prompts(config: Config, tokenizer: Any) -> list[str]:
    """The first distinct prompts of the held-out split."""
    preferences = build.load_split(config, "test", tokenizer)
    return list(dict.fromkeys(p.prompt for p in preferences))[: config.sample.prompts]


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
