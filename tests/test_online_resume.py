"""What a resumed `dpo-jax online` may not change: its facts against those of the saved run."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo_jax.cli.commands import online
from dpo_jax.cli.config import Config
from dpo_jax.lab.world import Prompts
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.training.fingerprint import RunMismatch, SavedRun

SIZES: dict[str, Any] = {"vocab_size": 512, "width": 16, "layers": 1, "heads": 2, "max_positions": 64, "eos_token_id": 0}
PROMPTS = Prompts(["The film", "The plot"], [np.arange(2, dtype=np.int32), np.arange(3, dtype=np.int32)])

DIGESTS = {"start": "w", "base": "b"}


@pytest.fixture(scope="module")
def world(tokenizer):
    return SimpleNamespace(
        model=make_model(decoder_config(hf_config("llama", **SIZES))), tokenizer=tokenizer, train=PROMPTS, test=PROMPTS
    )


def facts_of(world, **sections):
    """The facts of a run with these changes of the sections of its configuration."""
    changed = {name: dataclasses.replace(getattr(Config(), name), **options) for name, options in sections.items()}
    config = dataclasses.replace(Config(), **changed)
    return online._facts(config, config.online.training(config.dpo), world, DIGESTS)


def saved_with(facts, *, without=()):
    return SavedRun("runs/online", 4, {"fingerprint": {name: value for name, value in facts.items() if name not in without}})


@pytest.mark.parametrize(("was", "now"), [(1, 2), (2, 1), (2, 3)])
def test_the_replay_buffer_may_not_change(world, was, now):
    before, after = (facts_of(world, online={"replay": replay}) for replay in (was, now))
    online._refuse_changes(saved_with(before), before)
    with pytest.raises(RunMismatch, match=f"online.replay: was {was}, is {now}"):
        online._refuse_changes(saved_with(before), after)


def test_a_run_saved_without_a_replay_buffer_has_one_of_one_round(world):
    saved = saved_with(facts_of(world), without=["online.replay"])
    online._refuse_changes(saved, facts_of(world))
    with pytest.raises(RunMismatch, match="online.replay: was 1, is 2"):
        online._refuse_changes(saved, facts_of(world, online={"replay": 2}))


@pytest.fixture
def reward_models(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    return {name: str(tmp_path / name) for name in ("one", "other")}


def estimated_by(model):
    return {"online": {"elicitation": "disagreement", "reward_model": model}}


def test_the_reward_model_that_estimates_may_not_change(world, reward_models):
    one, other, none = (facts_of(world, **estimated_by(reward_models.get(name))) for name in ("one", "other", "none"))
    for was, now in ((one, other), (one, none), (none, one)):
        with pytest.raises(RunMismatch, match="estimate: was "):
            online._refuse_changes(saved_with(was), now)
    online._refuse_changes(saved_with(one, without=["estimate"]), one)
    (Path(reward_models["one"]).parent / "moved").symlink_to(reward_models["one"])
    online._refuse_changes(saved_with(one), facts_of(world, **estimated_by(reward_models["one"] + "/../moved")))


def test_a_checkpoint_knows_the_base_of_its_adapter(world):
    """`export` writes it into the adapter's files."""
    assert facts_of(world).items() >= DIGESTS.items()


def test_held_out_prompts_may_not_change(world):
    was, now = facts_of(world), facts_of(SimpleNamespace(**{**vars(world), "test": PROMPTS.of([0])}))
    with pytest.raises(RunMismatch, match="test prompts: was "):
        online._refuse_changes(saved_with(was), now)
    online._refuse_changes(saved_with(was, without=["test prompts"]), now)


def test_the_reward_that_is_measured_may_not_change(world):
    """Labels by a judge do not depend on it."""
    labels, reviews = {"online": {"reward": "judge"}}, {"data": {"source": "reviews"}}
    exact, none = facts_of(world, **labels, **reviews), facts_of(world, **labels)
    hf = facts_of(world, **labels, **reviews, frontier={"reward": "hf", "classifier": "org/model"})
    for was, now, words in (
        (exact, hf, "'exact', is 'hf, org/model'"),
        (none, hf, "None, is 'hf, org/model'"),
        (exact, none, "'exact', is None"),
    ):
        with pytest.raises(RunMismatch, match=f"measured reward: was {words}"):
            online._refuse_changes(saved_with(was), now)
    online._refuse_changes(saved_with(exact, without=["measured reward"]), hf)
