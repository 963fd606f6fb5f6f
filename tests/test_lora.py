"""Adapters and partly trained models: equal to the whole model at the start, in gradients, on meshes, and in PEFT's files."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from test_models import logits_of, stacks_converted, text_rows
from test_step import random_pairs

from dpo_jax.data.layout import Layout
from dpo_jax.dpo import dpo_step
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models import decoder
from dpo_jax.models.adapter import WEIGHTS, write_adapter
from dpo_jax.models.checkpoint_stream import assemble
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import WeightsDigest, weights_digest
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.folder import ADAPTER, adapter_base
from dpo_jax.models.hf import load_hf, read_weights, save_hf, variable_shapes
from dpo_jax.models.lora import LORA, WRITES, Lora, adapter_shapes, lora_model, lora_targets, merge_adapter, new_adapter
from dpo_jax.models.partial import TRAINED, chosen_parameters, join, partial_model, split
from dpo_jax.reference import reference_logps
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.step import init_state

SIZES = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "max_positions": 64, "eos_token_id": 0}
MODEL = make_model(decoder_config(hf_config("llama", kv_heads=2, **SIZES)))
UNITS = {"heads": 8, "kv_heads": 8}
LORA_ALL = Lora(4, 6.0, lora_targets("all", MODEL.config))
ADAPTED = lora_model(MODEL, LORA_ALL)
LAST = chosen_parameters("last_layer,final_norm.*", MODEL)
LOSS = functools.partial(dpo_loss, beta=0.1)
TX = make_optimizer(1e-2, max_grad_norm=1.0)


def waved(tree, size=0.1):
    """The same tree with other values, none of them zero."""
    return jax.tree.map(lambda x: x + size * np.sin(1 + np.arange(x.size, dtype=np.float32)).reshape(x.shape), tree)


@pytest.fixture(scope="module")
def base():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def rows(base):
    rows = Layout("shared", length=32, scored=32, rows_multiple=8).rows(random_pairs(7))
    return rows.replace(ref_logps=np.asarray(jax.jit(functools.partial(reference_logps, MODEL))(base, rows)))


def lora_state(variables, tx=TX):
    adapter = new_adapter(MODEL.config, LORA_ALL, jax.random.key(1))
    return init_state({LORA: adapter}, tx, frozen=dict(variables))


def partial_state(variables, tx=TX):
    both = split(variables, LAST)
    return init_state({TRAINED: both[TRAINED]}, tx, frozen={"params": both["params"]})


WAYS = {"lora": (ADAPTED, lora_state), "last layer": (partial_model(MODEL, LAST), partial_state)}


@pytest.mark.parametrize("what", WAYS)
def test_step_0_is_the_reference_and_only_the_trained_part_has_state(what, base, rows):
    model, begin = WAYS[what]
    state = begin(base)
    after, metrics = jax.jit(functools.partial(dpo_step, model=model, tx=TX, loss=LOSS))(state, rows)
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-7)
    assert abs(float(metrics["displacement/chosen"])) < 1e-5
    assert float(metrics["grad_norm"]) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, after.frozen, state.frozen)
    trained, whole = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, base))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < trained + 10 < 0.5 * whole


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_an_adapter_follow_from_those_of_the_weights(family):
    """W + s A B: dA = s dW B', dB = s A' dW, of the merged model's dW."""
    model = make_model(decoder_config(hf_config(family, **SIZES)))
    lora = Lora(3, 6.0, lora_targets("all", model.config))
    adapted = lora_model(model, lora)
    base, adapter = jax.jit(model.init)(jax.random.key(0)), waved(new_adapter(model.config, lora, jax.random.key(1)))
    rows = Layout("shared", length=32, scored=32, rows_multiple=1).rows(random_pairs(2))

    def merged(base, adapter):
        layers = {room: dict(parts) for room, parts in base["params"]["layers"].items()}
        for target in lora.targets:
            room, name = target.split("/")
            pair = adapter["layers"][room][name]
            change = lora.scale * jnp.einsum("lir,lro->loi" if target in WRITES else "lir,lro->lio", pair["a"], pair["b"])
            layers[room][name] = {**layers[room][name], "kernel": layers[room][name]["kernel"] + change}
        return {"params": {**base["params"], "layers": layers}}

    def value(model, variables):
        return completion_logps(model, variables, rows).sum()

    whole = merged(base, adapter)
    ours = jax.jit(jax.value_and_grad(lambda a: value(adapted, {**base, LORA: a})))(adapter)
    full = jax.jit(jax.value_and_grad(lambda v: value(model, v)))(whole)
    assert float(ours[0]) == pytest.approx(float(full[0]), rel=1e-6)
    for target in lora.targets:
        room, name = target.split("/")
        of_kernel = full[1]["params"]["layers"][room][name]["kernel"]
        of_kernel = of_kernel.swapaxes(1, 2) if target in WRITES else of_kernel
        pair, found = adapter["layers"][room][name], ours[1]["layers"][room][name]
        largest = float(np.abs(of_kernel).max())
        for part, expected in (
            ("a", lora.scale * np.einsum("lio,lro->lir", of_kernel, pair["b"])),
            ("b", lora.scale * np.einsum("lir,lio->lro", pair["a"], of_kernel)),
        ):
            np.testing.assert_allclose(found[part], expected, rtol=0, atol=2e-6 * max(1.0, largest), err_msg=f"{target} {part}")


