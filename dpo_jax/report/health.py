"""Health notes of a preference run: what is unusual in its evaluation, why it matters, and what to try.

Each check reads the policy's and the reference's columns of `eval/report.json` and the training rows of `metrics.jsonl`. It
returns a `Note`, None (nothing unusual), or `NOT_MEASURED`. The thresholds are rules of thumb, and are stated in the notes.
Sources:

- Displacement: preference training can lower the likelihood of the chosen completions, and move probability to completions that
  nobody preferred. Razin et al. 2024, "Unintentional Unalignment: Likelihood Displacement in DPO", arXiv 2410.08847; Pal et al.
  2024, "Smaug: Fixing Failure Modes of Preference Optimization with DPO-Positive", arXiv 2402.13228.
- KL: the true reward stops improving, then falls, as the KL grows. Gao et al. 2023, "Scaling Laws for Reward Model
  Overoptimization", arXiv 2210.10760; Rafailov et al. 2024, arXiv 2406.02900, for DPO. Best-of-N has a KL of at most
  log N - (N - 1)/N.
- Length: DPO tends towards longer texts. Park et al. 2024, "Disentangling Length from Quality in Direct Preference
Optimization",
  arXiv 2403.19159. The DPO paper finds that GPT-4 as a judge prefers longer, more repetitive summaries than people do.
- Repetition: seq-rep-4 of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax.plotting.curves import EVAL, KL_OF_SAMPLES, series

Values = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
NOT_MEASURED = "not measured"
DISPLACED = 1.0  # nats by which the log-probability of the chosen may fall
CUT = 0.1  # share of truncated samples
FAR = 10.0  # KL in nats
LONGER, SHORTER = 1.25, 0.5  # length relative to the reference
GAP = 0.1  # between training and held-out accuracy
RISE = 1.05  # relative to the lowest held-out loss
REPEATED, REPEATED_MORE = 0.1, 0.05  # share of repeated 4-grams, and excess over the reference


class Note(NamedTuple):
    """A finding with its number and threshold, its meaning, and what to try."""

    name: str
    found: str
    meaning: str
    remedy: str

    @property
    def words(self) -> str:
        return f"{self.found} {self.meaning} {self.remedy}"


class Health(NamedTuple):
    """Result of the health checks. `fine`: checks without a finding; `not_measured`: checks without numbers in the run."""

    notes: list[Note]
    fine: list[str]
    not_measured: list[str]

    @property
    def summary(self) -> str:
        """The checks without a note, in one sentence."""
        words = f"Nothing unusual in: {', '.join(self.fine)}." if self.fine else ""
        left = f"Not measured: {', '.join(self.not_measured)}." if self.not_measured else ""
        return f"{words} {left}".strip()


Finding = Note | None | Literal["not measured"]


def examine(policy: Values, reference: Values, training: Rows = ()) -> Health:
    """Runs all checks. `policy` and `reference` come from `eval/report.json`, `training` are the rows of `metrics.jsonl`."""
    notes, fine, not_measured = [], [], []
    for name, check in CHECKS.items():
        found = check(policy, reference, training)
        if isinstance(found, Note):
            notes.append(found)
        else:
            (fine if found is None else not_measured).append(name)
    return Health(notes, fine, not_measured)


def examine_run(report: Mapping[str, Any], training: Rows = ()) -> Health:
    """`examine` for an evaluation report or, without one (`{}`), for the last evaluation during training."""
    if {"policy", "reference"} <= set(report):
        return examine(report["policy"], report["reference"], training)
    last = [row for row in training if any(name.startswith(EVAL) for name in row)][-1:]
    return examine({name.removeprefix(EVAL): value for row in last for name, value in row.items()}, {}, training)


def _accuracy(policy: Values, reference: Values, training: Rows) -> Finding:
    value, low, high = (policy.get(f"rewards/accuracies{end}") for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return NOT_MEASURED
    if low > 0.5:
        return None
    shown = f"Held-out accuracy {value:.3f} (95 % interval {low:.3f} to {high:.3f})"
    if high < 0.5:
        return Note(
            "accuracy",
            f"{shown} is below chance, 0.5.",
            "The policy prefers the rejected completions.",
            "Check whether chosen and rejected are swapped in one of the splits, or whether the splits differ in kind.",
        )
    return Note(
        "accuracy",
        f"{shown}: the interval includes 0.5, chance.",
        "These pairs do not show that the policy learned the preference.",
        "Use more held-out pairs for a narrower interval, or more training: pairs, epochs, a higher learning rate.",
    )


def _displacement(policy: Values, reference: Values, training: Rows) -> Finding:
    moved = policy.get("displacement/chosen")
    if moved is None:
        return NOT_MEASURED
    if moved >= -DISPLACED:
        return None
    return Note(
        "displacement of the chosen",
        f"The chosen completions became less likely, by {-moved:.1f} nats each (threshold: {DISPLACED:g} nat).",
        "Likelihood displacement: the loss sees only the margin, and the probability moves to texts that nobody preferred "
        "(Razin et al. 2024). Read the samples.",
        "Try a larger beta, a lower learning rate or fewer steps, SFT on the chosen completions first, and fewer pairs whose "
        "two completions are nearly alike.",
    )


def _kl(policy: Values, reference: Values, training: Rows) -> Finding:
    kl = policy.get("kl")
    if kl is None:
        return NOT_MEASURED
    if kl <= FAR:
        return None
    return Note(
        "KL",
        f"{KL_OF_SAMPLES} is {kl:.1f} nats per completion (noted above {FAR:g}; best-of-60,000 of the reference reaches 10).",
        "At this KL the implicit reward is no longer a guide: quality may fall while it rises (Gao et al. 2023).",
        "Try a larger beta, a lower learning rate or fewer steps; compare samples of earlier checkpoints.",
    )


def _cut(policy: Values, reference: Values, training: Rows) -> Finding:
    share, before = policy.get("cut"), reference.get("cut")
    if share is None:
        return NOT_MEASURED
    if share <= CUT:
        return None
    lost = before is not None and share > 2 * before
    return Note(
        "samples cut",
        f"{share:.0%} of the policy's samples were cut by the token limit"
        + (f", {before:.0%} of the reference's" if before is not None else "")
        + f" (noted above {CUT:.0%}).",
        "KL, rewards and lengths cover truncated text only."
        + (" The policy stops less often than the reference: it may have unlearned how to end its texts." if lost else ""),
        "Raise --eval.max-new-tokens"
        + ("; check whether chosen completions are truncated in training and so lack their end." if lost else "."),
    )


def _length(policy: Values, reference: Values, training: Rows) -> Finding:
    after, before = policy.get("tokens"), reference.get("tokens")
    if after is None or not before:
        return NOT_MEASURED
    ratio = after / before
    if SHORTER <= ratio <= LONGER:
        return None
    found = f"The policy's samples have {after:.1f} tokens, the reference's {before:.1f}: {ratio:.2f} times"
    if ratio < SHORTER:
        return Note(
            "length",
            f"{found} (noted below {SHORTER:g}).",
            "Texts end too early.",
            "Check whether chosen completions are the shorter ones in the data, and whether EOS follows them.",
        )
    return Note(
        "length",
        f"{found} (noted above {LONGER:g}).",
        "DPO tends towards longer texts (Park et al. 2024), and judges prefer them: length may explain a win rate.",
        "See how often chosen is the longer side (dpo-jax audit); compare at equal length (dpo-jax judge); try a larger beta.",
    )


def _repetition(policy: Values, reference: Values, training: Rows) -> Finding:
    share, before = policy.get("repetition"), reference.get("repetition") or 0.0
    if share is None:
        return NOT_MEASURED
    if share <= REPEATED or share <= before + REPEATED_MORE:
        return None
    return Note(
        "repetition",
        f"{share:.0%} of the 4-grams in a sample repeat an earlier one, {before:.0%} in the reference's (noted above "
        f"{REPEATED:.0%}, if it is {REPEATED_MORE:.0%} more than before).",
        "The policy has begun to loop.",
        "Try a larger beta, a lower learning rate or fewer steps.",
    )


def _gap(policy: Values, reference: Values, training: Rows) -> Finding:
    _, values = series(training, "rewards/accuracies")
    values = values[np.isfinite(values)]
    held_out, high = policy.get("rewards/accuracies"), policy.get("rewards/accuracies_high")
    if not len(values) or held_out is None or high is None:
        return NOT_MEASURED
    last = values[-math.ceil(len(values) / 10) :]
    seen = float(last.mean())
    if seen <= max(held_out + GAP, high):
        return None
    return Note(
        "train/held-out gap",
        f"Accuracy is {seen:.3f} on the training pairs of the last {len(last)} steps and {held_out:.3f} on held-out ones "
        f"(noted from a gap of {GAP:g} on, if it is outside the 95 % interval).",
        "The policy has memorized its training pairs, or the held-out ones are of a different kind.",
        "Try fewer epochs, more pairs, a larger beta.",
    )


def _held_out_loss(policy: Values, reference: Values, training: Rows) -> Finding:
    steps, losses = series(training, EVAL + "loss")
    steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
    if len(losses) < 2:
        return NOT_MEASURED
    best = int(losses.argmin())
    if losses[best] <= 0 or losses[-1] <= RISE * losses[best]:
        return None
    return Note(
        "held-out loss",
        f"The held-out loss was lowest after {steps[best]:,.0f} steps, {losses[best]:.4f}, and ended at {losses[-1]:.4f} "
        f"(noted from {RISE - 1:.0%} on).",
        "Training continued after it had stopped helping on held-out pairs.",
        "Try fewer steps or a lower learning rate, or take the checkpoint of that step (dpo-jax export --export.step).",
    )


CHECKS: dict[str, Callable[[Values, Values, Rows], Finding]] = {
    "accuracy": _accuracy,
    "displacement of the chosen": _displacement,
    "KL": _kl,
    "samples cut": _cut,
    "length": _length,
    "repetition": _repetition,
    "train/held-out gap": _gap,
    "held-out loss": _held_out_loss,
}


def repetition(ids: Sequence[int] | np.ndarray, n: int = 4) -> float:
    """Share of a sequence's n-grams that occurred earlier in it, in [0, 1] (seq-rep-n); 0 if it is shorter than n."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
