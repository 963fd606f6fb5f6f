"""Several turns: enumerated conversations, the best policy, what trajectory DPO tends to, and which tokens are scored."""

import functools
import itertools
import random

import jax
import numpy as np
import optax
import pytest

from dpo_jax.data.encode import Encoded, encode
from dpo_jax.data.layout import Completion, completion_rows, packed_rows
from dpo_jax.data.question_game import (
    COURTESY,
    NONSENSE,
    QUESTION,
    RIGHT,
    TALK,
    THINGS,
    WRONG,
    Turn,
    answer,
    game_preferences,
    openings,
    reward,
    utterances,
    weak_play,
    written,
)
from dpo_jax.data.tokenizer import train_tokenizer
from dpo_jax.dpo import dpo_step
from dpo_jax.lab.conversation_tree import Tree, dpo_limit, evaluate, leaves, myopic, optimum, tilted
from dpo_jax.lab.dialogue import DialogueWorld, game_tree
from dpo_jax.lab.dialogue_methods import Sampling, label_conversations, label_turns, messages
from dpo_jax.logps import sequence_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.runtime.parallel import single_device
from dpo_jax.step import init_state

RNG = np.random.default_rng(0)
score = jax.jit(sequence_logps, static_argnums=0)
# Two turns: two things to say, of which the first has two answers, then two or three.
TREE = Tree(
    node=np.array([0, 0, 1, 1, 2, 2, 2, 3, 3]),
    edge=np.array([0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8]),
    probability=np.array([0.3, 0.7, 1, 1, 0.5, 0.5, 1, 1, 1, 1, 1]),
    reward=np.array([-0.5, -0.5, 1, 2, 0, 4, 0.5, 3, -1, 1, 0]),
    next=np.array([1, 2, 3, -1, -1, -1, -1, -1, -1, -1, -1]),
    turns=2,
)
CERTAIN = TREE._replace(
    node=TREE.node[[0, 1, 4, 5, 6, 7, 8]] - np.array([0, 0, 1, 1, 1, 1, 1]),
    edge=np.arange(7),
    probability=np.ones(7),
    reward=TREE.reward[[1, 2, 6, 7, 8, 9, 10]],
    next=np.array([1, 2, -1, -1, -1, -1, -1]),
)


def some_policy(tree, rng=RNG):
    weight = rng.random(len(tree.node)) + 0.1
    return weight / np.bincount(tree.node, weight)[tree.node]


def test_a_policy_is_evaluated_as_by_all_conversations_one_by_one():
    policy, reference = some_policy(TREE), some_policy(TREE)
    every = leaves(TREE)
    likely = every.luck * np.exp(every.sums(np.log(policy)))
    assert len(likely) == 8  # 3 after one answer to what is said first, 3 after the other, 2 after what is said else
    assert likely.sum() == pytest.approx(1)
    found = evaluate(TREE, policy, reference)
    assert found == pytest.approx((likely @ every.reward, likely @ every.sums(np.log(policy / reference))))


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_the_optimum_is_better_than_what_is_near_and_its_implicit_reward_leaves_out_luck(beta):
    reference, rng = some_policy(TREE), np.random.default_rng(1)

    def objective(policy):
        found = evaluate(TREE, policy, reference)
        return found.reward - beta * found.kl

    best = optimum(TREE, reference, beta)
    for size in (0.01, 0.1, 1.0):
        for _ in range(50):
            other = best * np.exp(size * rng.normal(size=len(best)))
            assert objective(other / np.bincount(TREE.node, other)[TREE.node]) < objective(best)
    assert objective(best) > objective(myopic(TREE, reference, beta)) + 1e-3
    assert objective(best) > objective(dpo_limit(TREE, reference, beta)) + 1e-4  # this user's answers are not certain
    # What is left of R is what a conversation earned by the user's answers alone: of every edge it has the mean 0.
    every = leaves(TREE)
    likely = every.luck * np.exp(every.sums(np.log(reference)))
    rest = every.reward - objective(best) - beta * every.sums(np.log(best / reference))
    of_edges = np.zeros(len(best))
    for edge in range(len(best)):
        here = (every.edges == edge).any(axis=1)
        of_edges[edge] = likely[here] @ rest[here] / likely[here].sum()
    np.testing.assert_allclose(of_edges[:2], 0, atol=1e-12)
    assert abs(rest).max() > 0.1


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_with_certain_answers_dpo_the_optimum_and_the_closed_form_are_one(beta):
    reference = some_policy(CERTAIN)
    best, every = optimum(CERTAIN, reference, beta), leaves(CERTAIN)
    closed = np.exp(every.sums(np.log(reference)) + every.reward / beta)
    np.testing.assert_allclose(np.exp(every.sums(np.log(best))), closed / closed.sum(), rtol=1e-10)
    assert tilted(CERTAIN, reference, beta) == pytest.approx(evaluate(CERTAIN, best, reference))
    np.testing.assert_allclose(dpo_limit(CERTAIN, reference, beta), best, atol=1e-5)


