"""One step, however it is run: the same loss, gradient norm and parameters."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import Layout, causal_rows, examples_to_rows, plain_rows, ranking_rows
from dpo_jax.dpo import dpo_step, preference_metrics
from dpo_jax.head import CHUNK, head_chunk, log_probability, log_probability_and_hit, token_logps
from dpo_jax.logps import completion_lengths, completion_logps, scored_hidden, sequence_logps
from dpo_jax.losses import dpo_loss, ipo_loss, plackett_luce_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.reference import reference_logps
from dpo_jax.runtime.hlo import shapes
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import pmap_partitioner, single_device, split_rows
from dpo_jax.sft import sft_step
from dpo_jax.step import init_state, mean_grads
from dpo_jax.types import Model

SIZES = {"vocab_size": 64, "width": 32, "layers": 1, "heads": 4, "max_positions": 64, "eos_token_id": 0}
MODEL = make_model(decoder_config(hf_config("llama", **SIZES)))
LOSS = functools.partial(dpo_loss, beta=0.1)


def random_pairs(count, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 10, size=(count, 3))
    return [Encoded(*(rng.integers(1, 64, n).astype(np.int32) for n in sizes), uid=f"{i}") for i, sizes in enumerate(lengths)]


PAIRS = random_pairs(7)  # one less than a batch of 8: every way of running meets a padding example
REF = np.random.default_rng(1).normal(-30, 2, size=(7, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def tx():
    return make_optimizer(1e-3, max_grad_norm=1.0)


def layout(kind):
    return {
        "plain": Layout("plain", length=32, scored=16, rows_multiple=8),
        "shared": Layout("shared", length=32, scored=32, rows_multiple=8),
        "packed": Layout("packed", length=64, scored=48, per_row=3, rows_multiple=4),
    }[kind]


def rows_of(kind):
    return layout(kind).rows(PAIRS, ref_logps=REF)


@pytest.fixture(scope="module")
def one_device(variables, tx):
    """The result every other way must repeat: plain rows, one device, one batch."""
    step = jax.jit(functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS))
    return step(init_state(variables, tx), rows_of("plain"))


def assert_same(result, expected):
    (state, metrics), (expected_state, expected_metrics) = result, expected
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-5), state.params, expected_state.params)
    assert int(state.step) == int(expected_state.step) == 1


@pytest.mark.parametrize(("kind", "microbatches"), [("plain", 4), ("shared", 1), ("packed", 4)])
def test_layouts_and_microbatches_agree(kind, microbatches, variables, tx, one_device):
    step = jax.jit(functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS, microbatches=microbatches))
    assert_same(step(init_state(variables, tx), rows_of(kind)), one_device)


def mean_loss(variables, rows):
    logps = completion_logps(MODEL, variables, rows)
    return LOSS(logps, rows.ref_logps)[0], {}


def test_gradients_of_bfloat16_parameters_are_summed_in_float32(variables):
    """Four microbatches of bfloat16 parameters: closer to the sum of their gradients in float32 than one bfloat16 rounding."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    grads = jax.jit(functools.partial(mean_grads, mean_loss, microbatches=4))
    (ours, _), rows = grads(half, rows_of("shared")), rows_of("shared")
    total = rows.weight.sum()
    grad = jax.jit(jax.grad(lambda v, part: (mean_loss(v, part)[0] * part.weight).sum() / total))
    parts = [grad(half, jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], rows)) for i in range(4)]
    expected = jax.tree.map(lambda *xs: np.sum([np.asarray(x, np.float32) for x in xs], axis=0), *parts)
    for mine, sum_ in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, sum_, rtol=0, atol=2e-5 * np.abs(sum_).max())


def test_microbatches_add_to_one_sum_of_gradients():
    """Not a second copy beside the first, as large as all parameters, is in memory at any time."""
    sizes = SIZES | {"width": 128, "layers": 16, "mlp_width": 512}
    model = make_model(decoder_config(hf_config("llama", **sizes)), remat="full")
    variables = jax.eval_shape(model.init, jax.random.key(0))

    def objective(variables, rows):
        logps = completion_logps(model, variables, rows)
        return LOSS(logps, rows.ref_logps)[0], {}

    rows = rows_of("shared")
    grads = jax.jit(functools.partial(mean_grads, objective, microbatches=4)).lower(variables, rows)
    memory = grads.compile().memory_analysis()
    assert memory.output_size_in_bytes > 12e6  # the sums themselves
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 4


