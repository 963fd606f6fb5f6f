"""Rounds of an online run: the data of a round's steps are sampled from the policy at the beginning of the round.

`Rounds` is the argument `refresh` of `training.run.train`, and its `batch` is the stream. After the last step of a round,
training saves the state and calls `update`, which samples, requests labels, makes pairs and scores them under the reference.
Then training continues: it is one run, with one schedule and one optimizer state. Each round has a folder, `round-003`:

    samples.jsonl   completions of every candidate prompt: texts, token ids, log-probabilities of policy and reference
    prompts.jsonl   the candidates, and which of them were selected for labeling
    scores.jsonl    the scores of their completions
    pairs.jsonl     prompt, chosen, rejected: preferences that `dpo-jax dpo --data.path` reads
    stage.json      which of these are finished, what they depend on, and the row of the round in rounds.jsonl

Several hosts all make the same calls. They sample and score on the devices of all; the first one reads and writes the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.data.label import LabelCounts
from dpo_jax.data.layout import Layout
from dpo_jax.data.loader import Batch, batch_indices
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.data.terminal import json_text
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.lab.methods import row_parts
from dpo_jax.lab.world import World
from dpo_jax.online.batches import PairBatches, of_groups, plan_rows, prompt_groups, worst_case
from dpo_jax.online.choices import (
    Elicitation,
    PairsHow,
    beta_of_round,
    choose_pairs,
    choose_prompts,
    draw_prompts,
    soft_labels,
)
from dpo_jax.online.labels import Compare, LabelLog, compared, scored
from dpo_jax.online.references import KeptReferences
from dpo_jax.online.samples import ROW, Samples, encoded_pairs, read_samples, sample_completions
from dpo_jax.online.stage import Stage, read_stage
from dpo_jax.runtime.checkpoint import CheckpointDamaged
from dpo_jax.runtime.hosts import from_first, is_first
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.progress import SAY
from dpo_jax.types import Variables
from dpo_jax.writing import write_whole

ASKED = {"number": int, "asked": bool}
SCORE = {"number": int, "score": (float, None)}


class RoundOptions(NamedTuple):
    """Settings of a round. `beta` is that of the loss and of the implicit rewards. With `beta_last` the loss takes beta for
    each pair by keyword, and with soft pairs `label_smoothing` (`PairBatches.columns`)."""

    prompts: int  # labeled in a round
    completions: int  # of each
    pairs: PairsHow
    steps: int  # optimizer steps
    batch: int  # prompts a step
    beta: float  # of the first round
    seed: int
    candidates: int = 1  # prompts sampled for each one labeled
    elicitation: Elicitation = "uniform"
    refresh: int = 0  # the policy becomes the reference after so many rounds; 0: never
    layout: str = "packed"
    row_length: int | None = None
    reward_scale: float = 1.0  # logits of a label per unit of reward, for drawn or soft pairs
    microbatches: int = 1
    beta_last: float | None = None  # of the last of `rounds` rounds, see `beta_of_round`
    rounds: int = 1
    replay: int = 1  # number of newest rounds whose pairs the steps read

    def beta_of(self, number: int) -> float:
        return beta_of_round(self.beta, self.beta_last, number=number, rounds=self.rounds)


class Labeled(NamedTuple):
    """Training data of a round: the labeled samples, their rewards [N, K], and pairs [P, 3] of `choose_pairs`."""

    samples: Samples
    rewards: np.ndarray
    pairs: np.ndarray
    counts: LabelCounts
    undecided: int  # prompts left out because one of their completions has no score


class Rounds:
    """Makes or reads the rounds of a run in `folder`; see the module docstring.

    Args:
      world: prompts (`train`), the policy's model and partitioner, and the first reference.
      reward, compare: exactly one of them: a reward function of texts, or a function that compares two completions.
      log: the labels of the run.
      estimate: a learned reward for `elicitation` "disagreement"; None: the implicit reward of the policy.
      settings: JSON values on which samples, labels and pairs depend.
      start: digest of the initial weights, which are the first reference.
      references: store of the policies that became the reference; needed with `refresh`.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        options: RoundOptions,
        *,
        log: LabelLog,
        settings: Mapping[str, Any],
        start: str,
        reward: Reward | None = None,
        compare: Compare | None = None,
        estimate: Reward | None = None,
        references: KeptReferences | None = None,
        say: Callable[[str], None] = SAY,
    ) -> None:
        if (reward is None) == (compare is None):
            raise ValueError("give either a reward or a comparison function")
        if options.refresh and references is None:
            raise ValueError("a refreshed reference must be stored: give references")
        self.world, self.folder, self.options, self.log = world, folder, options, log
        self.every, self.record = options.steps, {}
        self._reward, self._compare, self._estimate = reward, compare, estimate
        self._settings, self._start, self._references, self._say = dict(settings), start, references, say
        self._current: tuple[int, PairBatches] | None = None

    # The interface that `train` calls

    def origin(self, done: int) -> int:
        """The step whose policy sampled the data of step `done`."""
        return done - done % self.every

    def resume(self, record: Mapping[str, Any]) -> None:
        """Continues from the `record` of a checkpoint."""
        self.record.clear()
        self.record |= record

    def lacks(self, step: int, weights: str) -> bool:
        """Whether the policy of `step`, whose digest is `weights`, is needed to complete its round."""
        number = step // self.every
        if self._refreshes(number) and not self._kept().has(number, weights):
            return True
        return not self._stage(number, weights, say=lambda words: None).finished

    def update(self, step: int, variables: Variables, weights: str, *, steps: Iterable[int] = ()) -> None:
        """Makes or reads the round that begins with `step`. `variables` are the policy's, `weights` their digest.

        A signal can interrupt it between batches (`runtime.pauses`). Raises `DataError` if no pair is left.
        """
        number = step // self.every
        if self._refreshes(number):
            self._kept().keep(number, variables, weights)
        stage = self._stage(number, weights, say=self._say)
        made = not stage.finished
        if made:
            self._make(stage, number, variables)
        labeled = self._labeled(stage, number)
        self.record |= {"step": step, "weights": weights}
        policies = {**self.record.get("policies", {}), str(number): weights}
        self.record["policies"] = {k: v for k, v in policies.items() if int(k) > number - self.options.replay}
        self._current = number, self._batches([*self._earlier(number), (number, labeled)], number)
        self._write_rounds(number)
        if made:
            self._say(_words(stage.record))

    def begin(self, variables: Variables) -> None:
        """Makes or reads the first round, sampled from the initial policy."""
        self.update(0, variables, self._start)

    def batch(self, step: int) -> Batch:
        """The batch of a step: a pure function of `step` and the files of its round."""
        number, within = divmod(step, self.every)
        if self._current is None or self._current[0] != number:
            place = f"the newest checkpoint of {self.folder} was damaged and set aside"
            raise CheckpointDamaged(f"{place}; run the same command again")
        pairs, size = self._current[1], self.options.batch
        seed = self.options.seed + 2**32 * (number + 1)  # a different order in each round
        indices = batch_indices(len(pairs.groups), batch=size, seed=seed, step=within)
        return pairs.batch(indices, size=size, part=self.world.partitioner.host_part)

    # The parts of a round

    def _refreshes(self, number: int) -> bool:
        return self.options.refresh > 0 and number > 0 and number % self.options.refresh == 0

    def _kept(self) -> KeptReferences:
        assert self._references is not None  # checked with the arguments
        return self._references

    def _reference_round(self, number: int) -> int:
        """The round whose first policy is the reference of round `number`; 0: the first reference."""
        return number - number % self.options.refresh if self.options.refresh else 0

    def _stage(self, number: int, weights: str, *, say: Callable[[str], None]) -> Stage:
        made = self._reference_round(number)
        reference = self._start if made == 0 else self._kept().digest(made)
        return Stage(
            self.folder / f"round-{number:03}",
            settings={**self._settings, "round": number},
            weights={"policy": weights, "reference": reference},
            say=say,
        )

    def _make(self, stage: Stage, number: int, variables: Variables) -> None:
        options, world = self.options, self.world
        samples = self._samples(stage, number, variables)
        pause()
        estimates = self._estimates(samples, number)
        # On different processors the estimates may differ in their last bits, and with them the choice.
        chosen = from_first(choose_prompts(estimates, samples.texts, options.prompts, how=options.elicitation))
        stage.put("prompts.jsonl", _prompt_rows(samples, estimates, {*chosen.tolist()}))
        asked = samples.of(chosen)
        texts = asked.prompts.texts, asked.texts
        if self._reward is not None:
            rewards = scored(*texts, self._reward, self.log, number=number, batch=world.batch)
        else:
            assert self._compare is not None
            rewards = compared(*texts, self._compare, self.log, number=number)
        stage.put("scores.jsonl", _score_rows(asked, rewards))
        labeled = self._labeled(stage, number)
        stage.put("pairs.jsonl", _pair_rows(labeled, self.world.stop_ids))
        stage.finish(self._row(number, samples, labeled))

    def _samples(self, stage: Stage, number: int, variables: Variables) -> Samples:
        if stage.has("samples.jsonl"):
            return read_samples(stage.rows("samples.jsonl", ROW), completions=self.options.completions)
        options, world = self.options, self.world
        count = options.prompts * (1 if options.elicitation == "uniform" else options.candidates)
        numbers = draw_prompts(len(world.train.ids), count, seed=options.seed, number=number)
        made = self._reference_round(number)
        # A policy that has just become the reference is read back from disk, as it is after a kill.
        reference = self._kept().load(made) if made else world.reference
        samples = sample_completions(
            world.complete,
            world.logps,
            variables,
            world.train.of(numbers),
            options.completions,
            jax.random.fold_in(jax.random.key(options.seed + 2), number),
            reference=reference,
            at_reference=number == made,
            numbers=numbers,
        )
        stage.put("samples.jsonl", samples.rows())
        return samples

    def _estimates(self, samples: Samples, number: int) -> np.ndarray:
        """Reward estimates for elicitation, before any label is requested: float64[C, K]."""
        if self._estimate is None or self.options.elicitation != "disagreement":
            return samples.implicit_rewards(self.options.beta_of(number))
        prompts = [prompt for prompt, its in zip(samples.prompts.texts, samples.texts, strict=True) for _ in its]
        return self._estimate(prompts, [text for its in samples.texts for text in its]).reshape(len(samples), -1)

    def _labeled(self, stage: Stage, number: int) -> Labeled:
        """The training data in the files of a stage."""
        options = self.options
        samples = read_samples(stage.rows("samples.jsonl", ROW), completions=options.completions)
        asked = [row["asked"] for row in stage.rows("prompts.jsonl", ASKED)]
        scores = [row["score"] for row in stage.rows("scores.jsonl", SCORE)]
        samples = samples.of(np.flatnonzero(asked))
        rewards = np.array(scores, np.float64).reshape(-1, options.completions)  # null becomes NaN
        decided = np.isfinite(rewards).all(axis=1)
        samples, rewards = samples.of(np.flatnonzero(decided)), rewards[decided]
        seed, eos = options.seed + number, self.world.tokenizer.eos_token
        logits = rewards * options.reward_scale
        pairs, counts = choose_pairs(samples.texts, logits, how=options.pairs, seed=seed, eos=eos)
        if not len(pairs):
            dropped = {name: count for name, count in counts._asdict().items() if name not in ("pairs", "labeled", "against")}
            causes = ", ".join(f"{count:,} {name}" for name, count in dropped.items() if count) or "no prompt has scores"
            remedy = "ask for more a round (online.prompts, online.completions), or end with fewer rounds"
            raise DataError(f"round {number}: no pair is left, of {counts.pairs:,}: {causes}; {remedy}", causes=[Cause.NO_ROWS])
        return Labeled(samples, rewards, pairs, counts, int((~decided).sum()))

    def _earlier(self, number: int) -> list[tuple[int, Labeled]]:
        """The earlier rounds that the steps of round `number` also read: within `replay`, and with the same reference."""
        first = max(self._reference_round(number), number - self.options.replay + 1)
        found = []
        for earlier in range(first, number):
            stage = self._stage(earlier, self.record["policies"][str(earlier)], say=self._say)
            if not stage.finished:
                words = f"{stage.folder} is damaged, but round {number} also learns from it (online.replay)"
                raise CheckpointDamaged(f"{words}: put its files back, or start over in another run.dir")
            found.append((earlier, self._labeled(stage, earlier)))
        return found

    def _batches(self, learned: Sequence[tuple[int, Labeled]], number: int) -> PairBatches:
        encoded, ref_logps, prompts, labels = [], [], [], []
        for earlier, labeled in learned:
            some, its = encoded_pairs(labeled.samples, labeled.pairs, name=f"round {earlier}")
            encoded += some
            ref_logps.append(its)
            prompts += [(earlier, int(prompt)) for prompt in labeled.pairs[:, 0]]  # separately for each round
            labels.append(soft_labels(labeled.rewards * self.options.reward_scale, labeled.pairs))
        groups = prompt_groups(encoded, prompts)
        if "layout" not in self.record:  # for all rounds: their batches share one program
            several = 2 if self.options.pairs == "best_worst" else self.options.completions
            longest = worst_case(self.world.train.ids, completions=several, tokens=self.world.max_new_tokens)
            shape = {"kind": self.options.layout, "batch": self.options.batch, "microbatches": self.options.microbatches}
            planned = plan_rows([*groups, longest], self.world.partitioner, **shape, length=self.options.row_length)
            self.record["layout"] = dataclasses.asdict(planned)
        # A run may continue on other devices: the number of rows must divide among the present ones.
        parts = row_parts(self.world.partitioner, self.options.microbatches)
        here = {"rows_multiple": parts["multiple"], "microbatches": parts["microbatches"]}
        layout = Layout.of({**self.record["layout"], **here})
        columns = {}
        if self.options.beta_last is not None:
            columns["beta"] = np.full(len(encoded), self.options.beta_of(number), np.float32)
        if self.options.pairs == "soft":
            columns["label_smoothing"] = np.concatenate(labels)
        placed = {name: of_groups(groups, values, pairs=layout.pairs) for name, values in columns.items()}
        return PairBatches(groups, of_groups(groups, np.concatenate(ref_logps), pairs=layout.pairs), layout, placed)

    def _row(self, number: int, samples: Samples, labeled: Labeled) -> dict[str, Any]:
        """The row of a round in `rounds.jsonl`. The KL is to the first reference."""
        first = samples.ref_logps
        if self._reference_round(number):
            prompts = samples.prompts.repeated(self.options.completions)
            ids = [ids for its in samples.ids for ids in its]
            first = self.world.logps(self.world.reference, prompts.ids, ids).reshape(samples.logps.shape)
        implicit, pairs = labeled.samples.implicit_rewards(self.options.beta_of(number)), labeled.pairs
        margins = implicit[pairs[:, 0], pairs[:, 1]] - implicit[pairs[:, 0], pairs[:, 2]]
        counts = labeled.counts
        return {
            "round": number,
            "step": number * self.every,
            "prompts": len(labeled.samples) + labeled.undecided,
            "candidates": len(samples),
            "labels": self.log.count(number),
            "labels_so_far": self.log.total(number),
            "pairs": len(pairs),
            "against": int(counts.against),
            **{name: int(getattr(counts, name)) for name in ("ties", "identical", "empty", "eos")},
            "undecided": labeled.undecided,
            "reward": None if self._reward is None else float(labeled.rewards.mean()),
            "kl": float(np.mean(samples.logps.astype(np.float64) - first)),
            "accuracy": float((1 + np.sign(margins)).mean() / 2),
        }

    def _write_rounds(self, number: int) -> None:
        if not is_first():
            return
        folders = (self.folder / f"round-{one:03}" for one in range(number + 1))
        stages = (read_stage(folder, say=lambda words: None) for folder in folders)
        rows = [stage["record"] for stage in stages if stage and stage["record"]]
        write_whole(self.folder / "rounds.jsonl", "".join(json_text(row) + "\n" for row in rows).encode())


