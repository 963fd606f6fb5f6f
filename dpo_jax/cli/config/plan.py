"""Options of `plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dpo_jax.cli.config.ranges import Problem, positive


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Plan training on TPUs or GPUs that are not here: the real step is compiled for them, without weights or data."""

    topology: str | None = None
    """Target devices (short: --topology). A TPU slice as GENERATION:SHAPE in chips (v5e:4x4, v5p:4x4x8), or GPUs as
    CHIP:GPUS or CHIP:HOSTSxGPUS (h100:8, h100:4x8; a100, h100, h200, b200)."""
    prompt: int | None = None
    """Tokens in the prompt of every pair; none: data.max_prompt_length."""
    completion: int | None = None
    """Tokens in each completion; none: data.max_length minus the prompt."""
    sweep: bool = False
    """Try several meshes and remat policies, and rank them (short: --sweep)."""
    scale: bool = False
    """Also plan for 4, 16, 64 and 256 chips (GPUs: 8, 16, 32 and 64) with the same number of pairs per chip (short:
    --scale)."""
    json: str | None = None
    """Output file for the figures; none: plan/plan.json in the run directory."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "prompt", "completion")

    def missing(self) -> Iterator[Problem]:
        if self.topology is None:
            yield "topology", "name a slice of TPUs or a set of GPUs, for example --topology v5e:4x4 or --topology h100:8"
