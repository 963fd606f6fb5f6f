"""The updated weights of contenders: norms are those of all parameters, and a contender whose weights are off is named."""

import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.bench import gates, race, updates
from dpo_jax.bench.work import Work
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import save_hf

SIZES = {"vocab_size": 31, "width": 16, "layers": 2, "heads": 2, "max_positions": 32, "eos_token_id": 0}
MLP = {"gpt_neox": "gpt_neox.layers.1.mlp.dense_h_to_4h.weight", "llama": "model.layers.1.mlp.up_proj.weight"}


def moved(variables, size, *, seed, only=None):
    """The variables, changed by numbers of a normal distribution, and the L2 norm of the change."""
    rng, leaves = np.random.default_rng(seed), jax.tree_util.tree_leaves_with_path(variables)
    changed, squares = [], 0.0
    for path, leaf in leaves:
        new = np.array(leaf)
        if only is None or only in jax.tree_util.keystr(path):
            part = new[1:] if only else new  # of the last layer
            part += size * rng.standard_normal(part.shape).astype(np.float32)
        squares += float(np.square(new.astype(np.float64) - np.asarray(leaf, np.float64)).sum())
        changed.append(new)
    return jax.tree.unflatten(jax.tree.structure(variables), changed), math.sqrt(squares)


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def folders(request, tmp_path_factory):
    """(family, model, variables of the start, folder with `model`): of a head of its own, and of a tied one."""
    folder, tied = tmp_path_factory.mktemp(request.param), request.param == "llama"
    grouped = {"kv_heads": 1, "mlp_width": 24} if tied else {}
    model = make_model(decoder_config(hf_config(request.param, **SIZES, **grouped, tie=tied)))
    variables = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(1)))
    save_hf(folder / "model", model, variables)
    return request.param, model, variables, folder


def results(*names, **changes):
    result = {"first_logps": [[-1.0, -2.0]], "losses": [math.log(2), 0.6], "grad_norms": [2.0, 1.0]}
    return {name: result | changes.get(name.replace("-", "_"), {}) for name in names}


def test_norms_are_those_of_all_parameters(folders, monkeypatch):
    """Also where tensors are read in blocks, and where a folder repeats the tied head."""
    family, model, variables, folder = folders
    monkeypatch.setattr(updates, "BLOCK", 50)
    trained, norm = moved(variables, 1e-2, seed=0)
    off, distance = moved(trained, 1e-3, seed=1, only="'up'")
    for name, weights in (("torch-cached", trained), ("trl", trained), ("jax-attention", off)):
        save_hf(folder / "norms" / name, model, weights)
    if family == "llama":
        file = folder / "norms" / "trl" / "model.safetensors"
        stored = load_file(file)
        save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"]}, file, metadata={"format": "pt"})
    names = ("torch-cached", "trl", "jax-attention")
    found = updates.compare(folder / "model", {name: folder / "norms" / name for name in names})
    np.testing.assert_allclose(found.norms[:2], norm, rtol=1e-12)
    np.testing.assert_allclose(found.distances, distance * np.array([[0, 0, 1], [0, 0, 1], [1, 1, 0]]), rtol=1e-12)
    assert found.places[0][2] == found.places[2][1] == MLP[family]

    with pytest.raises(gates.GateFailed, match=rf"jax-attention and torch-cached .* L2 norm, most in {MLP[family]} \(toler"):
        gates.check(results(*names), precision="float32", updates=found)
    passed = gates.check(results(*names), precision="bfloat16", updates=found)
    relative = pytest.approx(distance / norm)
    assert passed["update"] == relative
    assert (passed["yardstick"], passed["updates"]) == (
        "torch-cached",
        {"torch-cached": 0, "trl": 0, "jax-attention": relative},
    )


