"""`dpo-jax COMMAND CONFIG --check`: reports whether a command could run, in seconds and before any machine is rented.

It checks data, models, devices, packages and the run directory. Weights and most rows are not read, and nothing is written. No
network, accelerator or JAX is needed. The functions with which a command refuses a configuration before computing also run
here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from dpo_jax import loss_table
from dpo_jax.cli import finished, fixed, identity, model_folders
from dpo_jax.cli.agree_files import judge_files, key_file, rating_files
from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import GENERATED, Config, ConfigError, load_config
from dpo_jax.cli.preflight.devices import compiler, devices, plan, training
from dpo_jax.cli.preflight.experiments import control, dialogue, diffusion, robust, scenes
from dpo_jax.cli.preflight.inputs import Check, data, files, judged_files, most, prompts
from dpo_jax.cli.preflight.models import model, targets, template, tokenizer
from dpo_jax.cli.preflight.online import rounds
from dpo_jax.cli.preflight.packages import bench_packages, check_bucket, judge_packages, reward_packages, writers
from dpo_jax.cli.preflight.scope import Scope
from dpo_jax.cli.report_files import earlier_images
from dpo_jax.shapes import check_shape
from dpo_jax.training.fingerprint import check_same_data, check_settings, data_changes
from dpo_jax.untrusted import Unreadable, read_object

ROWS = "train split, rows"
TRAINED_ON = {"train": {"rows": int, "files": [{"path": str, "bytes": int}]}}


def run(name: str, config: Config, scope: Scope, *, path: str) -> int:
    """Checks the command `name`; prints what would run. Raises the first problem, with the words of all."""
    check = Check(name, config, scope)
    for look in (*LOOKS.get(name, ()), _fixed):
        with check.collecting():
            look(check)
    if check.problems:
        first = check.problems[0]
        first.args = ("\n".join(dict.fromkeys(map(str, check.problems))), *first.args[1:])
        raise first
    count = len(check.warnings)
    verdict = f"no error, {count} warning{'s' if count > 1 else ''}" if count else "no problems found"
    print(f"{name} {path}: {verdict}")
    told = [*check.told, *(("warning", words) for words in check.warnings)]
    print("\n".join(f"  {what:<9}{words}" for what, words in told))
    return 0


# The run directory


def _run_dir(check: Check) -> None:
    config, name = check.config, check.name
    folder = Path(check.config.judge_out() if name == "judge" else Path(config.run.dir, name))
    if name == "robust":
        folder = Path(config.robust_out())
    if name == "diffusion":
        folder = Path(config.diffusion_out())
    if name == "eval" and config.eval.rewards:
        folder = Path(config.eval.rewards_out or Path(config.run.dir, "rewards"))
    if check.unseen("run", str(folder)):
        return
    _check_writable(folder)
    cache = config.refs.cache
    if cache is not None and name in ("refs", "dpo", "eval") and not check.scope.hides(cache):
        try:
            _check_writable(Path(cache))
        except OSError as refused:
            if not Path(cache, "identity.json").is_file():
                raise
            check.warn(f"refs.cache: {refused}; this works only if the cache holds all pairs")
    from dpo_jax.runtime.rundir import check_unlocked

    check_unlocked(folder)
    check.tell("run", f"{folder}{_progress(check, name, folder) if name in ('sft', 'dpo') else ''}")


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        raise OSError(f"{there}: is a file, but the run needs a folder {folder}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"{there}: Permission denied: the run writes {folder}")


def _progress(check: Check, task: str, folder: Path) -> str:
    """A description of what a training run would continue. Raises `ConfigError` if it would be refused."""
    config = check.config
    directory = config.checkpoints_of(task)
    check_bucket(directory)
    steps = model_folders.saved_steps(directory)
    if not steps:
        return f", checkpoints in {directory}" if config.run.checkpoints else ""
    if not config.run.resume:
        raise ConfigError(f"run.resume: is off, but {directory} holds checkpoints; turn it on, or choose another --run.dir")
    _refuse_another_run(check, task, folder)
    # Several hosts keep no such record. The run's date is one of its settings.
    if config.run.distributed == "off" and finished.recorded(task, fixed.fix(config), COMMANDS[task].reads):
        return f", finished after step {steps[-1]:,}: nothing is left to do, unless a file has changed since"
    return f", continues after step {steps[-1]:,}"


def _refuse_another_run(check: Check, task: str, folder: Path) -> None:
    """Raises `ConfigError` for a run with other settings or, if that can be seen without reading them, other data."""
    try:
        before = load_config(folder / "config.yaml")
    except ConfigError:  # none, or of another version
        return
    was, now = (identity.settings(one, getattr(one, task)) for one in (before, check.config))
    if loss_table.own_files(check.config.dpo.loss):
        from dpo_jax.runtime.checkpoint import newest_meta

        newest = newest_meta(check.config.checkpoints_of(task)) or (0, {"fingerprint": {}})
        was |= {name: value for name, value in newest[1]["fingerprint"].items() if name.startswith("loss file ")}
    with identity.refusing_mismatch():
        check_settings(str(folder), was, now)
    try:
        report = check_shape(read_object(folder / "data_report.json"), TRAINED_ON, "data_report.json")["train"]
    except (OSError, Unreadable):  # missing or damaged: nothing is computed from it
        return
    was, now = {ROWS: most(report["rows"], before.data.max_train)}, {ROWS: check.rows}
    files = {f"file {file['path']}, bytes": file["bytes"] for file in report["files"]}
    if check.config.data.source == before.data.source and before.data.source in GENERATED:
        with identity.refusing_mismatch():
            check_same_data(str(folder), was, now)
    for record, config in ((was, before), (now, check.config)):
        record |= {f"data.{name}": getattr(config.data, name) for name in identity.LIMITS}
    if check.train_files is not None:
        was, now = was | files, now | check.train_files
    if check.rows is None:
        del was[ROWS], now[ROWS]
    if lines := data_changes(was, now):
        check.warn("; ".join(line.strip() for line in lines) + ": the run continues only if no token of its data has changed")


def _fixed(check: Check) -> None:
    """The values pinned in the run directory for all commands that make token ids."""
    reads = COMMANDS[check.name].reads
    if any(option.startswith("tokenizer") for option in reads) and not check.scope.hides(check.config.run.dir):
        fixed.check(check.config)


def _checkpoints(check: Check) -> None:
    """The checkpoints that `export` reads."""
    config = check.config
    directory = config.export.checkpoint or config.checkpoints_of("dpo")
    if config.export.out is not None and not check.unseen("writes", config.export.out):
        model_folders.refuse_foreign(Path(config.export.out).expanduser())
    check_bucket(directory)
    if "://" in directory or check.unseen("reads", directory, "dpo"):
        return
    ready = config.export.checkpoint is not None or model_folders.saved_steps(directory)
    if not ready and check.unseen("reads", config.checkpoints_of("sft"), "sft"):
        return
    directory = model_folders.checkpoints_to_export(config)
    steps = model_folders.saved_steps(directory)
    if not steps:
        raise ConfigError(f"export.checkpoint: {directory}: no run wrote checkpoints here; train first")
    if config.export.step is not None and config.export.step not in steps:
        raise ConfigError(f"export.step: {config.export.step} does not exist; there are {', '.join(map(str, steps))}")
    chosen = f"{steps[-1]:,}, or the best one if training kept it" if config.export.step is None else f"{config.export.step:,}"
    check.tell("reads", f"{directory}, step {chosen}")


def _run_folders(check: Check) -> None:
    """The run directories that `report` reads."""
    for folder in check.config.report.folders():
        if not Path(folder).is_dir():
            raise ConfigError(f"report.runs: {folder}: no such run directory")
        check.tell("reads", folder)
    section = check.config.report
    earlier_images(Path(section.out) if section.out else Path(section.folders()[0]) / "report")


def _agreed(check: Check) -> None:
    """The files that `agree` reads."""
    people, records = rating_files(check.config)
    for file in filter(None, (*people, *records, key_file(check.config, needed=bool(people)))):
        if not file.is_file():
            raise ConfigError(f"agree.ratings: {file}: no such file")
        check.tell("file", str(file))
    for name, file in judge_files(check.config).items():
        if not file.is_file():
            raise ConfigError(f"agree.judge: {file}: no such file")
        check.tell("judge", f"{name}, {file}")


def _raced(check: Check) -> None:
    """The contenders and inputs of `bench`."""
    if check.config.bench.lengths or check.config.bench.sampling:
        check.tell("data", "random tokens")
    else:
        data("train")(check)


def _model_path(config: Config) -> str | None:
    return config.model.path


_POLICY = model("dpo.policy", Config.dpo_policy)
_REFERENCE = model("dpo.reference", lambda c: c.dpo.reference)
_START = model("model.path", _model_path, expected=True)
_CHATS, _TRAINED = template(Config.dpo_policy), targets("dpo", Config.dpo_policy)
_RUNS = (writers, _run_dir)
_SWEEP = (
    *(reward_packages, data("train", "test"), tokenizer, _START),
    *(model("dpo.policy", lambda c: c.dpo.policy), _TRAINED, devices, *_RUNS),
)
# The checks of each command, in the order in which they are reported.
LOOKS: Mapping[str, tuple[Callable[[Check], None], ...]] = {
    "audit": (data("train", "test", preferences=True), tokenizer, template(_model_path), *_RUNS),
    "prepare": (data("train", "test", preferences=True), tokenizer, template(_model_path), *_RUNS),
    "sft": (
        *(data("train", "test"), tokenizer, _START, template(_model_path), targets("sft", _model_path), devices),
        *(training("sft"), *_RUNS),
    ),
    "refs": (data("train", "test", preferences=True), tokenizer, _POLICY, _REFERENCE, _CHATS, devices, *_RUNS),
    "dpo": (
        *(data("train", "test", preferences=True), tokenizer, _POLICY, _REFERENCE, _CHATS, _TRAINED, devices),
        *(training("dpo"), *_RUNS),
    ),
    "eval": (
        data("test", preferences=True),
        tokenizer,
        model("eval.policy", Config.eval_policy),
        model("eval.reference", model_folders.eval_reference),
        template(Config.eval_policy),
        devices,
        *_RUNS,
    ),
    "sample": (
        prompts,
        tokenizer,
        model("sample.policy", Config.sample_policy),
        model("sample.reward_model", lambda c: c.sample.reward_model),
        devices,
    ),
    "judge": (judge_packages, judged_files, _run_dir),
    "plan": (plan, compiler),
    "export": (_checkpoints,),
    "label": (reward_packages, data("train", "test"), tokenizer, _POLICY, devices, *_RUNS),
    "reward-model": (data("train", "test", preferences=True), tokenizer, _POLICY, _CHATS, _TRAINED, devices, *_RUNS),
    "ppo": (
        reward_packages,
        data("train", "test"),
        tokenizer,
        _POLICY,
        model("ppo.reward_model", lambda c: c.ppo.reward_model),
        _TRAINED,
        devices,
        *_RUNS,
    ),
    "online": (
        rounds,
        data("train", "test"),
        tokenizer,
        _POLICY,
        model("online.reward_model", lambda c: c.online.reward_model),
        _TRAINED,
        devices,
        *_RUNS,
    ),
    "optimum": (reward_packages, data("test"), tokenizer, _POLICY, devices, *_RUNS),
    "frontier": _SWEEP,
    "robust": (robust, *_SWEEP),
    "control": (control, devices, _run_dir),
    "diffusion": (diffusion, _run_dir),
    "scenes": (scenes, _run_dir),
    "dialogue": (dialogue, *_SWEEP[1:]),
    "study": (files(("study.a", lambda c: c.study.a), ("study.b", lambda c: c.study.b)), _run_dir),
    "agree": (_agreed, _run_dir),
    "report": (_run_folders,),
    "bench": (_raced, bench_packages, tokenizer, _START, _run_dir),
}
