"""Whole runs of online DPO on a small model: what a round leaves, and the same bits at the end however a run was cut."""

import collections
import functools
import hashlib
import itertools
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest

import dpo_jax
from dpo_jax.data.pairs import DataError
from dpo_jax.data.sources import load_preferences
from dpo_jax.lab.world import Prompts, World
from dpo_jax.losses import ipo_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.online.choices import choose_pairs, choose_prompts, draw_prompts
from dpo_jax.online.labels import LabelLog
from dpo_jax.online.references import KeptReferences
from dpo_jax.online.rounds import RoundOptions, Rounds
from dpo_jax.online.samples import encoded_pairs, sample_completions
from dpo_jax.runtime.checkpoint import CheckpointDamaged
from dpo_jax.runtime.fit import Evaluation
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.training.run import Saving, saved_run, train


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved on the way out."""


ROUNDS, STEPS, REFRESH = 4, 2, 2


WORDS = ("was", "is", "has", "had", "may", "can", "will", "shall", "must", "might")


def length_reward(prompts, completions):
    """A reward that no two texts of this test share by accident."""
    return np.array(
        [
            int(hashlib.sha256((p + c).encode()).hexdigest()[:8], 16) / 2**28 + len(c)
            for p, c in zip(prompts, completions, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def parts(tokenizer):
    """A world around a small model, and everything that is compiled once."""
    return make_parts(tokenizer, lambda model: single_device())


def make_parts(tokenizer, partitioned):
    sizes: dict[str, Any] = {"vocab_size": 512, "width": 16, "layers": 1, "heads": 2, "max_positions": 64, "eos_token_id": 0}
    model = make_model(decoder_config(hf_config("llama", **sizes)))
    texts = [f"The film {word}" for word in WORDS]
    prompts = Prompts(texts, [np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32) for text in texts])
    partitioner, tx = partitioned(model), optax.sgd(0.3)
    weights = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    world = World(
        partitioner,
        model,
        tokenizer,
        stop_ids=[tokenizer.eos_token_id],
        reference=partitioner.put_variables(weights),
        reward=length_reward,
        train=prompts,
        test=prompts,
        max_new_tokens=6,
        batch=16,
        seed=0,
    )
    loss = functools.partial(dpo_jax.dpo_loss, beta=0.1)
    step = functools.partial(dpo_jax.dpo_step, model=model, tx=tx, loss=loss, axis_name=partitioner.axis_name)
    begin = functools.partial(dpo_jax.init_state, tx=tx)
    return SimpleNamespace(world=world, weights=weights, step=partitioner.compile_step(step), begin=begin)


def online(parts, folder, *, reward=length_reward, tick=lambda: None, measured=lambda done: None, rounds=ROUNDS, **changes):
    """A run of so many rounds in `folder`, as the command makes one. `tick()` is called wherever a kill may come."""
    with RunDir(folder) as run:
        return _online(parts, run, reward=reward, tick=tick, measured=measured, rounds=rounds, **changes)


def rounds_of(parts, folder, changes, *, reward=length_reward, tick=lambda: None):
    """The rounds of a run in `folder`, with `changes` of their options."""
    options: dict[str, Any] = {
        "prompts": 4,
        "completions": 3,
        "pairs": "best_worst",
        "steps": STEPS,
        "batch": 2,
        "beta": 0.1,
        "seed": 0,
    }
    options, partitioner = options | changes, parts.world.partitioner

    def save(path, variables):
        tick()
        path.mkdir(parents=True, exist_ok=True)
        leaves = jax.tree.leaves(partitioner.to_host(variables))
        np.savez(path / "weights.npz", *leaves)
        tick()

    def load(path):
        leaves = [np.asarray(leaf) for leaf in np.load(path / "weights.npz").values()]
        return partitioner.put_variables(jax.tree.unflatten(jax.tree.structure(parts.weights), leaves)), digest_of(leaves)

    return Rounds(
        Ticking(parts.world, tick),  # pyright: ignore[reportArgumentType]
        folder,
        RoundOptions(**options),
        log=TickingLog(folder / "labels.jsonl", {}, tick),
        settings={name: value for name, value in options.items()},
        start="start",
        reward=reward,
        references=KeptReferences(folder / "references", save=save, load=load),
        say=lambda line: None,
    )


def _online(parts, run, *, reward, tick, measured, rounds, **changes):
    world, partitioner, folder = parts.world, parts.world.partitioner, run.path
    made = rounds_of(parts, folder, changes, reward=reward, tick=tick)
    saved = saved_run(folder / "checkpoints", place=str(folder))
    if saved is None or saved.step < STEPS:
        made.begin(world.reference)

    def batch(step):
        tick()
        return made.batch(step)

    def evaluate(state, done):
        tick()
        measured(done)
        return {"done": done}

    return train(
        parts.step,
        partitioner.init_state(parts.begin, partitioner.put_variables(parts.weights)),
        batch,
        folder=run,
        total_steps=rounds * STEPS,
        fingerprint={"online": True},
        saved=saved,
        partitioner=partitioner,
        saving=Saving(every=1),
        evaluation=Evaluation(evaluate, every=STEPS),
        refresh=made,
        say=lambda line: None,
    )


class Ticking:
    """A world in which a kill may come before and after sampling."""

    def __init__(self, world, tick):
        self._world, self._tick = world, tick

    def __getattr__(self, name):
        return getattr(self._world, name)

    def complete(self, *arguments):
        self._tick()
        found = self._world.complete(*arguments)
        self._tick()
        return found


class TickingLog(LabelLog):
    def __init__(self, path, settings, tick):
        super().__init__(path, settings, say=lambda line: None)
        self._tick = tick

    def add(self, number, labels):
        super().add(number, labels)
        self._tick()


def digest_of(leaves):
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def weights_of(state):
    return digest_of(jax.tree.leaves(jax.device_get((state.params, state.opt_state))))


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """An uninterrupted run whose reference moves: its folder, the digest of its end, and the texts that were scored."""
    folder, asked = tmp_path_factory.mktemp("online") / "whole", collections.Counter()
    state = online(parts, folder, reward=counting(asked), refresh=REFRESH)
    return SimpleNamespace(folder=folder, end=weights_of(state), asked=asked)


def counting(asked):
    def reward(prompts, completions):
        asked.update(zip(prompts, completions, strict=True))
        return length_reward(prompts, completions)

    return reward


def test_a_round_is_files_that_others_can_read(parts, whole):
    rows = [json.loads(line) for line in (whole.folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(ROUNDS))
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert sum(row["labels"] for row in rows) == rows[-1]["labels_so_far"] == len(whole.asked)
    assert set(whole.asked.values()) == {1}
    assert (rows[0]["kl"], rows[0]["accuracy"]) == (0, 0.5)  # the policy still is its reference
    assert all(row["kl"] != 0 for row in rows[1:])
    for row in rows:
        folder = whole.folder / f"round-{row['round']:03}"
        samples, scores, prompts = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for name in ("samples.jsonl", "scores.jsonl", "prompts.jsonl")
        )
        assert len(samples) == 3 * len(prompts) == 12
        for sample, score in zip(samples, scores, strict=True):
            assert score["score"] == length_reward([sample["prompt"]], [sample["completion"]])[0]
        assert row["reward"] == pytest.approx(np.mean([score["score"] for score in scores]))
        preferences = load_preferences(folder / "pairs.jsonl", "train")
        assert len(preferences) == row["pairs"] > 0
        texts = {(one["prompt"], one["completion"]): one["score"] for one in scores}
        for one in preferences:
            its = [score for (prompt, _), score in texts.items() if prompt == one.prompt]
            assert (texts[one.prompt, one.chosen], texts[one.prompt, one.rejected]) == (max(its), min(its))
            for side in ("chosen", "rejected"):  # so that `dpo` on this file learns no end that was not drawn
                ids = [sample["ids"] for sample in samples if sample["completion"] == getattr(one, side)]
                assert {its[-1] in parts.world.stop_ids for its in ids} == {side not in one.unended}
        logps = [
            parts.world.logps(parts.world.reference, [np.int32(one["prompt_ids"])], [np.int32(one["ids"])])[0]
            for one in samples[:2]
        ]
        moved = row["round"] >= REFRESH
        assert np.allclose(logps, [one["ref_logp"] for one in samples[:2]], atol=1e-5) != moved
    # At the round in which the reference moves, it is the policy.
    at_move = [json.loads(line) for line in (whole.folder / "round-002" / "samples.jsonl").read_text().splitlines()]
    assert all(one["logp"] == one["ref_logp"] for one in at_move)
    metrics = [row for row in read_metrics(whole.folder / "metrics.jsonl") if "loss" in row]
    assert [row["loss"] for row in metrics[:: REFRESH * STEPS]] == pytest.approx([np.log(2)] * 2, abs=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_was_killed_again_and_again_ends_in_the_same_bits(parts, whole, tmp_path, seed):
    rng, asked, kills = np.random.default_rng(seed), collections.Counter(), 0
    while True:
        left = itertools.count(int(rng.integers(2, 8)), -1)

        def tick(left=left):
            if next(left) == 0:
                raise Killed

        try:
            state = online(parts, tmp_path / "run", reward=counting(asked), tick=tick, refresh=REFRESH)
            break
        except Killed:
            kills += 1
    assert kills >= 4
    assert weights_of(state) == whole.end
    assert asked == whole.asked
    for name in ("rounds.jsonl", "round-003/samples.jsonl", "round-003/stage.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_a_damaged_round_is_made_again_without_a_label(parts, whole, tmp_path):
    """Its samples come from the checkpoint at its beginning."""
    asked = collections.Counter()

    def dies(done):
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        online(parts, tmp_path / "run", reward=counting(asked), measured=dies, refresh=REFRESH)
    saved = saved_run(tmp_path / "run" / "checkpoints", place="")
    assert saved is not None
    assert saved.step == 5  # in the middle of a round, of which the reference is the first policy
    file = tmp_path / "run" / "round-002" / "samples.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"logp": -', b'"logp": -1', 1))
    assert weights_of(online(parts, tmp_path / "run", reward=counting(asked), refresh=REFRESH)) == whole.end
    assert asked == whole.asked


@pytest.mark.parametrize(("elicitation", "pairs"), [("disagreement", "all"), ("uncertainty", "bradley_terry")])
def test_labels_are_spent_on_the_prompts_that_are_chosen(parts, tmp_path, elicitation, pairs):
    asked = collections.Counter()
    online(parts, tmp_path, rounds=2, reward=counting(asked), elicitation=elicitation, candidates=2, prompts=3, pairs=pairs)
    for number in (0, 1):
        prompts = [json.loads(line) for line in (tmp_path / f"round-{number:03}" / "prompts.jsonl").read_text().splitlines()]
        assert len(prompts) == 6
        estimates, chosen = (
            np.array([one["estimates"] for one in prompts]),
            [n for n, one in enumerate(prompts) if one["asked"]],
        )
        assert choose_prompts(estimates, [[" a", " b", " c"]] * 6, 3, how=elicitation).tolist() == chosen
        assert np.any(estimates) == (number > 0)
    assert sum(asked.values()) == len(asked) == 2 * 3 * 3


def test_soft_pairs_bring_the_beta_of_their_round_and_how_sure_their_labels_are(parts, tmp_path):
    options = {"pairs": "soft", "beta_last": 0.025, "rounds": 2, "reward_scale": 0.3}
    with RunDir(tmp_path) as run:
        made = rounds_of(parts, run.path, options)
        for number, beta in enumerate((0.1, 0.025)):
            made.update(number * STEPS, parts.world.reference, "weights")
            batch = made.batch(number * STEPS)
            extras, used = batch.rows.extras, batch.index >= 0
            assert extras is not None
            np.testing.assert_allclose(extras["beta"][used], beta)
            samples, scores = (
                [json.loads(line) for line in (tmp_path / f"round-00{number}" / name).read_text().splitlines()]
                for name in ("samples.jsonl", "scores.jsonl")
            )
            score = {(n // 3, n % 3): row["score"] for n, row in enumerate(scores)}
            assert len(samples) == len(score) == 12
            places = [batch.uids[place].replace(":", "-").split("-")[1:] for place in batch.index[used]]
            gaps = np.array([score[n, w] - score[n, l] for n, w, l in (map(int, place) for place in places)])
            assert gaps.min() > 0
            np.testing.assert_allclose(extras["label_smoothing"][used], 1 / (1 + np.exp(0.3 * gaps)), rtol=1e-5)


def test_padding_examples_of_a_batch_have_a_beta_that_losses_can_divide_by(parts, tmp_path):
    with RunDir(tmp_path) as run:
        made = rounds_of(parts, run.path, {"pairs": "all", "beta_last": 0.025, "rounds": 2})
        made.update(0, parts.world.reference, "weights")
        batch = made.batch(0)
        assert (batch.index < 0).any()
        np.testing.assert_allclose(batch.rows.extras["beta"], 0.1)
        logps = np.zeros((len(batch.index), 2), np.float32)
        assert np.isfinite(ipo_loss(logps, logps, beta=batch.rows.extras["beta"])[0]).all()


@pytest.mark.parametrize(("refresh", "read"), [(0, [1, 2, 3]), (2, [2, 3])])
def test_steps_read_the_newest_rounds_that_have_their_reference(parts, tmp_path, refresh, read):
    with RunDir(tmp_path) as run:
        made = rounds_of(parts, run.path, {"replay": 3, "steps": 6, "refresh": refresh})
        for number in range(4):
            made.update(6 * number, parts.world.reference, f"weights {number}")
    uids = [uid for step in range(18, 24) for uid in uids_of(made.batch(step))]
    pairs = {n: len((tmp_path / f"round-{n:03}" / "pairs.jsonl").read_text().splitlines()) for n in read}
    seen = collections.Counter(int(uid.split(":")[0].removeprefix("round ")) for uid in set(uids))
    assert dict(seen) == pairs


def uids_of(batch):
    return [batch.uids[place] for place in batch.index[batch.index >= 0]]


def test_a_run_that_reads_earlier_rounds_ends_in_the_same_bits_after_kills(parts, tmp_path):
    whole = weights_of(online(parts, tmp_path / "whole", replay=3))
    assert whole != weights_of(online(parts, tmp_path / "newest"))
    for number in itertools.count(2):
        left = itertools.count(3 * number, -1)

        def tick(left=left):
            if next(left) == 0:
                raise Killed

        try:
            assert weights_of(online(parts, tmp_path / "run", tick=tick, replay=3)) == whole
            break
        except Killed:
            continue
    assert number > 3


def test_an_earlier_round_that_is_damaged_is_named(parts, tmp_path):
    with RunDir(tmp_path) as run:
        made = rounds_of(parts, run.path, {"replay": 2})
        made.update(0, parts.world.reference, "weights 0")
        (tmp_path / "round-000" / "scores.jsonl").write_text("")
        with pytest.raises(CheckpointDamaged, match="round-000 is damaged, but round 1 also learns from it"):
            made.update(STEPS, parts.world.reference, "weights 1")


def test_a_round_without_a_pair_says_why(parts, tmp_path):
    with pytest.raises(DataError, match=r"round 0: no pair is left, of 4: 4 ties; ask for more a round \(online.prompts"):
        online(parts, tmp_path, reward=lambda prompts, completions: np.zeros(len(completions)))


@pytest.mark.parametrize("way", ["pmap", "mesh"])
def test_devices_do_not_matter(tokenizer, parts, whole, tmp_path, way):
    other = make_parts(
        tokenizer, lambda model: pmap_partitioner() if way == "pmap" else mesh_partitioner(make_mesh(fsdp=2, data=2), model)
    )
    state = online(other, tmp_path, rounds=2)
    expected = online(parts, tmp_path / "one", rounds=2)
    found = other.world.partitioner.get_state(state).params
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), jax.device_get(found), jax.device_get(expected.params)
    )


def test_a_loop_of_ones_own_is_twenty_lines(parts):
    world, prompts = parts.world, parts.world.train
    tx, key = dpo_jax.make_optimizer(1e-2, max_grad_norm=1.0), jax.random.key(0)
    model, loss = world.model, functools.partial(dpo_jax.dpo_loss, beta=0.1)
    step = jax.jit(functools.partial(dpo_jax.dpo_step, model=model, tx=tx, loss=loss))
    state = dpo_jax.init_state(world.reference, tx)
    means = []
    for number in range(6):
        drawn = draw_prompts(len(prompts.ids), 8, seed=0, number=number)
        some = prompts.of(drawn)
        samples = sample_completions(
            world.complete, world.logps, state.variables, some, 4, jax.random.fold_in(key, number), reference=world.reference
        )
        rewards = np.array([[text.count("e") for text in its] for its in samples.texts], float)
        means.append(rewards.mean())
        pairs, _ = choose_pairs(samples.texts, rewards, how="best_worst")
        if not len(pairs):  # on some processors the policy gives the same text to each prompt by then
            break
        encoded, ref_logps = encoded_pairs(samples, pairs)
        rows = dpo_jax.packed_rows(encoded, length=256, ref_logps=ref_logps)
        for _ in range(4):
            state, _ = step(state, rows)
    assert means[-1] > means[0] + 0.2