@pytest.mark.parametrize("make", [single_device, pmap_partitioner])
def test_partitioners_agree(make, variables, tx, one_device):
    partitioner = make()
    step = functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS, axis_name=partitioner.axis_name)
    state, metrics = partitioner.compile_step(step)(partitioner.put_state(init_state(variables, tx)), rows_of("packed"))
    assert_same((partitioner.get_state(state), metrics), one_device)


def test_pmap_of_the_reference_pass_keeps_the_order(variables):
    results = []
    for partitioner in (single_device(), pmap_partitioner()):
        compiled = partitioner.compile_map(functools.partial(reference_logps, MODEL))
        results.append(compiled(partitioner.put_variables(variables), rows_of("shared")))
    assert results[0].shape == (8, 2)
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_shard_map_agrees(variables, tx, one_device, checked, microbatches):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS, axis_name="data", microbatches=microbatches)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=checked)
    assert_same(jax.jit(mapped)(init_state(variables, tx), rows_of("shared")), one_device)


def test_a_sharded_batch_under_jit_agrees(variables, tx, one_device):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.device_put(rows_of("plain"), jax.sharding.NamedSharding(mesh, P("data")))
    step = jax.jit(functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS))
    assert_same(step(init_state(variables, tx), rows), one_device)


def toy_model(width=8):
    """A model of one's own: each position sees the mean of the embeddings in its key interval."""

    def init(key):
        return {"params": {"embed": jax.random.normal(key, (64, width)), "head": jax.random.normal(key, (width, 64))}}

    def forward(variables, rows):
        keys = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None, None, :]
        seen = (keys >= rows.k_start[:, :, None]) & (keys < rows.k_end[:, :, None])
        embedded = variables["params"]["embed"][rows.tokens]
        return jnp.tanh(seen.astype(embedded.dtype) @ embedded / seen.sum(axis=-1, keepdims=True).astype(embedded.dtype))

    return Model(init=init, forward=forward, unembed=lambda variables, hidden: hidden @ variables["params"]["head"])


def test_gradient_is_the_one_of_the_paper():
    """Section 4: `-beta sigmoid(-margin) (grad log pi(y_w) - grad log pi(y_l))`, through a model, in float64."""
    with jax.enable_x64(True):
        model = toy_model()
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), model.init(jax.random.key(0)))
        rows = Layout("shared", length=32, scored=32).rows(PAIRS[:1], ref_logps=REF[:1])
        rows = rows.replace(ref_logps=rows.ref_logps.astype(np.float64), weight=rows.weight.astype(np.float64))
        objective = functools.partial(mean_grads, lambda v, r: (LOSS(completion_logps(model, v, r), r.ref_logps)[0], {}))
        grads, _ = jax.jit(objective)(variables, rows)
        logps = jax.jit(functools.partial(completion_logps, model))
        jacobian = jax.jit(jax.jacrev(lambda v: completion_logps(model, v, rows)[0]))(variables)
        log_ratios = np.asarray(logps(variables, rows)) - rows.ref_logps
        push = -0.1 / (1 + np.exp(0.1 * (log_ratios[0, 0] - log_ratios[0, 1])))
        expected = jax.tree.map(lambda sides: push * np.asarray(sides[0] - sides[1]), jacobian)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), grads, expected)


def test_texts_of_one_token_have_nothing_to_score(variables):
    logps = jax.jit(functools.partial(sequence_logps, MODEL))(variables, causal_rows([[5], [6]]))
    assert logps.tolist() == [0, 0]


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.grad, has_aux=True)
def in_chunks(variables, chunk):
    logps = sequence_logps(MODEL, variables, rows_of("packed"), chunk=chunk)
    return jnp.sum(logps * np.arange(logps.shape[0], dtype=np.float32)), logps


