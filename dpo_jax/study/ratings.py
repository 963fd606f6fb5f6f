"""Reads ratings by people and verdicts of judges. A bad one is refused with file, line, field and remedy.

Three kinds of files:

    .json     saved by a rater on the page of `study.page`; readable only with the key of its study
    .jsonl    records of any origin: {"item": "017", "winner": "a", "rater": "ann"}; a winner is "a", "b" or "tie"
    .jsonl    the pairs of a judge, as `dpo-jax judge` writes them: {"prompt": "...", "policy": "...", "baseline": "...",
              "outcome": "won"}, with the texts that were compared
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast

from dpo_jax.data.columns import column, number, text
from dpo_jax.data.files import read_rows
from dpo_jax.data.pairs import BadRow, Cause, DataError, DataReport
from dpo_jax.untrusted import kind_of, parse_json, read_bytes, reading, regular

T = TypeVar("T", list[Any], dict[str, Any])

Winner = Literal["a", "b", "tie"]
WINNERS: tuple[Winner, ...] = ("a", "b", "tie")
KIND = "dpo_jax ratings"  # written by the page at the head of a file
CHOICES = ("A", "B", "same")
LONGEST_NAME = 80  # characters of a rater's name, as limited by the page
KEY_FIELDS = {"study", "names", "seed", "items", "raters", "files"}  # and its checksum
# The judge's policy won or lost; or the judge changed its choice with the order, gave no verdict, or was not asked yet.
OUTCOMES: dict[str, Winner | None] = {"won": "a", "lost": "b", "flipped": None, "failed": None, "unanswered": None}


class Judgment(NamedTuple):
    item: str
    rater: str
    winner: Winner
    leading: bool | None = None  # whether method a stood first; None if unknown


class RaterFile(NamedTuple):
    path: str
    rater: str
    session: str
    number: int  # of the list of comparisons, from 1
    assigned: int
    saved: str  # when, ISO 8601
    judgments: list[Judgment]


@dataclasses.dataclass(frozen=True)
class Key:
    """Key of a study: which method wrote which text."""

    study: str
    names: dict[str, str]  # method a or b -> its name
    methods: dict[str, list[str]]  # item -> methods of its two texts, in the order of the page
    texts: dict[str, tuple[str, str, str]]  # prompt -> item, text of a, text of b
    lists: list[dict[str, int]]  # a list of comparisons: item -> which of its texts stands first


def sealed(key: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `key.json` with the checksum that `read_key` verifies: a single changed letter could change who won."""
    return {**key, "check": _check_of(key)}


