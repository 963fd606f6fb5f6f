"""TensorBoard, wandb and Trackio get each row of a run once, whatever happens, and stop no training.

The tests at the end use the real packages, offline, where they are installed (the `writers` extra).
"""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dpo_jax.cli import metrics_writers
from dpo_jax.cli.config import Config, ConfigError, DataConfig, MixConfig, ModelConfig, RunConfig
from dpo_jax.cli.config.loading import check
from dpo_jax.cli.preflight.packages import check_writers
from dpo_jax.runtime import writers
from dpo_jax.runtime.fit import Interrupted, Preempted
from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.writers import Delivery, TensorBoard, Trackio, Wandb


class Shelf:
    """A place that remembers, across processes, and fails while `broken`."""

    def __init__(self, forgets=False):
        self.rows, self.opened, self.closed, self.broken, self.forgets = [], [], 0, None, forgets

    def __call__(self):
        self._check()
        return self

    def _check(self):
        if self.broken:
            raise self.broken

    def open(self, step):
        self._check()
        self.opened.append(step)
        if self.forgets:
            self.rows = [row for row in self.rows if row["step"] < step]

    def write(self, row):
        self._check()
        self.rows.append(dict(row))

    def close(self):
        self._check()
        self.closed += 1


def training(step):
    return {"step": step, "loss": step / 2}


def judged(step):
    return {"step": step, "eval/loss": step / 4}


def process(folder, shelf, begin, rows, *, on=True, evaluated=True):
    """One process of a run: it continues after `begin` steps, and takes `rows`."""
    places = [Delivery("Shelf", shelf, record=folder / "writers" / "shelf.json", forgets=shelf.forgets)] if on else []
    with MetricsLog(folder / "metrics.jsonl", writers=places) as log:
        log.resume(begin, evaluated=evaluated)
        for row in rows:
            log.write(row)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_continued_run_gives_no_row_twice_and_brings_those_that_are_lacking(tmp_path, forgets):
    shelf = Shelf(forgets)
    whole = [training(0), training(1), judged(2), training(2), training(3), judged(4)]
    process(tmp_path, shelf, 0, whole[:5])  # killed after step 4; the checkpoint is of step 2
    process(tmp_path, shelf, 2, whole[3:5])
    process(tmp_path, shelf, 4, [], on=False)  # the writer was off
    process(tmp_path, shelf, 4, [judged(4)], on=False)
    process(tmp_path, shelf, 4, [training(4)])
    assert shelf.rows == [*whole, training(4)]
    assert (shelf.opened, shelf.closed) == ([0, 2, 4], 3)


def test_a_writer_that_is_turned_on_later_gets_all_rows(tmp_path):
    shelf = Shelf()
    process(tmp_path, shelf, 0, [training(0), training(1)], on=False)
    process(tmp_path, shelf, 2, [training(2)])
    assert shelf.rows == [training(step) for step in range(3)]


def test_a_run_that_begins_anew_is_another_run_there(tmp_path):
    shelf = Shelf()
    process(tmp_path, shelf, 0, [training(0)])
    process(tmp_path, shelf, 0, [training(0)])
    assert shelf.rows == [training(0)] * 2


@pytest.mark.parametrize("when", ["at the beginning", "later"])
def test_what_fails_is_told_once_stops_nothing_and_is_made_good(tmp_path, caplog, monkeypatch, when):
    monkeypatch.setattr(writers, "RETRY", 3)
    shelf = Shelf()
    rows = [training(step) for step in range(12)]
    with (
        caplog.at_level(logging.WARNING),
        MetricsLog(tmp_path / "metrics.jsonl", writers=[Delivery("Shelf", shelf, record=tmp_path / "w" / "shelf.json")]) as log,
    ):
        if when == "at the beginning":
            shelf.broken = OSError(28, "No space left on device")
        log.resume(0)
        for row in rows:
            if row["step"] == 2:
                shelf.broken = OSError(28, "No space left on device")
            if row["step"] == 6:
                shelf.broken = None
            log.write(row)
            if row["step"] == 5:
                assert len(shelf.rows) == (2 if when == "later" else 0)
    assert shelf.rows == rows
    assert [record.getMessage() for record in caplog.records] == [
        "Shelf: OSError: [Errno 28] No space left on device; training continues. metrics.jsonl has every row, and missing "
        "rows are sent when it works again, or when the run continues"
    ]


