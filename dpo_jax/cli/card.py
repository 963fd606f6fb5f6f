"""What a person reads of a run: the result table, and the model card beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_jax.cli.config import BASELINES, Config, DpoConfig
from dpo_jax.data.display import shown_prompt
from dpo_jax.data.terminal import printable
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.rundir import RunDir


def result_table(report: Mapping[str, Any]) -> str:
    """Policy against reference, one line a measure, and three samples of each."""
    reference, policy = report["reference"], report["policy"]
    lines = [f"{report['pairs']:,} held-out pairs{'':<27}{'reference':>12}{'policy':>12}"]
    lines += [f"{name:<45}{before:>12}{after:>12}  {note}".rstrip() for name, before, after, note in _rows(reference, policy)]
    for sample in report.get("samples", []):
        lines += ["", f"prompt      {_one_line(shown_prompt(sample))}", f"  before    {_one_line(sample['reference'])}"]
        lines += [f"  after     {_one_line(sample['policy'])}"]
    return "\n".join(lines)


def _rows(reference: Mapping[str, float], policy: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    rows = []

    def row(label: str, name: str, form: str = ".4f", note: str = "") -> None:
        if name in policy:
            rows.append((label, format(reference[name], f"z{form}"), format(policy[name], f"z{form}"), note))

    low, high = policy["rewards/accuracies_low"], policy["rewards/accuracies_high"]
    row("loss", "loss")
    row("preference accuracy", "rewards/accuracies", ".3f", f"95 % interval {low:.3f} to {high:.3f}")
    row("reward margin", "rewards/margins", ".3f")
    row("chosen displacement, log pi/pi_ref (nats)", "displacement/chosen", ".2f")
    row("rejected displacement (nats)", "displacement/rejected", ".2f")
    row("KL to the reference (nats per completion)", "kl", ".2f", f"+- {policy.get('kl_error', 0):.2f}, from samples")
    row("true reward of samples", "true_reward", ".2f", f"+- {policy.get('true_reward_error', 0):.2f}")
    row("tokens per sample", "tokens", ".1f")
    return rows


def _one_line(text: str, limit: int = 160) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def sft_card(config: Config, run: RunDir, *, step: int | None = None) -> str:
    """The card of an SFT run, after its last step or after `step`."""
    section = config.sft
    return _card(
        config,
        title="A language model fine-tuned on preferred completions",
        how=f"Supervised fine-tuning with dpo_jax: {section.epochs} epochs, batch {section.batch}, {section.optimizer}, "
        f"learning rate {section.lr:g}, warm-up over {section.warmup_steps} steps, then {section.schedule}.",
        start=config.model.path or f"new weights ({config.model.family})",
        results=_held_out(run, step),
        method="sft",
    )


def dpo_card(config: Config, run: RunDir, *, report: Mapping[str, Any] | None = None, step: int | None = None) -> str:
    """The card of a DPO run after its last step or after `step`, with the table of `dpo-jax eval` once there is one."""
    section = config.dpo
    return _card(
        config,
        title=f"A language model trained on preferences{'' if section.loss in BASELINES else ' with DPO'}",
        how=f"{_objective(section)}, {section.epochs} epochs, batch {section.batch}, {section.optimizer}, learning rate "
        f"{section.lr:g}, warm-up over {section.warmup_steps} steps, then {section.schedule}.",
        start=config.dpo_policy(),
        results=f"```\n{result_table(report)}\n```" if report else _held_out(run, step),
        method=section.loss if section.loss in BASELINES else "dpo",
    )


def _objective(section: DpoConfig) -> str:
    paper = "Rafailov et al. 2023, arXiv 2305.18290"
    if section.loss == "unlikelihood":
        return f"Unlikelihood training (a baseline of {paper}) with dpo_jax: alpha {section.alpha:g}"
    if section.loss == "preferred_ft":
        return f"Fine-tuning on preferred completions (a baseline of {paper}) with dpo_jax"
    return f"Direct Preference Optimization ({paper}) with dpo_jax: loss {section.loss}, beta {section.beta:g}"


def _held_out(run: RunDir, step: int | None) -> str:
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    judged = [row for row in rows if is_evaluation(row) and step in (None, row["step"])]
    if not judged:
        return f"Held-out, after {step} steps: not measured."
    final = judged[-1]
    rows = "\n".join(f"| {name.removeprefix('eval/')} | {value:.4f} |" for name, value in final.items() if name != "step")
    return f"Held-out, after {final['step']} steps:\n\n| measure | value |\n|---|---|\n{rows}"


def _card(config: Config, *, title: str, how: str, start: str, results: str, method: str) -> str:
    data = config.data.path or f"generated film reviews ({config.data.reviews_train:,} training pairs)"
    return f"""---
library_name: transformers
tags: [dpo_jax, {method}]
---
# {title}

{how}

- start: `{start}`
- data: {data}; limits {config.data.max_length} tokens, prompt {config.data.max_prompt_length}, {config.data.truncation}
- seed: {config.run.seed}; activations in {config.run.precision}

## Results

{results}

Everything needed to repeat the run is in its directory: `config.yaml`, `env.json`, `data_report.json`.
"""
