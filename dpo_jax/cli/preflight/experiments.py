"""`--check` of the experiments on robustness and on several turns."""

from __future__ import annotations

from dpo_jax.cli.preflight.inputs import Check


def robust(check: Check) -> None:
    """Options that do not go together, and how many runs there are."""
    from dpo_jax.cli.robust.runs import runs_of

    runs = runs_of(check.config)
    check.tell("runs", f"{len(runs)} of experiment {check.config.robust.experiment}")


def dialogue(check: Check) -> None:
    """The same of the question game."""
    from dpo_jax.cli.dialogue_runs import runs_of

    check.tell("runs", f"{len(runs_of(check.config))}")