@pytest.mark.parametrize("chunk", [8, 100])
def test_chunked_head_equals_dense(chunk, variables):
    dense_grads, dense = in_chunks(variables, 10**6)
    grads, chunked = in_chunks(variables, chunk)
    np.testing.assert_allclose(chunked, dense, rtol=1e-6, atol=1e-5)
    scale = float(optax.tree.norm(dense_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), grads, dense_grads)


def test_no_buffer_holds_the_logits_of_all_tokens():
    """8,192 scored tokens x 128,256 entries would be 4.2 GB. Both directions, as compiled: nothing has more than a chunk's."""
    vocabulary, width, scored = 128_256, 8, 4096
    head = Model(init=None, forward=None, unembed=lambda table, hidden: hidden @ table.T)

    def total(table, hidden, target):
        return token_logps(head, table, hidden, target).sum()

    arguments = [((vocabulary, width), jnp.float32), ((2, scored, width), jnp.float32), ((2, scored), jnp.int32)]
    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), compiler_options={"xla_backend_optimization_level": 0})
    compiled = step.lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments)).compile()
    sizes = [math.prod(lengths) for _, lengths in shapes(compiled.as_text()) if vocabulary in lengths]
    assert max(sizes) == CHUNK * vocabulary
    chunks = 2 * scored // CHUNK
    assert (chunks, vocabulary, width) not in [lengths for _, lengths in shapes(compiled.as_text())]  # nor the head for each
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * CHUNK * vocabulary


def test_a_wide_head_takes_more_positions_at_a_time():
    assert (head_chunk(64), head_chunk(4096)) == (CHUNK, 4096)
    head = Model(init=None, forward=None, unembed=lambda table, hidden: hidden @ table.T)
    arguments = [((500, 2048), jnp.float32), ((1, 4096, 2048), jnp.float32), ((1, 4096), jnp.int32)]
    shapes_of = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    program = str(jax.make_jaxpr(functools.partial(token_logps, head))(*shapes_of))
    assert "f32[2,1,2048,2048]" in program  # two chunks, one device, as many positions as numbers in each


def test_chunks_without_a_used_position_are_not_computed():
    """64 of 192 positions are used, wherever they are, and make up one chunk. NaN in the others reaches nothing."""
    random = np.random.default_rng(0)
    used = random.permutation(192).reshape(2, 96) < 64
    hidden = np.where(used[:, :, None], random.normal(size=(2, 96, 4)), np.nan).astype(np.float32)
    target = random.integers(0, 32, size=(2, 96)).astype(np.int32)
    table = random.normal(size=(32, 4)).astype(np.float32)
    head = Model(init=None, forward=None, unembed=lambda table, hidden: hidden @ table.T)

    def total(table, hidden, target, used):
        logps = token_logps(head, table, hidden, target, used=used, chunk=64)
        return jnp.where(used, logps, 0.0).sum()

    with_gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, (d_table, d_hidden) = with_gradients(table, hidden, target, used)
    together = (hidden[used][None], target[used][None], np.ones((1, 64), bool))
    expected, (d_expected, d_used) = with_gradients(table, *together)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(d_table, d_expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_hidden[used], d_used[0], rtol=1e-5, atol=1e-6)
    assert (d_hidden[~used] == 0).all()


def test_the_step_holds_no_reference_model(variables, tx):
    """Its inputs are one state, whose parameters occur once, and rows; nothing else of the model's size is closed over."""
    step = functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS)
    jaxpr = jax.make_jaxpr(step)(init_state(variables, tx), rows_of("packed"))
    size = sum(leaf.size for leaf in jax.tree.leaves(variables))
    state_size = sum(leaf.size for leaf in jax.tree.leaves(init_state(variables, tx)))
    rows_size = sum(leaf.size for leaf in jax.tree.leaves(rows_of("packed")))
    inputs = sum(int(np.prod(v.aval.shape)) for v in jaxpr.jaxpr.invars)
    constants = sum(int(np.size(c)) for c in jaxpr.consts)
    assert inputs == state_size + rows_size
    assert state_size < 2.1 * size  # parameters and RMSprop's second moment
    assert constants < 0.01 * size


