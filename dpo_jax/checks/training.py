"""Training checks: DPO steps of a small model must start at ln 2 and repeat numbers computed on a CPU.

`python -m dpo_jax.checks.training` prints those numbers again, for `EXPECTED`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.checks.attention import float32_is_float32, random_pair
from dpo_jax.checks.report import Result, Row
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout
from dpo_jax.dpo import dpo_objective, dpo_step
from dpo_jax.head import token_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.attention_paths import CHUNKED, attention_path
from dpo_jax.models.checkpoint_stream import path_of
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.reference import reference_logps
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.runtime.parallel import single_device
from dpo_jax.step import init_state, mean_grads
from dpo_jax.types import Array, Model, Partitioner, Rows, Variables

PAIRS, STEPS = 15, 4  # an odd number of pairs: the batch has a padding example
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "width": 128,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 64,
    "max_positions": 128,
}
LOSS = functools.partial(dpo_loss, beta=0.1)
TX = make_optimizer(linear_warmup(1e-4, warmup_steps=2), max_grad_norm=10.0)
WATCHED = ("loss", "rewards/margins", "grad_norm")
EXPECTED = (  # WATCHED of each step, float32 on a CPU
    (0.69314724, 0.00000000, 1.66954029),
    (0.48262811, 0.48475799, 1.13652742),
    (0.30642796, 1.04554677, 0.72339541),
    (0.18921866, 1.60800755, 0.44703719),
)
# Losses and margins in nats; gradient norms relative. In bfloat16 log-probabilities move by hundredths of a nat.
STEPS_BAR = {"float32": 1e-5, "bfloat16": 1e-2}
START_BAR = {"float32": 1e-5, "bfloat16": 0.05}  # nats between policy and reference at step 0
LOG_SOFTMAX_BAR = 2e-6  # relative
SPLIT_BAR = 1e-5  # gradients of microbatches, relative to their size


def rows() -> Iterator[Row]:
    for dtype in ("float32", "bfloat16"):
        yield Row(
            f"start.{dtype}",
            "the policy is not its own reference at step 0, so every reward is wrong: try --model.attention chunked and "
            "--data.layout plain, and report both results",
            functools.partial(_start, dtype),
        )
    for dtype in ("float32", "bfloat16"):
        yield Row(
            f"steps.{dtype}",
            "training differs here from a CPU's: do not trust a run; report this file, and the failed rows above",
            functools.partial(_steps, dtype),
        )
    yield Row(
        "log_softmax",
        "log-probabilities lose digits where logits are large, and rewards are small differences of them: do not train; "
        "report it",
        _log_softmax,
    )
    yield Row(
        "microbatches",
        "gradients depend on how a batch is split: train with --dpo.microbatches 1 only, and report it",
        _microbatches,
    )


def small_model(dtype: str) -> tuple[Model, str]:
    """A small Llama with this platform's default attention path, and the name of the path; chunked if that is refused."""
    config, platform = decoder_config(hf_config("llama", eos_token_id=0, **SIZES)), jax.default_backend()
    try:
        path = attention_path("auto", platform=platform, config=config, dtype=jnp.dtype(dtype))
    except ValueError:
        path = CHUNKED
    return make_model(config, dtype=jnp.dtype(dtype), attention=path), path.name


@functools.cache
def small_variables() -> Variables:
    """The same weights on every machine: RandomState gives the same numbers in all versions of numpy."""
    shapes = jax.eval_shape(small_model("float32")[0].init, jax.random.key(0))
    rng = np.random.RandomState(0)
    leaves = []
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(shapes), key=lambda item: path_of(item[0])):
        drawn = rng.standard_normal(leaf.shape).astype(np.float32)
        leaves.append(
            (path, np.float32(1) + np.float32(0.1) * drawn if path_of(path)[-1] == "scale" else np.float32(0.05) * drawn)
        )
    by_path = {path_of(path): leaf for path, leaf in leaves}
    return jax.tree_util.tree_map_with_path(lambda path, _: by_path[path_of(path)], shapes)


