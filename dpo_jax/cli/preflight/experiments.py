"""`--check` of the robustness experiments."""

from __future__ import annotations

from dpo_jax.cli.preflight.inputs import Check


def robust(check: Check) -> None:
    """Options that do not go together, and how many runs there are."""
    from dpo_jax.cli.robust.runs import runs_of

    runs = runs_of(check.config)
    check.tell("runs", f"{len(runs)} of experiment {check.config.robust.experiment}")
