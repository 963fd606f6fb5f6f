"""The reference's errors, computed once for each (pair, epoch) and kept on disk: the reference pass of Diffusion-DPO.

Noise and timestep depend only on (seed, pair, epoch), so errors are cached. They are kept in the cache of `dpo_jax.reference`,
whose records have checksums and are bound to an identity: a cache of other weights, another schedule or another seed is
refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.diffusion.step import ImagePairs
from dpo_jax.reference import BrokenReference, ReferenceCache
from dpo_jax.types import Array


def image_uids(images: Array, label: Array) -> np.ndarray:
    """int32[P], from 0: a hash of each image (or pair of images) and its label, for `ImagePairs.uid`."""
    return np.array([int.from_bytes(digest[:4], "little") >> 1 for digest in _digests(images, label)], np.int32)


class DiffusionReferences:
    """Errors of the reference for pairs of images, [P, 2, draws], computed or read from `folder`.

    Args:
      folder: of the cache; None: errors are not kept.
      identity: JSON values that the errors depend on: a digest of the reference's weights, schedule, seed, network.
      compute: compiled `compute(pairs) -> float32[P, 2, draws]`: `pair_errors` with the reference's variables. It gets batches
        of `batch` pairs, the last one padded with pairs of weight 0.
      draws: draws of noise and time for each pair and epoch.

    Raises `dpo_jax.reference.ForeignCache` for a cache of another identity, `BrokenReference` if an error is not finite.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        identity: Mapping[str, Any],
        compute: Callable[[ImagePairs], Array],
        *,
        draws: int = 1,
        batch: int = 256,
    ) -> None:
        self._compute, self._draws, self._batch = compute, draws, batch
        kind = draws if draws == 1 else f"{draws}, antithetic and systematic"
        named = {"what": "squared errors of diffusion noise", "draws": kind, **identity}
        self._cache = None if folder is None else ReferenceCache(folder, named)

    def of(self, pairs: ImagePairs) -> ImagePairs:
        """`pairs` (host arrays) with `ref_errors`. Errors that are not in the cache are computed and added to it."""
        if self._cache is None:
            return pairs.replace(ref_errors=self._all(pairs))
        keys = _keys(pairs, self._draws)
        if missing := self._cache.missing(keys):
            found = self._all(_chosen(pairs, np.array(missing)))
            self._cache.add([keys[number] for number in missing], found.swapaxes(1, 2).reshape(len(missing), -1))
        values = self._cache.lookup(keys).reshape(len(keys), self._draws, 2)
        return pairs.replace(ref_errors=np.ascontiguousarray(values.swapaxes(1, 2)))

    def _all(self, pairs: ImagePairs) -> np.ndarray:
        parts = []
        for start in range(0, len(pairs.uid), self._batch):
            places = np.arange(start, start + self._batch)
            inside = places < len(pairs.uid)
            part = _chosen(pairs, np.where(inside, places, 0))
            parts.append(np.asarray(self._compute(part.replace(weight=inside.astype(np.float32))))[inside])
        found = np.concatenate(parts)
        if len(bad := np.flatnonzero(~np.isfinite(found).all(axis=(1, 2)))):
            raise BrokenReference(f"pair {bad[0]}: the reference's error is {found[bad[0]].tolist()}; nothing was kept")
        return found


def _chosen(pairs: ImagePairs, places: np.ndarray) -> ImagePairs:
    fields = {name: np.asarray(getattr(pairs, name))[places] for name in ("images", "label", "uid", "epoch", "weight")}
    return ImagePairs(**fields)


def _keys(pairs: ImagePairs, draws: int) -> list[Encoded]:
    """Cache keys of each (pair, epoch): a ranking of 2 * draws "completions", the two images of each draw."""
    sides = [np.array([draw, side], np.int32) for draw in range(draws) for side in range(2)]
    found = []
    for digest, uid, epoch in zip(_digests(pairs.images, pairs.label), pairs.uid, pairs.epoch, strict=True):
        words = np.concatenate([np.frombuffer(digest, "<i4"), np.array([uid, epoch], np.int32)]).astype(np.int32)
        found.append(Encoded(words, sides[0], sides[-1], between=tuple(sides[1:-1]), uid=f"pair {uid}, epoch {epoch}"))
    return found


def _digests(images: Array, label: Array) -> list[bytes]:
    images = np.ascontiguousarray(images, "<f4")
    return [
        hashlib.blake2b(image.tobytes() + int(of).to_bytes(4, "little"), digest_size=16).digest()
        for image, of in zip(images, np.asarray(label), strict=True)
    ]
