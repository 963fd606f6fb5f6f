"""`dpo-jax frontier`: the paper's controlled experiment (section 6.1), with the best frontier that is possible beside it.

In `<run.dir>/frontier`: `frontier.png`, `results.csv` and `.jsonl` (every measured point), `summary.json`, `optimum.json`,
`pairs.jsonl` (the labelled pairs, as preferences that `data.source: files` reads) and `runs/` (a folder for each run).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli import sft as sft_command
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.config_lab import FrontierConfig, numbers
from dpo_jax.data.label import label
from dpo_jax.data.pairs import DataReport, PreferenceSet
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.data.reviews import review_prompts
from dpo_jax.data.snippets import load_snippets, prefixes, snippets_of
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.evals.frontier import Optimum
from dpo_jax.evals.frontier_plot import plot_frontier
from dpo_jax.evals.plots import plot_displacement, plot_training
from dpo_jax.evals.rewards import Reward, exact_reviews, fit_linear, hf_classifier, sign_accuracy
from dpo_jax.lab import report
from dpo_jax.lab.methods import PairData, pair_data, train_on_pairs
from dpo_jax.lab.optimum import estimate, to_json
from dpo_jax.lab.ppo import PpoOptions, train_by_ppo
from dpo_jax.lab.reward_model import learn_reward
from dpo_jax.lab.sweep import Result, Run, sweep
from dpo_jax.lab.world import Prompts, World
from dpo_jax.losses import dpo_loss, ipo_loss, unlikelihood_loss
from dpo_jax.models.hf import save_hf
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.types import Variables

MIXTURE = 10.0  # nats: DPO policies within this KL help to estimate the optimum
MAX_KL = 20.0  # nats, at which the figure ends
FAST = ("prompts", "test_prompts", "optimum_prompts", "optimum_samples", "ppo_iterations")
TRAINING = ("batch", "epochs", "lr", "optimizer", "warmup_steps", "max_grad_norm")  # of section dpo, for all methods on pairs


def run(config: Config) -> int:
    config = _sized(config)
    if config.run.devices == "mesh":
        raise ConfigError("run.devices: frontier trains small models on one device or by pmap")
    if config.dpo.policy is None and not Path(config.dpo_policy()).is_dir():
        sft_command.run(config)
    with build.open_run(config, "frontier") as run_dir:
        world, digest = _world(config)
        study = _Study(config, world, run_dir)
        runs = _runs(config.frontier, seed=config.run.seed)
        print(f"{len(runs)} runs; the reference is {config.dpo_policy()}", flush=True)
        shared = _shared(config, digest, world)
        results = sweep(
            runs, run_dir.path / "runs", shared=shared, perform=study.perform, say=functools.partial(print, flush=True)
        )
        best, of_reference = study.optimum(results)
        if "best-of-n" in config.frontier.chosen():
            results += _best_of_n(config.frontier, of_reference, seed=config.run.seed)
        _write(run_dir, results, best)
    return 0


def _sized(config: Config) -> Config:
    if not config.frontier.fast:
        return config
    smaller = {name: max(1, getattr(config.frontier, name) // 4) for name in FAST}
    return dataclasses.replace(config, frontier=dataclasses.replace(config.frontier, **smaller, evaluations=3))


def _world(config: Config) -> tuple[World, str]:
    """What all runs share, and the digest of the reference's weights."""
    section, path = config.frontier, config.dpo_policy()
    tokenizer = build.tokenizer_of(config, model_path=path, name="dpo.policy")
    model = build.policy_model(config, path, tokenizer, name="dpo.policy")
    partitioner = build.make_partitioner(config, model)
    reference, digest = build.load_weights(path, model, partitioner, name="dpo.policy")
    train, test = (
        _prompts(config, split, count, tokenizer)
        for split, count in (("train", section.prompts), ("test", section.test_prompts))
    )
    longest = max(map(len, [*train.ids, *test.ids]))
    if longest + section.max_new_tokens > model.config.max_positions:
        raise ConfigError(
            f"frontier.max_new_tokens: {section.max_new_tokens} more than the longest prompt ({longest} tokens) do not fit the "
            f"{model.config.max_positions} positions of {path}; lower it to {model.config.max_positions - longest}"
        )
    world = World(
        partitioner,
        model,
        tokenizer,
        reference=reference,
        reward=_reward(config),
        train=train,
        test=test,
        max_new_tokens=section.max_new_tokens,
        batch=section.sample_batch,
        seed=config.run.seed,
    )
    return world, digest


def _prompts(config: Config, split: Any, count: int, tokenizer: Any) -> Prompts:
    if config.data.source == "reviews":
        texts = list(dict.fromkeys(review_prompts(count, config.run.seed, split=split)))
    elif config.data.source in build.TEXT_SOURCES:
        try:
            texts = prefixes(build.load_texts(config, split), tokenizer, count, config.run.seed)
        except ValueError as error:
            raise ConfigError(f"frontier.{'prompts' if split == 'train' else 'test_prompts'}: {error}") from error
    else:
        texts = list(dict.fromkeys(p.prompt for p in build.load_split(config, split, tokenizer)))[:count]
    ids = [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts]
    return Prompts(texts, [x[-config.data.max_prompt_length :] for x in ids])


