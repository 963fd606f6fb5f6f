"""Several completions of a prompt: read once, and those that have ended make room for the next."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling import EOS, PROMPTS, V, counting_model

from dpo_jax.data.layout import completion_rows
from dpo_jax.evals.completions import COLUMNS, Completer, call_shape, repeats
from dpo_jax.logps import sequence_logps
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.lora import Lora, lora_model, lora_targets
from dpo_jax.runtime.parallel import single_device
from dpo_jax.sampling import generate, left_pad
from dpo_jax.sampling.lanes import idle, refill

NEW = 12


def case(name):
    """A model far from uniform, of grouped queries; with windows shorter than prompt and completion; or with an adapter."""
    family = "gemma3_text" if name == "windows" else "llama"
    sizes = {
        "vocab_size": V,
        "width": 16,
        "layers": 1 if name == "adapter" else 2,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 8,
        "mlp_width": 32,
    }
    config = hf_config(family, **sizes, max_positions=32, eos_token_id=EOS)
    if name == "windows":
        config["sliding_window"] = 4
    model = make_model(decoder_config(config))
    if name == "adapter":
        model = lora_model(model, Lora(2, 4.0, lora_targets("all", model.config)))
    variables = jax.jit(model.init)(jax.random.key(1))
    return model, jax.tree.map(lambda x: x * 4 + 0.01, variables)


@pytest.mark.parametrize("name", ["grouped queries", "windows", "adapter"])
def test_completions_that_share_a_prompt_are_those_that_do_not(name):
    """With a lane for each, and with fewer; their log-probabilities are those of the forward pass without a cache."""
    model, variables = case(name)
    prompts, lengths = left_pad(PROMPTS)
    times = 5
    run = functools.partial(generate, max_new_tokens=NEW, eos_id=EOS)
    keys = jax.random.split(jax.random.key(4), len(PROMPTS) * times)
    repeated = (np.repeat(array, times, axis=0) for array in (prompts, lengths))
    expected = jax.jit(functools.partial(run, model._replace(take_rows=None)))(variables, *repeated, keys)
    assert 1 <= expected.lengths.min() < NEW == expected.lengths.max()
    for lanes, how in ((None, model), (6, model), (3, model._replace(by_layer=None))):  # the last one: as on an accelerator
        found = jax.jit(functools.partial(run, how, completions=times, lanes=lanes))(variables, prompts, lengths, keys)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.token_logps, expected.token_logps, rtol=1e-5, atol=1e-5)
    ids = [tokens[:length] for tokens, length in zip(np.asarray(found.tokens), found.lengths, strict=True)]
    pairs = [(np.array(PROMPTS[number // times]), completion) for number, completion in enumerate(ids)]
    scored = jax.jit(functools.partial(sequence_logps, model))(variables, completion_rows(pairs, length=24))
    np.testing.assert_allclose(found.logps, scored, rtol=1e-5, atol=1e-5)


def test_a_completion_past_the_position_table_spoils_no_other():
    """GPT-2 has learned positions. The first prompt's completions leave them; the second's, in the same lanes, do not."""
    sizes = {"vocab_size": V, "width": 16, "layers": 2, "heads": 2, "max_positions": 12}
    model = make_model(decoder_config(hf_config("gpt2", **sizes, eos_token_id=EOS)))
    variables = jax.tree.map(lambda x: x * 4 + 0.01, jax.jit(model.init)(jax.random.key(1)))
    prompts, lengths = left_pad([[1, 2, 3, 1, 2, 3, 1, 2, 3], [2, 3]])
    keys = jax.random.split(jax.random.key(4), 8)
    run = jax.jit(functools.partial(generate, model, max_new_tokens=9, eos_id=EOS, completions=4), static_argnames="lanes")
    apart, together = (run(variables, prompts, lengths, keys, lanes=lanes) for lanes in (None, 2))
    assert np.isnan(apart.logps[:4]).any()
    assert np.isfinite(apart.logps[4:]).all()
    np.testing.assert_array_equal(together.tokens[4:], apart.tokens[4:])
    np.testing.assert_allclose(together.logps[4:], apart.logps[4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("parts", "count", "of"), [(1, 3, 7), (2, 2, 6), (1, 5, 5)])
def test_every_completion_is_drawn_once_and_no_lane_waits(parts, count, of):
    rng = np.random.default_rng(0)
    lanes, drawn = idle(parts, count), []
    for _ in range(parts * of + 1):
        lanes, new = (jax.tree.map(np.asarray, x) for x in refill(lanes, of=of))
        drawn += [(part, lanes.completion[part, lane]) for part, lane in np.argwhere(new)]
        assert not (~lanes.busy & (lanes.begun < of)[:, None]).any()
        if not lanes.busy.any():
            break
        lanes = lanes._replace(busy=lanes.busy & (rng.random(lanes.busy.shape) < 0.7))
    assert sorted(drawn) == [(part, number) for part in range(parts) for number in range(of)]


def test_a_long_completion_does_not_hold_the_batch_back():
    """Completions have a mean of 4 tokens of at most 40; batches of eight, one after the other, take the longest of each."""
    calls = []
    model = counting_model([0.0, 0.0, 0.0, 0.0], calls)._replace(take_rows=lambda cache, *_: cache)
    prompts, lengths = left_pad([[1]] * 64)
    keys = jax.random.split(jax.random.key(0), 128).reshape(64, 2)
    run = functools.partial(generate, model, max_new_tokens=40, eos_id=EOS, completions=2)

    def decodes(run, rows):
        calls.clear()
        found = jax.block_until_ready(run({}, prompts[rows], lengths[rows], keys[rows].reshape(-1)))
        jax.effects_barrier()
        return found, len(calls)

    found, steps = decodes(jax.jit(functools.partial(run, lanes=8)), slice(None))
    in_batches = jax.jit(run)
    apart = [decodes(in_batches, slice(start, start + 4)) for start in range(0, 64, 4)]
    np.testing.assert_array_equal(found.tokens, np.concatenate([part.tokens for part, _ in apart]))
    ideal = int(found.lengths.sum()) / 8
    assert ideal < steps < 1.4 * ideal < sum(count for _, count in apart)


def test_a_prompt_is_read_once_and_rounds_share_a_program():
    shapes = []
    model = counting_model([0.0] * 6, [])
    counted = model.decode
    config = decoder_config(hf_config("llama", vocab_size=6, width=8, layers=1, heads=1, max_positions=32, eos_token_id=EOS))

    def decode(variables, rows, cache):
        shapes.append(rows.tokens.shape)  # while tracing
        return counted(variables, rows, cache)

    model = model._replace(decode=decode, take_rows=lambda cache, *_: cache, config=config)

    class Words:
        def decode(self, ids, **_):
            return str(ids)

    complete = Completer(single_device(), model, Words(), stop_ids=[EOS], max_new_tokens=4, batch=12, width=16)
    rng = np.random.default_rng(0)
    traced = None
    for number in range(3):  # rounds of online training: other weights, and other prompts of other lengths
        prompts = [np.arange(1, 2 + rng.integers(15)) for _ in range(6)]
        found = complete({"w": jnp.float32(number)}, [ids for ids in prompts for _ in range(4)], jax.random.key(number))
        assert len(found.texts) == 24
        traced = traced or list(shapes)
    assert shapes == traced
    assert (6, 16) in shapes
    assert {rows for rows, columns in shapes if columns > 1} == {6}


def test_equal_neighbors_are_completions_of_a_prompt():
    a, b = np.array([1, 2]), np.array([1, 3])
    assert repeats([a, a, b, b, b, b]) == 2
    assert repeats([a, a.copy(), a]) == 3
    assert repeats([a, a, b]) == 1
    assert repeats([a]) == 1


@pytest.mark.parametrize("count", [1, 5, 64, 1000])
@pytest.mark.parametrize(("times", "columns", "new"), [(1, 48, 32), (4, 48, 32), (4, 1900, 100), (360, 16, 8), (7, 512, 512)])
@pytest.mark.parametrize("shards", [1, 4])
def test_calls_are_of_one_shape_and_bound_the_cache(count, times, columns, new, shards):
    prompts = [ids for ids in np.arange(count)[:, None] for _ in range(times)]
    shape = call_shape(prompts, batch=64, columns=columns, new_tokens=new, shards=shards)
    size = shape.prompts * shape.completions
    assert times % shape.completions == 0
    assert shape.prompts % shards == shape.lanes % shards == 0
    calls = -(-len(prompts) // size)
    assert size * calls < len(prompts) + shards * shape.completions * calls  # padding examples
    assert shape.lanes <= min(64, len(prompts)) + shards * max(shards, shape.completions)
    waiting = size > shape.lanes
    cache = columns * (shape.prompts + (shape.lanes if waiting else 0)) + shape.lanes * (new - 1)
    assert cache <= max(COLUMNS, shape.lanes * (columns + new)) + 2 * shards * columns
    assert not waiting or size >= 1.5 * shape.lanes
