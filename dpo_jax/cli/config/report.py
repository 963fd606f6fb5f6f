"""Options of `report`; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dpo_jax.cli.config.file import TextList


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """One page about one or more runs: data, curves, evaluation, samples, failures, and which weights were scored."""

    runs: TextList | None = None
    """Run directories, separated by commas (short: name them right after `report`, separated by spaces)."""
    out: str | None = None
    """Folder for report.html, report.md and images/; none: report/ in the first run directory. Only an earlier report is
    replaced."""
    samples: int = 6
    """Number of prompts to show samples of; 0: none."""
    digests: bool = True
    """Read the exported weights again, to verify that they are the ones that were evaluated."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.samples < 0:
            yield "samples", f"must not be negative, got {self.samples}"

    def missing(self) -> Iterator[tuple[str, str]]:
        if not self.folders():
            yield "runs", "name at least one run directory, for example dpo-jax report runs/quickstart"

    def folders(self) -> list[str]:
        return [part.strip() for part in (self.runs or "").split(",") if part.strip()]
