"""Self-test of an accelerator: `python -m dpo_jax.check`, the first thing to run on a new card, machine or pod.

It needs jax, flax, optax and numpy, and orbax for the test of saving; no network, data or model. On a pod, start it on every
host: each host tests the devices that it sees.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_jax.bench.profile import TRACEABLE
from dpo_jax.runtime.gpu_target import COMPILER_OPTIONS, plugin_is_here

if TYPE_CHECKING:
    from dpo_jax.checks.report import Report, Row

UNTUNED = " ".join(f"--{option}={str(value).lower()}" for option, value in COMPILER_OPTIONS.items())
"""XLA's matmul autotuning takes minutes, and these tests are about numbers, so it is off. `--bench` turns it on."""
GPU_MEMORY = "0.92"  # fraction of memory that JAX takes; its default of 0.75 leaves a quarter of a large card unused
EXIT_CODES = """\
exit codes: 0 all rows passed; 1 a row failed; 2 wrong flag; 74 the JSON file cannot be written; 130 interrupted"""


def parser(prog: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=prog,
        description="Test this machine's accelerator: arithmetic, every attention path, DPO steps, several devices, "
        "checkpoints. Each row that fails says what to do.",
        epilog=EXIT_CODES,
    )
    made.add_argument(
        "--bench", action="store_true", help="also time full DPO and SFT steps of Pythia-2.8B with every attention"
    )
    made.add_argument("--seconds", type=float, default=240.0, metavar="N", help="time for --bench (default: 240)")
    made.add_argument("--json", type=Path, default=Path("check.json"), metavar="PATH", help="where to write all figures")
    made.add_argument("--only", default="", metavar="NAME,...", help="only these rows, such as matmul,attention.chunked,start")
    made.add_argument("--profile", type=Path, metavar="DIR", help="trace a step of the fastest attention; print what is slow")
    return made


def main(args: list[str] | None = None, *, prog: str = "python -m dpo_jax.check") -> int:
    """Runs the rows and returns the exit code. `args` defaults to the command line."""
    flags = parser(prog)
    asked = flags.parse_args(args)
    if asked.profile is not None and asked.profile.is_dir() and any(asked.profile.iterdir()):
        flags.error(f"--profile {asked.profile}: the folder is not empty")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)
    if plugin_is_here() and (asked.profile or not asked.bench):
        os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), TRACEABLE if asked.profile else UNTUNED]))
    from dpo_jax.checks.report import Report

    try:
        report = Report(asked.json)
    except OSError as error:
        print(f"{prog}: {asked.json}: {error.strerror}", file=sys.stderr)
        return 74
    try:
        run(report, asked)
    except KeyboardInterrupt:
        report.write(interrupted=True)
        print(f"interrupted: {report.summary()}")
        return 130
    except UnknownRow as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    print(report.summary())
    return 1 if report.failed else 0


class UnknownRow(ValueError):
    """`--only` names an unknown row."""


def run(report: Report, asked: argparse.Namespace) -> None:
    from dpo_jax.checks import machine

    names = [name.strip() for name in asked.only.split(",") if name.strip()]
    first, *others = machine.rows()
    # Without a device the other rows cannot even be listed.
    if report.run(first).ok is False:
        return
    report.describe()
    for row in _chosen([*others, *_rows(asked)], names, besides=first.name):
        report.run(row)


def _rows(asked: argparse.Namespace) -> list[Row]:
    from dpo_jax.checks import attention, control, devices, diffusion, training

    found = [*attention.rows(), *training.rows(), *control.rows(), *diffusion.rows(), *devices.rows()]
    if asked.bench or asked.profile:
        from dpo_jax.checks import bench

        found += bench.rows(seconds=asked.seconds, profile=asked.profile, everything=asked.bench)
    return found


def _chosen(rows: list[Row], names: list[str], *, besides: str) -> list[Row]:
    for name in names:
        if name != besides and not any(row.chosen([name]) for row in rows):
            known = ", ".join(dict.fromkeys(row.name.partition(".")[0] for row in rows))
            raise UnknownRow(f"--only {name}: there is no such row; rows begin with {besides}, {known}")
    return [row for row in rows if row.chosen(names)]


if __name__ == "__main__":
    from dpo_jax.runtime.signals import run_program

    run_program(main)
