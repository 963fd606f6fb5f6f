"""Append-only log of the labels of a run, so that none is requested twice, and scores of completions from it.

    {"settings": {...}, "check": "..."}                                              what all labels depend on
    {"round": 0, "prompt": "The film", "completions": [" was fine."], "label": 3.0, "check": "..."}
    {"round": 0, "prompt": "The film", "completions": [" a", " b"], "label": 0.5, "check": "..."}

With one completion the label is its reward. With two it is 1 if the first won, 0 if the second did, 1/2 for a tie, null if
undecided. Each line ends with a checksum that covers the settings of the log. A truncated or damaged line is dropped, and its
label is requested again.

With several hosts, all of them have the labels; the first one reads and writes the file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.terminal import json_text
from dpo_jax.evals.reward_functions import Reward
from dpo_jax.online.choices import shares_won
from dpo_jax.runtime.hosts import from_first, is_first, run_on_first
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.progress import SAY, reported
from dpo_jax.shapes import check_shape
from dpo_jax.training.fingerprint import check_settings
from dpo_jax.untrusted import LongLine, Unreadable, lines_of, parse_object, regular
from dpo_jax.writing import appending, write_whole

Key = tuple[str, ...]
"""A prompt, and one completion or two."""
Label = float | None
LINE = {"round": int, "prompt": str, "completions": [str], "label": (float, None), "check": str}


class Asked(NamedTuple):
    """Two completions of one prompt to compare."""

    prompt: str
    completions: tuple[str, str]


Compare = Callable[[int, Sequence[Asked]], Sequence[Label]]
"""(number of the round, comparisons) -> labels in their order. It may raise while answers are missing; called again with the
same comparisons, it continues. Several hosts all call it, and must get the same labels."""


class LabelLog:
    """The log at `path`, new or continued. `settings`: JSON values that every label depends on.

    Raises `RunMismatch`, naming the difference, for a log with other settings, and `Unreadable` for a file that is not a log.
    Only one process may use it at a time; the lock of the run directory ensures this.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, say: Callable[[str], None] = SAY) -> None:
        self.path, self._labels, self._rounds = Path(path), {}, {}
        self._settings = json.loads(json.dumps(dict(settings), sort_keys=True))
        self._key = hashlib.blake2b(json.dumps(self._settings, sort_keys=True).encode()).digest()
        if is_first():
            self._open(say)
        for number, label, *key in run_on_first(self._known):
            self._labels[tuple(key)], self._rounds[tuple(key)] = label, number

    def _known(self) -> list[Any]:
        return [[self._rounds[key], label, *key] for key, label in self._labels.items()]

    def __contains__(self, key: Key) -> bool:
        return key in self._labels

    def __getitem__(self, key: Key) -> Label:
        return self._labels[key]

    def count(self, number: int) -> int:
        """Number of labels requested in round `number`, undecided ones included."""
        return sum(its == number for its in self._rounds.values())

    def total(self, number: int) -> int:
        """Number of labels requested up to and including round `number`."""
        return sum(its <= number for its in self._rounds.values())

    def add(self, number: int, labels: Mapping[Key, Label]) -> None:
        """Appends labels of round `number`; they are on disk when this returns. Raises ValueError for a non-finite label."""
        lines = []
        for key, label in labels.items():
            if label is not None and not np.isfinite(label):
                raise ValueError(f"the reward of {key[1]!r:.200}, after {key[0]!r:.200}, is {label}")
            prompt, *completions = key
            value = None if label is None else float(label)
            lines.append(self._sealed({"round": number, "prompt": prompt, "completions": completions, "label": value}))
        if is_first():
            with appending(self.path, "ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        self._labels |= labels
        self._rounds |= dict.fromkeys(labels, number)

    def _sealed(self, record: Mapping[str, Any]) -> bytes:
        return (json_text({**record, "check": self._sum(record)}) + "\n").encode()

    def _sum(self, record: Mapping[str, Any]) -> str:
        return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), key=self._key, digest_size=8).hexdigest()

    def _open(self, say: Callable[[str], None]) -> None:
        if not self.path.exists():
            write_whole(self.path, self._sealed({"settings": self._settings}))
            return
        sound, damaged = [], []
        with regular(self.path).open("rb") as file:
            for number, line in enumerate(lines_of(file), start=1):
                try:
                    sound.append(self._line(number, line))
                except Unreadable as error:
                    damaged.append(f"line {number}: {error}")
        if damaged:
            kept = self.path.with_name(f"{self.path.stem}.damaged{self.path.suffix}")
            write_whole(kept, self.path.read_bytes())
            head = self._sealed({"settings": self._settings})
            write_whole(self.path, head + b"".join(self._sealed(record) for record in sound if "settings" not in record))
            more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            words = f"{'; '.join(damaged[:3])}{more}; their questions are asked again. The file as it was is {kept.name}"
            say(f"{self.path}: damaged lines are left out: {words}")

    def _line(self, number: int, line: bytes | LongLine) -> dict[str, Any]:
        """Adds a line to the log in memory. Raises `Unreadable` if it is truncated or damaged."""
        if isinstance(line, LongLine):
            raise line
        record = parse_object(line, "no JSON object")
        check = record.pop("check", None)
        if number == 1 and list(record) == ["settings"] and isinstance(record["settings"], dict):
            check_settings(str(self.path), record["settings"], self._settings)
        if check != self._sum(record) or not line.endswith(b"\n"):
            raise Unreadable("differs from its checksum")
        if number > 1:
            check_shape({**record, "check": check}, LINE, "no label")
            key = (record["prompt"], *record["completions"])
            self._labels[key], self._rounds[key] = record["label"], record["round"]
        return record


