"""Options of `bench`, the benchmark against PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dpo_jax.cli.config.file import TextList, is_count
from dpo_jax.cli.config.ranges import Problem, positive


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Benchmark against PyTorch: same weights, same pairs in every step, contenders run in turn (needs the `bench` extra)."""

    contenders: TextList | None = None
    """Run only these, separated by commas: torch-live, torch-cached, trl, trl-best, jax-live ... jax-attention; none: all."""
    lengths: str | None = None
    """Use random tokens of exactly PROMPT/CHOSEN/REJECTED length, such as 400/500/500, instead of data; none: the train
    split."""
    lengths_vary: bool = False
    """Vary the lengths around bench.lengths (gamma distributed, as in Anthropic HH), up to four times as long."""
    rounds: int = 3
    """Rounds, in each of which all contenders run. The first also gives the loss curves and fills the compilation caches."""
    steps: int = 4
    """Timed optimizer steps (or batches of completions) per contender and round, after one untimed step."""
    gate_steps: int = 20
    """Steps over which losses, gradient norms and the final weights must agree before any speeds are compared."""
    groups: int = 4
    """Microbatches of similar length into which contenders that group by length (such as trl-best) split a batch."""
    torch_microbatches: int = 1
    """Equal parts into which the other PyTorch contenders split a batch, if it does not fit into memory."""
    torch_python: str | None = None
    """Python interpreter with torch and trl, if they cannot share an environment with JAX; none: the one running this."""
    sampling: str | None = None
    """Benchmark sampling instead: 32/64/128 completes 32 prompts of up to 64 tokens by 128 tokens, against
    transformers.generate."""
    completions: int = 1
    """Completions per prompt in the sampling benchmark."""
    ending: float = 0.0
    """Fraction of completions that end before their last token in the sampling benchmark, for a model with random weights."""
    scaling: bool = False
    """Also time our step at 1, 2, 4 and 8 times the tokens, by batch size and by length, and fit the exponents."""
    profile: bool = False
    """Also profile one more run of ours, print its slowest operations and keep the trace (short: --profile)."""

    def check(self) -> Iterator[Problem]:
        yield from positive(self, "rounds", "steps", "gate_steps", "groups", "torch_microbatches", "completions")
        if not 0 <= self.ending < 1:
            yield "ending", f"must be a share, at least 0 and less than 1, got {self.ending}"
        for field, usual in (("completions", 1), ("ending", 0.0)):
            if self.sampling is None and getattr(self, field) != usual:
                yield field, "belongs to the sampling benchmark: set bench.sampling too, or leave it out"
        if self.lengths is not None:
            parts = self.lengths.split("/")
            if len(parts) != 3 or not all(is_count(part) for part in parts):
                yield (
                    "lengths",
                    f"must be three lengths in tokens, prompt/chosen/rejected such as 400/500/500, got {self.lengths!r}",
                )
        if self.lengths_vary and self.lengths is None:
            yield "lengths_vary", "varies bench.lengths, which is not set; data have their own lengths"
        if self.sampling is not None:
            parts = self.sampling.split("/")
            if len(parts) != 3 or not all(is_count(part) for part in parts):
                yield (
                    "sampling",
                    "must be a number of prompts, the longest prompt and the new tokens of each, such as 32/64/128, got "
                    f"{self.sampling!r}",
                )
            for field in ("contenders", "lengths", "scaling", "profile"):
                if getattr(self, field):
                    yield field, "belongs to the training benchmark: leave out either it or bench.sampling"
