import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.layout import causal_rows, completion_rows
from dpo_jax.head import token_logps
from dpo_jax.logps import sequence_logps
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.sampling import generate, left_pad, loop
from dpo_jax.sampling.draw import choose
from dpo_jax.types import Model

EOS, V = 3, 17
PROMPTS = [[5, 6, 7], [4], [9, 8, 7, 6, 5, 4, 9, 10, 11], [1, 2]]


def tiny(family):
    config = hf_config(
        family, vocab_size=V, width=16, layers=2, heads=2, head_size=8, mlp_width=32, max_positions=32, eos_token_id=EOS
    )
    if "sliding_window" in config:
        config["sliding_window"] = 4
    model = make_model(decoder_config(config))
    variables = jax.jit(model.init)(jax.random.key(1))
    return model, jax.tree.map(lambda x: x * 4, variables)  # far from uniform, so that choices are clear


@pytest.fixture(scope="module", params=["gpt_neox", "gemma3_text"])
def model_and_variables(request):
    return tiny(request.param)


def sample(model, variables, prompts, *, seed=0, new=12, **options):
    run = jax.jit(functools.partial(generate, model, max_new_tokens=new, eos_id=EOS, **options))
    return jax.device_get(run(variables, *left_pad(prompts), jax.random.key(seed)))


def test_left_pad():
    tokens, lengths = left_pad([[1, 2, 3], [4]], multiple_of=4)
    np.testing.assert_array_equal(tokens, [[0, 1, 2, 3], [0, 0, 0, 4]])
    np.testing.assert_array_equal(lengths, [3, 1])
    assert left_pad(PROMPTS)[0].shape == (4, 16)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        left_pad([[1], []])


def test_greedy_is_argmax_of_the_forward_pass(model_and_variables):
    model, variables = model_and_variables
    samples = sample(model, variables, PROMPTS, temperature=0)

    @jax.jit
    def next_token(tokens, last):
        rows = causal_rows(np.zeros(tokens.shape)).replace(tokens=tokens)
        return model.unembed(variables, model.forward(variables, rows)[:, last]).argmax()

    for prompt, tokens, length in zip(PROMPTS, samples.tokens, samples.lengths, strict=True):
        text = np.zeros((1, 24), np.int32)
        text[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + length):
            text[0, at] = next_token(text, at - 1)
        np.testing.assert_array_equal(text[0, len(prompt) : len(prompt) + length], tokens[:length])


def test_logps_are_those_of_the_forward_pass(model_and_variables):
    model, variables = model_and_variables
    samples = sample(model, variables, PROMPTS * 8, temperature=1.3, top_k=9, top_p=0.95)
    ended = samples.lengths < 12
    assert 0 < ended.sum() < 32  # both kinds are here
    for tokens, length in zip(samples.tokens, samples.lengths, strict=True):
        assert EOS not in tokens[: length - 1]
        assert (tokens[length:] == EOS).all()
        assert length == 12 or tokens[length - 1] == EOS
    completions = [
        (np.array(prompt), tokens[:length])
        for prompt, tokens, length in zip(PROMPTS * 8, samples.tokens, samples.lengths, strict=True)
    ]
    rows = completion_rows(completions, length=24)
    expected = jax.jit(functools.partial(sequence_logps, model))(variables, rows)
    np.testing.assert_allclose(samples.logps, expected, rtol=1e-5, atol=1e-5)

    @jax.jit
    def by_token(variables, rows):
        hidden = jnp.take_along_axis(model.forward(variables, rows), rows.source[:, :, None], axis=1)
        return token_logps(model, variables, hidden, rows.target)

    drawn = np.arange(12) < samples.lengths[:, None]
    assert (samples.token_logps[~drawn] == 0).all()
    scored = np.asarray(by_token(variables, rows))[rows.slot < rows.slots]
    np.testing.assert_allclose(samples.token_logps[drawn], scored, rtol=1e-5, atol=1e-5)


