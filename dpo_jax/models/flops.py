"""Floating-point operations of a preference pair by formula: those required, whatever a program recomputes or pads."""

from __future__ import annotations

from typing import NamedTuple

from dpo_jax.models.config import DecoderConfig


class PairFlops(NamedTuple):
    """Forward operations of one pair. Training takes three times as many: the backward pass has two products for each one.

    For `frozen` matrices it has only one. The few operations of an adapter beside them are not counted.
    """

    trunk: float
    attention: float
    head: float
    frozen: bool = False

    @property
    def forward(self) -> float:
        return self.trunk + self.attention + self.head

    @property
    def training(self) -> float:
        return self.passes * (self.trunk + self.head) + 3.0 * self.attention

    @property
    def passes(self) -> float:
        """Products in training for each product with a matrix in the forward pass."""
        return 2.0 if self.frozen else 3.0


def pair_flops(config: DecoderConfig, *, prompt: int, chosen: int, rejected: int) -> PairFlops:
    """With P, C and R tokens of prompt, chosen and rejected completion, the prompt shared:

        trunk      2 x (weights in matrices of the layers) x (P + C + R)
        attention  4 x N x H x (visible query-key pairs), summed over the layers; a window hides those further away
        head       2 x D x V x (C + R)

    Norms, activations, rotations and softmax are not counted, as is usual.
    """
    c = config
    windows = c.windows or (None,) * c.layers
    visible = sum(_visible(prompt, chosen, rejected, window) for window in windows)
    return PairFlops(
        trunk=2.0 * c.layers * layer_weights(c) * (prompt + chosen + rejected),
        attention=4.0 * c.heads * c.head_size * visible,
        head=2.0 * c.width * c.vocab_size * (chosen + rejected),
    )


def layer_weights(config: DecoderConfig) -> int:
    """Number of matrix weights in one layer that a token uses; of experts, those of its own."""
    return sum(rows * columns for rows, columns in _matrices(config))


def layer_widths(config: DecoderConfig) -> int:
    """Numbers per token that go into and come out of the matrix products of one layer."""
    return sum(rows + columns for rows, columns in _matrices(config))


def _matrices(c: DecoderConfig) -> list[tuple[int, int]]:
    queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
    mlp = [(c.width, c.mlp_width)] * (2 if c.gated_mlp else 1) + [(c.mlp_width, c.width)]
    if c.experts:
        mlp = mlp * c.experts_per_token + [(c.width, c.experts)]
    return [(c.width, queries), (c.width, keys), (c.width, keys), (queries, c.width), *mlp]


def _visible(prompt: int, chosen: int, rejected: int, window: int | None) -> int:
    def up_to(length: int) -> int:
        """Visible pairs among the first `length` positions of a text."""
        near = length if window is None else min(length, window)
        return near * (near + 1) // 2 + (length - near) * near

    return up_to(prompt + chosen) + up_to(prompt + rejected) - up_to(prompt)