def scored(
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    reward: Reward,
    log: LabelLog,
    *,
    number: int,
    batch: int = 64,
) -> np.ndarray:
    """Rewards of the K completions of each of N prompts: float64[N, K]. Labels already in `log` are not requested again.

    About `batch` completions are scored at a time, and logged before the next; in between a signal can interrupt it
    (`runtime.pauses`). Several hosts all score them, because a learned reward may be sharded over their devices; the first
    host's scores count.
    """
    keys = [(prompt, text) for prompt, its in zip(prompts, texts, strict=True) for text in its]
    todo = list(dict.fromkeys(key for key in keys if key not in log))
    with reported("labels", total=len(todo), unit="completions", brief=True) as task:
        for start in range(0, len(todo), batch):
            here = todo[start : start + batch]
            values = from_first(np.asarray(reward([prompt for prompt, _ in here], [text for _, text in here]), np.float64))
            log.add(number, dict(zip(here, values.tolist(), strict=True)))
            task.advance(len(here))
            pause()
    return np.array([log[key] for key in keys], np.float64).reshape(len(texts), -1)


def compared(
    prompts: Sequence[str], texts: Sequence[Sequence[str]], compare: Compare, log: LabelLog, *, number: int
) -> np.ndarray:
    """Scores of the K completions of each of N prompts by pairwise comparison: float64[N, K], as `choices.shares_won`.

    Equal texts are a tie, without a request. A blank one is not compared, because it enters no pair; its score is 0, so that
    the prompt's other completions are still used. Labels already in `log` are not requested again.
    """
    several = len(texts[0]) if texts else 0
    outcomes = np.full((len(texts), several, several), np.nan)
    asked: dict[Key, list[tuple[int, int, int]]] = {}
    for n, (prompt, its) in enumerate(zip(prompts, texts, strict=True)):
        for i, j in itertools.combinations(range(several), 2):
            if its[i].strip() == its[j].strip():
                outcomes[n, i, j] = 0.5
            elif its[i].strip() and its[j].strip():
                asked.setdefault((prompt, its[i], its[j]), []).append((n, i, j))
    if todo := [key for key in asked if key not in log]:
        labels = compare(number, [Asked(prompt, (first, second)) for prompt, first, second in todo])
        log.add(number, dict(zip(todo, labels, strict=True)))
    for key, places in asked.items():
        for n, i, j in places:
            label = log[key]
            outcomes[n, i, j] = np.nan if label is None else label
    blank = [[not text.strip() for text in its] for its in texts]
    return np.where(np.array(blank, bool).reshape(len(texts), several), 0.0, shares_won(outcomes))
