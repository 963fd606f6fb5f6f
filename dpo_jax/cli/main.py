"""The `dpo-jax` program: `dpo-jax COMMAND CONFIG.yaml --dotted.flags`.

Exit codes:

    0    done
    1    unexpected error (a bug: please report the traceback); check: a row failed
    2    wrong command, flag or configuration, or one that does not fit what is in the run directory (plan: the slice)
    65   bad data, and data.on_bad is refuse
    70   the contenders of bench disagree, or one of them failed
    73   another run uses the run directory
    74   a file cannot be read or written (missing, no permission, disk full, damaged)
    75   judge stopped before every pair was decided (spending cap, endpoint); the same command continues
    76   a loss, gradient or log-probability is NaN or infinite
    130  interrupted from the keyboard (Ctrl-C); a training run has saved its state, and the same command continues
    134  JAX aborted: another host was silent for run.heartbeat_seconds (or 1, where the connection broke at once);
         start all hosts again, and the run continues
    143  asked to stop (SIGTERM); a training run has saved its state, and the same command continues

Expected errors are one message without a traceback; `DPO_JAX_TRACEBACK=1` shows it. Commands import JAX only when they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import importlib
import os
import sys
import textwrap
import traceback
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, NoReturn

from dpo_jax.cli import check_scope, words
from dpo_jax.cli import config as options
from dpo_jax.cli.config import Config, ConfigError, load_config_with_lines
from dpo_jax.cli.config_file import suggest, types_of
from dpo_jax.cli.config_report import ReportConfig
from dpo_jax.cli.fixed import fix
from dpo_jax.runtime.progress import BOARD, reported
from dpo_jax.runtime.signals import Terminated, leave, run_program


class Command(NamedTuple):
    help: str
    target: str  # "module:function", called with the Config; returns an exit code
    reads: tuple[str, ...]  # sections, or single options "section.option"
    needs: tuple[str, ...] = ()  # sections that must be complete


# Every step of a run takes the sections that describe it, so that one set of flags serves them all.
_RUN = ("run", "mesh", "data", "tokenizer", "model")
_LOSS = ("dpo.policy", "dpo.reference", "dpo.loss", "dpo.beta", "dpo.alpha", "dpo.label_smoothing", "dpo.reference_free")
# The contenders decide on device and layout.
_BENCH = (
    *("run.dir", "run.seed", "run.precision", "tokenizer", "model", "bench"),
    *(f"data.{field}" for field in types_of(options.DataConfig) if field != "layout"),
    *(f"dpo.{field}" for field in ("beta", "batch", "lr", "warmup_steps", "max_grad_norm", "microbatches")),
)
_PPO = tuple(f"frontier.{field}" for field in types_of(options.FrontierConfig) if field.startswith("ppo_"))
_TRAINING = tuple(
    f"dpo.{field}"
    for field in ("batch", "epochs", "lr", "optimizer", "warmup_steps", "schedule", "max_grad_norm", "microbatches")
)
_REWARD_MODEL = (
    *(option for option in _TRAINING if option != "dpo.epochs"),
    *("frontier.reward_model_epochs", "frontier.evaluations"),
)


def _world(*fields: str) -> tuple[str, ...]:
    """The options of `frontier` that a piece of it reads: those of sampling and of the true reward, and `fields`."""
    return tuple(f"frontier.{field}" for field in ("reward", "classifier", "max_new_tokens", "sample_batch", "fast", *fields))


COMMANDS = {
    "audit": Command(
        "should one train on these data? one page of counts and notes",
        "dpo_jax.cli.audit:run",
        _RUN,
        ("data",),
    ),
    "prepare": Command(
        "write the checked preferences as a TFDS folder (array_record)",
        "dpo_jax.cli.prepare:run",
        (*_RUN, "prepare"),
        ("data",),
    ),
    "sft": Command(
        "fine-tune on the chosen completions: the starting policy", "dpo_jax.cli.sft:run", (*_RUN, "sft"), ("data", "model")
    ),
    "refs": Command(
        "cache the reference log-probabilities",
        "dpo_jax.cli.refs:run",
        (*_RUN, "dpo.policy", "dpo.reference", "refs"),
        ("data",),
    ),
    "dpo": Command("train the policy on preferences", "dpo_jax.cli.dpo:run", (*_RUN, "refs", "dpo", "export.dtype"), ("data",)),
    "eval": Command("measure a policy on held-out pairs", "dpo_jax.cli.eval:run", (*_RUN, *_LOSS, "refs", "eval"), ("data",)),
    "sample": Command("complete prompts with a policy", "dpo_jax.cli.sample:run", (*_RUN, "sample"), ("data",)),
    "judge": Command(
        "win rates of completions by a judge behind an OpenAI-compatible endpoint (needs the `judge` extra)",
        "dpo_jax.cli.judge:run",
        ("run.dir", "run.seed", "data", "tokenizer.path", "judge"),
        ("judge", "data"),
    ),
    "plan": Command(
        "what training takes on TPUs or GPUs: memory, collectives, time (compiled without one)",
        "dpo_jax.cli.plan:run",
        ("run.dir", "run.devices", "run.precision", "mesh", "data", "model", "dpo", "refs.batch", "plan"),
        ("plan",),
    ),
    "export": Command(
        "write a checkpoint as a Hugging Face folder", "dpo_jax.cli.export:run", ("run.dir", "run.checkpoints", "export")
    ),
    "label": Command(
        "make preferences of the policy's samples by a known reward",
        "dpo_jax.cli.label:run",
        (*_RUN, "dpo.policy", *_world("prompts", "test_prompts", "completions", "labels")),
        ("data",),
    ),
    "reward-model": Command(
        "learn a reward from preferences",
        "dpo_jax.cli.reward_model:run",
        (*_RUN, "dpo.policy", *_REWARD_MODEL),
        ("data",),
    ),
    "ppo": Command(
        "train the policy by PPO against the true or a learned reward",
        "dpo_jax.cli.ppo:run",
        (
            *_RUN,
            "dpo.policy",
            *("dpo.warmup_steps", "dpo.schedule", "dpo.microbatches"),
            *_world("prompts", "test_prompts", "evaluations"),
            *(option for option in _PPO if option != "frontier.ppo_kls"),  # of the sweep
            "ppo",
            "export.dtype",
        ),
        ("data",),
    ),
    "optimum": Command(
        "the best reward that is possible at every KL, and Best-of-N",
        "dpo_jax.cli.optimum:run",
        (*_RUN, "dpo.policy", *_world("optimum_prompts", "optimum_samples", "best_of")),
        ("data",),
    ),
    "frontier": Command(
        "every method of the paper, by reward and KL, against the optimum",
        "dpo_jax.cli.frontier:run",
        (*_RUN, "sft", "dpo.policy", *_TRAINING, "frontier"),
        ("data", "model"),
    ),
    "study": Command(
        "make a page on which people compare two sets of completions",
        "dpo_jax.cli.study:run",
        ("run.dir", "run.seed", "study"),
        ("study",),
    ),
    "agree": Command(
        "Table 2: win rates by people and judges, and how far they agree",
        "dpo_jax.cli.agree:run",
        ("run.dir", "run.seed", "agree"),
    ),
    "report": Command(
        "one page about one or several runs: dpo-jax report RUN... (no configuration needed)",
        "dpo_jax.cli.report:run",
        ("report",),
        ("report",),
    ),
    "bench": Command("race our training against PyTorch", "dpo_jax.cli.bench:run", _BENCH, ("data", "model")),
}

# Their flags are their own: "module:function", called with the arguments and the name of the program.
WITHOUT_CONFIG = {
    "init": ("write a configuration to fill in, for data of your own: dpo-jax init my.yaml", "dpo_jax.cli.init:main"),
    "check": ("test this machine's accelerator: dpo-jax check (no configuration needed)", "dpo_jax.check:main"),
}

TRAINING = ("sft", "dpo")  # a finished run of these has nothing to do
ON_MANY_HOSTS = ("sft", "refs", "dpo", "eval", "sample")
SHORT = {f"--{name}": f"--run.{name}" for name in ("distributed", "coordinator", "num-processes", "process-id")}
SHORT |= {"--profile": "--bench.profile", "--fast": "--frontier.fast", "--rewards": "--eval.rewards"} | {
    f"--{name}": f"--plan.{name}" for name in ("topology", "sweep", "scale")
}
SHORT |= {f"--{name}": f"--judge.{name}" for name in ("base-url", "one-order")}

EXIT_CODES = (
    ("dpo_jax.cli.config_file", "ConfigError", 2),
    ("dpo_jax.cli.dpo", "WrongStart", 2),
    ("dpo_jax.runtime.chips", "TopologyError", 2),
    ("dpo_jax.reference", "ForeignCache", 2),
    ("dpo_jax.runtime.checkpoint", "StateMismatch", 2),
    ("dpo_jax.evals.verdicts", "ForeignVerdicts", 2),
    ("dpo_jax.data.pairs", "BadRow", 65),
    ("dpo_jax.data.pairs", "DataError", 65),
    ("dpo_jax.bench.gates", "GateFailed", 70),
    ("dpo_jax.bench.race", "ContenderFailed", 70),
    ("dpo_jax.runtime.rundir", "RunLocked", 73),
    ("dpo_jax.runtime.checkpoint", "CheckpointDamaged", 74),
    ("dpo_jax.evals.judging", "Unfinished", 75),
    ("dpo_jax.runtime.fit", "NonFinite", 76),
    ("dpo_jax.reference", "BrokenReference", 76),
    ("dpo_jax.evals.preference", "NonFiniteLogps", 76),
    ("dpo_jax.runtime.fit", "Interrupted", 130),
    ("dpo_jax.runtime.fit", "Preempted", 143),
)


def main(args: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. `args` defaults to the command line."""
    args = sys.argv[1:] if args is None else args
    try:
        return _run(args)
    except SystemExit as stop:  # from tyro: --help (0) or a wrong flag (2)
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # `dpo-jax audit ... | head`: the reader has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Terminated:
        print("\ndpo-jax: stopped by SIGTERM", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("\ndpo-jax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code = exit_code(error)
        if code == 1 or _traceback_wanted():
            raise
        print(f"dpo-jax: {_message(error)}", file=sys.stderr)
        return code


def _traceback_wanted() -> bool:
    return os.environ.get("DPO_JAX_TRACEBACK", "0") not in ("", "0")


def exit_code(error: BaseException) -> int:
    """The documented exit code of an exception; 1 if it is not one that a command is expected to raise."""
    for module, name, code in EXIT_CODES:
        # A class whose module was never imported cannot have been raised; importing it now would load JAX for nothing.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return code
    return 74 if _os_error(error) else 1


FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded", errno.EROFS: "Read-only file system"}


def _os_error(error: BaseException) -> OSError | None:
    """The file error behind an exception: a full disk reaches us wrapped by whoever was writing."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    name = next((link.filename for link in chain if isinstance(link, OSError) and link.filename), None)
    for link in chain:
        for number, text in FULL.items():
            if getattr(link, "errno", None) == number or text in str(link):  # TensorStore has no number
                return OSError(number, text, name)
    return error if isinstance(error, OSError) else None


def _message(error: Exception) -> str:
    cause = _os_error(error)
    if cause is None or exit_code(error) != 74:
        from dpo_jax.data.terminal import printable

        return printable(str(error))  # it may quote a text of the data, which may hold what moves a terminal's cursor
    if not cause.strerror:
        return str(cause)
    full = "; free some space, then run the same command again: it continues" if cause.errno == errno.ENOSPC else ""
    where = f"{cause.filename}: " if cause.filename else ""
    return f"{where}{cause.strerror}{full}"


def _run(args: list[str]) -> int:
    name, rest = (args[0], args[1:]) if args else ("--help", [])
    if name == "help" and rest:  # `help dpo` is `dpo --help`
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        print(_version())
        return 0
    if name in WITHOUT_CONFIG:
        module, function = WITHOUT_CONFIG[name][1].split(":")
        return getattr(importlib.import_module(module), function)(rest, prog=f"dpo-jax {name}")
    if name not in COMMANDS:
        known = [*WITHOUT_CONFIG, *COMMANDS]
        raise ConfigError(f"{name}: unknown command{suggest(name, known)} (commands: {', '.join(known)})")
    rest, scope = check_scope.scope_of(rest)
    config = parse(name, rest)
    if config.run.distributed == "auto" and name not in ON_MANY_HOSTS:
        raise ConfigError(f"run.distributed: {name} runs on one host; only {', '.join(ON_MANY_HOSTS)} use several")
    if scope is not None:
        from dpo_jax.cli import preflight

        return preflight.run(name, config, scope, path=rest[0])
    # transformers advises to install PyTorch, which this program has no use for.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from dpo_jax.check import GPU_MEMORY

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)
    if config.run.distributed == "auto":
        return _on_many_hosts(name, config)
    return _execute(name, config)


def _execute(name: str, config: Config) -> int:
    module, function = COMMANDS[name].target.split(":")
    if any(option.startswith("tokenizer") for option in COMMANDS[name].reads):  # it makes token ids of the data
        config = fix(config)
    if name not in TRAINING:
        return getattr(_imported(module), function)(config)
    from dpo_jax.cli import finished

    task = finished.FinishedRun(name, config, COMMANDS[name].reads)
    if (steps := task.steps()) is not None:
        print(f"{config.run.dir}/{name} is finished after {steps} steps, and nothing has changed since")
        print(f"the policy is in {config.run.dir}/{name}/export")
        return 0
    code = getattr(_imported(module), function)(config)
    if code == 0:
        task.record()
    return code


def _imported(module: str) -> ModuleType:
    """A module, imported without Python searching its many new objects for garbage again and again: a sixth of the time."""
    if module in sys.modules or not gc.isenabled():
        return importlib.import_module(module)
    gc.disable()
    try:
        with reported("loading libraries"):
            return importlib.import_module(module)
    finally:
        gc.freeze()  # what was imported stays
        gc.enable()


def _on_many_hosts(name: str, config: Config) -> int:
    from dpo_jax.cli.build import join_hosts

    with reported("waiting for the other hosts"):
        is_first = join_hosts(config)
    with contextlib.ExitStack() as quiet:
        if not is_first:  # who speaks for all
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
            BOARD.quiet = True
        try:
            return _execute(name, config)
        except Exception as error:
            code = exit_code(error)
            if code in (130, 143):  # agreed between all hosts
                raise
            # Others may wait for this one in a collective, and an orderly exit would wait for them. Gone, it is missed.
            if code == 1 or _traceback_wanted():
                traceback.print_exception(error)
            print(f"dpo-jax: {_message(error)}", file=sys.stderr)
            leave(code)


def parse(name: str, args: list[str]) -> Config:
    """The config of command `name`: the YAML file that `args` begins with, overridden by the flags after it, checked."""
    command = COMMANDS[name]
    args = ["".join((SHORT.get(name, name), equals, value)) for name, equals, value in (arg.partition("=") for arg in args)]
    if name == "report" and args and not args[0].startswith("-") and not Path(args[0]).is_file():
        path, flags, config, lines = "RUN...", *_of_runs(args), {}
    elif args and not args[0].startswith("-"):
        path, flags = args[0], args[1:]
        config, lines = load_config_with_lines(path)
    elif {"-h", "--help"} & set(args):
        path, flags, config, lines = "CONFIG.yaml", args, Config(), {}
    else:
        if name == "report":
            raise ConfigError("report needs run directories first: dpo-jax report runs/quickstart (options: --help)")
        raise ConfigError(f"{name} needs a configuration first: dpo-jax {name} configs/quickstart.yaml (options: --help)")
    changed = _override(name, command, config, path, flags)
    kept = {field: line for field, line in lines.items() if _get(changed, field) == _get(config, field)}
    needs = tuple(section for section in command.needs if section != "data" or not _brings_its_data(name, changed))
    options.check(changed, lines=kept, path=path, needs=needs)
    return changed


def _of_runs(args: list[str]) -> tuple[list[str], Config]:
    """The flags after the run directories that `args` begins with, and a config that names those."""
    count = next((number for number, arg in enumerate(args) if arg.startswith("-")), len(args))
    if bad := [folder for folder in args[:count] if "," in folder]:
        raise ConfigError(f"report.runs: {bad[0]}: a run directory whose name has a comma cannot be named")
    return args[count:], Config(report=ReportConfig(runs=",".join(args[:count])))


def _brings_its_data(name: str, config: Config) -> bool:
    """Whether a command that works on the data is asked to work on prompts or tokens of its own."""
    bench = config.bench.lengths or config.bench.sampling
    own = {"sample": config.sample.prompts_file, "bench": bench, "judge": config.judge.baseline_file()}
    return own.get(name) is not None


def _get(config: Config, dotted: str) -> Any:
    value: Any = config
    for field in dotted.split("."):
        value = getattr(value, field)
    return value


def _override(name: str, command: Command, config: Config, path: str, flags: list[str]) -> Config:
    """Applies flags. tyro gets classes with only the options that the command reads, and today's values as defaults."""
    if not flags:
        return config
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise ConfigError(f"{flags[0]}: flags need the package tyro: pip install tyro, or set the option in {path}") from error

    shown: dict[str, list[str]] = {}
    for entry in command.reads:
        section, _, field = entry.partition(".")
        fields = [field] if field else list(types_of(type(getattr(config, section))))
        shown.setdefault(section, []).extend(fields)
    for flag in (flag for flag in flags if flag.startswith("--")):
        section, _, field = flag[2:].partition("=")[0].replace("-", "_").partition(".")
        if hasattr(config, section) and field not in shown.get(section, ()) and hasattr(getattr(config, section), field):
            readers = [other for other, spec in COMMANDS.items() if {section, f"{section}.{field}"} & set(spec.reads)]
            raise ConfigError(f"{flag}: {name} does not read this option ({', '.join(readers)} would)")
    _refuse_foreign_words(flags, shown)
    views = []
    for section, fields in shown.items():
        current = getattr(config, section)
        cls, hints = type(current), types_of(type(current))
        view = dataclasses.make_dataclass(
            cls.__name__,
            [
                (
                    field,
                    Annotated[hints[field], tyro.conf.arg(help=options.help_text(cls, field))],
                    dataclasses.field(default=getattr(current, field)),
                )
                for field in fields
            ],
            namespace={"__doc__": cls.__doc__},
            frozen=True,
        )
        views.append((section, view, dataclasses.field(default=view())))
    chosen = tyro.cli(
        dataclasses.make_dataclass("Options", views, frozen=True),
        prog=f"dpo-jax {name} {path}",
        description=f"{command.help[0].upper()}{command.help[1:]}. Flags override the values of {path}. With --check it only "
        "tells whether it could run, and what (dpo-jax help).",
        args=flags,
    )
    changes = {section: vars(getattr(chosen, section)) for section in shown}
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **fields) for section, fields in changes.items()}
    )


