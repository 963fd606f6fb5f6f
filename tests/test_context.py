"""Rows cut over the context axis of a mesh: the same numbers as on one device, and memory that does not grow with the row."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout
from dpo_jax.logps import completion_logps, scored_hidden
from dpo_jax.models.attention_gpu import flash_path
from dpo_jax.models.attention_paths import BLOCKS
from dpo_jax.models.attention_tpu import splash_path
from dpo_jax.models.context import from_pieces, to_pieces
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.parallel import mesh_partitioner

SIZES = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "max_positions": 512, "eos_token_id": 0}
FAMILIES = {
    "grouped queries": ("llama", {"kv_heads": 2}),
    "windows and a soft cap": ("gemma2", {"kv_heads": 2, "window": 24}),
    "learned positions": ("gpt2", {}),
}


@functools.cache
def model_of(case):
    family, more = FAMILIES[case]
    config = decoder_config(hf_config(family, **{name: value for name, value in more.items() if name != "window"}, **SIZES))
    if "window" in more:
        config = dataclasses.replace(config, windows=(more["window"], None))
    dense, ring = make_model(config), make_model(config, attention=BLOCKS)
    return dense, ring, jax.jit(dense.init)(jax.random.key(1))


def pairs(count, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, longest, size=(count, 3))
    return [Encoded(*(rng.integers(1, 64, n).astype(np.int32) for n in size), uid=f"{i}") for i, size in enumerate(sizes)]


LAYOUTS = {
    "plain": Layout("plain", length=128, scored=64),
    "shared": Layout("shared", length=192, scored=128),
    "packed": Layout("packed", length=256, scored=160, per_row=3, rows_multiple=4),
    "an odd length": Layout("shared", length=181, scored=121),
}


def on_mesh(model, **sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return mesh_partitioner(make_mesh(**{"fsdp": 1, **sizes}, devices=devices), model)


def logps_and_gradient(model, variables, rows):
    def loss(variables):
        logps = completion_logps(model, variables, rows, chunk=64)
        return (logps * np.cos(np.arange(logps.size, dtype=np.float32)).reshape(logps.shape)).sum(), logps

    gradient, logps = jax.grad(loss, has_aux=True)(variables)
    return logps, gradient


def same(found, expected):
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected[1]))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5 * max(1, scale), rtol=1e-5), found[1], expected[1])


MESHES = {
    "context 4": {"context": 4},
    "context 2": {"context": 2},
    "data 2 x context 2": {"data": 2, "context": 2},
    "fsdp 2 x context 2": {"fsdp": 2, "context": 2},
    "context 2 x tensor 2": {"context": 2, "tensor": 2},
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_one_device(case, layout, mesh):
    dense, ring, variables = model_of(case)
    rows = LAYOUTS[layout].rows(pairs(4))
    expected = jax.jit(functools.partial(logps_and_gradient, dense))(variables, rows)
    partitioner = on_mesh(ring, **MESHES[mesh])
    found = partitioner.compile_map(functools.partial(logps_and_gradient, ring))(partitioner.put_variables(variables), rows)
    same(found, jax.device_get(expected))


@pytest.mark.parametrize("case", ["grouped queries", "windows and a soft cap"])
@pytest.mark.parametrize("kernel", [flash_path, splash_path])
def test_the_kernels_go_round_as_well(kernel, case):
    dense, _, variables = model_of(case)
    ring = make_model(dense.config, attention=kernel(interpret=True), remat="save_attention")
    rows = LAYOUTS["packed"].rows(pairs(4))
    expected = jax.jit(functools.partial(logps_and_gradient, dense))(variables, rows)
    partitioner = on_mesh(ring, context=2)
    found = partitioner.compile_map(functools.partial(logps_and_gradient, ring))(partitioner.put_variables(variables), rows)
    same(found, jax.device_get(expected))