def backward_layers(fn, argument):
    """Over how many layers the scans of a program go backwards."""

    def of(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan" and eqn.params["reverse"]:
                yield eqn.params["length"]
            for value in jax.tree.leaves(list(eqn.params.values())):
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    yield from of(inner)

    return sum(of(jax.make_jaxpr(fn)(argument).jaxpr))


@pytest.mark.parametrize("text", ["last_layer,final_norm.*", "layers.*_norm.*"])
def test_gradients_of_a_part_are_those_of_the_whole(text, base, rows):
    chosen = chosen_parameters(text, MODEL)
    model, both = partial_model(MODEL, chosen), split(base, chosen)
    jax.tree.map(np.testing.assert_array_equal, join(both), base)
    jax.tree.map(np.testing.assert_array_equal, join(jax.device_get(both)), base)

    def value(model, variables):
        return completion_logps(model, variables, rows).mean()

    ours, full = jax.grad(lambda t: value(model, {**both, TRAINED: t})), jax.grad(lambda v: value(MODEL, v))
    expected = split(jax.jit(full)(base), chosen)[TRAINED]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), jax.jit(ours)(both[TRAINED]), expected)
    # Nothing is computed backwards in the layers before the last one.
    assert backward_layers(full, base) == 2
    assert backward_layers(ours, both[TRAINED]) == (1 if chosen.layers else 2)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")  # layers that are cut off their stack are copied
@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize("way", ["fsdp 2 x tensor 2", "pmap"])
def test_devices_do_not_matter(what, way, base, rows):
    model, begin = WAYS[what]
    tx, results = optax.sgd(0.3, momentum=0.9), []
    if way == "pmap":
        ways = (pmap_partitioner(), pmap_partitioner())
    else:
        ways = tuple(mesh_partitioner(make_mesh(fsdp=2, tensor=2), one, units=UNITS) for one in (model, MODEL))
    for partitioner, of_base in ((single_device(), single_device()), ways):
        step = functools.partial(dpo_step, model=model, tx=tx, loss=LOSS, microbatches=2, axis_name=partitioner.axis_name)
        step, seen = partitioner.compile_step(step), []
        state = partitioner.init_state(functools.partial(begin, tx=tx), of_base.put_variables(base))
        for _ in range(4):
            state, metrics = step(state, rows)
            seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        results.append((seen, partitioner.to_host(state)))
    assert results[0][0][-1][0] < 0.69
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5), results[0][1].params, results[1][1].params)


def test_an_adapter_lies_on_a_mesh_as_its_kernels_do(base):
    partitioner = mesh_partitioner(make_mesh(fsdp=2, tensor=2, devices=jax.devices()), ADAPTED, units=UNITS)
    state = partitioner.init_state(lora_state, partitioner.put_variables(base))
    query, out = (state.params[LORA]["layers"]["attention"][name] for name in ("query", "out"))
    assert [tuple(x.sharding.spec) for x in (query["a"], query["b"])] == [(None, "fsdp", None), (None, None, "tensor")]
    assert [tuple(x.sharding.spec) for x in (out["a"], out["b"])] == [(None, "tensor", None), (None, None, "fsdp")]
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    moments = [leaf for name, leaf in flat.items() if name.endswith("['attention']['out']['a']")]
    assert moments
    assert {tuple(x.sharding.spec) for x in moments} == {(None, "tensor", None)}