def _check_of(key: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_key(path: str | Path) -> Key:
    """Reads the `key.json` of `dpo-jax study`. Raises `DataError` for a file that is not a key, or damaged.

    A key written by a version without checksums is accepted as it is.
    """
    content = _json(path, "key.json of dpo-jax study")
    try:
        check = content.pop("check", None)
        if check not in (None, _check_of(content)):
            raise BadRow(Cause.BAD_LAYOUT, "the checksum is not that of the content", field="check")
        return _key(content)
    except BadRow as problem:
        raise DataError(
            f"{path}: not a key that dpo-jax study wrote, or damaged ({_short(problem)}); make the study again with the same "
            "options: it will be the same",
            causes=[problem.cause],
        ) from None


def _key(content: dict[str, Any]) -> Key:
    if unknown := content.keys() - KEY_FIELDS:
        raise BadRow(Cause.BAD_LAYOUT, "no field of a key", field=min(unknown)[:40])
    methods: dict[str, list[str]] = {}
    texts: dict[str, tuple[str, str, str]] = {}
    for place, item in enumerate(_typed(content, "items", list)):
        inside = f"items[{place}]."
        if not isinstance(item, dict):
            raise BadRow(Cause.WRONG_TYPE, f"expected an object, got {kind_of(item)}", field=inside[:-1])
        name, prompt = text(item, "id", inside=inside), text(item, "prompt", inside=inside)
        of, both = _typed(item, "methods", list, inside=inside), _typed(item, "texts", list, inside=inside)
        if of not in (["a", "b"], ["b", "a"]) or len(both) != 2 or not all(isinstance(one, str) for one in both):
            raise BadRow(Cause.BAD_LAYOUT, "two texts and their methods, a and b, are needed", field=inside + "texts")
        if name in methods or prompt in texts:
            raise BadRow(Cause.DUPLICATE_KEY, "its id or prompt is that of another item", field=inside + "id")
        methods[name], texts[prompt] = of, (name, both[of.index("a")], both[of.index("b")])
    lists = [_list_of(assigned, methods, f"raters[{n}]") for n, assigned in enumerate(_typed(content, "raters", list))]
    if not lists:
        raise BadRow(Cause.EMPTY, "there is no list of comparisons", field="raters")
    names = _typed(content, "names", dict)
    return Key(text(content, "study"), {method: text(names, method, inside="names.") for method in "ab"}, methods, texts, lists)


def _list_of(assigned: Any, methods: Mapping[str, Any], field: str) -> dict[str, int]:
    """One list of comparisons: item -> which of its texts stands first."""
    found: dict[str, int] = {}
    for pair in assigned if isinstance(assigned, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[1]) is not int or pair[1] not in (0, 1):
            raise BadRow(Cause.BAD_LAYOUT, "pairs of an item and 0 or 1 are needed", field=field)
        if not isinstance(pair[0], str) or pair[0] not in methods or pair[0] in found:
            raise BadRow(Cause.BAD_LAYOUT, "an item that is not in the key, or is there twice", field=field)
        found[pair[0]] = pair[1]
    return found


def read_raters(paths: Sequence[str | Path], *, key: Key) -> list[RaterFile]:
    """Reads the files that raters saved on the page of the study of `key`.

    Raises `DataError` for a file of another study, for a damaged or edited file, and for two files of one rater: with the same
    name, or saved twice in one session.
    """
    files = [_rater_file(path, key) for path in paths]
    seen: dict[tuple[str, str], RaterFile] = {}
    for file in files:
        # Names are compared as people read them: case, spaces and the two encodings of an accent do not matter.
        name = "".join(unicodedata.normalize("NFKC", file.rater).casefold().split())
        for what in (("rater", name), ("session", file.session)):
            other = seen.setdefault(what, file)
            if other is not file:
                last = max(file, other, key=lambda one: one.saved)
                there, here = (f"{_short(one.rater)}, {len(one.judgments)}" for one in (other, file))
                raise DataError(
                    f"{file.path}: {what[0]}: the same as in {other.path} ({there} ratings; here {here}): keep one of them, "
                    f"{last.path} was saved last",
                    causes=[Cause.DUPLICATE_KEY],
                )
    return files


def _rater_file(path: str | Path, key: Key) -> RaterFile:
    content = _json(path, "file that a rater saved")
    field = ""
    try:
        if content.get("kind") != KIND:
            raise BadRow(Cause.BAD_LAYOUT, f"not {KIND!r}: a rater's file is needed", field="kind")
        if text(content, "study") != key.study:
            detail = f"of the study {content['study']}, but the key is of {key.study}; give its own key with --agree.key"
            raise BadRow(Cause.BAD_LAYOUT, detail, field="study")
        rater, session, saved = (text(content, name) for name in ("rater", "session", "saved"))
        if not rater.strip():
            raise BadRow(Cause.EMPTY, "the rater has no name", field="rater")
        if len(rater) > LONGEST_NAME:
            raise BadRow(Cause.OUT_OF_RANGE, f"a name of {len(rater):,} characters", field="rater")
        chosen = number(content, "number")
        if chosen not in range(1, len(key.lists) + 1):
            raise BadRow(Cause.OUT_OF_RANGE, f"{chosen:g} is not one of the {len(key.lists)} lists", field="number")
        assigned, judgments = key.lists[int(chosen) - 1], {}
        for place, rating in enumerate(_typed(content, "ratings", list)):
            field = f"ratings[{place}]."
            judgment = _judgment(rating, rater, assigned, key)
            if judgment.item in judgments:
                raise BadRow(Cause.DUPLICATE_KEY, f"{judgment.item} is rated twice", field="item")
            judgments[judgment.item] = judgment
    except BadRow as problem:
        where = f"{path}: {field if problem.field else ''}"
        raise DataError(f"{where}{_short(problem)}; ask for the file as it was saved", causes=[problem.cause]) from None
    return RaterFile(str(path), rater, session, int(chosen), len(assigned), saved, list(judgments.values()))


def _judgment(rating: Any, rater: str, assigned: Mapping[str, int], key: Key) -> Judgment:
    if not isinstance(rating, dict):
        raise BadRow(Cause.WRONG_TYPE, f"expected an object, got {type(rating).__name__}", field="item")
    item, choice = text(rating, "item"), text(rating, "choice")
    if item not in assigned:
        raise BadRow(Cause.OUT_OF_RANGE, f"{item!r} is not on the list of this rater", field="item")
    first = assigned[item]
    if number(rating, "first") != first:
        raise BadRow(Cause.OUT_OF_RANGE, f"text {first} stood first, not {rating['first']}", field="first")
    if choice not in CHOICES:
        raise BadRow(Cause.OUT_OF_RANGE, f"must be one of {', '.join(CHOICES)}, is {choice!r}", field="choice")
    shown = key.methods[item][first], key.methods[item][1 - first]
    winner = "tie" if choice == "same" else shown[choice == "B"]
    return Judgment(item, rater, cast(Winner, winner), leading=shown[0] == "a")


def read_records(path: str | Path, *, key: Key | None = None) -> list[Judgment]:
    """Reads records of the second kind. With a `key`, items must be in it. `DataError` also if a rater rates an item twice."""
    found: dict[tuple[str, str], tuple[str, Judgment]] = {}
    for where, row in _rows(path):
        item, winner, rater = (_text(where, row, field) for field in ("item", "winner", "rater"))
        if winner not in WINNERS:
            _refuse(where, BadRow(Cause.OUT_OF_RANGE, f"must be a, b or tie, is {winner!r}", field="winner"))
        if key is not None and item not in key.methods:
            _refuse(where, BadRow(Cause.OUT_OF_RANGE, f"the study {key.study} has no item {item!r}", field="item"))
        first, _ = found.setdefault((item, rater), (where, Judgment(item, rater, cast(Winner, winner))))
        if first != where:
            _refuse(
                where, BadRow(Cause.DUPLICATE_KEY, f"{rater} has rated {item} in {first}; keep one of the two", field="item")
            )
    return [judgment for _, judgment in found.values()]


class Verdicts(NamedTuple):
    """A judge's verdicts on the items of a study. Lines read = items + `repeated` + `foreign`."""

    winners: dict[str, Winner | None]  # item -> winner; None if the judge did not decide
    repeated: int  # equal verdicts on the same two texts, in another series of the judge's
    foreign: int  # verdicts on other texts


def read_verdicts(path: str | Path, *, key: Key | None = None) -> Verdicts:
    """Reads a judge's pairs (third kind, needs the `key`), or records of the second kind, all of one rater.

    Verdicts on texts outside the study are counted, not refused: a judge may have been asked about more. Raises `DataError`
    for a bad line, for two different verdicts on one item, and for a file without a verdict on this study.
    """
    winners: dict[str, Winner | None] = {}
    lines: dict[str, str] = {}
    repeated = foreign = 0
    for where, row in _rows(path):
        item, winner = _verdict(where, row, key)
        if item is None:
            foreign += 1
        elif item not in winners:
            winners[item], lines[item] = winner, where
        elif winners[item] == winner:
            repeated += 1
        else:
            detail = f"{item} has another verdict in {lines[item]}; keep those of one judge"
            _refuse(where, BadRow(Cause.DUPLICATE_KEY, detail, field="item" if "item" in row else "outcome"))
    if not winners:
        raise DataError(
            f"{path}: none of its {foreign} verdicts is on a pair of this study; let the judge compare the same two files",
            causes=[Cause.NO_PAIR],
        )
    return Verdicts(winners, repeated, foreign)


def _verdict(where: str, row: dict[str, Any], key: Key | None) -> tuple[str | None, Winner | None]:
    """The item of a study that a line of a judge's file is about (None for other texts), and its winner.

    Only this function knows the format that `dpo-jax judge` writes.
    """
    if "item" in row:
        item, winner = _text(where, row, "item"), _text(where, row, "winner")
        if winner not in WINNERS:
            _refuse(where, BadRow(Cause.OUT_OF_RANGE, f"must be a, b or tie, is {winner!r}", field="winner"))
        known = key is None or item in key.methods
        return (item if known else None), (None if winner == "tie" else cast(Winner, winner))
    if key is None:
        _refuse(where, BadRow(Cause.MISSING_COLUMN, "without a key of the study a verdict must name its item", field="item"))
    prompt, policy, baseline, outcome = (_text(where, row, field) for field in ("prompt", "policy", "baseline", "outcome"))
    if outcome not in OUTCOMES:
        _refuse(where, BadRow(Cause.OUT_OF_RANGE, f"must be one of {', '.join(OUTCOMES)}, is {outcome!r}", field="outcome"))
    item, a, b = key.texts.get(prompt, (None, "", ""))
    if (policy, baseline) == (a, b):
        return item, OUTCOMES[outcome]
    if (policy, baseline) == (b, a):  # the judge's policy is the study's second method
        return item, {"a": "b", "b": "a", None: None}[OUTCOMES[outcome]]
    return None, None


def _rows(path: str | Path) -> Iterable[tuple[str, dict[str, Any]]]:
    report = DataReport(source=str(path))
    for where, row in read_rows(str(path), regular(path), report=report):
        if isinstance(row, BadRow):
            _refuse(where, row)
        yield where, row


def _text(where: str, row: dict[str, Any], field: str) -> str:
    try:
        return text(row, field)
    except BadRow as problem:
        _refuse(where, problem)


def _refuse(where: str, problem: BadRow) -> NoReturn:
    raise DataError(f"{where}: {_short(problem)}", causes=[problem.cause]) from None


def _short(value: object) -> str:
    """A value shortened for a message, which may quote a text of the file."""
    said = str(value)
    return said if len(said) <= 400 else said[:400] + "..."


def _typed(row: Mapping[str, Any], field: str, kind: type[T], *, inside: str = "") -> T:
    """The list or object in a column. Raises `BadRow` for another type."""
    value = column(row, field, inside=inside)
    if not isinstance(value, kind):
        needed = "a list" if kind is list else "an object"
        raise BadRow(Cause.WRONG_TYPE, f"expected {needed}, got {kind_of(value)}", field=inside + field)
    return value


def _json(path: str | Path, what: str) -> dict[str, Any]:
    def refused(said: str) -> DataError:
        return DataError(said, causes=[Cause.INVALID_JSON])

    with reading(path, remedy=f"a {what} is needed", error=refused):
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a file")
        found = parse_json(read_bytes(path))
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, got {kind_of(found)}")
        return found