def test_the_tree_of_the_game_is_that_of_all_it_can_come_to():
    game = game_tree(openings()[3])
    every, number = leaves(game.tree), {}
    for edges, luck, gained in zip(every.edges, every.luck, every.reward, strict=True):
        said = tuple(game.said[edge] for edge in edges if edge >= 0)
        number[said, gained] = number.get((said, gained), 0) + luck
    wanted = {}
    for thing in game.opening.things:
        for said in itertools.product(*[(*utterances(turn), None) for turn in range(3)]):
            said = said[: said.index(None) + 1] if None in said else said
            gained = sum(answer(thing, turn, words).reward for turn, words in enumerate(said))
            wanted.setdefault((said, gained), set()).add(thing)
    assert number == pytest.approx({key: len(things) / 4 for key, things in wanted.items()})
    # One object is left after both questions, and none of the others is known after one.
    best = optimum(game.tree, some_policy(game.tree), 0.01)
    assert evaluate(game.tree, best, some_policy(game.tree)).reward == pytest.approx(2 * QUESTION + RIGHT, abs=1e-3)
    greedy = myopic(game.tree, some_policy(game.tree), 0.01)
    assert evaluate(game.tree, greedy, greedy).reward == pytest.approx(2 * COURTESY + RIGHT / 4, abs=1e-2)