def test_beyond_the_position_table_nothing_has_a_probability():
    config = hf_config("gpt2", vocab_size=V, width=16, layers=1, heads=2, max_positions=6, eos_token_id=EOS)
    model = make_model(decoder_config(config))
    run = jax.jit(functools.partial(generate, model, max_new_tokens=6, eos_id=-1))
    samples = run(jax.jit(model.init)(jax.random.key(0)), *left_pad([[1, 2, 3], [1]]), jax.random.key(0))
    # Token n is predicted from position (prompt + n - 1): the prompt of three leaves four tokens that can be predicted.
    np.testing.assert_array_equal(np.isfinite(samples.token_logps), [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(np.isfinite(samples.logps), [0, 1])
    np.testing.assert_array_equal(samples.lengths, [6, 6])


def counting_model(logits, steps):
    """A model that ignores its input: always the same logits. `steps` collects the number of decode calls."""

    def decode(variables, rows, cache):
        jax.debug.callback(lambda: steps.append(1))
        return jnp.zeros((*rows.tokens.shape, 1)), cache

    return Model(
        init=lambda key: {},
        forward=lambda variables, rows: jnp.zeros((*rows.tokens.shape, 1)),
        unembed=lambda variables, hidden: jnp.broadcast_to(jnp.array(logits, jnp.float32), (*hidden.shape[:-1], len(logits))),
        init_cache=lambda batch, length, dtype: jnp.zeros((batch, length), dtype),
        decode=decode,
    )


def test_the_loop_ends_when_every_row_has_ended():
    steps = []
    samples = sample(counting_model([0.0, 1.0, 0.0, 9.0], steps), {}, [[1], [1, 2]], new=50, temperature=0)
    jax.effects_barrier()
    assert len(steps) == 1  # the prompt; no token after EOS is computed
    np.testing.assert_array_equal(samples.lengths, [1, 1])
    steps.clear()
    samples = sample(counting_model([9.0, 1.0, 0.0, 0.0], steps), {}, [[1], [1, 2]], new=5, temperature=0)
    jax.effects_barrier()
    assert len(steps) == 5  # the prompt and the first four tokens; the fifth is not fed
    np.testing.assert_array_equal(samples.tokens, np.zeros((2, 5)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, [0.8, 0.2, 0, 0]),
    ],
)
def test_distribution(options, expected):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1])), (20_000, 4))
    tokens = np.asarray(choose(logits, jax.random.split(jax.random.key(0), 20_000), **options))
    shares = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(shares, expected, atol=0.012)
    assert (shares[np.array(expected) == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1e-4, 1e-7, 1e-10, 2e-38, 1e-38, 1e-45, 1e-300])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}])
def test_a_small_temperature_is_greedy(temperature, options):
    logits = jnp.array([[-3.0, 12.0, 11.9, -40.0, 1.0], [-1e4, -9e3, -9.1e3, -2e4, -9.5e3], [7.0, 2.0, 3.0, 4.0, 50.0]])
    options = {"top_k": 0, "top_p": 1.0} | options
    tokens = choose(logits, jax.random.split(jax.random.key(0), 3), temperature=temperature, **options)
    np.testing.assert_array_equal(tokens, [1, 1, 4])


