"""The prompts of the held-out data with their reference completions: what is sampled for, and judged against."""

from __future__ import annotations

from typing import Any, NamedTuple

from dpo_jax.cli import build
from dpo_jax.cli.config import Config
from dpo_jax.runtime.progress import reported

ARTICLE_CUE = "\nTL;DR:"  # makes a policy of Reddit summaries summarise an article


class Reference(NamedTuple):
    prompt: str
    completion: str
    where: str


def references(config: Config, tokenizer: Any, *, target: bool = False) -> list[Reference]:
    """Every pair's prompt and its chosen completion, or with `target` what SFT learns for it. Prompts may repeat.

    Of news articles (Table 1 of the paper): the article with `ARTICLE_CUE`, and its editors' summary.
    """
    data = config.data
    if data.source == "cnn_dailymail":
        assert data.path is not None  # checked with the configuration
        with build.needs_tfds("data.source: cnn_dailymail"):
            from dpo_jax.data.tfds import read_articles
        with reported("reading the articles"):
            articles = read_articles(data.path, data.test_split)[: data.max_test]
        return [Reference(f"{article.text}{ARTICLE_CUE}", f" {article.summary}", article.uid) for article in articles]
    pairs = build.load_split(config, "test", tokenizer)
    return [Reference(p.prompt, (p.sft_target if target else None) or p.chosen, p.uid) for p in pairs]