def test_padding_examples_and_order_do_not_matter():
    model, tx = toy_model(), optax.sgd(0.1)
    variables, step = model.init(jax.random.key(0)), jax.jit(functools.partial(sft_step, model=model, tx=tx))
    texts = [(p.prompt, p.chosen) for p in PAIRS]
    cases = ((1, texts), (8, texts), (1, texts[::-1]))
    rows = [Layout("plain", length=32, scored=16, rows_multiple=multiple).rows(these) for multiple, these in cases]
    expected, *others = (step(init_state(variables, tx), one) for one in rows)
    for found in others:
        assert_same(found, expected)


def test_microbatches_without_an_example_are_not_computed(tx):
    """2 of 4: NaN in them, which times weight 0 is NaN, reaches nothing."""
    model = toy_model()
    variables = model.init(jax.random.key(0))
    rows = Layout("shared", length=32, scored=32, rows_multiple=12).rows(PAIRS[:6], ref_logps=REF[:6])
    steps = [jax.jit(functools.partial(dpo_step, model=model, tx=tx, loss=LOSS, microbatches=n)) for n in (1, 4)]
    expected = steps[0](init_state(variables, tx), rows)
    rows = rows.replace(ref_logps=np.where(rows.weight[:, None] > 0, rows.ref_logps, np.nan))
    assert np.isnan(float(steps[0](init_state(variables, tx), rows)[1]["loss"]))
    assert_same(steps[1](init_state(variables, tx), rows), expected)


def test_sft_step_learns_a_text(variables):
    tx = make_optimizer(3e-3, name="adamw", max_grad_norm=1.0)
    step = jax.jit(functools.partial(sft_step, model=MODEL, tx=tx))
    rows = Layout("plain", length=32, scored=16).rows([(PAIRS[0].prompt, PAIRS[0].chosen)])
    state = init_state(variables, tx)
    losses = []
    for _ in range(60):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    assert float(metrics["tokens"]) == len(PAIRS[0].chosen)
    assert float(metrics["nll_per_token"]) < 0.1 < losses[0] / len(PAIRS[0].chosen)
    assert float(metrics["mean_token_accuracy"]) == 1


@pytest.mark.parametrize("microbatches", [1, 2])
def test_token_accuracy_is_the_share_of_most_likely_tokens(variables, microbatches):
    rows = Layout("plain", length=32, scored=16, rows_multiple=8).rows([(pair.prompt, pair.chosen) for pair in PAIRS])
    logits = jax.jit(lambda v: MODEL.unembed(v, scored_hidden(MODEL, v, rows)))(variables)
    best, scored = np.argmax(logits, axis=-1), rows.slot < rows.slots
    target = np.where(np.arange(rows.target.size).reshape(rows.target.shape) % 2, best, rows.target)  # so that some are hit
    hits = (target == best)[scored]
    assert 0 < hits.sum() < len(hits)
    step = functools.partial(sft_step, model=MODEL, tx=optax.sgd(1e-3), microbatches=microbatches)
    _, metrics = jax.jit(step)(init_state(variables, optax.sgd(1e-3)), rows.replace(target=target.astype(np.int32)))
    assert float(metrics["mean_token_accuracy"]) == pytest.approx(float(hits.mean()), rel=1e-6)


def test_two_numbers_of_a_token_come_out_of_the_head_in_chunks(variables):
    hidden = jax.random.normal(jax.random.key(1), (3, 16, 32))
    target = jax.random.randint(jax.random.key(2), (3, 16), 0, 64)
    used = np.arange(48).reshape(3, 16) % 5 > 1

    def of(chunk, read):
        def summed(hidden):
            found = token_logps(MODEL, variables, hidden, target, used=used, chunk=chunk, read=read)
            logps = found if found.ndim == 2 else found[..., 0]
            return jnp.where(used, logps, 0).sum(), found

        (_, found), gradient = jax.jit(jax.value_and_grad(summed, has_aux=True))(hidden)
        return np.asarray(found)[used], np.asarray(gradient)

    logps, gradient = of(None, log_probability)
    for chunk in (None, 8):
        both, its = of(chunk, log_probability_and_hit)
        np.testing.assert_allclose(both[:, 0], logps, rtol=1e-5)
        np.testing.assert_allclose(its, gradient, atol=1e-6)
        best = np.argmax(MODEL.unembed(variables, hidden), axis=-1)
        np.testing.assert_array_equal(both[:, 1], (best == target)[used])


