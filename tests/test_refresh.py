"""References that move to the policy: what steps are trained against, and how such a run continues from any point."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import dpo_jax
from dpo_jax.cli.config import DpoConfig
from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import batch_indices, plan_layout, train_batches
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.reference import ReferenceCache, reference_logps
from dpo_jax.runtime.checkpoint import CheckpointDamaged
from dpo_jax.runtime.fit import Preempted
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.parallel import single_device
from dpo_jax.step import init_state
from dpo_jax.training.refresh import RefreshedReference
from dpo_jax.training.run import Saving, train

EVERY, STEPS, BATCH = 3, 8, 2
ORDER: dict[str, Any] = {"batch": BATCH, "seed": 0}


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved on the way out."""


@pytest.fixture(scope="module")
def setup():
    """A model, twelve pairs of which two are equal, and everything that is compiled once."""
    sizes: dict[str, Any] = {"vocab_size": 64, "width": 16, "layers": 1, "heads": 2, "max_positions": 32, "eos_token_id": 0}
    model = make_model(decoder_config(hf_config("llama", **sizes)))
    rng = np.random.default_rng(0)
    pairs = [Encoded(*(rng.integers(1, 64, n).astype(np.int32) for n in (4, 6, 5)), uid=f"{i}") for i in range(11)]
    pairs.append(Encoded(pairs[0].prompt, pairs[0].chosen, pairs[0].rejected, uid="11"))
    partitioner = single_device()
    tx = dpo_jax.make_optimizer(1e-3, max_grad_norm=1.0)
    step = partial(dpo_jax.dpo_step, model=model, tx=tx, loss=partial(dpo_jax.dpo_loss, beta=0.1))
    score = partitioner.compile_map(partial(reference_logps, model))
    return SimpleNamespace(
        pairs=pairs,
        partitioner=partitioner,
        step=partitioner.compile_step(step),
        score=score,
        layout=plan_layout(pairs, kind="shared", batch=BATCH),
        begin=lambda: init_state(jax.jit(model.init)(jax.random.key(0)), tx),
    )


def run(setup, folder, *, steps=STEPS, before=lambda step, rows: None, score=None, said=None, **options):
    """Trains in `folder`. `before(step, rows)` is called before each step."""
    layout, start = setup.layout, setup.begin()
    rows = layout.rows(setup.pairs)
    first = np.empty((len(setup.pairs), 2), np.float32)
    first[rows.index[rows.index >= 0]] = np.asarray(setup.score(start.variables, rows))[rows.index >= 0]
    refresh = RefreshedReference(
        EVERY,
        pairs=setup.pairs,
        values=first,
        total_steps=steps,
        read_by=lambda step: batch_indices(len(setup.pairs), step=step, **ORDER),
        score=score or setup.score,
        folder=Path(folder, "references"),
        layout=layout,
        batch=BATCH,
        identity={"model": "tiny"},
        say=(said if said is not None else []).append,
    )

    def observed(state, rows):
        before(int(state.step), rows)
        return setup.step(state, rows)

    return train(
        observed,
        setup.partitioner.put_state(start),
        train_batches(setup.pairs, layout=layout, ref_logps=refresh.values, **ORDER),
        folder=folder,
        total_steps=steps,
        fingerprint={"schedule": "constant", "steps": steps},
        refresh=refresh,
        say=lambda line: None,
        **{"saving": Saving(every=1, keep=1), **options},
    )


@pytest.fixture(scope="module")
def whole(setup, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("whole") / "run", []
    return folder, run(setup, folder, said=said), said


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def same(setup, folder, state, whole):
    jax.tree.map(np.testing.assert_array_equal, setup.partitioner.get_state(state), setup.partitioner.get_state(whole[1]))
    assert losses(folder) == losses(whole[0])


def test_each_step_is_trained_against_the_policy_of_the_last_update(setup, tmp_path):
    policies, trained_against = {}, {}

    def before(step, rows):
        trained_against[step] = rows

    def observing(variables, rows):
        policies.setdefault(max(trained_against) + 1, jax.device_get(variables))
        return setup.score(variables, rows)

    run(setup, tmp_path / "run", before=before, score=observing)
    assert sorted(policies) == [3, 6]
    policies[0] = setup.begin().variables
    for step, rows in trained_against.items():
        live = setup.score(policies[step - step % EVERY], rows)
        np.testing.assert_allclose(rows.ref_logps[rows.index >= 0], live[rows.index >= 0], rtol=1e-6)
    assert [step for step, loss in enumerate(losses(tmp_path / "run")) if abs(loss - np.log(2)) < 1e-6] == [0, 3, 6]


def test_it_says_what_it_does_and_keeps_what_the_newest_checkpoint_needs(whole):
    folder, _, said = whole
    assert [line.partition(":")[0] for line in said] == ["reference from step 3", "reference from step 6"]
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()) == [6, 8]
    (cache,) = (folder / "references").iterdir()
    assert cache.name.startswith("step-6-")
    assert len(ReferenceCache(cache, identity_of(cache))) == 4  # steps 6 and 7, and no pair of later steps


