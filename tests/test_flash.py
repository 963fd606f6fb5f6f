"""The flash kernels for GPUs in Pallas' interpreter: head sizes, types and masks against dense, and the blocks they visit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout, packed_rows, plain_rows, shared_rows
from dpo_jax.data.loader import plan_layout
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models import flash_kernels
from dpo_jax.models.attention import DENSE, Scoring, VisibleKeys, attend
from dpo_jax.models.attention_gpu import flash_path
from dpo_jax.models.decoder import make_model
from dpo_jax.models.flash_kernels import BLOCK, LONGEST, Tiles
from dpo_jax.models.hf import load_hf

FLASH = flash_path(interpret=True)
prepare = jax.jit(FLASH.prepare, static_argnums=2)
OFTEN = ("gpt_neox", "llama", "gemma2", "gemma3_text")  # windows, soft caps, grouped queries; all others are alike to a kernel
FAMILIES = [
    pytest.param(folder.name, marks=() if folder.name in OFTEN else pytest.mark.soak)
    for folder in sorted((GOLDEN / "models").iterdir())
]
FAST = {"xla_backend_optimization_level": 0}  # compiled for one call


def pair(*lengths, seed=0, highest=60):
    rng = np.random.default_rng([seed, *lengths])
    return Encoded(*(rng.integers(1, highest, n).astype(np.int32) for n in lengths), uid=str(lengths))


@functools.cache
def packed():
    """Two rows of 200 tokens, no multiple of a block: pairs that do not see each other, an empty completion, much padding."""
    pairs = [pair(20, 30, 40), pair(33, 21, 5), pair(9, 28, 0), pair(2, 50, 60)]
    return Layout("packed", length=200, scored=200, per_row=4, rows_multiple=2).rows(pairs)


def attended(path, dtype, *, heads, kv_heads, size, window=None, softcap=None):
    """Mixed values, and the gradients of q, k and v: float32 whatever they were computed in."""
    rows, rng = packed(), np.random.default_rng(size)
    shapes = ((*rows.tokens.shape, n, size) for n in (heads, kv_heads, kv_heads, heads))
    # The same numbers in both types.
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(dtype) for shape in shapes)
    keys = VisibleKeys.of(rows, window=window)

    @functools.partial(jax.jit, compiler_options=FAST)
    def work(q, k, v):
        mix = functools.partial(attend, keys=keys, scoring=Scoring(size**-0.5, softcap), path=path)
        mixed, back = jax.vjp(mix, q, k, v)
        return mixed, *back(cotangent)

    return [np.asarray(x.astype(jnp.float32)) for x in work(q, k, v)]


CASES = {
    "64": {"heads": 2, "kv_heads": 2, "size": 64},
    "80, four queries a key": {"heads": 4, "kv_heads": 1, "size": 80},
    "96, window": {"heads": 2, "kv_heads": 1, "size": 96, "window": 19},
    "128, soft cap": {"heads": 2, "kv_heads": 1, "size": 128, "softcap": 2.0},
    "256, window, soft cap": {"heads": 2, "kv_heads": 1, "size": 256, "window": 30, "softcap": 2.0},
    "20, padded to 32": {"heads": 1, "kv_heads": 1, "size": 20},
}


@pytest.mark.parametrize("case", CASES)
def test_float32_equals_dense(case):
    ours, expected = (attended(path, jnp.float32, **CASES[case]) for path in (FLASH, DENSE))
    np.testing.assert_allclose(ours[0], expected[0], rtol=0, atol=1e-6)
    for gradient, other in zip(ours[1:], expected[1:], strict=True):
        np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_to_float32_as_dense_bfloat16(case):
    exact, dense, ours = (
        attended(path, dtype, **CASES[case])
        for path, dtype in ((DENSE, jnp.float32), (DENSE, jnp.bfloat16), (FLASH, jnp.bfloat16))
    )
    for truth, theirs, mine in zip(exact, dense, ours, strict=True):
        error, allowed = (np.sqrt(np.square(x - truth).mean()) for x in (mine, theirs))
        assert 0 < error <= 1.1 * allowed


def seen(rows, window):
    """bool[R, L, T]: which query sees which key, where chosen tokens under a window read the second copy of the keys."""
    column = np.arange(rows.tokens.shape[1])
    visible = (rows.k_start[:, :, None] <= column) & (column < rows.k_end[:, :, None])
    if window is None:
        return visible
    visible &= rows.positions[:, :, None] - rows.positions[:, None, :] < window
    second = np.asarray(prepare(rows.k_start, rows.k_end, (window,)).second)
    chosen = (rows.k_end > column + 1)[:, :, None]
    turned = np.take_along_axis(visible, second[:, None, :], axis=2)
    return np.concatenate([visible & ~chosen, turned & chosen], axis=2)


def blocks_of(visible):
    rows, length, keys = visible.shape
    visible = np.pad(visible, ((0, 0), (0, -length % LONGEST), (0, -keys % LONGEST)))
    return visible.reshape(rows, visible.shape[1] // BLOCK, BLOCK, visible.shape[2] // BLOCK, BLOCK).any(axis=(2, 4))


def between(first, last, count):
    number = np.arange(count)
    return (np.asarray(first)[:, :, None] <= number) & (number < np.asarray(last)[:, :, None])


def hh_like_rows():
    """64 pairs with lengths like those of Anthropic HH, in rows of 1,024 tokens."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.gamma(2, np.array([105, 45, 50]) / 2, size=(64, 3)), 1, 256).astype(int)
    pairs = [pair(*size) for size in sizes]
    return plan_layout(pairs, kind="packed", batch=64, length=1024).rows(pairs)