def test_a_folder_of_other_tensors_is_refused(folders):
    family, model, variables, folder = folders
    save_hf(folder / "cut", model, variables)
    stored = load_file(folder / "cut" / "model.safetensors")
    stored[MLP[family]] = stored[MLP[family]][:-1]
    save_file(stored, folder / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{MLP[family]} in .*cut.* has shape"):
        updates.compare(folder / "model", {"trl": folder / "cut"})
    del stored[MLP[family]]
    save_file(stored, folder / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{MLP[family]} missing in .*cut"):
        updates.compare(folder / "model", {"trl": folder / "cut"})


NAMES = ("torch-live", "trl", "jax-attention")


def update(distances, *, norms=(1.0, 1.0, 1.0)):
    """Of three contenders: distances from (first, second), (first, third), (second, third)."""
    a, b, c = distances
    return updates.Updates(NAMES, np.array(norms), np.array([[0, a, b], [a, 0, c], [b, c, 0]]), [["x"] * 3] * 3)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (update([1e-5, 0.5, 0.5]), r"jax-attention and torch-live .* in 2 steps differ by 0\.5 "),
        (update([0.5, 1e-5, 0.5]), r"trl and torch-live .* differ by 0\.5 "),
        (update([9e-4, 9e-4, 2e-3]), r"jax-attention and trl .* differ by 0\.002 "),  # on either side of the yardstick
        (update([1e-5, math.nan, math.nan]), r"jax-attention and torch-live .* differ by nan "),
        (update([math.nan] * 3, norms=(math.nan, 1, 1)), "torch-live: the update .* in 2 steps has the norm nan"),
        (update([0, 0, 0], norms=(0, 0, 0)), "torch-live: the update .* has the norm 0"),
    ],
)
def test_who_is_off_is_named(found, expected):
    with pytest.raises(gates.GateFailed, match=expected):
        gates.check(results(*NAMES), precision="float32", updates=found)


def test_weights_after_other_numbers_of_steps_are_not_compared():
    shorter = results(*NAMES, trl={"losses": [math.log(2)], "grad_norms": [2.0]})
    assert gates.check(shorter, precision="float32")["steps"] == 1
    with pytest.raises(gates.GateFailed, match="trl took 1 steps and torch-live 2: their weights cannot be compared"):
        gates.check(shorter, precision="float32", updates=update([0, 0, 0]))


@pytest.mark.parametrize("cheat", [False, True])
def test_the_first_round_compares_weights_and_deletes_them(folders, monkeypatch, cheat):
    _, model, variables, folder = folders
    fields = {"folder": str(folder), "batch": 1, "steps": 1, "gate_steps": 2, "precision": "float32"}
    work = Work(**dict.fromkeys(Work.__dataclass_fields__, None) | fields)
    trained, _ = moved(variables, 1e-2, seed=0)
    off, _ = moved(trained, 1e-4, seed=1)
    asked = []

    def run_one(work, name, *, round_number, weights, **options):
        asked.append((round_number, name, weights))
        if weights:
            save_hf(work.weights(name), model, off if cheat and name == "jax-head" else trained)
        measured = {"flops_per_second": 1.0} if "matmul" in name else {"step_seconds": [1.0, 1.0], "peak_bytes": 1}
        return results(name)[name] | measured

    monkeypatch.setattr(race, "run_one", run_one)
    quiet = {"rounds": 2, "say": lambda text: None}
    if cheat:
        with pytest.raises(gates.GateFailed, match="jax-head and jax-attention .* updates of the weights"):
            race.race(work, ["jax-head", "jax-attention"], **quiet)
    else:
        _, differences = race.race(work, ["jax-head", "jax-attention"], **quiet)
        assert differences["updates"] == {"jax-head": 0, "jax-attention": 0}
        wrote = [(number, name) for number, name, weights in asked if weights]
        assert wrote == [(0, "jax-head"), (0, "jax-attention")]
        assert "updates" not in race.race(work, ["jax-attention"], **quiet)[1], "there is only one"
    assert not work.all_weights.exists()


@pytest.mark.parametrize(("difference", "passes"), [(5e-4, True), (5e-3, False)])
def test_a_nearly_certain_completion_is_held_to_the_mean_size(difference, passes):
    other = {"first_logps": [[-300.0, -2.0 - difference]]}
    both = results("trl", "torch-live", trl=other, torch_live={"first_logps": [[-300.0, -2.0]]})
    if passes:
        assert gates.check(both, precision="float32")["first_logps"] == pytest.approx(difference / 151, rel=0.01)
    else:
        with pytest.raises(gates.GateFailed, match="trl and torch-live .* log-probabilities at step 0 differ .* at pair 0"):
            gates.check(both, precision="float32")
