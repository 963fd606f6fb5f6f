"""Pairs that share completions, computed once: the same numbers as pair by pair, in fewer tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_layout import expected, read_out

from dpo_jax.data.encode import Encoded
from dpo_jax.data.groups import group_pairs
from dpo_jax.data.layout import plain_rows
from dpo_jax.data.loader import eval_batches, make_batch, plan_layout, train_batches
from dpo_jax.dpo import dpo_step
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.reward_model import HEAD, completion_rewards, reward_step, with_scalar_head
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.parallel import pmap_partitioner
from dpo_jax.step import init_state

RNG = np.random.default_rng(0)
EOS = 0


def ids(low, high):
    return RNG.integers(1, 64, RNG.integers(low, high)).astype(np.int32)


def pairs_of(*sizes):
    """For each size a prompt with so many completions, all pairs of which have a random winner; the pairs shuffled."""
    found = []
    for prompt_number, size in enumerate(sizes):
        prompt, texts = ids(2, 6), [np.append(ids(1, 7), EOS).astype(np.int32) for _ in range(size)]
        for a in range(size):
            for b in range(a):
                chosen, rejected = (texts[i] for i in RNG.permutation([a, b]))
                found.append(Encoded(prompt, chosen, rejected, uid=f"{prompt_number}:{a}-{b}"))
    return [found[i] for i in RNG.permutation(len(found))]


PAIRS = pairs_of(4, 3, 2, 4, 4, 3)
GROUPS = group_pairs(PAIRS)
REF = RNG.normal(size=(len(PAIRS), 2)).astype(np.float32)
LAYOUTS = {kind: plan_layout(GROUPS, kind=kind, batch=4, multiple=4, shapes=2) for kind in ("packed", "plain")}
MODEL = make_model(
    decoder_config(hf_config("llama", vocab_size=64, width=32, layers=1, heads=4, max_positions=64, eos_token_id=EOS))
)
LOSS = functools.partial(dpo_loss, beta=0.3)
TX = make_optimizer(1e-3, max_grad_norm=1.0)


def ref_of_groups(layout):
    values = np.zeros((len(GROUPS), layout.pairs, 2), np.float32)
    for group, of_group in zip(GROUPS, values, strict=True):
        of_group[: len(group.members)] = REF[group.members]
    return values


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0))


def test_every_pair_is_in_one_group_and_every_completion_once():
    assert sorted(np.concatenate([group.members for group in GROUPS])) == list(range(len(PAIRS)))
    assert sorted(len(group.completions) for group in GROUPS) == [2, 3, 3, 4, 4, 4]
    for group in GROUPS:
        for member, uid, (chosen, rejected) in zip(group.members, group.uids, group.pairs, strict=True):
            pair = PAIRS[member]
            assert uid == pair.uid
            for found, right in ((group.prompt, pair.prompt), (group.completions[chosen], pair.chosen)):
                np.testing.assert_array_equal(found, right)
            np.testing.assert_array_equal(group.completions[rejected], pair.rejected)
    twice = group_pairs([PAIRS[0], PAIRS[0]])
    assert [len(group.pairs) for group in twice] == [2]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_slots_of_a_pair_hold_its_completions(kind):
    layout = LAYOUTS[kind]
    rows = layout.rows(GROUPS, ref_logps=ref_of_groups(layout))
    found, places = read_out(rows), rows.pairs.shape[1]
    seen = []
    for place, number in enumerate(rows.index):
        assert rows.weight[place] == (number >= 0)
        if number < 0:
            assert not rows.ref_logps[place].any()
            continue
        group, member = divmod(number, layout.pairs)
        pair = PAIRS[GROUPS[group].members[member]]
        for side, slot in zip(("chosen", "rejected"), rows.pairs[place // places, place % places], strict=True):
            got = found[place // places * rows.slots + slot]
            assert got == expected(pair.prompt, getattr(pair, side))
        np.testing.assert_array_equal(rows.ref_logps[place], REF[GROUPS[group].members[member]])
        seen.append(GROUPS[group].members[member])
    assert sorted(seen) == list(range(len(PAIRS)))


def test_batches_tell_which_pairs_they_hold():
    layout = LAYOUTS["packed"]
    at = train_batches(GROUPS, layout=layout, batch=4, seed=0, epochs=1, ref_logps=ref_of_groups(layout))
    uids = [batch.uids[i] for batch in (at(0), at(1)) for i in batch.index if i >= 0]
    assert sorted(uids) == sorted(pair.uid for pair in PAIRS)
    assert at(0).stats["pairs"] + at(1).stats["pairs"] == len(PAIRS)
    scored = sum(len(ids) for group in GROUPS for ids in group.completions)
    assert at(0).stats["scored_tokens"] + at(1).stats["scored_tokens"] == scored
    assert [batch.first for batch in eval_batches(GROUPS, layout=layout, batch=4)] == [0, 4 * layout.pairs]


@pytest.mark.parametrize("way", ["one device", "pmap"])
def test_a_step_on_groups_is_that_on_pairs(way, variables):
    layout = LAYOUTS["packed"]
    rows = make_batch(GROUPS, np.arange(len(GROUPS)), layout=layout, batch=6, ref_logps=ref_of_groups(layout)).rows
    alone = plain_rows(PAIRS, length=32, ref_logps=REF)
    assert rows.tokens.size < alone.tokens.size / 3
    step = functools.partial(dpo_step, model=MODEL, tx=TX, loss=LOSS)
    right, metrics = jax.jit(step)(init_state(variables, TX), alone)
    if way == "pmap":
        partitioner = pmap_partitioner()
        state = partitioner.init_state(functools.partial(init_state, tx=TX), partitioner.put_variables(variables))
        compiled = partitioner.compile_step(functools.partial(step, axis_name=partitioner.axis_name))
        state, found = compiled(state, rows)
        state = partitioner.get_state(state)
    else:
        state, found = jax.jit(step)(init_state(variables, TX), rows)
        at = rows.index >= 0
        numbers = [GROUPS[i // layout.pairs].members[i % layout.pairs] for i in rows.index[at]]
        logps = jax.jit(functools.partial(completion_logps, MODEL))
        np.testing.assert_allclose(logps(variables, rows)[at], logps(variables, alone)[np.array(numbers)], atol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    # RMSprop divides by the gradient's own size: where it is all but zero, its rounding shows.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), state.params, right.params)


def test_the_reward_model_learns_the_same_from_plain_groups(variables):
    model = with_scalar_head(MODEL)
    head = {"kernel": jax.random.normal(jax.random.key(1), (32,)), "bias": np.float32(0.5)}
    step = jax.jit(functools.partial(reward_step, model=model, tx=TX))
    groups = LAYOUTS["plain"].rows(GROUPS)
    _, right = step(init_state({**variables, HEAD: head}, TX), plain_rows(PAIRS, length=32))
    _, found = step(init_state({**variables, HEAD: head}, TX), groups)
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    around_one_prompt = completion_rewards(model, {**variables, HEAD: head}, LAYOUTS["packed"].rows(GROUPS))
    assert np.isnan(around_one_prompt).all()


def test_a_group_too_large_for_its_layout_is_refused():
    small = dataclasses.replace(LAYOUTS["packed"], pairs=3)
    with pytest.raises(ValueError, match="its prompt has 4 completions and 6 pairs, but the layout is for 4 and 3"):
        small.rows(GROUPS)