def _reward(config: Config) -> Reward:
    section = config.frontier
    if section.reward == "exact":
        if config.data.source != "reviews":
            raise ConfigError("frontier.reward: exact is the reward of the generated reviews; other data need linear or hf")
        return exact_reviews
    if section.reward == "hf":
        assert section.classifier is not None  # checked with the configuration
        try:
            return hf_classifier(section.classifier, "POSITIVE")
        except (ImportError, ValueError) as error:
            raise ConfigError(f"frontier.classifier: {error}") from error
    if config.data.source != "snippets":
        raise ConfigError("frontier.reward: linear is fitted on labelled texts: it needs data.source snippets")
    assert config.data.path is not None  # checked with the configuration
    every = load_snippets(config.data.path)
    learnt, judged = snippets_of(every, "reward"), snippets_of(every, "test")
    try:
        reward = fit_linear([s.text for s in learnt], [s.label for s in learnt], inverse_penalty=1.0)
    except ImportError as error:
        raise ConfigError(f"frontier.reward: {error}") from error
    accuracy, (low, high) = sign_accuracy(reward, [s.text for s in judged], [s.label for s in judged])
    print(
        f"linear reward: {accuracy:.3f} ({low:.3f} to {high:.3f}) of {len(judged):,} held-out snippets by its sign", flush=True
    )
    return reward


def _runs(section: FrontierConfig, *, seed: int) -> list[Run]:
    """Every setting of every method but Best-of-N, which nobody trains."""
    seeds = range(seed, seed + section.seeds)

    def of(method: str, name: str, text: str) -> list[Run]:
        return [Run(method, f"{name} {value:g}", {name: value}, s) for value in numbers(text) for s in seeds]

    settings = {
        "preferred-ft": [Run("preferred-ft", "", {"alpha": 0.0}, s) for s in range(seed, seed + max(3, section.seeds))],
        "unlikelihood": of("unlikelihood", "alpha", section.unlikelihood_alphas),
        **{method: of(method, "beta", section.dpo_betas) for method in ("dpo", "ipo", "cdpo")},
        **{method: of(method, "KL", section.ppo_kls) for method in ("ppo", "ppo-gt")},
    }
    return [run for method in section.chosen() for run in settings.get(method, [])]


def _shared(config: Config, digest: str, world: World) -> dict[str, Any]:
    """What every result depends on; a change makes all runs anew."""
    sweeps = {"methods", "dpo_betas", "unlikelihood_alphas", "ppo_kls", "best_of", "seeds", "fast"}
    later = {"optimum_prompts", "optimum_samples"}
    options = {k: v for k, v in dataclasses.asdict(config.frontier).items() if k not in sweeps | later}
    training = {
        name: getattr(config.dpo, name) for name in ("batch", "epochs", "lr", "optimizer", "warmup_steps", "max_grad_norm")
    }
    return {
        "reference": digest,
        "architecture": build.architecture(world.model),
        "tokenizer": tokenizer_digest(world.tokenizer),
        "data": {"source": config.data.source, "max_prompt_length": config.data.max_prompt_length},
        "frontier": options,
        "training": training,
        "seed": config.run.seed,
        "precision": config.run.precision,
    }


