"""Options of `diffusion`, the Diffusion-DPO experiments; a section of `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.file import TextList
from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.config.ranges import Problem, not_negative, positive

LOSSES = ("dpo", "ipo", "hinge", "discopop", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion-DPO on scikit-learn's digits (extra `lab`), or on a one-dimensional Gaussian with a known optimum."""

    experiment: Literal["digits", "gaussian"] = "digits"
    """digits: reward (stroke weight) against path KL on real digits; gaussian: the trained policy against closed-form
    optima."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Noise schedule."""
    steps: int = 50
    """Diffusion steps T, in training and in DDPM sampling; the Gaussian has gaussian_steps."""
    width: int = 48
    """Hidden size of the diffusion transformer."""
    layers: int = 3
    """Layers of the diffusion transformer."""
    heads: int = 4
    """Attention heads of the diffusion transformer."""
    pretrain_steps: int = 2000
    """Optimizer steps of denoising pretraining on the real digits, which gives the reference."""
    pretrain_batch: int = 128
    """Images per pretraining step."""
    pretrain_lr: float = 3e-3
    """Peak learning rate of pretraining; warm-up and cosine decay."""
    label_dropout: float = 0.1
    """Fraction of labels dropped in pretraining, for classifier-free guidance."""
    guidance: float = 1.0
    """Classifier-free guidance scale of all samples; 1 is the conditional model and takes half the time."""
    pairs: int = 2048
    """Number of pairs, each of two samples of the reference from one class."""
    strength: float = 2.0
    """Bradley-Terry labels: logit in nats per standard deviation of ink that one sample has more than the other."""
    loss: str = "dpo"
    """Pair loss by name; it must need only log-probabilities and beta."""
    betas: TextList = "0.005,0.02,0.05,0.1"
    """beta of the Diffusion-DPO runs. Squared errors are summed over the pixels and multiplied by T."""
    weighting: Literal["constant", "elbo"] = "constant"
    """Weights of the errors over time: constant, 1 as in the paper; or elbo, those of the evidence lower bound."""
    draws: int = 1
    """Draws of noise and time per pair and step. The paper has 1; more (antithetic) make the bound tighter."""
    batch: int = 64
    """Pairs per step; for Preferred-FT, chosen images per step."""
    epochs: float = 4.0
    """Passes over the pairs."""
    lr: float = 1e-4
    """Learning rate of Diffusion-DPO."""
    ft_lrs: TextList = "0.00002,0.0001"
    """Learning rates of the Preferred-FT runs."""
    evaluations: int = 2
    """Number of evaluations per run."""
    samples: int = 400
    """Samples per evaluation."""
    seeds: int = 3
    """Runs per setting, each with its own random labels, order, noise and samples."""
    gaussian_steps: int = 500
    """gaussian: diffusion steps T."""
    gaussian_draws: TextList = "1,2,4,8"
    """gaussian: values of draws to run; each 1 or even, because the optimum of the bound is computed for these."""

    def check(self) -> Iterator[Problem]:
        counted = ("steps", "width", "layers", "heads", "pretrain_steps", "pretrain_batch", "pairs", "draws", "batch", "epochs")
        yield from positive(
            self, *counted, "lr", "pretrain_lr", "evaluations", "samples", "seeds", "strength", "gaussian_steps"
        )
        yield from not_negative(self, "guidance")
        if not 0 <= self.label_dropout < 1:
            yield "label_dropout", f"must be a share in [0, 1), got {self.label_dropout}"
        if self.heads > 0 and self.width % (2 * self.heads):
            yield "width", f"must be a multiple of twice the heads ({2 * self.heads}), got {self.width}"
        if self.loss not in LOSSES:
            yield "loss", f"must be one of {', '.join(LOSSES)}, got {self.loss!r}"
        for field in ("betas", "ft_lrs", "gaussian_draws"):
            values = _values(getattr(self, field))
            whole = field != "gaussian_draws" or all(value == 1 or value % 2 == 0 for value in values)
            if not values or min(values) <= 0 or len(set(values)) < len(values) or not whole:
                kind = "numbers" if field != "gaussian_draws" else "whole numbers, 1 or even,"
                yield field, f"must be different {kind} above 0, separated by commas, got {getattr(self, field)!r}"


def _values(text: str) -> list[float]:
    try:
        return numbers(text)
    except ValueError:
        return []
