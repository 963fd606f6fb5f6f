"""Options of low-rank adaptation; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Train a low-rank adapter beside frozen weights (LoRA, Hu et al. 2021) instead of the weights. Off without a rank."""

    rank: int | None = None
    """Rank of the adapter, for example 16; none: train the weights themselves."""
    alpha: float = 16.0
    """The adapter is multiplied by alpha / rank."""
    targets: str = "all"
    """Linear layers with an adapter, separated by commas: all, attention, mlp, or names such as query or q_proj."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA)."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the frozen weights are kept. bfloat16 halves them, and is exact where their files are bfloat16."""

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
