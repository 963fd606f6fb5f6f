"""Early stopping on a run that counts its steps, killed after any of them; runs in steps; warnings of spikes."""

import logging
import os
import signal

import jax
import numpy as np
import pytest

import dpo_jax
from dpo_jax.cli.commands.export import _best_step
from dpo_jax.cli.config import DpoConfig
from dpo_jax.data.loader import batch_indices
from dpo_jax.runtime.checkpoint import newest_meta
from dpo_jax.runtime.fit import Evaluation, Preempted, fit
from dpo_jax.runtime.metrics import MetricsLog, is_evaluation, read_metrics
from dpo_jax.runtime.parallel import single_device
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.runtime.spikes import Spikes
from dpo_jax.step import init_state
from dpo_jax.training import fingerprint
from dpo_jax.training.run import Saving, train
from dpo_jax.training.stopping import EarlyStopping

HELD_OUT = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 3.0, 12: 1.0}  # 10: as good as the best is not better
PLACED = single_device()
TX = dpo_jax.make_optimizer(lambda step: 0.0)
COUNT = PLACED.compile_step(lambda state, x: (state.replace(step=state.step + 1, params=state.params + x), {"loss": x}))


def run(folder, *, stop=12, killed_at=None, stopping=None, held_out=HELD_OUT, first=False, **options):
    """Counts to `stop` with an evaluation every second step. Returns (final count, steps taken, the record, what was said)."""
    taken, said = [], []

    def stepping(state, x):
        taken.append(int(state.step))
        if taken[-1] + 1 == killed_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return COUNT(state, x)

    stopping = stopping or EarlyStopping("loss", patience=3)
    options = {"fingerprint": {"by": 1.0}, "saving": Saving(every=1), **options}
    state = train(
        stepping,
        PLACED.put_state(init_state(np.float32(0), TX)),
        lambda i: np.float32(1),
        folder=folder,
        total_steps=stop,
        evaluation=Evaluation(lambda state, done: {"loss": held_out[int(state.params)]}, every=2, first=first),
        stopping=stopping,
        say=said.append,
        **options,
    )
    return float(state.params), taken, dict(stopping.record), said


def log_of(folder):
    rows = [
        {name: value for name, value in row.items() if "per_second" not in name}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return sorted(rows, key=lambda row: (row["step"], not is_evaluation(row)))


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_it_ends_without_a_better_evaluation_and_returns_the_best(whole):
    folder, (count, taken, record, said) = whole
    assert (count, taken) == (4.0, list(range(10)))
    assert record == {"metric": "loss", "higher": False, "best": 4, "value": 3.0, "worse": 3, "last": 10}
    why = "stopped after 10 steps: 3 evaluations without a better loss"
    assert said == [f"{why}; the weights are those of step 4, where it was 3.0000"]
    assert kept(folder) == [4, 9, 10], "the best, and the newest two"
    assert newest_meta(folder / "checkpoints")[1]["early_stopping"] == record
    assert [row["step"] for row in log_of(folder) if is_evaluation(row)] == [2, 4, 6, 8, 10]


def test_the_weights_before_the_first_step_are_no_candidate(whole, tmp_path):
    """Also where they are the best, and where a kill came before the first checkpoint."""
    options = {"held_out": {0: 0.0, **HELD_OUT}, "first": True}
    with pytest.raises(Preempted):
        run(tmp_path, killed_at=4, **options)
    count, _, record, _ = run(tmp_path, **options)
    assert (count, record) == (whole[1][0], whole[1][2])
    assert [row["step"] for row in log_of(tmp_path) if is_evaluation(row)] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("killed_at", [1, 2, 4, 5, 8, 10])
def test_a_killed_run_stops_where_it_would_have(whole, killed_at, tmp_path):
    """Also where the signal came in the place of an evaluation."""
    with pytest.raises(Preempted):
        run(tmp_path, killed_at=killed_at)
    count, taken, record, said = run(tmp_path)
    assert (count, record, said[-1]) == (whole[1][0], whole[1][2], whole[1][3][-1])
    assert taken == list(range(killed_at, 10))
    assert log_of(tmp_path) == log_of(whole[0])


def test_a_run_that_has_stopped_takes_no_step_more(whole):
    folder, (count, _, record, said) = whole
    again = run(folder)
    assert again == (count, [], record, [f"continuing {folder} after 10 steps", *said])
    assert kept(folder) == [4, 9, 10]


def test_a_stop_that_a_signal_delayed_is_decided_once(tmp_path):
    """The evaluation after 10 steps ends the run, but a signal came before it, so only the log has it."""
    with pytest.raises(Preempted):
        run(tmp_path, killed_at=10)
    assert run(tmp_path)[:2] == (4.0, [])
    assert run(tmp_path, held_out={})[:2] == (4.0, []), "nothing is evaluated again"


def test_a_run_that_is_not_stopped_ends_with_its_best_too(tmp_path):
    count, taken, record, said = run(tmp_path, stop=6)
    assert (count, len(taken), record["worse"]) == (4.0, 6, 1)
    assert said == ["the best loss; the weights are those of step 4, where it was 3.0000"]
    higher = EarlyStopping("loss", patience=3, higher=True)
    assert run(tmp_path / "higher", stopping=higher)[0] == 2.0


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (EarlyStopping("margin", patience=3), "early stopping, metric: was 'loss', is 'margin'"),
        (EarlyStopping("loss", patience=3, higher=True), "early stopping, higher: was False, is True"),
    ],
    ids=["metric", "direction"],
)
def test_a_run_continues_with_its_own_metric(tmp_path, other, told):
    """The best value so far is one of that metric."""
    run(tmp_path, stop=4)
    with pytest.raises(fingerprint.RunMismatch, match=f"other settings:\n  {told}"):
        run(tmp_path, stopping=other)
    assert run(tmp_path, stopping=EarlyStopping("loss", patience=1))[0] == 4.0
    old = EarlyStopping("loss", patience=1)
    old.resume({"best": 4, "value": 3.0, "worse": 0, "last": 4}, place="")  # as before records had names
    assert old.observe(6, {"loss": 3.5}).stop


