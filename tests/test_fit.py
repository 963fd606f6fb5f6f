"""The loop on a toy problem whose numbers are known: batch i adds i + 1 to the state w; the loss of step i is w before that."""

import collections
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.runtime import metrics as records
from dpo_jax.runtime import parallel
from dpo_jax.runtime.fit import EXIT_PREEMPTED, Evaluation, Interrupted, NonFinite, Preempted, Verdict, _Compilations, fit
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.progress import Board
from dpo_jax.runtime.training_progress import Progress
from dpo_jax.types import TrainState


@dataclasses.dataclass
class Batch:
    rows: np.ndarray
    uids: list
    stats: dict


def stream(index):
    rows = np.full((4,), (index + 1) / 4, np.float32)
    return Batch(rows, [f"train.jsonl:{index}"], {"pairs": 2, "scored_tokens": 30, "padding": 0.25})


def step(state, rows):
    loss = state.params["w"]
    return state.replace(step=state.step + 1, params={"w": loss + rows.sum()}), {"loss": loss, "grad_norm": rows.sum()}


compiled = jax.jit(step)


def start(step_number=0, w=0.0):
    return TrainState(jnp.int32(step_number), {"w": jnp.float32(w)}, ())


class Memory:
    """Checkpoints that remember, in the order of events shared with the log."""

    def __init__(self, events=None, error_at=None):
        self.saved, self.events, self.error_at, self.polls = {}, events if events is not None else [], error_at, 0

    def save(self, step, state, meta):
        self.saved[step] = (float(state.params["w"]), meta)
        self.events.append(("save", step))

    def wait(self):
        self.events.append(("wait",))

    def check_errors(self):
        self.polls += 1
        if self.polls == self.error_at:
            raise OSError("no space left")


class EventLog(records.MetricsLog):
    def __init__(self, path, events):
        super().__init__(path)
        self.events = events

    def write(self, row):
        super().write(row)
        self.events.append(("eval" if records.is_evaluation(row) else "row", row["step"]))

    def sync(self):
        super().sync()
        self.events.append(("sync",))


def test_every_number_belongs_to_its_step_and_rows_are_written_before_saves(tmp_path):
    events = []
    memory = Memory(events)
    seen = []
    with EventLog(tmp_path / "metrics.jsonl", events) as log:
        state = fit(
            compiled,
            start(),
            stream,
            total_steps=5,
            lr=lambda i: 10.0 * i,
            checkpoints=memory,
            meta={"config": 1},
            log=log,
            evaluation=Evaluation(lambda state, done: seen.append(done) or {"accuracy": state.params["w"] * 2}, every=3),
            save_every=2,
        )
    assert int(state.step) == 5
    rows = records.read_metrics(tmp_path / "metrics.jsonl")
    train = [row for row in rows if not records.is_evaluation(row)]
    assert [row["step"] for row in train] == [0, 1, 2, 3, 4]
    assert [row["loss"] for row in train] == [0, 1, 3, 6, 10]
    assert [row["grad_norm"] for row in train] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in train] == [0, 10, 20, 30, 40]
    assert all(row["padding"] == 0.25 for row in train)
    assert [row["scored_tokens_per_second"] for row in train] == pytest.approx([15 * row["pairs_per_second"] for row in train])
    assert [row for row in rows if records.is_evaluation(row)] == [
        {"step": 3, "eval/accuracy": 12.0},
        {"step": 5, "eval/accuracy": 30.0},
    ]
    assert seen == [3, 5]
    assert memory.saved == {2: (3.0, {"config": 1}), 4: (10.0, {"config": 1}), 5: (15.0, {"config": 1})}
    assert memory.polls == 5
    expected = "row0 row1 sync save2 row2 eval3 row3 sync save4 row4 eval5 sync save5 wait"
    assert " ".join("".join(map(str, event)) for event in events) == expected


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"save_every_minutes": 2.5}, [3, 6, 9, 10]),  # a step takes a minute
        ({"save_every_minutes": 2.5, "save_every": 4}, [3, 4, 7, 8, 10]),  # every save starts the minutes anew
        ({"save_every_minutes": 0.5}, list(range(1, 11))),
        ({"save_every_minutes": 60}, [10]),
        ({}, [10]),
    ],
)
def test_saves_by_minutes(options, saved):
    now, memory = 0.0, Memory()

    def minute(state, rows):
        nonlocal now
        now += 60
        return compiled(state, rows)

    fit(minute, start(), stream, total_steps=10, checkpoints=memory, clock=lambda: now, **options)
    assert list(memory.saved) == saved


