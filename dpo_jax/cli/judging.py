"""Asks a judge through an API: key, questions, budget and verdict settings."""

from __future__ import annotations

import os
import re
from typing import Any

from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.judge.asking import Budget, ask_all
from dpo_jax.judge.endpoint import Endpoint
from dpo_jax.judge.questions import Outcome, Pair, Question, orders, outcome_of, question_of, winner_of
from dpo_jax.judge.verdicts import VerdictLog
from dpo_jax.runtime.progress import reported

SETTINGS = ("model", "prompt", "fence", "temperature", "max_tokens", "one_order")
"""Settings on which a verdict depends, besides its texts. The address is not one: the same model may move."""
PER = 1e-6  # prices are per million tokens


def verdict_settings(config: Config) -> dict[str, Any]:
    """Settings on which the verdicts of a log depend."""
    section = config.judge
    return {name: getattr(section, name) for name in SETTINGS} | ({"seed": config.run.seed} if section.one_order else {})


def judge_prompt(config: Config) -> str:
    assert config.judge.prompt is not None  # checked with the configuration
    return config.judge.prompt


def api_key(config: Config) -> str | None:
    """The API key, from the environment. A local endpoint may need none."""
    section = config.judge
    if key := os.environ.get(section.key_env, "").strip():
        if not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(f"judge.key_env: the variable {section.key_env} contains characters that no key can have")
        return key
    if section.base_url == type(section).base_url:
        raise ConfigError(f"judge.key_env: {section.base_url} needs a key, but the variable {section.key_env} is empty")
    return None


def questions_of(config: Config, pair: Pair) -> list[Question]:
    sides = orders(pair, one_order=config.judge.one_order, seed=config.run.seed)
    return [question_of(pair, prompt=judge_prompt(config), a=a, fence=config.judge.fence) for a in sides]


def outcome_in(questions: list[Question], log: VerdictLog) -> Outcome:
    return outcome_of([winner_of(question, log.verdicts.get(question.key)) for question in questions])


async def ask(config: Config, questions: list[Question], log: VerdictLog, key: str | None) -> None:
    section = config.judge
    budget = budget_of(config)
    assert section.model is not None  # checked with the configuration
    endpoint = Endpoint(
        section.base_url,
        key,
        model=section.model,
        temperature=section.temperature,
        max_tokens=section.max_tokens,
        limit_name=section.limit_name,
        timeout=section.timeout,
    )
    keys, before = {question.key for question in questions}, len(log.verdicts)
    known = len(keys & set(log.verdicts))
    with reported("judge", total=len(keys), unit="questions") as task:
        task.advance(known)

        def settled() -> None:
            task.advance(known + len(log.verdicts) - before - task.done, note=spent_words(budget, log))

        try:
            await ask_all(
                questions,
                endpoint,
                log,
                prompt=judge_prompt(config),
                max_tokens=section.max_tokens,
                concurrency=section.concurrency,
                tries=section.tries,
                budget=budget,
                settled=settled,
            )
        finally:
            await endpoint.close()


def budget_of(config: Config) -> Budget:
    section = config.judge
    caps = {"requests": section.max_requests, "tokens": section.max_spent_tokens, "cost": section.max_cost}
    prices = {"price_read": section.price_in * PER, "price_written": section.price_out * PER}
    return Budget(**{name: float(cap) for name, cap in caps.items() if cap is not None}, **prices)


def spent_words(budget: Budget, log: VerdictLog) -> str:
    cost = f", cost {budget.cost_of(log.spent):,.2f}" if budget.price_read or budget.price_written else ""
    faults = f", {sum(log.faults.values()):,} faults" if log.faults else ""
    return f"{sum(log.spent):,} tokens{cost}{faults}"
