"""Sources of labels for the rounds of `online`: a reward, a judge behind an endpoint, or people on a page."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.frontier_runs import classifier_name
from dpo_jax.cli.judging import api_key, ask, outcome_in, questions_of, verdict_settings
from dpo_jax.extras import install_command
from dpo_jax.judge.asking import Refused, Unfinished
from dpo_jax.judge.questions import Pair
from dpo_jax.judge.verdicts import VerdictLog
from dpo_jax.models.digest import files_digest
from dpo_jax.models.hub import resolve
from dpo_jax.online.labels import Asked, Compare, Label
from dpo_jax.runtime.hosts import is_first, run_on_first
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.study.page import WORDINGS, Comparison, Wording, make_study, render
from dpo_jax.study.ratings import Judgment, read_key, read_raters, read_records, sealed
from dpo_jax.untrusted import Unreadable, read_object
from dpo_jax.writing import write_text

LABELS: dict[str, Label] = {"won": 1.0, "lost": 0.0, "flipped": 0.5, "failed": None, "unanswered": None}
"""A judge's verdict on a comparison -> its label. The same letter in both orders says nothing about the texts: a tie."""
RATED: dict[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}


def label_settings(config: Config) -> dict[str, Any]:
    """Settings on which every label depends, besides the texts."""
    section, found = config.online, {"reward": config.online.reward}
    if section.reward == "known":
        classifier = config.frontier.classifier and classifier_name(config.frontier.classifier)
        return found | {"name": config.frontier.reward, "classifier": classifier}
    if section.reward == "reward-model":
        assert section.reward_model is not None  # checked with the configuration
        return found | {"reward_model": files_digest(resolve(section.reward_model))[0]}
    if section.reward == "judge":
        return found | {f"judge.{name}": value for name, value in verdict_settings(config).items()}
    return found | {"question": wording(config).question}


def compare_of(config: Config, run: RunDir) -> Compare | None:
    """The function that compares completions in a run; None: a reward labels. `ConfigError`: judge without package or key."""
    if config.online.reward == "judge":
        if importlib.util.find_spec("httpx2") is None:
            raise ConfigError(f"online.reward: judge needs the package httpx2: {install_command('judge')}")
        key = api_key(config) if is_first() else None  # the other hosts send no requests
        return by_first(functools.partial(by_judge, config, run.path / "verdicts.jsonl", key))
    return by_first(functools.partial(by_people, config, run.path)) if config.online.reward == "people" else None


def by_first(compare: Compare) -> Compare:
    """`compare` on the first host only, which sends the others its labels, or why some are missing."""

    def ask_first(number: int, comparisons: Sequence[Asked]) -> Sequence[Label]:
        def make() -> dict[str, Any]:
            try:
                return {"labels": list(compare(number, comparisons))}
            except Unfinished as stopped:
                return {"unfinished": str(stopped)}

        found = run_on_first(make)
        if "unfinished" in found:
            raise Unfinished(found["unfinished"])
        return found["labels"]

    return ask_first


def by_judge(config: Config, path: Path, key: str | None, number: int, comparisons: Sequence[Asked]) -> list[Label]:
    """Asks the judge. The log at `path` and the caps are shared by all rounds. Raises `Unfinished` if a cap is reached.

    A comparison that the endpoint refuses stays undecided: asked again, it would be refused again, and the run would end there.
    """
    asked = [
        questions_of(config, Pair(f"round {number}:{place}", "online", None, prompt, first, second))
        for place, (prompt, (first, second)) in enumerate(comparisons)
    ]
    with VerdictLog(path, verdict_settings(config)) as log:
        if log.interrupted:
            print(f"{log.interrupted} questions were in flight when the run last ended: asked again, and counted as paid")
        try:
            asyncio.run(ask(config, [question for both in asked for question in both], log, key))
        except Refused as refused:
            print(f"round {number}: {refused}; their comparisons stay undecided", flush=True)
        return [LABELS[outcome_in(both, log)] for both in asked]


def wording(config: Config) -> Wording:
    """The texts that raters read."""
    section = config.study
    found = WORDINGS[section.task]
    return found._replace(question=section.question) if section.question else found


def by_people(config: Config, folder: Path, number: int, comparisons: Sequence[Asked]) -> list[Label]:
    """Reads people's ratings of the round's page. Raises `Unfinished`, with instructions, while a rating is missing."""
    here = folder / f"round-{number:03}" / "study"
    # A study has one comparison per prompt. Of prompts truncated to the same text, the second stays undecided.
    first = {comparison.prompt: comparison for comparison in reversed(comparisons)}
    study = make_study(
        [Comparison(*comparison) for comparison in comparisons if first[comparison.prompt] == comparison],
        names=("first", "second"),
        title=config.study.title,
        wording=wording(config),
        raters=1,
        twice=0.0,
        seed=config.run.seed,
    )
    page, file, ratings = here / "study.html", here / "key.json", here / "ratings"
    ratings.mkdir(parents=True, exist_ok=True)
    if _study_in(file) != study.key["study"]:
        if any(ratings.iterdir()):
            raise ConfigError(f"{ratings}: holds ratings of a different study, not of this round; move that folder away")
        write_json(file, sealed(study.key))
        write_text(page, render(study.page))
    found = _judgments(ratings, file)
    items = {item["prompt"]: item["id"] for item in study.key["items"]}
    rated: dict[str, list[float]] = {}
    for judgment in found:
        rated.setdefault(judgment.item, []).append(RATED[judgment.winner])
    missing = sum(item not in rated for item in items.values())
    if missing:
        raise Unfinished(
            f"round {number}: {missing:,} of {len(items):,} comparisons have no rating yet. Give people {page}, hide {file} "
            f"from them, and put the files they save into {ratings}; then run the same command again: it continues"
        )
    shares = {prompt: sum(rated[item]) / len(rated[item]) for prompt, item in items.items()}
    return [shares[one.prompt] if first[one.prompt] == one else None for one in comparisons]


def _study_in(file: Path) -> str | None:
    try:
        return str(read_object(file).get("study"))
    except (FileNotFoundError, Unreadable):
        return None


def _judgments(ratings: Path, file: Path) -> list[Judgment]:
    """Ratings in all files of a folder: those saved by the page, and records (`study.ratings`)."""
    files = sorted(ratings.glob("[!.]*"))
    saved = [path for path in files if path.name.endswith(".json")]
    records = [path for path in files if path.name.endswith((".jsonl", ".jsonl.gz"))]
    if other := [str(path) for path in files if path not in saved and path not in records]:
        raise ConfigError(f"{', '.join(other)}: neither .json, as the page saves it, nor .jsonl")
    if not files:
        return []
    key = read_key(file)
    judgments = [judgment for rater in read_raters(saved, key=key) for judgment in rater.judgments]
    return judgments + [judgment for path in records for judgment in read_records(path, key=key)]