@pytest.mark.parametrize("ends_at", [9, 10, 11, 12])
def test_hosts_save_by_the_minutes_of_one_of_them_at_the_same_step(ends_at):
    """Two hosts in turn, each in a thread; the agreement arrives a step late. Only the first counts minutes."""
    barrier, said = threading.Barrier(2), [0, 0]

    def run(host):
        pending, steps, memory = 0, 0, Memory()

        def agree(number):
            nonlocal pending
            said[host] = number
            barrier.wait()
            before, pending = pending, max(said)
            barrier.wait()
            return before

        def counted(state, rows):
            nonlocal steps
            steps += 1
            return compiled(state, rows)

        minutes = {"save_every_minutes": 3} if host == 0 else {}
        options = {"agree": agree, "clock": lambda: 60.0 * steps, "checkpoints": memory}
        fit(counted, start(), stream, total_steps=ends_at, **options, **minutes)
        return list(memory.saved)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == second == sorted({4, 8, *([12] if ends_at == 12 else []), ends_at})


def test_metrics_are_read_while_the_next_step_is_under_way(tmp_path):
    order = []

    def observed(state, rows):
        order.append(("step", int(state.step)))
        return compiled(state, rows)

    fit(observed, start(), stream, total_steps=3, check=lambda index, _: order.append(("read", index)))
    assert order == [("step", 0), ("step", 1), ("read", 0), ("step", 2), ("read", 1), ("read", 2)]


def test_resume_forgets_what_came_later_and_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with records.MetricsLog(path) as log:
        fit(compiled, start(), stream, total_steps=5, log=log, evaluation=Evaluation(lambda state, done: {"a": 1.0}, every=2))
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "lo')  # torn by a crash
    with records.MetricsLog(path) as log:
        fit(compiled, start(2, 3.0), stream, total_steps=6, log=log)
    rows = records.read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 5]
    assert [records.is_evaluation(row) for row in rows] == [False, False, True, False, False, False, False]
    assert [row["loss"] for row in rows if "loss" in row] == [0, 1, 3, 6, 10, 15]


