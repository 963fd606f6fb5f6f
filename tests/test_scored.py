"""Completions of which only some tokens are scored: the same numbers in every layout, and keys and counts that know of it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_layout import expected, read_out

from dpo_jax.data.encode import Encoded
from dpo_jax.data.groups import group_pairs
from dpo_jax.data.layout import Completion, Layout, completion_rows, packed_rows, plain_rows, shared_rows
from dpo_jax.data.lengths import length_differences
from dpo_jax.data.loader import make_batch, plan_layout
from dpo_jax.data.prepare import data_digest
from dpo_jax.data.repeats import find_repeats
from dpo_jax.data.token_text import marked
from dpo_jax.evals.preference import completion_tokens
from dpo_jax.logps import completion_lengths, completion_logps, sequence_logps
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.reference import pair_key

RNG = np.random.default_rng(1)


def ids(n):
    return RNG.integers(1, 64, n).astype(np.int32)


def mask(n):
    marks = RNG.random(n) < 0.5
    marks[-1] = True  # EOS
    return marks


def pair_of(prompt, number):
    chosen, rejected = ids(RNG.integers(3, 12)), ids(RNG.integers(3, 12))
    marks = {"chosen_scored": mask(len(chosen))} if number % 3 else {}
    marks |= {"rejected_scored": mask(len(rejected))} if number % 3 == 2 else {}
    return Encoded(prompt, chosen, rejected, uid=f"{number}", **marks)


PROMPTS = [ids(4), ids(7), ids(2)]
PAIRS = [pair_of(PROMPTS[number % 3 // 2], number) for number in range(7)]
SCORED = [[len(i) if m is None else int(m.sum()) for i, m in pair.sides] for pair in PAIRS]
ROWS = {
    "plain": plain_rows(PAIRS, length=32),
    "shared": shared_rows(PAIRS, length=40),
    "packed": packed_rows(PAIRS, length=64, pairs_per_row=3),
}
MODEL = make_model(
    decoder_config(hf_config("llama", vocab_size=64, width=16, layers=1, heads=2, max_positions=64, eos_token_id=0))
)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0))


def wanted(pair):
    """What is read out of both completions: what each scored token is predicted from, and the token."""
    sides = []
    for completion, marks in pair.sides:
        every = expected(pair.prompt, completion)
        sides.append(
            [one for one, mark in zip(every, np.ones(len(every), bool) if marks is None else marks, strict=True) if mark]
        )
    return sides


@pytest.mark.parametrize("name", ROWS)
def test_scored_tokens_see_all_that_is_before_them(name):
    rows = ROWS[name]
    found = read_out(rows)
    for place, number in enumerate(rows.index):
        if number >= 0:
            assert [found.pop(2 * place + side) for side in (0, 1)] == wanted(PAIRS[number])
    assert not found
    real = rows.index >= 0
    np.testing.assert_array_equal(np.asarray(completion_lengths(rows))[real], np.array(SCORED)[rows.index[real]])


def test_log_probabilities_are_equal_in_all_layouts_and_those_of_the_scored_tokens(variables):
    texts = [Completion(pair.prompt, *side) for pair in PAIRS for side in pair.sides]
    of_tokens = jax.jit(lambda rows: jax.nn.log_softmax(MODEL.unembed(variables, MODEL.forward(variables, rows))))
    values = np.asarray(of_tokens(completion_rows([text[:2] for text in texts], length=32)))  # every token scored
    every = np.zeros(len(texts))
    for number, (prompt, completion, marks, _) in enumerate(texts):
        counted = values[number, len(prompt) - 1 + np.arange(len(completion)), completion]
        every[number] = counted.sum() if marks is None else counted[marks].sum()
    every = every.reshape(-1, 2)
    logps = jax.jit(functools.partial(completion_logps, MODEL))
    for name, rows in ROWS.items():
        real = rows.index >= 0
        np.testing.assert_allclose(logps(variables, rows)[real], every[rows.index[real]], atol=1e-5, err_msg=name)
    groups = group_pairs(PAIRS)
    assert max(len(group.completions) for group in groups) > 4
    layout = plan_layout(groups, kind="packed", batch=2)
    rows, index = layout.place(groups)
    of_groups = np.asarray(logps(variables, rows))
    members = [groups[number // layout.pairs].members[number % layout.pairs] for number in index if number >= 0]
    assert sorted(members) == list(range(len(PAIRS)))
    np.testing.assert_allclose(of_groups[index >= 0], every[members], atol=1e-5)
    rows = completion_rows(texts, length=64, per_row=3)
    of_texts = jax.jit(functools.partial(sequence_logps, MODEL))(variables, rows)
    real = rows.index >= 0
    np.testing.assert_allclose(of_texts[real], every.reshape(-1)[rows.index[real]], atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "shared", "packed"])
@pytest.mark.parametrize("examples", ["pairs", "texts", "groups"])
def test_layouts_are_planned_for_scored_tokens(kind, examples):
    of = {
        "pairs": PAIRS,
        "texts": [Completion(pair.prompt, *pair.sides[0]) for pair in PAIRS],
        "groups": group_pairs(PAIRS),
    }[examples]
    if examples == "groups" and kind == "shared":
        return
    layout = plan_layout(of, kind=kind, batch=2)
    batch = make_batch(of, np.arange(2), layout=layout, batch=2)
    assert batch.stats["scored_tokens"] == (batch.rows.slot < batch.rows.slots).sum()
    whole = plan_layout([Completion(ids(8), ids(40), np.arange(40) < 5)], kind="plain", batch=1)
    assert (whole.length, whole.scored) == (64, 32)
    with pytest.raises(ValueError, match="8 of them scored, but rows hold 16 and 7"):
        Layout("shared", length=16, scored=7).rows([Encoded(ids(4), ids(6), ids(6), chosen_scored=np.arange(6) < 2)])


def test_keys_and_digests_know_which_tokens_are_scored():
    pair = Encoded(np.int32([5, 6]), np.int32([7, 8, 0]), np.int32([9, 0]))
    every = dataclasses.replace(pair, chosen_scored=np.ones(3, bool), rejected_scored=np.ones(2, bool))
    others = [
        dataclasses.replace(pair, chosen_scored=np.bool_([True, False, True])),
        dataclasses.replace(pair, chosen_scored=np.bool_([False, True, True])),
        dataclasses.replace(pair, rejected_scored=np.bool_([False, True])),
    ]
    # As it was before tokens could be left out: caches and runs of that time go on.
    assert [key.hex() for key in pair_key(pair)] == [KEY]
    assert data_digest([pair]) == DIGEST
    assert (pair_key(every), data_digest([every])) == (pair_key(pair), data_digest([pair]))
    assert len({pair_key(one) for one in (pair, *others)}) == 4
    assert len({data_digest([one]) for one in (pair, *others)}) == 4
    text = (pair.prompt, pair.chosen)
    assert data_digest([text]) == data_digest([Completion(*text)]) != data_digest([Completion(*text, others[0].chosen_scored)])
    found = find_repeats([pair, every, *others])
    assert found.duplicates.pairs == 1
    group = group_pairs([pair, others[0]])[0]
    assert [marks is None for marks in group.scored] == [True, True, False]
    assert group.pairs.tolist() == [[0, 1], [2, 1]]


KEY = "ed27a69b2a723901968df4d035190c6b"
DIGEST = "cdc4763e1017248d652cee772b9e1562a1ac737d09203f6ae2e0da78b6d79b51"


def test_lengths_are_those_of_scored_tokens():
    np.testing.assert_array_equal(completion_tokens(PAIRS), SCORED)
    np.testing.assert_array_equal(length_differences(PAIRS), [chosen - rejected for chosen, rejected in SCORED])


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        (np.zeros(3, bool), "pair 0: chosen has no scored token"),
        (np.ones(2, bool), r"chosen: the mask of scored tokens is bool\[2\]; expected bool\[3\]"),
        (np.ones(3, np.int32), r"is int32\[3\]; expected bool\[3\]"),
    ],
)
def test_marks_that_do_not_fit_are_refused(marks, words):
    with pytest.raises(ValueError, match=words):
        plain_rows([Encoded(ids(2), ids(3), ids(2), chosen_scored=marks)], length=16)
    with pytest.raises(
        ValueError, match=words.replace("pair 0: chosen", "text 0: completion").replace("chosen:", "completion:")
    ):
        completion_rows([Completion(ids(2), ids(3), marks)], length=16)


def test_the_audit_brackets_each_run_of_scored_tokens():
    assert marked(["a", "b"], True, 99) == ["[a", "b]"]
    assert marked(["a", "b"], False, 99) == ["a", "b"]
    assert marked([*"abcde"], [True, True, False, False, True], 99) == ["[a", "b]", "c", "d", "[e]"]
    runs = marked([*"abcdefghij"], [True, False] * 5, 99)
    assert runs == ["[a]", "b", "[c]", "d", "[e]", "f", "[g]", "... 3 more ..."]
    long = marked([*"a" * 50, *"b" * 50], [True] * 50 + [False] * 50, 40)
    assert [token for token in long if len(token) > 1] == ["[a", "... 30 more ...", "a]", "... 30 more ..."]
