"""Rows cut over the context axis of a mesh: the same numbers as on one device, and memory that does not grow with the row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout, causal_rows
from dpo_jax.data.loader import plan_layout
from dpo_jax.dpo import dpo_step
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.attention import DENSE
from dpo_jax.models.attention_gpu import flash_path
from dpo_jax.models.attention_paths import BLOCKS, attention_path
from dpo_jax.models.attention_ring import along_context
from dpo_jax.models.attention_tpu import splash_path
from dpo_jax.models.context import columns_before, from_pieces, hidden_at, rounds_of, to_pieces
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.runtime.parallel import abstract_state, jit_step, mesh_partitioner, single_device
from dpo_jax.step import init_state

SIZES = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "max_positions": 512, "eos_token_id": 0}
WINDOW = 24  # of every other layer, in positions
FAMILIES = {"llama": {"kv_heads": 2}, "gemma2": {"kv_heads": 2}, "gpt2": {}, "mixtral": {"kv_heads": 2}}


@functools.cache
def model_of(family):
    """(the model with dense attention, the same with attention in blocks, variables)."""
    config = decoder_config(hf_config(family, **FAMILIES[family], **SIZES))
    if family == "gemma2":
        config = dataclasses.replace(config, windows=(WINDOW, None))
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
    "odd": Layout("shared", length=181, scored=121),
}


def mesh_of(**sizes):
    return make_mesh(**{"fsdp": 1, **sizes}, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def logps_and_gradient(model, variables, rows):
    def loss(variables):
        logps = completion_logps(model, variables, rows, chunk=64)
        return (logps * np.cos(np.arange(logps.size, dtype=np.float32)).reshape(logps.shape)).sum(), logps

    gradient, logps = jax.grad(loss, has_aux=True)(variables)
    return logps, gradient


def assert_as_on_one_device(family, layout, *, attention=BLOCKS, **sizes):
    dense, _, variables = model_of(family)
    model = make_model(dense.config, attention=attention, remat="save_attention")
    rows = LAYOUTS[layout].rows(pairs(4))
    expected = jax.device_get(jax.jit(functools.partial(logps_and_gradient, dense))(variables, rows))
    partitioner = mesh_partitioner(mesh_of(**sizes), model)
    found = partitioner.compile_map(functools.partial(logps_and_gradient, model))(partitioner.put_variables(variables), rows)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=1e-5)
    largest = max(1.0, *(float(np.abs(x).max()) for x in jax.tree.leaves(expected[1])))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5 * largest, rtol=1e-5), found[1], expected[1])


@pytest.mark.parametrize(
    ("family", "layout", "sizes"),
    [
        ("llama", "packed", {"context": 4}),
        ("gemma2", "packed", {"data": 2, "context": 2}),
        ("gemma2", "odd", {"context": 2, "tensor": 2}),
        ("gpt2", "plain", {"fsdp": 2, "context": 2}),
        ("mixtral", "shared", {"context": 4}),
        ("mixtral", "packed", {"expert": 2, "context": 2}),
    ],
    ids=str,
)
def test_log_probabilities_and_gradients_are_those_of_one_device(family, layout, sizes):
    assert_as_on_one_device(family, layout, **sizes)


MESHES = [{"context": 4}, {"data": 2, "context": 2}, {"fsdp": 2, "context": 2}, {"context": 2, "tensor": 2}]


@pytest.mark.soak  # every combination; those above have each of its parts
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_every_layout_on_every_mesh(family, layout, sizes):
    assert_as_on_one_device(family, layout, **sizes)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kernel", [flash_path, splash_path])
def test_the_kernels_go_round_as_well(kernel, family):
    assert_as_on_one_device(family, "packed", attention=kernel(interpret=True), context=2)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_row_is_cut_in_pieces_and_put_together_again(parts):
    column = np.arange(3 * 21, dtype=np.int32).reshape(3, 21)
    with jax.set_mesh(mesh_of(context=parts)):
        pieces = jax.jit(lambda x: to_pieces((x,))[0])(column)
        again = jax.jit(lambda x: from_pieces(x.astype(jnp.float32)[:, :, None], 21))(pieces)
        source = np.array([[20, 0, 5, 5, 1], [0, 1, 2, 3, 4], [13, 20, 20, 0, 7]], np.int32)
        read = jax.jit(lambda x, at: hidden_at(from_pieces(x.astype(jnp.float32)[:, :, None], 21), at))(pieces, source)
    rounds = rounds_of(parts)
    run = -(-21 // (rounds * parts))
    assert pieces.shape == (3 * parts, rounds * run)
    period = parts * run  # the first device has the first run of the first round, and the last of the second
    expected = [*range(run), *range(2 * period - run, 2 * period), *range(2 * period, 2 * period + run)]
    np.testing.assert_array_equal(pieces[0, : 3 * run], expected)
    np.testing.assert_array_equal(again[..., 0], column)
    np.testing.assert_array_equal(read[..., 0], np.take_along_axis(column, source, axis=1))


@pytest.mark.parametrize("kind", ["causal", "shared", "packed"])
def test_devices_see_about_as_many_keys(kind):
    """In each turn the ring waits for the device that sees most: of long rows, not much more than the others."""
    parts, length = 4, 4096
    sizes = {"shared": [(2048, 1024, 1024)], "packed": [(700, 300, 300)] * 3}
    layout = Layout(kind, length=length, scored=length, per_row=3) if kind != "causal" else None
    ids = [Encoded(*(np.ones(n, np.int32) for n in size)) for size in sizes.get(kind, ())]
    rows = causal_rows(np.ones((1, length), np.int32)) if layout is None else layout.rows(ids)
    spans = np.stack([rows.k_start[0], rows.k_end[0]])
    run, own = length // (parts * rounds_of(parts)), np.zeros(length, np.int32)
    seen = np.zeros((parts, parts))  # by device and turn
    before = [np.asarray(columns_before(spans, holder=np.int32(h), run=run, parts=parts)) for h in range(parts)]
    column = np.arange(length, dtype=np.int32)
    for holder in range(parts):
        of_holder = np.asarray(columns_before(column[None], holder=np.int32(holder), run=run, parts=parts))[0]
        own[np.flatnonzero(np.diff(of_holder, append=length // parts))] = holder
    for holder, (start, end) in enumerate(before):
        for device in range(parts):
            seen[device, (device - holder) % parts] = (end - start)[own == device].sum()
    assert seen.sum() == (spans[1] - spans[0]).sum()  # each key is met in one turn
    assert seen.max(axis=0).sum() < {"causal": 1.01, "shared": 1.2, "packed": 1.9}[kind] * seen.sum() / parts


def test_a_run_is_that_of_one_device():
    """Steps with microbatches, a padding example, and rows that the planner made long enough for the pieces."""
    dense, ring, variables = model_of("llama")
    layout = plan_layout(pairs(7), kind="packed", batch=7, multiple=4, pieces=2)
    assert layout.length % 256 == 0
    rows = layout.rows(pairs(7), ref_logps=np.zeros((7, 2)))
    tx, seen = make_optimizer(linear_warmup(1e-3, warmup_steps=1), max_grad_norm=1.0), []
    for partitioner, model in ((single_device(), dense), (mesh_partitioner(mesh_of(data=2, context=2), ring), ring)):
        step = functools.partial(dpo_step, model=model, tx=tx, loss=functools.partial(dpo_loss, beta=0.1), microbatches=2)
        step = partitioner.compile_step(step)
        state = partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.put_variables(variables))
        for _ in range(3):
            state, metrics = step(state, rows)
            seen.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    np.testing.assert_allclose(seen[3:], seen[:3], rtol=1e-5, atol=1e-5)
    assert seen[0][0] != pytest.approx(seen[2][0], abs=1e-3)


def temporary_bytes(parts, *, each=1024):
    """Of a step on one row of `each` positions a device."""
    _, model, _ = model_of("llama")
    length, tx = parts * each, make_optimizer(linear_warmup(1e-4, warmup_steps=1))
    ids = [np.ones(n, np.int32) for n in (length // 2, length // 4, length // 4)]
    rows = Layout("shared", length=length, scored=length // 2).rows([Encoded(*ids)], ref_logps=np.zeros((1, 2)))
    mesh, loss = mesh_of(context=parts), functools.partial(dpo_loss, beta=0.1)
    state, rows = abstract_state(mesh, model, functools.partial(init_state, tx=tx), rows)
    with jax.set_mesh(mesh):
        step = jit_step(functools.partial(dpo_step, model=model, tx=tx, loss=loss), state, mesh)
        return step.lower(state, rows).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_row_if_a_device_has_as_much_of_it():
    one, four = temporary_bytes(1), temporary_bytes(4)
    assert four < 1.05 * one


def test_what_reads_whole_rows_is_refused():
    _, ring, variables = model_of("llama")
    rows = LAYOUTS["shared"].rows(pairs(1))
    with jax.set_mesh(mesh_of(context=2)):
        with pytest.raises(ValueError, match=r"attention dense reads whole rows, but mesh\.context splits them .* use auto"):
            along_context(DENSE)
        with pytest.raises(ValueError, match=r"a key/value cache cannot be split: sample with mesh\.context 1"):
            jax.eval_shape(lambda: ring.decode(variables, rows, ring.init_cache(1, 256)))
    where = {"platform": "cpu", "config": ring.config, "dtype": jnp.float32}
    assert attention_path("auto", pieces=2, **where) is BLOCKS
    with pytest.raises(ValueError, match=r"attention chunked reads whole rows, but mesh\.context splits them in 2: use auto"):
        attention_path("chunked", pieces=2, **where)
