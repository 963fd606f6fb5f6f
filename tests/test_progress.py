"""What people see of a command: lines that fit a terminal, lines of a log file that is never silent for long, honest times."""

import io
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.cli.main import main
from dpo_jax.runtime.compiling import report_compiling
from dpo_jax.runtime.progress import BOARD, Board, duration, reported
from dpo_jax.runtime.training_progress import Progress, evaluation_line
from dpo_jax.untrusted import Unreadable

STEP = {
    "loss": 0.62314,
    "rewards/accuracies": 0.71,
    "rewards/margins": 0.4213,
    "grad_norm": 3.0,
    "pairs_per_second": 31.2,
    "scored_tokens_per_second": 40_960.0,
}
EVALUATION = {
    "step": 16,
    "eval/loss": 0.021,
    "eval/rewards/accuracies": 1.0,
    "eval/rewards/accuracies_low": 0.93,
    "eval/rewards/accuracies_high": 1.0,
    "eval/rewards/margins": 3.9,
    "eval/rewards/chosen": 1.09,
    "eval/rewards/rejected": -2.8,
    "eval/displacement/chosen": 10.9,
    "eval/displacement/rejected": -28.0,
}

ROOT = Path(__file__).parent.parent


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self):
        return self.now


class Screen(io.StringIO):
    def isatty(self):
        return True

    def shown(self):
        """The line that a terminal shows now, and the lines above it."""
        *above, last = self.getvalue().split("\n")
        line = [text.rpartition("\r")[2] for text in (*above, last)]
        return [text.removeprefix("\x1b[K") for text in line[:-1]], line[-1].removesuffix("\x1b[K")


def board(file, *, columns=80):
    clock = Clock()
    return Board(file, clock=clock, columns=columns, alone=True), clock


def pass_time(on, clock, seconds):
    """Second by second, as the thread of a board does it."""
    for _ in range(seconds):
        clock.now += 1
        on.tick()


def train(on, clock, *, steps, seconds, total, epochs=0.0, first=0):
    """Steps that take `seconds` each."""
    training = Progress(epochs=epochs, board=on)
    training.start(first, total)
    for step in range(first, first + steps):
        pass_time(on, clock, seconds)
        training.step({"step": step, **STEP})
    return training


# A terminal.


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_the_line_of_a_step_fits_and_begins_with_what_was_learned(columns):
    on, clock = board(Screen(), columns=columns)
    line = train(on, clock, steps=5, seconds=2, total=10_240, epochs=3).line(columns - 1)
    assert len(line) < columns
    assert "step 5/10240" in line
    found = [line.index(word) for word in ("loss 0.623", "acc 0.71", "margin 0.42")]
    assert found == sorted(found)
    later = [line.index(word) for word in ("pairs/s", "ETA") if word in line]
    assert all(place > found[-1] for place in later)
    assert ("ETA 5:41:10" in line and "31.2 pairs/s" in line) == (columns >= 80)
    assert line.startswith("[") == (columns >= 140)


def test_one_line_of_a_terminal_changes_and_what_stays_is_above_it():
    screen = Screen()
    on, clock = board(screen)
    training = train(on, clock, steps=3, seconds=1, total=4)
    training.evaluated(EVALUATION)
    training.step({"step": 3, **STEP})
    above, now = screen.shown()
    assert len(above) == 1
    assert above[0].startswith("eval @16: loss 0.021")
    assert now.startswith("step 4/4  loss 0.623")
    training.close()
    above, now = screen.shown()
    assert now == ""
    assert above[-1].startswith("step 4/4  loss 0.623")


def test_an_evaluation_fits_a_terminal():
    assert evaluation_line(EVALUATION) == (
        "eval @16: loss 0.021  acc 1.00 [0.93, 1.00]  margin 3.90  chosen +10.9  rejected -28.0"
    )
    line = evaluation_line({**EVALUATION, "step": 1024}, width=80)
    assert line == "eval @1024: loss 0.021 acc 1.00 [0.93,1.00] margin 3.90 chosen +11 rejected -28"
    assert len(line) <= 80


