"""Rows that are no pairs: single completions with a label, and rankings; from files to the numbers of a step."""

import dataclasses
import functools
import json
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from test_chat_runs import TEMPLATE
from test_layout import expected, read_out
from test_step import toy_model

from dpo_jax.data.encode import Encoded, encode
from dpo_jax.data.layout import Layout, ranking_rows
from dpo_jax.data.loader import make_batch, plan_layout
from dpo_jax.data.pairs import DataError, DataReport, Preference, PreferenceSet
from dpo_jax.data.prepare import data_digest, encode_all, encode_targets
from dpo_jax.data.repeats import find_overlap, find_repeats
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.unpaired import mismatched
from dpo_jax.dpo import dpo_step
from dpo_jax.evals.preference import labels_of, preference_summary
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss, kto_loss, named_loss, plackett_luce_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.reference import ReferenceCache
from dpo_jax.step import init_state

RNG = np.random.default_rng(0)
TX = optax.sgd(0.1)
FRUIT = {"prompt": "Name a fruit.", "completions": [" An apple.", " A tomato.", " A brick."], "ranks": [1, 2, 3]}
GOOD = {"prompt": "Name a fruit.", "completion": " An apple.", "label": True}
BAD = {"prompt": "Name a fruit.", "completion": " A brick.", "label": False}
LIMITS: dict[str, Any] = {"max_length": 24, "max_prompt_length": 12}


def load(tmp_path, *rows, **options):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(file, "train", **options)


def ids(low=2, high=9):
    return RNG.integers(1, 60, RNG.integers(low, high)).astype(np.int32)


def example(completions, number, **options):
    prompt, best, *between, worst = (ids() for _ in range(completions + 1))
    return Encoded(prompt, best, worst, uid=f"{number}", between=tuple(between), **options)


SINGLES = [example(2, number, desirable=number % 3 > 0) for number in range(7)]
REF = RNG.normal(-30, 2, size=(7, 2)).astype(np.float32)


# What rows say


def test_single_completions_of_a_file(tmp_path):
    read = load(tmp_path, GOOD, BAD | {"label": 0, "subset": "hard"}, rows="unpaired")
    assert read.report.format == "unpaired"
    assert [(p.chosen, p.rejected, p.desirable, p.subset) for p in read] == [
        (" An apple.", " An apple.", True, None),
        (" A brick.", " A brick.", False, "hard"),
    ]


def test_a_pair_is_two_single_completions(tmp_path):
    pair = {"prompt": "Name a fruit.", "chosen": " An apple.", "rejected": " A brick."}
    read = load(tmp_path, pair, rows="unpaired")
    assert [(p.uid, p.chosen, p.desirable) for p in read] == [
        ("train.jsonl:1#chosen", " An apple.", True),
        ("train.jsonl:1#rejected", " A brick.", False),
    ]
    assert (read.report.read, read.report.kept) == (2, 2)
    read.report.check()


@pytest.mark.parametrize("cut", [["chosen"], ["rejected"]])
def test_a_single_completion_that_was_cut_has_no_end_on_either_side(tmp_path, cut, tokenizer):
    pair = {"prompt": "Name a fruit.", "chosen": " An apple.", "rejected": " A brick.", "unended": cut}
    for one in load(tmp_path, pair, rows="unpaired"):
        ids = encode(one, tokenizer, max_length=64, max_prompt_length=32)
        ended = one.uid.rpartition("#")[2] not in cut
        assert [side[-1] == tokenizer.eos_token_id for side in (ids.chosen, ids.rejected)] == [ended] * 2


@pytest.mark.parametrize("wrong", ["chosen", ["best"], 1])
def test_which_side_was_cut_must_be_said_plainly(tmp_path, wrong):
    pair = {"prompt": "Name a fruit.", "chosen": " An apple.", "rejected": " A brick.", "unended": wrong}
    with pytest.raises(DataError, match='unended.*a list of "chosen" and "rejected" is needed'):
        load(tmp_path, pair)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ranks": [3, 1, 2]}, " A tomato.| A brick.| An apple."),
        ({"ranks": None, "scores": [0.5, 1.5, 9]}, " A brick.| A tomato.| An apple."),
        ({"ranks": None}, " An apple.| A tomato.| A brick."),
        ({"scores": [9, 5, 5]}, " An apple.| A tomato.| A brick."),
    ],
)
def test_the_order_of_a_ranking(change, told, tmp_path):
    [ranking] = load(tmp_path, FRUIT | change, rows="rankings")
    assert "|".join((ranking.chosen, *ranking.between, ranking.rejected)) == told