def test_a_base_may_be_bfloat16(base, rows):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    logps = jax.jit(functools.partial(reference_logps, MODEL))(half, rows)
    step = jax.jit(functools.partial(dpo_step, model=ADAPTED, tx=TX, loss=LOSS, microbatches=2))
    state, metrics = step(lora_state(half), rows.replace(ref_logps=logps))
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {np.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(jnp.float32)}


@pytest.mark.parametrize("what", WAYS)
def test_kernels_are_rounded_once_in_every_stack_and_never_widened(what, base, monkeypatch):
    _, begin = WAYS[what]
    rows, kernels = text_rows(np.arange(12)[None]), len(lora_targets("all", MODEL.config))

    def converted(variables, dtype):
        """How many stacks of kernels are converted to `dtype` outside of the layers."""
        plain = make_model(MODEL.config, dtype=dtype)
        model = lora_model(plain, LORA_ALL) if what == "lora" else partial_model(plain, LAST)

        def count():
            return stacks_converted(lambda variables: model.forward(variables, rows), variables, dtype=dtype)

        with monkeypatch.context() as patch:
            patch.setattr(decoder, "_round_kernels", lambda variables, dtype: variables)
            others = count()
        return count() - others

    variables = begin(base).variables
    assert converted(variables, jnp.bfloat16) == kernels * (1 if what == "lora" else 2)
    half = {**variables, "params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])}
    assert converted(half, jnp.bfloat16) == (0 if what == "lora" else kernels)
    assert converted(half, jnp.float32) == 0


def test_names_of_targets_and_of_parameters():
    assert lora_targets("q_proj, v_proj", MODEL.config) == ("attention/query", "attention/value")
    assert lora_targets("mlp", MODEL.config) == ("mlp/gate", "mlp/up", "mlp/down")
    fused = decoder_config(hf_config("gpt_neox", **SIZES))
    assert lora_targets("query_key_value", fused) == ("attention/query", "attention/key", "attention/value")
    with pytest.raises(ValueError, match=r"a gpt_neox has no q_proj; it has all, attention, mlp, query, query_key_value"):
        lora_targets("q_proj", fused)
    assert Lora(16, 32.0, (), rslora=True).scale == 8.0
    for text, words in (
        ("last_layers:2", "the model has 2 layers; name 1 to 1"),
        ("lm_head", "no parameter matches 'lm_head'; there are last_layer"),
        ("last_layer,layers.mlp.*", "cannot be combined"),
        ("*", "all parameters are named"),
    ):
        with pytest.raises(ValueError, match=words):
            chosen_parameters(text, MODEL)


def decode_all(model, variables, rows, *, apart):
    """Hidden states of rows that are decoded with a cache."""
    cache = model.init_cache(len(rows.tokens), rows.tokens.shape[1])
    if apart:
        variables, cache = model.by_layer(variables, cache)
    return model.decode(variables, rows, cache)[0]


@pytest.mark.parametrize("what", ["lora", "last layer"])
def test_decoding_equals_the_forward_pass(what, base):
    model = WAYS[what][0]
    rows = text_rows(np.arange(12)[None])
    variables = (
        {**base, LORA: waved(new_adapter(MODEL.config, LORA_ALL, jax.random.key(1)))} if what == "lora" else split(base, LAST)
    )
    expected = jax.jit(model.forward)(variables, rows)
    for apart in (False, True):
        found = jax.jit(functools.partial(decode_all, model, apart=apart))(variables, rows)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# Files


def saved(folder, family="llama", targets="all", **options):
    """(model, base, adapter, its size): a base in folder/base and an adapter of it in folder/adapter."""
    grouped = {"kv_heads": 2} if family == "phi3" else {}
    model = make_model(decoder_config(hf_config(family, **SIZES, **grouped)))
    base = waved(jax.jit(model.init)(jax.random.key(0)), 0.02)
    lora = Lora(4, 6.0, lora_targets(targets, model.config), **options)
    adapter = waved(new_adapter(model.config, lora, jax.random.key(1)))
    if not (folder / "base").exists():
        save_hf(folder / "base", model, base)
    where = {"base": str(folder / "base"), "source": folder / "base", "base_digest": weights_digest(base)}
    write_adapter(folder / "adapter", model.config, lora, adapter, **where)
    return model, base, adapter, lora


@pytest.mark.parametrize(
    ("family", "targets", "rslora"),
    [
        ("llama", "all", True),
        ("gpt2", "query,value,mlp", False),
        ("gpt_neox", "all", False),
        ("gptj", "attention,up", False),
        ("phi3", "query,value,up", True),
    ],
)
def test_an_adapter_survives_its_files(family, targets, rslora, tmp_path):
    model, base, adapter, lora = saved(tmp_path, family, targets, rslora=rslora)
    folder, rows = tmp_path / "adapter", text_rows(np.arange(12)[None])
    merged_model, merged = load_hf(folder)
    beside = logits_of(lora_model(model, lora), {**base, LORA: adapter}, rows)
    np.testing.assert_allclose(logits_of(merged_model, merged, rows), beside, rtol=0, atol=1e-5)
    assert np.abs(beside - logits_of(model, base, rows)).max() > 0.1
    shapes = {**variable_shapes(model), LORA: adapter_shapes(model.config, lora)}
    one, two = WeightsDigest(), WeightsDigest()
    again = assemble(shapes, read_weights(folder, model, merge=False, digest=one), put=np.asarray)
    jax.tree.map(np.testing.assert_array_equal, again, {**jax.device_get(base), LORA: jax.device_get(adapter)})
    assert sum(1 for _ in read_weights(folder, model, digest=two)) > 0
    assert one.hexdigest() == two.hexdigest() != one.base == weights_digest(base)


def changed(folder, **settings):
    content = json.loads((folder / ADAPTER).read_text())
    (folder / ADAPTER).write_text(json.dumps(content | settings))


def without(folder, end):
    file = folder / WEIGHTS
    save_file({name: x for name, x in load_file(file).items() if not name.endswith(end)}, file)


def renamed(folder):
    file = folder / WEIGHTS
    save_file({name.replace("q_proj", "qq_proj"): x for name, x in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: changed(f / "adapter", use_dora=True), r"use_dora = true is not supported"),
        (lambda f: changed(f / "adapter", init_lora_weights="pissa"), r'init_lora_weights = "pissa" is not supported'),
        (lambda f: changed(f / "adapter", modules_to_save=["lm_head"]), r'modules_to_save = \["lm_head"\] is not supported'),
        (lambda f: changed(f / "adapter", peft_type="IA3"), r'peft_type = "IA3" is not "LORA"'),
        (lambda f: changed(f / "adapter", r=3), r"where rank 3 is expected"),
        (lambda f: changed(f / "adapter", base_model_name_or_path=str(f / "none")), r"its base model is not here"),
        (lambda f: changed(f / "adapter", base_model_name_or_path=str(f / "adapter")), r"an adapter itself"),
        (lambda f: without(f / "adapter", "layers.1.mlp.up_proj.lora_B.weight"), r"lora_B of .*up_proj.weight is missing"),
        (lambda f: renamed(f / "adapter"), r"qq_proj.lora_A.weight is not a LoRA weight of a linear layer"),
        (lambda f: (f / "adapter" / WEIGHTS).unlink(), r"has no adapter_model.safetensors"),
        (
            lambda f: save_hf(f / "base", MODEL, jax.jit(MODEL.init)(jax.random.key(7))),
            r"was trained on different weights from those of .*base now \(SHA-256",
        ),
    ],
)
def test_what_does_not_fit_is_refused(damage, words, base, tmp_path):
    save_hf(tmp_path / "base", MODEL, base)
    where = {"base": str(tmp_path / "base"), "source": tmp_path / "base", "base_digest": weights_digest(base)}
    adapter = waved(new_adapter(MODEL.config, LORA_ALL, jax.random.key(1)))
    write_adapter(tmp_path / "adapter", MODEL.config, LORA_ALL, adapter, **where)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_hf(tmp_path / "adapter")