def test_an_evaluation_by_source_tells_the_accuracy_of_each():
    names = {"hh/loss": 0.5, "hh/rewards/accuracies": 0.75, "hh/rewards/margins": 1.0, "a b/rewards/accuracies": 0.5}
    names |= {"hh/x/loss": 0.1, "hh/x/rewards/accuracies": 0.25}  # a source whose name begins like another's
    row = {"step": 8, "eval/loss": 0.6, **{f"eval/{name}": value for name, value in names.items()}, "eval/samples/tokens": 2.0}
    assert evaluation_line(row) == "eval @8: loss 0.600  hh acc 0.75  a b acc 0.50  hh/x acc 0.25  samples/tokens 2.000"


def test_an_evaluation_of_sft_tells_the_loss_per_token():
    row = {"step": 8, "eval/loss": 152.31, "eval/nll_per_token": np.log(18.4), "eval/other": 2.0}
    assert evaluation_line(row) == "eval @8: loss 152.3  2.912 per token  perplexity 18.40  other 2.000"


def test_a_step_of_sft_tells_the_loss_per_token():
    on, _ = board(io.StringIO())
    training = Progress(board=on)
    training.start(0, 4)
    training.step({"step": 0, "loss": 152.31, "nll_per_token": 2.913})
    assert training.line() == "step 1/4  loss 152.3  2.913 per token"


# Times.


def test_no_remaining_time_is_told_before_there_are_steady_steps():
    """Steps of 2 s, of which the first and the fourth also compile for 30 s."""
    log = io.StringIO()
    on, clock = board(log)
    training = Progress(board=on)
    training.start(0, 12)
    lines = []
    for step, compiling in enumerate((30, 0, 0, 30, 0)):
        clock.now += 2 + compiling
        if compiling:
            on.compile_ended(compiling)
        training.step({"step": step, **STEP})
        lines.append(training.line())
    assert ["ETA" in line for line in lines] == [False, False, True, True, True]
    assert "pairs/s" not in lines[0]
    assert lines[4].endswith("ETA 14 s"), "seven steps of 2 s are left"


def test_seconds_as_people_read_them():
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 185, 3723)] == ["0 s", "59 s", "1:00", "3:05", "1:02:03"]


# A log file.


def test_a_log_file_gets_the_first_steps_and_then_one_every_ten_seconds():
    log = io.StringIO()
    on, clock = board(log)
    train(on, clock, steps=40, seconds=1, total=100, first=20)
    numbers = [int(line.split()[1].split("/")[0]) for line in log.getvalue().splitlines()]
    assert numbers == [21, 22, 23, 24, 25, 34, 43, 52]
    assert all("loss 0.623  acc 0.71  margin 0.42" in line for line in log.getvalue().splitlines())


def test_the_last_step_is_told():
    log = io.StringIO()
    on, clock = board(log)
    train(on, clock, steps=7, seconds=1, total=7)
    assert log.getvalue().splitlines()[-1].startswith("step 7/7  ")


def test_a_step_that_takes_long_is_mentioned_unless_all_do():
    log = io.StringIO()
    on, clock = board(log)
    train(on, clock, steps=3, seconds=15, total=9)
    lines = log.getvalue().splitlines()
    assert lines[0] == "step 0/9  step 1 takes 10 s"
    assert sum("takes" in line for line in lines) == 3
    pass_time(on, clock, 29)  # nobody knew of the first that 15 s are as usual
    assert log.getvalue().splitlines() == lines
    pass_time(on, clock, 1)
    assert "step 4 takes 30 s" in log.getvalue().splitlines()[-1]


@pytest.mark.parametrize("seconds", [1, 3, 9, 25, 300])
def test_nothing_is_silent_for_more_than_ten_seconds(seconds):
    log = io.StringIO()
    on, clock = board(log)
    spoke, length = [0.0], 0
    with reported("loading weights", board=on):
        for _ in range(seconds):
            pass_time(on, clock, 1)
            if len(log.getvalue()) > length:
                spoke, length = [*spoke, clock.now], len(log.getvalue())
    assert max(np.diff([*spoke, clock.now]), default=0) <= 10
    lines = log.getvalue().splitlines()
    assert (lines[-1:] == [f"loading weights: {duration(seconds)}"]) == (seconds >= 2)
    assert len(lines) <= 2 + seconds // 10


