"""A run without a configuration, as the docstring of `train` shows it: on a mesh, references cached, killed and resumed."""

import doctest
import json
import os
import re
import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_jax
from dpo_jax.cli import build
from dpo_jax.cli.config import Config, RunConfig
from dpo_jax.cli.exit_codes import exit_code
from dpo_jax.data.encode import Encoded
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.reference import ForeignCache
from dpo_jax.runtime.checkpoint import CheckpointDamaged, Checkpoints
from dpo_jax.runtime.fit import Evaluation, NonFinite, Preempted
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.parallel import single_device
from dpo_jax.runtime.rundir import RunLocked
from dpo_jax.step import init_state
from dpo_jax.training.fingerprint import RunMismatch
from dpo_jax.training.run import Saving, train

PROGRAM = "".join(example.source for example in doctest.DocTestParser().get_examples(train.__doc__))
STEPS = 12  # six pairs, two a step, four times


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the program of the docstring finds."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    sizes = {"vocab_size": 64, "width": 32, "layers": 1, "heads": 4, "max_positions": 64, "eos_token_id": 0}
    model = make_model(decoder_config(hf_config("llama", **sizes)))
    dpo_jax.save_hf(folder, model, jax.jit(model.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    # Of equal lengths: batches of one shape are one program.
    encoded = [Encoded(*(rng.integers(1, 64, n).astype(np.int32) for n in (4, 6, 5)), uid=f"{i}") for i in range(6)]
    tx = dpo_jax.make_optimizer(dpo_jax.linear_warmup(1e-3, warmup_steps=3), max_grad_norm=1.0)
    public = dpo_jax.__all__
    return {name: getattr(dpo_jax, name) for name in public} | {
        **{"folder": folder, "encoded": encoded, "tx": tx, "partial": partial},
    }


def run(names, folder, **changes):
    """Runs the program in `folder`; its variables afterwards."""
    folder.mkdir(exist_ok=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        scope = {**names, **changes}
        exec(PROGRAM, scope)
        return scope
    finally:
        os.chdir(here)


def counting(taken, *, killed_at=None):
    """`train` that notes the steps taken, and gets a SIGTERM in the middle of one."""

    def observed(step, *args, **options):
        def stepping(state, rows):
            taken.append(int(state.step))
            if taken[-1] == killed_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, rows)

        return train(stepping, *args, **options)

    return observed


def rows_of(folder):
    return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in read_metrics(folder / "run/metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(names, folder)


def test_it_is_twenty_lines_and_trains(whole):
    assert len(PROGRAM.splitlines()) <= 20
    folder, scope = whole
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[-1]["loss"] < 0.69
    kernel = max(jax.tree.leaves(scope["state"].params), key=lambda leaf: leaf.size)
    assert len(kernel.sharding.device_set) > 1
    assert not kernel.sharding.is_fully_replicated


def test_the_example_with_a_loss_an_evaluation_and_a_callback(whole, capsys, monkeypatch):
    text = (Path(dpo_jax.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"<!-- continues the example of train -->\n```python\n(.*?)```", text, re.DOTALL)
    folder, scope = whole
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code, {**scope, "jax": jax, "test": scope["encoded"]})
    said = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] in ("begins", "accuracy", "ends")]
    rows = read_metrics(folder / "hinge/metrics.jsonl")
    judged = [row for row in rows if is_evaluation(row)]
    assert [row["step"] for row in judged] == [6, STEPS]
    assert said == ["begins after 0 steps", *(f"accuracy {row['eval/rewards/accuracies']}" for row in judged), "ends"]
    assert rows[0]["loss"] == pytest.approx(1, abs=1e-6)  # hinge at the reference
    assert judged[-1]["eval/loss"] < 1


def test_a_killed_run_continues_to_the_same_bits(names, whole, tmp_path, capsys):
    first, second = [], []
    with pytest.raises(Preempted, match="SIGTERM after 6 steps"):
        run(names, tmp_path, train=counting(first, killed_at=5))
    capsys.readouterr()
    scope = run(names, tmp_path, train=counting(second))
    said = capsys.readouterr().out
    assert said == "run/refs: 6 of 6 pairs are already cached\ncontinuing run after 6 steps\nrun/export\n"
    assert first + second == list(range(STEPS))
    jax.tree.map(np.testing.assert_array_equal, scope["state"], whole[1]["state"])
    assert rows_of(tmp_path) == rows_of(whole[0])
    exported = "run/export/model.safetensors"
    assert (tmp_path / exported).read_bytes() == (whole[0] / exported).read_bytes()


def small(folder, stop=3, *, fingerprint=None, **options):
    """Counts to `stop` in a state of one number."""
    partitioner = single_device()
    step = partitioner.compile_step(lambda state, x: (state.replace(step=state.step + 1, params=state.params + x), {"loss": x}))
    state = partitioner.put_state(init_state(np.float32(0), dpo_jax.make_optimizer(lambda step: 0.0)))
    say = options.pop("say", lambda line: None)
    fingerprint = {"by": 1.0} if fingerprint is None else fingerprint
    stream = options.pop("stream", lambda i: np.float32(1))
    return train(step, state, stream, folder=folder, total_steps=stop, fingerprint=fingerprint, say=say, **options)


def test_another_run_is_refused_by_what_differs(tmp_path):
    small(tmp_path / "run")
    with pytest.raises(RunMismatch, match=r"run holds a run with other settings:\n  by: was 1.0, is 2.0"):
        small(tmp_path / "run", fingerprint={"by": 2.0})
    with pytest.raises(RunMismatch, match="has taken 3 steps, but 2 are asked for: a run can be made longer, not shorter"):
        small(tmp_path / "run", 2)
    said = []
    assert float(small(tmp_path / "run", 5, say=said.append).params) == 5
    assert said == [f"continuing {tmp_path / 'run'} after 3 steps"]
    small(tmp_path / "data", fingerprint={"data": "a"}, data={"file a": "x"})
    with pytest.raises(RunMismatch, match=r"data holds a run with other data:\n  file a: has other contents"):
        small(tmp_path / "data", fingerprint={"data": "b"}, data={"file a": "y"})


# When one of several reads fails, the callbacks of the others find orbax's event loop closed, and Python prints that: noise.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_of_which_none_verifies_are_not_trained_over(tmp_path):
    small(tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    for _ in range(2):  # a second time as a scheduler would start it again
        with pytest.raises(CheckpointDamaged) as damaged:
            small(tmp_path, 5)
        assert exit_code(damaged.value) == 74
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_fingerprint_is_what_json_makes_of_it(tmp_path):
    """A tuple comes back as a list. What cannot be saved is refused before the first step."""
    said, fingerprint = [], {"betas": (0.9, 0.95), "nested": {"sizes": ({1: (2, 3)},)}}
    for stop in (2, 4):
        small(tmp_path / "run", stop, fingerprint=fingerprint, data={"limits": (1, 2)}, say=said.append)
    assert said == [f"continuing {tmp_path / 'run'} after 2 steps"]
    with pytest.raises(RunMismatch, match=r"betas: was \[0.9, 0.95\], is \[0.9, 0.99\]"):
        small(tmp_path / "run", 4, fingerprint={"betas": (0.9, 0.99)})
    with pytest.raises(TypeError, match=r"fingerprint\['lr'\] cannot be saved: .* float32 .*Use texts, numbers"):
        small(tmp_path / "other", fingerprint={"lr": np.float32(0.1)})
    with pytest.raises(TypeError, match=r"data\['files'\] cannot be saved"):
        small(tmp_path / "other", data={"files": {"a"}})
    assert not (tmp_path / "other").exists()


def test_it_evaluates_at_the_end_and_only_once(tmp_path):
    seen = []

    def evaluate(state, done):
        seen.append(done)
        return {"sum": state.params}

    for _ in range(2):
        small(tmp_path, 4, evaluation=Evaluation(evaluate, every=3))
    assert seen == [3, 4]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if is_evaluation(row)]
    assert rows == [{"step": 3, "eval/sum": 3.0}, {"step": 4, "eval/sum": 4.0}]


def test_it_evaluates_before_the_first_step_if_asked_and_only_once(tmp_path):
    seen = []

    def evaluate(state, done):
        seen.append(done)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # after step 2, before any checkpoint
        return {"sum": state.params}

    options = {"evaluation": Evaluation(evaluate, every=2, first=True)}
    with pytest.raises(Preempted):
        small(tmp_path, 4, **options)
    small(tmp_path, 4, **options)
    small(tmp_path, 4, **options)
    assert seen == [0, 2, 4]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == {"step": 0, "eval/sum": 0.0}
    assert [row["step"] for row in rows if is_evaluation(row)] == seen
    assert [row["step"] for row in rows if not is_evaluation(row)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("leaf", "refused"),
    [
        (jax.random.key(0), r"state\.params\.extra: expected an array of numbers, got key<fry>.*jax\.random\.key_data"),
        (3, r"state\.params\.extra: expected an array, got int: make it one"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path, leaf, refused):
    state = init_state({"w": jnp.float32(0), "extra": jnp.float32(0)}, dpo_jax.make_optimizer(1.0))
    state = state.replace(params={"w": jnp.float32(0), "extra": leaf})
    with pytest.raises(ValueError, match=refused):
        train(pytest.fail, state, pytest.fail, folder=tmp_path / "run", total_steps=1, fingerprint={})
    with Checkpoints(tmp_path / "other") as checkpoints, pytest.raises(ValueError, match=refused):
        checkpoints.save(0, state, {})


@pytest.mark.parametrize("stream", [[np.float32(1)] * 3, iter([np.float32(1)] * 3)])
def test_a_stream_that_is_no_function_is_refused(tmp_path, stream):
    with pytest.raises(TypeError, match=r"stream: expected a function, got list.*: stream\(i\) gives the batch of step i"):
        small(tmp_path, stream=stream)


def test_a_stream_that_ends_is_named_with_its_step(tmp_path):
    batches = iter([np.float32(1)] * 2)
    with pytest.raises(RuntimeError, match=r"stream\(2\) raised StopIteration: it must give the batch of any step"):
        small(tmp_path, stream=lambda i: next(batches))
    assert small(tmp_path, stream=([np.float32(1)] * 3).__getitem__).step == 3


def test_a_failed_evaluation_is_the_error_also_if_the_state_cannot_be_saved(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Checkpoints, "save", no_room)
    with pytest.raises(KeyError) as raised:
        small(tmp_path, 2, evaluation=Evaluation(lambda state, done: {}["test set"]))
    assert raised.value.__notes__ == ["The evaluation after 2 steps failed. The state could not be saved: no space left"]


def test_the_state_is_saved_before_an_error_of_an_evaluation_ends_the_run(tmp_path):
    seen = []

    def evaluate(state, done):
        seen.append(done)
        if seen == [2]:
            raise KeyError("test set")
        return {"sum": state.params}

    evaluation = Evaluation(evaluate, every=2)
    with pytest.raises(KeyError) as raised:
        small(tmp_path, 4, evaluation=evaluation)
    assert raised.value.__notes__ == ["The evaluation after 2 steps failed. The state is saved."]
    small(tmp_path, 4, evaluation=evaluation)
    assert seen == [2, 2, 4]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["eval/sum"]) for row in rows if is_evaluation(row)] == [(2, 2.0), (4, 4.0)]
    assert [row["step"] for row in rows if not is_evaluation(row)] == [0, 1, 2, 3]


def test_a_state_with_values_that_are_not_finite_is_not_saved(tmp_path):
    with pytest.raises(NonFinite):
        small(tmp_path, 4, evaluation=Evaluation(lambda state, done: {"sum": np.nan}))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize(
    ("found", "got"),
    [
        (None, "got NoneType"),
        ({"x": np.ones(2)}, r"got ndarray of shape \[2\] for 'x'"),
        ({"x": "high"}, "got str for 'x'"),
        ({"x": None}, "got NoneType for 'x'"),
    ],
)
def test_an_evaluation_that_returns_no_numbers_is_named(tmp_path, found, got):
    with pytest.raises(TypeError, match=rf"evaluation\.measure: expected {{name: number}}, {got}"):
        small(tmp_path, 2, evaluation=Evaluation(lambda state, done: found))


def test_a_folder_has_one_run_at_a_time(tmp_path):
    def evaluate(state, done):
        with pytest.raises(RunLocked):
            small(tmp_path)
        return {"ok": 1.0}

    small(tmp_path, evaluation=Evaluation(evaluate))


def test_a_cache_of_other_weights_is_refused(names, whole):
    model, weights = names["load_hf"](names["folder"])
    partitioner = single_device()
    score = partial(dpo_jax.cached_reference_logps, model, pairs=names["encoded"], partitioner=partitioner)
    other = jax.tree.map(lambda leaf: leaf + 1, weights)
    with pytest.raises(ForeignCache, match="weights: cached with"):
        score(partitioner.put_variables(other), cache=whole[0] / "run" / "refs")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda model: make_model(model.config, dtype=jnp.bfloat16), "dtype: cached with None, now 'bfloat16'"),
        (
            lambda model: model._replace(forward=lambda variables, rows: 10 * model.forward(variables, rows)),
            "another model with the same weights and config: .* those of 2 pairs differ by .* name in `identity`",
        ),
    ],
    ids=["number format", "factor"],
)
def test_a_cache_of_another_model_with_the_same_weights_is_refused(names, whole, other, told):
    """A number format; a factor that is in neither weights nor configuration, such as an adapter's scale."""
    model, weights = names["load_hf"](names["folder"])
    with pytest.raises(ForeignCache, match=told):
        dpo_jax.cached_reference_logps(
            other(model), weights, names["encoded"], cache=whole[0] / "run/refs", partitioner=single_device(), batch=2
        )


