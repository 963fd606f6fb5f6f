import dataclasses
import functools

import numpy as np
import pytest

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import (
    Layout,
    causal_rows,
    completion_rows,
    examples_to_rows,
    first_fit_decreasing,
    packed_rows,
    plain_rows,
    ranking_rows,
    shared_rows,
)
from dpo_jax.logps import completion_lengths

RNG = np.random.default_rng(0)


def random_pair(number):
    lengths = RNG.integers(1, 12, size=3)
    prompt, chosen, rejected = (RNG.integers(1, 1000, size=n).astype(np.int32) for n in lengths)
    return Encoded(prompt, chosen, rejected, uid=f"pair:{number}")


PAIRS = [random_pair(number) for number in range(11)]
REF = RNG.normal(size=(len(PAIRS), 2)).astype(np.float32)


def read_out(rows):
    """{(example, side): [(tokens the prediction sees, in order of position; target), ...]} by brute force over keys."""
    found = {}
    for r in range(rows.tokens.shape[0]):
        for s in range(rows.source.shape[1]):
            if rows.slot[r, s] == rows.slots:
                continue
            x = rows.source[r, s]
            keys = np.arange(rows.k_start[r, x], rows.k_end[r, x])
            assert x in keys
            order = keys[np.argsort(rows.positions[r, keys])]
            np.testing.assert_array_equal(rows.positions[r, order], np.arange(len(keys)))
            found.setdefault(r * rows.slots + rows.slot[r, s], []).append((rows.tokens[r, order].tolist(), rows.target[r, s]))
    return found


def expected(prompt, completion):
    text = prompt.tolist() + completion.tolist()
    return [(text[:n], text[n]) for n in range(len(prompt), len(text))]