def test_losses_lead_to_different_updates(tx):
    model = toy_model()
    state = init_state(model.init(jax.random.key(0)), tx)

    def taken(loss):
        return jax.jit(functools.partial(dpo_step, model=model, tx=tx, loss=loss))(state, rows_of("shared"))[1]

    expected = taken(LOSS)
    for loss in (functools.partial(ipo_loss, beta=0.1), functools.partial(dpo_loss, beta=0.1, label_smoothing=0.2)):
        metrics = taken(loss)
        assert abs(float(metrics["loss"]) - float(expected["loss"])) > 1e-3
        np.testing.assert_allclose(metrics["logps/chosen"], expected["logps/chosen"], rtol=1e-5)


def test_extras_reach_the_loss_with_their_pairs(tx):
    """A loss with a margin and lengths of each pair: the same number from every layout, in microbatches and under pmap."""
    model = toy_model()
    variables = model.init(jax.random.key(0))
    gap = np.arange(len(PAIRS), dtype=np.float32)

    def loss(logps, ref_logps, gap, lengths):
        ratios = (logps - ref_logps) / jnp.maximum(lengths, 1)
        return (ratios[:, 0] - ratios[:, 1] - gap) ** 2, ratios

    def with_extras(kind):
        rows = rows_of(kind)
        return rows.replace(extras={"gap": examples_to_rows(gap, rows), "lengths": jax.jit(completion_lengths)(rows)})

    lengths = np.float32([[len(pair.chosen), len(pair.rejected)] for pair in PAIRS])
    logps = jax.jit(functools.partial(completion_logps, model))(variables, plain_rows(PAIRS, length=32))
    expected = loss(logps, REF, gap, lengths)[0].mean()
    step = functools.partial(dpo_step, model=model, tx=tx, loss=loss)
    for kind, microbatches in (("plain", 1), ("packed", 4)):
        run = jax.jit(functools.partial(step, microbatches=microbatches))
        _, metrics = run(init_state(variables, tx), with_extras(kind))
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    pmap = pmap_partitioner()
    run = pmap.compile_step(functools.partial(step, axis_name=pmap.axis_name))
    _, metrics = run(pmap.put_state(init_state(variables, tx)), with_extras("shared"))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gap'"):
        jax.eval_shape(
            functools.partial(dpo_step, model=model, tx=tx, loss=LOSS), init_state(variables, tx), with_extras("plain")
        )


def test_a_collection_is_trained_or_frozen(variables, tx):
    """Merged, one would hide the other: the step would train nothing, or parameters that the model does not read."""
    with pytest.raises(ValueError, match="params: a collection is trained or frozen, not both"):
        init_state(variables, tx, frozen=variables)


def test_frozen_weights_are_read_and_not_changed(variables, tx):
    frozen, trained = {"params": {}}, dict(variables["params"])
    frozen["params"] = {name: trained.pop(name) for name in list(trained)[:1]}
    # The collections are merged one level deep, so a frozen tree of its own collection is passed whole.
    state = init_state({"other": trained}, tx, frozen=frozen)
    assert set(state.variables) == {"params", "other"}
    assert dataclasses.replace(state, frozen={}).variables == {"other": trained}


def test_a_batch_that_does_not_divide_is_refused(variables, tx):
    step = functools.partial(dpo_step, model=MODEL, tx=tx, loss=LOSS, microbatches=3)
    with pytest.raises(ValueError, match="8 rows cannot be split into 3"):
        step(init_state(variables, tx), rows_of("shared"))
    with pytest.raises(ValueError, match="cannot be split equally over 3 devices"):
        split_rows(rows_of("shared"), 3)


# Rankings

RANKING_LOSS = functools.partial(plackett_luce_loss, beta=0.1)


def random_rankings(count, completions):
    rng = np.random.default_rng(2)
    texts = [[rng.integers(1, 64, n).astype(np.int32) for n in rng.integers(2, 10, size=completions + 1)] for _ in range(count)]
    rankings = [(prompt, ranked) for prompt, *ranked in texts]
    return rankings, rng.normal(-30, 2, size=(count, completions)).astype(np.float32)


