"""The `dpo-jax` program: `dpo-jax COMMAND CONFIG.yaml --dotted.flags`.

Exit codes:

    0    done
    1    unexpected error (a bug: please report the traceback); check: a row failed
    2    wrong command, flag or configuration, or one that contradicts the run directory; plan: the step does not fit
    65   bad rows or files (see data.on_bad)
    70   the contenders of bench disagree, or one of them failed
    71   a device ran out of memory; the message lists options that need less
    73   another run uses the run directory
    74   a file cannot be read or written (missing, no permission, disk full, damaged)
    75   labels are missing (judge, online: spending cap, endpoint, people); rerun the command to continue
    76   a loss, gradient or log-probability is NaN or infinite
    130  interrupted from the keyboard (Ctrl-C); a training run has saved its state: rerun the command to resume
    134  JAX aborted: another host was silent for run.heartbeat_seconds (or 1, where the connection broke at once);
         start all hosts again, and the run continues
    143  asked to stop (SIGTERM); a training run has saved its state: rerun the command to resume

Expected errors are one message without a traceback; `DPO_JAX_TRACEBACK=1` shows it. Commands import JAX only when they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import os
import sys
import textwrap
import traceback
from types import ModuleType
from typing import Any, NoReturn

from dpo_jax.cli.command_table import COMMANDS, ON_MANY_HOSTS, TRAINING, WHOLE_ROWS, WITHOUT_CONFIG, module_of
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.config.file import suggest
from dpo_jax.cli.exit_codes import exit_code, message
from dpo_jax.cli.fixed import fix
from dpo_jax.cli.flags import parse
from dpo_jax.cli.preflight import scope as check_scope
from dpo_jax.cli.word_table import OF_TRL
from dpo_jax.data.terminal import printable_output
from dpo_jax.runtime.progress import BOARD, reported
from dpo_jax.runtime.signals import Terminated, ending_at_once, leave, run_program
from dpo_jax.untrusted import LIMITS
from dpo_jax.writing import naming_errors

STDOUT = "standard output"
_STREAMS: list[Any] = []
"""Standard output and error of the program; empty for callers of `main`."""


def main(args: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. `args` defaults to the command line."""
    args = sys.argv[1:] if args is None else args
    with printable_output():
        return _run_to_exit_code(args)


