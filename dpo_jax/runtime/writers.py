"""Further metrics destinations: TensorBoard, Weights & Biases, Trackio. `metrics.jsonl` is the record; these are copies.

`Delivery` sends each row to one of them once, even when a run is resumed. A failure does not stop training: it is reported
once, and the rows are sent later.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import re
import secrets
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dpo_jax.extras import install_command
from dpo_jax.runtime.fit import Interrupted, Preempted
from dpo_jax.runtime.metrics import Row, is_evaluation, tell_failure
from dpo_jax.shapes import check_shape
from dpo_jax.untrusted import Unreadable, parse_object, read_object, read_text, regular
from dpo_jax.writing import naming, write_text

logger = logging.getLogger(__name__)
RETRY = 100  # rows until a failed destination is tried again
SAMPLED = "eval/samples/tokens"  # a metric of evaluations with completions
_SHOWN = ("prompt", "completion", "finished")  # of a completion


_NOTHING = (-1, True)  # comes before each row


def _key(row: Row) -> tuple[int, bool]:
    """(step, whether it is a training row): rows are measured in the order of their keys."""
    return int(row["step"]), not is_evaluation(row)


class Place(Protocol):
    """Interface to a metrics package. `open` is called first, with the number of steps taken so far. Any method may raise.

    A place may also have `failed(error)`, which is called before `close` if the run ends with an error, and
    `texts(step, samples)` for the completions of an evaluation.
    """

    def open(self, step: int) -> None: ...
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class Delivery:
    """Sends the rows of a metrics log to the destination opened by `make`; `name` is used in messages.

    `record` is the file that stores the last row sent. A resumed run therefore sends no row twice, and sends missing rows
    (after a kill or a failure, or if the destination was added later). A destination that `forgets` drops its rows from `step`
    on when opened there, and gets them again. `samples` is the folder of the completions of evaluations, which are sent once,
    with the row of their evaluation, and not again if that fails.
    """

    def __init__(
        self, name: str, make: Callable[[], Place], *, record: Path, forgets: bool = False, samples: Path | None = None
    ) -> None:
        self._name, self._make, self._record, self._forgets, self._samples = name, make, record, forgets, samples
        self._place: Place | None = None
        self._step, self._wait, self._failed = 0, 0, False
        self._last = _NOTHING  # the key of the last row sent
        self._queue: collections.deque[Row] = collections.deque()
        self._ended_by: BaseException | None = None

    def resume(self, step: int, rows: Sequence[Row]) -> None:
        """`rows`: all rows of the log after `step` steps. Called before the first `write`."""
        self._step = step
        # At step 0 this is a new run, not one that may have begun here before.
        self._last = self._recorded(rows) if step else _NOTHING
        if self._forgets:
            self._last = min(self._last, (step - 1, True))
        self._queue = collections.deque(row for row in rows if _key(row) > self._last)
        self._deliver()

    def write(self, row: Row) -> None:
        if _key(row) > self._last:
            self._queue.append(row)
        self._deliver()

    def failed(self, error: BaseException) -> None:
        self._ended_by = error

    def close(self) -> None:
        self._wait = 0
        self._deliver()
        try:
            if self._place is not None:
                if self._ended_by is not None:
                    tell_failure(self._place, self._ended_by)
                self._place.close()
        except Exception as error:
            self._fail(error)

    def _deliver(self) -> None:
        if self._wait > 0:
            self._wait -= 1
            return
        try:
            if self._place is None:
                place = self._make()
                place.open(self._step)
                self._place = place
            while self._queue:
                self._place.write(row := self._queue[0])
                self._last = _key(self._queue.popleft())
                self._record.parent.mkdir(exist_ok=True)
                with naming(self._record):  # once per row: it need not survive a machine crash
                    self._record.write_text(json.dumps(dict(zip(("step", "training"), self._last, strict=True))))
                self._send_texts(row)
        except Exception as error:
            self._fail(error)

    def _send_texts(self, row: Row) -> None:
        texts = getattr(self._place, "texts", None)
        if texts is None or self._samples is None or SAMPLED not in row:
            return
        file = self._samples / f"step-{row['step']:08}.jsonl"
        try:
            texts(int(row["step"]), [parse_object(line, str(file)) for line in read_text(regular(file)).split("\n") if line])
        except Exception as error:
            logger.warning("%s: the samples in %s were not sent: %s: %s", self._name, file, type(error).__name__, error)

    def _recorded(self, rows: Sequence[Row]) -> tuple[int, bool]:
        try:
            found = check_shape(read_object(self._record), {"step": int, "training": bool}, str(self._record))
            return found["step"], found["training"]
        except FileNotFoundError:
            return _NOTHING
        except (OSError, Unreadable):  # truncated by a machine crash: rather lose a row than send it twice
            return _key(rows[-1]) if rows else _NOTHING

    def _fail(self, error: Exception) -> None:
        self._wait = RETRY
        if not self._failed:
            words = " ".join(str(error).split())[:300]
            logger.warning(
                "%s: %s%s; training continues. metrics.jsonl has every row, and missing rows are sent when it works "
                "again, or when the run continues",
                self._name,
                type(error).__name__,
                f": {words}" if words else "",
            )
        self._failed = True


GLOBAL_STEP = "train/global_step"


class AsTrl:
    """A place whose rows get the names of transformers' trainers: "train/loss", "train/learning_rate"; "eval/..." stay.

    The loss of `sft` is then per token, as there. `train/global_step`, the axis of their charts, is that of transformers; a
    row's own step stays ours, of which the first is 0.
    """

    def __init__(self, place: Place) -> None:
        self._place = place

    def open(self, step: int) -> None:
        self._place.open(step)
        if isinstance(self._place, Wandb):
            self._place.use_axis(GLOBAL_STEP)

    def write(self, row: Row) -> None:
        self._place.write(named_as_trl(row))

    def failed(self, error: BaseException) -> None:
        tell_failure(self._place, error)

    def texts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        if (texts := getattr(self._place, "texts", None)) is not None:
            texts(step, samples)

    def close(self) -> None:
        self._place.close()


def named_as_trl(row: Row) -> Row:
    """
    >>> named_as_trl({"step": 7, "loss": 0.6, "lr": 1e-6, "rewards/margins": 0.2})
    {'step': 7, 'train/loss': 0.6, 'train/learning_rate': 1e-06, 'train/rewards/margins': 0.2, 'train/global_step': 8}
    """
    values = dict(row)
    for prefix in ("", "eval/"):
        if f"{prefix}nll_per_token" in values:
            values[f"{prefix}loss"] = values.pop(f"{prefix}nll_per_token")
    for ours, theirs in (("lr", "learning_rate"), ("router/balance", "aux_loss")):
        if ours in values:
            values[theirs] = values.pop(ours)
    names = {name: name if name == "step" or name.startswith("eval/") else f"train/{name}" for name in values}
    # A training row was measured before its update, and there it has the number of updates after it.
    taken = int(row["step"]) + (not is_evaluation(row))
    return {names[name]: value for name, value in values.items()} | {GLOBAL_STEP: taken}


class TensorBoard:
    """TensorBoard event files. Raises ModuleNotFoundError, naming the extra, without tensorboardX."""

    def __init__(self, directory: str | Path) -> None:
        try:
            import tensorboardX  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise _missing("TensorBoard", "tensorboardX", error) from error
        self._make, self._directory, self._writer = tensorboardX.SummaryWriter, str(directory), None

    def open(self, step: int) -> None:
        # Its file names have a resolution of one second, so a process started in the same second would overwrite the file.
        self._writer = self._make(self._directory, purge_step=step, filename_suffix=f".{os.getpid()}")

    def write(self, row: Row) -> None:
        assert self._writer is not None, "open() comes first"
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()

    def texts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        assert self._writer is not None, "open() comes first"
        parts = ((name, str(sample[name])) for sample in samples for name in _SHOWN[:2])
        # Indented: Markdown shows a text as it is.
        shown = (f"**{name}**\n\n{textwrap.indent(text, '    ', lambda line: True)}" for name, text in parts)
        self._writer.add_text("samples", "\n\n".join(shown), step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _RunElsewhere:
    """A run of a package that logs the numbers of one step at a time. `open` of a subclass starts or resumes it."""

    _run: Any = None
    _ending: Mapping[str, Any] = {}  # arguments of `finish`

    def __init__(self, package: Any, project: str, directory: str | Path, config: Mapping[str, Any] | None) -> None:
        self._package, self._project, self._directory, self._config = package, project, Path(directory), config

    def write(self, row: Row) -> None:
        assert self._run is not None, "open() comes first"
        self._run.log(_values(row), step=int(row["step"]))

    def texts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        table = self._package.Table(columns=list(_SHOWN), data=[[sample[name] for name in _SHOWN] for sample in samples])
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(**self._ending)


class Wandb(_RunElsewhere):
    """Weights & Biases; a resumed run keeps its page. It is named after its directory (`quickstart-dpo`), or by `WANDB_NAME`.

    wandb reads the environment, such as `WANDB_API_KEY`, `WANDB_ENTITY` and `WANDB_TAGS`.

    Raises ModuleNotFoundError, naming the extra, without wandb.
    """

    def __init__(self, project: str, *, directory: str | Path, config: Mapping[str, Any] | None = None) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise _missing("Weights & Biases", "wandb", error) from error
        super().__init__(wandb, project, directory, config)

    def open(self, step: int) -> None:
        identity = _identity(self._directory / "wandb_run_id", step)
        config, name = dict(self._config or {}), os.environ.get("WANDB_NAME") or _name(self._directory)
        options = {"project": self._project, "dir": str(self._directory), "config": config, "id": identity, "name": name}
        # A continued run may have other options that do not change its result, such as the devices.
        self._run = self._package.init(**options, resume="allow", allow_val_change=True)

    def failed(self, error: BaseException) -> None:
        """The page shows the run as failed, as preempted after SIGTERM, or as killed after Ctrl-C (wandb's exit code 255)."""
        by_hand = isinstance(error, KeyboardInterrupt | Interrupted)
        self._ending = {"exit_code": 255 if by_hand else 1}
        if isinstance(error, Preempted) and not by_hand and self._run is not None:
            self._run.mark_preempting()

    def use_axis(self, name: str) -> None:
        """Makes the metric `name`, which every row must have, the horizontal axis of all charts."""
        self._run.define_metric(name)
        self._run.define_metric("*", step_metric=name, step_sync=True)


class Trackio(_RunElsewhere):
    """Trackio, local or at `TRACKIO_SPACE_ID`; a resumed run keeps its name there, such as `quickstart-dpo-9f...`.

    Raises ModuleNotFoundError, naming the extra, without trackio.
    """

    def __init__(self, project: str, *, directory: str | Path, config: Mapping[str, Any] | None = None) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise _missing("Trackio", "trackio", error) from error
        super().__init__(trackio, project, directory, config)

    def open(self, step: int) -> None:
        name = _identity(self._directory / "trackio_run_name", step, before=f"{_name(self._directory)}-")
        config = json.loads(json.dumps(dict(self._config or {}), default=str))
        self._run = self._package.init(project=self._project, name=name, config=config, resume="allow", embed=False)


def _values(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}


def _name(directory: Path) -> str:
    """The name of a run for readers: "runs/quickstart/dpo" becomes "quickstart-dpo"."""
    *_, above, last = ("", "", *directory.absolute().parts)
    return re.sub(r"[^\w.-]+", "-", f"{above}-{last}", flags=re.ASCII).strip("-")[:80] or "run"


def _identity(file: Path, step: int, *, before: str = "") -> str:
    """The identity of the run that is stored in a file; at step 0 a new one, which begins with `before`."""
    known = ""
    if step and file.exists():
        try:
            known = read_text(regular(file))
        except Unreadable:
            known = ""
    if not re.fullmatch(r"[\w.-]{1,128}", known):
        known = before + secrets.token_hex(8)
        write_text(file, known)
    return known


def _missing(writer: str, package: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    lacks = "" if error.name in (package, None) else f" ({error.name} is missing)"
    return ModuleNotFoundError(f"{writer} needs the package {package}{lacks}: {install_command('writers')}")