def test_a_pair_loss_reads_every_pair_of_a_ranking_but_ties(tmp_path):
    read = load(tmp_path, FRUIT | {"ranks": [2, 1, 2]})
    assert [(p.uid, p.chosen, p.rejected, p.sft_target) for p in read] == [
        ("train.jsonl:1#0-1", " A tomato.", " An apple.", None),
        ("train.jsonl:1#0-2", " A tomato.", " A brick.", None),
    ]
    assert read.report.dropped == {"tie": 1}
    assert load(tmp_path, FRUIT)[2].sft_target == " An apple."


def test_equal_completions_of_a_ranking_cost_only_their_own_pair(tmp_path):
    row = {"prompt": "P:", "completions": [" a", " a", " b", " c"]}
    read = load(tmp_path, row | {"ranks": [1, 1, 2, 3]})
    assert [(p.chosen, p.rejected) for p in read] == [(" a", " b"), (" a", " c")] * 2 + [(" b", " c")]
    assert [p.sft_target for p in read] == [None] * 4 + [" a"]
    assert read.report.dropped == {"tie": 1}
    read = load(tmp_path, row, on_bad="drop")
    assert (len(read), read.report.dropped) == (5, {"identical": 1})
    with pytest.raises(DataError, match="train.jsonl:1#0-1: completions: identical: both completions are the same text"):
        load(tmp_path, row)
    with pytest.raises(DataError, match="train.jsonl:1: completions: identical: two completions are the same text"):
        load(tmp_path, row, rows="rankings")