def _refuse_foreign_words(flags: list[str], shown: dict[str, list[str]]) -> None:
    """Raises `ConfigError` for flags that other trainers have, with those of ours. Other unknown flags are left to tyro."""
    known = [f"{section}.{field}" for section, fields in shown.items() for field in fields]
    answers = []
    for flag in (flag.partition("=")[0] for flag in flags if flag.startswith("--")):
        if flag[2:].replace("-", "_") not in known and (answer := words.instead(flag, known)):
            answers.append(f"{flag}: unknown option; instead: {words.as_flags(answer, options.every_option())}")
    if answers:
        raise ConfigError("\n".join(answers))


def _overview() -> str:
    helps = {name: help for name, (help, _) in WITHOUT_CONFIG.items()} | {name: entry.help for name, entry in COMMANDS.items()}
    commands = "\n".join(f"  {name:12} {help}" for name, help in helps.items())
    assert __doc__ is not None
    codes = __doc__[__doc__.index("    0 ") : __doc__.index("\n\nExpected")]
    return f"""usage: dpo-jax COMMAND CONFIG.yaml [--section.option VALUE ...]

Direct Preference Optimization in JAX and Flax.

commands, in the order of a whole run:
{commands}

examples:
  dpo-jax audit configs/hh_small.yaml --data.path DIR    is this data fit for training?
  dpo-jax dpo configs/quickstart.yaml --dpo.beta 0.5     one option changed
  dpo-jax dpo --help                                     every option of a command, with its default (or: dpo-jax help dpo)
  dpo-jax dpo configs/quickstart.yaml --help             the same, with the values of a file
  dpo-jax dpo configs/quickstart.yaml --check            could this run? In seconds, without an accelerator
  dpo-jax init my.yaml                                   a configuration for data of your own

before money is spent:
{check_scope.OPTIONS}

exit codes:
{textwrap.indent(textwrap.dedent(codes), "  ")}

"None" in a flag is null in a file. Set DPO_JAX_TRACEBACK=1 to see where an error comes from."""


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} (not installed)"

    python = ".".join(map(str, sys.version_info[:3]))
    return f"{of('dpo_jax')} ({of('jax')}, {of('flax')}, {of('orbax-checkpoint')}, Python {python})"


def program() -> NoReturn:
    """The process `dpo-jax`: `main` with the command line, and the end of the process with its exit code."""
    sys.excepthook = _uncaught
    run_program(main)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Of threads in C++: after a failed write, which is raised, TensorStore still calls an event loop that orbax has closed."""
    if not (kind is RuntimeError and str(error) == "Event loop is closed"):
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    program()
