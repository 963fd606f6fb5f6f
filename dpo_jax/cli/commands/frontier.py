"""`dpo-jax frontier`: the paper's controlled experiment (section 6.1), with the best frontier that is possible beside it.

In `<run.dir>/frontier`: `frontier.png`, `results.csv` and `.jsonl` (every measured point), `summary.json`, `optimum.json`,
`pairs.jsonl` (the labelled pairs, as preferences that `data.source: files` reads) and `runs/` (a folder for each run).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import optimizer_table
from dpo_jax.cli import build
from dpo_jax.cli.commands import sft as sft_command
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, LoraConfig
from dpo_jax.cli.config.lab import FrontierConfig, numbers
from dpo_jax.cli.experiment import labelled_samples, make_world, of_training, prompts_of, sized
from dpo_jax.cli.trained import planned
from dpo_jax.data.encode import with_bos
from dpo_jax.data.pairs import DataReport, PreferenceSet
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.evals.frontier import Optimum
from dpo_jax.evals.frontier_plot import plot_frontier
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab import report
from dpo_jax.lab.methods import PairData, PairMethod, pair_data
from dpo_jax.lab.optimum import estimate, to_json
from dpo_jax.lab.ppo import PpoMethod, PpoOptions
from dpo_jax.lab.reward_model import learn_reward
from dpo_jax.lab.sweep import Result, Run, sweep
from dpo_jax.lab.world import Points, World
from dpo_jax.losses import dpo_loss, ipo_loss, unlikelihood_loss
from dpo_jax.models.hf import save_hf
from dpo_jax.plotting.training_curves import plot_displacement, plot_training
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.training.fingerprint import architecture
from dpo_jax.training.run import saved_run
from dpo_jax.types import Variables
from dpo_jax.writing import empty_folder

TO_MIX = ("dpo", "ppo-gt")  # methods whose policies help to estimate the optimum:
MIX_AT = (1.5, 3.0, 6.0, 9.0)  # nats, those nearest to which
MAX_KL = 20.0  # nats, at which the figure ends


def run(config: Config) -> int:
    config = sized(config)
    refuse_bfloat16(config, "frontier")
    if config.dpo.policy is None and not Path(config.dpo_policy()).is_dir():
        # An adapter needs a model to lie beside: a new one is trained whole.
        sft_command.run(dataclasses.replace(config, lora=LoraConfig()) if config.model.path is None else config)
    with build.open_run(config, "frontier") as run_dir:
        world, digests = make_world(config, train="prompts", test="test_prompts")
        shared = _shared(config, digests["start"], world)
        study = _Study(config, world, run_dir, shared)
        runs = _runs(config.frontier, seed=config.run.seed)
        print(f"{len(runs)} runs; the reference is {config.dpo_policy()}", flush=True)
        results = sweep(
            runs,
            run_dir.path / "runs",
            shared=shared,
            perform=study.perform,
            jobs=config.frontier.jobs,
            say=functools.partial(print, flush=True),
        )
        best, of_reference = study.optimum(results)
        if "best-of-n" in config.frontier.chosen():
            results += report.best_of_results(of_reference, numbers(config.frontier.best_of), seed=config.run.seed)
        _write(run_dir, results, best)
    return 0


def refuse_bfloat16(config: Config, command: str) -> None:
    """Raises `ConfigError` for parameters that are to be kept in bfloat16."""
    if config.dpo.param_dtype != "float32":
        raise ConfigError(f"dpo.param_dtype: {command} keeps parameters in float32; leave it out")


def _runs(section: FrontierConfig, *, seed: int) -> list[Run]:
    """Every setting of every method but Best-of-N, which nobody trains."""
    seeds = range(seed, seed + section.seeds)

    def of(method: str, name: str, text: str, **others: Any) -> list[Run]:
        return [Run(method, f"{name} {value:g}", {name: value, **others}, s) for value in numbers(text) for s in seeds]

    of_ppo = {k: v for k, v in dataclasses.asdict(section).items() if k.startswith("ppo_") and k != "ppo_kls"}

    settings = {
        "preferred-ft": [Run("preferred-ft", "", {"alpha": 0.0}, s) for s in range(seed, seed + max(3, section.seeds))],
        "unlikelihood": of("unlikelihood", "alpha", section.unlikelihood_alphas),
        **{method: of(method, "beta", section.dpo_betas) for method in ("dpo", "ipo", "cdpo")},
        **{method: of(method, "KL", section.ppo_kls, **of_ppo) for method in ("ppo", "ppo-gt")},
    }
    return [run for method in section.chosen() for run in settings.get(method, [])]


def _shared(config: Config, digest: str, world: World) -> dict[str, Any]:
    """What every result depends on; a change makes all runs anew. What PPO alone depends on stands with its runs."""
    sweeps = {"methods", "dpo_betas", "unlikelihood_alphas", "best_of", "seeds", "fast", "jobs"}
    others = {"optimum_prompts", "optimum_samples", *(k for k in dataclasses.asdict(config.frontier) if k.startswith("ppo_"))}
    options = {k: v for k, v in dataclasses.asdict(config.frontier).items() if k not in sweeps | others}
    training = {
        name: getattr(config.dpo, name)
        for name in ("batch", "epochs", "lr", "optimizer", "warmup_steps", "schedule", "max_grad_norm")
    }
    # Named only where they are set: what was computed without stays valid.
    others = ("warmup_ratio", "trainable", *optimizer_table.OPTIONS, *optimizer_table.SCHEDULE_OPTIONS)
    training |= {name: value for name in others if (value := getattr(config.dpo, name)) != getattr(DpoConfig, name)}
    lora = {"lora": dataclasses.asdict(config.lora)} if config.lora.rank is not None else {}
    # Named only where prompts begin with BOS: what was computed without stays valid.
    bos = {"bos": True} if len(with_bos(np.zeros(0, np.int32), world.tokenizer, bos=config.data.bos)) else {}
    return {
        "reference": digest,
        "architecture": architecture(world.model),
        "tokenizer": tokenizer_digest(world.tokenizer),
        "data": {"source": config.data.source, "max_prompt_length": config.data.max_prompt_length, **bos},
        "frontier": options,
        "training": training,
        **lora,
        "seed": config.run.seed,
        "precision": config.run.precision,
    }


class _Study:
    """Performs the runs. What several of them need is made when the first one asks, and kept; others wait meanwhile."""

    def __init__(self, config: Config, world: World, run_dir: RunDir, shared: Mapping[str, Any]) -> None:
        self.config, self.world, self.run_dir, self.shared = config, world, run_dir, shared
        model = build.policy_model(config, config.dpo_policy(), world.tokenizer, name="dpo.policy")
        self.part = planned(config, config.dpo, model)
        self._making = threading.Lock()
        self._methods: dict[str, PairMethod] = {}
        # Made at once: what cannot be is refused here, and not when the sweep has come to it.
        self.ppo = ppo_method(config, world) if {"ppo", "ppo-gt"} & {*config.frontier.chosen()} else None

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        points, variables = (self._by_ppo if run.method.startswith("ppo") else self._on_pairs)(run, folder)
        if run.method in TO_MIX:
            save_hf(folder / "policy", self.part.base, self.part.merged(variables))
        return points

    def _by_ppo(self, run: Run, folder: Path) -> tuple[Points, Variables]:
        assert self.ppo is not None
        reward, target_kl = self.world.reward, run.settings["KL"]
        if run.method == "ppo":
            with self._making:
                reward = self.learned_reward
        return self.ppo.train(
            folder,
            reward=reward,
            target_kl=target_kl,
            kl_coef=first_kl_coef(target_kl),
            evaluations=self.config.frontier.evaluations,
            seed=run.seed,
        )

    def _on_pairs(self, run: Run, folder: Path) -> tuple[Points, Variables]:
        with self._making:
            method = self.method(run.method)
        evaluations = self.config.frontier.evaluations
        found = method.train(folder, settings=run.settings, evaluations=evaluations, seed=run.seed)
        plot_training(read_metrics(folder / "metrics.jsonl"), folder / "plots")
        return found

    @functools.cached_property
    def encoded(self) -> EncodedSet:
        """The labelled pairs (appendix C.1), also written to `pairs.jsonl`."""
        config, world = self.config, self.world
        file = self.run_dir.path / "pairs.jsonl"
        preferences, counts = labelled_samples(config, world, world.train, file, key=of_training(config))
        found = DataReport(
            source="samples", split="train", format="samples", rows=counts.labelled, read=counts.labelled, kept=counts.labelled
        )
        return build.encode_split(config, PreferenceSet(preferences, found), world.tokenizer)

    @functools.cached_property
    def pairs(self) -> PairData:
        training = self.config.dpo
        return pair_data(self.world, self.encoded, batch=training.batch, microbatches=training.microbatches)

    def method(self, name: str) -> PairMethod:
        """The one of this name, made once. Preferred-FT is unlikelihood training whose alpha is 0."""
        name, training = "unlikelihood" if name == "preferred-ft" else name, self.config.dpo
        if name not in self._methods:
            tx = build.make_tx(training, steps=self.pairs.steps(training.epochs))
            loss = _loss(name, self.config.frontier)
            self._methods[name] = PairMethod(self.world, self.pairs, loss=loss, tx=tx, epochs=training.epochs)
        return self._methods[name]

    @functools.cached_property
    def learned_reward(self) -> Reward:
        section, folder = self.config.frontier, self.run_dir.path / "reward_model"
        if not _continues(folder, self.shared):
            empty_folder(folder, ours=("result.json", "metrics.jsonl", "run.lock"))
        reward, figures = learn_reward(
            self.world,
            self.encoded,
            folder,
            make_tx=functools.partial(build.make_tx, self.config.dpo),
            batch=self.config.dpo.batch,
            epochs=section.reward_model_epochs,
            evaluations=section.evaluations,
            seed=self.config.run.seed,
            fingerprint=self.shared,
            make_state=self.world.begin,
            microbatches=self.config.dpo.microbatches,
            bos=self.config.data.bos,
        )
        write_json(folder / "result.json", figures)
        print(f"reward model: held-out accuracy {figures['accuracy']:.3f}, loss {figures['loss']:.3f}", flush=True)
        return reward

    def optimum(self, results: Sequence[Result]) -> tuple[Optimum, np.ndarray]:
        section, config, world = self.config.frontier, self.config, self.world
        folders = [self.run_dir.path / "runs" / run.name / "policy" for run in to_mix(results)]
        policies = [build.load_weights(str(f), self.part.base, world.partitioner, name="frontier")[0] for f in folders]
        prompts = prompts_of(config, "optimum_prompts", world.tokenizer)
        print(f"the optimum, from {section.optimum_samples} completions of each of {len(prompts.ids)} prompts", flush=True)
        return estimate(world, prompts, samples=section.optimum_samples, policies=policies, seed=config.run.seed)


def _continues(folder: Path, shared: Mapping[str, Any]) -> bool:
    """Whether the folder holds a reward model of these settings, finished or not."""
    saved = saved_run(folder / "checkpoints", place=str(folder))
    expected = json.loads(json.dumps(dict(shared)))  # as it reads after a round trip through a file
    return saved is not None and expected.items() <= saved.fingerprint.items()


def to_mix(results: Sequence[Result]) -> list[Run]:
    """Runs whose final policies, with the reference, cover what the optimum does up to the last of `MIX_AT`: none twice."""
    ended = [result for result in results if result.run.method in TO_MIX]
    nearest = [min(ended, key=lambda result: abs(result.points[-1]["kl"] - at)).run.name for at in MIX_AT if ended]
    return [result.run for result in ended if result.run.name in nearest]


def ppo_method(config: Config, world: World) -> PpoMethod:
    """PPO with the options of section frontier. Also what `dpo-jax ppo` runs."""
    section, parts = config.frontier, config.dpo.microbatches * world.partitioner.row_shards
    options = PpoOptions(
        iterations=section.ppo_iterations,
        batch=section.ppo_batch,
        epochs=section.ppo_epochs,
        minibatches=section.ppo_minibatches,
        microbatches=config.dpo.microbatches,
        horizon=2 * section.ppo_batch,
        clip=0.2,
        value_clip=0.2,
        value_weight=0.1,
        gamma=1.0,
        lam=0.95,
    )
    if (options.batch // options.minibatches) % parts:
        raise ConfigError(
            f"frontier.ppo_batch: {options.batch} completions in {options.minibatches} minibatches do not divide among "
            f"{world.partitioner.row_shards} devices x {options.microbatches} microbatches; take a multiple of "
            f"{options.minibatches * parts}"
        )
    steps = options.iterations * options.epochs * options.minibatches
    schedule = build.make_schedule(dataclasses.replace(config.dpo, lr=section.ppo_lr), steps=steps)
    return PpoMethod(world, tx=make_optimizer(schedule, name="adamw", max_grad_norm=1.0), options=options)


def first_kl_coef(target_kl: float) -> float:
    """If rewards were normal, the optimum of this KL would have this price of a nat, in standard deviations of the reward."""
    return 1 / math.sqrt(2 * target_kl)


def _loss(name: str, section: FrontierConfig) -> Callable[..., Any]:
    match name:
        case "dpo":
            return dpo_loss
        case "cdpo":
            return functools.partial(dpo_loss, label_smoothing=section.label_smoothing)
        case "ipo":
            return ipo_loss
        case _:
            return unlikelihood_loss


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
