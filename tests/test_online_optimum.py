"""Online DPO in a world whose optimum pi* (eq. 4) is enumerated, beside DPO on as many labels of the reference's samples.

The reference puts 1 % of its mass on the two best of 15 completions, and pi* four fifths. A label is a Bradley-Terry draw. Both
start from the reference and take as many steps of `dpo_step`; they differ in who draws the completions that are compared.
"""

import dataclasses
import functools

import jax
import numpy as np
from tabular import make_world, total_variation

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import plain_rows
from dpo_jax.dpo import dpo_step
from dpo_jax.losses import dpo_loss
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.step import init_state

BEST, ROUNDS, STEPS, LABELS = 2, 10, 40, 400_000


@functools.cache
def rare_world():
    """(`tabular.World` whose reference has 1 % on the best completions, those as bool[X, Y])."""
    world, rng = make_world(vocab=3, length=3, beta=0.5), np.random.default_rng(1)
    best = world.rewards.argsort(axis=1).argsort(axis=1) >= world.rewards.shape[1] - BEST
    chances = np.zeros(best.shape)
    for share, some in ((0.01, best), (0.99, ~best)):
        chances[some] = share * np.concatenate([rng.dirichlet(np.full(n, 5.0)) for n in some.sum(axis=1)])
    reference, rewards = world.table_of(np.log(chances)), world.rewards + 2.0 * best
    return dataclasses.replace(world, reference=reference, rewards=rewards), best


TX = make_optimizer(lambda step: 0.1 * (1 - step / (ROUNDS * STEPS)), name="adamw", max_grad_norm=None)


@functools.cache
def compiled_step():
    world, _ = rare_world()
    return jax.jit(functools.partial(dpo_step, model=world.model, tx=TX, loss=functools.partial(dpo_loss, beta=world.beta)))


def distance(*, online, seed):
    """Total variation between pi* and the policy that `ROUNDS` of labels and steps lead to."""
    world, _ = rare_world()
    x, first, second = map(np.ravel, np.meshgrid(*(range(n) for n in (2, 15, 15)), indexing="ij"))
    better = world.rewards[x, first] > world.rewards[x, second]
    x, pairs = x[better], np.stack([first[better], second[better]], axis=1)  # each two completions, the better one first
    encoded = [
        Encoded(world.prompts[i], world.completions[w], world.completions[l]) for i, (w, l) in zip(x, pairs, strict=True)
    ]
    rows = plain_rows(encoded, length=1 + world.length, ref_logps=world.ref_logps[x[:, None], pairs])
    state, step = init_state(world.reference, TX), compiled_step()
    rng, asked, wins = np.random.default_rng(seed), np.zeros(len(x)), np.zeros(len(x))
    wins_with = 1 / (1 + np.exp(world.rewards[x, pairs[:, 1]] - world.rewards[x, pairs[:, 0]]))
    for _ in range(ROUNDS):
        logps = world.logps(state.variables) if online else world.ref_logps
        drawn = np.exp(logps[x[:, None], pairs].sum(axis=1))
        new = rng.multinomial(LABELS // ROUNDS, drawn / drawn.sum())
        asked, wins = asked + new, wins + rng.binomial(new, wins_with)
        lost = 1 - wins / np.maximum(asked, 1)  # the labels of one pair, taken together, are a soft one
        labeled = rows.replace(weight=np.float32(asked), extras={"label_smoothing": np.float32(lost)})
        for _ in range(STEPS):
            state, _ = step(state, labeled)
    return total_variation(world.logps(state.variables), world.optimal_logps)


def test_the_best_answers_are_rare_in_the_reference_and_common_in_the_optimum():
    world, best = rare_world()
    for logps, low, high in ((world.ref_logps, 0.0099, 0.0101), (world.optimal_logps, 0.75, 0.9)):
        mass = np.where(best, np.exp(logps), 0).sum(axis=1)
        assert np.all((low < mass) & (mass < high))


def test_online_dpo_converges_to_the_optimum_and_offline_pairs_do_not():
    assert distance(online=True, seed=0) <= 0.01
    assert distance(online=False, seed=0) > 0.1