@functools.cache
def small_pairs() -> tuple[Encoded, ...]:
    rng = np.random.RandomState(1)
    lengths = [(rng.randint(3, 20), rng.randint(2, 12), rng.randint(2, 12)) for _ in range(PAIRS)]
    return tuple(random_pair(rng, sizes, vocab_size=512) for sizes in lengths)


def layout_of(kind: str, *, rows_multiple: int = 16) -> Layout:
    if kind == "packed":
        return Layout("packed", length=128, scored=96, per_row=8, rows_multiple=4)
    return Layout(kind, length=64, scored=64, rows_multiple=rows_multiple)  # pyright: ignore[reportArgumentType]


def in_order(values: Array, index: Array) -> np.ndarray:
    """Values in the order of the pairs, from the order of a batch with padding examples."""
    ordered = np.zeros((PAIRS, 2), np.float32)
    ordered[np.asarray(index)[np.asarray(index) >= 0]] = np.asarray(values)[np.asarray(index) >= 0]
    return ordered


@functools.cache
def references(dtype: str, kind: str) -> np.ndarray:
    """Reference log-probabilities [PAIRS, 2] from a separate pass."""
    model, variables = small_model(dtype)[0], small_variables()
    rows = layout_of(kind).rows(small_pairs())
    with float32_is_float32(dtype):
        return in_order(jax.jit(functools.partial(reference_logps, model))(variables, rows), rows.index)


def batch_of(kind: str, *, dtype: str = "float32", reference: str = "plain", rows_multiple: int = 16) -> Rows:
    """The pairs in rows of one layout, with the reference log-probabilities of another."""
    return layout_of(kind, rows_multiple=rows_multiple).rows(small_pairs(), ref_logps=references(dtype, reference))


def objective(model: Model) -> Any:
    """The objective of `dpo_step`, for callers that need its gradient."""

    return functools.partial(dpo_objective, model=model, loss=LOSS)


def _start(dtype: str) -> Result:
    """The policy over packed rows against a reference pass over plain rows (in bfloat16, where rows differ, over packed)."""
    model, path = small_model(dtype)
    rows = batch_of("packed", dtype=dtype, reference="plain" if dtype == "float32" else "packed")

    @jax.jit
    def start(variables: Variables, rows: Rows) -> Any:
        def mean(variables: Variables) -> tuple[jax.Array, Any]:
            losses, metrics = objective(model)(variables, rows)
            return jnp.sum(losses * rows.weight) / rows.weight.sum(), metrics

        return jax.value_and_grad(mean, has_aux=True)(variables)  # as in a training step: the forward pass of a gradient

    with float32_is_float32(dtype):
        (loss, metrics), _ = jax.device_get(start(small_variables(), rows))
    logps = np.stack([metrics["logps/chosen"], metrics["logps/rejected"]], axis=1)
    reference = references(dtype, "plain" if dtype == "float32" else "packed")
    apart = np.abs(in_order(logps, rows.index) - reference)
    apart = float((apart / np.maximum(1.0, np.abs(reference) / 10)).max())  # float32 has seven digits
    off, reward = abs(float(loss) - math.log(2)), float(np.abs(rows.weight * metrics["rewards/margins"]).max())
    good = apart <= START_BAR[dtype] and off <= START_BAR[dtype] and reward <= START_BAR[dtype]
    figure = f"loss - ln 2 = {off:.1e}, reward margin {reward:.1e}, log-probabilities apart {apart:.1e} ({path})"
    return Result(figure, good, bar=f"{START_BAR[dtype]:g}", values={"loss": off, "margin": reward, "logps": apart})


def take_steps(partitioner: Partitioner, dtype: str) -> tuple[np.ndarray, Variables]:
    """`WATCHED` of every step, float64[STEPS, 3], and the parameters after them."""
    # Sixteen rows divide among most numbers of devices.
    rows = batch_of("shared", dtype=dtype, reference="shared", rows_multiple=math.lcm(16, partitioner.row_shards))
    model = small_model(dtype)[0]
    step = functools.partial(dpo_step, model=model, tx=TX, loss=LOSS, axis_name=partitioner.axis_name)
    compiled, seen = partitioner.compile_step(step), []
    with float32_is_float32(dtype):
        state = partitioner.init_state(functools.partial(init_state, tx=TX), partitioner.put_variables(small_variables()))
        for _ in range(STEPS):
            state, metrics = compiled(state, rows)
            seen.append([float(metrics[name]) for name in WATCHED])
    return np.array(seen), partitioner.to_host(state.params)


