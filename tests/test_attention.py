"""Every attention path against the dense one: layouts, windows, soft caps, devices; and what TPUs make of the kernel.

Run as a program, `python tests/test_attention.py` compares (and times) the paths of the accelerator at hand.
"""

import functools
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.cli.build import decoder_of
from dpo_jax.cli.config import Config, RunConfig
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models import attention_paths
from dpo_jax.models.attention import DENSE, AttentionPath, Scoring, VisibleKeys, attend
from dpo_jax.models.attention_chunked import chunked
from dpo_jax.models.attention_gpu import cudnn_path, flash_path
from dpo_jax.models.attention_paths import BLOCKS, CHUNKED, PATHS, attention_path, path_name
from dpo_jax.models.attention_tpu import _padded, splash_path
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import load_hf
from dpo_jax.runtime.mesh import make_mesh, row_sharding, tree_shardings, variable_shardings
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner

SPLASH = splash_path(interpret=True)
FLASH = flash_path(interpret=True)
FAST = {"xla_backend_optimization_level": 0}  # compiled for one call
SLICES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
GOLDEN = Path(__file__).parent / "golden"


OTHERS = {
    "splash": lambda: SPLASH,
    "blocks": lambda: BLOCKS,
    "chunked": lambda: AttentionPath("chunked", functools.partial(chunked, limit=1 << 17)),
    "cudnn": lambda: cudnn_path(implementation="xla"),
    "flash": lambda: FLASH,
}


def pairs_of(sizes, seed=0):
    """Pairs of (prompt, chosen, rejected) lengths."""
    rng = np.random.default_rng(seed)
    return [Encoded(*(rng.integers(1, 60, n).astype(np.int32) for n in lengths), uid=f"{i}") for i, lengths in enumerate(sizes)]


def rows_of(kind, sizes, length, *, multiple=1):
    return Layout(kind, length=length, scored=length, per_row=8 if kind == "packed" else 1, rows_multiple=multiple).rows(
        pairs_of(sizes)
    )


# Odd row lengths that are no multiple of a block, an empty completion, and rows of nothing but padding.
LAYOUTS = {
    "plain": ("plain", [(5, 30, 9), (40, 0, 50)], 97, 5),
    "shared": ("shared", [(1, 60, 30), (20, 1, 71), (64, 33, 0)], 131, 4),
    "packed": ("packed", [(20, 90, 100), (70, 60, 5), (9, 80, 40), (30, 1, 33), (60, 30, 90), (2, 45, 1)], 601, 2),
}
CASES = {
    "plain": ("plain", 4, 2, None, None),
    "plain, window": ("plain", 2, 2, 11, None),
    "shared": ("shared", 3, 3, None, 2.0),
    "shared, window": ("shared", 2, 1, 25, None),
    "packed": ("packed", 2, 1, None, None),
    "packed, window": ("packed", 2, 2, 17, 2.0),
}


@functools.cache
def inputs(case):
    """(rows, q, k, v, cotangent, window, softcap)."""
    layout, heads, kv_heads, window, softcap = CASES[case]
    kind, sizes, length, multiple = LAYOUTS[layout]
    rows = rows_of(kind, sizes, length, multiple=multiple)
    rng = np.random.default_rng(1)
    arrays = (rng.normal(size=(*rows.tokens.shape, n, 8)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads))
    return rows, *map(jnp.asarray, arrays), window, softcap


def attended(path, case):
    """The mixed values of a case, and the gradients of q, k and v."""
    rows, q, k, v, cotangent, window, softcap = inputs(case)

    def mix(q, k, v):
        return attend(
            q,
            k,
            v,
            VisibleKeys.of(rows, window=window),
            Scoring(0.4, softcap),
            path=path,
        )

    def with_gradients(q, k, v):
        mixed, back = jax.vjp(mix, q, k, v)
        return mixed, back(cotangent)

    return jax.jit(with_gradients, compiler_options=FAST)(q, k, v)


dense_attended = functools.cache(functools.partial(attended, DENSE))