def test_a_base_of_the_hub_is_named_as_peft_reads_it_with_its_revision_apart(base, tmp_path):
    commit = "0123456789abcdef" * 2
    adapter = waved(new_adapter(MODEL.config, LORA_ALL, jax.random.key(1)))
    where = {"source": tmp_path, "base_digest": weights_digest(base)}
    for name, wanted in {f"org/base@{commit}": ("org/base", commit), "org/base": ("org/base", None)}.items():
        folder = write_adapter(tmp_path / "adapter", MODEL.config, LORA_ALL, adapter, base=name, **where)
        content = json.loads((folder / "adapter_config.json").read_text())
        assert (content["base_model_name_or_path"], content["revision"]) == wanted
        assert adapter_base(folder) == name
    changed(folder, base_model_name_or_path=str(tmp_path), revision="main")  # a folder has no revision
    assert adapter_base(folder) == str(tmp_path)


# PEFT

WITH_PEFT = """
import json, sys, torch
from pathlib import Path
from safetensors.numpy import save_file
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

def logits(model, file):
    with torch.no_grad():
        save_file({"logits": model.eval()(torch.arange(12)[None] % 50).logits.numpy()}, file)

options = {"attn_implementation": "eager", "dtype": torch.float32}
for folder in map(Path, sys.argv[1:]):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
    logits(PeftModel.from_pretrained(base, folder / "adapter"), folder / "ours.safetensors")
    logits(AutoModelForCausalLM.from_pretrained(folder / "adapter", **options), folder / "auto.safetensors")
    logits(AutoModelForCausalLM.from_pretrained(folder / "merged", **options), folder / "merged.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False,
                        use_rslora=True)
    torch.manual_seed(0)
    theirs = get_peft_model(base, config)
    logits(theirs, folder / "theirs.safetensors")
    theirs.save_pretrained(folder / "theirs")
"""