@pytest.mark.parametrize("window", [None, 30])
def test_the_kernels_visit_the_blocks_in_which_somebody_sees_something(window):
    """Every such block, and few others: late keys of a prompt are seen before it and after it, and not by its beginning."""
    for rows in (packed(), hh_like_rows()):
        spans = jax.tree.map(lambda x: np.asarray(x[0]), prepare(rows.k_start, rows.k_end, (window,)).spans)
        needed = blocks_of(seen(rows, window))
        keys_met = between(spans.key_first, spans.key_last, needed.shape[2])
        queries_met = between(spans.query_first, spans.query_last, needed.shape[1]).swapaxes(1, 2)
        assert (keys_met >= needed).all()
        assert (queries_met >= needed).all()
    if window is None:  # of HH, where an eighth of all entries is visible
        assert keys_met.sum() == needed.sum()
        assert needed.mean() < 0.22
        assert queries_met.mean() < 0.24


def test_log_sum_exp_is_that_of_the_visible_scores():
    rows = packed()
    spans = jax.tree.map(lambda x: x[0], prepare(rows.k_start, rows.k_end, (None,)).spans)
    q, k = (np.random.default_rng(i).normal(size=(2, 256, 1, 16)).astype(np.float32) for i in range(2))
    settings = flash_kernels.Settings(scale=0.5, softcap=None, interpret=True)
    _, log_mass = jax.jit(functools.partial(flash_kernels.forward, settings=settings))(q, k, k, spans)
    scores = np.where(seen(rows, None), 0.5 * np.einsum("rqnh,rknh->rqk", q, k)[:, :200, :200], -np.inf)
    expected = np.log2(np.exp(scores.astype(np.float64)).sum(axis=2))
    np.testing.assert_allclose(np.asarray(log_mass)[:, 0, :200], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tiles", [Tiles(128, 64), Tiles(128, 32), Tiles(32, 16)])
def test_tiles_change_nothing_but_the_order_of_sums(tiles):
    rows = packed()
    spans = jax.tree.map(lambda x: x[0], prepare(rows.k_start, rows.k_end, (None,)).spans)
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, 256, n, 16)), jnp.float32) for n in (2, 1, 1, 2))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
    def work(tiles):
        arrays = (q, k, v, spans, flash_kernels.Settings(scale=0.5, softcap=None, interpret=True))
        out, log_mass = flash_kernels.forward(*arrays, tiles=tiles)
        back = {"log_mass": log_mass, "pull": jnp.sum(out * d_out, axis=-1).swapaxes(1, 2), "d_out": d_out, "tiles": tiles}
        return out, flash_kernels.d_queries(*arrays, **back), flash_kernels.d_keys(*arrays, **back)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), work(tiles), work(Tiles(64, 64)))


@pytest.mark.parametrize(
    "layout",
    [
        functools.partial(packed_rows, length=45, pairs_per_row=2),
        pytest.param(functools.partial(plain_rows, length=20), marks=pytest.mark.soak),
        pytest.param(functools.partial(shared_rows, length=24), marks=pytest.mark.soak),
    ],
    ids=["packed", "plain", "shared"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_dense_on_plain_rows(family, layout):
    """Log-probabilities and gradients of a DPO loss; prompt plus completion reach beyond the sliding windows of 7."""
    dense, variables = load_hf(GOLDEN / "models" / family)
    flash = make_model(dense.config, attention=FLASH, remat="save_attention")
    pairs = [pair(9, 8, 5), pair(3, 2, 11)]

    def gradient(model, rows):
        @functools.partial(jax.jit, compiler_options=FAST)
        @functools.partial(jax.grad, has_aux=True)
        def of_loss(variables):
            logps = completion_logps(model, variables, rows)
            return dpo_loss(logps, jnp.zeros_like(logps), beta=0.1)[0].sum(), logps

        return of_loss(variables)

    expected, expected_logps = gradient(dense, plain_rows(pairs, length=20))
    rows = layout(pairs)
    ours, logps = gradient(flash, rows)
    np.testing.assert_allclose(logps, expected_logps[rows.index], rtol=1e-6, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, expected)
