"""Experiment setup of the paper's section 6.1 from a configuration: reference, prompts, true reward, labeled samples."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from dpo_jax.cli import build, splits
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.trainable import trainable_of
from dpo_jax.data.encode import Bos, Truncation, cut_prompt, token_ids, with_bos
from dpo_jax.data.label import LabelCounts, label
from dpo_jax.data.pairs import DataReport, Preference, PreferenceSet
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.data.reviews import review_prompts
from dpo_jax.data.snippets import load_snippets, prefixes, snippets_of
from dpo_jax.data.template import is_rendered, turn_end
from dpo_jax.data.terminal import json_text
from dpo_jax.evals.reward_functions import Reward, exact_reviews, fit_linear, hf_classifier, sign_accuracy, vader_lexicon
from dpo_jax.lab.world import SECOND, Prompts, World
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import write_json
from dpo_jax.shapes import check_shape
from dpo_jax.untrusted import Unreadable, read_object
from dpo_jax.writing import writing

FAST = {"prompts": 8, "test_prompts": 4, "optimum_prompts": 4, "optimum_samples": 4, "ppo_iterations": 4}
"""Divisors of the sizes under `frontier.fast`."""
Count = Literal["prompts", "test_prompts", "optimum_prompts"]
"""Options that set numbers of prompts: of the train split, and of the held-out split for two purposes."""


def sized(config: Config) -> Config:
    """`config` with the smaller sizes of `frontier.fast`, if set."""
    if not config.frontier.fast:
        return config
    smaller = {name: max(1, getattr(config.frontier, name) // part) for name, part in FAST.items()}
    return dataclasses.replace(config, frontier=dataclasses.replace(config.frontier, **smaller, evaluations=3, seeds=1))


def make_world(
    config: Config, *, train: Count | None, test: Count, reward: Reward | None = None
) -> tuple[World, dict[str, str]]:
    """The experiment world around the policy `dpo.policy`, and the digests of its weights (`Trainable.load`).

    `reward` is the true reward; none: the result of `true_reward`.
    """
    section, path = config.frontier, config.dpo_policy()
    tokenizer = build.tokenizer_of(config, model_path=path, name="dpo.policy")
    model = build.policy_model(config, path, tokenizer, name="dpo.policy")
    trainable = trainable_of(config, dataclasses.replace(config.dpo, param_dtype="float32"), model, path)
    # The head of a reward model or value function, which is placed on the mesh with the rest.
    partitioner = trainable.partitioner(config, head=True)
    learned = prompts_of(config, train, tokenizer) if train else Prompts([], [])
    judged = prompts_of(config, test, tokenizer)
    longest = max(map(len, [*learned.ids, *judged.ids]))
    if longest + section.max_new_tokens > model.config.max_positions:
        raise ConfigError(
            f"frontier.max_new_tokens: {section.max_new_tokens} and the longest prompt ({longest} tokens) exceed the "
            f"{model.config.max_positions} positions of {path}; lower it to {model.config.max_positions - longest}"
        )
    if (longest := max(map(len, learned.ids), default=0)) >= config.data.max_length:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} leaves no token for a completion of the longest prompt ({longest}); "
            "raise it, or cut prompts (data.truncation: keep_end)"
        )
    reward = reward or true_reward(config)
    second = second_reward(config)
    reference, digests = trainable.load(path, partitioner, name="dpo.policy")
    world = World(
        partitioner,
        trainable.model,
        tokenizer,
        stop_ids=build.stop_ids(tokenizer, path),
        reference=reference,
        reward=reward,
        train=learned,
        test=judged,
        max_new_tokens=section.max_new_tokens,
        batch=section.sample_batch,
        seed=config.run.seed,
        begin=trainable.state,
        beside={SECOND: second} if second else {},
    )
    return world, digests


def prompts_of(config: Config, how_many: Count, tokenizer: Any, *, topics: Sequence[str] | None = None) -> Prompts:
    """The first distinct prompts of the split, as many as the option `how_many` allows; for plain texts, their beginnings.

    For generated reviews only those on `topics`, if given.
    """
    split, count = "train" if how_many == "prompts" else "test", getattr(config.frontier, how_many)
    if config.data.source == "reviews":
        prompts = dict.fromkeys(review_prompts(count, config.run.seed, split=split, topics=topics), False)
    elif config.data.source in splits.TEXT_SOURCES:
        try:
            prompts = dict.fromkeys(prefixes(splits.load_texts(config, split), tokenizer, count, config.run.seed), False)
        except ValueError as error:
            raise ConfigError(f"frontier.{how_many}: {error}") from error
    else:
        every = {p.prompt: p.chat for p in splits.load_split(config, split, tokenizer, rows="prompts") if p.prompt}
        if not every:
            raise ConfigError(f"data.path: the {split} split holds plain texts, which have no prompts")
        prompts = dict(itertools.islice(every.items(), count))
    return _within(config.data.max_prompt_length, prompts, tokenizer, bos=config.data.bos, truncation=config.data.cut)


def _within(limit: int, prompts: Mapping[str, bool], tokenizer: Any, *, bos: Bos, truncation: Truncation) -> Prompts:
    """Prompts from texts (with whether a chat template wrote each), truncated to `limit` tokens.

    The text of a truncated prompt is truncated as well.
    """
    texts, ids, cut = [], [], 0
    for text, chat in prompts.items():
        own = token_ids(text, tokenizer)
        whole = with_bos(own, tokenizer, bos=bos, chat=chat)
        kept = cut_prompt(whole, limit, tokenizer, truncation=truncation)
        short = len(kept) < len(whole)
        cut += short
        ids.append(kept)
        texts.append(tokenizer.decode(kept[len(whole) - len(own) :]) if short else text)
    if cut:
        end = "first" if truncation == "keep_start" else "last"
        print(f"{cut:,} of {len(texts):,} prompts are cut to their {end} {limit} tokens (data.max_prompt_length)", flush=True)
    return Prompts(texts, ids)


def has_true_reward(config: Config) -> bool:
    """Whether `frontier.reward` can score these data. A classifier can score any."""
    return {"exact": "reviews", "linear": "snippets"}.get(config.frontier.reward) in (None, config.data.source)


def true_reward(config: Config) -> Reward:
    """The reward that `frontier.reward` names. Raises `ConfigError` if it cannot score these data."""
    section = config.frontier
    if section.reward == "exact":
        if not has_true_reward(config):
            raise ConfigError("frontier.reward: exact is the reward of the generated reviews; other data need linear or hf")
        return exact_reviews
    if section.reward == "hf":
        assert section.classifier is not None  # checked with the configuration
        try:
            with reported("loading the classifier"):
                return hf_classifier(section.classifier, "POSITIVE")
        except Unreadable as error:
            raise Unreadable(f"frontier.classifier: {error}") from error
        except (ImportError, ValueError) as error:
            raise ConfigError(f"frontier.classifier: {error}") from error
    if not has_true_reward(config):
        raise ConfigError("frontier.reward: linear is fitted on labeled texts: it needs data.source snippets")
    assert config.data.path is not None  # checked with the configuration
    with reported("reading the snippets"):
        every = load_snippets(config.data.path)
    learned, judged = snippets_of(every, "reward"), snippets_of(every, "test")
    try:
        with reported("fitting the linear reward"):
            reward = fit_linear([s.text for s in learned], [s.label for s in learned], inverse_penalty=1.0)
    except ImportError as error:
        raise ConfigError(f"frontier.reward: {error}") from error
    accuracy, (low, high) = sign_accuracy(reward, [s.text for s in judged], [s.label for s in judged])
    print(
        f"linear reward: {accuracy:.3f} ({low:.3f} to {high:.3f}) of {len(judged):,} held-out snippets by its sign", flush=True
    )
    return reward


def second_reward(config: Config) -> Reward | None:
    """The reward that `frontier.second_reward` names. Raises `ConfigError` if its package is missing."""
    if config.frontier.second_reward is None:
        return None
    try:
        return vader_lexicon()
    except ImportError as error:
        raise ConfigError(f"frontier.second_reward: {error}") from error


def labeled_samples(
    config: Config, world: World, prompts: Prompts, file: Path, *, key: jax.Array
) -> tuple[list[Preference], LabelCounts]:
    """Labeled pairs of the reference's completions of `prompts` (appendix C.1); also written to `file` by the first host."""
    k = config.frontier.completions
    drawn = world.sample(world.reference, prompts.repeated(k), key)
    texts = [drawn.completions.texts[i : i + k] for i in range(0, len(drawn.rewards), k)]
    rewards = drawn.rewards.reshape(-1, k)
    how, eos = config.frontier.labels, world.tokenizer.eos_token
    finished = drawn.completions.finished.reshape(-1, k).tolist()
    labeled, counts = label(prompts.texts, texts, rewards, how=how, seed=config.run.seed, eos=eos, finished=finished)
    preferences = _with_turn_ends(labeled, world.tokenizer)
    cut = sum(len(one.unended) for one in labeled)
    if is_first():
        _write(preferences, file)
    print(
        f"{counts.labeled:,} of {counts.pairs:,} pairs labeled ({counts.against:,} against the reward); "
        f"{counts.ties:,} ties, {counts.identical:,} identical, {counts.empty:,} empty"
        + (f", {counts.eos:,} that spell {eos}" if counts.eos else "")
        + (f"; {cut:,} of {2 * len(labeled):,} completions were cut off and get no end" if cut else ""),
        flush=True,
    )
    return preferences, counts


