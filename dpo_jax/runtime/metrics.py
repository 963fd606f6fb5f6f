"""Where metrics go: `metrics.jsonl`, which is the record, and besides it TensorBoard and Weights & Biases.

A row's `step` is the number of optimizer steps taken before it was measured. A training row `step: 7` is therefore the loss of
the eighth batch before its update, and an evaluation row `step: 7` judges those same parameters.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dpo_jax.extras import install_command
from dpo_jax.writing import naming, write_text

Row = Mapping[str, float]


class Writer(Protocol):
    """A second place for metrics. `resume` comes first and gives the number of steps taken so far."""

    def resume(self, step: int) -> None: ...
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends one JSON object per row to `path`. A value that JSON has no word for (NaN, infinity) is written as null."""

    def __init__(self, path: str | os.PathLike[str], *, writers: Sequence[Writer] = ()):
        self.path = Path(path)
        self._writers = writers
        self._file = open(self.path, "ab")  # noqa: SIM115  closed by `close`

    def resume(self, step: int) -> None:
        """Forgets what was measured after `step` steps, so that the file holds each step once. Comes before the first `write`.

        Raises ValueError with the line number where a line other than a torn last one is not JSON.
        """
        self._file.truncate(_end_of_step(self.path, step))
        for writer in self._writers:
            writer.resume(step)

    def write(self, row: Row) -> None:
        """`row` holds `step` and the metrics. Raises OSError, for instance when the disk is full."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with naming(self.path):
            self._file.write(json.dumps(finite).encode() + b"\n")
            self._file.flush()
        for writer in self._writers:
            writer.write(row)

    def sync(self) -> None:
        """Returns once the rows written so far survive a crash of the machine."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with naming(self.path):
            self._file.close()
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, training (`loss`, ...) and evaluation (`eval/...`) in the order they were measured."""
    return [row for _, row in _rows(Path(path))]


def is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


def _end_of_step(path: Path, step: int) -> int:
    """Number of bytes that hold the rows measured up to the moment when `step` steps had been taken."""
    end = 0
    for end_of_row, row in _rows(path):
        if row["step"] > step or (row["step"] == step and not is_evaluation(row)):
            break
        end = end_of_row
    return end


def _rows(path: Path):
    """(byte offset after the row, row); ends at a last line that a crash has torn."""
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                yield end, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None


class TensorBoardWriter:
    """Writes TensorBoard event files. Raises ModuleNotFoundError, naming the extra, without tensorboardX."""

    def __init__(self, directory: str | os.PathLike[str]):
        try:
            import tensorboardX  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            raise ModuleNotFoundError(_missing("TensorBoard output", "tensorboardX")) from None
        self._make, self._directory, self._writer = tensorboardX.SummaryWriter, str(directory), None

    def resume(self, step: int) -> None:
        self._writer = self._make(self._directory, purge_step=step)

    def write(self, row: Row) -> None:
        assert self._writer is not None, "resume() comes first"
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbWriter:
    """Writes to Weights & Biases; a resumed run continues its own page. The key comes from the environment (`WANDB_API_KEY`).

    Raises ModuleNotFoundError, naming the extra, without wandb.
    """

    def __init__(self, project: str, *, directory: str | os.PathLike[str], config: Mapping[str, Any] | None = None):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            raise ModuleNotFoundError(_missing("Weights & Biases output", "wandb")) from None
        self._init, self._project, self._directory, self._config, self._run = wandb.init, project, Path(directory), config, None

    def resume(self, step: int) -> None:
        name = self._directory / "wandb_run_id"
        if step == 0 or not name.exists():
            write_text(name, secrets.token_hex(8))
        config = dict(self._config or {})
        self._run = self._init(
            project=self._project, dir=str(self._directory), config=config, id=name.read_text(), resume="allow"
        )

    def write(self, row: Row) -> None:
        assert self._run is not None, "resume() comes first"
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _missing(writer: str, package: str) -> str:
    return f"{writer} needs the package {package}: {install_command('writers')}"
