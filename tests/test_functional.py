"""The functional API: the examples of the README and of all docstrings run as they stand, the names are where promised."""

import doctest
import inspect
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_jax
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.ppo import Collected, sampled_rows
from dpo_jax.reference import BrokenReference
from dpo_jax.sampling import Samples

ROOT = Path(__file__).parent.parent
CONTINUED = re.compile(r"<!-- continues the functional example -->\n```python\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"<!-- functional example -->\s*```python\n(.*?)```", re.DOTALL)
FUNCTIONS = [
    "dpo_loss",
    "ipo_loss",
    "unlikelihood_loss",
    "plackett_luce_loss",
    "kto_loss",
    "named_loss",
    "completion_logps",
    "plain_rows",
    "shared_rows",
    "ranking_rows",
    "encode",
    "dpo_step",
    "sft_step",
    "train_step",
    "train",
    "cached_reference_logps",
    "dpo_objective",
    "mean_grads",
    "init_state",
    "make_optimizer",
    "reference_logps",
    "causal_rows",
    "load_hf",
    "save_hf",
    "load_preferences",
    "label",
    "with_scalar_head",
    "completion_rewards",
    "reward_step",
    "prompt_batch",
    "collect",
    "advantages",
    "minibatches",
    "ppo_step",
    "next_kl_coef",
    "sequence_kl",
    "optimum",
    "best_of_n",
    "regret",
    "left_pad",
    "apply_gradients",
    "preference_metrics",
    "implicit_rewards",
    "completion_lengths",
    "slots_to_pairs",
    "examples_to_rows",
    "reference_logps_of",
    "check_model",
]
# What they are functions of, where that is more than two things; the rest are options.
OF_THREE = (
    *("completion_logps", "reference_logps", "reference_logps_of", "mean_grads", "apply_gradients", "check_model"),
    *("save_hf", "label", "collect", "completion_rewards", "cached_reference_logps", "train"),
)
OF_FOUR = ("sequence_kl", "regret")
WITHOUT_EXAMPLE: dict[str, str] = {}  # {name: why none can be given}
# Whose help must say what shapes it takes and gives.
SHAPED = (
    *("dpo_loss", "ipo_loss", "unlikelihood_loss", "plackett_luce_loss", "kto_loss", "implicit_rewards", "preference_metrics"),
    *("Rows", "Encoded", "TrainState", "init_state", "plain_rows", "shared_rows", "packed_rows", "completion_rows"),
    *("ranking_rows", "causal_rows", "completion_logps", "sequence_logps", "reference_logps", "reference_logps_of"),
    *("slots_to_pairs", "examples_to_rows", "completion_lengths", "left_pad", "generate"),
)
SHAPE = re.compile(r"(?:float|int)\d*\[|\[[EP], [KS0-9.]")
RECORDS = ["Encoded", "Model", "Rows", "TrainState"]


@pytest.fixture(scope="module")
def example():
    """The variables of the README's example after it ran, with the lines it printed as `printed`."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 1
    lines = []
    scope = {"__name__": "readme", "print": lines.append, "printed": lines}
    exec(compile(blocks[0], "README.md", "exec", dont_inherit=True), scope)
    return scope


def test_the_example_learns_the_preference(example):
    losses, margins = zip(*(map(float, re.findall(r"-?\d+\.\d+", line)) for line in example["printed"]), strict=True)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)
    assert margins[0] == 0
    assert list(losses) == sorted(losses, reverse=True)
    assert losses[-1] < 0.6
    assert margins[-1] > 0.2
    assert int(example["state"].step) == len(losses)


def test_models_of_flax_and_lora_on_a_model_of_ones_own_train(example):
    (code,) = CONTINUED.findall((ROOT / "dpo_jax/README.md").read_text(encoding="utf-8"))
    scope = dict(example)
    exec(compile(code, "README.md", "exec", dont_inherit=True), scope)
    encoded, tx = scope["encoded"], scope["tx"]
    models = {name: (scope[name], scope[name].init(jax.random.key(0))) for name in ("flax_model", "nnx_model")}
    states = {name: (model, dpo_jax.init_state(variables, tx)) for name, (model, variables) in models.items()}
    for name, (model, state) in (states | {"lora_model": (scope["lora_model"], scope["lora_state"])}).items():
        if name != "lora_model":
            dpo_jax.check_model(model, state.variables, encoded)
        ref_logps = dpo_jax.reference_logps_of(model, state.variables, encoded)
        rows = dpo_jax.shared_rows(encoded, length=96, ref_logps=ref_logps)
        step = jax.jit(partial(dpo_jax.dpo_step, model=model, tx=tx, loss=partial(dpo_jax.dpo_loss, beta=0.1)))
        losses = []
        for _ in range(5):
            state, metrics = step(state, rows)
            losses.append(float(metrics["loss"]))
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4), name
        assert losses == sorted(losses, reverse=True), name
        assert losses[-1] < 0.692, name


@pytest.mark.parametrize("prompt", [np.full(3, 300), np.full(62, 5)], ids=["ids", "positions"])
def test_the_example_refuses_what_is_beyond_its_tables(prompt, example):
    wrong = dpo_jax.Encoded(np.int32(prompt), *(np.int32([*ids, 6, 7, 0]) for ids in ([5], [8])))
    with pytest.raises(BrokenReference):
        dpo_jax.reference_logps_of(example["model"], example["variables"], [wrong])


def test_the_state_is_a_tree_that_any_transformation_takes(example):
    leaves, structure = jax.tree.flatten(example["state"])
    again = jax.tree.unflatten(structure, leaves)
    assert again.variables.keys() == {"params"}
    shapes = jax.eval_shape(example["step"], example["state"], example["rows"])[0]
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in leaves]


@pytest.mark.parametrize("name", FUNCTIONS + RECORDS)
def test_public_names(name):
    assert name in dir(dpo_jax)
    value = getattr(dpo_jax, name)
    assert (value.__doc__ or "").strip()
    if name in FUNCTIONS:
        positional = [p for p in inspect.signature(value).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert len(positional) <= (4 if name in OF_FOUR else 3 if name in OF_THREE else 2)


def test_every_name_of_the_front_door_opens():
    for name in dpo_jax.__all__:
        assert getattr(dpo_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'dpo_jax' has no attribute 'dpo_stop'"):
        _ = dpo_jax.dpo_stop
    assert not hasattr(dpo_jax, "no_such_module")


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert dpo_jax.__version__ == version("dpo_jax")


def test_modules_need_no_import_of_their_own_and_transformers_does_not_advise_pytorch():
    code = """
import os, sys, dpo_jax
dpo_jax.losses.dpo_loss, dpo_jax.step.train_step, dpo_jax.training
from dpo_jax.data.tokenizer import train_tokenizer
tokenizer = train_tokenizer(["a"], vocab_size=300)
dpo_jax.encode({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer, max_length=64, max_prompt_length=32)
assert "transformers" in sys.modules
"""
    env = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    # As if PyTorch were not installed, which is when transformers says so.
    code = "import sys; sys.modules['torch'] = None" + code
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True, env=env)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, dpo_jax; dir(dpo_jax); sys.exit(len({'jax', 'numpy', 'transformers', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture(scope="module")
def names(example, tmp_path_factory):
    """What the examples find: the README's variables, numpy and jax, a model folder, and a rollout of two completions."""
    tx, variables, tokenizer = example["tx"], example["variables"], example["tokenizer"]
    sizes = {"vocab_size": len(tokenizer), "width": 16, "layers": 1, "heads": 2, "max_positions": 64, "eos_token_id": 0}
    decoder, folder = make_model(decoder_config(hf_config("llama", **sizes))), tmp_path_factory.mktemp("model") / "llama"
    dpo_jax.save_hf(folder, decoder, jax.jit(decoder.init)(jax.random.key(0)))

    tokens, lengths = dpo_jax.left_pad([pair.prompt for pair in example["encoded"]])
    logps = jnp.full((2, 4), -1.0)
    rows = sampled_rows(tokens, lengths, samples=Samples(jnp.full((2, 4), 7), jnp.array([4, 3]), logps))
    collected = Collected(rows, logps, logps, values=jnp.zeros((2, 4)), entropy=jnp.ones((2, 4)))
    rollout, _ = dpo_jax.advantages(collected, jnp.array([1.0, -1.0]), kl_coef=0.1, gamma=1.0, lam=0.95)
    return {
        **{name: example[name] for name in ("tokenizer", "encoded", "init", "forward", "unembed", "model", "variables", "tx")},
        **{name: getattr(dpo_jax, name) for name in dpo_jax.__all__},
        **{"np": np, "jnp": jnp, "jax": jax, "math": math, "optax": optax, "partial": partial, "Path": Path},
        **{"rows": example["rows"], "state": dpo_jax.init_state(variables, tx), "folder": folder},
        **{"collected": collected, "rollout": rollout},
    }


@pytest.mark.parametrize("name", dpo_jax.__all__)
def test_the_example_of_a_public_name_does_what_it_shows(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = getattr(dpo_jax, name)
    found = doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", dict(names), name, inspect.getfile(value), 0)
    assert bool(found.examples) != (name in WITHOUT_EXAMPLE), f"{name} has no example, or is listed as having none"
    failed, report = [], doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report.run(found, out=failed.append)
    assert not report.failures, "".join(failed)


@pytest.mark.parametrize("name", SHAPED)
def test_help_says_which_shapes(name):
    text, _, _ = (inspect.getdoc(getattr(dpo_jax, name)) or "").partition(">>>")
    assert SHAPE.search(text), f"help(dpo_jax.{name}) shows no shape"