def test_what_failed_to_the_end_is_brought_by_the_next_process(tmp_path, caplog):
    shelf = Shelf()
    process(tmp_path, shelf, 0, [training(0)])
    shelf.broken = ConnectionError()
    process(tmp_path, shelf, 1, [training(1), training(2)])
    shelf.broken = None
    process(tmp_path, shelf, 3, [training(3)])
    assert shelf.rows == [training(step) for step in range(4)]
    assert len(caplog.records) == 1


def test_another_rhythm_of_evaluations_moves_no_row(tmp_path):
    shelf = Shelf()
    process(tmp_path, shelf, 0, [training(0), training(1), judged(2), training(2), judged(3)])
    process(tmp_path, shelf, 1, [training(step) for step in (1, 2, 3)])
    assert shelf.rows == [training(0), training(1), judged(2), training(2), judged(3), training(3)]


def test_a_torn_record_gives_no_row_twice(tmp_path):
    shelf = Shelf()
    process(tmp_path, shelf, 0, [training(0), training(1)])
    (tmp_path / "writers" / "shelf.json").write_text('{"st')
    process(tmp_path, shelf, 2, [training(2)])
    assert shelf.rows == [training(step) for step in range(3)]


def test_metrics_may_have_the_names_of_trl(tmp_path, monkeypatch):
    shelf = Shelf()
    monkeypatch.setattr(metrics_writers, "TensorBoard", lambda folder: shelf())
    for names, wanted in {
        "own": [{"step": 0, "loss": 0.6, "lr": 0.1}, {"step": 1, "eval/nll_per_token": 2.0, "eval/loss": 9.0}],
        "trl": [
            {"step": 0, "train/loss": 0.6, "train/learning_rate": 0.1, "train/global_step": 1},
            {"step": 1, "eval/loss": 2.0, "train/global_step": 1},
        ],
    }.items():
        config, shelf.rows = Config(run=RunConfig(tensorboard=True, metric_names=names)), []
        run = types.SimpleNamespace(path=tmp_path / names / "dpo")
        run.path.mkdir(parents=True)
        (writer,) = metrics_writers.metrics_writers(config, run, {})
        writer.resume(0, [])
        writer.write({"step": 0, "loss": 0.6, "lr": 0.1})
        writer.write({"step": 1, "eval/nll_per_token": 2.0, "eval/loss": 9.0})
        assert shelf.rows == wanted
    with pytest.raises(ConfigError, match=r"run.metric_names: is read with tensorboard, wandb or trackio only"):
        check(Config(run=RunConfig(metric_names="trl")))


def test_a_missing_package_names_the_extra_and_a_broken_one_stops_nothing(tmp_path, monkeypatch, caplog):
    for module, make in (("tensorboardX", TensorBoard), ("wandb", Wandb), ("trackio", Trackio)):
        monkeypatch.setitem(sys.modules, module, None)
        options = {} if make is TensorBoard else {"directory": tmp_path}
        with pytest.raises(ModuleNotFoundError, match=rf"{module}: (uv )?pip install -e .*\[writers\]"):
            make("p", **options)
    with MetricsLog(
        tmp_path / "metrics.jsonl",
        writers=[Delivery("wandb", lambda: Wandb("p", directory=tmp_path), record=tmp_path / "wandb.json")],
    ) as log:
        log.resume(0)
        log.write(training(0))
    assert "wandb: ModuleNotFoundError: Weights & Biases needs the package wandb" in caplog.text


def test_before_it_begins_a_command_refuses_a_writer_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for option, package in {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}.items():
        value = True if option == "tensorboard" else "project"
        with pytest.raises(ConfigError, match=f"^run.{option}: needs the package {package}: "):
            check_writers(Config(run=RunConfig(**{option: value})))


def test_a_continued_run_has_its_own_page_again(tmp_path, monkeypatch):
    opened = []
    run = types.SimpleNamespace(log=lambda row, step: None, finish=lambda: None)
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=lambda **options: opened.append(options) or run))
    for make, key in ((Wandb, "id"), (Trackio, "name")):
        opened.clear()
        for step in (0, 5, 0):
            make("p", directory=tmp_path).open(step)
        first, second, third = (options[key] for options in opened)
        assert first == second != third
        assert {options["resume"] for options in opened} == {"allow"}


class Tables:
    """A stand-in for wandb and Trackio that keeps what is logged."""

    def __init__(self, broken=False):
        self.logged, self.broken = [], broken

    def init(self, **options):
        return types.SimpleNamespace(
            log=lambda row, step: self.logged.append((step, row)), finish=lambda: None, define_metric=lambda *a, **b: None
        )

    def Table(self, columns, data):
        if self.broken:
            raise ConnectionError("no upload")
        return [dict(zip(columns, row, strict=True)) for row in data]


