"""Options of `scenes`, the image-captioning experiment; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dpo_jax.cli.config.file import TextList
from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.config.ranges import Problem, positive

CHOSEN = ("careless", "true")


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """Hallucination in captions of rendered scenes, with a tiny Gemma 3 that reads images."""

    train: int = 4000
    """Scenes with one caption each, for the encoder and SFT."""
    test: int = 400
    """Scenes that policies caption in each evaluation."""
    pairs: int = 1024
    """Scenes with one pair of captions each."""
    chosen: TextList = "careless,true"
    """Chosen captions of the pairs: careless, with the mistakes that SFT captions have; true, without any. The rejected one
    has one more."""
    adds: float = 0.5
    """Fraction of careless captions that name an object that is not there."""
    omits: float = 0.1
    """Fraction of objects that careless captions leave out."""
    pair_omits: float = 0.3
    """Fraction of pairs whose rejected caption omits an object that is there; the others add one that is not."""
    width: int = 64
    """Hidden size of the language model, which has two attention heads."""
    layers: int = 2
    """Layers of the language model."""
    encoder_width: int = 64
    """Hidden size of the vision encoder: one layer, four heads, nine patches."""
    encoder_steps: int = 400
    """Training steps of the encoder, which learns to recognize the objects of an image. It is frozen afterwards."""
    encoder_lr: float = 2e-3
    """Peak learning rate of the encoder; warm-up and cosine decay."""
    sft_steps: int = 1000
    """Steps of SFT on careless captions, which gives the reference."""
    sft_batch: int = 64
    """Captions per SFT step."""
    sft_lr: float = 4e-3
    """Peak learning rate of SFT; warm-up and cosine decay."""
    batch: int = 64
    """Pairs per step."""
    epochs: float = 3.0
    """Passes over the pairs."""
    betas: TextList = "0.1,0.3"
    """beta of the DPO runs."""
    lr: float = 3e-4
    """Learning rate of DPO."""
    ft_lrs: TextList = "0.0003,0.001"
    """Learning rates of the Preferred-FT runs."""
    evaluations: int = 3
    """Number of evaluations per run."""
    seeds: int = 3
    """Runs per setting, from the same reference, each with its own pairs of captions, order and samples."""

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