def test_messages_in_rankings_and_single_completions(tmp_path, tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    asked = [{"role": "user", "content": "2 + 2?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("4", "5", "22")]
    pairs = load(tmp_path, {"prompt": asked, "chosen": answers[0], "rejected": answers[2]}, tokenizer=tokenizer)
    [ranking] = load(tmp_path, {"prompt": asked, "completions": answers}, rows="rankings", tokenizer=tokenizer)
    [single] = load(tmp_path, {"prompt": asked, "completion": answers[2], "label": False}, rows="any", tokenizer=tokenizer)
    assert (ranking.prompt, ranking.chosen, ranking.rejected, ranking.chat) == (
        *(pairs[0].prompt, pairs[0].chosen, pairs[0].rejected),
        True,
    )
    assert (single.prompt, single.chosen, single.chat, single.desirable) == (pairs[0].prompt, pairs[0].rejected, True, False)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (GOOD | {"label": "True"}, "label: wrong_type: expected true or false, got the text 'True'"),
        (GOOD | {"label": -1}, "label: out_of_range: expected true, false, 1 or 0, got -1; write 0 for false"),
        (GOOD | {"label": 0.5}, "label: out_of_range: expected true, false, 1 or 0, got 0.5"),
        (GOOD | {"completion": " "}, "completion: empty"),
        (GOOD | {"prompt": ""}, "prompt: no_prompt"),
        (FRUIT | {"ranks": [1, 2]}, "ranks: wrong_type: expected a list of 3 numbers, got a list of 2"),
        (
            FRUIT | {"scores": [1, 2, 3]},
            "ranks, scores: out_of_range: ranks and scores put the completions in different orders",
        ),
        (FRUIT | {"completions": [" a", "", " b"]}, "completions.1: empty"),
        (FRUIT | {"completions": " a"}, "completions: wrong_type"),
    ],
)
def test_bad_rows_name_line_field_and_cause(row, told, tmp_path):
    good = GOOD if "label" in row else FRUIT
    with pytest.raises(DataError, match=f"train.jsonl:2: {re.escape(told)}"):
        load(tmp_path, good, row, rows="any")


@pytest.mark.parametrize(
    ("row", "rows", "told"),
    [
        (
            GOOD,
            "pairs",
            r"unpaired\) holds single completions with labels, but pairs are needed here: .* as dpo.loss: kto,",
        ),
        (GOOD, "rankings", "holds single completions with labels, but rankings are needed here: `dpo-jax dpo` reads them"),
        (FRUIT, "unpaired", r"ranked\) holds rankings, but single .* needed here: .*reads them .*: plackett_luce"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rankings", "holds pairs, but rankings .* use the loss dpo"),
    ],
)
def test_a_loss_that_reads_other_rows_is_refused(row, rows, told, tmp_path):
    with pytest.raises(DataError, match=told):
        load(tmp_path, row, rows=rows)


def test_rankings_of_several_lengths(tmp_path):
    longer = FRUIT | {"completions": [*FRUIT["completions"], " A stone."], "ranks": [1, 2, 4, 3]}
    with pytest.raises(DataError) as caught:
        load(tmp_path, FRUIT, longer, FRUIT, rows="rankings")
    assert re.search(
        r"3 completions: 2 rankings, first train.jsonl:1\n  4 completions: 1 rankings, first train.jsonl:2", f"{caught.value}"
    )
    assert "--data.ranking-length 3 keeps the best 3 of each" in str(caught.value)
    read = load(tmp_path, FRUIT, longer, rows="rankings", ranking_length=3)
    assert [p.rejected for p in read] == [" A brick.", " A stone."]
    with pytest.raises(DataError, match="train.jsonl:1: completions: out_of_range: 3 completions, but the best 4 are wanted"):
        load(tmp_path, FRUIT, longer, rows="rankings", ranking_length=4)
    tied = FRUIT | {"ranks": [1, 2, 2]}  # of the last two either might be kept
    read = load(tmp_path, FRUIT, tied, rows="rankings", ranking_length=2)
    assert ([p.uid for p in read], read.report.dropped) == (["train.jsonl:1"], {"tie": 1})


# Token ids


@pytest.mark.parametrize("labels", [1, 2])
def test_a_mismatched_completion_is_the_next_one_of_another_prompt_with_the_same_label(labels):
    drawn = np.random.default_rng(1)
    for count in (1, 2, 5, 9, 30):
        prompts, completions = drawn.integers(0, 4, size=(2, count))
        label, of = drawn.integers(0, labels, size=count), [np.array([1, i], np.int32) for i in range(4)]
        examples = [
            Encoded(of[p], of[c], of[c], desirable=bool(y)) for p, c, y in zip(prompts, completions, label, strict=True)
        ]
        for place, found in enumerate(mismatched(examples, max_length=9)):
            others = [(place + step) % count for step in range(1, count)]
            fit = [i for i in others if prompts[i] != prompts[place] and completions[i] != completions[place]]
            fit = [i for i in fit if label[i] == label[place]] or fit or [(place + 1) % count]
            np.testing.assert_array_equal(found.rejected, of[completions[fit[0]]])
            np.testing.assert_array_equal(found.chosen, examples[place].chosen)


def test_the_mismatched_completions_of_pairs_are_as_often_chosen_ones_as_rejected_ones(tmp_path, tokenizer):
    pairs = [{"prompt": f"Name fruit {n}.", "chosen": f" Apple {n}.", "rejected": f" Brick {n}."} for n in range(6)]
    found = encode_all(load(tmp_path, *pairs, rows="unpaired"), tokenizer, **LIMITS)
    assert [tokenizer.decode(one.rejected[:6]).split()[0] for one in found] == ["Apple", "Brick"] * 6


def test_an_answer_that_its_own_prompt_has_is_no_mismatched_one():
    of = [np.array([1, i], np.int32) for i in range(7)]
    rows = [(0, 3, True), (1, 4, True), (0, 6, False), (1, 6, False), (2, 6, False)]  # one refusal everywhere
    found = mismatched([Encoded(of[p], of[c], of[c], desirable=y) for p, c, y in rows], max_length=9)
    assert [one.rejected[1] for one in found] == [4, 3, 4, 3, 3]


def test_a_mismatched_completion_leaves_room_for_the_prompt():
    two = np.array([1, 2], np.int32)
    long = Encoded(np.arange(1, 9, dtype=np.int32), two, two, desirable=True)
    [first, _] = mismatched([long, SINGLES[0]], max_length=10)
    assert len(first.rejected) == min(2, len(SINGLES[0].chosen))


def test_a_long_mismatched_completion_cuts_nothing_of_the_example(tmp_path, tokenizer):
    """Prompt and completion are those of the example alone, and the rows hold no more than `max_length` with either one."""
    rows = [GOOD | {"prompt": f"Name fruit {n}.", "completion": " An" + " a" * n} for n in (1, 30, 2)]
    read = load(tmp_path, *rows, BAD, rows="unpaired")
    found = encode_all(read, tokenizer, **LIMITS)
    texts, _ = encode_targets(read, tokenizer, **LIMITS)
    assert len(texts) == 3  # undesirable ones are not learned
    for one, (prompt, completion) in zip(found, texts, strict=False):
        np.testing.assert_array_equal(one.prompt, prompt)
        np.testing.assert_array_equal(one.chosen, completion)
    assert all(len(one.prompt) + max(map(len, one.completions)) <= 24 for one in found)
    assert [one.desirable for one in found] == [True, True, True, False]
    assert found.report.truncated == {"chosen": 1}
    with pytest.raises(DataError, match=r"train.jsonl:2: .*prompt, completion and a mismatched one need \d+ \+ 12 \+ 6 tokens"):
        encode_all(read, tokenizer, **LIMITS, row_length=25)


def test_rankings_are_encoded_as_their_pairs_are(tmp_path, tokenizer):
    [ranking] = load(tmp_path, FRUIT, rows="rankings")
    [one] = encode_all(ranking_set(ranking), tokenizer, **LIMITS)
    pairs = encode_all(load(tmp_path, FRUIT), tokenizer, **LIMITS)
    for pair, (i, j) in zip(pairs, ((0, 1), (0, 2), (1, 2)), strict=True):
        for found, wanted in zip(
            (one.prompt, one.completions[i], one.completions[j]), (pair.prompt, *pair.completions), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)
    tight = encode_all(ranking_set(ranking), tokenizer, max_length=10, max_prompt_length=6)
    assert len({len(ids) for ids in tight[0].completions} - {4}) == 0
    assert tight.report.truncated == {"prompt": 1, "chosen": 1, "rejected": 1, "between": 1}


def ranking_set(*rankings: Preference):
    return PreferenceSet(rankings, DataReport(read=len(rankings), kept=len(rankings)))


def test_labels_and_every_completion_belong_to_the_digest():
    ranking = example(3, 0)
    changed = dataclasses.replace(ranking, between=(ranking.between[0] + 1,))
    other = dataclasses.replace(SINGLES[0], desirable=not SINGLES[0].desirable)
    pair = dataclasses.replace(SINGLES[0], desirable=None)
    assert len({data_digest([one]) for one in (ranking, changed, SINGLES[0], other, pair)}) == 5


def test_repeats_of_single_completions_and_rankings():
    """The same completion is a duplicate, whatever is mismatched, and with the other label a contradiction."""
    one, another, far = SINGLES[1], SINGLES[2], SINGLES[4]
    again = dataclasses.replace(one, rejected=far.chosen, uid="again")
    swapped = dataclasses.replace(another, desirable=not another.desirable, uid="swapped")
    found = find_repeats([one, another, far, again, swapped])
    assert found.duplicates.examples == ["again with 1"]
    assert found.contradictions.examples == ["swapped with 2"]
    assert find_overlap([again, swapped], [one, another]).pairs.pairs == 1
    ranking = example(4, "r")
    turned = dataclasses.replace(ranking, between=ranking.between[::-1], uid="turned")
    upside = dataclasses.replace(ranking, chosen=ranking.rejected, rejected=ranking.chosen, uid="upside")
    found = find_repeats([ranking, turned, ranking, upside])
    assert (found.duplicates.pairs, found.contradictions.examples) == (1, ["upside with r"])


# Rows, reference and step


@pytest.mark.parametrize("completions", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["plain", "shared", "packed"])
def test_every_completion_of_a_ranking_sees_its_prompt_and_itself(kind, completions):
    rankings = [example(completions, number) for number in range(7)]
    ref = RNG.normal(size=(7, completions)).astype(np.float32)
    layout = plan_layout(rankings, kind=kind, batch=4, multiple=completions if kind == "plain" else 1)
    for indices in (np.arange(4), np.arange(4, 7)):  # the second has a padding example
        rows = make_batch(rankings, indices, layout=layout, batch=4, ref_logps=ref).rows
        found = read_out(rows)
        assert len(rows.weight) * completions == len(rows.tokens) * rows.slots
        for place, number in enumerate(rows.index):
            one = rankings[indices[number]]
            for k, completion in enumerate(one.completions) if number >= 0 else ():
                assert found[place * completions + k] == expected(one.prompt, completion)
            assert rows.ref_logps is not None
            np.testing.assert_array_equal(rows.ref_logps[place], ref[indices[number]] if number >= 0 else 0)
        assert len(found) == completions * len(indices)
    with pytest.raises(ValueError, match="odd has 6 completions, but the first example has"):
        layout.rows([rankings[0], dataclasses.replace(example(6, "odd"))])


def test_rankings_of_shared_rows_have_the_log_probabilities_of_plain_ones():
    sizes: dict[str, Any] = {"vocab_size": 64, "width": 16, "layers": 1, "heads": 2, "max_positions": 64, "eos_token_id": 0}
    model = make_model(decoder_config(hf_config("llama", **sizes)))
    variables = jax.jit(model.init)(jax.random.key(0))
    rankings = [example(3, number) for number in range(3)]
    score = jax.jit(functools.partial(completion_logps, model))
    plain = score(variables, ranking_rows([(one.prompt, one.completions) for one in rankings], length=20))
    for layout in (Layout("shared", length=64, scored=32), Layout("packed", length=96, scored=64, per_row=2)):
        rows = layout.rows(rankings)
        found = np.asarray(score(variables, rows))
        for place, number in enumerate(rows.index):
            if number >= 0:
                np.testing.assert_allclose(found[place], plain[number], rtol=1e-5, atol=1e-5)


def test_a_ranking_is_cached_whole_or_computed_again(tmp_path):
    """Rankings of any length and pairs share a folder; what a killed pass lacks of a ranking is found."""
    sets = {count: [example(count, f"{count}.{number}") for number in range(3)] for count in (2, 3, 4)}
    values = {count: RNG.normal(size=(3, count)).astype(np.float32) for count in sets}
    cache = ReferenceCache(tmp_path, {"weights": "w"})
    for count, rankings in sets.items():
        cache.add(rankings[:2], values[count][:2])
    again = ReferenceCache(tmp_path, {"weights": "w"})
    assert not again.damage
    for count, rankings in sets.items():
        assert again.missing(rankings) == [2]
        np.testing.assert_array_equal(again.lookup(rankings[:2]), values[count][:2])
        with pytest.raises(KeyError, match=rf"no reference log-probabilities of {count}\.2"):
            again.lookup(rankings)
    half = dataclasses.replace(sets[4][0], between=(sets[4][0].between[0], ids()))  # its first two are there
    assert again.missing([half]) == [0]


MODEL = toy_model()
KINDS = {
    "plain": Layout("plain", length=32, scored=16, rows_multiple=8),
    "shared": Layout("shared", length=32, scored=32, rows_multiple=8),
    "packed": Layout("packed", length=64, scored=48, per_row=3, rows_multiple=4),
}


@pytest.fixture(scope="module")
def state():
    return init_state(MODEL.init(jax.random.key(0)), TX)


@functools.cache
def compiled_step(loss, **options):
    return jax.jit(functools.partial(dpo_step, model=MODEL, tx=TX, loss=loss, **options))


def stepped(loss, state, rows, **options):
    return compiled_step(loss, **options)(state, rows)


UNPAIRED = {name: named_loss(name, beta=0.3) for name in ("kto", "apo_zero_unpaired")}


def test_a_step_of_kto_is_the_same_in_every_layout(state):
    """Its loss is that of whole arrays, and its metrics are means over desirable and over undesirable completions."""
    loss = named_loss("kto", beta=0.3, undesirable_weight=1.5)
    plain, metrics = stepped(loss, state, KINDS["plain"].rows(SINGLES, ref_logps=REF))
    for kind in ("shared", "packed"):
        after, found = stepped(loss, state, KINDS[kind].rows(SINGLES, ref_logps=REF))
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after.params, plain.params)
    score = jax.jit(functools.partial(completion_logps, MODEL))
    logps = np.asarray(score(state.variables, KINDS["plain"].rows(SINGLES)))[:7]
    good = np.array([one.desirable for one in SINGLES])
    labels = {"desirable": good.astype(np.float32), "weight": np.ones(7, np.float32)}
    losses, rewards = map(np.asarray, loss(logps, REF, **labels))
    assert metrics["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert metrics["kl"] == pytest.approx((logps - REF)[:, 1].mean(), rel=1e-4)
    for name, which in (("chosen", good), ("rejected", ~good)):
        assert metrics[f"rewards/{name}"] == pytest.approx(rewards[which, 0].mean(), rel=1e-5)
        assert metrics[f"displacement/{name}"] == pytest.approx((logps - REF)[which, 0].mean(), rel=1e-4)
    summary = preference_summary(logps, REF, loss=loss, desirable=labels_of(SINGLES))
    for name in (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "displacement/rejected",
    ):
        assert metrics[name] == pytest.approx(summary[name], rel=1e-4), name


@pytest.mark.parametrize("name", UNPAIRED)
def test_losses_of_single_completions_do_not_depend_on_the_parts_of_a_batch(name, state):
    rows, loss = KINDS["shared"].rows(SINGLES, ref_logps=REF), UNPAIRED[name]
    whole = stepped(loss, state, rows)[1]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = functools.partial(dpo_step, model=MODEL, tx=TX, loss=loss, axis_name="data")
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    for found in (stepped(loss, state, rows, microbatches=4)[1], mapped(state, rows)[1]):
        for name, value in whole.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_kto_of_a_sharded_batch(state):
    rows = KINDS["shared"].rows(SINGLES, ref_logps=REF)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(rows, jax.sharding.NamedSharding(mesh, P("data")))
    one, other = (stepped(UNPAIRED["kto"], state, part)[1] for part in (rows, sharded))
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_mismatched_completions_carry_no_gradient():
    logps = RNG.normal(-9, 1, size=(4, 2))
    given = {"desirable": np.array([1.0, 0, 1, 0]), "weight": np.ones(4), "beta": 0.5}
    slope = jax.grad(lambda logps: kto_loss(logps, logps * 0 - 9.5, **given)[0].sum())(logps)
    np.testing.assert_array_equal(slope[:, 1], 0.0)
    assert (np.sign(slope[:, 0]) == [-1, 1, -1, 1]).all()


def test_rows_and_loss_that_do_not_fit_are_refused(state):
    rows = KINDS["shared"].rows(SINGLES, ref_logps=REF)
    with pytest.raises(TypeError, match="desirable"):
        stepped(functools.partial(dpo_loss, beta=0.1), state, rows)
    with pytest.raises(TypeError, match="none of these losses reads desirable"):
        stepped(named_loss("dpo + 0.1*hinge"), state, rows)
    with pytest.raises(ValueError, match="reads single completions with labels, but the batch has none"):
        stepped(named_loss("apo_zero_unpaired"), state, rows.replace(extras=None))
    with pytest.raises(ValueError, match="some examples have a label"):
        KINDS["shared"].rows([SINGLES[0], dataclasses.replace(SINGLES[1], desirable=None)])
    with pytest.raises(ValueError, match="kto of single completions, sft of pairs"):
        named_loss("kto + 0.1*sft")
    with pytest.raises(ValueError, match="wpo: loss plackett_luce does not read it"):
        named_loss("plackett_luce", wpo=True)


def test_the_summary_of_rankings_is_of_best_and_worst():
    logps = np.array([[-3, -9, -5], [-8, -1, -2]], np.float32)
    summary = preference_summary(logps, np.full_like(logps, -4), loss=functools.partial(plackett_luce_loss, beta=0.5))
    assert (summary["rewards/chosen"], summary["rewards/rejected"]) == (0.5 * (1 - 4) / 2, 0.5 * (-1 + 2) / 2)
    assert summary["rewards/accuracies"] == 0.5