def _run_to_exit_code(args: list[str]) -> int:
    """The exit code of a command, however it ends; unexpected exceptions propagate."""
    try:
        return _run(args)
    except SystemExit as stop:  # from tyro: --help (0) or a wrong flag (2)
        return stop.code if isinstance(stop.code, int) else 2
    except Terminated:
        print("\ndpo-jax: stopped by SIGTERM", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("\ndpo-jax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename == STDOUT:  # `dpo-jax sample ... | head`, and --help
            with contextlib.suppress(OSError):
                _to_nowhere(sys.stdout)
            return 0
        code = exit_code(error)
        if code == 1 or _traceback_wanted():
            raise
        print(f"dpo-jax: {message(error)}", file=sys.stderr)
        return code


def _to_nowhere(stream: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _outliving_its_reader(stream: Any) -> None:
    """Makes a stream go to nowhere once nobody reads it (`dpo-jax dpo ... 2>&1 | tee log`, and tee dies): the work goes on."""

    def attempted(work: Any, *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except BrokenPipeError:
            _to_nowhere(stream)
            if stream is not sys.stderr:
                print("dpo-jax: standard output was closed; continuing without it", file=sys.stderr)
            return work(*arguments)

    for name in ("write", "flush"):
        setattr(stream, name, functools.partial(attempted, getattr(stream, name)))


def _traceback_wanted() -> bool:
    return os.environ.get("DPO_JAX_TRACEBACK", "0") not in ("", "0")


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
        if name in OF_TRL:
            raise ConfigError(f"{name}: a TRL command; equivalent: {OF_TRL[name]}")
        raise ConfigError(f"{name}: unknown command{suggest(name, known)} (commands: {', '.join(known)})")
    rest, scope = check_scope.scope_of(rest)
    config = parse(name, rest)
    vars(LIMITS).update(dataclasses.asdict(config.limits))
    if config.run.distributed == "auto" and name not in ON_MANY_HOSTS:
        raise ConfigError(f"run.distributed: {name} runs on one host; only {', '.join(ON_MANY_HOSTS)} use several")
    _refuse_pieces(name, config)
    if scope is not None:
        from dpo_jax.cli.preflight import run as preflight

        return preflight.run(name, config, scope, path=rest[0])
    # transformers recommends installing PyTorch, which this program does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from dpo_jax.check import GPU_MEMORY

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)
    if config.run.distributed == "auto":
        return _on_many_hosts(name, config)
    return _execute(name, config)


def _refuse_pieces(name: str, config: Config) -> None:
    """Raises `ConfigError` for a context mesh with a command that cannot split rows."""
    if config.mesh.context == 1:
        return
    if name in WHOLE_ROWS:
        raise ConfigError(
            f"mesh.context: {name} needs whole rows on each device: set mesh.context 1, and mesh.fsdp or mesh.data"
        )
    if name in ("sft", "refs", "dpo", "eval") and config.run.devices != "mesh":
        raise ConfigError(
            f"mesh.context: run.devices {config.run.devices} does not split rows: set run.devices mesh, or mesh.context 1"
        )


def _execute(name: str, config: Config) -> int:
    module = module_of(name)
    if name != "sample":  # whose completions are what it prints; all others have files to write and checks to make
        for stream in _STREAMS:
            _outliving_its_reader(stream)
    if any(option.startswith("tokenizer") for option in COMMANDS[name].reads):  # it makes token ids of the data
        config = fix(config)
    if name not in TRAINING:
        return _ran(name, module, config)
    from dpo_jax.cli import finished

    task = finished.FinishedRun(name, config, COMMANDS[name].reads)
    if (steps := task.steps()) is not None:
        print(f"{config.run.dir}/{name} is finished after {steps} steps, and nothing has changed since")
        print(f"the policy is in {config.run.dir}/{name}/export")
        return 0
    code = _ran(name, module, config)
    if code == 0:
        task.record()
    return code


def _ran(name: str, module: str, config: Config) -> int:
    try:
        return _import_without_gc(module).run(config)
    except Exception as error:
        from dpo_jax.cli.memory_remedies import out_of_memory

        if (told := out_of_memory(name, config, error)) is None:
            raise
        raise told from error


def _import_without_gc(module: str) -> ModuleType:
    """A module, imported with garbage collection off: scanning its many new objects takes a sixth of the time."""
    if module in sys.modules or not gc.isenabled():
        return importlib.import_module(module)
    gc.disable()
    try:
        with reported("loading libraries"), ending_at_once():
            return importlib.import_module(module)
    finally:
        gc.freeze()  # imported objects stay alive
        gc.enable()


def _on_many_hosts(name: str, config: Config) -> int:
    from dpo_jax.cli.build import join_hosts

    with reported("waiting for the other hosts"):
        is_first = join_hosts(config)
    with contextlib.ExitStack() as quiet:
        if not is_first:  # the host that prints for all
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
            BOARD.quiet = True
        try:
            return _execute(name, config)
        except Exception as error:
            code = exit_code(error)
            if code in (75, 130, 143):  # agreed between all hosts
                raise
            # Others may wait for this host in a collective, and an orderly exit would wait for them. Once gone, it is missed.
            if code == 1 or _traceback_wanted():
                traceback.print_exception(error)
            print(f"dpo-jax: {message(error)}", file=sys.stderr)
            leave(code)


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

before spending money:
{check_scope.OPTIONS}

exit codes:
{textwrap.indent(textwrap.dedent(codes), "  ")}

Write None in a flag where a file has null. Set DPO_JAX_TRACEBACK=1 to see where an error comes from."""


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
    """Entry point of `dpo-jax`: runs `main` on the command line and ends the process with its exit code."""
    sys.excepthook = _uncaught
    if sys.stdout is not None:
        naming_errors(sys.stdout, STDOUT)
        _STREAMS.extend(stream for stream in (sys.stdout, sys.stderr) if stream is not None)
    run_program(main)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ignores one error of C++ threads: after a failed write, TensorStore still calls an event loop that orbax has closed."""
    if not (kind is RuntimeError and str(error) == "Event loop is closed"):
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    program()
