"""Options of low-rank adaptation; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import TextList


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (LoRA, Hu et al. 2021): train an adapter beside frozen weights. Off unless rank is set."""

    rank: int | None = None
    """Rank of the adapter, for example 16; none: no adapter, train the weights themselves."""
    alpha: float = 16.0
    """LoRA scaling: the adapter is multiplied by alpha / rank."""
    targets: TextList = "all"
    """Linear layers that get an adapter, separated by commas: all, attention, mlp, or names such as query or q_proj."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights. bfloat16 halves their memory, and is exact if their files are bfloat16."""

    def check(self) -> Iterator[tuple[str, str]]:
        for field in ("rank", "alpha"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                yield field, f"must be greater than 0, got {value}"
        if self.rank is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    yield field.name, "is an option of LoRA, which is off: set lora.rank as well, or leave it out"
                    return
        if not self.targets.strip():
            yield "targets", "must name linear layers, for example all"