@pytest.mark.parity
def test_peft_and_we_read_each_other(tmp_path):
    """Set DPO_JAX_TORCH_PYTHON to a Python with torch, transformers and peft if this one has none."""
    here = all(importlib.util.find_spec(name) for name in ("torch", "peft"))
    python = os.environ.get("DPO_JAX_TORCH_PYTHON") or (sys.executable if here else None)
    if python is None:
        pytest.skip("no torch and peft here, and DPO_JAX_TORCH_PYTHON is not set")
    rows, ours, folders = text_rows(np.arange(12)[None] % 50), {}, []
    for family, targets in (
        ("llama", "all"),
        ("gpt2", "query,value,mlp"),
        ("gpt_neox", "all"),
        ("gptj", "all"),
        ("gemma2", "mlp"),
        ("phi3", "query,value,up"),
    ):
        folders.append(folder := tmp_path / family)
        model, base, adapter, lora = saved(folder, family, targets)
        save_hf(folder / "merged", *load_hf(folder / "adapter"))
        ours[folder] = logits_of(lora_model(model, lora), {**base, LORA: adapter}, rows)
    done = subprocess.run([python, "-c", WITH_PEFT, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        for name in ("ours", "auto", "merged"):
            theirs = load_file(folder / f"{name}.safetensors")["logits"]
            np.testing.assert_allclose(ours[folder], theirs, rtol=0, atol=1e-5, err_msg=f"{folder.name} {name}")
        loaded = logits_of(*load_hf(folder / "theirs"), rows)
        theirs = load_file(folder / "theirs.safetensors")["logits"]
        np.testing.assert_allclose(loaded, theirs, rtol=0, atol=1e-5, err_msg=f"{folder.name} theirs")


def test_a_base_model_refuses_an_adapter_that_nobody_scaled(base, rows):
    """It does not know alpha."""
    both = {**base, **ADAPTED.init(jax.random.key(1))}
    for function in (MODEL.forward, lambda *given: MODEL.decode(*given, MODEL.init_cache(len(rows.tokens), 64))):
        with pytest.raises(ValueError, match="take the model of lora_model"):
            jax.eval_shape(function, both, rows)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Lora(4, 6.0, LORA_ALL.targets[:-1]), "mlp/down only in the adapter"),
        (Lora(2, 6.0, LORA_ALL.targets), "has rank 4, but lora.rank is 2"),
    ],
)
def test_an_adapter_of_another_lora_is_refused(other, told, base, rows):
    both = {**base, **ADAPTED.init(jax.random.key(1))}
    with pytest.raises(ValueError, match=told):
        merge_adapter(both, other)
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(lora_model(MODEL, other).forward, both, rows)
    few = {**base, LORA: new_adapter(MODEL.config, Lora(4, 6.0, LORA_ALL.targets[:-1]), jax.random.key(1))}
    with pytest.raises(ValueError, match=r"mlp/down only in lora\.targets"):
        merge_adapter(few, LORA_ALL)


def test_a_model_of_ones_own_is_refused():
    own = MODEL._replace(config=None)
    with pytest.raises(ValueError, match="expected a model of load_hf or make_model, got one with config NoneType"):
        lora_model(own, LORA_ALL)
    with pytest.raises(ValueError, match="config: expected that of a model of load_hf or make_model, got NoneType"):
        lora_targets("attention", own.config)


@pytest.mark.parametrize("targets", ["attention", ("q_proj", "v_proj")])
def test_targets_that_are_no_kernels_are_refused(targets):
    with pytest.raises(ValueError, match="as from lora_targets, which also takes names of modules such as q_proj"):
        lora_model(MODEL, Lora(4, 8.0, targets))
