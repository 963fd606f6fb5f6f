"""PPO runs that are interrupted: the state of a rollout, parts of a large one, and the same bits at the end."""

import dataclasses
import functools
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabular_model import CONTEXTS, NEW, tabular_model

from dpo_jax.lab.ppo import PpoMethod, PpoOptions, collect_in_parts
from dpo_jax.lab.world import Prompts
from dpo_jax.ppo import collect, prompt_batch
from dpo_jax.reward_model import with_scalar_head
from dpo_jax.runtime.checkpoint_record import read_record
from dpo_jax.runtime.fit import Preempted
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.step import init_state
from dpo_jax.training.fingerprint import RunMismatch
from dpo_jax.training.run import Saving

MODEL = tabular_model()._replace(config=SimpleNamespace(width=CONTEXTS))
OPTIONS = PpoOptions(5, 8, 2, 2, 1, 16, clip=0.2, value_clip=0.2, value_weight=0.1, gamma=1.0, lam=0.95)
TOKENIZER = SimpleNamespace(decode=lambda ids, **_: "".join(map(str, np.asarray(ids).tolist())))


def ppo_in(partitioner, begin=init_state):
    """A method in a world of two prompts, with what `PpoMethod` reads of one."""
    reference = partitioner.put_variables(MODEL.init(jax.random.key(7)))
    world = SimpleNamespace(
        partitioner=partitioner,
        model=MODEL,
        tokenizer=TOKENIZER,
        reference=reference,
        train=Prompts(["1", "2"], [np.array([1]), np.array([2])]),
        stop_ids=(0,),
        max_new_tokens=NEW,
        width=1 + NEW,
        batch=8,
        begin=begin,
        measure=lambda variables: {
            "reward": float(np.abs(partitioner.to_host(variables)["params"]["table"]).astype(np.float64).sum()),
            "kl": 0.1,
        },
    )
    return PpoMethod(world, tx=make_optimizer(lambda step: 0.05, name="adamw", max_grad_norm=1.0), options=OPTIONS)


def run(method, folder, *, killed_at=None, seed=0, save_every=0):
    """Trains; SIGTERM comes while rollout `killed_at` is scored. Returns points, variables, how many rollouts were drawn."""
    drawn = []

    def reward(prompts, completions):
        drawn.append(len(completions))
        if len(drawn) - 1 == killed_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return np.array([len(text) + int(text[:1] or 0) / 3 for text in completions])

    found = method.train(
        folder,
        reward=reward,
        target_kl=0.2,
        kl_coef=0.5,
        evaluations=3,
        seed=seed,
        resumable={"fingerprint": {"seed": seed}, "saving": Saving(every=save_every)},
    )
    return *found, len(drawn)


def saved_leaves(folder):
    """Shape, type and digest of what was saved last, by name."""
    return read_record(folder / "checkpoints" / "5")["leaves"]


def frozen_table(variables, *, tx):
    """The value function alone is trained."""
    return init_state({"head": variables["head"]}, tx, frozen={"params": variables["params"]})


WAYS = {
    "single": (single_device, init_state),
    "pmap": (pmap_partitioner, frozen_table),
    "mesh": (lambda: mesh_partitioner(make_mesh(data=4), with_scalar_head(MODEL)), init_state),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_ends_with_the_same_bits(way, tmp_path):
    """Killed twice: in the place of an evaluation (after two rollouts), and where none is due."""
    make, begin = WAYS[way]
    method = ppo_in(make(), begin)
    points, variables, drawn = run(method, tmp_path / "whole")
    assert (drawn, [point["step"] for point in points]) == (5, [8, 16, 20])
    for killed_at, done in ((1, 2), (0, 3)):
        with pytest.raises(Preempted, match=f"SIGTERM after {done} steps"):
            run(method, tmp_path / "cut", killed_at=killed_at)
    found, again, drawn = run(method, tmp_path / "cut")
    assert (found, drawn) == (points, 2)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole")]
    assert rows[0] == rows[1]
    leaves = saved_leaves(tmp_path / "cut")
    assert leaves == saved_leaves(tmp_path / "whole")
    assert {leaves[name]["dtype"] for name in ("kl_coef", "stats.count", "stats.mean", "stats.squares")} == {"float64"}
    assert not any("frozen" in name for name in leaves)
    assert len((tmp_path / "cut" / "resumes.jsonl").read_text().splitlines()) == 2
    with pytest.raises(RunMismatch, match="seed: was 0, is 1"):
        run(method, tmp_path / "cut", seed=1)


def test_parts_of_a_rollout_are_the_samples_of_the_whole():
    model = with_scalar_head(MODEL)
    variables = jax.jit(model.init)(jax.random.key(3)), jax.jit(MODEL.init)(jax.random.key(7))
    compiled = jax.jit(functools.partial(collect, model, max_new_tokens=NEW, eos_id=0))
    shapes = []

    def counted(variables, prompts):
        shapes.append(len(prompts.lengths))
        return jax.device_get(compiled(variables, prompts))

    prompts = prompt_batch([[1], [2]] * 5, jax.random.key(2), length=1)
    whole = counted(variables, prompts)
    found = collect_in_parts(counted, variables, prompts, size=4)
    assert shapes == [10, 4, 4, 4]
    for field in dataclasses.fields(whole.rows):
        if (expected := getattr(whole.rows, field.name)) is not None:
            np.testing.assert_array_equal(getattr(found.rows, field.name), expected, err_msg=field.name)
    for name in ("logps", "ref_logps", "values", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), atol=1e-6, err_msg=name)
    assert jnp.unique(found.rows.target, axis=0).shape[0] > 3
