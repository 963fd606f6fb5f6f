"""The reference pass and its cache: log-probabilities under the reference model, kept on disk and tied to their inputs.

A cache is a folder. `identity.json` names what the numbers depend on (weights, tokenizer, truncation, number format, kernel).
`logps-*.bin` hold one record per pair, keyed by a hash of its token ids (a ranking has one for every two completions). Keys do
not depend on order, so the cache survives reshuffling, repacking and another number of devices. Every record carries a checksum
that also covers the identity, and `identity.json` counts the records of each file. A flipped bit, a lost tail, a lost file or a
file from another cache is therefore detected. Damaged records are moved to `quarantine/`, and only their pairs are computed
again. (`cache.lock` has no content to be damaged.)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.data.encode import Encoded, Side, image_bytes, scored_bytes
from dpo_jax.data.loader import Batch
from dpo_jax.locks import open_lock, wait_for_lock
from dpo_jax.logps import completion_logps
from dpo_jax.shapes import check_shape
from dpo_jax.types import Model, Rows, Variables
from dpo_jax.untrusted import Unreadable, read_object
from dpo_jax.writing import appending, leftovers, write_whole

VERSION = "dpo_jax reference log-probabilities 1"
IDENTITY, FILES = "identity.json", "logps-*.bin"
STORED = {"identity": {}, "records": {str: int}, "digest": str}
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
RECORD = np.dtype([("key", "V16"), ("logps", "<f4", 2), ("crc", "<u4")])


class ForeignCache(ValueError):
    """The folder holds reference log-probabilities for another model, tokenizer or setting."""


class BrokenReference(FloatingPointError):
    """The reference gives NaN or infinity for a pair: damaged weights, or a text it cannot read (vocabulary, positions)."""


def reference_logps(model: Model, variables: Variables, rows: Rows, *, ld_alpha: float = 1.0) -> jax.Array:
    """log pi_ref(y|x) of each completion of each pair: float32[P, 2], in nats. Forward only; pure, so compile and map it.

    It covers one batch of rows, in its order; `reference_logps_of` covers all pairs of a data set. `ld_alpha`: as in
    `dpo_step`.

    >>> rows = rows.replace(ref_logps=jax.jit(partial(reference_logps, model))(variables, rows))
    """
    return jax.lax.stop_gradient(completion_logps(model, variables, rows, ld_alpha=ld_alpha))


def check_finite(pairs: Sequence[Encoded], logps: np.ndarray, *, numbers: Sequence[int] | np.ndarray | None = None) -> None:
    """Raises `BrokenReference` for the first of `logps[n, 2]` that is NaN or infinite, naming its pair.

    `numbers` are the positions of `pairs` in the caller's data, to name pairs without `uid`; by default they count from 0.
    """
    bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
    if len(bad):
        pair, values = pairs[bad[0]], ", ".join(f"{value:g}" for value in logps[bad[0]])
        name = pair.uid or f"pair {bad[0] if numbers is None else numbers[bad[0]]}"
        largest = max(int(np.max(ids, initial=0)) for ids in (pair.prompt, *pair.completions))
        longest = len(pair.prompt) + max(map(len, pair.completions))
        raise BrokenReference(
            f"{name}: the reference model gives the log-probabilities {values} (chosen, rejected). Possible causes: a token id "
            f"beyond its vocabulary (the largest here is {largest}), a text longer than its positions (the longest here has "
            f"{longest} tokens), broken weights, or a number format too small for them. Nothing of this batch was kept."
        )


def pair_key(pair: Encoded) -> tuple[bytes, ...]:
    """The keys of a pair's records, 16 bytes each: hashes of token ids, of the scored-token mask (if not all are scored) and
    of images. A pair has one key. A ranking has one for each two completions in its order; an odd last one appears twice."""
    several = pair.sides
    places = range(0, len(several), 2)
    return tuple(_key(pair, several[k], several[min(k + 1, len(several) - 1)]) for k in places)


def _key(pair: Encoded, *sides: Side) -> bytes:
    parts = [np.asarray(part, "<i4") for part in (pair.prompt, *(ids for ids, _ in sides))]
    lengths = np.array([len(part) for part in parts], "<i4")
    content = b"".join(part.tobytes() for part in (lengths, *parts)) + scored_bytes(*sides) + image_bytes(pair.images)
    return hashlib.blake2b(content, digest_size=16).digest()


def _in_records(values: np.ndarray) -> np.ndarray:
    """Log-probabilities [n, K] grouped as the records of `pair_key`: [n, records, 2]."""
    odd = values[:, -1:] if values.shape[1] % 2 else values[:, :0]
    return np.concatenate([values, odd], axis=1).reshape(len(values), -(-values.shape[1] // 2), 2)


class ReferenceCache:
    """Opens the cache in `directory`, or creates one. `identity` names everything the numbers depend on, as JSON values.

    Raises `ForeignCache`, naming each field that differs, if the folder has another identity. `damaged` counts the records that
    are lost or failed their checksum; `damage` describes it file by file. A host appends to one file, `logps-{shard}.bin`, and
    reads all files. Several processes of a host may use the folder at the same time: a process holds its lock to write or
    repair. If two compute the same pair, both use the number of the first. A cache that may only be read is not repaired.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any], *, shard: int = 0) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps({"version": VERSION, **identity}, sort_keys=True))
        self._seed = zlib.crc32(json.dumps(self.identity, sort_keys=True).encode())
        self._file = self.directory / f"logps-{shard:05d}.bin"
        self._entries: dict[bytes, np.ndarray] = {}
        self._read_to: dict[str, int] = {}  # bytes of each file
        self.damaged, self.damage = 0, []
        self._refused: OSError | None = None
        try:
            with self._locked():
                self._repair()
        except OSError as error:
            if error.errno not in READ_ONLY or self._stored_identity() is None:
                raise
            self._claim()
            self._refused = error
            for path in self._files():
                self._believe(path.read_bytes())

    def _repair(self) -> None:
        for leftover in leftovers(self.directory, IDENTITY, FILES):
            leftover.unlink()
        promised = self._claim()
        files = {path.name: self._read(path, promised.get(path.name, 0)) for path in self._files()}
        for name in promised.keys() - files.keys():
            self._report(promised[name], f"{name} with {promised[name]} records is gone")
        self._count(files)

    def check_writable(self, missing: int) -> None:
        """Raises OSError if entries are `missing`, but none can be added."""
        if missing and self._refused is not None:
            words = f"{os.strerror(self._refused.errno or 0)}; the cache lacks {missing:,} pairs: choose another refs.cache"
            raise PermissionError(errno.EACCES, words, str(self.directory))

    def __len__(self) -> int:
        return len(self._entries)

    def missing(self, pairs: Sequence[Encoded]) -> list[int]:
        """The numbers of `pairs` without an entry; of pairs with equal tokens only the first."""
        first: dict[tuple[bytes, ...], int] = {}
        for number, pair in enumerate(pairs):
            first.setdefault(pair_key(pair), number)
        return [number for keys, number in first.items() if not self._entries.keys() >= set(keys)]

    def lookup(self, pairs: Sequence[Encoded]) -> np.ndarray:
        """Cached values: float32[len(pairs), 2] (rankings: [.., K]). Raises KeyError naming the first pair without an entry."""
        places = len(pairs[0].completions) if len(pairs) else 2
        logps = np.empty((len(pairs), places), np.float32)
        for number, pair in enumerate(pairs):
            keys = pair_key(pair)
            if not self._entries.keys() >= set(keys):
                raise KeyError(f"{self.directory} has no reference log-probabilities of {pair.uid or number}")
            logps[number] = np.concatenate([self._entries[key] for key in keys])[:places]
        return logps

    def add(self, pairs: Sequence[Encoded], logps: np.ndarray) -> None:
        """Appends records and syncs them to disk, so that they survive a kill. Existing entries are kept.

        Raises `BrokenReference` for NaN or infinity.
        """
        logps = np.asarray(logps, np.float32)
        check_finite(pairs, logps)
        with self._locked():
            counts = self._catch_up()
            new: dict[bytes, np.ndarray] = {}
            for pair, records in zip(pairs, _in_records(logps), strict=True):
                for key, values in zip(pair_key(pair), records, strict=True):
                    if key not in self._entries:
                        new.setdefault(key, values)
            records = np.zeros(len(new), RECORD)
            for record, (key, values) in zip(records, new.items(), strict=True):
                record["key"], record["logps"] = key, values
                record["crc"] = self._crc(record)
            self._read_to[self._file.name] = _append(self._file, records.tobytes())
            self._entries.update(new)
            self._count({**counts, self._file.name: counts.get(self._file.name, 0) + len(new)})

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.directory / "cache.lock"
        with os.fdopen(open_lock(path), "rb") as file:
            wait_for_lock(file.fileno(), path)  # the lock ends with the file, or with the process
            yield

    def _crc(self, record: np.void) -> int:
        return zlib.crc32(record.tobytes()[: -RECORD["crc"].itemsize], self._seed)

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob(FILES))

    def _read(self, path: Path, promised: int) -> int:
        """Loads the good records of a file, and removes all others from it. Returns the number of good ones."""
        content = path.read_bytes()
        good = self._believe(content)
        whole, torn = divmod(len(content), RECORD.itemsize)
        bad = whole - len(good) + max(promised - whole, int(torn > 0))
        if bad:
            moved = self._set_aside(path)
            write_whole(path, b"".join(good))
            self._report(bad, f"{bad} records of {path.name} are damaged or lost, {len(good)} are good; it is now {moved}")
        self._read_to[path.name] = len(good) * RECORD.itemsize
        return len(good)

    def _believe(self, content: bytes) -> list[bytes]:
        """Loads good records: their checksum fits, and they contradict no earlier record of the same pair."""
        good = []
        for record in np.frombuffer(content[: len(content) // RECORD.itemsize * RECORD.itemsize], RECORD):
            if self._crc(record) == record["crc"]:
                entry = self._entries.setdefault(record["key"].tobytes(), record["logps"].copy())
                if entry.tobytes() == record["logps"].tobytes():
                    good.append(record.tobytes())
        return good

    def _catch_up(self) -> dict[str, int]:
        """Loads what other processes have added meanwhile. Returns the records of each file."""
        stored = self._stored_identity()
        for path in self._files():
            size, start = path.stat().st_size, self._read_to.get(path.name, 0)
            size -= size % RECORD.itemsize  # half a record at the end belongs to a process that was killed
            if size == start:
                continue
            with open(path, "rb") as file:
                file.seek(start if start < size else 0)  # shorter: another process has repaired it
                self._believe(file.read(size - file.tell()))
            self._read_to[path.name] = size
        return stored["records"] if stored else {}

    def _report(self, records: int, what: str) -> None:
        self.damaged += records
        self.damage.append(what)

    def _set_aside(self, path: Path) -> Path:
        folder = self.directory / "quarantine"
        folder.mkdir(exist_ok=True)
        target = next(free for n in itertools.count() if not (free := folder / f"{path.name}-{n}").exists())
        return path.rename(target)

    def _claim(self) -> dict[str, int]:
        """Writes our identity to the folder, or checks it. Returns the expected number of records of each file."""
        path = self.directory / IDENTITY
        found = self._stored_identity()
        if found is None and (path.exists() or self._files()):
            where = f"is damaged; it is now {self._set_aside(path)}" if path.exists() else "is gone"
            self._report(0, f"{path.name} {where}; the checksum of each record shows whether it belongs here")
        if found is None:
            return {}
        if found["identity"] != self.identity:
            before, now = found["identity"], self.identity
            names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            lines = [f"  {name}: cached with {before.get(name)!r}, now {now.get(name)!r}" for name in names]
            raise ForeignCache(
                f"{self.directory} holds reference log-probabilities with a different origin:\n" + "\n".join(lines) + "\n"
                "Choose another folder with --refs.cache. Delete this one only if no policy trained against that "
                "reference is to be continued or evaluated."
            )
        return found["records"]

    def _stored_identity(self) -> dict[str, Any] | None:
        """The content of identity.json; None if there is none or it is damaged."""
        try:
            content = check_shape(read_object(self.directory / IDENTITY), STORED, IDENTITY)
            return content if content["digest"] == _digest(content["identity"], content["records"]) else None
        except (FileNotFoundError, Unreadable):
            return None

    def _count(self, records: Mapping[str, int]) -> None:
        content = {"identity": self.identity, "records": dict(records), "digest": _digest(self.identity, records)}
        if content != self._stored_identity():
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            write_whole(self.directory / IDENTITY, text.encode())


def _digest(identity: Mapping[str, Any], records: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps([identity, records], sort_keys=True).encode()).hexdigest()


def _append(path: Path, content: bytes) -> int:
    """Appends all of `content` or, on a full disk, nothing: half a record would corrupt the next. Returns the size.

    Half a record at the end is removed: another process was killed while it appended.
    """
    found = path.stat().st_size if path.exists() else 0
    size = found - found % RECORD.itemsize
    if size < found:
        os.truncate(path, size)
    try:
        with appending(path, "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, size)
        raise
    return size + len(content)


def fill_cache(
    cache: ReferenceCache | None,
    pairs: Sequence[Encoded],
    *,
    batches: Callable[[Sequence[Encoded]], Iterable[Batch]],
    logps: Callable[[Rows], np.ndarray],
    progress: Callable[[Batch], None] = lambda batch: None,
) -> int:
    """Computes the entries of `pairs` that the cache lacks, batch by batch, and returns their number.

    `batches(pairs)` lays out the pairs (`loader.eval_batches`); `logps(rows) -> float32[P, 2]` is the compiled
    `reference_logps`. Without a cache it computes all of `pairs` and keeps nothing, as on a host that helps another one. A
    batch is written, and synced to disk, while the next one is computed.
    """
    todo = list(pairs) if cache is None else [pairs[number] for number in cache.missing(pairs)]

    if cache is not None:
        cache.check_writable(len(todo))

    def keep(batch: Batch, values: np.ndarray) -> None:
        numbers, values = batch.of_examples(values)
        if cache is not None:
            cache.add([todo[number] for number in numbers], values)

    with ThreadPoolExecutor(1, thread_name_prefix="reference-cache") as writer:
        written: list[tuple[Future[None], Batch]] = []
        for batch in batches(todo):
            values = logps(batch.rows)
            _await(written, progress)
            written.append((writer.submit(keep, batch, values), batch))
        _await(written, progress)
    return len(todo)


def _await(written: list[tuple[Future[None], Batch]], progress: Callable[[Batch], None]) -> None:
    """Waits for the batch that is being written, if there is one. Raises its error."""
    while written:
        future, batch = written.pop()
        future.result()
        progress(batch)