LAYOUTS = {
    "plain": plain_rows(PAIRS, length=32, ref_logps=REF),
    "shared": shared_rows(PAIRS, length=40, ref_logps=REF),
    "packed": packed_rows(PAIRS, length=64, pairs_per_row=3, ref_logps=REF),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_prediction_sees_its_prompt_and_its_own_past_and_nothing_else(name):
    rows = LAYOUTS[name]
    found = read_out(rows)
    assert sorted(i for i in rows.index if i >= 0) == list(range(len(PAIRS)))
    for place, number in enumerate(rows.index):
        for side, completion in enumerate(("chosen", "rejected")):
            got = found.pop(2 * place + side, [])
            assert got == (expected(PAIRS[number].prompt, getattr(PAIRS[number], completion)) if number >= 0 else [])
    assert not found


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_and_weight_follow_the_pairs(name):
    rows = LAYOUTS[name]
    np.testing.assert_array_equal(rows.weight, rows.index >= 0)
    np.testing.assert_array_equal(rows.ref_logps[rows.index >= 0], REF[rows.index[rows.index >= 0]])
    np.testing.assert_array_equal(rows.ref_logps[rows.index < 0], 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_sees_only_itself(name):
    rows = LAYOUTS[name]
    x = np.arange(rows.tokens.shape[1])
    alone = (rows.k_start == x) & (rows.k_end == x + 1)
    used = sum(len(p.prompt) * (2 if name == "plain" else 1) + len(p.chosen) + len(p.rejected) for p in PAIRS)
    assert rows.tokens.size - alone.sum() <= used  # the first token of a text also sees only itself
    assert (rows.tokens[alone & (rows.positions == 0)] == 0).any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_of_the_caller_follow_the_pairs(name):
    rows = LAYOUTS[name]
    np.testing.assert_array_equal(examples_to_rows(REF, rows), rows.ref_logps)
    weight = np.arange(1, len(PAIRS) + 1, dtype=np.float32)
    weighted = examples_to_rows(weight, rows)
    padding = np.asarray(rows.index) < 0
    assert padding.any() == (name == "packed")
    np.testing.assert_array_equal(examples_to_rows(weight, rows, fill_value=7)[padding], 7)
    np.testing.assert_array_equal(weighted[rows.index >= 0], weight[rows.index[rows.index >= 0]])
    assert weighted.dtype == np.float32
    assert weighted.sum() == weight.sum()  # padding examples have none
    assert examples_to_rows(weight > 3, rows).dtype == bool
    with pytest.raises(ValueError, match="10 values, but the rows hold example number 10"):
        examples_to_rows(REF[:-1], rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_lengths_of_completions_are_those_of_the_pairs(name):
    rows = LAYOUTS[name]
    lengths = np.float32([[len(pair.chosen), len(pair.rejected)] for pair in PAIRS])
    found = completion_lengths(rows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, examples_to_rows(lengths, rows))


def test_packing_uses_fewer_rows_and_keeps_pairs_whole():
    assert LAYOUTS["packed"].tokens.shape[0] < LAYOUTS["shared"].tokens.shape[0] < LAYOUTS["plain"].tokens.shape[0]
    sizes = RNG.integers(1, 30, size=(200, 1))
    bins = first_fit_decreasing(sizes, capacity=(64,))
    assert sorted(sum(bins, [])) == list(range(200))
    assert max(sizes[b].sum() for b in bins) <= 64
    assert sizes.sum() / (64 * len(bins)) > 0.9


def test_completions_without_prompt_score_all_but_their_first_token():
    text = np.arange(5, 12, dtype=np.int32)
    rows = completion_rows([(text[:0], text), (text[:3], text[3:])], length=16, per_row=2)
    found = read_out(rows)
    assert rows.tokens.shape[0] == 1
    got = {tuple(t for _, t in scored) for scored in found.values()}
    assert got == {tuple(text[1:]), tuple(text[3:])}


def test_causal_rows_score_everything_but_the_first_token():
    tokens = RNG.integers(0, 50, size=(2, 6))
    found = read_out(causal_rows(tokens))
    for r in range(2):
        assert found[r] == expected(tokens[r, :1], tokens[r, 1:])


def test_empty_rows_fill_up_the_batch():
    rows = dataclasses.replace(Layout("shared", length=40, scored=24), rows_multiple=4).rows(PAIRS)
    assert rows.tokens.shape[0] == 12
    assert rows.index[-1] == -1


def test_nothing_is_cut_to_fit():
    with pytest.raises(ValueError, match="pair:0.*needs a row of .* rows hold 4"):
        shared_rows(PAIRS[:1], length=4)
    with pytest.raises(ValueError, match="without a prompt"):
        shared_rows([dataclasses.replace(PAIRS[0], prompt=np.zeros(0, np.int32))], length=40)


PROMPT, COMPLETION = np.int32([5, 6]), np.int32([7, 0])
ALL_ROWS = [functools.partial(rows, length=64) for rows in (plain_rows, shared_rows, packed_rows)]


@pytest.mark.parametrize("rows", ALL_ROWS)
@pytest.mark.parametrize("shape", [(2,), (4,), (3, 2), (2, 3), (2, 2, 1), (4, 2), (2, 1), (1, 4)])
def test_references_of_another_shape_would_be_those_of_other_pairs(rows, shape):
    with pytest.raises(ValueError, match=rf"ref_logps has shape \({', '.join(map(str, shape))},?\), but \[2, 2\] is expected"):
        rows(PAIRS[:2], ref_logps=np.zeros(shape))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), but \[3, 2\] is expected: one row for each pair, chosen first"):
        rows(PAIRS[:3], ref_logps=np.stack(REF[:3], axis=1))


@pytest.mark.parametrize("rows", ALL_ROWS)
def test_what_are_no_pairs_of_token_ids_is_refused(rows):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(TypeError, match=r"pairs must be Encoded \(token ids\): use dpo_jax.encode; got dict"):
        rows([row, row])
    with pytest.raises(TypeError, match="use dpo_jax.encode; got tuple"):
        rows([PAIRS[0], (PROMPT, COMPLETION)])
    with pytest.raises(TypeError, match="a sequence of Encoded .* got a single Encoded"):
        rows(PAIRS[0])
    with pytest.raises(TypeError, match="a sequence of Encoded .* got generator"):
        rows(pair for pair in PAIRS)
    for ids, message in (
        (np.array([5, 6.7]), "has values of type float64; token ids are integers"),
        (np.int32([5, -100]), "holds -100, which is not a token id"),
        (np.array([2**32 + 5]), "holds 4294967301, which is not a token id"),
        (np.int32([[5]]), r"has shape \(1, 1\); token ids \[n\] are expected"),
    ):
        for side in ("prompt", "chosen", "rejected"):
            with pytest.raises(ValueError, match=f"pair:1: {side} {message}"):
                rows([PAIRS[0], dataclasses.replace(PAIRS[1], **{side: ids})])
    for side in ("chosen", "rejected"):
        with pytest.raises(ValueError, match=f"pair 1: {side} has no tokens, not even EOS"):
            rows([PAIRS[0], dataclasses.replace(PAIRS[1], uid="", **{side: []})])


def test_what_are_no_completions_is_refused():
    lists = completion_rows([([5, 6], [7, 0])], length=8)
    np.testing.assert_array_equal(lists.tokens, completion_rows(((PROMPT, COMPLETION),), length=8).tokens)
    with pytest.raises(TypeError, match=r"got Encoded: give \[\(pair.prompt, pair.chosen\) for pair in encoded\]"):
        completion_rows(PAIRS, length=64)
    with pytest.raises(TypeError, match=r"\(prompt ids, completion ids\), got dict as number 1"):
        completion_rows([(PROMPT, COMPLETION), {"prompt": 1, "chosen": 2}], length=64)
    with pytest.raises(ValueError, match=r"text 0: prompt has shape \(\)"):
        completion_rows((PROMPT, COMPLETION), length=64)
    with pytest.raises(TypeError, match="a sequence of .* got zip"):
        completion_rows(zip([PROMPT], [COMPLETION], strict=True), length=64)
    with pytest.raises(ValueError, match="text 0: completion has no tokens"):
        completion_rows([(PROMPT, COMPLETION[:0])], length=64)
    with pytest.raises(ValueError, match="ranking 0: completion 1 has values of type float64"):
        ranking_rows([(PROMPT, [COMPLETION, COMPLETION * 1.0])], length=64)


# Rankings


def random_rankings(count, completions):
    """(prompt, completions) with ids below 1000, of 1 to 7 tokens each."""
    rng = np.random.default_rng(count)
    texts = [
        [rng.integers(1, 1000, size=n).astype(np.int32) for n in rng.integers(1, 8, size=completions + 1)] for _ in range(count)
    ]
    return [(prompt, ranked) for prompt, *ranked in texts]


@pytest.mark.parametrize("at_least", [0, 8])
def test_the_completions_of_a_ranking_follow_each_other_best_first(at_least):
    rankings = random_rankings(5, 3)
    ref = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    rows = ranking_rows(rankings, length=14, ref_logps=ref, at_least=at_least)
    count = max(5, at_least)
    assert rows.tokens.shape == (3 * count, 14)
    found = read_out(rows)
    assert found == {3 * i + k: expected(prompt, ranked[k]) for i, (prompt, ranked) in enumerate(rankings) for k in range(3)}
    np.testing.assert_array_equal(rows.index, [*range(5), *[-1] * (count - 5)])
    np.testing.assert_array_equal(rows.weight, [*[1] * 5, *[0] * (count - 5)])
    np.testing.assert_array_equal(rows.ref_logps, np.concatenate([ref, np.zeros((count - 5, 3))]))
    assert (rows.weight.dtype, rows.ref_logps.dtype, rows.index.dtype) == (np.float32, np.float32, np.int32)


def test_a_ranking_of_two_lies_like_a_pair():
    pairs = plain_rows(PAIRS, length=32, ref_logps=REF)
    rankings = ranking_rows([(p.prompt, [p.chosen, p.rejected]) for p in PAIRS], length=32, ref_logps=REF)
    for field in dataclasses.fields(pairs):
        np.testing.assert_array_equal(getattr(rankings, field.name), getattr(pairs, field.name), err_msg=field.name)


def test_rankings_that_make_no_batch_are_refused():
    rankings = random_rankings(3, 4)
    longest = max(len(prompt) + len(completion) for prompt, ranked in rankings for completion in ranked)
    assert ranking_rows(rankings, length=longest).ref_logps is None
    with pytest.raises(ValueError, match=rf"ranking [0-2]: needs rows of {longest} tokens, but they hold {longest - 1}"):
        ranking_rows(rankings, length=longest - 1)
    with pytest.raises(ValueError, match=r"the same number of completions, two or more; these have \[2, 4\]"):
        ranking_rows([*rankings, *random_rankings(1, 2)], length=20)
    with pytest.raises(ValueError, match=r"these have \[1\]"):
        ranking_rows(random_rankings(3, 1), length=20)
    with pytest.raises(ValueError, match="these have none"):
        ranking_rows([], length=20)
    with pytest.raises(ValueError, match=r"\(3, 2\), but \[3, 4\] is expected: one row for each ranking"):
        ranking_rows(rankings, length=20, ref_logps=np.zeros((3, 2)))
