"""Entries of a family's tensor table: a name in the checkpoint, our parameters, and the layout that relates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Box = tuple[slice, ...]
"""A slice with a beginning and an end for each axis."""


class Layout(NamedTuple):
    """How one checkpoint tensor relates to our arrays of one layer. `to_hf` inverts `to_ours` exactly; nothing is computed."""

    to_ours: Callable[[np.ndarray], Sequence[np.ndarray]]
    to_hf: Callable[[Sequence[np.ndarray]], np.ndarray]
    hf_shape: Callable[[Sequence[Shape]], Shape]  # shape of the tensor, from those of our arrays
    transposed: bool = False  # our last axis is the tensor's first

    def part(self, read: Callable[[Box], np.ndarray], shape: Shape, which: int, box: Box) -> np.ndarray:
        """The part `box` of `to_ours(tensor)[which]`, for a tensor of this shape whose parts `read(box)` returns.

        For one or two axes: our arrays are then the tensor itself, or runs of its outputs.
        """
        axes = list(reversed(box)) if self.transposed else list(box)
        outputs = 0 if self.transposed else len(shape) - 1  # the axis along which several of our arrays may be concatenated
        wanted = self.to_ours(np.arange(shape[outputs]))[which][axes[outputs]]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        cut = [(*axes[:outputs], slice(int(run[0]), int(run[-1]) + 1), *axes[outputs + 1 :]) for run in runs if len(run)]
        found = np.concatenate([read(one) for one in cut], axis=outputs) if len(cut) != 1 else read(cut[0])
        return found.T if self.transposed else found


SAME = Layout(lambda a: [a], lambda ours: ours[0], lambda shapes: shapes[0])
# torch.nn.Linear keeps [out, in], and GPT-2 [in, out]. Our kernels have D first: [in, out] for those that read the residual
# stream, [out, in] for those that write to it.
TRANSPOSED = Layout(lambda a: [a.T], lambda ours: ours[0].T, lambda shapes: shapes[0][::-1], transposed=True)
# GPT-2 keeps query, key and value side by side on the last axis.
SIDE_BY_SIDE = Layout(
    lambda a: np.split(a, 3, axis=-1),
    lambda ours: np.concatenate(ours, axis=-1),
    lambda shapes: (*shapes[0][:-1], 3 * shapes[0][-1]),
)


def per_head(heads: int) -> Layout:
    """GPT-NeoX: query, key and value of head 0, then of head 1, ... on the output axis, `[N * 3 * H, D]` or `[N * 3 * H]`."""

    def to_ours(a: np.ndarray) -> list[np.ndarray]:
        split = a.reshape(heads, 3, -1, *a.shape[1:])
        return [split[:, i].reshape(-1, *a.shape[1:]).T for i in range(3)]

    def to_hf(ours: Sequence[np.ndarray]) -> np.ndarray:
        parts = [a.T.reshape(heads, -1, *a.T.shape[1:]) for a in ours]
        stacked = np.stack(parts, axis=1)
        return stacked.reshape(-1, *stacked.shape[3:])

    return Layout(to_ours, to_hf, lambda shapes: (3 * shapes[0][-1], *shapes[0][:-1]), transposed=True)


def stacked(*sizes: int) -> Layout:
    """Phi-3 layout: several `torch.nn.Linear`s with these numbers of outputs, concatenated on the output axis, `[sum, D]`."""
    ends = np.cumsum(sizes)

    def to_ours(a: np.ndarray) -> list[np.ndarray]:
        return [part.T for part in np.split(a, ends[:-1])]

    def to_hf(ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([a.T for a in ours])

    return Layout(to_ours, to_hf, lambda shapes: (int(ends[-1]), *shapes[0][:-1]), transposed=True)


class Tensor(NamedTuple):
    """One entry of a family's table. `{}` in the name stands for the layer; `paths` under "layers/" are stacked over layers.

    In a mixture of experts a layer has `experts` such tensors, stacked within the layer; `{expert}` stands for the expert.
    """

    name: str
    paths: tuple[str, ...]
    layout: Layout = SAME
    alias: str | None = None  # another name used on the Hub
    experts: int = 0

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def names(self, layer: int | None) -> list[str]:
        """Its names in a checkpoint: one, or one per expert."""
        if not self.experts:
            return [self.name.format(layer)]
        return [self.name.format(layer, expert=expert) for expert in range(self.experts)]

    def of_layers(self, layers: int) -> list[tuple[str, int | None]]:
        """Its names in a checkpoint with this many layers, each with its layer."""
        return [(name, layer) for layer in (range(layers) if self.stacked else [None]) for name in self.names(layer)]

    def loaded(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The checkpoint's tensors under `names`, as our arrays of one layer."""
        if not self.experts:
            return list(self.layout.to_ours(arrays[0]))
        return [np.stack(of_all) for of_all in zip(*map(self.layout.to_ours, arrays), strict=True)]

    def hf_shape(self, ours: Sequence[Shape]) -> Shape:
        """The shape of each of `names`, from those of our arrays of one layer."""
        return self.layout.hf_shape([shape[1:] for shape in ours] if self.experts else ours)


def linear(hf: str, ours: str, bias: bool, layout: Layout = TRANSPOSED) -> list[Tensor]:
    """A `torch.nn.Linear` named `hf`, whose weight is our kernel `ours`. SAME for one that writes to the residual stream."""
    weight = Tensor(f"{hf}.weight", (f"{ours}/kernel",), layout)
    return [weight, Tensor(f"{hf}.bias", (f"{ours}/bias",))] if bias else [weight]


def fused(hf: str, bias: bool, layout: Layout) -> list[Tensor]:
    """Query, key and value in one tensor."""

    def paths(leaf: str) -> tuple[str, ...]:
        return tuple(f"layers/attention/{part}/{leaf}" for part in ("query", "key", "value"))

    weight = Tensor(f"{hf}.weight", paths("kernel"), layout)
    return [weight, Tensor(f"{hf}.bias", paths("bias"), layout)] if bias else [weight]


def norm(hf: str, ours: str, bias: bool) -> list[Tensor]:
    """A norm named `hf`, whose weight is our scale."""
    weight = Tensor(f"{hf}.weight", (f"{ours}/scale",))
    return [weight, Tensor(f"{hf}.bias", (f"{ours}/bias",))] if bias else [weight]