def test_what_cannot_stop_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="patience must be at least 1"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="has no 'margin' to stop on; it has loss"):
        EarlyStopping("margin", patience=1).observe(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="stopping needs evaluation"):
        train(COUNT, None, None, folder=tmp_path, total_steps=1, fingerprint={}, stopping=EarlyStopping(patience=1))


@pytest.mark.parametrize(("stop", "best"), [(8, 4), (12, 12)])
def test_an_export_is_of_the_best_step_also_after_a_signal_at_the_last_evaluation(stop, best, tmp_path):
    folder = tmp_path / "dpo"
    with pytest.raises(Preempted):
        run(folder, stop=stop, killed_at=stop, stopping=EarlyStopping("loss", patience=9))
    count = run(folder, stop=stop, stopping=EarlyStopping("loss", patience=9))[0]
    newest, meta = newest_meta(folder / "checkpoints")
    assert (newest, meta["early_stopping"]["last"]) == (stop, stop - 2), "the record lacks the evaluation"
    section, there = DpoConfig(patience=9), RunDir(folder, lock=False)
    assert _best_step(section, there, newest, meta) == count == best
    assert _best_step(section, there, stop - 1, meta) == 4, "what the log has of later steps does not count"
    there.metrics.unlink()
    assert _best_step(section, there, newest, meta) == meta["early_stopping"]["best"] == 4
    assert _best_step(DpoConfig(), there, newest, meta) is None


def test_a_best_step_is_not_compared_on_other_held_out_data(tmp_path):
    one, other = ({"token ids held out": name, "test split, kept": kept} for name, kept in (("a" * 64, 24), ("b" * 64, 20)))
    with pytest.raises(Preempted):
        run(tmp_path, killed_at=1, data=one)
    with pytest.raises(Preempted):
        run(tmp_path, killed_at=5, data=other)  # nothing was evaluated before
    with pytest.raises(fingerprint.RunMismatch, match=r"other held-out data, on which its best step .*\n.* was 20, is 24"):
        run(tmp_path, data=one)
    assert run(tmp_path, data=other)[0] == 4.0


# A run in steps


def settings(**changes):
    return {"epochs": 1, "steps": None, "schedule": "constant", "warmup_ratio": None, **changes}


def test_steps_may_grow_where_the_rate_does_not_depend_on_them():
    fingerprint.check_settings("", settings(steps=4), settings(steps=9))
    fingerprint.check_settings("", settings(epochs=2), settings(steps=9))
    for fixed, why in (({"schedule": "cosine"}, "schedule cosine"), ({"warmup_ratio": 0.1}, "a warmup_ratio")):
        with pytest.raises(fingerprint.RunMismatch, match=f"steps: was 4, is 9\n.*with {why} the learning rate depends"):
            fingerprint.check_settings("", settings(steps=4, **fixed), settings(steps=9, **fixed))


def test_steps_see_the_batches_of_epochs_and_all_of_them_whole():
    of_epochs = [batch_indices(10, batch=4, seed=0, step=step, epochs=2) for step in range(5)]
    of_steps = [batch_indices(10, batch=4, seed=0, step=step) for step in range(6)]
    for one, other in zip(of_epochs, of_steps, strict=False):
        np.testing.assert_array_equal(one, other)
    assert [len(batch) for batch in of_steps] == [4] * 6
    saved = fingerprint.SavedRun("", 6, {"fingerprint": settings(steps=6)})
    assert fingerprint.behind(saved, examples=10, batch=4) == 0


# Spikes


def test_a_spike_is_named_once_with_its_factor():
    spikes, said = Spikes("loss", "grad_norm"), []
    losses = [1.0, 1.2] * 10 + [5.0, 6.0, 1.0] + [1.1] * 3 + [11.0] * 60
    for step, loss in enumerate(losses):
        said += [(step, words) for words in spikes.of({"loss": loss, "grad_norm": 2.0})]
    assert [step for step, _ in said] == [20, 26]
    assert said[0][1] == "loss 5 is 4.5 times the median of the 20 steps before (1.1)"
    assert not spikes._inside["loss"], "what lasts is no spike any more"


def test_no_alarm_without_cause():
    rng, spikes = np.random.default_rng(0), Spikes("loss", "margin")
    for step in range(2000):  # a loss that falls, with noise of half its size
        loss = np.exp(-step / 300) * rng.lognormal(0, 0.5)
        assert not list(spikes.of({"loss": loss, "margin": -1.0, "lr": 1e-6})), step
    early = Spikes("loss")
    assert not [words for loss in (1.0, 50.0, 1.0) for words in early.of({"loss": loss})]


def test_the_loop_warns_of_a_spike(tmp_path, caplog):
    norms = [1.0] * 20 + [30.0, 1.0]

    def step(state, x):
        return state.replace(step=state.step + 1), {"loss": np.float32(0.5), "grad_norm": x}

    start = jax.device_get(init_state(np.float32(0), TX))
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path / "metrics.jsonl") as log:
        fit(step, start, lambda i: np.float32(norms[i]), total_steps=len(norms), log=log)
    told = [record.getMessage() for record in caplog.records if "median" in record.getMessage()]
    assert told == ["step 20: grad_norm 30 is 30.0 times the median of the 20 steps before (1)"]