def _words(row: Mapping[str, Any]) -> str:
    reward = "" if row["reward"] is None else f"reward of the labeled samples {row['reward']:.2f}; "
    return (
        f"round {row['round']}: {row['labels']:,} labels ({row['labels_so_far']:,} so far), {row['pairs']:,} pairs; {reward}"
        f"KL of all samples {row['kl']:.2f} nats; the implicit reward agrees with {row['accuracy']:.0%} of the new pairs"
    )


def _prompt_rows(samples: Samples, estimates: np.ndarray, asked: set[int]) -> Iterable[dict[str, Any]]:
    for n, (number, prompt) in enumerate(zip(samples.numbers.tolist(), samples.prompts.texts, strict=True)):
        yield {"number": number, "prompt": prompt, "asked": n in asked, "estimates": estimates[n].tolist()}


def _score_rows(samples: Samples, rewards: np.ndarray) -> Iterable[dict[str, Any]]:
    for n, (number, prompt) in enumerate(zip(samples.numbers.tolist(), samples.prompts.texts, strict=True)):
        for text, reward in zip(samples.texts[n], rewards[n].tolist(), strict=True):
            yield {"number": number, "prompt": prompt, "completion": text, "score": reward if np.isfinite(reward) else None}


def _pair_rows(labeled: Labeled, stop_ids: Sequence[int]) -> Iterable[dict[str, Any]]:
    """Pairs as format `trl` reads them; samples that were cut off are marked."""
    samples = labeled.samples
    for n, *both in labeled.pairs.tolist():
        sides = dict(zip(("chosen", "rejected"), both, strict=True))
        cut = [side for side, k in sides.items() if int(samples.ids[n][k][-1]) not in stop_ids]
        texts = {side: samples.texts[n][k] for side, k in sides.items()}
        yield {"prompt": samples.prompts.texts[n], **texts, **({"unended": cut} if cut else {})}
