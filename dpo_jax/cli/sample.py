"""`dpo-jax sample`: completions of held-out prompts, or of your own, printed or as JSON Lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.data.loader import round_up
from dpo_jax.runtime.hosts import is_first
from dpo_jax.sampling import Samples, generate, left_pad
from dpo_jax.types import Model, Partitioner, Variables


class Completions(NamedTuple):
    ids: list[np.ndarray]  # without what comes after EOS; EOS itself included where it was drawn
    texts: list[str]
    logps: np.ndarray  # float32[B], in nats


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
    samples = complete(
        partitioner,
        model,
        variables,
        prompts,
        jax.random.key(config.run.seed),
        max_new_tokens=section.max_new_tokens,
        tokenizer=tokenizer,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
    )
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


def complete(
    partitioner: Partitioner,
    model: Model,
    variables: Variables,
    prompts: list[np.ndarray],
    key: jax.Array,
    *,
    max_new_tokens: int,
    tokenizer: Any,
    batch: int = 64,
    **sampling: Any,
) -> Completions:
    """Samples a completion of every prompt, about `batch` at a time. Room in the position table limits `max_new_tokens`.

    `variables` are the partitioner's. A prompt's completion depends on `key` and the prompt's number alone, not on batches.
    """
    longest = max(prompts, key=len)
    room = model.config.max_positions - len(longest)
    if room < 1:
        raise ConfigError(f"the longest prompt has {len(longest)} tokens, and the model reads {model.config.max_positions}")
    options = {"max_new_tokens": min(max_new_tokens, room), "eos_id": tokenizer.eos_token_id, **sampling}

    def draw(variables: Variables, rows: dict[str, Any]) -> Samples:
        keys = jax.random.wrap_key_data(rows["keys"])
        return generate(model, variables, rows["tokens"], rows["lengths"], keys, **options)

    compiled = partitioner.compile_map(draw)
    # Whole batches and one width, so that the loop compiles once; the fillers are thrown away.
    batch = round_up(min(batch, len(prompts)), partitioner.row_shards)
    part, parts = partitioner.host_part
    mine = slice(part * batch // parts, (part + 1) * batch // parts)
    keys = np.asarray(jax.random.key_data(jax.random.split(key, round_up(len(prompts), batch))))
    ids, logps = [], []
    for start in range(0, len(prompts), batch):
        here = prompts[start : start + batch]
        tokens, lengths = left_pad([*here, *[longest] * (batch + 1 - len(here))])
        rows = {"tokens": tokens[:-1][mine], "lengths": lengths[:-1][mine], "keys": keys[start : start + batch][mine]}
        samples = compiled(variables, rows)
        ids += [samples.tokens[row, : int(samples.lengths[row])] for row in range(len(here))]
        logps.append(samples.logps[: len(here)])
    return Completions(ids, [tokenizer.decode(row, skip_special_tokens=True) for row in ids], np.concatenate(logps))


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
