"""`dpo-jax COMMAND CONFIG --check`: whether a command could run, told in seconds and before any machine is rented.

Data, models, devices, packages and the run directory are looked at, weights and most rows are not read, and nothing is written.
No network, accelerator or JAX is needed. What a command refuses before it computes is refused here by the same functions.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from dpo_jax.cli import identity, model_folders
from dpo_jax.cli.check_scope import Scope
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, SftConfig, TrainingConfig, load_config
from dpo_jax.cli.preflight_inputs import Check, data, files, judged_files, model, prompts, tokenizer
from dpo_jax.extras import install_command

MOST_OF_A_HOST = 8  # devices, of any TPU or GPU machine that is sold


def run(name: str, config: Config, scope: Scope, *, path: str) -> int:
    """Checks the command `name`; prints what would run. Raises the first problem, with the words of all."""
    check = Check(name, config, scope)
    for look in LOOKS.get(name, ()):
        with check.collecting():
            look(check)
    if check.problems:
        first = check.problems[0]
        first.args = ("\n".join(str(problem) for problem in check.problems), *first.args[1:])
        raise first
    print(f"{name} {path}: nothing is wrong with it")
    print("\n".join(f"  {what:<9}{words}" for what, words in check.told))
    return 0


# Packages


def check_writers(config: Config) -> None:
    """Raises `ConfigError` for a metrics writer whose package is missing: now, and not after the reference pass."""
    wanted = {"tensorboard": "tensorboardX" if config.run.tensorboard else "", "wandb": "wandb" if config.run.wandb else ""}
    for option, package in wanted.items():
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(f"run.{option}: needs the package {package}: {install_command('writers')}, or leave it off")


def check_bucket(config: Config, directory: str) -> None:
    """Raises `ConfigError` for checkpoints in a bucket that no package here can reach."""
    if directory.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"run.checkpoints: gs:// needs the package gcsfs: {install_command('gcs')}")


def _writers(check: Check) -> None:
    if check.scope.elsewhere is None:
        check_writers(check.config)


def _judge_packages(check: Check) -> None:
    section = check.config.judge
    if importlib.util.find_spec("openai") is None:
        raise ConfigError(f"judge: needs the package openai: {install_command('judge')}")
    if section.base_url == type(section).base_url and not os.environ.get(section.key_env, "").strip():
        raise ConfigError(f"judge.key_env: {section.base_url} wants a key, and the variable {section.key_env} is empty")


# Devices


def batch_parts(section: TrainingConfig, row_shards: int, *, layout: str) -> int:
    """Into how many parts the rows of a batch are divided. Raises `ConfigError` where the batch does not divide."""
    parts = row_shards * section.microbatches
    name = "sft" if isinstance(section, SftConfig) else "dpo"
    if layout != "packed" and section.batch % parts:
        raise ConfigError(
            f"{name}.batch: {section.batch} does not divide among {row_shards} devices x {section.microbatches} "
            f"microbatches; the nearest batch that does is {max(1, round(section.batch / parts)) * parts}"
        )
    return parts


def _devices(check: Check) -> None:
    config, count = check.config, check.scope.devices
    if config.run.devices == "single":
        if config.run.distributed == "auto" and count is not None and count > MOST_OF_A_HOST:
            raise ConfigError(f"run.devices: single is one device, and {count} are on several hosts; use mesh or pmap")
        unused = f" of {count}: run.devices mesh or pmap takes all" if count is not None and count > 1 else ""
        check.tell("devices", f"one{unused}")
    elif config.run.devices == "pmap":
        check.tell("devices", f"pmap over {count or 'all'}")
    else:
        sizes = dataclasses.asdict(config.mesh)
        if count is not None:
            from dpo_jax.runtime.mesh import MeshError, mesh_shape

            try:
                sizes = dict(zip(sizes, mesh_shape(count, **sizes), strict=True))
            except MeshError as error:
                raise ConfigError(f"mesh: {error}") from error
        check.tell("devices", " x ".join(f"{axis} {size if size > 0 else 'what is left'}" for axis, size in sizes.items()))


def _row_shards(check: Check) -> int | None:
    """Into how many parts the rows of a batch are cut; None where that depends on how many devices there are."""
    config, count = check.config, check.scope.devices
    if config.run.devices == "single":
        return 1
    if config.run.devices == "pmap":
        return count
    mesh = config.mesh
    if -1 not in (mesh.data, mesh.fsdp):
        return mesh.data * mesh.fsdp
    fixed = mesh.data * mesh.fsdp * mesh.tensor
    return None if count is None or count % fixed else count // mesh.tensor


def _training(task: str) -> Callable[[Check], None]:
    def look(check: Check) -> None:
        config = check.config
        section: SftConfig | DpoConfig = getattr(config, task)
        if (shards := _row_shards(check)) is not None:
            layout = "plain" if task == "sft" and config.data.layout == "shared" else config.data.layout
            batch_parts(section, shards, layout=layout)
        steps = ""
        if check.rows is not None:
            steps = f", at most {math.ceil(check.rows * section.epochs / section.batch):,} steps"
        check.tell("training", f"batches of {section.batch}, {section.epochs} epochs{steps}")

    return look


# The run directory


def _run_dir(check: Check) -> None:
    config, name = check.config, check.name
    folder = Path(check.config.judge_out() if name == "judge" else Path(config.run.dir, name))
    if name == "eval" and config.eval.rewards:
        folder = Path(config.eval.rewards_out or Path(config.run.dir, "rewards"))
    if check.unseen("run", str(folder)):
        return
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        raise OSError(f"{there}: is a file, and the run needs a folder {folder}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"{there}: Permission denied: {folder} is to be written")
    from dpo_jax.runtime.rundir import check_unlocked

    check_unlocked(folder)
    check.tell("run", f"{folder}{_progress(config, name, folder) if name in ('sft', 'dpo') else ''}")


def _progress(config: Config, task: str, folder: Path) -> str:
    """Words on what a training would continue. Raises `ConfigError` where it would be refused."""
    directory = config.checkpoints_of(task)
    check_bucket(config, directory)
    steps = model_folders.saved_steps(directory)
    if not steps:
        return f", checkpoints in {directory}" if config.run.checkpoints else ""
    if not config.run.resume:
        raise ConfigError(f"run.resume: is off, and {directory} holds checkpoints; turn it on, or choose another --run.dir")
    _refuse_other_settings(config, task, folder)
    return f", continues after step {steps[-1]:,}"


def _refuse_other_settings(config: Config, task: str, folder: Path) -> None:
    try:
        before = load_config(folder / "config.yaml")
    except ConfigError:  # none, or of another version
        return
    was, now = (identity.settings(one, getattr(one, task)) for one in (before, config))
    identity.refuse_other_settings(str(folder), was, now)


def _checkpoints(check: Check) -> None:
    """What `export` reads."""
    config = check.config
    directory = config.export.checkpoint or config.checkpoints_of("dpo")
    check_bucket(config, directory)
    if "://" in directory or check.unseen("reads", directory, "dpo"):
        return
    steps = model_folders.saved_steps(directory)
    if not steps:
        raise ConfigError(f"export.checkpoint: {directory}: no run wrote checkpoints here; train first")
    if config.export.step is not None and config.export.step not in steps:
        raise ConfigError(f"export.step: {config.export.step} is not there; there are {', '.join(map(str, steps))}")
    check.tell("reads", f"{directory}, step {config.export.step or steps[-1]:,}")


def _plan(check: Check) -> None:
    from dpo_jax.runtime.chips import slice_of

    chip, chips = slice_of(check.config.plan.topology or "")
    check.tell("devices", f"{chips} of {chip.name}")


def _run_folders(check: Check) -> None:
    """What `report` reads."""
    for folder in check.config.report.folders():
        if not Path(folder).is_dir():
            raise ConfigError(f"report.runs: {folder}: no such run directory")
        check.tell("reads", folder)


def _raced(check: Check) -> None:
    """What `bench` computes with."""
    if check.config.bench.lengths or check.config.bench.sampling:
        check.tell("data", "random tokens")
    else:
        data("train")(check)


_POLICY = model("dpo.policy", Config.dpo_policy)
_REFERENCE = model("dpo.reference", lambda c: c.dpo.reference)
_START = model("model.path", lambda c: c.model.path, expected=True)
_RUNS = (_writers, _run_dir)
# What is looked at for each command, in the order in which it is told.
LOOKS: Mapping[str, tuple[Callable[[Check], None], ...]] = {
    "audit": (data("train", "test", preferences=True), tokenizer, *_RUNS),
    "prepare": (data("train", "test", preferences=True), tokenizer, *_RUNS),
    "sft": (data("train", "test"), tokenizer, _START, _devices, _training("sft"), *_RUNS),
    "refs": (data("train", "test", preferences=True), tokenizer, _POLICY, _REFERENCE, _devices, *_RUNS),
    "dpo": (data("train", "test", preferences=True), tokenizer, _POLICY, _REFERENCE, _devices, _training("dpo"), *_RUNS),
    "eval": (
        data("test", preferences=True),
        tokenizer,
        model("eval.policy", Config.eval_policy),
        model("eval.reference", model_folders.eval_reference),
        _devices,
        *_RUNS,
    ),
    "sample": (
        prompts,
        tokenizer,
        model("sample.policy", Config.sample_policy),
        model("sample.reward_model", lambda c: c.sample.reward_model),
        _devices,
    ),
    "judge": (_judge_packages, judged_files, _run_dir),
    "plan": (_plan,),
    "export": (_checkpoints,),
    "label": (data("train", "test"), tokenizer, _POLICY, _devices, *_RUNS),
    "reward-model": (data("train", "test", preferences=True), tokenizer, _POLICY, _devices, *_RUNS),
    "ppo": (
        data("train", "test"),
        tokenizer,
        _POLICY,
        model("ppo.reward_model", lambda c: c.ppo.reward_model),
        _devices,
        *_RUNS,
    ),
    "optimum": (data("test"), tokenizer, _POLICY, _devices, *_RUNS),
    "frontier": (data("train", "test"), tokenizer, _START, model("dpo.policy", lambda c: c.dpo.policy), _devices, *_RUNS),
    "study": (files(("study.a", lambda c: c.study.a), ("study.b", lambda c: c.study.b)), _run_dir),
    "agree": (files(("agree.key", lambda c: c.agree.key)), _run_dir),
    "report": (_run_folders,),
    "bench": (_raced, tokenizer, _START, _run_dir),
}