class _Study:
    """Performs the runs. What several of them need is made when the first one asks, and kept."""

    def __init__(self, config: Config, world: World, run_dir: RunDir) -> None:
        self.config, self.world, self.run_dir = config, world, run_dir

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        section, training = self.config.frontier, self.config.dpo
        if run.method.startswith("ppo"):
            reward = self.world.reward if run.method == "ppo-gt" else self.learned_reward
            schedule = linear_warmup(section.ppo_lr, warmup_steps=training.warmup_steps)
            return train_by_ppo(
                self.world,
                folder,
                reward=reward,
                tx=make_optimizer(schedule, name="adamw", max_grad_norm=1.0),
                options=_ppo_options(section, run.settings["KL"]),
                evaluations=section.evaluations,
                seed=run.seed,
            )
        points, variables = train_on_pairs(
            self.world,
            self.pairs,
            folder,
            loss=_loss(run, section),
            tx=build.make_tx(training),
            epochs=training.epochs,
            evaluations=section.evaluations,
            seed=run.seed,
        )
        if run.method == "dpo" and points[-1]["kl"] <= MIXTURE:
            save_hf(folder / "policy", self.world.model, variables)
        plot_training(read_metrics(folder / "metrics.jsonl"), folder / "plots")
        return points

    @functools.cached_property
    def encoded(self) -> EncodedSet:
        """The labelled pairs (appendix C.1), also written to `pairs.jsonl`."""
        config, world = self.config, self.world
        k = config.frontier.completions
        repeated = world.train.repeated(k)
        drawn = world.sample(world.reference, repeated, jax.random.key(config.run.seed + 1))
        texts = [drawn.completions.texts[i : i + k] for i in range(0, len(drawn.rewards), k)]
        preferences, counts = label(
            world.train.texts, texts, drawn.rewards.reshape(-1, k), how=config.frontier.labels, seed=config.run.seed
        )
        with open(self.run_dir.path / "pairs.jsonl", "w", encoding="utf-8") as file:
            for p in preferences:
                record = {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(
            f"{counts.labelled:,} of {counts.pairs:,} pairs labelled ({counts.against:,} against the reward); "
            f"{counts.ties:,} ties, {counts.identical:,} identical, {counts.empty:,} empty",
            flush=True,
        )
        found = DataReport(
            source="samples", split="train", format="samples", rows=counts.labelled, read=counts.labelled, kept=counts.labelled
        )
        return build.encode_split(config, PreferenceSet(preferences, found), world.tokenizer)

    @functools.cached_property
    def pairs(self) -> PairData:
        return pair_data(self.world, self.encoded, batch=self.config.dpo.batch)

    @functools.cached_property
    def learned_reward(self) -> Reward:
        section, folder = self.config.frontier, self.run_dir.path / "reward_model"
        folder.mkdir(exist_ok=True)
        reward, figures = learn_reward(
            self.world,
            self.encoded,
            folder,
            tx=build.make_tx(self.config.dpo),
            batch=self.config.dpo.batch,
            epochs=section.reward_model_epochs,
            evaluations=section.evaluations,
            seed=self.config.run.seed,
        )
        write_json(folder / "result.json", figures)
        print(f"reward model: held-out accuracy {figures['accuracy']:.3f}, loss {figures['loss']:.3f}", flush=True)
        return reward

    def optimum(self, results: Sequence[Result]) -> tuple[Optimum, np.ndarray]:
        section, config, world = self.config.frontier, self.config, self.world
        policies: list[Variables] = []
        for result in results:
            folder = self.run_dir.path / "runs" / result.run.name / "policy"
            if result.run.method == "dpo" and result.run.seed == config.run.seed and folder.is_dir():
                policies.append(build.load_weights(str(folder), world.model, world.partitioner, name="frontier")[0])
        prompts = _prompts(config, "test", section.optimum_prompts, world.tokenizer)
        print(f"the optimum, from {section.optimum_samples} completions of each of {len(prompts.ids)} prompts", flush=True)
        return estimate(world, prompts, samples=section.optimum_samples, policies=policies, seed=config.run.seed)


def _ppo_options(section: FrontierConfig, target_kl: float) -> PpoOptions:
    return PpoOptions(
        iterations=section.ppo_iterations,
        batch=section.ppo_batch,
        epochs=section.ppo_epochs,
        minibatches=section.ppo_minibatches,
        target_kl=target_kl,
        kl_coef=0.2,
        horizon=2 * section.ppo_batch,
        clip=0.2,
        value_clip=0.2,
        value_weight=0.1,
        gamma=1.0,
        lam=0.95,
    )


def _loss(run: Run, section: FrontierConfig) -> Any:
    match run.method:
        case "dpo":
            return functools.partial(dpo_loss, beta=run.settings["beta"])
        case "cdpo":
            return functools.partial(dpo_loss, beta=run.settings["beta"], label_smoothing=section.label_smoothing)
        case "ipo":
            return functools.partial(ipo_loss, beta=run.settings["beta"])
        case _:
            return functools.partial(unlikelihood_loss, alpha=run.settings["alpha"])


def _best_of_n(section: FrontierConfig, rewards: np.ndarray, *, seed: int) -> list[Result]:
    """As far as there are samples: of M completions of a prompt, the best of more than M cannot be told."""
    several = [int(n) for n in numbers(section.best_of) if n <= rewards.shape[1]]
    points = [report.best_of(rewards, n, seed=seed) for n in several]
    return [Result(Run("best-of-n", f"N {n}", {"n": n}, seed), [point], 0.0) for n, point in zip(several, points, strict=True)]


def _on_pairs(result: Result) -> bool:
    return not result.run.method.startswith(("ppo", "best-of-n"))


def _write(run_dir: RunDir, results: Sequence[Result], best: Optimum) -> None:
    report.write(run_dir.path, report.rows(results, best))
    write_json(run_dir.path / "optimum.json", to_json(best))
    write_json(run_dir.path / "summary.json", {"at_equal_kl": report.at_equal_kl(results, best)})
    plot_frontier(report.points(results), best, run_dir.path / "frontier.png", max_kl=MAX_KL)
    on_pairs = {r.run.name: read_metrics(run_dir.path / "runs" / r.run.name / "metrics.jsonl") for r in results if _on_pairs(r)}
    if on_pairs:
        plot_displacement(on_pairs, run_dir.path / "displacement.png")
    print(f"\n{report.summary(results, best)}\n\nfigure: {run_dir.path / 'frontier.png'}")