def identity_of(cache):
    identity = json.loads((cache / "identity.json").read_text())["identity"]
    assert (identity["step"], len(identity["weights"])) == (6, 64)
    return {name: value for name, value in identity.items() if name != "version"}


@pytest.mark.parametrize("step", [2, 3, 4, 7])
def test_a_run_killed_before_any_step_ends_with_the_same_bits(setup, whole, tmp_path, step):
    def kill(number, rows):
        if number == step:
            raise Killed

    with pytest.raises(Killed):
        run(setup, tmp_path / "run", before=kill, saving=Saving(every=2, keep=1))
    same(setup, tmp_path / "run", run(setup, tmp_path / "run", saving=Saving(every=2, keep=1)), whole)


@pytest.mark.parametrize(("how", "batches"), [("killed", 0), ("killed", 2), ("stopped", 1)])
def test_a_run_ended_during_a_reference_pass_continues_it(setup, whole, tmp_path, how, batches):
    computed = []

    def ending(variables, rows):
        if how == "killed" and len(computed) == batches:
            raise Killed
        computed.append(rows)
        if how == "stopped" and len(computed) == batches + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return setup.score(variables, rows)

    with pytest.raises(Killed if how == "killed" else Preempted):
        run(setup, tmp_path / "run", score=ending, saving=Saving(keep=1))
    done, again = len(computed), []

    def counting(variables, rows):
        again.append(rows)
        return setup.score(variables, rows)

    same(setup, tmp_path / "run", run(setup, tmp_path / "run", score=counting, saving=Saving(keep=1)), whole)
    assert done + len(again) == 3 + 2  # batches of both passes: none is computed twice


def test_lost_log_probabilities_are_made_again_by_the_weights_of_their_step(setup, whole, tmp_path):
    def kill(number, rows):
        if number == 5:
            raise Killed

    with pytest.raises(Killed):
        run(setup, tmp_path / "run", before=kill)
    (cache,) = (tmp_path / "run" / "references").iterdir()
    (cache / "logps-00000.bin").write_bytes(b"")
    origin = (tmp_path / "run" / "checkpoints" / "3").rename(tmp_path / "3")
    with pytest.raises(CheckpointDamaged, match="the output of step 3 is incomplete, and its weights are gone"):
        run(setup, tmp_path / "run")
    origin.rename(tmp_path / "run" / "checkpoints" / "3")
    same(setup, tmp_path / "run", run(setup, tmp_path / "run"), whole)


def test_a_damaged_checkpoint_costs_steps_and_no_bit(setup, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    same(setup, tmp_path / "run", run(setup, tmp_path / "run"), whole)


@pytest.mark.parametrize("first", [4, 7])
def test_a_longer_run_is_as_if_it_had_always_been_longer(setup, whole, tmp_path, first):
    run(setup, tmp_path / "run", steps=first)
    same(setup, tmp_path / "run", run(setup, tmp_path / "run"), whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "simpo", "simpo_gamma": 0.5}, "loss simpo has no reference"),
        ({"reference_free": True}, "reference_free is set"),
    ],
)
def test_without_a_reference_there_is_none_to_move(options, words):
    options = {name: value for name, value in options.items() if name in DpoConfig.__dataclass_fields__}
    problems = dict(DpoConfig(refresh_reference_steps=10, **options).check())
    assert words in problems["refresh_reference_steps"]
    assert "refresh_reference_steps" not in dict(DpoConfig(refresh_reference_steps=10).check())
    assert "greater than 0" in dict(DpoConfig(refresh_reference_steps=0).check())["refresh_reference_steps"]
