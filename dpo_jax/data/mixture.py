"""Mixtures of preference sets. The weight of a set is how often its rows are seen in an epoch.

A weight of 2 takes each pair twice, 0.5 takes the half chosen by a hash of the uid, 2.5 does both. Neither a seed nor the other
sources matter. The uid of a pair is "SOURCE: UID", that of its second copy "SOURCE: UID (2)".
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping

from dpo_jax.data.pairs import BadRow, Cause, DataReport, Preference, PreferenceSet, SourceReport, folder_of, source_of

_COPY = re.compile(r" \((\d+)\)\Z")


def copy_number(uid: str) -> int:
    """1 for a pair as read; 2, 3, ... for its further copies."""
    found = _COPY.search(uid)
    return int(found[1]) if found else 1


def mix(sets: Mapping[str, PreferenceSet], weights: Mapping[str, float], *, source: str = "data.mix") -> PreferenceSet:
    """The pairs of all `sets` (name -> set of one split), repeated by weight and ordered by a hash of their uids.

    The first n pairs are therefore a fair sample of all sources. `subset` is the source's name if a row has none. The report
    counts each copy as read and also lists each source; kept + dropped = read for each source and in total.

    Raises ValueError for a weight that is not above 0, and for a name that cannot begin a uid.
    """
    (split,) = {loaded.report.split for loaded in sets.values()}
    report = DataReport(source=source, split=split, format=" + ".join(dict.fromkeys(s.report.format for s in sets.values())))
    mixed: list[Preference] = []
    for name, loaded in sets.items():
        if not weights[name] > 0 or ": " in name or not name:
            raise ValueError(f"source {name!r}, weight {weights[name]}: a weight above 0 is needed, and a name without ': '")
        own = loaded.report
        report.rows += own.rows
        report.read += own.read
        report.sources[name] = SourceReport(own.source, own.format, weights[name], own.rows, own.read, dict(own.dropped))
        for cause, count in own.dropped.items():
            report.dropped[cause] = report.dropped.get(cause, 0) + count
            examples = report.examples.setdefault(cause, [])
            examples += [f"{name}: {line}" for line in own.examples.get(cause, ())][: 5 - len(examples)]
        report.notes += [f"{name}: {note}" for note in own.notes]
        report.files += [{**file, "path": f"{name}: {file['path']}"} for file in own.files]
        for preference in loaded:
            copies = _copies(preference.uid, weights[name])
            uid = f"{name}: {preference.uid}"
            if not copies:
                report.add(uid, BadRow(Cause.WEIGHT, f"not in the share {weights[name]:g} of its source that is used"))
            subset = preference.subset or name
            for number in range(1, copies + 1):
                numbered = uid if number == 1 else f"{uid} ({number})"
                mixed.append(dataclasses.replace(preference, uid=numbered, subset=subset))
            report.read += max(0, copies - 1)
            report.sources[name].read += max(0, copies - 1)
    report.kept = len(mixed)
    report.check()
    return PreferenceSet(sorted(mixed, key=lambda preference: _hash(preference.uid)), report)


def source_names(paths: Iterable[str]) -> list[str]:
    """A short name for each path: its last part, or the whole path if two last parts are equal. Raises ValueError for equal
    paths."""
    paths = list(paths)
    if twice := [path for path in dict.fromkeys(paths) if paths.count(path) > 1]:
        raise ValueError(f"{twice[0]} is listed twice; give it once, with a higher weight")
    last = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return [(one if last.count(one) == 1 else path).replace(": ", ":_") for one, path in zip(last, paths, strict=True)]


def by_source(uids: Iterable[str]) -> dict[str, list[int]]:
    """The places of the pairs of each source: of a mixture, or else of each folder of files. Empty unless there are several.

    >>> by_source(["a: train.jsonl:1", "b: x/train.jsonl:7", "a: train.jsonl:2"])
    {'a': [0, 2], 'b': [1]}
    """
    places: dict[str, list[int]] = {}
    for place, uid in enumerate(uids):
        places.setdefault(source_of(uid) if ": " in uid else folder_of(uid), []).append(place)
    return places if len(places) > 1 and "" not in places else {}


def _copies(uid: str, weight: float) -> int:
    """Number of copies of a pair: the integer part of the weight, plus one if a hash of the uid falls into the fraction."""
    whole = int(weight)
    return whole + (_hash(uid) < (weight - whole) * 2**64)


def _hash(uid: str) -> int:
    digest = hashlib.blake2b(uid.encode("utf-8", "surrogatepass"), digest_size=8, person=b"dpo_jax mixture").digest()
    return int.from_bytes(digest, "big")
