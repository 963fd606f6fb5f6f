"""A model that reads rows wrong is found, with its layout and the cause; one that reads them right passes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_jax
from dpo_jax import Encoded, Model
from dpo_jax.checks.model import WrongModel, check_model

WIDTH, VOCAB, POSITIONS = 16, 64, 128
CHECK = functools.partial(check_model, gradients=False)


def random_pairs(count):
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 10, size=(count, 3))
    return [
        Encoded(*(rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths), uid=f"{i}") for i, lengths in enumerate(sizes)
    ]


PAIRS = random_pairs(5)


def init(key):
    shapes = {"embed": (VOCAB, WIDTH), "position": (POSITIONS, WIDTH), "query": (WIDTH, WIDTH), "value": (WIDTH, WIDTH)}
    keys = jax.random.split(key, len(shapes))
    return {"params": {name: 0.5 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}}


VARIABLES = init(jax.random.key(0))


def forward(variables, rows, *, seen=None, positions=None):
    """One layer of attention, in which token x sees key k where `seen(rows, x, k)`."""
    p = variables["params"]
    x = p["embed"][rows.tokens] + p["position"][rows.positions if positions is None else positions(rows)]
    index = jnp.arange(x.shape[1])
    at, k = index[None, :, None], index[None, None, :]
    mask = (seen or interval)(rows, at, k)
    scores = jnp.where(mask, x @ p["query"] @ x.mT, -jnp.inf)
    return x + jax.nn.softmax(scores) @ x @ p["value"]


def interval(rows, at, k):
    return (rows.k_start[:, :, None] <= k) & (k < rows.k_end[:, :, None])


def unembed(variables, hidden):
    return hidden @ variables["params"]["embed"].T


def model_of(**changes):
    return Model(init, functools.partial(forward, **changes), unembed)


def index_of(rows):
    return jnp.broadcast_to(jnp.arange(rows.tokens.shape[1]), rows.tokens.shape)


CAUSAL = model_of(
    seen=lambda rows, at, k: jnp.broadcast_to(k <= at, (len(rows.tokens), *jnp.broadcast_shapes(at.shape, k.shape)[1:]))
)


def found(model, **options):
    """{layout: the lines about it} of the error."""
    with pytest.raises(WrongModel) as error:
        CHECK(model, VARIABLES, PAIRS, **options)
    blocks = re.split(r"\n(?=  \w+ rows)", str(error.value))[1:]
    return {block.split()[0]: block for block in blocks}


def test_a_right_model_passes_with_its_gradients():
    agreements = check_model(model_of(), VARIABLES, PAIRS)
    assert list(agreements) == ["plain", "shared", "packed"]
    assert agreements["plain"] == (0, 0)
    for name in ("shared", "packed"):
        assert 0 < agreements[name].nats < 1e-4
        assert 0 < agreements[name].gradients < 1e-5


def test_a_plain_causal_model_is_for_plain_rows_only():
    """The silent one: right on plain rows, and off by whole nats on the others."""
    lines = found(CAUSAL)
    assert "plain rows are right" in lines["plain"]
    for name in ("shared", "packed"):
        off = float(re.search(r"differ from plain rows by up to (\S+) nats", lines[name])[1])
        assert off > 0.5
        assert "wrong" in lines[name]
        assert "forward ignores k_start and k_end: use plain_rows" in lines[name]
    assert list(CHECK(CAUSAL, VARIABLES, PAIRS, layouts=["plain"])) == ["plain"]


def test_positions_from_the_place_in_the_row():
    lines = found(model_of(positions=index_of))
    assert "right" in lines["plain"]
    assert "forward ignores positions" in lines["shared"]
    assert "k_start" not in lines["shared"]


def test_no_positions_at_all_are_right():
    """A model without position embeddings ignores `positions`, and is none the worse."""
    assert CHECK(model_of(positions=lambda rows: 0 * rows.positions), VARIABLES, PAIRS)


def test_what_is_seen_and_must_not_be():
    for seen, layout, cause in (
        (lambda rows, at, k: interval(rows, at, k) | (k == rows.tokens.shape[1] - 1), "plain", "padding is seen"),
        (lambda rows, at, k: interval(rows, at, k) | (k == at + 1), "plain", "tokens see others outside"),
        (lambda rows, at, k: (k < rows.k_end[:, :, None]) & (at >= 0), "packed", "tokens see others outside"),
    ):
        lines = found(model_of(seen=seen))[layout]
        assert "wrong" in lines
        assert cause in lines


def test_rows_of_a_batch_that_influence_each_other():
    mixing = Model(init, lambda v, rows: forward(v, rows) + 0.1 * forward(v, rows).mean(axis=(0, 1), keepdims=True), unembed)
    assert "rows of a batch influence each other" in found(mixing, layouts=["plain"])["plain"]


def test_wrong_gradients_behind_right_values():
    @jax.custom_vjp
    def twice(x):
        return x

    twice.defvjp(lambda x: (x, None), lambda _, d: (d.at[:, :16].multiply(2.0),))
    with pytest.raises(WrongModel, match=r"shared rows are wrong.*\n *the gradients are wrong, the log-probabilities right"):
        check_model(Model(init, lambda v, rows: twice(forward(v, rows)), unembed), VARIABLES, PAIRS)


def test_shapes_are_looked_at_first():
    flat = Model(init, lambda v, rows: forward(v, rows).reshape(-1, WIDTH), unembed)
    with pytest.raises(WrongModel, match=r"forward returns \(\d+, 16\).*hidden\[R, L, D\] is expected"):
        CHECK(flat, VARIABLES, PAIRS)
    several = Model(init, lambda v, rows: (forward(v, rows), None), unembed)
    with pytest.raises(WrongModel, match=r"forward returns tuple for .*hidden\[R, L, D\] is expected"):
        CHECK(several, VARIABLES, PAIRS)
    rows = dpo_jax.plain_rows(PAIRS, length=32)
    for wrong, found in ((flat, r"an array \[320, 16\]"), (several, "tuple")):
        with pytest.raises(ValueError, match=rf"model.forward returns {found} for rows of \[10, 32\] tokens: .*check_model"):
            dpo_jax.completion_logps(wrong, VARIABLES, rows)
    small = Model(init, forward, lambda v, hidden: hidden @ v["params"]["embed"][:8].T)
    with pytest.raises(WrongModel, match="largest token id is"):
        CHECK(small, VARIABLES, PAIRS)
    with pytest.raises(ValueError, match="two pairs or more"):
        CHECK(model_of(), VARIABLES, PAIRS[:1])
    with pytest.raises(ValueError, match="layouts of plain, shared, packed"):
        CHECK(model_of(), VARIABLES, PAIRS, layouts=["causal"])
    assert [*CHECK(model_of(), VARIABLES, PAIRS, layouts="plain", gradients=False)] == ["plain"]


def test_an_error_of_the_model_says_which_rows_it_was_given():
    def stubborn(variables, rows):
        return forward(variables, rows, positions=lambda rows: jnp.arange(42)[None] if rows.slots == 2 else rows.positions)

    with pytest.raises(Exception) as error:
        CHECK(Model(init, stubborn, unembed), VARIABLES, PAIRS)
    assert "check_model failed on shared rows, tokens[R, L] = (5, " in "".join(error.value.__notes__)


def test_nan_is_named():
    broken = jax.tree.map(lambda x: x * jnp.nan, VARIABLES)
    with pytest.raises(WrongModel, match="plain rows are wrong\n    hidden states are NaN or infinite"):
        CHECK(model_of(), broken, PAIRS, layouts=["plain"])


# The log-probabilities of a data set


@pytest.mark.parametrize("layout", ["plain", "shared", "packed"])
def test_reference_logps_of_a_data_set_are_in_its_order(layout):
    model = model_of()
    expected = np.concatenate(
        [dpo_jax.reference_logps(model, VARIABLES, dpo_jax.plain_rows([pair], length=32)) for pair in PAIRS]
    )
    seen = []
    ours = dpo_jax.reference_logps_of(
        model, VARIABLES, PAIRS, layout=layout, batch=2, progress=lambda done, total: seen.append((done, total))
    )
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_the_default_layout_is_right_for_a_model_without_intervals():
    expected = dpo_jax.reference_logps_of(model_of(), VARIABLES, PAIRS)
    np.testing.assert_allclose(dpo_jax.reference_logps_of(CAUSAL, VARIABLES, PAIRS), expected, rtol=1e-5)


@pytest.mark.parametrize("devices", ["pmap", "mesh"])
def test_reference_logps_on_several_devices(devices):
    from dpo_jax.runtime.mesh import make_mesh
    from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner

    model = model_of()._replace(axes=lambda: jax.tree.map(lambda x: jax.sharding.PartitionSpec(None, None), VARIABLES))
    partitioner = pmap_partitioner() if devices == "pmap" else mesh_partitioner(make_mesh(data=2, fsdp=2, tensor=1), model)
    ours = dpo_jax.reference_logps_of(
        model, partitioner.put_variables(VARIABLES), PAIRS, layout="shared", batch=4, partitioner=partitioner
    )
    np.testing.assert_allclose(ours, dpo_jax.reference_logps_of(model, VARIABLES, PAIRS), rtol=1e-5)


def test_a_second_pass_compiles_nothing():
    traced = []

    def counting(variables, rows):
        traced.append(rows.tokens.shape)
        return forward(variables, rows)

    model = Model(init, counting, unembed)
    for _ in range(2):
        dpo_jax.reference_logps_of(model, VARIABLES, PAIRS, batch=2)
    assert len(traced) == 1


def test_a_broken_reference_names_the_pair():
    from dpo_jax.reference import BrokenReference

    poisoned = {"params": {**VARIABLES["params"], "embed": VARIABLES["params"]["embed"].at[PAIRS[3].chosen[-1]].set(jnp.nan)}}
    with pytest.raises(BrokenReference, match=r"0: .* gives the log-probabilities nan"):
        dpo_jax.reference_logps_of(model_of(), poisoned, PAIRS)
    assert dpo_jax.reference_logps_of(model_of(), VARIABLES, []).shape == (0, 2)
    for function in (dpo_jax.reference_logps_of, check_model):
        with pytest.raises(TypeError, match=r"use dpo_jax\.encode; got dict"):
            function(model_of(), VARIABLES, [{"prompt": "a"}] * 2)


def test_a_broken_reference_says_what_was_longest_and_largest():
    from dpo_jax.reference import BrokenReference

    long = dpo_jax.Encoded(np.int32([5]), np.int32([6] * 40), np.int32([7]))
    short = dpo_jax.Encoded(np.int32([5]), np.int32([16, 6]), np.int32([7]))
    late = Model(init, lambda v, rows: jnp.where(rows.positions[..., None] < 39, forward(v, rows), jnp.nan), unembed)
    with pytest.raises(BrokenReference, match=r"pair 2: .*\(the largest here is 7\).*\(the longest here has 41 tokens\)"):
        dpo_jax.reference_logps_of(late, VARIABLES, [short, short, long], batch=1)


def test_arguments_of_a_pass_are_looked_at_first():
    config = dpo_jax.decoder_config(
        dpo_jax.hf_config("gpt2", vocab_size=20, width=8, layers=1, heads=1, max_positions=8, eos_token_id=0)
    )
    for message, options in (
        ("layout='groups': use 'plain', 'shared' or 'packed'", {"layout": "groups"}),
        ("batch=0 must be at least 1", {"batch": 0}),
        (
            "variables must be {'params': ...}.*these have embed",
            {"variables": {"embed": 1}, "model": Model(init, forward, unembed)._replace(config=config)},
        ),
    ):
        given = {"model": model_of(), "variables": VARIABLES, "pairs": PAIRS, **options}
        with pytest.raises(ValueError, match=message):
            dpo_jax.reference_logps_of(**given)
    with pytest.raises(TypeError, match="a sequence of Encoded .* got generator"):
        dpo_jax.reference_logps_of(model_of(), VARIABLES, (pair for pair in PAIRS))  # pyright: ignore[reportArgumentType]