def test_rows_of_a_run_that_starts_over_are_kept_aside(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    with records.MetricsLog(path) as log:
        log.resume(0)
    assert path.read_text() == ""
    assert (tmp_path / "quarantine" / "metrics.jsonl-0").read_text() == '{"step": 0}\n{"step": 1}\n'
    assert "the run starts over; the rows of the run before are now" in caplog.text


def test_missing_rows_of_earlier_steps_are_told(tmp_path, caplog):
    """A run that continues on another machine, from checkpoints in a bucket, has none of them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n')
    with records.MetricsLog(path) as log:
        log.resume(3)
    assert f"{path}: rows of 2 of the first 3 steps are missing" in caplog.text


def test_a_broken_line_is_named_and_costs_no_other_row(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    before = '{"step": 0}\n{"step\n{"step": 2, "eval/loss": null}\n{"step": 2}\n'
    path.write_text(before)
    with records.MetricsLog(path) as log:
        log.resume(2)
        log.write({"step": 2, "loss": 0.5})
    assert f"{path}: 1 damaged line is left out, 3 rows are used: line 2: no JSON object: JSONDecodeError" in caplog.text
    assert records.read_metrics(path) == [{"step": 0}, {"step": 2, "eval/loss": None}, {"step": 2, "loss": 0.5}]
    assert (tmp_path / "quarantine" / "metrics.jsonl-0").read_text() == before


def test_of_a_changed_row_no_number_is_believed(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with records.MetricsLog(path) as log:
        for step in range(4):
            log.write({"step": step, "loss": 0.25 * step})
    path.write_text(path.read_text().replace("0.25", "0.95"))
    with open(path, "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n')
    assert [row["step"] for row in records.read_metrics(path)] == [0, 2, 3]
    assert "line 2: differs from its checksum; line 5: has no checksum" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("loss", np.nan), ("grad_norm", np.inf)])
@pytest.mark.parametrize("save_every", [1, 100])
def test_non_finite_stops_at_its_step_and_saves_nothing_of_it(tmp_path, name, value, save_every):
    memory = Memory()

    def poisoned(state, rows):
        index = int(state.step)
        state, metrics = compiled(state, rows)
        return state, {**metrics, name: jnp.float32(value if index == 3 else 1)}

    message = rf"step 3: .*{name} = (nan|inf).*train.jsonl:3"
    with records.MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(NonFinite, match=message) as caught:
        fit(poisoned, start(), stream, total_steps=9, log=log, checkpoints=memory, save_every=save_every)
    assert caught.value.step == 3
    assert caught.value.uids == ["train.jsonl:3"]
    record = json.loads((tmp_path / "bad_batch.json").read_text())
    assert record["step"] == 3
    assert record["uids"] == ["train.jsonl:3"]
    assert record["metrics"][name] == str(value)
    assert sorted(memory.saved) == ([1, 2, 3] if save_every == 1 else [])
    assert [row["step"] for row in records.read_metrics(log.path)] == [0, 1, 2]


def test_errors_of_stream_check_and_checkpoints_surface():
    def broken(index):
        if index == 2:
            raise ValueError("row 2 is broken")
        assert threading.current_thread() is not threading.main_thread()
        return stream(index)

    with pytest.raises(ValueError, match="row 2 is broken"):
        fit(compiled, start(), broken, total_steps=5)

    def guard(index, values):
        if index == 0 and values["loss"] != 1:
            raise RuntimeError("loss of step 0 is not what it should be")

    with pytest.raises(RuntimeError, match="step 0"):
        fit(compiled, start(), stream, total_steps=5, check=guard)
    memory = Memory(error_at=2)
    with pytest.raises(OSError, match="no space"):
        fit(compiled, start(), stream, total_steps=5, checkpoints=memory)
    assert memory.saved == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_says_so(number):
    memory = Memory()
    before = signal.getsignal(number)

    def interrupted(state, rows):
        if int(state.step) == 2:
            os.kill(os.getpid(), number)
        return compiled(state, rows)

    with pytest.raises(Preempted, match=f"{number.name} after 3 steps; the state is saved") as caught:
        fit(
            interrupted,
            start(),
            stream,
            total_steps=9,
            checkpoints=memory,
            evaluation=Evaluation(lambda *_: pytest.fail("no time"), every=3),
        )
    assert caught.value.step == 3
    assert isinstance(caught.value, Interrupted) == (number == signal.SIGINT)  # whom no launcher starts again
    assert memory.saved == {3: (6.0, {})}
    assert memory.events[-1] == ("wait",)
    assert signal.getsignal(number) is before


def a_call_late():
    """What `hosts.agreement` does on several hosts."""
    pending = 0

    def agree(number):
        nonlocal pending
        before, pending = pending, number
        return before

    return agree


def terminated(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


AGREEMENTS = pytest.mark.parametrize("agreement", [lambda: lambda number: number, a_call_late], ids=["one host", "several"])


@AGREEMENTS
@pytest.mark.parametrize("during", ["evaluation", "save"])
def test_signal_during_the_last_evaluation_or_save_is_not_lost(during, agreement):
    memory = Memory()
    if during == "save":
        memory.wait = terminated
    options = {"evaluation": Evaluation(terminated)} if during == "evaluation" else {}
    with pytest.raises(Preempted, match="after 2 steps; the state is saved"):
        fit(compiled, start(), stream, total_steps=2, checkpoints=memory, agree=agreement(), **options)
    assert list(memory.saved) == [2]


@AGREEMENTS
@pytest.mark.parametrize("first", [False, True])
def test_a_signal_ends_an_evaluation_between_two_batches(tmp_path, first, agreement):
    memory, measured = Memory(), []

    def measure(state, done):
        for batch in range(9):
            measured.append(batch)
            if batch == 1:
                terminated()
            pause()

    state, options = (start(2, 3.0) if first else start()), {"total_steps": 4, "checkpoints": memory, "agree": agreement()}
    with (
        records.MetricsLog(tmp_path / "metrics.jsonl") as log,
        pytest.raises(Preempted, match="after 2 steps; the state is saved"),
    ):
        fit(compiled, state, stream, evaluation=Evaluation(measure, every=2, first=first), log=log, **options)
    assert len(measured) in (2, 3)
    assert list(memory.saved) == ([] if first else [2])  # nothing new
    assert not any(map(records.is_evaluation, records.read_metrics(log.path)))
    pause()  # nothing surrounds it any more


def test_a_save_that_is_due_at_an_evaluation_is_not_lost():
    memory, minutes = Memory(), iter(range(0, 6000, 60))

    def measure(state, done):
        pause()  # tells all hosts of the save that the first one wants
        return {}

    options = {"save_every_minutes": 2.5, "clock": lambda: next(minutes), "agree": a_call_late()}
    fit(compiled, start(), stream, total_steps=5, checkpoints=memory, evaluation=Evaluation(measure, every=1), **options)
    assert sorted(memory.saved) == [3, 5]


@AGREEMENTS
@pytest.mark.parametrize(("total", "verdict"), [(2, Verdict()), (4, Verdict(stop=True))])
def test_signal_during_an_evaluation_after_which_no_step_follows_is_not_lost(total, verdict, agreement):
    def run(state, measure):
        evaluation = Evaluation(measure, first=True, watch=lambda *_: verdict)
        return fit(pytest.fail, state, stream, total_steps=total, evaluation=evaluation, agree=agreement())

    with pytest.raises(Preempted, match="after 2 steps"):
        run(start(2, 3.0), terminated)
    state = start(2, 3.0)
    assert run(state, lambda *_: {}) is state


def test_second_signal_ends_the_process_at_once():
    code = """
import os, signal, time
from dpo_jax.runtime.signals import StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # at the same moment: the same wish
    time.sleep(0.5)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    began = time.monotonic()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == EXIT_PREEMPTED == 143
    assert "A second signal stops at once" in process.stderr
    assert process.stdout == "still here\n"
    assert time.monotonic() - began < 30


def test_a_finished_run_is_left_alone():
    state = start(4, 1.0)
    assert fit(pytest.fail, state, pytest.fail, total_steps=4, checkpoints=Memory()) is state


@pytest.mark.parametrize("make", [parallel.single_device, parallel.pmap_partitioner])
def test_state_of_any_partitioner(make):
    partitioner = make()

    def step(state, rows):
        total = rows.sum() if partitioner.axis_name is None else jax.lax.psum(rows.sum(), partitioner.axis_name)
        return state.replace(step=state.step + 1, params={"w": state.params["w"] + total}), {"loss": state.params["w"]}

    memory = Memory()
    run = partitioner.compile_step(step) if partitioner.row_shards == 1 else pmapped(partitioner, step)
    state = fit(
        run,
        partitioner.put_state(start(1, 1.0)),
        stream,
        total_steps=4,
        checkpoints=memory,
        save_every=2,
        get_state=partitioner.get_state,
    )
    assert memory.saved == {2: (3.0, {}), 4: (10.0, {})}
    assert int(partitioner.get_state(state).step) == 4


def pmapped(partitioner, step):
    inner = jax.pmap(step, axis_name=partitioner.axis_name, donate_argnums=0)

    def run(state, rows):
        state, metrics = inner(state, rows.reshape(partitioner.row_shards, -1))
        return state, jax.tree.map(lambda leaf: leaf[0], metrics)

    return run


def test_progress_off_a_terminal_prints_plain_lines():
    out = io.StringIO()
    fit(
        compiled,
        start(),
        stream,
        total_steps=3,
        progress=Progress(board=Board(out)),
        evaluation=Evaluation(lambda *_: {"accuracy": 0.5}),
    )
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 1/3  loss 0.000  ")
    assert "pairs/s" in lines[0]
    assert "scored tokens/s" in lines[0]
    assert lines[3] == "eval @3: accuracy 0.500"


def test_progress_on_a_terminal_is_one_line():
    out = io.StringIO()
    out.isatty = lambda: True
    fit(compiled, start(1), stream, total_steps=3, progress=Progress(board=Board(out)))
    assert out.getvalue().count("\n") == 1
    assert "step 3/3  loss 2.000" in out.getvalue().splitlines()[-1]


def test_each_shape_is_named_before_it_is_compiled(monkeypatch):
    named = []
    monkeypatch.setattr("dpo_jax.runtime.fit.reported", lambda what, **_: named.append(what) or contextlib.nullcontext())
    rows = collections.namedtuple("Rows", "tokens")
    compilations = _Compilations(5)
    for count in (3, 3, 4, 3):
        with compilations.named(rows(np.zeros((count, 8)))):
            pass
    assert named == ["compiling shape 1 of 5 (3 rows of 8 tokens)", "compiling shape 2 of 5 (4 rows of 8 tokens)"]


def test_values_that_json_cannot_hold_are_null(tmp_path):
    with records.MetricsLog(tmp_path / "m.jsonl") as log:
        log.write({"step": 0, "kl": float("nan")})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0, "kl": null, "crc32": "26b0f093"}\n'
    assert records.read_metrics(tmp_path / "m.jsonl") == [{"step": 0, "kl": None}]
