"""`dpo-jax eval --rewards`: evaluates the implicit reward as a reward model on any preference set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax import loss_table
from dpo_jax.cli.config import Config, DpoConfig
from dpo_jax.data.encode import prompt_key
from dpo_jax.data.pairs import Preference, folder_of
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.data.terminal import json_text, one_line
from dpo_jax.evals.calibration import (
    accuracy,
    accuracy_by,
    correlations,
    length_bias,
    margins_of,
    mean_share,
    reliability,
    reward_variants,
)
from dpo_jax.evals.calibration_plot import plot_reliability
from dpo_jax.evals.rewardbench import is_rewardbench, section_scores
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.writing import writing

NAMES = {
    "implicit": "implicit reward",
    "per_token": "per token",
    "reference_free": "reference-free",
    "reference_free_per_token": "reference-free, per token",
}
LOGITS = ("dpo", "sigmoid", "robust")
"""Losses that fit the margin as the logit of the preference (Bradley-Terry), which calibration presumes."""
NO_LOGIT = "calibration presumes that the margin is a logit (Bradley-Terry), which this loss does not fit"


def write_rewards(
    config: Config,
    run_dir: RunDir,
    preferences: Sequence[Preference],
    held_out: EncodedSet,
    *,
    logps: np.ndarray,
    ref_logps: np.ndarray,
    weights: Mapping[str, str],
) -> None:
    """Writes `rewards.jsonl`, `report.json` and `reliability.png`, and prints the tables.

    `preferences` are those of `held_out`, in the same order; log-probabilities are float32[P, 2].
    """
    beta = beta_of(config.dpo)
    tokens = np.array([pair.scored_tokens for pair in held_out])
    rewards = reward_variants(logps, ref_logps, tokens, beta=beta)
    subsets = subset_names(preferences)
    margins = margins_of(rewards, logps, ref_logps)
    prompts = [prompt_key(pair) for pair in held_out]
    found = reliability(margins["implicit"], prompts, seed=config.run.seed)
    report: dict[str, Any] = {
        "pairs": len(held_out),
        "settings": {
            "policy": config.eval_policy(),
            "reference": config.dpo_reference(),
            "beta": beta,
            "loss": config.dpo.loss,
            "data": config.data.name(),
            "split": config.data.test_split,
        },
        "weights": dict(weights),
        "rewards": {
            name: _judged(margins[name], tokens, subsets, prompts, by_subset=name == "implicit", seed=config.run.seed)
            for name in NAMES
        },
        "calibration": found._asdict(),
        "bradley_terry": fits_logit(config.dpo),
        "length": length_bias(margins["implicit"], tokens, prompts, seed=config.run.seed),
    }
    with writing(run_dir.path / "rewards.jsonl") as file:
        for number, preference in enumerate(preferences):
            chosen, rejected = rewards["implicit"][number].tolist()
            line = {
                "uid": preference.uid,
                "subset": subsets[number] if subsets else None,
                "chosen": chosen,
                "rejected": rejected,
                "margin": chosen - rejected,
                "logps": logps[number].tolist(),
                "ref_logps": ref_logps[number].tolist(),
                "tokens": tokens[number].tolist(),
            }
            file.write(json_text(line) + "\n")
    write_json(run_dir.path / "report.json", report)
    title = f"Reliability of the implicit reward, beta {beta:g}"
    plot_reliability(found, margins["implicit"], run_dir.path / "reliability.png", title=title)
    print(rewards_table(report))
    print(f"\nfull report: {run_dir.path}/report.json, every pair: rewards.jsonl, figure: reliability.png")


def beta_of(section: DpoConfig) -> float:
    """The beta of the rewards. For losses without beta, rewards are in nats, as in the table of `eval`."""
    return section.beta if "beta" in loss_table.terms(section.loss)[0].loss.options else 1.0


def fits_logit(section: DpoConfig) -> bool:
    """Whether the main term of the loss makes the margin of the implicit reward the logit of the preference."""
    name = loss_table.terms(section.loss)[0].name
    usual = section.f_divergence == "reverse_kl" and not section.reference_free
    return name in LOGITS and usual and (name == "robust" or not section.label_smoothing)


def subset_names(preferences: Sequence[Preference]) -> list[str]:
    """The subset of each pair, from its row, or else the folder of its file. Empty if that does not distinguish any two."""
    names = [preference.subset or folder_of(preference.uid) or "none" for preference in preferences]
    return names if len(set(names)) > 1 else []


def _judged(
    margins: np.ndarray, tokens: np.ndarray, subsets: list[str], prompts: Sequence[bytes], *, by_subset: bool, seed: int
) -> dict[str, Any]:
    """Metrics of one reward: overall, as a mean over subsets, and its dependence on length."""
    differences = tokens[:, 0] - tokens[:, 1]
    found: dict[str, Any] = {**accuracy(margins, prompts), "length": correlations(margins, differences, prompts, seed=seed)}
    if subsets:
        rows = accuracy_by(margins, subsets, prompts)
        found["macro"] = mean_share(rows)
        if is_rewardbench(set(subsets)):
            found["rewardbench"] = section_scores(rows)
        if by_subset:
            found["subsets"] = rows
    return found


def rewards_table(report: Mapping[str, Any]) -> str:
    """The report as tables for the screen."""
    title, columns = f"{report['pairs']:,} held-out pairs", f"{'accuracy':>10}   95 % interval{'margin':>12}"
    lines = [f"{title:<34}{columns}{'Spearman with length':>23}"]
    for name, row in report["rewards"].items():
        rank = row["length"]["spearman"]
        tied = f"{'none' if rank is None else format(rank, 'z.3f'):>23}"
        lines.append(f"{NAMES[name]:<34}{_share(row)}{row['margin']:>12.4f}{tied}")
    implicit = report["rewards"]["implicit"]
    if "subsets" in implicit:
        lines += ["", f"{'implicit reward by subset':<34}{columns}{'pairs':>9}"]
        for row in implicit["subsets"]:  # subset names come from the data
            name = one_line(row["subset"])[:33]
            lines.append(f"{name:<34}{_share(row)}{row['margin']:>12.4f}{row['pairs']:>9,}")
        lines.append(f"{'mean over subsets':<34}{_share(implicit['macro'])}")
    if "rewardbench" in implicit:
        bench = implicit["rewardbench"]
        lines += ["", f"{'RewardBench':<34}{'accuracy':>10}   95 % interval"]
        lines += [f"{row['section']:<34}{_share(row)}{'':>12}{row['pairs']:>9,}" for row in bench["sections"]]
        lines.append(f"{'score: mean of the sections':<34}{_share(bench['score'])}")
        if bench["missing"]:
            lines.append(f"  note: not in this set: {', '.join(bench['missing'])}")
    lines += ["", *(f"{name:<34}{value}" for name, value in _reading(report))]
    if not report["bradley_terry"]:
        lines.append(f"  note: {NO_LOGIT}")
    return "\n".join(lines)


def _reading(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = report["calibration"]
    low, high = found["ece_interval"]
    less, more = found["overconfidence_interval"]
    rows = [
        ("calibration error (ECE)", f"{found['ece']:>10.3f}   {low:.3f} to {high:.3f}"),
        ("  if all beliefs were right", f"{found['expected_ece']:>10.3f}   above {found['expected_ece_high']:.3f} once in 20"),
        ("overconfidence", f"{found['overconfidence']:>10.3f}   {less:.3f} to {more:.3f}"),
    ]
    return rows + [(f"accuracy, {row['subset']}", _share(row)) for row in report["length"]["accuracy"]]


def _share(row: Mapping[str, float]) -> str:
    return f"{row['accuracy']:>10.3f}   {row['low']:.3f} to {row['high']:.3f}"
