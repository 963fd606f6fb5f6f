"""Options of `scenes`; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.config.ranges import Problem, positive

CHOSEN = ("careless", "true")


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """Hallucination in captions of rendered scenes, by a tiny Gemma 3 that reads images."""

    train: int = 4000
    """Scenes with a caption each, for the encoder and SFT."""
    test: int = 400
    """Scenes that policies caption when they are measured."""
    pairs: int = 1024
    """Scenes with a pair of captions each."""
    chosen: str = "careless,true"
    """Better captions of the pairs: with the mistakes that captions of SFT have, or without any. The worse one has one more."""
    adds: float = 0.5
    """Share of careless captions that name an object that is not there."""
    omits: float = 0.1
    """Share of objects that careless captions leave out."""
    pair_omits: float = 0.3
    """Share of pairs whose worse caption leaves out an object that is there; the others add one that is not."""
    width: int = 64
    """Width of the language model, with two attention heads."""
    layers: int = 2
    """Its layers."""
    encoder_width: int = 64
    """Width of the vision encoder: one layer, four heads, nine patches."""
    encoder_steps: int = 400
    """Steps of its training, which tells the objects of an image. It is frozen from then on."""
    encoder_lr: float = 2e-3
    """Peak learning rate of it; warm-up and cosine decay."""
    sft_steps: int = 1000
    """Steps of SFT on careless captions: the reference."""
    sft_batch: int = 64
    """Captions of each."""
    sft_lr: float = 4e-3
    """Peak learning rate of it; warm-up and cosine decay."""
    batch: int = 64
    """Pairs a step."""
    epochs: float = 3.0
    """How often each pair is seen."""
    betas: str = "0.1,0.3"
    """beta of the DPO runs."""
    lr: float = 3e-4
    """Learning rate of DPO."""
    ft_lrs: str = "0.0003,0.001"
    """Learning rates of the Preferred-FT runs."""
    evaluations: int = 3
    """How often each run is measured."""
    seeds: int = 3
    """Runs of every setting: other pairs of captions, order and samples, from the same reference."""

    def check(self) -> Iterator[Problem]:
        yield from positive(
            self,
            *("train", "test", "pairs", "width", "layers", "encoder_width", "encoder_steps", "encoder_lr", "sft_steps"),
            *("sft_batch", "sft_lr", "batch", "epochs", "lr", "evaluations", "seeds"),
        )
        for field in ("adds", "omits", "pair_omits"):
            if not 0 <= getattr(self, field) < 1:
                yield field, f"must be a share in [0, 1), got {getattr(self, field)}"
        for field, multiple in (("width", 4), ("encoder_width", 4)):
            if getattr(self, field) % multiple:
                yield field, f"must be a multiple of {multiple}, got {getattr(self, field)}"
        kinds = self.kinds()
        if not kinds or set(kinds) - {*CHOSEN} or len(set(kinds)) < len(kinds):
            yield "chosen", f"must be one or several of {', '.join(CHOSEN)}, separated by commas, got {self.chosen!r}"
        for field in ("betas", "ft_lrs"):
            values = _values(getattr(self, field))
            if not values or min(values) <= 0 or len(set(values)) < len(values):
                yield field, f"must be different numbers above 0, separated by commas, got {getattr(self, field)!r}"

    def kinds(self) -> list[str]:
        """The kinds of better captions, in order."""
        return [kind.strip() for kind in self.chosen.split(",") if kind.strip()]


def _values(text: str) -> list[float]:
    try:
        return numbers(text)
    except ValueError:
        return []
