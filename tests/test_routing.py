"""Load-balancing loss and metrics of routers: against transformers, and however a step is run."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_models import text_rows
from test_step import random_pairs

from dpo_jax.cli.balancing import tell_switches
from dpo_jax.cli.config import Config, RunConfig
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout, completion_rows, shared_rows
from dpo_jax.dpo import dpo_objective, dpo_step
from dpo_jax.losses import dpo_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config, router_coefficient
from dpo_jax.models.hf import load_hf
from dpo_jax.models.lora import Lora, lora_model
from dpo_jax.models.partial import chosen_parameters, partial_model, split
from dpo_jax.reference import reference_logps
from dpo_jax.routing import balance_loss, counted_tokens, switch_rate
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.sft import sft_step
from dpo_jax.step import init_state

GOLDEN = Path(__file__).parent / "golden"
STORED = json.loads((GOLDEN / "router.json").read_text())
SIZES = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "max_positions": 64}
CONFIG = decoder_config(hf_config("mixtral", eos_token_id=0, **SIZES) | {"num_local_experts": 4})
MODEL = make_model(CONFIG)
LOSS = functools.partial(dpo_loss, beta=0.1)
COEFFICIENT = 0.5
ROUTER = {"router/balance", "router/load_max", "router/entropy"}


@pytest.fixture(scope="module")
def variables():
    """Routers that prefer some experts, so that there is something to balance."""
    found = jax.jit(MODEL.init)(jax.random.key(0))
    found["params"]["layers"]["mlp"]["router"] *= 20.0
    return found


@pytest.fixture(scope="module")
def rows(variables):
    """Seven pairs in eight rows: one is a padding example. The reference is the policy."""
    found = Layout("shared", length=32, scored=32, rows_multiple=8).rows(random_pairs(7))
    return found.replace(ref_logps=np.asarray(jax.jit(functools.partial(reference_logps, MODEL))(variables, found)))


@functools.cache
def balance_of(name):
    """fn(rows) -> the load-balancing loss of a golden model."""
    model, variables = load_hf(GOLDEN / "models" / name)
    return functools.partial(jax.jit(lambda variables, rows: balance_loss(model.route(variables, rows)[1])), variables)


@pytest.mark.parametrize("case", ["whole", "padded"])
@pytest.mark.parametrize("name", STORED["losses"])
def test_the_loss_is_that_of_transformers(name, case):
    tokens = load_file(GOLDEN / "models" / name / "logits.safetensors")["input_ids"]
    rows = text_rows(tokens)
    if case == "padded":
        x = np.arange(tokens.shape[1], dtype=np.int32)
        after = (x >= STORED["short"]) & (np.arange(2) == 1)[:, None]
        rows = rows.replace(k_start=np.where(after, x, rows.k_start), tokens=np.where(after, 0, tokens))
    assert float(balance_of(name)(rows)) == pytest.approx(STORED["losses"][name][case], abs=1e-5)


def test_padding_is_known_in_every_layout():
    pairs = [Encoded(*(np.arange(1, 1 + n, dtype=np.int32) for n in sizes)) for sizes in ((1, 1, 1), (4, 1, 3), (1, 3, 1))]
    real = [sum(len(part) for part in (pair.prompt, pair.chosen, pair.rejected)) for pair in pairs]
    counted = jax.jit(counted_tokens)
    shared, packed, texts = (
        np.asarray(counted(rows)).sum(axis=1)
        for rows in (
            shared_rows(pairs, length=12),
            Layout("packed", length=24, scored=16, per_row=3, rows_multiple=2).rows(pairs),
            completion_rows([(pair.prompt, pair.chosen) for pair in pairs], length=9),
        )
    )
    np.testing.assert_array_equal(shared, real)
    assert packed.sum() == sum(real)
    np.testing.assert_array_equal(texts, [len(pair.prompt) + len(pair.chosen) for pair in pairs])


def test_what_a_router_that_prefers_nobody_is_told():
    """All probabilities are equal, and the loss is the number of experts that a token takes, whomever it takes."""
    variables = jax.jit(MODEL.init)(jax.random.key(0))
    variables["params"]["layers"]["mlp"]["router"] *= 0.0
    rows = shared_rows(random_pairs(2), length=32, ref_logps=np.zeros((2, 2), np.float32))
    step = functools.partial(dpo_step, model=MODEL, tx=optax.sgd(0.0), loss=LOSS)
    _, metrics = jax.jit(step)(init_state(variables, optax.sgd(0.0)), rows)
    assert float(metrics["router/balance"]) == pytest.approx(2.0, abs=1e-6)
    assert float(metrics["router/entropy"]) == pytest.approx(np.log(4), abs=1e-6)
    assert float(metrics["router/load_max"]) == pytest.approx(2.0, abs=1e-6)  # all take the first two of four
    assert "router/aux_loss" not in metrics


def test_the_loss_and_its_gradient_come_on_top(variables, rows):
    def total(variables):
        losses, _ = dpo_objective(variables, rows, model=MODEL, loss=LOSS)
        return (losses * rows.weight).sum() / rows.weight.sum()

    def balance(variables):
        return balance_loss(MODEL.route(variables, rows)[1])

    tx = optax.sgd(1.0)
    step = functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS, router_aux_loss=COEFFICIENT)
    after, metrics = jax.jit(step)(init_state(variables, tx), rows)
    alone = jax.jit(lambda variables: [jax.value_and_grad(f)(variables) for f in (total, balance)])
    (loss, of_loss), (extra, of_balance) = jax.device_get(alone(variables))
    assert float(metrics["loss"]) == pytest.approx(float(loss + COEFFICIENT * extra), abs=1e-6)
    assert float(metrics["loss"] - metrics["router/aux_loss"]) == pytest.approx(np.log(2), abs=1e-6)  # routes alike
    assert metrics.keys() >= ROUTER
    assert float(jax.jit(optax.tree.norm)(of_balance)) > 1e-2
    expected = jax.tree.map(lambda x, a, b: x - a - COEFFICIENT * b, jax.device_get(variables), of_loss, of_balance)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6), after.params, expected)


def test_a_step_balances(variables, rows):
    tx = optax.sgd(3e-6)
    step = jax.jit(functools.partial(sft_step, model=MODEL, tx=tx, router_aux_loss=1000.0))
    texts = completion_rows([(pair.prompt, pair.chosen) for pair in random_pairs(7)], length=32)
    state, found = init_state(variables, tx), []
    for _ in range(4):
        state, metrics = step(state, texts)
        found.append(float(metrics["router/balance"]))
        assert float(metrics["nll_per_token"]) == pytest.approx(-float(metrics["logps/chosen"] / metrics["tokens"]))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] - 0.03


WAYS = {
    "pmap": pmap_partitioner,
    "mesh": lambda: mesh_partitioner(make_mesh(data=2, fsdp=1, expert=2), MODEL, units={"heads": 8, "kv_heads": 8}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_of_the_batch_on_all_devices(way, variables, rows):
    tx, found = optax.sgd(0.5), []
    for partitioner in (single_device(), WAYS[way]()):
        options = {"router_aux_loss": COEFFICIENT, "axis_name": partitioner.axis_name}
        step = partitioner.compile_step(functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS, **options))
        state = partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.put_variables(variables))
        state, metrics = step(state, rows)
        found.append(({name: float(value) for name, value in metrics.items()}, partitioner.to_host(state.params)))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), found[1][1], found[0][1])


def test_microbatches_take_the_mean_of_theirs(variables, rows):
    """Four microbatches of two rows, weighed by their pairs; the last one has a padding example."""
    tx = optax.sgd(0.5)
    step = functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS, router_aux_loss=COEFFICIENT, microbatches=4)
    _, metrics = jax.jit(step)(init_state(variables, tx), rows)
    parts = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], rows) for i in range(4)]
    each = [float(balance_loss(MODEL.route(variables, part)[1])) for part in parts]
    assert float(metrics["router/balance"]) == pytest.approx(np.dot(each, [2, 2, 2, 1]) / 7, abs=1e-5)
    assert float(metrics["router/aux_loss"]) == pytest.approx(COEFFICIENT * float(metrics["router/balance"]), abs=1e-6)


def test_the_model_that_tells_its_routing_is_the_model(variables, rows):
    adapted = lora_model(MODEL, Lora(2, 4.0, ("attention/query",)))
    chosen = chosen_parameters("last_layer", MODEL)
    partial = partial_model(MODEL, chosen)
    expected = jax.jit(MODEL.route)(variables, rows)
    for model, given in ((adapted, adapted.init(jax.random.key(1)) | variables), (partial, split(variables, chosen))):
        hidden, routing = jax.jit(model.route)(given, rows)
        np.testing.assert_allclose(hidden, jax.jit(model.forward)(given, rows), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(routing.chosen, expected[1].chosen)
        np.testing.assert_allclose(routing.probability, expected[1].probability, rtol=0, atol=1e-5)
    assert routing.chosen.shape == (2, *rows.tokens.shape, 2)


def test_choices_that_switch_are_counted(variables, rows):
    _, routing = jax.jit(MODEL.route)(variables, rows)
    assert float(switch_rate(routing, routing)) == 0.0
    turned = routing._replace(chosen=routing.chosen[..., ::-1])
    assert float(switch_rate(routing, turned)) == 0.0  # the same experts in another order
    others = (routing.chosen[0] + 1) % 4  # of {e, f} to {e + 1, f + 1}: by hand
    moved = routing._replace(chosen=routing.chosen.at[0].set(others))
    stays = (np.asarray(routing.chosen[0])[..., :, None] == np.asarray(others)[..., None, :]).any(-1)[routing.counted]
    assert float(switch_rate(routing, moved)) == pytest.approx((~stays).mean() / 2)


def test_in_bfloat16_few_choices_switch(variables):
    many = Layout("shared", length=32, scored=32, rows_multiple=8).rows(random_pairs(64))
    routings = (jax.jit(make_model(CONFIG, dtype=dtype).route)(variables, many)[1] for dtype in (jnp.float32, jnp.bfloat16))
    assert 0 < float(switch_rate(*routings)) < 0.01


def test_the_coefficient_is_that_of_config_json():
    content = hf_config("mixtral", eos_token_id=0, **SIZES)
    assert router_coefficient(decoder_config(content)) == 0.0
    assert router_coefficient(decoder_config(content | {"output_router_logits": True})) == 0.001
    asked = content | {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    assert router_coefficient(decoder_config(asked)) == 0.02
    assert router_coefficient(decoder_config(hf_config("llama", eos_token_id=0, **SIZES) | {"output_router_logits": True})) == 0
    with pytest.raises(ValueError, match='router_aux_loss_coef = "much" is not a number of at least 0'):
        decoder_config(content | {"router_aux_loss_coef": "much"})


def test_a_coefficient_without_experts_is_refused(rows):
    dense = make_model(decoder_config(hf_config("llama", eos_token_id=0, **SIZES)))
    with pytest.raises(ValueError, match=r"router_aux_loss is 0.1, but the model has no router \(Model.route\)"):
        dpo_step(None, rows, model=dense, tx=None, loss=LOSS, router_aux_loss=0.1)


def test_the_comparison_with_float32_sets_nothing_for_other_programs(variables, rows, tmp_path, monkeypatch, capsys):
    """On a TPU a float32 model needs a setting of the process, with which no bfloat16 program can be compiled."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    before = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    config, model = Config(run=RunConfig(precision="bfloat16")), make_model(CONFIG, dtype=jnp.bfloat16)
    tell_switches(config, RunDir(tmp_path), model, variables, rows, partitioner=single_device())
    assert jax.config.jax_default_matmul_precision == before  # pyright: ignore[reportAttributeAccessIssue]
    assert 0 <= json.loads((tmp_path / "routing.json").read_text())["switched"] < 0.05
    assert "differ between float32 and bfloat16" in capsys.readouterr().out