def test_the_innermost_task_speaks():
    log = io.StringIO()
    on, clock = board(log)
    inner = reported("sampling", total=8, unit="completions", brief=True, board=on)
    with reported("evaluating", brief=True, board=on), inner as task:
        for _ in range(4):
            pass_time(on, clock, 4)
            task.advance(2)
    assert log.getvalue().splitlines() == [
        "sampling: 0 of 8 completions, 4 s",
        "sampling: 6 of 8 completions, 0.50/s, ETA 4 s",
    ]
    with reported("reference pass", total=8, unit="pairs", board=on) as task:
        for _ in range(3):
            clock.now += 2
            task.advance(2)
        assert task.line() == "reference pass: 6 of 8 pairs, 1.0/s, ETA 2 s"
        on.compile_began()
        clock.now += 5
        assert task.line(60) == "reference pass: 6 of 8 pairs, 1.0/s, ETA 2 s, compiling for "[:60]


def test_an_error_inside_is_not_a_result():
    log = io.StringIO()
    on, clock = board(log)

    def fail():
        clock.now += 5
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), reported("loading", board=on):
        fail()
    pass_time(on, clock, 20)
    assert log.getvalue() == ""


def test_a_board_of_another_host_is_quiet_and_a_reader_who_left_harms_nothing():
    log = io.StringIO()
    on, clock = board(log)
    on.quiet = True
    with reported("loading", board=on):
        pass_time(on, clock, 20)
    assert log.getvalue() == ""
    on.quiet = False
    log.close()
    with reported("loading", board=on):
        pass_time(on, clock, 20)


def test_compilations_are_known_by_what_jax_tells():
    report_compiling()
    seen = []

    def listen(event, seconds, **_):
        seen.append((event, BOARD._compiling is not None))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: jnp.tanh(x @ x) + len(seen))(jnp.ones((3, 3)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    states = [state for event, state in seen if event.endswith(("to_mlir_module_duration", "backend_compile_duration"))]
    assert states
    assert states == [True, False] * (len(states) // 2)


def test_the_thread_of_a_board_speaks_while_the_main_thread_is_busy(tmp_path):
    code = """
import os, time
from dpo_jax.runtime import progress
progress.SILENCE_SECONDS = progress.FIRST_WORD_SECONDS = 0.2
progress.REDRAW_SECONDS = 0.05
with progress.reported("waiting"):
    while os.fstat(2).st_size == 0:
        time.sleep(0.05)
"""
    with open(tmp_path / "log", "w+") as file:
        subprocess.run([sys.executable, "-c", code], stderr=file, timeout=60, check=True)
        file.seek(0)
        assert file.readline().startswith("waiting: ")


@pytest.mark.parametrize(
    ("command", "module", "reader", "flags"),
    [
        ("judge", "dpo_jax.cli.commands.judge", "read_completions", ["--judge.a", "a", "--judge.b", "b", "--judge.model", "m"]),
        ("study", "dpo_jax.cli.commands.study", "read_completions", ["--study.a", "a", "--study.b", "b"]),
        ("sample", "dpo_jax.cli.build", "load_tokenizer", ["--sample.policy", "policy"]),
        ("dpo", "dpo_jax.data.sources", "peek", ["--check", "--data.source", "files", "--data.path", "data"]),
        ("audit", "dpo_jax.cli.data_sources", "load_preferences", ["--data.source", "files", "--data.path", "data"]),
        ("sft", "dpo_jax.cli.splits", "load_snippets", ["--data.source", "snippets", "--data.path", "data"]),
    ],
)
def test_whatever_is_read_may_take_long_and_is_named(command, module, reader, flags, monkeypatch, tmp_path, capsys):
    """Files of others may be of any size: what reads one does so inside of `reported`, which is never silent for 10 s."""

    def read(*arguments, **options):
        raise Unreadable(f"named: {bool(BOARD._tasks)}")

    monkeypatch.chdir(tmp_path)
    for folder in ("data", "policy"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.setattr(f"{module}.{reader}", read)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    flags += ["--judge.prompt", "dialogue"] if command == "judge" else []
    monkeypatch.setattr(sys, "argv", ["dpo-jax"])
    main([command, str(ROOT / "configs" / "quickstart.yaml"), *flags])
    printed = capsys.readouterr()
    assert "named: True" in printed.err + printed.out
