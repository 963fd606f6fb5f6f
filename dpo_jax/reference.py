"""The reference model's log-probabilities: one pass, kept on disk, and only ever used for what they were computed from.

A cache is a folder: `identity.json` says what the numbers belong to (weights, tokenizer, truncation, number format, kernel),
and `logps-*.bin` hold one record per pair, keyed by a hash of its token ids. Keys do not mention order, so the cache survives
reshuffling, repacking and another number of devices. Every record carries a checksum that also covers the identity: a flipped
bit, a half-written tail or a file from another cache is detected, and just those pairs are computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import Batch
from dpo_jax.logps import completion_logps
from dpo_jax.models.pieces import Piece, pieces_of
from dpo_jax.types import Model, Rows, Variables

VERSION = "dpo_jax reference log-probabilities 1"
RECORD = np.dtype([("key", "V16"), ("logps", "<f4", 2), ("crc", "<u4")])


class ForeignCache(ValueError):
    """The folder holds reference log-probabilities of another model, tokenizer or setting."""


class BrokenReference(FloatingPointError):
    """The reference gives NaN or infinity for a pair: its weights are broken, or a text is."""


def reference_logps(model: Model, variables: Variables, rows: Rows) -> jax.Array:
    """log pi_ref(y|x) of each completion of each pair: float32[P, 2], in nats. Forward only; pure, so compile and map it."""
    return jax.lax.stop_gradient(completion_logps(model, variables, rows))


class WeightsDigest:
    """SHA-256 over names, shapes, types and bytes of all parameters: equal exactly when the weights are.

    `watch(pieces)` passes pieces on, so that a model is digested while it is loaded, however its pieces then lie on devices.
    """

    def __init__(self) -> None:
        self._leaves: dict[str, tuple[str, Any]] = {}  # {name: (name, shape and type so far, SHA-256 of the bytes so far)}

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            array = np.ascontiguousarray(piece.array)
            name = ".".join(piece.path)
            shape = array.shape if piece.layer is None else (piece.layer + 1, *array.shape)
            _, sha = self._leaves.get(name, ("", None))
            sha = sha or hashlib.sha256()
            sha.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
            self._leaves[name] = f"{name} {shape} {array.dtype}", sha
            yield piece

    def hexdigest(self) -> str:
        lines = sorted(f"{described} {sha.hexdigest()}\n" for described, sha in self._leaves.values())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_digest(variables: Variables) -> str:
    """The `WeightsDigest` of whole arrays."""
    digest = WeightsDigest()
    for _ in digest.watch(pieces_of(variables)):
        pass
    return digest.hexdigest()


def pair_key(pair: Encoded) -> bytes:
    """16 bytes that stand for the token ids of a pair."""
    parts = [np.asarray(ids, "<i4") for ids in (pair.prompt, pair.chosen, pair.rejected)]
    lengths = np.array([len(part) for part in parts], "<i4")
    return hashlib.blake2b(b"".join(part.tobytes() for part in (lengths, *parts)), digest_size=16).digest()


class ReferenceCache:
    """Opens the cache in `directory`, or begins one. `identity` names all that the numbers depend on, as JSON values.

    Raises `ForeignCache`, naming each field that differs, if the folder belongs to something else. `damaged` counts records
    that failed their checksum. A host appends to one file, `logps-{shard}.bin`; reading takes all files together. Several
    processes of a host may use the folder at the same time: whoever writes or repairs holds its lock.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any], *, shard: int = 0) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps({"version": VERSION, **identity}, sort_keys=True))
        self._seed = zlib.crc32(json.dumps(self.identity, sort_keys=True).encode())
        self._file = self.directory / f"logps-{shard:05d}.bin"
        self._entries: dict[bytes, np.ndarray] = {}
        with self._locked():
            self._claim()
            self.damaged = sum(self._read(path) for path in sorted(self.directory.glob("logps-*.bin")))

    def __len__(self) -> int:
        return len(self._entries)

    def missing(self, pairs: Sequence[Encoded]) -> list[int]:
        """Which of `pairs` have no entry; of pairs with equal tokens only the first."""
        first: dict[bytes, int] = {}
        for number, pair in enumerate(pairs):
            first.setdefault(pair_key(pair), number)
        return [number for key, number in first.items() if key not in self._entries]

    def lookup(self, pairs: Sequence[Encoded]) -> np.ndarray:
        """float32[len(pairs), 2]. Raises KeyError naming the first pair without an entry."""
        logps = np.empty((len(pairs), 2), np.float32)
        for number, pair in enumerate(pairs):
            entry = self._entries.get(pair_key(pair))
            if entry is None:
                raise KeyError(f"{self.directory} has no reference log-probabilities of {pair.uid or number}")
            logps[number] = entry
        return logps

    def add(self, pairs: Sequence[Encoded], logps: np.ndarray) -> None:
        """Appends and syncs to disk: what is added survives a kill. Raises `BrokenReference` for NaN or infinity."""
        logps = np.asarray(logps, np.float32)
        bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
        if len(bad):
            name, values = pairs[bad[0]].uid or f"pair {bad[0]}", ", ".join(f"{value:g}" for value in logps[bad[0]])
            raise BrokenReference(
                f"{name}: the reference model gives the log-probabilities {values} (chosen, rejected). Its weights are broken, "
                "or the number format is too small for them; nothing of this batch was cached."
            )
        records = np.zeros(len(pairs), RECORD)
        records["logps"] = logps
        for number, pair in enumerate(pairs):
            records["key"][number] = key = pair_key(pair)
            records["crc"][number] = self._crc(records[number])
            self._entries[key] = logps[number]
        with self._locked(), open(self._file, "ab") as file:
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.directory / "cache.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file, or with the process
            yield

    def _crc(self, record: np.void) -> int:
        return zlib.crc32(record.tobytes()[: -RECORD["crc"].itemsize], self._seed)

    def _read(self, path: Path) -> int:
        data = path.read_bytes()
        whole = len(data) // RECORD.itemsize * RECORD.itemsize
        damaged = int(whole < len(data))
        good = []
        for record in np.frombuffer(data[:whole], RECORD):
            if self._crc(record) == record["crc"]:
                self._entries[record["key"].tobytes()] = record["logps"].copy()
                good.append(record.tobytes())
            else:
                damaged += 1
        if damaged and path == self._file:  # a record must not follow half of one
            _replace(path, b"".join(good))
        return damaged

    def _claim(self) -> None:
        path = self.directory / "identity.json"
        if not path.exists():
            _replace(path, (json.dumps(self.identity, indent=2, sort_keys=True) + "\n").encode())
            return
        remedy = "Choose another folder with --refs.cache, or delete this one to compute them again."
        try:
            found = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ForeignCache(f"{path} is damaged, so nobody knows what the cache belongs to ({error}). {remedy}") from error
        if found != self.identity:
            names = sorted(name for name in {*found, *self.identity} if found.get(name) != self.identity.get(name))
            lines = [f"  {name}: cached with {found.get(name)!r}, now {self.identity.get(name)!r}" for name in names]
            raise ForeignCache(
                f"{self.directory} holds reference log-probabilities of something else:\n" + "\n".join(lines) + f"\n{remedy}"
            )


def _replace(path: Path, content: bytes) -> None:
    """All of the new content or all of the old, also after a crash of the machine."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def fill_cache(
    cache: ReferenceCache | None,
    pairs: Sequence[Encoded],
    *,
    batches: Callable[[Sequence[Encoded]], Iterable[tuple[np.ndarray, Batch]]],
    logps: Callable[[Rows], np.ndarray],
    progress: Callable[[Batch], None] = lambda batch: None,
) -> int:
    """Computes what the cache lacks of `pairs`, batch after batch, and returns how many pairs that were.

    `batches(pairs)` lays pairs out (`loader.in_order`); `logps(rows) -> float32[P, 2]` is the compiled `reference_logps`.
    Without a cache it computes all of `pairs` and keeps nothing: on a host that helps another one.
    """
    todo = list(pairs) if cache is None else [pairs[number] for number in cache.missing(pairs)]
    for indices, batch in batches(todo):
        values, place = logps(batch.rows), batch.index
        if cache is not None:
            cache.add([todo[int(indices[i])] for i in place[place >= 0]], values[place >= 0])
        progress(batch)
    return len(todo)