@pytest.fixture(scope="module")
def world():
    texts = [text for pair in game_preferences(50, 0) for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = train_tokenizer(texts, vocab_size=512)
    sizes = {"vocab_size": 512, "width": 16, "layers": 1, "heads": 2, "max_positions": 96}
    model = make_model(decoder_config(hf_config("llama", **sizes, eos_token_id=tokenizer.eos_token_id)))
    variables = jax.jit(model.init)(jax.random.key(0))
    return DialogueWorld(single_device(), model, tokenizer, reference=variables, batch=64, test=12, seed=0)


def played(world, number, *, seed=0):
    """A conversation of the weak player as tokens: prompt, ids, and which of them are scored."""
    rng = random.Random(seed)
    game = world.trees[number]
    turns = weak_play(game.opening, rng.choice(game.opening.things), rng)
    prompt = world.history(game, [])
    ids = np.concatenate([world.history(game, turns[:-1]), world.ids(turns[-1].said + "<|endoftext|>")])
    scored = np.zeros(len(ids), bool)
    for turn in range(3):
        begin = len(world.history(game, turns[:turn]))
        scored[begin : begin + len(world.ids(turns[turn].said + "<|endoftext|>"))] = True
    return turns, prompt, ids[len(prompt) :], scored[len(prompt) :]


def test_what_sft_reads_has_the_tokens_of_sampled_conversations(world):
    game = world.trees[5]
    for seed in range(20):
        turns, prompt, ids, scored = played(world, 5, seed=seed)
        text, spans = written(turns)
        pair = {"prompt": game.opening.text, "chosen": text, "rejected": text, "chosen_spans": spans, "rejected_spans": spans}
        found = encode(pair | {"chat": True}, world.tokenizer, max_length=96, max_prompt_length=32)
        for one, wanted in ((found.prompt, prompt), (found.chosen, ids), (found.chosen_scored, scored)):
            np.testing.assert_array_equal(one, wanted)


def test_a_conversation_scores_as_its_turns_one_by_one_and_has_their_gradient(world):
    """So what the user says is read, and neither scored nor learned."""
    turns, prompt, ids, scored = played(world, 2)
    assert 0 < scored.sum() < len(ids)
    whole = completion_rows([Completion(prompt, ids, scored)], length=world.width)
    alone = completion_rows(
        [
            (world.history(world.trees[2], turns[:number]), world.ids(turn.said + "<|endoftext|>"))
            for number, turn in enumerate(turns)
        ],
        length=world.width,
    )

    def of(rows):
        return jax.jit(jax.value_and_grad(lambda variables: sequence_logps(world.model, variables, rows).sum()))(
            world.reference
        )

    one, other = of(whole), of(alone)
    assert float(one[0]) == pytest.approx(float(other[0]), abs=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one[1], other[1])
    everything = completion_rows([(prompt, ids)], length=world.width)
    assert abs(score(world.model, world.reference, everything)[0] - one[0]) > 1


def scripted(world, said):
    """`world` with a policy that says `said[conversation][turn]`, and what it was given to go on from."""
    given = []

    def complete(variables, prompts, key):
        turn = len(given)
        given.append(prompts)
        texts = [words[min(turn, len(words) - 1)] for words in said]

        class Drawn:
            ids = [world.ids(text if text.endswith("?!") else text + "<|endoftext|>") for text in texts]

        return Drawn

    return complete, given


def test_sampled_conversations_follow_the_rules(world, monkeypatch):
    right = [" Is it alive?", " Is it fast?", " It is the snail."]
    said = [right, right, [TALK, " Is it a snail?!"], [" It is the snail."]]
    complete, given = scripted(world, said)
    monkeypatch.setattr(world, "_complete", complete)
    small = next(
        n for n, game in enumerate(world.trees) if game.opening.things == tuple(t for t in THINGS if "small" in THINGS[t])
    )
    found = world.sample(world.reference, [small] * 4, ["snail", "arrow", "snail", "snail"], jax.random.key(0))
    assert [one.reward for one in found] == [2 * QUESTION + RIGHT, 2 * QUESTION + WRONG, COURTESY + NONSENSE, NONSENSE]
    assert [turn.answer.reply.split("\n")[1] for turn in found[1].turns[:2]] == ["User: No.", "User: Yes."]
    for one, words in zip(found, said, strict=True):
        assert world.tokenizer.decode(one.ids[one.scored]) == "".join(
            text if text.endswith("?!") else text + "<|endoftext|>" for text in words
        )
        assert one.turns == [Turn(turn.said, answer(one.thing, number, turn.said)) for number, turn in enumerate(one.turns)]
        assert one.reward == reward(one.turns)
    assert [found[2].turns[1].said, found[3].turns[0].said] == [None, None]
    for number in range(3):  # each turn begins with all that was said before
        np.testing.assert_array_equal(given[number][0], world.history(world.trees[small], found[0].turns[:number]))
    assert messages(world, found[1])[:3] == [
        {"role": "user", "content": "I am thinking of something small."},
        {"role": "assistant", "content": "Is it alive?"},
        {"role": "user", "content": "No."},
    ]
    how = Sampling(1, 2, "all")
    labeled = label_conversations([found[0], found[2], found[3], found[2]], how, seed=0, name="a")
    assert [(a.reward, b.reward) for a, b in labeled.pairs] == [(7.0, -1.0), (-1.0, -2.0)]
    for (a, b), group in zip(labeled.pairs, labeled.groups, strict=True):
        (better, worse) = group.pairs[0]
        np.testing.assert_array_equal(group.completions[better], a.ids)
        np.testing.assert_array_equal(group.scored[worse], b.scored)
    # Only turns after the same words are compared, each by what it earned itself.
    groups = label_turns([found[0], found[2]], how, seed=0, name="a")
    assert [world.tokenizer.decode(group.completions[group.pairs[0, 0]]) for group in groups] == [TALK + "<|endoftext|>"]


def test_dpo_learns_nothing_of_what_the_user_says(world):
    """Pairs that differ in the user's words alone have the margin that the policy's own words give them."""
    _, prompt, ids, scored = played(world, 2)
    other = np.where(scored, ids, ids[::-1])
    pair = Encoded(prompt, ids, other, chosen_scored=scored, rejected_scored=scored)
    rows = packed_rows([pair], length=128, ref_logps=np.zeros((1, 2), np.float32))

    state = init_state(jax.tree.map(np.asarray, world.reference), optax.sgd(0.0))
    _, metrics = jax.jit(
        functools.partial(dpo_step, model=world.model, tx=optax.sgd(0.0), loss=functools.partial(dpo_loss, beta=1.0))
    )(state, rows)
    texts = [Completion(prompt, one, scored) for one in (ids, other)]
    logps = score(world.model, world.reference, completion_rows(texts, length=world.width))
    assert metrics["loss"] == pytest.approx(np.logaddexp(0, logps[1] - logps[0]), abs=1e-3)


def test_a_policy_is_enumerated_as_the_model_says(world):
    policies = world.reference_policy
    game, policy = world.trees[7], policies[7]
    np.testing.assert_allclose(np.bincount(game.tree.node, policy), 1)
    edge = int(np.flatnonzero(game.tree.node == 4)[2])
    text = (world.history(game, game.histories[4]), world.ids(game.said[edge] + "<|endoftext|>"))
    alone = score(world.model, world.reference, completion_rows([text], length=world.width))
    assert np.log(policy[edge]) == pytest.approx(float(alone[0]), abs=1e-3)
    found = world.measure(world.reference)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["nonsense"] == pytest.approx(1, abs=1e-3)  # it was never trained
    assert found["reward"] == pytest.approx(NONSENSE, abs=1e-2)
    assert found["reward_sampled"] == NONSENSE