@pytest.mark.parametrize("names", ["own", "trl"])
def test_the_samples_of_an_evaluation_are_sent_once_as_texts(tmp_path, monkeypatch, caplog, names):
    packages = {"wandb": Tables(), "trackio": Tables(broken=True)}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    config = Config(run=RunConfig(wandb="p", trackio="p", metric_names=names))
    run = types.SimpleNamespace(path=tmp_path / "dpo")
    (run.path / "samples").mkdir(parents=True)
    sample = {"prompt": "Hi\u2028", "completion": "there.", "finished": True}
    (run.path / "samples" / "step-00000002.jsonl").write_text(json.dumps({**sample, "turns": []}) + "\n")
    rows = [training(0), training(1), {**judged(2), "eval/samples/tokens": 3.0}]
    for begin, written in ((0, rows), (2, [training(2)])):
        with MetricsLog(run.path / "metrics.jsonl", writers=metrics_writers.metrics_writers(config, run, {})) as log:
            log.resume(begin)
            for row in written:
                log.write(row)
    tables = [(step, row["samples"]) for step, row in packages["wandb"].logged if "samples" in row]
    assert tables == [(2, [sample])]
    assert [step for step, row in packages["trackio"].logged] == [0, 1, 2, 2]  # all rows, without the texts
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith("Trackio: the samples in ")
    assert warning.endswith("were not sent: ConnectionError: no upload")


def test_tensorboard_shows_samples_as_they_are(monkeypatch, tmp_path):
    shown = []
    writer = types.SimpleNamespace(add_text=lambda *what: shown.append(what), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=lambda *a, **b: writer))
    place = TensorBoard(tmp_path)
    place.open(0)
    place.texts(4, [{"prompt": "# Hi\n\nall", "completion": "*there*", "finished": True}])
    assert shown == [("samples", "**prompt**\n\n    # Hi\n    \n    all\n\n**completion**\n\n    *there*", 4)]


ENDS = {
    "finish {}": None,
    "finish {'exit_code': 1}": ValueError("broken"),
    "finish {'exit_code': 255}": Interrupted("SIGINT", step=1),
    "preempting, finish {'exit_code': 1}": Preempted("SIGTERM", step=1),
}


@pytest.mark.parametrize("told", ENDS)
@pytest.mark.parametrize("names", ["own", "trl"])
def test_a_run_that_fails_is_not_shown_as_finished(tmp_path, monkeypatch, told, names):
    def fake(kind):
        return types.SimpleNamespace(
            log=lambda row, step: None,
            define_metric=lambda *names, **options: None,
            mark_preempting=lambda: calls[kind].append("preempting"),
            finish=lambda **options: calls[kind].append(f"finish {options}"),
        )

    calls = {"wandb": [], "trackio": []}
    for kind in calls:
        monkeypatch.setitem(sys.modules, kind, types.SimpleNamespace(init=lambda kind=kind, **options: fake(kind)))
    config = Config(run=RunConfig(wandb="p", trackio="p", metric_names=names))
    run = types.SimpleNamespace(path=tmp_path / "dpo")
    run.path.mkdir()
    with (
        contextlib.suppress(ValueError, Preempted),
        MetricsLog(tmp_path / "metrics.jsonl", writers=metrics_writers.metrics_writers(config, run, {})) as log,
    ):
        log.resume(0)
        log.write(training(0))
        if ENDS[told] is not None:
            raise ENDS[told]
    assert calls == {"wandb": told.split(", "), "trackio": ["finish {}"]}


@pytest.mark.parametrize("cause", [None, ValueError("NaN")])
def test_writers_are_told_and_closed_also_if_the_disk_is_full(tmp_path, cause):
    told = []
    place = types.SimpleNamespace(failed=told.append, close=lambda: told.append("closed"))
    log = MetricsLog(tmp_path / "metrics.jsonl", writers=[place])
    log._file.close()
    full = OSError(errno.ENOSPC, "No space left on device")
    log._file = types.SimpleNamespace(close=lambda: raised(full))
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        log.close(cause)
    assert told == [cause or full, "closed"]


def raised(error):
    raise error


