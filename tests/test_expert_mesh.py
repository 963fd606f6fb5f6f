"""Experts over a mesh: the same numbers as on one device, from files, in checkpoints and beside an adapter."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_grouped_product import with_gradients
from test_step import random_pairs
from tiny_run import call, refused

from dpo_jax.data.layout import Layout
from dpo_jax.dpo import dpo_step
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.attention_paths import BLOCKS
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import weights_digest
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.grouped_product import from_groups, group_rows, grouped_product, to_groups
from dpo_jax.models.hf import read_weights, save_hf, variable_shapes
from dpo_jax.models.logical_axes import axis_lengths
from dpo_jax.models.lora import Lora, lora_model
from dpo_jax.reference import reference_logps
from dpo_jax.runtime import hosts
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.mesh import MeshError, make_mesh
from dpo_jax.runtime.mesh_shape import check_lengths, mesh_words
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import mesh_partitioner, single_device
from dpo_jax.step import init_state

SIZES = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "max_positions": 64}
HF = hf_config("qwen3_moe", eos_token_id=0, head_size=8, **SIZES) | {"num_experts": 8, "num_experts_per_tok": 3}
MODEL = make_model(decoder_config(HF))
UNITS = {"heads": 8, "kv_heads": 8}
LOSS = functools.partial(dpo_loss, beta=0.1)
TX = make_optimizer(1e-3, max_grad_norm=1.0)
MESHES = {
    "expert 4": {"fsdp": 1, "expert": 4},
    "fsdp 2 x expert 2": {"fsdp": 2, "expert": 2},
    "expert 2 x tensor 2": {"fsdp": 1, "expert": 2, "tensor": 2},
}


def on(mesh, model=MODEL):
    return mesh_partitioner(make_mesh(**MESHES[mesh]), model, units=UNITS)


@pytest.fixture(scope="module")
def variables():
    """Routers that prefer some experts: devices along `expert` have different numbers of tokens."""
    found = jax.jit(MODEL.init)(jax.random.key(0))
    found["params"]["layers"]["mlp"]["router"] *= 20.0
    return found


@pytest.fixture(scope="module")
def batches(variables):
    layout = Layout("packed", length=48, scored=48, per_row=2, rows_multiple=8)
    reference = jax.jit(functools.partial(reference_logps, MODEL))
    every = [layout.rows(random_pairs(9, seed)) for seed in range(2)]
    return [rows.replace(ref_logps=np.asarray(reference(variables, rows))) for rows in every]


def run(partitioner, variables, batches, *, model=MODEL, state=None, steps=4, first=0, **options):
    """(metrics of each step, the last state)."""
    options = {"router_aux_loss": 0.1, "axis_name": partitioner.axis_name} | options
    step = partitioner.compile_step(functools.partial(dpo_step, model=model, tx=TX, loss=LOSS, **options))
    if state is None:
        state = partitioner.init_state(functools.partial(init_state, tx=TX), partitioner.put_variables(variables))
    seen = []
    for number in range(first, steps):
        state, metrics = step(state, batches[number % len(batches)])
        seen.append({name: float(value) for name, value in metrics.items()})
    return seen, state


@pytest.fixture(scope="module")
def expected(variables, batches):
    seen, state = run(single_device(), variables, batches)
    return seen, jax.device_get(state)


def assert_same_run(found, expected, partitioner):
    for here, there in zip(found[0], expected[0][-len(found[0]) :], strict=True):
        assert here == pytest.approx(there, rel=1e-5, abs=2e-5)
    params = partitioner.to_host(found[1].params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=3e-5), params, expected[1].params)


@pytest.mark.parametrize("mesh", MESHES)
def test_steps_are_those_of_one_device(mesh, variables, batches, expected):
    partitioner = on(mesh)
    found = run(partitioner, variables, batches)
    assert found[0][0]["loss"] - found[0][0]["router/aux_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert_same_run(found, expected, partitioner)
    names = {"experts": "expert", "embed": "fsdp", "mlp": "tensor"}
    gate = found[1].params["params"]["layers"]["mlp"]["gate"].sharding
    assert gate.spec == P(None, *names.values())
    assert found[1].opt_state is not None


def test_log_probabilities_and_gradients_are_those_of_one_device(variables, batches):
    def total(variables, rows):
        logps = completion_logps(MODEL, variables, rows)
        return (logps * rows.weight[:, None]).sum() / 100, logps

    def found(partitioner):
        def step(state, rows):
            (_, logps), grads = jax.value_and_grad(total, has_aux=True)(state.params, rows)
            return state.replace(params=grads), {"logps": logps}

        state = init_state(partitioner.put_variables(variables), make_optimizer(1.0, name="sgd"))
        state, logps = partitioner.compile_step(step)(partitioner.put_state(state), batches[0])
        return partitioner.to_host(state.params), np.asarray(logps["logps"])

    alone, cut = found(single_device()), found(on("fsdp 2 x expert 2"))
    np.testing.assert_allclose(cut[1], alone[1], rtol=0, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), cut[0], alone[0])


def test_microbatches_on_a_mesh_of_experts(variables, batches):
    expected = run(single_device(), variables, batches, microbatches=2, router_aux_loss=0.0, steps=2)
    partitioner = on("fsdp 2 x expert 2")
    found = run(partitioner, variables, batches, microbatches=2, router_aux_loss=0.0, steps=2)
    for here, there in zip(found[0], expected[0], strict=True):  # those of the routers are means over other microbatches
        assert here["loss"] == pytest.approx(there["loss"], abs=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-5)


def test_a_run_continues_on_another_mesh(variables, batches, expected, tmp_path):
    partitioner = on("expert 4")
    _, state = run(partitioner, variables, batches, steps=2)
    with Checkpoints(tmp_path) as store:
        store.save(2, partitioner.get_state(state), {})
    elsewhere = on("expert 2 x tensor 2")
    fresh = elsewhere.init_state(functools.partial(init_state, tx=TX), elsewhere.put_variables(variables))
    with Checkpoints(tmp_path) as store:
        restored, _ = store.restore_latest(elsewhere.get_state(fresh))
    state = elsewhere.put_state(restored)
    assert_same_run(run(elsewhere, variables, batches, state=state, first=2), expected, elsewhere)


def test_an_adapter_beside_experts(variables, batches):
    model, seen = lora_model(MODEL, Lora(2, 4.0, ("attention/query", "attention/out"))), []
    given = jax.jit(model.init)(jax.random.key(1)) | variables
    given["lora"] = jax.tree.map(lambda x: x + 0.01, given["lora"])
    for partitioner in (single_device(), on("fsdp 2 x expert 2", model)):

        def begin(variables):
            return init_state({"lora": variables["lora"]}, TX, frozen={"params": variables["params"]})

        state = partitioner.init_state(begin, partitioner.put_variables(given))
        seen.append(run(partitioner, None, batches, model=model, state=state, steps=2)[0])
    assert seen[1] == [pytest.approx(one, rel=1e-5, abs=1e-5) for one in seen[0]]


def test_weights_go_from_files_to_their_devices_and_back(variables, tmp_path):
    folder = save_hf(tmp_path / "one", MODEL, variables)
    partitioner = on("fsdp 2 x expert 2")
    loaded = partitioner.load_variables(variable_shapes(MODEL), read_weights(folder, MODEL))
    up = loaded["params"]["layers"]["mlp"]["up"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, 4, 16, 24)}
    assert weights_digest(partitioner.to_host(loaded)) == weights_digest(variables)
    again = save_hf(tmp_path / "again", MODEL, loaded, fetch=hosts.whole)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_rows_of_groups_elsewhere_have_no_slot():
    """Two of five groups are here; each token takes three different ones."""
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(5)[:3] for _ in range(50)])
    here = np.where(chosen < 2, chosen, 2)
    x, kernels = rng.normal(size=(150, 6)).astype(np.float32), rng.normal(size=(2, 6, 4)).astype(np.float32)

    def ours(x, kernels):
        groups = group_rows(here, 2, of=5)
        y = jnp.tanh(grouped_product(to_groups(x, groups), kernels, groups))
        return from_groups(grouped_product(y, kernels, groups, True), groups)

    def right(x, kernels):
        of_row = kernels[np.minimum(here.reshape(-1), 1)]
        y = jnp.einsum("tf,tdf->td", jnp.tanh(jnp.einsum("td,tdf->tf", x, of_row)), of_row)
        return jnp.where(here.reshape(-1, 1) < 2, y, 0.0)

    (found, found_grads), (expected, expected_grads) = (with_gradients(f)(x, kernels) for f in (ours, right))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for a, b in zip(found_grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    groups = jax.jit(functools.partial(group_rows, groups=2, of=5))(here)
    block = len(groups.row) // len(groups.of_block)
    assert int(groups.used) * block == int(groups.sizes.sum()) < len(groups.row)


def test_a_mesh_that_does_not_fit_the_experts_is_refused():
    dense = make_model(decoder_config(hf_config("llama", eos_token_id=0, **SIZES)))
    with pytest.raises(MeshError, match="expert 2 shards the experts of a mixture, but this model has none"):
        mesh_partitioner(make_mesh(fsdp=2, expert=2), dense, units=UNITS).put_variables(dense.init(jax.random.key(0)))
    three = make_model(decoder_config(HF | {"num_experts": 6}))
    with pytest.raises(MeshError, match="'experts' of 6 cannot be split over expert 4; the nearest size that can is 2"):
        mesh_partitioner(make_mesh(fsdp=1, expert=4), three, units=UNITS)
    sizes = {"data": 1, "fsdp": 1, "expert": 2, "tensor": 1}
    with pytest.raises(MeshError, match="expert 2 shards the experts"):
        check_lengths(axis_lengths(dense.config), sizes, units=UNITS)
    assert mesh_words(sizes) == "data 1 x fsdp 1 x expert 2 x tensor 1"


CONFIG = """\
run: {{dir: {dir}, devices: mesh, precision: bfloat16}}
mesh: {{fsdp: 2, expert: 2}}
data: {{source: reviews, reviews_train: 16, reviews_test: 8, max_length: 96, max_prompt_length: 48, layout: shared}}
tokenizer: {{vocab_size: 450}}
model: {{family: mixtral, width: 32, layers: 1, heads: 2, mlp_width: 16, max_positions: 128}}
sft: {{batch: 8, lr: 1.0e-3, warmup_steps: 1}}
refs: {{batch: 8}}
dpo: {{batch: 8, lr: 1.0e-3, warmup_steps: 1, router_aux_loss: 0.01}}
"""


def test_the_program_trains_experts_on_a_mesh(tmp_path):
    config = tmp_path / "moe.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run"))
    assert call("sft", config).code == 0
    done = call("dpo", config)
    assert done.code == 0
    assert "data 1 x fsdp 2 x expert 2 x tensor 1" in done.out
    told = json.loads((tmp_path / "run" / "dpo" / "routing.json").read_text())
    assert f"routing: {told['switched']:.2%} of the expert choices differ between float32 and bfloat16" in done.out
    assert 0 <= told["switched"] < 0.2
    metrics = [json.loads(line) for line in (tmp_path / "run" / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["router/aux_loss"] == pytest.approx(0.01 * metrics[0]["router/balance"], rel=1e-5)
    assert metrics[0]["loss"] - metrics[0]["router/aux_loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert "dpo.router_aux_loss: must not be negative" in refused(2, "dpo", config, "--dpo.router-aux-loss", -1)


def test_rows_in_pieces_route_as_whole_ones(variables, batches, expected):
    """The load-balancing loss and the metrics of routers count each token once, also where a mesh cuts rows."""
    model = make_model(MODEL.config, attention=BLOCKS)
    partitioner = mesh_partitioner(make_mesh(fsdp=1, expert=2, context=2), model, units=UNITS)
    assert_same_run(run(partitioner, variables, batches, model=model), expected, partitioner)
