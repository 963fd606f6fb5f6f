"""Steps of real widths with the GPU attention paths, compiled for H100s that are not here: kernels, types, buffers, meshes.

`pytest -m plan tests/test_gpu_programs.py` (needs the `cuda13` extra, no GPU). What cannot be seen here is time.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import plan_layout
from dpo_jax.dpo import dpo_step
from dpo_jax.head import head_chunk
from dpo_jax.losses import dpo_loss
from dpo_jax.models.attention import Scoring, VisibleKeys, attend
from dpo_jax.models.attention_paths import PATHS
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.runtime.chips import slice_devices
from dpo_jax.runtime.gpu_target import COMPILER_OPTIONS, plugin_is_here
from dpo_jax.runtime.hlo import products, shapes, summarize
from dpo_jax.runtime.hlo_text import executions, parse
from dpo_jax.runtime.hlo_traffic import traffic
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import abstract_state, jit_map, jit_step, split_rows
from dpo_jax.sampling import generate
from dpo_jax.step import init_state

pytestmark = [
    pytest.mark.plan,
    pytest.mark.skipif(not plugin_is_here(), reason="needs JAX's CUDA plugin (extra `cuda13`)"),
]
LAYERS = 3
PYTHIA = {"family": "gpt_neox", "vocab_size": 50304, "width": 2560, "heads": 32, "mlp_width": 10240, "tie": False}
LLAMA = {"family": "llama", "vocab_size": 128256, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336, "tie": False}
GEMMA = {
    "family": "gemma2",
    "vocab_size": 256000,
    "width": 2304,
    "heads": 8,
    "kv_heads": 4,
    "head_size": 256,
    "mlp_width": 9216,
}
MODELS = {"pythia": PYTHIA, "llama": LLAMA, "gemma2": GEMMA}
LENGTH = {"pythia": 1024, "llama": 2048, "gemma2": 8192}  # beyond Gemma's windows of 4,096


def parts(name, *, path="flash", remat="none", microbatches=1, rows=8):
    """(step, make a state, model, packed rows): HH-like lengths, as many times as needed to fill the rows."""
    options = {"layers": LAYERS, "max_positions": LENGTH[name], "eos_token_id": 0}
    config = decoder_config(hf_config(**MODELS[name], **options))
    model = make_model(config, dtype=jnp.bfloat16, remat=remat, attention=PATHS[path].make())
    pairs = [Encoded(*(np.ones(n, np.int32) for n in (105, 45, 50)), uid=str(i)) for i in range(rows * LENGTH[name] // 210)]
    layout = plan_layout(
        pairs, kind="packed", batch=len(pairs), length=LENGTH[name], multiple=max(8, microbatches), microbatches=microbatches
    )
    tx = make_optimizer(5e-7, max_grad_norm=10.0)
    step = functools.partial(
        dpo_step, model=model, tx=tx, loss=functools.partial(dpo_loss, beta=0.1), microbatches=microbatches
    )
    ref_logps = np.zeros((len(pairs), 2), np.float32)
    return step, functools.partial(init_state, tx=tx), model, layout.rows(pairs, ref_logps=ref_logps)


@functools.cache
def compiled(name, topology="h100:1", *, mesh=(1, -1, 1), context=1, **options):
    step, make, model, rows = parts(name, **options)
    sizes = {"context": context, **dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))}
    mesh = make_mesh(**sizes, devices=slice_devices(topology))
    state, rows = abstract_state(mesh, model, make, rows)
    with jax.set_mesh(mesh):
        return jit_step(step, state, mesh).lower(state, rows).compile(compiler_options=COMPILER_OPTIONS)


@pytest.mark.parametrize("name", MODELS)
def test_no_scores_in_memory(name):
    length = LENGTH[name]
    keys = 2 * length if name == "gemma2" else length  # whose windows take a second copy of the keys
    for _, lengths in {shape for shape in shapes(compiled(name).as_text()) if shape[0] == "f32"}:
        rest = [n for n in lengths if n != 1]
        assert not (length in rest and keys in rest[rest.index(length) + 1 :]), lengths


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("save_attention", 1), ("full", 2)])
def test_the_backward_pass_runs_the_forward_kernel_again_only_if_all_is_computed_again(remat, forward):
    assert summarize(compiled("pythia", remat=remat).as_text()).kernels == (forward + 2) * LAYERS


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_product_of_a_bfloat16_step_has_bfloat16_operands(name, microbatches):
    found = products(compiled(name, remat="full", microbatches=microbatches).as_text())
    # Forward, again, and two backward: of queries, keys, values, output, MLP; and those of the head.
    assert len(found) >= 15
    assert [one for one in found if one.operands != ("bf16", "bf16")] == []


def test_gradients_of_microbatches_are_there_once():
    one, four = (compiled("pythia", remat="full", microbatches=n).memory_analysis() for n in (1, 4))
    gradients = one.argument_size_in_bytes / 2  # parameters and one moment of RMSprop, float32 each
    assert one.temp_size_in_bytes > gradients
    logits = 2 * 4 * head_chunk(PYTHIA["width"]) * PYTHIA["vocab_size"]  # of a pass through the head, and their gradient
    assert four.temp_size_in_bytes < 1.2 * gradients + logits  # two copies would be 2


@pytest.mark.parametrize("path", ["flash", "cudnn"])
@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", ["pythia", "llama"])
def test_meshes_of_eight(name, mesh, path):
    program = compiled(name, "h100:8", mesh=mesh, path=path)
    found = summarize(program.as_text())
    assert found.kernels >= 3 * LAYERS
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= set(found.collectives)
    # Gradients are summed into the parts in which parameters lie: whole ones, 4 bytes a parameter, never go round.
    if mesh == (1, 8, 1):
        parameters = 8 * program.memory_analysis().argument_size_in_bytes / 8
        assert found.collectives["all-reduce"].operand_bytes < parameters / 4


def test_rows_in_pieces_go_round_eight():
    """Keys and values forward, and back with their gradients; one kernel call in the code of a turn, and four turns."""
    found = summarize(compiled("llama", "h100:8", mesh=(1, 2, 1), context=4).as_text())
    assert found.kernels == 3 * LAYERS * 4
    assert "collective-permute" in found.collectives


@pytest.mark.parametrize("path", ["flash", "cudnn"])
def test_pmap_over_eight(path):
    step, make, model, rows = parts("pythia", path=path, remat="full")
    devices = slice_devices("h100:8")
    state = jax.eval_shape(make, jax.eval_shape(model.init, jax.random.key(0)))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype), state)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), split_rows(rows, 8))
    mapped = jax.pmap(functools.partial(step, axis_name="data"), axis_name="data", devices=devices, donate_argnums=0)
    # The kernels ask the mesh around them for the device. pmap has a mesh of its own, of one axis.
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        program = mapped.lower(state, rows).compile(compiler_options=COMPILER_OPTIONS)
    found = summarize(program.as_text())
    assert set(found.collectives) == {"all-reduce"}
    assert found.kernels >= 3 * LAYERS


@pytest.mark.parametrize(
    ("size", "dtype", "softcap"),
    [(64, "bfloat16", 30.0), (96, "bfloat16", None), (128, "float32", None), (80, "float32", 9.0)],
)
def test_tiles_of_other_head_sizes_and_types(size, dtype, softcap):
    q, k = (jax.ShapeDtypeStruct((2, 512, n, size), jnp.dtype(dtype)) for n in (4, 2))
    column = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def loss(q, k, v, start, end):
        return attend(q, k, v, VisibleKeys(start, end), Scoring(0.1, softcap), path=PATHS["flash"].make()).sum()

    with jax.set_mesh(make_mesh(devices=slice_devices("h100:1"))):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, column, column)
        program = lowered.compile(compiler_options=COMPILER_OPTIONS)
    assert summarize(program.as_text()).kernels == 3


def test_a_token_is_sampled_with_one_reading_of_weights_and_cache(monkeypatch):
    """Weights in bfloat16, without copies: of a layer out of its stack, or of several kernels that one product would use."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = {"layers": LAYERS, "max_positions": 1024, "eos_token_id": 0}
    model = make_model(decoder_config(hf_config(**PYTHIA, **options)), dtype=jnp.bfloat16, attention=PATHS["flash"].make())
    prompts, columns, tokens = 64, 128, 128

    def draw(variables, rows):
        return generate(model, variables, *rows, jax.random.key(0), max_new_tokens=tokens, eos_id=0)

    mesh = make_mesh(devices=slice_devices("h100:1"))
    on = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.ShapeDtypeStruct((prompts, columns), jnp.int32), jax.ShapeDtypeStruct((prompts,), jnp.int32)
    variables, rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on),
        (jax.eval_shape(model.init, jax.random.key(0)), rows),
    )
    with jax.set_mesh(mesh):
        text = jit_map(draw, mesh).lower(variables, rows).compile(compiler_options=COMPILER_OPTIONS).as_text()
    computations, entry = parse(text)
    (loop,) = (one for one in executions(computations, entry) if one.one.op == "while" and one.endless)
    body = re.search(r"body=%?([\w.\-]+)", loop.one.attributes)[1]
    read = sum(one.times * traffic(one.one, one.body, computations) for one in executions(computations, body) if not one.fused)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) - 50304 * 2560  # without the embedding
    cache = 2 * LAYERS * prompts * (columns + tokens) * 2560
    assert read < 1.4 * 2 * (weights + cache), read / (2 * (weights + cache))
