"""`dpo-jax frontier`: the paper's controlled experiment (section 6.1), compared with the optimal frontier.

Writes to `<run.dir>/frontier`: `frontier.png`, `results.csv` and `.jsonl` (every point), `summary.json`, `optimum.json`,
`pairs.jsonl` (the labeled pairs, as preferences that `data.source: files` reads), `runs/` (a folder for each run), and with a
second reward `second_reward.png`. The policies of dpo and ppo-gt are kept, as adapters if lora.rank is set.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.config.lab import ONLINE, numbers
from dpo_jax.cli.experiment import (
    encode_samples,
    keep_pairs,
    kept_pairs,
    labeled_samples,
    make_world,
    of_training,
    prompts_of,
    sized,
)
from dpo_jax.cli.frontier_runs import MIX_AT, TO_MIX, loss_of, online_settings, runs_of, shared_settings, to_mix
from dpo_jax.cli.kept_policies import KeptPolicies
from dpo_jax.cli.ppo_setup import first_kl_coef, ppo_method
from dpo_jax.cli.starting_policy import make_reference, refuse_bfloat16
from dpo_jax.cli.trainable import planned_trainable
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.evals.frontier import Optimum
from dpo_jax.evals.frontier_plot import plot_frontier
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab import report
from dpo_jax.lab.labels import label_table, label_words
from dpo_jax.lab.methods import PairData, PairMethod, pair_data
from dpo_jax.lab.optimum import Drawn, estimate, kept_in, to_json
from dpo_jax.lab.reward_model import accuracy_words, learn_reward
from dpo_jax.lab.second_reward import gains
from dpo_jax.lab.second_reward import summary as second_summary
from dpo_jax.lab.second_reward import words as second_words
from dpo_jax.lab.sweep import Result, Run, sweep
from dpo_jax.lab.world import LEARNED, SECOND, Points, World
from dpo_jax.losses import dpo_loss
from dpo_jax.online.method import OnlineMethod
from dpo_jax.online.rounds import RoundOptions
from dpo_jax.plotting import training_curves
from dpo_jax.runtime import hosts
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.training.run import saved_run
from dpo_jax.types import Variables
from dpo_jax.writing import empty_folder

MAX_KL = 20.0  # KL in nats at which the figure ends


def run(config: Config) -> int:
    config = sized(config)
    refuse_bfloat16(config, "frontier")
    make_reference(config)
    with build.open_run(config, "frontier") as run_dir:
        world, digests = make_world(config, train="prompts", test="test_prompts")
        shared = shared_settings(config, digests["start"], world)
        study = _Study(config, world, run_dir, shared, digests)
        build.describe(run_dir, config)
        runs = runs_of(config.frontier, seed=config.run.seed, online=online_settings(config))
        print(f"{len(runs)} runs; the reference is {config.dpo_policy()}", flush=True)
        results = sweep(
            runs,
            run_dir.path / "runs",
            shared=shared,
            perform=study.perform,
            jobs=config.frontier.jobs,
            say=functools.partial(print, flush=True),
        )
        best, drawn = study.optimum(results)
        if "best-of-n" in config.frontier.chosen():
            several = numbers(config.frontier.best_of)
            judges = [None] if drawn.learned is None else [None, drawn.learned]
            for by in judges:
                results += report.best_of_results(drawn.rewards, several, seed=config.run.seed, by=by, beside=drawn.beside)
        if hosts.is_first():
            _write(run_dir, results, best, second=config.frontier.second_reward or "")
    return 0


class _Study:
    """Performs the runs. Results shared by several runs are made by the first one that needs them; others wait."""

    def __init__(
        self, config: Config, world: World, run_dir: RunDir, shared: Mapping[str, Any], digests: Mapping[str, str]
    ) -> None:
        self.config, self.world, self.run_dir, self.shared, self.digests = config, world, run_dir, shared, digests
        model = build.policy_model(config, config.dpo_policy(), world.tokenizer, name="dpo.policy")
        self.trainable = planned_trainable(config, config.dpo, model)
        self._making = threading.Lock()
        self._methods: dict[str, PairMethod] = {}
        # Made at once, so that what is impossible is refused here, not in the middle of the sweep or after it.
        self.optimum_prompts = prompts_of(config, "optimum_prompts", world.tokenizer)
        try:
            self.optimum_world = world.with_prompts(train=world.train, test=self.optimum_prompts)
        except ValueError as error:
            raise ConfigError(f"frontier.optimum_prompts: {error}; lower data.max_prompt_length") from error
        self.ppo = ppo_method(config, world) if {"ppo", "ppo-gt"} & {*config.frontier.chosen()} else None

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        if "ppo" in self.config.frontier.chosen():  # then the reward learned from the pairs also scores every policy
            with self._making:
                self.world.beside[LEARNED] = self.learned_reward
        if run.method == report.REFERENCE:
            return [{"step": 0.0, **self.world.measure(self.world.reference)}]
        ways = {"ppo": self._by_ppo, "ppo-gt": self._by_ppo} | dict.fromkeys(ONLINE, self._by_online)
        points, variables = ways.get(run.method, self._on_pairs)(run, folder)
        if run.method in TO_MIX:
            self.kept.save(folder / "policy", variables)
        return points

    @functools.cached_property
    def kept(self) -> KeptPolicies:
        return KeptPolicies(self.trainable, self.world, self.config.dpo_policy(), self.digests, "frontier")

    def _by_ppo(self, run: Run, folder: Path) -> tuple[Points, Variables]:
        assert self.ppo is not None
        target_kl = run.settings["KL"]
        reward = self.learned_reward if run.method == "ppo" else self.world.reward
        return self.ppo.train(
            folder,
            reward=reward,
            target_kl=target_kl,
            kl_coef=first_kl_coef(target_kl),
            evaluations=self.config.frontier.evaluations,
            seed=run.seed,
        )

    def _by_online(self, run: Run, folder: Path) -> tuple[Points, Variables]:
        left = list(MIX_AT) if run.method in TO_MIX else []

        def keep(point: dict[str, float], variables: Variables) -> None:
            """Keeps the first policy beyond each KL in `MIX_AT`, for the optimum."""
            while left and point["kl"] >= left[0]:
                point["kept"] = left.pop(0)
            if "kept" in point:
                self.kept.save(folder / f"policy-{point['kept']:g}", self.world.partitioner.get_state(variables))

        names = {name: value for name, value in run.settings.items() if name in RoundOptions._fields}
        options = RoundOptions(**names, seed=run.seed, layout="packed", microbatches=self.config.dpo.microbatches)
        with self._making:
            method = self.online
        settings = {"shared": dict(self.shared), "run": dataclasses.asdict(run)}
        return method.train(folder, options, settings=settings, evaluations=self.config.frontier.evaluations, keep=keep)

    @functools.cached_property
    def online(self) -> OnlineMethod:
        training, settings = self.config.dpo, online_settings(self.config)
        tx = build.make_tx(training, steps=settings["rounds"] * settings["steps"])
        # beta comes with the batch, so that one program serves all betas.
        return OnlineMethod(self.world, loss=dpo_loss, tx=tx, microbatches=training.microbatches)

    def _on_pairs(self, run: Run, folder: Path) -> tuple[Points, Variables]:
        with self._making:
            method = self.method(run.method)
        evaluations = self.config.frontier.evaluations
        found = method.train(folder, settings=run.settings, evaluations=evaluations, seed=run.seed)
        if hosts.is_first():
            training_curves.plot_training(read_metrics(folder / "metrics.jsonl"), folder / "plots")
        return found

    @functools.cached_property
    def encoded(self) -> EncodedSet:
        """The labeled pairs (appendix C.1): those in `pairs.jsonl`, or new ones, which are written there."""
        config, world = self.config, self.world
        file, record = self.run_dir.path / "pairs.jsonl", self.run_dir.path / "pairs.json"
        preferences = kept_pairs(file, record, self.shared)
        if hosts.anywhere(preferences is None) or preferences is None:
            preferences, _ = labeled_samples(config, world, world.train, file, key=of_training(config))
            keep_pairs(file, record, self.shared, preferences)
        return encode_samples(config, preferences, world.tokenizer)

    @functools.cached_property
    def pairs(self) -> PairData:
        training = self.config.dpo
        return pair_data(self.world, self.encoded, batch=training.batch, microbatches=training.microbatches)

    def method(self, name: str) -> PairMethod:
        """The method of this name, made once."""
        name, training = "unlikelihood" if name == "preferred-ft" else name, self.config.dpo
        if name not in self._methods:
            tx = build.make_tx(training, steps=self.pairs.steps(training.epochs))
            loss = loss_of(name, self.config.frontier)
            self._methods[name] = PairMethod(self.world, self.pairs, loss=loss, tx=tx, epochs=training.epochs)
        return self._methods[name]

    @functools.cached_property
    def learned_reward(self) -> Reward:
        section, folder = self.config.frontier, self.run_dir.path / "reward_model"
        with hosts.first_goes_first("reward model"):
            if hosts.is_first() and not _continues(folder, self.shared):
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
            fingerprint={"sweep": self.shared},
            make_state=self.world.begin,
            microbatches=self.config.dpo.microbatches,
            bos=self.config.data.bos,
        )
        if hosts.is_first():
            write_json(folder / "result.json", figures)
        print(f"reward model: {accuracy_words(figures)}, loss {figures['loss']:.3f}", flush=True)
        return reward

    def optimum(self, results: Sequence[Result]) -> tuple[Optimum, Drawn]:
        section, world, prompts = self.config.frontier, self.world, self.optimum_prompts
        mixed = to_mix(results)
        hosts.barrier("policies")  # settings of the sweep, written by the first host
        policies = [self.kept.load(self.run_dir.path / "runs" / kept.run.name / kept.folder)[0] for kept in mixed]
        print(f"the optimum, from {section.optimum_samples} completions of each of {len(prompts.ids)} prompts", flush=True)
        sizes = {name: getattr(section, name) for name in ("optimum_prompts", "optimum_samples")}
        ended, runs = [kept.point for kept in mixed], [dataclasses.asdict(kept.run) for kept in mixed]
        identity = {"shared": self.shared, **sizes, "mixed": runs, "ended": ended}
        if len(prompts.ids) > len(world.test.ids):  # otherwise they are the first of those, and in `shared`
            identity["prompts"] = prompts.digest()
        # Best-of-N by the reward that PPO learns from, as in the paper. It is made only if samples have to be scored.
        judge = (lambda asked, said: self.learned_reward(asked, said)) if {"ppo", "best-of-n"} <= {*section.chosen()} else None
        keep = kept_in(
            self.run_dir.path / "optimum", identity, say=functools.partial(print, flush=True), learned=judge is not None
        )
        how = {"samples": section.optimum_samples, "policies": policies, "seed": self.config.run.seed}
        how |= {"keep": keep, "learned": judge}
        return estimate(self.optimum_world, prompts, **how)


def _continues(folder: Path, shared: Mapping[str, Any]) -> bool:
    """Whether the folder holds a reward model with these settings, finished or not."""
    saved = saved_run(folder / "checkpoints", place=str(folder))
    expected = json.loads(json.dumps(dict(shared)))  # as it reads after a round trip through a file
    return saved is not None and saved.fingerprint.get("sweep") == expected


def _on_pairs(result: Result) -> bool:
    return not result.run.method.startswith(("ppo", report.BEST_OF, report.REFERENCE, "online"))


def _write(run_dir: RunDir, results: Sequence[Result], best: Optimum, *, second: str) -> None:
    report.write(run_dir.path, report.rows(results, best))
    write_json(run_dir.path / "optimum.json", to_json(best))
    summary: dict[str, Any] = {"at_equal_kl": report.at_equal_kl(results, best)}
    spent = label_table(results, best)
    summary |= {"labels": spent} if spent else {}
    gained = gains(results, best) if second else []
    if gained:
        summary[SECOND] = {"name": second, "gains": gained, "words": second_words(gained, name=second)}
    write_json(run_dir.path / "summary.json", summary)
    plot_frontier(report.points(results), best, run_dir.path / "frontier.png", max_kl=MAX_KL)
    on_pairs = {r.run.name: read_metrics(run_dir.path / "runs" / r.run.name / "metrics.jsonl") for r in results if _on_pairs(r)}
    if on_pairs:
        training_curves.plot_displacement(on_pairs, run_dir.path / "displacement.png")
    print(f"\n{report.summary(results, best)}\n\nfigure: {run_dir.path / 'frontier.png'}")
    if spent:
        print(f"\n{label_words(spent)}")
    if gained:
        print(f"\n{second_summary(gained, name=second)}")
        _plot_second(run_dir.path / "second_reward.png", results, best, name=second)


def _plot_second(path: Path, results: Sequence[Result], best: Optimum, *, name: str) -> None:
    """The frontier in the second reward: its points, and the second reward of the first reward's optimum."""
    assert best.beside is not None
    curve = dataclasses.replace(best, reward=best.beside.reward, band=best.beside.band, reference=best.beside.reference)
    points = report.points(results, reward=SECOND)
    names = {"reward": f"second reward ({name})", "curve": "optimum of the first reward"}
    plot_frontier(points, curve, path, max_kl=MAX_KL, **names)
