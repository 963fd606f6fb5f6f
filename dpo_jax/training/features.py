"""Image features of a frozen encoder, computed once and cached on disk, with checks that they belong to the image and encoder.

A cache is a folder, preferably next to that of the reference log-probabilities. `identity.json` names encoder and image
preprocessing; other files hold one record per image, found by its digest. A checksum covers the record and the identity.
Damaged records are recomputed. A cache of another encoder or preprocessing is refused. A changed image is a different image.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.data.images import ImageFile, Processing, pixels
from dpo_jax.locks import open_lock, wait_for_lock
from dpo_jax.models.siglip import encode_images
from dpo_jax.models.vision_config import VisionConfig
from dpo_jax.reference import ForeignCache
from dpo_jax.runtime.progress import SAY, reported
from dpo_jax.types import Array, Variables
from dpo_jax.untrusted import Unreadable, read_object
from dpo_jax.writing import leftovers, write_whole

VERSION = "dpo_jax image features 1"
IDENTITY, SUFFIX = "identity.json", ".features"
RECENT_BYTES, SCORES_BYTES = 2**30, 2**31


class FeatureCache(Mapping[str, np.ndarray]):
    """Mapping from image digest to features, float32[T, W], read lazily from `directory`.

    `identity` names everything that the features depend on, as JSON values (`feature_identity`). Raises `ForeignCache`, naming
    each differing field, if the folder has another identity. A damaged record counts as missing, and is counted in `damaged`.
    Several processes may use the folder at once: files appear atomically, and each process holds `cache.lock`, so that no other
    takes its unfinished files for those of a killed one. `recent` is the number of features kept in memory.
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
        self._hold()
        self._claim()
        self._places: dict[str, list[tuple[Path, int]]] = {}  # (file, record) by digest; several if one was damaged
        self._taken: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Adds the records that other processes have written since."""
        for path in sorted({*self.directory.glob(f"*{SUFFIX}")} - self._taken):
            self._take(path)

    def __getitem__(self, digest: str) -> np.ndarray:
        return self._read(digest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, digests: Sequence[str], features: np.ndarray) -> None:
        """Stores the features of images, [n, T, W]; on return they are on disk, all or none.

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
        """The distinct `digests` without valid features."""
        return [digest for digest in dict.fromkeys(digests) if digest not in self]

    def _take(self, path: Path) -> None:
        """Notes the places of a file's records. It keeps no file open: a process may open about a thousand."""
        self._taken.add(path)
        count = path.stat().st_size // self._record.itemsize
        digests = np.array(np.memmap(path, self._record, "r", shape=(count,))["digest"]) if count else ()
        for number, digest in enumerate(digests):
            self._places.setdefault(digest.tobytes().hex(), []).append((path, number))

    def _from_file(self, digest: str) -> np.ndarray:
        for path, number in self._places.get(digest, ()):
            with open(path, "rb") as file:
                file.seek(number * self._record.itemsize)
                content = file.read(self._record.itemsize)
            if len(content) == self._record.itemsize:
                record = np.frombuffer(content, self._record)[0]
                if record["crc"] == self._crc(record):
                    return np.array(record["values"])
            self.damaged += 1
        raise KeyError(digest)

    def _crc(self, record: np.void) -> int:
        return zlib.crc32(record["values"].tobytes(), zlib.crc32(record["digest"].tobytes(), self._seed))

    def _hold(self) -> None:
        """Shares the folder's lock for the life of this object. Removes unfinished files if no other process shares it."""
        if not os.access(self.directory, os.W_OK):  # nothing can be written or removed
            return
        lock = open_lock(self.directory / "cache.lock")
        weakref.finalize(self, os.close, lock)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in leftovers(self.directory, IDENTITY, f"*{SUFFIX}"):
                leftover.unlink()
        wait_for_lock(lock, self.directory / "cache.lock", fcntl.LOCK_SH)

    def _claim(self) -> None:
        path = self.directory / IDENTITY
        try:
            found = read_object(path)
        except (FileNotFoundError, Unreadable):  # without it, the checksum shows whether a record belongs here
            found = None
        if found is not None and found != self.identity:
            names = sorted(name for name in {*found, *self.identity} if found.get(name) != self.identity.get(name))
            lines = [f"  {name}: cached with {found.get(name)!r}, now {self.identity.get(name)!r}" for name in names]
            raise ForeignCache(
                f"{self.directory} holds image features with a different origin:\n"
                + "\n".join(lines)
                + "\nChoose another folder."
            )
        if found is None:
            write_whole(path, (json.dumps(self.identity, indent=2, sort_keys=True) + "\n").encode())


def feature_identity(encoder: str, config: Any, processing: Processing) -> dict[str, Any]:
    """The identity of features: digest of the encoder's weights, its configuration, image preprocessing."""
    return {"encoder": encoder, "configuration": repr(config), "processing": processing.identity}


def open_features(
    directory: str | os.PathLike[str], encoder: str, config: VisionConfig, processing: Processing
) -> FeatureCache:
    """The feature cache of the encoder with digest `encoder`, in its own folder below `directory`.

    The folder is named by the features' identity, so another encoder or preprocessing has another folder. Features that were
    read stay in memory, up to `RECENT_BYTES`.
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
    """The encoder compiled for devices of this host.

    The batch per device is limited so that the attention scores, which are not computed blockwise, fit in `SCORES_BYTES`.
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
    """`cache` with the features of all `images`; missing ones are computed, each distinct image once.

    `encoder` is called only if some are missing (`on_devices`). A killed pass continues where it was.
    """
    by_digest = {image.digest: image for image in images}
    with reported("reading the features of images"):
        todo = cache.missing(list(by_digest))
    if cache.damaged:
        say(f"{cache.directory}: {cache.damaged} features are damaged: they are computed again")
    each, count = 4 * math.prod(cache.shape), len(by_digest)
    say(
        f"{cache.directory}: features of {count - len(todo):,} of {count:,} images are already cached; all take "
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