def test_float32_is_float32_in_the_kernel_for_tpus(monkeypatch):
    """Its products follow a setting of JAX, by which a TPU would round float32 to bfloat16. For bfloat16 it must stay off."""
    hf = hf_config("llama", vocab_size=64, width=128, layers=1, heads=1, max_positions=64, eos_token_id=0)
    before = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    try:
        jax.config.update("jax_default_matmul_precision", None)
        for precision, expected in (("bfloat16", None), ("float32", "highest")):
            decoder_of(Config(run=RunConfig(precision=precision)), hf)
            assert jax.config.jax_default_matmul_precision == expected  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(("length", "expected"), [(100, (128, 128)), (300, (384, 384)), (600, (768, 384)), (896, (1024, 512))])
def test_blocks_of_the_tpu_kernel_are_large_also_where_they_do_not_divide_the_row(length, expected):
    """Blocks of 128 divide every padded length, but a step of the kernel has an overhead of more than such a block."""
    assert _padded(length) == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OTHERS)
def test_path_equals_dense(name, case):
    if name == "cudnn" and CASES[case][-1] is not None:
        pytest.skip("has no soft cap, and is refused to models that need one")
    mixed, gradients = attended(OTHERS[name](), case)
    expected, expected_gradients = dense_attended(case)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 30])
