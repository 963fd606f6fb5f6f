"""Check that the scored weights are those of the run, and not the base model's."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_jax.report.run_record import RunRecord

START = "sft/export"
SHOWN = 12  # digits shown of the 64 of a SHA-256


def scored_weights(run: RunRecord, lying: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Alarms, and rows (name, digest, where such weights are) for each policy and reference that a stage reports as scored.

    `lying` are the digests of the run's model folders, by name ("dpo/export"); empty if they were not read.
    """
    alarms, rows = [], [[f"{folder}, as it is now", digest[:SHOWN], "-"] for folder, digest in lying.items()]
    trained = {folder: digest for folder, digest in lying.items() if folder != START}
    for folder, digest in trained.items():
        if digest == lying.get(START):
            alarms.append(f"{folder} holds the same weights as {START}: training changed nothing, or it was overwritten")
    for stage in run.stages.values():
        scored = stage.report.get("weights")
        if not isinstance(scored, Mapping):
            continue
        for role, digest in scored.items():
            same = ", ".join(folder for folder, other in lying.items() if other == digest)
            where = same or ("no model folder of this run" if lying else "not read")
            rows.append([f"{stage.name}: {role}", str(digest)[:SHOWN], where])
        alarms += _alarms(stage.name, scored.get("policy"), scored.get("reference"), lying, trained)
    return alarms, rows


def _alarms(
    stage: str, policy: str | None, reference: str | None, lying: Mapping[str, str], trained: Mapping[str, str]
) -> list[str]:
    if policy is None:
        return []
    digest = policy[:SHOWN]
    if policy == reference:
        return [f"{stage}: policy and reference are the same weights ({digest}): it compares the starting policy with itself"]
    if policy == lying.get(START):
        return [f"{stage}: what was scored as the policy ({digest}) is {START}, the starting policy"]
    found = []
    if trained and policy not in trained.values():
        found.append(
            f"{stage}: the policy that was scored ({digest}) is not {' or '.join(trained)} as it is now: it was trained or "
            "exported again since, or another policy was named. Evaluate again, or look for the one that was scored"
        )
    if START in lying and reference is not None and reference not in lying.values():
        found.append(f"{stage}: the reference ({reference[:SHOWN]}) is not {START} as it is now")
    return found