def test_a_step_on_rankings_of_two_is_a_step_on_pairs(variables, tx):
    pairs = plain_rows(PAIRS, length=32, ref_logps=REF)
    rankings = ranking_rows([(p.prompt, [p.chosen, p.rejected]) for p in PAIRS], length=32, ref_logps=REF)
    (state, metrics), (paired, expected) = (
        jax.jit(functools.partial(dpo_step, model=MODEL, tx=tx, loss=loss))(init_state(variables, tx), rows)
        for rows, loss in ((rankings, RANKING_LOSS), (pairs, LOSS))
    )
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), state.params, paired.params)


@pytest.mark.parametrize("partitioner", [single_device, pmap_partitioner])
def test_microbatches_devices_and_padding_of_rankings_agree(partitioner, tx):
    """7 rankings of 3 at once, and the same 7 with a padding example in parts: 2 microbatches on each device."""
    model, partitioner = toy_model(), partitioner()
    rankings, ref = random_rankings(7, 3)
    step = functools.partial(dpo_step, model=model, tx=tx, loss=RANKING_LOSS)
    whole, expected = jax.jit(step)(
        init_state(model.init(jax.random.key(0)), tx), ranking_rows(rankings, length=20, ref_logps=ref)
    )
    filled = ranking_rows(rankings, length=20, ref_logps=ref, at_least=8)
    compiled = partitioner.compile_step(functools.partial(step, microbatches=2, axis_name=partitioner.axis_name))
    state, metrics = compiled(partitioner.put_state(init_state(model.init(jax.random.key(0)), tx)), filled)
    assert_same((partitioner.get_state(state), metrics), (whole, expected))


def test_metrics_of_a_ranking_are_of_its_best_and_its_worst():
    logps, ref = np.float32([[-3, -9, -5], [-8, -1, -2]]), np.float32([[-4, -4, -7], [-4, -4, -4]])
    metrics = preference_metrics(jnp.asarray(logps), ref, rewards=jnp.asarray(0.5 * (logps - ref)))
    for name, expected in {
        "rewards/chosen": [0.5, -2],
        "rewards/rejected": [1, 1],
        "rewards/margins": [-0.5, -3],
        "rewards/accuracies": [0, 0],
        "logps/chosen": [-3, -8],
        "logps/rejected": [-5, -2],
        "displacement/chosen": [1, -4],
        "displacement/rejected": [2, 2],
        "kl_reference_policy": [2 / 3, -1 / 3],
    }.items():
        np.testing.assert_allclose(metrics.pop(name), expected, rtol=1e-6, err_msg=name)
    assert not metrics


def test_a_pair_loss_on_rankings_is_refused():
    rankings, ref = random_rankings(2, 3)
    state = init_state((model := toy_model()).init(jax.random.key(0)), optax.sgd(0.1))
    step = jax.jit(functools.partial(dpo_step, model=model, tx=optax.sgd(0.1), loss=LOSS))
    with pytest.raises(ValueError, match="each example has 3 completions: use plackett_luce_loss"):
        step(state, ranking_rows(rankings, length=20, ref_logps=ref))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda losses, rewards: (losses[:, None], rewards), r"loss: expected a value .* got shape \(8, 1\)"),
        (
            lambda losses, rewards: (losses.mean(), rewards),
            r"loss: expected a value for each of 8 examples, got shape \(\)",
        ),
        (lambda losses, rewards: losses, r"a loss returns \(losses \[P\], rewards \[8, 2\]\), not \(8,\)"),
        (lambda losses, rewards: (losses, rewards[:, 0]), r"rewards \[8, 2\]\), not \(\(8,\), \(8,\)\)"),
    ],
)
def test_a_loss_of_another_shape_is_refused(variables, tx, wrong, told):
    def loss(logps, ref_logps):
        return wrong(*LOSS(logps, ref_logps))

    with pytest.raises((ValueError, TypeError), match=told):
        jax.eval_shape(functools.partial(dpo_step, model=MODEL, tx=tx, loss=loss), init_state(variables, tx), rows_of("plain"))