def test_splash_computes_exactly_the_blocks_in_which_somebody_sees_something(window):
    rows = rows_of("packed", LAYOUTS["packed"][1], 601, multiple=2)
    prepared = jax.jit(SPLASH.prepare, static_argnums=2)(rows.k_start, rows.k_end, (window,))
    blocks = jax.tree.map(lambda leaf: np.asarray(leaf[0]), prepared.blocks)
    column = np.arange(601)
    visible = (rows.k_start[:, :, None] <= column) & (column < rows.k_end[:, :, None])
    if window is not None:
        visible &= rows.positions[:, :, None] - rows.positions[:, None, :] < window
        # Chosen tokens read the second copy of the keys.
        chosen = (rows.k_end > column + 1)[:, :, None]
        turned = np.take_along_axis(visible, np.asarray(prepared.second)[:, None, :], axis=2)
        visible = np.concatenate([visible & ~chosen, turned & chosen], axis=2)
    count, length, keys = visible.shape
    visible = np.pad(visible, ((0, 0), (0, _padded(length)[0] - length), (0, _padded(keys)[0] - keys)))
    _, across, along = blocks.keys.shape
    needed = visible.reshape(count, across, -1, along, visible.shape[2] // along).any(axis=(2, 4))
    np.testing.assert_array_equal(blocks.needed.sum(), needed.sum())
    assert 0 < needed.mean() < 1
    for r, i in np.ndindex(needed.shape[:2]):
        listed = blocks.keys[r, i][blocks.needed[r, i] == 1] - r * needed.shape[2]
        np.testing.assert_array_equal(listed, np.flatnonzero(needed[r, i]))
    for r, j in np.ndindex(needed.shape[0], needed.shape[2]):
        listed = blocks.queries[r, :, j][blocks.needing[r, :, j] == 1] - r * needed.shape[1]
        np.testing.assert_array_equal(listed, np.flatnonzero(needed[r, :, j]))


@pytest.mark.parametrize("path", [DENSE, SPLASH, FLASH, BLOCKS, CHUNKED], ids=lambda path: path.name)
def test_a_query_without_keys_is_finite_also_in_the_gradient(path):
    q = jnp.ones((1, 4, 1, 8))
    none = np.zeros((1, 4), np.int32)
    gradient = jax.jit(jax.grad(lambda q: attend(q, q, q, VisibleKeys(none, none), Scoring(1.0), path=path).sum()))(q)
    assert jnp.isfinite(gradient).all()


def test_splash_refuses_more_columns_than_it_can_count():
    many = jax.ShapeDtypeStruct((130, 4096), jnp.int32)
    with pytest.raises(ValueError, match=r"at most 524,288 columns .* has 532,480 there: use more microbatches"):
        jax.eval_shape(lambda start, end: SPLASH.prepare(start, end, (None,)), many, many)


def test_flash_refuses_more_numbers_than_it_can_count():
    q = jax.ShapeDtypeStruct((130, 4096, 32, 128), jnp.bfloat16)
    ends = jax.ShapeDtypeStruct((130, 4096), jnp.int32)
    mix = lambda q, start, end: attend(q, q, q, VisibleKeys(start, end), Scoring(1.0), path=FLASH)  # noqa: E731
    with pytest.raises(ValueError, match=r"at most 2,147,483,647 numbers .* have 2,181,038,080 there: use more microbatches"):
        jax.eval_shape(mix, q, ends, ends)


def test_chunks_bound_the_memory_of_both_directions():
    """Also where a policy keeps all matrix products."""
    at_once, limit = 4 * 2 * 1024 * 1024, 1 << 19  # 2 heads; bytes of all scores, and of a chunk's
    column = jnp.arange(1024, dtype=jnp.int32)[None]

    def held(path):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
        def mix(q, k, v):
            return attend(q, k, v, VisibleKeys(column * 0, column + 1), Scoring(1.0), path=path)

        x = jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)
        compiled = jax.jit(jax.grad(lambda *x: mix(*x).sum(), argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(DENSE) > at_once
    assert held(AttentionPath("chunked", functools.partial(chunked, limit=limit))) < 6 * limit


@pytest.mark.parametrize(("family", "path"), [("gemma2", SPLASH), ("mistral", OTHERS["cudnn"]())])
def test_a_decoder_on_packed_rows_equals_the_dense_one_on_plain_rows(family, path):
    """Alternating windows of 7 positions, soft caps, and a loss whose gradient goes through everything."""
    model, variables = load_hf(GOLDEN / "models" / family)
    pairs = pairs_of([(9, 8, 5), (3, 2, 11)])

    def gradient(model, rows):
        @functools.partial(jax.jit, compiler_options=FAST)
        @functools.partial(jax.grad, has_aux=True)
        def of_loss(variables):
            logps = completion_logps(model, variables, rows)
            return dpo_loss(logps, jnp.zeros_like(logps), beta=0.1)[0].mean(), logps

        return of_loss(variables)

    packed = Layout("packed", length=45, scored=45, per_row=2).rows(pairs)
    order = np.argsort(packed.index)
    expected, expected_logps = gradient(model, Layout("plain", length=20, scored=20).rows(pairs))
    ours, logps = gradient(make_model(model.config, attention=path, remat="save_attention"), packed)
    np.testing.assert_allclose(logps[order], expected_logps, rtol=1e-6, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, expected)


def test_sampling_does_not_meet_the_kernel():
    model, variables = load_hf(GOLDEN / "models" / "gemma2")
    other = make_model(model.config, attention=splash_path())  # which this machine could not run
    rows = rows_of("plain", [(5, 3, 2)], 8)
    hidden = [jax.jit(m.decode)(variables, rows, m.init_cache(2, 12))[0] for m in (model, other)]
    np.testing.assert_allclose(*hidden, rtol=0, atol=1e-6)


LLAMA = decoder_config(
    hf_config("llama", vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, max_positions=64, eos_token_id=0)
)


STEP_ROWS = rows_of("shared", [(5, 8, 9), (7, 2, 3), (9, 9, 4)], 32, multiple=4)


def logps_and_gradient(model):
    """fn(variables, rows) -> log-probabilities of the rows, and the gradient of their sum."""

    def work(variables, rows):
        def total(variables):
            logps = completion_logps(model, variables, rows)
            return logps.sum(), logps

        gradient, logps = jax.grad(total, has_aux=True)(variables)
        return logps, gradient

    return work


@functools.cache
def dense_step():
    variables = jax.jit(make_model(LLAMA).init)(jax.random.key(0))
    return variables, jax.jit(logps_and_gradient(make_model(LLAMA)), compiler_options=FAST)(variables, STEP_ROWS)


@pytest.mark.parametrize("path", [SPLASH, FLASH, CHUNKED], ids=lambda path: path.name)
def test_rows_and_heads_over_a_mesh(path):
    variables, (expected_logps, expected) = dense_step()
    mesh, work = make_mesh(fsdp=2, tensor=2), logps_and_gradient(make_model(LLAMA, attention=path))
    place = mesh_partitioner(mesh, make_model(LLAMA)).put_variables
    with jax.set_mesh(mesh):
        logps, gradient = jax.jit(work, compiler_options=FAST)(place(variables), jax.device_put(STEP_ROWS, row_sharding(mesh)))
    np.testing.assert_allclose(logps, expected_logps, rtol=1e-6, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), gradient, expected)


def test_blocks_are_cut_where_the_rows_lie():
    rows, q, k, v, _, window, softcap = inputs("packed, window")
    keys = VisibleKeys.of(rows, window=window)
    mesh = make_mesh(fsdp=2, tensor=2)
    heads_cut = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    mix = jax.jit(functools.partial(attend, keys=keys, scoring=Scoring(0.4, softcap), path=BLOCKS))
    with jax.set_mesh(mesh):
        program = mix.lower(*(jax.device_put(x, heads_cut) for x in (q, k, v))).compile()
        mixed = program(*(jax.device_put(x, heads_cut) for x in (q, k, v)))
    np.testing.assert_allclose(mixed, dense_attended("packed, window")[0], rtol=0, atol=1e-6)
    assert "all-gather" not in program.as_text()


def test_blocks_hold_no_scores_of_whole_rows():
    rows = rows_of("packed", [(20, 90, 100), (70, 60, 5), (9, 80, 40), (30, 1, 33)] * 4, 2048)
    x = jax.ShapeDtypeStruct((*rows.tokens.shape, 2, 8), jnp.float32)
    keys = VisibleKeys.of(rows)
    loss = lambda q: attend(q, q, q, keys, Scoring(1.0), path=BLOCKS).sum()  # noqa: E731
    held = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes
    assert held < 2048 * 2048 * 4 / 2  # half of what one head's scores take


@pytest.mark.parametrize("path", [SPLASH, FLASH], ids=lambda path: path.name)
def test_rows_over_pmap(path):
    variables, (expected, _) = dense_step()
    model = make_model(LLAMA, attention=path)
    logps = pmap_partitioner(jax.devices()[:2]).compile_map(functools.partial(completion_logps, model))
    replicated = jax.tree.map(lambda x: jnp.stack([x, x]), variables)
    np.testing.assert_allclose(logps(replicated, STEP_ROWS), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="before, the kernel's scratch space held on to its recomputation")
@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("save_attention", 1), ("full", 2)])
def test_the_backward_pass_runs_the_forward_kernel_again_only_if_all_is_computed_again(remat, forward):
    model = make_model(LLAMA, attention=SPLASH, remat=remat)
    rows = rows_of("shared", [(5, 8, 9)], 32)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    program = str(jax.make_jaxpr(jax.grad(lambda v: model.forward(v, rows).sum()))(variables))
    assert [program.count(f"name=splash_mha_{part}") for part in ("fwd", "dq", "dkv")] == [forward, 1, 1]