def test_a_state_is_released_before_another_is_read(tmp_path, monkeypatch):
    """Devices that have room for one state and its gradients may have none for two states."""
    small(tmp_path / "run")
    placed, real = [], Checkpoints.restore_latest

    def reading(self, shapes, **options):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(placed[0]))
        return real(self, shapes, **options)

    monkeypatch.setattr(Checkpoints, "restore_latest", reading)
    partitioner = single_device()
    state = partitioner.put_state(init_state(np.float32(0), dpo_jax.make_optimizer(lambda step: 0.0)))
    placed.append(state)
    with pytest.raises(RunMismatch):
        train(None, state, None, folder=tmp_path / "run", total_steps=4, fingerprint={"by": 2.0}, partitioner=partitioner)


def test_an_empty_folder_of_a_step_is_no_run(tmp_path):
    """As a kill may leave it."""
    (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
    assert float(small(tmp_path / "run").params) == 3


def test_the_configuration_says_when_to_save_and_what_to_keep(tmp_path):
    of = lambda **options: build.saving(Config(run=RunConfig(**options)), "dpo")  # noqa: E731
    options = {"save_every_steps": 3, "save_every_minutes": 2.5, "max_to_keep": 4}
    assert of(**options) == Saving(3, 2.5, keep=4)
    assert of(checkpoints="gs://bucket/run").folder == "gs://bucket/run/dpo"
    for name, options, kept in (
        ("steps", {"save_every_steps": 2, "max_to_keep": 1}, {"6"}),
        ("minutes", {"save_every_minutes": 1e-9, "max_to_keep": 3}, {"4", "5", "6"}),
    ):
        small(tmp_path / name, 6, saving=of(**options))
        assert {path.name for path in (tmp_path / name / "checkpoints").iterdir() if path.name.isdigit()} == kept


def test_checkpoints_leave_out_what_is_frozen(tmp_path):
    """It is given again by whoever continues, and is part of the state that comes back."""
    partitioner, tx = single_device(), dpo_jax.make_optimizer(lambda step: 0.0)
    step = partitioner.compile_step(
        lambda state, x: (
            state.replace(step=state.step + 1, params={"w": state.params["w"] + state.frozen["base"].sum() * x}),
            {"loss": x},
        )
    )

    def to(stop):
        state = init_state({"w": np.float32(0)}, tx, frozen={"base": np.ones(3, np.float32)})
        return train(
            step,
            partitioner.put_state(state),
            lambda i: np.float32(1),
            folder=tmp_path,
            total_steps=stop,
            fingerprint={},
            say=lambda line: None,
        )

    to(2)
    record = json.loads((tmp_path / "checkpoints/2/record/metadata").read_text())
    assert record["leaves"]
    assert not [name for name in record["leaves"] if name.startswith("frozen")]
    last = to(4)
    assert float(last.params["w"]) == 12
    np.testing.assert_array_equal(last.frozen["base"], np.ones(3))
