"""Twenty optimizer steps of the original PyTorch implementation, repeated on plain, shared and packed rows."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN
from test_step import PAIRS, toy_model

from dpo_jax.data.encode import encode
from dpo_jax.data.layout import Layout, completion_rows
from dpo_jax.dpo import dpo_step
from dpo_jax.losses import dpo_loss
from dpo_jax.models.hf import load_hf
from dpo_jax.reference import reference_logps
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.sft import sft_step
from dpo_jax.step import init_state

FAMILIES = ["gpt2", "gpt_neox"]
LAYOUTS = {
    "plain": Layout("plain", length=128, scored=128),
    "shared": Layout("shared", length=192, scored=128),
    "packed": Layout("packed", length=384, scored=256, per_row=4, rows_multiple=4),
}


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """The 40 texts the golden runs trained on, encoded with their settings."""
    texts = json.loads((GOLDEN / "hh_prompt_split.json").read_text())[:40]
    cut = [{"prompt": t["prompt"], **{s: t[s][len(t["prompt"]) :] for s in ("chosen", "rejected")}} for t in texts]
    return [encode(t, tokenizer, max_length=128, max_prompt_length=64, truncation="keep_end") for t in cut]


def golden(family, task):
    run = json.loads((GOLDEN / family / f"{task}_trajectory.json").read_text())
    config = run["config"]
    schedule = linear_warmup(config["lr"], warmup_steps=config["warmup_steps"])
    return config, run["steps"], schedule, make_optimizer(schedule, max_grad_norm=config["max_grad_norm"])


def per_pair(step, name):
    return np.array(step["metrics"][name])


def relative_difference(update, expected):
    def norm(tree):
        return np.sqrt(sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(tree)))

    return norm(jax.tree.map(np.subtract, update, expected)) / norm(expected)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_trajectory(family, kind, pairs):
    follow_original(family, kind, pairs, lambda model: single_device())


def four_parts(model):
    units = dict.fromkeys(("heads", "kv_heads"), model.config.head_size)
    return mesh_partitioner(make_mesh(fsdp=2, tensor=2), model, units=units)


@pytest.mark.parametrize("make", [lambda model: pmap_partitioner(), four_parts], ids=["pmap4", "fsdp2 x tensor2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_trajectory_on_four_devices(family, make, pairs):
    follow_original(family, "packed", pairs, make, microbatches=1)


def follow_original(family, kind, pairs, make, microbatches=None):
    model, start = load_hf(GOLDEN / family / "init")
    partitioner = make(model)
    config, steps, schedule, tx = golden(family, "dpo")
    options = {
        "loss": functools.partial(dpo_loss, beta=config["beta"]),
        "microbatches": microbatches or config["microbatches"],
        "axis_name": partitioner.axis_name,
    }
    step = partitioner.compile_step(functools.partial(dpo_step, model=model, tx=tx, **options))
    reference = partitioner.compile_map(functools.partial(reference_logps, model))
    frozen = partitioner.put_variables(start)
    state = partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.put_variables(start))
    for number, expected in enumerate(steps):
        rows = LAYOUTS[kind].rows([pairs[i] for i in expected["examples"]])
        rows = rows.replace(ref_logps=reference(frozen, rows))
        state, metrics = step(state, rows)
        assert float(schedule(number)) == pytest.approx(expected["lr"], rel=1e-6)
        assert abs(metrics["loss"] - per_pair(expected, "loss/train").mean()) <= 1e-5
        assert float(metrics["grad_norm"]) == pytest.approx(expected["grad_norm"], rel=1e-4)
        for side in ("chosen", "rejected"):
            assert abs(metrics[f"logps/{side}"] - per_pair(expected, f"logps_train/{side}").mean()) <= 1e-3
            assert abs(metrics[f"rewards/{side}"] - per_pair(expected, f"rewards_train/{side}").mean()) <= 1e-4
        # The original counts a tie as wrong: at step 0, where all pairs are ties, it has an accuracy of 0.
        chosen, rejected = (per_pair(expected, f"rewards_train/{side}") for side in ("chosen", "rejected"))
        accuracies = np.where(chosen == rejected, 0.5, per_pair(expected, "rewards_train/accuracies"))
        assert abs(metrics["rewards/accuracies"] - accuracies.mean()) <= 1e-6
    _, end = load_hf(GOLDEN / family / "dpo_final")
    update, expected = (jax.tree.map(np.subtract, after, start) for after in (partitioner.to_host(state).params, end))
    assert relative_difference(update, expected) <= 1e-3


@pytest.mark.parametrize("per_row", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_trajectory(family, per_row, pairs):
    model, start = load_hf(GOLDEN / family / "init")
    config, steps, schedule, tx = golden(family, "sft")
    step = jax.jit(functools.partial(sft_step, model=model, tx=tx, microbatches=config["microbatches"] if per_row == 1 else 1))
    state = init_state(start, tx)
    for expected in steps:
        chosen = [(pairs[i].prompt, pairs[i].chosen) for i in expected["examples"]]
        rows = completion_rows(chosen, length=128 * per_row, per_row=per_row)
        state, metrics = step(state, rows)
        mean = per_pair(expected, "loss/train").mean()
        assert float(metrics["loss"]) == pytest.approx(mean, rel=1e-6)  # some 330 nats, where float32 has steps of 3e-5
        assert float(metrics["grad_norm"]) == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert abs(metrics["logps/chosen"] - per_pair(expected, "logps_train/chosen").mean()) <= 1e-3


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_loss_per_token_is_the_sum_over_the_mean_length_of_the_batch(microbatches):
    """TRL's loss: not the mean over texts of each text's own mean. The last text is a padding example."""
    model = toy_model()
    start = model.init(jax.random.key(0))
    texts = [(pair.prompt, pair.chosen) for pair in PAIRS]  # of 2 to 9 tokens
    assert len({len(completion) for _, completion in texts}) > 3
    rows = Layout("plain", length=32, scored=16).rows(texts, at_least=8)
    found = {}
    for per_token in (False, True):
        step = functools.partial(sft_step, model=model, tx=optax.sgd(1.0), per_token=per_token)
        found[per_token] = jax.jit(functools.partial(step, microbatches=microbatches))(init_state(start, optax.sgd(1.0)), rows)
    (summed, of_sum), (mean, of_mean) = found[False], found[True]
    tokens = sum(len(completion) for _, completion in texts) / 7
    assert float(of_mean["loss"]) == pytest.approx(float(of_sum["nll_per_token"]), rel=1e-5)
    assert float(of_mean["loss"]) == pytest.approx(float(of_sum["loss"]) / tokens, rel=1e-5)
    assert float(of_mean["grad_norm"]) == pytest.approx(float(of_sum["grad_norm"]) / tokens, rel=1e-5)
    moved = [jax.tree.map(np.subtract, state.params, start) for state in (mean, summed)]
    assert relative_difference(moved[0], jax.tree.map(lambda x: x / tokens, moved[1])) <= 1e-4


@pytest.mark.parametrize("kind", LAYOUTS)
def test_log_probabilities_of_each_pair(kind, pairs):
    """Not only their mean: the first batch, where policy and reference are the same."""
    model, start = load_hf(GOLDEN / "gpt2" / "init")
    _, steps, _, _ = golden("gpt2", "dpo")
    rows = LAYOUTS[kind].rows([pairs[i] for i in steps[0]["examples"]])
    logps = np.asarray(jax.jit(functools.partial(reference_logps, model))(start, rows))
    assert logps.dtype == jnp.float32
    for place, index in enumerate(rows.index):
        if index >= 0:
            for side, name in enumerate(("chosen", "rejected")):
                assert abs(logps[place, side] - per_pair(steps[0], f"logps_train/{name}")[index]) <= 1e-3