@pytest.mark.parametrize(("platform", "name"), [("cpu", "blocks"), ("gpu", "flash"), ("tpu", "splash"), ("abacus", "chunked")])
def test_automatic_choice(platform, name):
    assert path_name("auto", platform) == name
    assert attention_path("auto", platform=platform, config=LLAMA, dtype=jnp.bfloat16).name == name


@pytest.mark.parametrize(("capability", "name"), [("7.5", "chunked"), ("8.0", "flash"), ("10.0", "flash"), ("gfx90a", "flash")])
def test_a_gpu_for_which_kernels_do_not_compile_takes_none(monkeypatch, capability, name):
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(attention_paths.jax, "devices", lambda: [device])
    assert path_name("auto", "gpu") == name
    assert path_name("flash", "gpu") == "flash"


@pytest.mark.parametrize(
    ("asked", "platform", "family", "dtype", "message"),
    [
        ("splash", "cpu", "llama", "float32", "splash runs on a TPU, but this is a CPU; auto fits here"),
        ("cudnn", "tpu", "llama", "bfloat16", "cudnn runs on a GPU, but this is a TPU"),
        (
            "cudnn",
            "gpu",
            "gemma2",
            "bfloat16",
            "no soft cap on scores, which gemma2 needs; .* multiples of 8, but these have 12; use flash",
        ),
        ("cudnn", "gpu", "llama", "float32", "computes in bfloat16, not float32: set run.precision"),
        ("flash", "cpu", "llama", "float32", "flash runs on a GPU, but this is a CPU; auto fits here"),
        ("flash", "gpu", "llama", "float64", "computes in float32 or less, not float64; use chunked"),
        ("flush", "gpu", "llama", "float32", "'flush' is unknown: choose auto, dense, blocks, chunked, splash, flash, cudnn"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_reason(asked, platform, family, dtype, message):
    config = LLAMA if family == "llama" else load_hf(GOLDEN / "models" / family)[0].config
    with pytest.raises(ValueError, match=message):
        attention_path(asked, platform=platform, config=config, dtype=dtype)


def mesh_of_tpus(topology, **sizes):
    """A mesh of devices that are not here, for which programs can be compiled all the same."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return make_mesh(devices=topologies.get_topology_desc(platform="tpu", topology_name=topology).devices, **sizes)


def kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("topology", SLICES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "softcap"),
    [(8, 2, 128, None, None), (4, 4, 80, None, None), (4, 2, 256, 600, 50.0)],
)
def test_splash_compiles_for_tpus(topology, heads, kv_heads, size, window, softcap):
    mesh, length = mesh_of_tpus(topology), 2000
    by_row = row_sharding(mesh)
    q, k = (jax.ShapeDtypeStruct((4, length, n, size), jnp.bfloat16, sharding=by_row) for n in (heads, kv_heads))
    column = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=by_row)

    def loss(q, k, v, start, end):
        keys = VisibleKeys(start, end, window=window)
        return attend(q, k, v, keys, Scoring(0.1, softcap), path=splash_path()).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, column, column).compile()
    assert kernels(compiled) == 3
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * heads * length * length  # half of one row's scores


def test_a_decoder_compiles_for_a_mesh_of_tpus():
    sizes = {"width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 64, "max_positions": 8192}
    model = make_model(
        decoder_config(hf_config("gemma2", vocab_size=256, eos_token_id=0, **sizes)),
        dtype=jnp.bfloat16,
        attention=splash_path(),
    )
    mesh = mesh_of_tpus("v5e:2x2", fsdp=2, tensor=2)
    lie = variable_shardings(variables := jax.eval_shape(model.init, jax.random.key(0)), model.axes(), mesh)
    variables = jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), variables, tree_shardings(variables, lie, mesh)
    )
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(mesh)), rows_of("shared", [(5, 8, 9)] * 4, 8192)
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(lambda v, r: model.forward(v, r).sum())).lower(variables, rows).compile()
    assert kernels(compiled) == 3


def devices_here():
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0"))


@pytest.mark.skipif(not devices_here(), reason="no accelerator here")
def test_the_paths_of_the_accelerator_here():
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def compare_here():
    """Paths of this machine's device in bfloat16 against dense in float32: prints errors and times, and fails beyond 2 %."""
    platform, wrong = jax.default_backend(), []
    sizes = [tuple(size) for size in np.random.default_rng(0).integers(20, 200, size=(24, 3))]
    rows = jax.tree.map(jnp.asarray, rows_of("packed", sizes, 2048, multiple=4))
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (*rows.tokens.shape, n, 128)) for key, n in zip(keys, (16, 4, 4), strict=True))

    def run(path, dtype, window):
        @jax.jit
        def work(q, k, v):
            mix = functools.partial(
                attend,
                keys=VisibleKeys.of(rows, window=window),
                scoring=Scoring(0.09),
                path=path,
            )
            mixed, back = jax.vjp(mix, q, k, v)
            return mixed, *back(mixed)

        arguments = [x.astype(dtype) for x in (q, k, v)]
        out = jax.block_until_ready(work(*arguments))
        begin = time.perf_counter()
        for _ in range(5):
            jax.block_until_ready(work(*arguments))
        return [np.asarray(x, np.float32) for x in out], (time.perf_counter() - begin) / 5

    for window in (None, 64):
        with jax.default_matmul_precision("highest"):
            expected, _ = run(DENSE, jnp.float32, window)
        for name, path in PATHS.items():
            if path.platform not in (None, platform) or any(path.refusals(LLAMA, jnp.dtype(jnp.bfloat16))):
                continue
            ours, seconds = run(path.make(), jnp.bfloat16, window)
            error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, expected, strict=True))
            print(f"{platform} {name:>8} window {window}: relative error {error:.1e}, {seconds * 1e3:.2f} ms", flush=True)
            wrong += [name] if not error < 0.02 else []
    return wrong


if __name__ == "__main__":
    different = compare_here()
    sys.exit(f"more than 2 % from dense: {different}" if different else 0)
