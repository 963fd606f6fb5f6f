"""Held-out preference metrics: accuracy, margin, and displacement of log-probabilities from the reference."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.encode import Encoded, prompt_key
from dpo_jax.data.loader import Batch
from dpo_jax.data.mixture import by_source
from dpo_jax.evals.intervals import by_prompt, score_interval
from dpo_jax.losses import label_accuracy, pair_accuracy, whole_set_signals
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Array


class NonFiniteLogps(FloatingPointError):
    """The policy gives NaN or infinity for a held-out pair; an accuracy computed from this would look valid."""


def held_out_logps(logps: Callable[[Any], np.ndarray], batches: Iterable[Batch], *, pairs: int) -> np.ndarray:
    """Log-probabilities float32[pairs, 2] in data order: `logps(rows) -> float32[P, 2]` over all `loader.eval_batches`. For
    rankings [.., K].

    Raises `NonFiniteLogps`, naming the first pair with a value that is NaN or infinite.

    >>> layout, logps_of = plan_layout(encoded, kind="packed", batch=2), jax.jit(partial(completion_logps, model))
    >>> batches = eval_batches(encoded, layout=layout, batch=2)
    >>> held_out_logps(lambda rows: logps_of(variables, rows), batches, pairs=len(encoded)).shape
    (2, 2)
    """
    result = np.zeros((0, 2), np.float32)
    with reported("evaluating", total=pairs, unit="pairs", brief=True) as task:
        for batch in batches:
            numbers, values = batch.of_examples(logps(batch.rows))
            if not len(result):
                result = np.full((pairs, values.shape[1]), np.nan, np.float32)
            result[numbers] = values
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(bad):
                uid, shown = batch.uids[numbers[bad[0]] - batch.first], ", ".join(f"{value:g}" for value in values[bad[0]])
                raise NonFiniteLogps(f"{uid}: the policy gives the log-probabilities {shown} (chosen, rejected)")
            task.advance(len(numbers))
            pause()
    return result


def completion_tokens(pairs: Iterable[Encoded]) -> np.ndarray:
    """Number of scored tokens of each completion: float32[P, 2], chosen first; for rankings [P, K]."""
    lengths = [pair.scored_tokens for pair in pairs]
    return np.array(lengths, np.float32).reshape(-1, len(lengths[0]) if lengths else 2)


def labels_of(examples: Sequence[Encoded]) -> np.ndarray | None:
    """Labels of single completions: float32[P], 1 for desirable ones. None for pairs and rankings."""
    if not len(examples) or examples[0].desirable is None:
        return None
    return np.array([one.desirable is True for one in examples], np.float32)


def preference_summary(
    logps: Array,
    ref_logps: Array,
    *,
    loss: Callable[..., tuple[Array, Array]],
    lengths: Array | None = None,
    desirable: Array | None = None,
    prompts: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """Loss, accuracy with its 95 % interval, margin and displacement, over `[P, 2]` log-probabilities of held-out pairs.

    `lengths` float[P, 2] are the numbers of scored tokens, for a loss that takes them. For rankings, [P, K], the best and the
    worst completion count. With the labels `desirable` float[P] it summarizes single completions (`losses.unpaired_metrics`).

    `prompts[P]` identify the prompts. Pairs of one prompt may share completions and are not independent, so the interval counts
    a prompt once, with the mean of its pairs.

    A pair counts as right if the implicit reward of the chosen completion is higher, and as half right in a tie
    (`losses.pair_accuracy`): a policy equal to its reference has accuracy 0.5.

    >>> logps, ref_logps = np.array([[-12.0, -15.0], [-9.0, -8.0]]), np.array([[-14.0, -13.0], [-9.0, -8.0]])
    >>> preference_summary(logps, ref_logps, loss=partial(dpo_loss, beta=0.5))["rewards/accuracies"]
    0.75
    """
    logps, ref_logps = np.asarray(logps), np.asarray(ref_logps)
    signals = whole_set_signals(loss, lengths, pairs=len(logps), desirable=desirable)
    losses, rewards = (np.asarray(x, np.float64) for x in loss(logps, ref_logps, **signals))
    log_ratios = np.asarray(logps, np.float64) - np.asarray(ref_logps, np.float64)
    if desirable is None:
        sides = [(rewards[:, place], log_ratios[:, place]) for place in (0, -1)]
        scores = pair_accuracy(rewards, logps, ref_logps)
    else:
        sides = [(rewards[which, 0], log_ratios[which, 0]) for which in (np.asarray(desirable) > 0, np.asarray(desirable) == 0)]
        scores = label_accuracy(logps, ref_logps, np.asarray(desirable))
    scores = np.asarray(scores, np.float64)
    low, high = score_interval(*by_prompt(scores, prompts))
    # Single completions may all have the same label.
    (chosen, moved), (rejected, moved_rejected) = ([float(x.mean()) if len(x) else 0.0 for x in side] for side in sides)
    return {
        "loss": float(losses.mean()),
        "rewards/accuracies": float(scores.mean()),
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "rewards/margins": chosen - rejected,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "displacement/chosen": moved,
        "displacement/rejected": moved_rejected,
    }


def summary_by_source(
    held_out: Sequence[Encoded], logps: np.ndarray, ref_logps: np.ndarray, *, loss: Callable[..., Any]
) -> dict[str, float]:
    """`preference_summary` of all held-out pairs, and `NAME/loss` and so on of each source if there are several."""

    def of(places: Any) -> dict[str, float]:
        options = {"lengths": lengths[places], "desirable": None if labels is None else labels[places]}
        return preference_summary(logps[places], ref_logps[places], loss=loss, prompts=prompts[places].tolist(), **options)

    lengths, labels, summary = completion_tokens(held_out), labels_of(held_out), {}
    prompts = np.array([prompt_key(pair) for pair in held_out], object)
    for source, places in by_source(pair.uid for pair in held_out).items():
        found = of(places)
        summary |= {f"{source}/{name}": found[name] for name in ("loss", "rewards/accuracies", "rewards/margins")}
    return {**of(slice(None)), **summary}