def test_the_page_of_a_run_has_its_settings(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: opened.append(options)))
    run = types.SimpleNamespace(path=tmp_path / "dpo")
    run.path.mkdir()
    data = DataConfig(mix=(MixConfig("org/name", 2.0),), max_length=300)
    config = Config(run=RunConfig(wandb="p"), model=ModelConfig(path="org/model"), data=data)
    (writer,) = metrics_writers.metrics_writers(config, run, {"lr": 0.1, "data": "0f1e"})
    writer.resume(0, [])
    shown = json.loads(json.dumps(opened[0]["config"]))
    assert (shown["model.path"], shown["data.max_length"], shown["dpo.beta"]) == ("org/model", 300, 0.1)
    assert (shown["data.mix"][0]["path"], shown["lr"], shown["data"]) == ("org/name", 0.1, "0f1e")
    assert not any(name.startswith(("sft.", "eval.")) for name in shown)
    assert opened[0]["allow_val_change"]


def test_runs_elsewhere_are_named_after_their_directory(tmp_path, monkeypatch):
    opened = []
    monkeypatch.delenv("WANDB_NAME", raising=False)
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=lambda **options: opened.append(options)))
    folder = tmp_path / "h h \udc80" / "dpo"
    folder.mkdir(parents=True)
    for make in (Wandb, Trackio):
        make("p", directory=folder).open(0)
    assert opened[0]["name"] == "h-h--dpo"  # readable, and of plain characters
    assert re.fullmatch(r"h-h--dpo-[0-9a-f]{16}", opened[1]["name"])
    monkeypatch.setenv("WANDB_NAME", "mine")
    Wandb("p", directory=folder).open(0)
    assert opened[2]["name"] == "mine"


# The real packages

RUN = """
import sys, logging
from pathlib import Path
from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.writers import Delivery, TensorBoard, Trackio, Wandb

kind, folder, begin, end = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
config = {"beta": 0.1, "policy": None, "architecture": {"layers": 2}, "folder": folder}
make = {
    "tensorboardX": lambda: TensorBoard(folder / "tb"),
    "wandb": lambda: Wandb("pairs", directory=folder, config={**config, "folder": str(folder)}),
    "trackio": lambda: Trackio("pairs", directory=folder, config=config),
}[kind]
place = Delivery(kind, make, record=folder / "writers" / "rows.json", forgets=kind == "tensorboardX")
with MetricsLog(folder / "metrics.jsonl", writers=[place]) as log:
    log.resume(begin)
    for step in range(begin, end):
        log.write({"step": step, "loss": step / 2})
    log.write({"step": end, "eval/loss": 9.0})
"""


def continued(kind, folder):
    """A run of five steps whose second process begins at a checkpoint one step before the end of the first."""
    pytest.importorskip(kind)
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        **{"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"},
    }
    for begin, end in ((0, 3), (2, 5)):
        done = subprocess.run(
            [sys.executable, "-c", RUN, kind, str(folder), str(begin), str(end)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "training continues" not in done.stderr, done.stderr


LOSSES = [(step, step / 2) for step in range(5)]


@pytest.mark.writers
def test_tensorboardx_writes_each_step_once_as_a_reader_of_its_files_sees_them(tmp_path):
    continued("tensorboardX", tmp_path)
    from tensorboardX.proto.event_pb2 import Event

    seen = {}
    for file in sorted((tmp_path / "tb").glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:  # length, checksum, event, checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == 1:  # START: readers drop what they have of this step and later
                seen = {key: value for key, value in seen.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in seen
                seen[value.tag, event.step] = value.simple_value
    assert [(step, value) for (tag, step), value in seen.items() if tag == "loss"] == LOSSES
    assert {key for key in seen if key[0] == "eval/loss"} == {("eval/loss", 5)}


def leveldb_records(data, first, block=2**15):
    """The records of a log in the format of LevelDB, as wandb writes it behind a header of `first` bytes."""
    at, parts = 0, b""
    while at < len(data):
        left = block - (at + first) % block
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.writers
def test_wandb_has_each_step_once_under_one_id(tmp_path):
    continued("wandb", tmp_path)
    from wandb.proto import wandb_internal_pb2

    rows, ids = [], set()
    for file in sorted(Path(tmp_path / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:], first=7):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows += [(row["_step"], row["loss"])] if "loss" in row else []
    assert rows == LOSSES
    assert ids == {(tmp_path / "wandb_run_id").read_text()}


@pytest.mark.writers
def test_trackio_has_each_step_once_in_one_run(tmp_path):
    continued("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "pairs.db") as database:
        found = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    losses = [(step, json.loads(metrics)["loss"]) for _, step, metrics in found if "loss" in json.loads(metrics)]
    assert losses == LOSSES
    assert {name for name, *_ in found} == {(tmp_path / "trackio_run_name").read_text()}
