"""Features of images under a frozen encoder: computed once, kept on disk, and only ever used for what they were computed from.

A cache is a folder, which lies well beside that of the reference's log-probabilities: `identity.json` says what the features
belong to (encoder, processing of images), and files hold one record for each image, found by its digest. A checksum
covers the record and the identity. What is damaged is computed again. A cache of another encoder or processing is refused, and
an image that changes is another image.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.data.images import ImageFile, Processing, pixels
from dpo_jax.models.siglip import encode_images
from dpo_jax.models.vision_config import VisionConfig
from dpo_jax.reference import ForeignCache
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Array, Variables
from dpo_jax.untrusted import Unreadable, read_object
from dpo_jax.writing import leftovers, write_whole

VERSION = "dpo_jax image features 1"
IDENTITY, SUFFIX = "identity.json", ".features"
RECENT_BYTES, SCORES_BYTES = 2**30, 2**31
SAY = functools.partial(print, flush=True)


class FeatureCache(Mapping[str, np.ndarray]):
    """Features by the digest of their image, float32[T, W] each, read from `directory` when they are asked for.

    `identity` names all that they depend on, as JSON values (`feature_identity`). Raises `ForeignCache`, naming each field that
    differs, if the folder belongs to something else. A damaged record counts as absent, and in `damaged`. Several processes may
    use the folder at the same time: a file appears whole or not at all. `recent`: so many features are kept in memory.
    """

    def __init__(
        self, directory: str | os.PathLike[str], identity: Mapping[str, Any], *, shape: tuple[int, int], recent: int = 4096
    ) -> None:
        self.directory, self.shape, self.damaged = Path(directory), shape, 0
        self.directory.mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps({"version": VERSION, **identity, "shape": shape}, sort_keys=True))
        self._seed = zlib.crc32(json.dumps(self.identity, sort_keys=True).encode())
        self._record = np.dtype([("digest", "V32"), ("crc", "<u4"), ("values", "<f4", shape)])
        self._read = functools.lru_cache(maxsize=recent)(self._from_file)
        for leftover in leftovers(self.directory, IDENTITY, f"*{SUFFIX}"):
            leftover.unlink(missing_ok=True)
        self._claim()
        self._places: dict[str, list[np.void]] = {}  # of each digest; there are several where one was damaged
        self._taken: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Takes over what other processes have added since."""
        for path in sorted({*self.directory.glob(f"*{SUFFIX}")} - self._taken):
            self._take(path)

    def __getitem__(self, digest: str) -> np.ndarray:
        return self._read(digest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, digests: Sequence[str], features: np.ndarray) -> None:
        """Keeps the features of images, [n, T, W]: they are on disk when this returns, all of them or none.

        Raises FloatingPointError for NaN and infinity.
        """
        values = np.asarray(features, np.float32)
        if values.shape != (len(digests), *self.shape):
            raise ValueError(f"features of shape {(len(digests), *self.shape)} are expected, got {values.shape}")
        if not np.isfinite(values).all():
            raise FloatingPointError("the encoder gives NaN or infinity; nothing of this batch was kept")
        records = np.zeros(len(digests), self._record)
        for record, digest, one in zip(records, digests, values, strict=True):
            record["digest"], record["values"] = bytes.fromhex(digest), one
            record["crc"] = self._crc(record)
        content = records.tobytes()
        path = self.directory / f"{hashlib.sha256(content).hexdigest()[:32]}{SUFFIX}"
        write_whole(path, content)
        self._take(path)

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Those of `digests`, each once, of which there are no sound features."""
        return [digest for digest in dict.fromkeys(digests) if digest not in self]

    def _take(self, path: Path) -> None:
        """Takes over the records of a file. They are read when they are asked for."""
        self._taken.add(path)
        count = path.stat().st_size // self._record.itemsize
        records = np.memmap(path, self._record, "r", shape=(count,)) if count else ()
        for record in records:
            self._places.setdefault(record["digest"].tobytes().hex(), []).append(record)

    def _from_file(self, digest: str) -> np.ndarray:
        for record in self._places.get(digest, ()):
            if record["crc"] == self._crc(record):
                return np.array(record["values"])
            self.damaged += 1
        raise KeyError(digest)

    def _crc(self, record: np.void) -> int:
        return zlib.crc32(record["values"].tobytes(), zlib.crc32(record["digest"].tobytes(), self._seed))

    def _claim(self) -> None:
        path = self.directory / IDENTITY
        try:
            found = read_object(path)
        except (FileNotFoundError, Unreadable):  # without it each file tells by its checksum whether it belongs here
            found = None
        if found is not None and found != self.identity:
            names = sorted(name for name in {*found, *self.identity} if found.get(name) != self.identity.get(name))
            lines = [f"  {name}: cached with {found.get(name)!r}, now {self.identity.get(name)!r}" for name in names]
            raise ForeignCache(
                f"{self.directory} holds image features of something else:\n" + "\n".join(lines) + "\nChoose another folder."
            )
        if found is None:
            write_whole(path, (json.dumps(self.identity, indent=2, sort_keys=True) + "\n").encode())


def feature_identity(encoder: str, config: Any, processing: Processing) -> dict[str, Any]:
    """What features depend on: the digest of the encoder's weights, its configuration, the processing of images."""
    return {"encoder": encoder, "configuration": repr(config), "processing": processing.identity}


