"""`dpo-jax dialogue`: preferences between whole conversations in a question game, compared with the enumerated optimum.

Writes to `<run.dir>/dialogue`: `dialogue.png`, `results.csv` and `.jsonl` (every point), `summary.json` (the printed figures),
`pairs/` (the labeled conversations of each seed, as messages) and `runs/` (a folder for each run).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.cli import build
from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.dialogue_runs import REFERENCE, runs_of
from dpo_jax.cli.starting_policy import make_reference, refuse_bfloat16
from dpo_jax.cli.trainable import trainable_of
from dpo_jax.data.terminal import json_text
from dpo_jax.data.tokenizer import tokenizer_digest
from dpo_jax.lab import report
from dpo_jax.lab.conversation_tree import dpo_limit
from dpo_jax.lab.dialogue import Conversation, DialogueWorld
from dpo_jax.lab.dialogue_methods import (
    Sampling,
    converse,
    label_conversations,
    label_turns,
    messages,
    train_online,
    trajectory_data,
    turn_data,
)
from dpo_jax.lab.dialogue_report import COLUMNS, drawn, frontiers, summary, table
from dpo_jax.lab.methods import PairData, PairMethod, in_layout
from dpo_jax.lab.robust import rows
from dpo_jax.lab.robust_plot import plot_curves
from dpo_jax.lab.sweep import Result, Run, sweep
from dpo_jax.losses import dpo_loss, unlikelihood_loss
from dpo_jax.runtime.rundir import write_json
from dpo_jax.training.fingerprint import architecture
from dpo_jax.writing import writing

_UNSHARED = {"methods", "betas", "seeds", "jobs", "rounds"}  # they are in the settings of runs, or do not change results


def run(config: Config) -> int:
    refuse_bfloat16(config, "dialogue")
    runs = runs_of(config)
    make_reference(config)
    with build.open_run(config, "dialogue") as run_dir:
        world, digests = _world(config)
        build.describe(run_dir, config)
        experiment = _Experiment(config, world, run_dir.path)
        print(f"{len(runs)} runs; the reference is {config.dpo_policy()}", flush=True)
        results = sweep(
            runs,
            run_dir.path / "runs",
            shared=_shared(config, world, digests["start"]),
            perform=experiment.perform,
            jobs=config.dialogue.jobs,
            say=functools.partial(print, flush=True),
        )
        _write(run_dir.path, world, results)
    return 0


def _world(config: Config) -> tuple[DialogueWorld, dict[str, str]]:
    """The question game around the policy `dpo.policy`, and the digests of its weights."""
    path = config.dpo_policy()
    tokenizer = build.tokenizer_of(config, model_path=path, name="dpo.policy")
    model = build.policy_model(config, path, tokenizer, name="dpo.policy")
    trainable = trainable_of(config, dataclasses.replace(config.dpo, param_dtype="float32"), model, path)
    partitioner = trainable.partitioner(config)
    reference, digests = trainable.load(path, partitioner, name="dpo.policy")
    try:
        world = DialogueWorld(
            partitioner,
            trainable.model,
            tokenizer,
            reference=reference,
            batch=config.dialogue.sample_batch,
            test=config.dialogue.test,
            seed=config.run.seed,
            begin=trainable.state,
        )
    except ValueError as error:
        raise ConfigError(f"dpo.policy: {path}: {error}") from error
    return world, digests


def _shared(config: Config, world: DialogueWorld, digest: str) -> dict[str, Any]:
    """Settings on which all results depend; a change repeats all runs."""
    training = [option.removeprefix("dpo.") for option in COMMANDS["dialogue"].reads if option.startswith("dpo.")]
    return {
        "reference": digest,
        "architecture": architecture(world.model),
        "tokenizer": tokenizer_digest(world.tokenizer),
        "dialogue": {k: v for k, v in dataclasses.asdict(config.dialogue).items() if k not in _UNSHARED},
        "training": {name: getattr(config.dpo, name) for name in training if name != "policy"},
        "lora": dataclasses.asdict(config.lora),
        "precision": config.run.precision,
        "seed": config.run.seed,  # also draws the conversations of the test
        "ties": "labelled at random",  # earlier versions left them out
    }


class _Experiment:
    """Performs the runs. Results shared by several runs are made by the first one that needs them; others wait."""

    def __init__(self, config: Config, world: DialogueWorld, folder: Path) -> None:
        self.config, self.world, self.folder = config, world, folder
        section = config.dialogue
        self.how = Sampling(section.starts, section.completions, section.pairs)
        self._making = threading.Lock()
        self._conversations: dict[int, list[Conversation]] = {}
        self._data: dict[tuple[str, int], PairData] = {}
        self._methods: dict[str, PairMethod] = {}

    def perform(self, run: Run, folder: Path) -> list[dict[str, float]]:
        world = self.world
        if run.method == REFERENCE:
            return [{"step": 0.0, **world.measure(world.reference)}]
        if run.method == "dpo-limit":
            each = zip(world.trees, world.reference_policy, strict=True)
            return [{"step": 0.0, **world.exact([dpo_limit(game.tree, of, run.settings["beta"]) for game, of in each])}]
        kind = "turns" if run.method == "myopic" else "conversations"
        with self._making:
            data, method = self._pairs(kind, run.seed), self._method(kind, run.method)
        settings = {name: value for name, value in run.settings.items() if name != "rounds"}
        if run.method == "online":
            rounds = run.settings["rounds"]
            how = self.how._replace(starts=self.how.starts // rounds)
            return train_online(world, method, folder, how=how, rounds=rounds, settings=settings, seed=run.seed)
        evaluations = self.config.dialogue.evaluations
        return method.train(folder, settings=settings, evaluations=evaluations, seed=run.seed, data=data)[0]

    def _method(self, kind: str, name: str) -> PairMethod:
        """The method for a loss and pairs of one kind; its settings are traced, so that it is compiled once."""
        key = f"{kind} {name if name == 'preferred-ft' else 'dpo'}"
        if key not in self._methods:
            data, training = self._pairs(kind, self.config.run.seed), self.config.dpo
            loss = unlikelihood_loss if name == "preferred-ft" else dpo_loss
            tx = build.make_tx(training, steps=data.steps(training.epochs))
            self._methods[key] = PairMethod(self.world, data, loss=loss, tx=tx, epochs=training.epochs)
        return self._methods[key]

    def _pairs(self, kind: str, seed: int) -> PairData:
        """Pairs of the reference's conversations; all seeds have the shapes of the first one."""
        first = self.config.run.seed
        if (kind, seed) in self._data:
            return self._data[kind, seed]
        conversations = self._of_reference(seed)
        if kind == "turns":
            groups = label_turns(conversations, self.how, seed=seed, name=f"seed {seed}")
        else:
            labeled = label_conversations(conversations, self.how, seed=seed, name=f"seed {seed}")
            groups = labeled.groups
            self._keep(labeled.pairs, seed)
        if not groups:
            raise ConfigError("dialogue.starts: no start has two different conversations; raise it, or dialogue.completions")
        sizes = {"batch": self.config.dpo.batch, "microbatches": self.config.dpo.microbatches}
        if seed != first:
            data = in_layout(self.world, self._pairs(kind, first), groups)
        elif kind == "turns":
            data = turn_data(self.world, groups, self.how, **sizes)
        else:
            data = trajectory_data(self.world, groups, self.how, **sizes)
        self._data[kind, seed] = data
        return data

    def _of_reference(self, seed: int) -> list[Conversation]:
        if seed not in self._conversations:
            self._conversations[seed] = converse(self.world, self.world.reference, self.how, seed=seed, number=0)
        return self._conversations[seed]

    def _keep(self, pairs: Sequence[tuple[Conversation, Conversation]], seed: int) -> None:
        (self.folder / "pairs").mkdir(exist_ok=True)
        with writing(self.folder / "pairs" / f"seed{seed}.jsonl") as file:
            for pair in pairs:
                chosen, rejected = (messages(self.world, one) for one in pair)
                record = {"chosen": chosen, "rejected": rejected, "chosen_reward": pair[0].reward}
                file.write(json_text({**record, "rejected_reward": pair[1].reward}) + "\n")


def _write(folder: Path, world: DialogueWorld, results: Sequence[Result]) -> None:
    curves = frontiers(world)
    found = summary(results, curves, reference=REFERENCE)
    report.write(folder, rows(results), COLUMNS)
    grid = table(found)
    write_json(folder / "summary.json", {**found, "tables": [grid._asdict()]})
    most = 1.1 * max(point["kl"] for result in results for point in result.points)
    base: Mapping[str, float] = found["reference"]
    figure = plot_curves(
        drawn(results, curves, base=base["reward"], most=max(most, 1.0)), folder / "dialogue.png", line="enumerated"
    )
    print(f"\n{grid.text()}\n\nfigure: {figure}")
