"""Products of rows with the matrix of their group, against a loop over rows; and a mixture of experts against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import logits_of, text_rows

from dpo_jax.models import grouped_product as module
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.grouped_product import from_groups, group_rows, grouped_product, to_groups
from dpo_jax.models.lora import lora_targets

GROUPS, D, F = 4, 6, 5
SIZES = {"vocab_size": 32, "width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "max_positions": 32, "eos_token_id": 0}
CHOSEN = {
    "mixed": [2, 0, 2, 1, 2, 2, 0, 3, 2, 2, 2, 2, 2],
    "one group": [3] * 11,
    "none first": [1, 2, 1],
    "blocks": [*range(GROUPS)] * 64,
}


grouped = jax.jit(group_rows, static_argnums=1)


def inputs(chosen):
    keys = jax.random.split(jax.random.key(0), 3)
    return jax.random.normal(keys[0], (len(chosen), D)), jax.random.normal(keys[1], (GROUPS, D, F))


def with_gradients(function):
    """One program: the value of `function(x, kernels)`, and the gradients of the sum of its squares."""

    def squares(x, kernels):
        y = function(x, kernels)
        return (y**2).sum(), y

    def both(x, kernels):
        (_, y), gradients = jax.value_and_grad(squares, argnums=(0, 1), has_aux=True)(x, kernels)
        return y, gradients

    return jax.jit(both)


@pytest.mark.parametrize("name", CHOSEN)
def test_each_row_meets_the_matrix_of_its_group(name):
    chosen = np.array(CHOSEN[name])
    x, kernels = inputs(chosen)

    def ours(x, kernels):
        groups = group_rows(chosen, GROUPS)
        y = jnp.tanh(grouped_product(to_groups(x, groups), kernels, groups))
        return from_groups(grouped_product(y, kernels, groups, True), groups)

    def expected(x, kernels):
        return jnp.einsum("tf,tdf->td", jnp.tanh(jnp.einsum("td,tdf->tf", x, kernels[chosen])), kernels[chosen])

    (found, found_grads), (right, right_grads) = (with_gradients(f)(x, kernels) for f in (ours, expected))
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-5)
    for a, b in zip(found_grads, right_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_loop_and_ragged_product_are_the_same(transposed):
    """TPUs take the second."""
    groups = grouped(np.array(CHOSEN["mixed"]), GROUPS)
    x, kernels = inputs(CHOSEN["mixed"])
    slots = jax.jit(to_groups)(x if not transposed else x[:, :F], groups)
    products = (jax.jit(functools.partial(f, transposed=transposed)) for f in (module._in_blocks, module._ragged))
    loop, ragged = (f(slots, kernels, groups) for f in products)
    np.testing.assert_allclose(loop, ragged, rtol=0, atol=1e-5)
    left, right = (loop, slots) if transposed else (slots, loop)
    outer = [jax.jit(f)(left, right, kernels, groups) for f in (module._outer_in_blocks, module._ragged_outer)]
    np.testing.assert_allclose(*outer, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
def test_groups_are_whole_blocks_and_no_row_is_lost(rows):
    chosen = np.random.default_rng(rows).integers(0, GROUPS, rows) ** 2 % GROUPS
    groups = jax.tree.map(np.asarray, grouped(chosen, GROUPS))
    block = len(groups.row) // len(groups.of_block)
    assert not (groups.sizes % block).any()
    np.testing.assert_array_equal(groups.row[groups.slot], np.arange(rows))
    assert (groups.row < rows).sum() == rows
    np.testing.assert_array_equal(np.repeat(groups.of_block, block)[groups.slot], chosen)


def test_many_small_experts_are_one_mlp():
    """Where every token takes all experts, and shares are equal, they are one wide MLP divided by their number."""
    few = hf_config("mixtral", mlp_width=8, **SIZES) | {"num_local_experts": 3, "num_experts_per_tok": 3}
    wide = hf_config("llama", mlp_width=24, **SIZES) | {"rms_norm_eps": 1e-5, "rope_theta": 1e6}
    model, dense = make_model(decoder_config(few)), make_model(decoder_config(wide))
    variables = jax.jit(model.init)(jax.random.key(0))
    mlp = variables["params"]["layers"]["mlp"]
    mlp["router"] = jnp.zeros_like(mlp["router"])
    side_by_side = {name: {"kernel": jnp.concatenate(list(mlp[name][0]), axis=-1)[None]} for name in ("gate", "up", "down")}
    side_by_side["down"]["kernel"] /= 3
    layers = {**variables["params"]["layers"], "mlp": side_by_side}
    rows = text_rows(np.arange(12)[None])
    of_dense = {"params": {**variables["params"], "layers": layers}}
    np.testing.assert_allclose(logits_of(model, variables, rows), logits_of(dense, of_dense, rows), atol=1e-5)


def test_an_adapter_leaves_experts_alone_and_says_so():
    config = decoder_config(hf_config("mixtral", **SIZES))
    assert lora_targets("all", config) == lora_targets("attention", config)
    with pytest.raises(ValueError, match="a mixtral has no mlp; it has all, attention"):
        lora_targets("mlp", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4}, "num_experts = 4 is not num_local_experts = 8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is not at most num_local_experts = 8"),
        ({"num_local_experts": 5000}, "num_local_experts = 5000 is not a number of experts up to 4,096"),
    ],
)
def test_impossible_routings_are_refused(changes, message):
    content = hf_config("mixtral", **SIZES)
    with pytest.raises(ValueError, match=message):
        decoder_config({**content, "num_local_experts": 8, **changes})