def open_features(
    directory: str | os.PathLike[str], encoder: str, config: VisionConfig, processing: Processing
) -> FeatureCache:
    """The cache of an encoder, of which `encoder` is the digest, in a folder of its own below `directory`.

    The folder is named after all that features depend on, so another encoder or processing has another one. Features that
    were read stay in memory, up to `RECENT_BYTES`.
    """
    identity, shape = feature_identity(encoder, config, processing), (config.tokens, config.width)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    recent = max(64, RECENT_BYTES // (4 * math.prod(shape)))
    return FeatureCache(Path(directory) / name, identity, shape=shape, recent=recent)


class Encoder(NamedTuple):
    """A compiled encoder: pixels float32[batch, height, width, 3] to float32[batch, T, W]."""

    encode: Callable[[np.ndarray], Array]
    batch: int


def on_devices(encoder: Variables, config: VisionConfig, devices: Sequence[Any]) -> Encoder:
    """The encoder on devices of this host.

    It takes as many images at a time for each device as keep its attention scores, which are not cut into blocks, within
    `SCORES_BYTES`.
    """
    each = min(64, max(1, SCORES_BYTES // (4 * config.heads * config.side**4)))
    mesh = Mesh(np.array(devices), ("images",))
    whole, cut = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("images")))
    placed = jax.device_put(encoder, whole)
    compiled = jax.jit(functools.partial(encode_images, config=config))
    return Encoder(lambda read: compiled(placed, jax.device_put(read, cut)), each * len(devices))


def image_features(
    images: Sequence[ImageFile],
    *,
    cache: FeatureCache,
    encoder: Callable[[], Encoder],
    processing: Processing,
    say: Callable[[str], None] = SAY,
) -> FeatureCache:
    """`cache` with the features of all `images`: what it lacks is computed, each image once, however often it is shown.

    `encoder` is called where something is lacking (`on_devices`). A killed pass continues where it was.
    """
    by_digest = {image.digest: image for image in images}
    with reported("reading the features of images"):
        todo = cache.missing(list(by_digest))
    if cache.damaged:
        say(f"{cache.directory}: {cache.damaged} features are damaged and computed again")
    each, count = 4 * math.prod(cache.shape), len(by_digest)
    say(
        f"{cache.directory}: features of {count - len(todo):,} of {count:,} images are there already; all take "
        f"{_bytes(each * count)}, {_bytes(each)} each, of which up to {_bytes(max(RECENT_BYTES, each))} stay in memory"
    )
    if not todo:
        return cache
    encode, batch = encoder()
    with reported("computing features of images", total=len(todo), unit="images") as task:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            read = np.stack([pixels(by_digest[digest], processing) for digest in part])
            padding = ((0, batch - len(part)), (0, 0), (0, 0), (0, 0))  # one shape: compiled once
            found = np.asarray(encode(np.pad(read, padding)))
            cache.add(part, found[: len(part)])
            task.advance(len(part))
    return cache


def _bytes(count: int) -> str:
    size, unit = next(one for one in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, "bytes")) if count >= one[0])
    return f"{count / (size or 1):.3g} {unit}"
