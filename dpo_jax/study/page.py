"""Web page of a blind study with people (appendix D.3): two completions of a prompt side by side.

`make_study` makes a page, which is sent to raters, and a key, which is not. The page holds the texts in a random order per
comparison, with ids that reveal nothing; the key says which method wrote which text. The raters' files can be read only with
the key (`study.ratings`).
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.completion_files import Completion, without_cue
from dpo_jax.data.pairs import BadRow, Cause, DataError, DataReport
from dpo_jax.data.terminal import json_text, printable

METHODS = ("a", "b")


class Wording(NamedTuple):
    """Wording of the page: the question (as in appendix C.2), and the names for prompt and completion."""

    question: str
    prompt: str
    completion: str


WORDINGS = {
    "summary": Wording(
        "Which of the following summaries does a better job of summarizing the most important points in the given forum post?",
        "Forum post",
        "Summary",
    ),
    "dialogue": Wording("Which response is more helpful?", "Conversation", "Response"),
}


class Comparison(NamedTuple):
    prompt: str
    completions: tuple[str, str]  # of method a, of method b


@dataclasses.dataclass(frozen=True)
class Study:
    """`page` is for raters, `key` must be kept from them. Both are plain JSON, with the same digest under "study"."""

    page: dict[str, Any]
    key: dict[str, Any]


def one_each(completions: Sequence[Completion]) -> dict[str, str]:
    """Prompt -> completion. Raises `DataError` for a prompt that comes twice, because its completions could not be matched with
    those of the other file.
    """
    found: dict[str, Completion] = {}
    for one in completions:
        first = found.setdefault(one.prompt, one)
        if first is not one:
            raise DataError(
                f"{one.where}: prompt: the same as in {first.where}; keep one of each prompt (one temperature, one N)",
                causes=[Cause.DUPLICATE_KEY],
            )
    return {prompt: one.text for prompt, one in found.items()}


def join(a: Mapping[str, str], b: Mapping[str, str], *, report: DataReport) -> list[Comparison]:
    """Comparisons for the prompts that both have, in the order of `a`. `report` counts what is left out, by cause.

    Completions that differ only in white space are left out: raters would see the same text twice. Raises `DataError` if
    nothing is left.
    """
    kept = []
    for prompt in dict(a) | dict(b):
        report.read += 1
        if prompt not in a or prompt not in b:
            only = "the first" if prompt in a else "the second"
            report.add(repr(prompt[:60]), BadRow(Cause.NO_PAIR, f"only {only} file has this prompt"))
        elif a[prompt].strip() == b[prompt].strip():
            report.add(repr(prompt[:60]), BadRow(Cause.IDENTICAL, "both completions are the same text"))
        else:
            kept.append(Comparison(prompt, (a[prompt], b[prompt])))
    report.kept = len(kept)
    report.check()
    if not kept:
        raise DataError(
            f"{report.source}: nothing to compare ({report.dropped}):\n{report.reasons()}"
            "The two files need completions of the same prompts, character by character.",
            causes=[Cause.NO_PAIR],
        )
    return kept


def draw(comparisons: Sequence[Comparison], limit: int, *, seed: int, report: DataReport) -> list[Comparison]:
    """Draws `limit` of the comparisons at random (150 in the paper); `report` counts the others."""
    taken = np.sort(np.random.default_rng(seed).permutation(len(comparisons))[:limit])
    for number in np.setdiff1d(np.arange(len(comparisons)), taken):
        where = repr(comparisons[number].prompt[:60])
        report.add(where, BadRow(Cause.OVER_LIMIT, f"not among the {limit} that were drawn"))
    report.kept = len(taken)
    report.check()
    return [comparisons[number] for number in taken]


def make_study(
    comparisons: Sequence[Comparison],
    *,
    names: tuple[str, str],
    title: str,
    wording: Wording,
    raters: int,
    twice: float,
    seed: int,
) -> Study:
    """The page and the key of a study. The same arguments give the same study.

    `names`: the two methods, for the key only. `raters`: number of lists of comparisons, one per person (a single list may be
    used by any number of people). `twice`: share of the comparisons that are on two lists, so that people can be compared with
    each other. Comparisons are shuffled for each list, and method a stands first in half of each list. The page shows prompts
    as a judge sees them, and escapes invisible characters; the key keeps the exact texts, to match verdicts on them.
    """
    # With the seed alone, anyone with this program could repeat the draw. The order of the files is not on the page.
    order = json.dumps([list(names), [list(comparison) for comparison in comparisons]])
    rng = np.random.default_rng([seed, *hashlib.sha256(order.encode()).digest()])
    width = max(3, len(str(len(comparisons))))
    stored = rng.permuted(np.tile([0, 1], (len(comparisons), 1)), axis=1)  # the methods of an item's two texts
    shuffled = [comparisons[number] for number in rng.permutation(len(comparisons))]
    items, hidden = [], []
    for number, (comparison, sides) in enumerate(zip(shuffled, stored, strict=True), start=1):
        name, texts = f"{number:0{width}}", [comparison.completions[method] for method in sides]
        shown = [printable(text) for text in texts]
        items.append({"id": name, "prompt": printable(without_cue(comparison.prompt)), "texts": shown})
        methods = [METHODS[method] for method in sides]
        hidden.append({"id": name, "prompt": comparison.prompt, "texts": texts, "methods": methods})
    lists = []
    for assigned in deal(len(items), raters, twice=twice, rng=rng):
        leading = rng.permutation(np.arange(len(assigned)) + rng.integers(2)) % 2  # the method shown first, half and half
        lists.append([[items[i]["id"], int(stored[i][0] != method)] for i, method in zip(assigned, leading, strict=True)])
    page = {"title": title, **wording._asdict(), "items": items, "raters": lists}
    digest = hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()[:16]
    key = {"study": digest, "names": dict(zip(METHODS, names, strict=True)), "seed": seed, "items": hidden, "raters": lists}
    return Study({"study": digest, **page}, key)


def deal(items: int, raters: int, *, twice: float, rng: np.random.Generator) -> list[list[int]]:
    """Assigns items to raters, shuffled: a share `twice` of the items goes to two raters, the others to one.

    The lists' lengths differ by at most one item, and shared items are spread evenly over pairs of raters.
    """
    doubled = round(twice * items)
    if doubled and raters < 2:
        raise ValueError(f"{doubled} items are to be rated by two, but there is one rater")
    lists: list[list[int]] = [[] for _ in range(raters)]
    shared = np.zeros((raters, raters), int)
    for place, item in enumerate(rng.permutation(items)):
        loads, chance = [len(held) for held in lists], rng.permutation(raters)
        chosen = [min(range(raters), key=lambda rater: (loads[rater], chance[rater]))]
        if place < doubled:
            first = chosen[0]
            others = [rater for rater in range(raters) if rater != first]
            chosen.append(min(others, key=lambda rater: (loads[rater], shared[first, rater], chance[rater])))
            shared[chosen, chosen[::-1]] += 1
        for rater in chosen:
            lists[rater].append(int(item))
    return [[held[place] for place in rng.permutation(len(held))] for held in lists]


def render(page: Mapping[str, Any]) -> str:
    """The page as one self-contained HTML file. Its content security policy (CSP) forbids it to load or send anything.

    Texts are embedded as JSON, escaped so that they cannot end the surrounding element, and shown as text, never as HTML.
    """
    template = importlib.resources.files("dpo_jax.study").joinpath("templates", "study.html").read_text(encoding="utf-8")
    [style], [script] = (re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL) for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    embedded = json_text(page)
    for character in "<>&":
        embedded = embedded.replace(character, f"\\u{ord(character):04x}")
    # A single pass, so that text inserted for one placeholder is not searched for the other.
    values = {"POLICY": policy, "STUDY": embedded}
    return re.sub(r"\{\{(POLICY|STUDY)\}\}", lambda mark: values[mark[1]], template)


def _sha256(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