def _with_turn_ends(preferences: Sequence[Preference], tokenizer: Any) -> list[Preference]:
    """Completions of conversations with the end of a turn, as the chat template writes it and as the policy stops there."""
    after = turn_end(tokenizer)

    def whole(p: Preference) -> Preference:
        sides = {side: getattr(p, side) + ("" if side in p.unended else after) for side in ("chosen", "rejected")}
        return dataclasses.replace(p, **sides)

    return [whole(p) if is_rendered(p.prompt, tokenizer) else p for p in preferences]


MADE = {"shared": {str: object}, "sha256": str, "uids": [str]}
"""The record that `keep_pairs` writes."""


def keep_pairs(file: Path, record: Path, shared: Mapping[str, Any], preferences: Sequence[Preference]) -> None:
    """On the first host, writes to `record` the settings and uids of the pairs in `file`, for `kept_pairs`."""
    if not is_first():
        return
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    write_json(record, {"shared": dict(shared), "sha256": digest, "uids": [p.uid for p in preferences]})


def kept_pairs(file: Path, record: Path, shared: Mapping[str, Any]) -> list[Preference] | None:
    """The pairs in `file`, if `record` has these settings and both files are complete."""
    try:
        found, content = check_shape(read_object(record), MADE, str(record)), file.read_bytes()
    except (FileNotFoundError, Unreadable):
        return None
    known = json.loads(json.dumps(dict(shared)))  # as it reads after a round trip through a file
    if found.get("shared") != known or found.get("sha256") != hashlib.sha256(content).hexdigest():
        return None
    rows = [json.loads(line) for line in content.decode().split("\n") if line]
    return [
        Preference(**(row | {"unended": tuple(row.get("unended", ()))}), uid=uid)
        for row, uid in zip(rows, found["uids"], strict=True)
    ]


def encode_samples(config: Config, preferences: Sequence[Preference], tokenizer: Any) -> EncodedSet:
    """Labeled samples as tokens."""
    count = len(preferences)
    preferences = [dataclasses.replace(p, chat=is_rendered(p.prompt, tokenizer)) for p in preferences]
    found = DataReport(source="samples", split="train", format="samples", rows=count, read=count, kept=count)
    return splits.encode_split(config, PreferenceSet(preferences, found), tokenizer)


def of_training(config: Config) -> jax.Array:
    """The random key for completions of the training prompts."""
    return jax.random.key(config.run.seed + 1)


def _write(preferences: Sequence[Preference], file: Path) -> None:
    with writing(file) as out:
        for p in preferences:
            cut = {"unended": list(p.unended)} if p.unended else {}
            out.write(json_text({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} | cut) + "\n")
