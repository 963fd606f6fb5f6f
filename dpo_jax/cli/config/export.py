"""Options of `export`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.ranges import Problem, not_negative


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a checkpoint as a Hugging Face folder (config.json, safetensors, tokenizer)."""

    checkpoint: str | None = None
    """Checkpoint folder of a training run, such as runs/hh/sft/checkpoints; none: that of dpo, or of sft in a
    run without dpo."""
    step: int | None = None
    """Step to export (run.max_to_keep says how many are kept); none: the newest good one."""
    out: str | None = None
    """Folder to write: a new one, or an earlier export; none: export/ beside the checkpoints, or export-STEP/ for a step."""
    merge: bool = False
    """For an adapter (lora): write the whole model with the adapter merged in, by default to export-merged/."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights that export, dpo, ppo and reward-model write; none: that of the model that training began with,
    float32 for a new one (reward-model: that of the trained weights). sft always writes float32, so that dpo starts from
    exactly these weights."""

    push: str | None = None
    """Also upload the folder to this Hugging Face Hub repository, organization/name (short: --push); created if absent. Weights
    of an earlier model there, also a whole one where this is an adapter, are removed by the same commit."""
    public: bool = False
    """Create the repository as public; otherwise it is private. An existing repository stays as it is."""

    def check(self) -> Iterator[Problem]:
        yield from not_negative(self, "step")
        if self.push is not None and not re.fullmatch(r"\w[\w.-]{0,95}/[\w.-]{1,96}", self.push):
            yield "push", f"must be a repository of the Hub, organization/name, got {self.push!r}"
        if self.public and self.push is None:
            yield "public", "is for a pushed repository, but nothing is pushed: set export.push, or leave it out"