def test_seeds_differ_and_repeat():
    model = counting_model([0.0] * 8, [])
    run = jax.jit(functools.partial(generate, model, max_new_tokens=12, eos_id=EOS))
    first, again, other = (np.asarray(run({}, *left_pad([[1]] * 4), jax.random.key(seed)).tokens) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len({tuple(tokens) for tokens in first}) > 1


def test_refusals():
    tokens, lengths = left_pad([[1]])
    model = counting_model([0.0, 1.0], [])
    with pytest.raises(ValueError, match="top_p=0"):
        generate(model, {}, tokens, lengths, jax.random.key(0), max_new_tokens=1, eos_id=0, top_p=0)
    with pytest.raises(ValueError, match="init_cache and decode"):
        generate(model._replace(decode=None), {}, tokens, lengths, jax.random.key(0), max_new_tokens=1, eos_id=0)


def test_lengths_and_keys_are_those_of_the_prompts():
    model, (tokens, lengths) = counting_model([0.0, 1.0], []), left_pad([[1], [1, 1]])

    def run(lengths=lengths, key=jax.random.key(0), tokens=tokens):  # noqa: B008
        return generate(model, {}, tokens, lengths, key, max_new_tokens=3, eos_id=0).tokens

    expected = run()
    np.testing.assert_array_equal(run(key=jax.random.PRNGKey(0)), expected)
    np.testing.assert_array_equal(
        run(key=jax.random.split(jax.random.PRNGKey(0))), run(key=jax.random.split(jax.random.key(0)))
    )
    for wrong in (lengths[:1], np.int32(2), lengths[:, None]):
        for called in (run, jax.jit(run)):
            with pytest.raises(
                ValueError, match=r"prompts have shape \(2, 8\) and lengths .*: \[B, Lp\] and \[B\] are expected"
            ):
                called(wrong)
    with pytest.raises(ValueError, match=r"prompts have shape \(8,\)"):
        run(tokens=tokens[0])
    with pytest.raises(ValueError, match="prompt 1 has length 100, and prompts have 8 columns"):
        run(np.array([8, 100]))
    with pytest.raises(ValueError, match="prompt 0 has length 0"):
        run(jnp.array([0, 2]))
    for key in (jax.random.split(jax.random.key(0), 3), jax.random.split(jax.random.PRNGKey(0), 3)):
        with pytest.raises(ValueError, match=r"one for each of the 2 completions, not keys of shape \(3,\)"):
            run(key=key)
    for key in (0, np.zeros(2), None):
        with pytest.raises(TypeError, match=r"key: one of jax.random.key\(seed\), or one for each completion, is expected"):
            run(key=key)


def test_any_of_several_tokens_ends_a_row():
    """Chat models have one for the end of a turn and one for the end of the text; what a model draws first ends the row."""
    model = counting_model([0.0, 1.0, 0.0, 9.0], [])

    def drawn(eos_id):
        run = jax.jit(functools.partial(generate, model, max_new_tokens=4, eos_id=eos_id, temperature=0))
        return run({}, *left_pad([[1], [1, 2]]), jax.random.key(0))

    np.testing.assert_array_equal(drawn(0).lengths, [4, 4])
    samples = drawn((0, 3))
    np.testing.assert_array_equal(samples.lengths, [1, 1])
    np.testing.assert_array_equal(samples.tokens, [[3, 0, 0, 0]] * 2)
    scored = jax.nn.log_softmax(jnp.array([0.0, 1.0, 0.0, 9.0]))[3]
    np.testing.assert_allclose(samples.logps, [scored] * 2, atol=1e-6)  # the token that ends a row, and nothing behind it
    np.testing.assert_array_equal(drawn(np.array([0, 3])).tokens, samples.tokens)
    np.testing.assert_array_equal(drawn(np.int64(3)).lengths, [1, 1])
    for none, told in (((), "empty"), (None, "None; use -1 to sample without EOS")):
        with pytest.raises(ValueError, match=f"eos_id is {told}"):
            drawn(none)


def test_prompts_may_be_lists_and_options_are_static():
    model, variables = tiny("gpt_neox")
    prompts, lengths = left_pad(PROMPTS)
    run = functools.partial(generate, model, max_new_tokens=2, eos_id=EOS)
    expected = jax.jit(run)(variables, prompts, lengths, jax.random.key(0))
    found = run(variables, prompts.tolist(), lengths.tolist(), jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    with pytest.raises(TypeError, match="temperature: expected a Python number, got a traced value: bind it with partial"):
        jax.eval_shape(lambda t: run(variables, prompts, lengths, jax.random.key(0), temperature=t), 0.7)


def equations(jaxpr, *, inside=False):
    """(equation, whether it is within a while loop) of a program and all that it calls."""
    for one in jaxpr.eqns:
        yield one, inside
        for inner in jax.tree.leaves(one.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inside=inside or one.primitive.name == "while")


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "mixtral"])  # the second shares its table with the head
def test_weights_are_rounded_before_the_loop_over_tokens_and_not_for_each_token(family, monkeypatch):
    exact, variables = tiny(family)
    model = make_model(exact.config, dtype=jnp.bfloat16)
    large = {leaf.shape[-2:] for leaf in jax.tree.leaves(variables) if leaf.ndim > 1}
    prompts, key = left_pad(PROMPTS), jax.random.key(0)

    def of(model, **options):
        run = functools.partial(generate, model, max_new_tokens=6, eos_id=EOS, temperature=0, **options)
        traced = jax.jit(run).trace(variables, *prompts, key)
        rounded = [
            inside
            for one, inside in equations(traced.jaxpr.jaxpr)
            if one.primitive.name == "convert_element_type"
            and (one.invars[0].aval.dtype, one.outvars[0].aval.dtype) == (jnp.float32, jnp.bfloat16)
            and one.invars[0].aval.shape[-2:] in large
        ]
        return jax.device_get(traced.lower().compile()(variables, *prompts, key)), sum(rounded)

    ours, within = of(model)
    expected, before = of(model._replace(rounded=None), cache_dtype=jnp.float32)
    assert (within, before > 0) == (0, True)
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_allclose(ours.token_logps, expected.token_logps, rtol=0, atol=0.02)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(variables))  # of 4 bytes, and most of the copy of 2
    monkeypatch.setattr(loop, "MEMORY_FRACTION", 1)
    for limit, copied in ((8 * numbers, True), (5 * numbers, False)):
        device = SimpleNamespace(memory_stats=lambda limit=limit: {"bytes_limit": limit})
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert loop._has_room(model, variables) == copied
        assert not loop._has_room(model, variables, whole=True)  # beside Adam's state, 12 more bytes a number would be needed