@functools.cache
def on_one_device(dtype: str) -> tuple[np.ndarray, Variables]:
    return take_steps(single_device(jax.local_devices()[0]), dtype)


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference between two runs; that of gradient norms is relative."""
    scale = np.maximum(1.0, np.abs(theirs) * (np.arange(len(WATCHED)) == WATCHED.index("grad_norm")))
    return float(np.max(np.abs(ours - theirs) / scale))


def _steps(dtype: str) -> Result:
    seen, _ = on_one_device(dtype)
    difference = apart(seen, np.array(EXPECTED))
    figure = f"losses {' '.join(f'{loss:.5f}' for loss in seen[:, 0])}, at most {difference:.1e} from a CPU's in float32"
    values = {"watched": WATCHED, "seen": seen.tolist(), "difference": difference}
    return Result(figure, difference <= STEPS_BAR[dtype], bar=f"{STEPS_BAR[dtype]:g}", values=values)


def _log_softmax() -> Result:
    """`token_logps` for a head with bfloat16 logits in the hundreds, against numpy in float64, in one chunk and in several."""
    rng = np.random.RandomState(2)
    # Each position picks a column of the table, so the logits are the same however the product is computed.
    picked, target = rng.randint(0, 64, (2, 96)), rng.randint(0, 512, (2, 96)).astype(np.int32)
    hidden = jax.nn.one_hot(picked, 64, dtype=jnp.bfloat16)
    table = jnp.asarray(rng.standard_normal((512, 64)) * 150, jnp.bfloat16)
    head = Model(lambda key: {}, lambda variables, rows: hidden, lambda variables, hidden: hidden @ variables["table"].T)
    logits = np.asarray(table, np.float64).T[picked]
    top = logits.max(axis=-1, keepdims=True)
    exact = np.take_along_axis(logits - top, target[:, :, None], axis=-1)[:, :, 0] - np.log(np.exp(logits - top).sum(axis=-1))
    errors = []
    for chunk in (1024, 64):
        score = jax.jit(functools.partial(token_logps, head, chunk=chunk))
        ours = np.asarray(score({"table": table}, hidden, target), np.float64)
        errors.append(np.abs(ours - exact).max() / np.abs(exact).max())
    worst = float(np.max(errors))
    figure = f"log-probabilities down to {exact.min():.0f} nats, relative error {worst:.1e}"
    return Result(figure, worst <= LOG_SOFTMAX_BAR, bar=f"{LOG_SOFTMAX_BAR:g}", values={"error": worst})


def _microbatches() -> Result:
    """Gradient and loss of a whole batch against those of 4 parts, the last of which holds the padding example."""
    model, rows = small_model("float32")[0], batch_of("shared")

    @functools.partial(jax.jit, static_argnums=2)
    def grads(variables: Variables, rows: Rows, count: int) -> Any:
        return mean_grads(objective(model), variables, rows, microbatches=count)

    with float32_is_float32("float32"):
        whole, parts = (jax.device_get(grads(small_variables(), rows, count)) for count in (1, 4))
    error, loss = relative(parts[0], whole[0]), abs(float(parts[1]["loss"]) - float(whole[1]["loss"]))
    figure = f"4 parts against one: gradient apart {error:.1e}, loss {loss:.1e}"
    good = error <= SPLIT_BAR and loss <= SPLIT_BAR
    return Result(figure, good, bar=f"{SPLIT_BAR:g}", values={"gradient": error, "loss": loss})


def relative(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|, over all entries of two trees."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    sums = np.sum([(np.sum(np.square(np.float64(a) - b)), np.sum(np.square(np.float64(b)))) for a, b in pairs], axis=0)
    return float(np.sqrt(sums[0] / sums[1]))


if __name__ == "__main__":
    for numbers in on_one_device("float32")[0]:
        print(f"    ({', '.join(f'{number:.8f}' for number in numbers)}),")
