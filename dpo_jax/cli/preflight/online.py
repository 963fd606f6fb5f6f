"""Checks of `online`, shared by `--check` and the command: unsupported options, and the labels a run will request."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_jax import loss_table
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.preflight.inputs import Check
from dpo_jax.cli.preflight.packages import judge_packages, reward_packages


def refuse_unfit(config: Config) -> None:
    """Raises `ConfigError` that lists all options that do not fit together."""
    if problems := list(_problems(config)):
        raise ConfigError("\n".join(f"{option}: {words}" for option, words in problems))


def _problems(config: Config) -> Iterator[tuple[str, str]]:
    section, dpo = config.online, config.dpo
    if loss_table.rows_of(dpo.loss) != "pairs":
        kind = loss_table.example_word(dpo.loss)
        yield "dpo.loss", f"{dpo.loss} learns from {kind}, but rounds make pairs: use a loss of pairs, such as dpo"
    if dpo.ld_alpha != 1:
        yield "dpo.ld_alpha", "depends on both completions of a pair; online reads each alone: leave it at 1"
    if dpo.param_dtype != "float32":
        yield "dpo.param_dtype", "online keeps parameters in float32; leave it out"
    if dpo.reference is not None:
        yield "dpo.reference", "the reference of online is the initial policy; leave it out"
    if dpo.refresh_reference_steps is not None:
        yield "dpo.refresh_reference_steps", "is counted in rounds here: set online.refresh_reference_rounds instead"
    if dpo.keeps_best():
        option = "patience" if dpo.patience else "keep_best"
        yield f"dpo.{option}", "online always runs online.rounds rounds and ends with the last weights; leave it out"
    if section.refresh_reference_rounds is not None and not loss_table.uses_reference(dpo.loss):
        yield "online.refresh_reference_rounds", f"loss {dpo.loss} has no reference to refresh: leave it out"
    yield from _columns(config)
    if section.sampled() > config.frontier.prompts:
        each = "" if section.elicitation == "uniform" else f" x {section.candidates} candidates"
        yield (
            "online.prompts",
            f"{section.prompts}{each} are more than the {config.frontier.prompts} of frontier.prompts; raise that, or lower it",
        )
    if section.reward == "judge":
        remedies = {"prompt": "choose one, for example dialogue", "model": "name the judge, for example gpt-4-0314"}
        yield from ((f"judge.{name}", remedy) for name, remedy in remedies.items() if getattr(config.judge, name) is None)


def _columns(config: Config) -> Iterator[tuple[str, str]]:
    """Options that differ from pair to pair; the loss must take them, and nothing else may set them."""
    section, dpo = config.online, config.dpo
    options = loss_table.LOSSES[dpo.loss].options if dpo.loss in loss_table.LOSSES else ()
    if section.beta_last is not None and "beta" not in options:
        yield "online.beta_last", f"loss {dpo.loss} takes no beta per pair: use dpo or another loss with a beta"
    if section.pairs == "soft" and dpo.loss not in ("dpo", "sigmoid"):
        yield "online.pairs", f"soft labels are dpo's label_smoothing per pair, but dpo.loss is {dpo.loss}: use dpo"
    if section.pairs == "soft" and dpo.label_smoothing:
        yield "dpo.label_smoothing", "is set per pair by soft labels (online.pairs): leave it out"


def rounds(check: Check) -> None:
    """What a run will do, and whether it can."""
    config = check.config
    refuse_unfit(config)
    if config.online.reward == "judge":
        judge_packages(check)
    elif config.online.reward == "known":
        reward_packages(check)
    section, pairs = config.online, config.dpo.batch
    steps = section.rounds * section.steps_each(pairs)
    asked = section.rounds * section.prompts
    check.tell("rounds", f"{section.rounds}, {section.steps_each(pairs)} steps of {pairs} pairs each: {steps:,} steps")
    each = f"{section.labels_each()} {'comparisons' if section.compares() else 'rewards'}"
    check.tell("labels", f"at most {asked * section.labels_each():,}: {asked:,} prompts x {each}, by {section.reward}")
