"""Reward functions `(prompts, completions) -> rewards`: a rule, a lexicon, a classifier, or a learned reward model."""

# pyright: reportMissingImports=false
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import reviews
from dpo_jax.data.encode import Bos, Encoded, ended_ids, token_ids, with_bos
from dpo_jax.data.layout import Layout
from dpo_jax.data.loader import round_up
from dpo_jax.data.template import is_rendered, turn_end
from dpo_jax.evals.intervals import Interval, score_interval
from dpo_jax.extras import install_command
from dpo_jax.types import Array, Rows
from dpo_jax.untrusted import reading

Reward = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""(prompts, completions), n of each -> float64[n], higher is better. A text is a prompt with its completion."""
UNLIMITED = 10**9  # tokens; tokenizers without a limit state an even larger number


def exact_reviews(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """The true reward of generated reviews (`data.reviews`), in points."""
    texts = zip(prompts, completions, strict=True)
    return np.array([reviews.reward(prompt + completion) for prompt, completion in texts], np.float64)


def words(text: str) -> list[str]:
    """Lower-case words, with apostrophes kept inside them; punctuation that may carry sentiment counts as words."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*|[!?]", text.lower())


class LinearReward(NamedTuple):
    """Log-odds, in nats, that a bag of words is positive. A word counts once however often it occurs."""

    bias: float
    weights: dict[str, float]

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        # Sorted, because a float sum depends on its order, and the order of a set on the process.
        found = [(self.weights.get(word, 0.0) for word in sorted(set(words(text)))) for text in texts]
        return np.array([self.bias + sum(weights) for weights in found], np.float64)


def fit_linear(texts: Sequence[str], labels: Sequence[int], *, inverse_penalty: float, min_texts: int = 2) -> LinearReward:
    """Logistic regression on the words that occur in at least `min_texts` of `texts`; `labels` are 1 for positive, else 0.

    `inverse_penalty` is scikit-learn's C: smaller means a stronger L2 penalty. Fitting needs scikit-learn (extra `lab`); the
    fitted reward does not. The same texts give the same weights.
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(f"the linear reward is fitted with scikit-learn: {install_command('lab')}") from error
    if len(texts) != len(labels) or set(labels) != {0, 1}:
        raise ValueError(
            f"{len(texts)} texts and {len(labels)} labels {sorted(set(labels))}: need equally many, with both 0 and 1"
        )
    analyzer: Any = words  # scikit-learn also takes a function, though its annotations do not say so
    bags: Any = CountVectorizer(analyzer=analyzer, binary=True, min_df=min_texts)
    model: Any = LogisticRegression(C=inverse_penalty, solver="lbfgs", max_iter=1000)
    model.fit(bags.fit_transform(texts), np.asarray(labels))
    weights = zip(bags.get_feature_names_out().tolist(), model.coef_[0].tolist(), strict=True)
    return LinearReward(float(model.intercept_[0]), dict(weights))


def vader_lexicon() -> Reward:
    """The compound score of VADER, a published lexicon of rated words with rules for negation and emphasis: -1 to 1.

    Hutto and Gilbert 2014. Needs vaderSentiment (extra `lab`). It needs no fitting and can score any English text.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(f"the lexicon is that of the package vaderSentiment: {install_command('lab')}") from error
    analyzer = SentimentIntensityAnalyzer()

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        texts = zip(prompts, completions, strict=True)
        return np.array([analyzer.polarity_scores(prompt + text)["compound"] for prompt, text in texts], np.float64)

    return reward


def sign_accuracy(reward: Reward, texts: Sequence[str], labels: Sequence[int]) -> tuple[float, Interval]:
    """Accuracy of a reward's sign on positive (1) and negative (0) texts, with its 95 % interval. Zero is half right."""
    values = reward([""] * len(texts), texts)
    signs = np.where(np.asarray(labels) > 0, 1, -1) * np.sign(values)
    scores = (1 + signs) / 2
    return float(scores.mean()), score_interval(scores)


def hf_classifier(path: str, label: str | None = None, *, batch: int = 64, device: str | None = None) -> Reward:
    """Log-odds, in nats, of one label of a Hugging Face text classifier (a folder or an "org/name"), computed by torch.

    The paper uses "siebert/sentiment-roberta-large-english" with the label "POSITIVE". A classifier with a single output is a
    reward model: its output is the reward, and it takes no label. Texts that are too long for the model are truncated at the
    end. `device` is a torch device name; by default a GPU if torch sees one. Needs torch (extra `classifier`). Raises
    `Unreadable` for a classifier that cannot be loaded, or that gives no reward for a short text.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"a Hugging Face classifier runs on torch: {install_command('classifier')}") from error
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    where, again = f"classifier {path}", "save or fetch it again"
    with reading(where, remedy=again):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        options: Any = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
        model, report = AutoModelForSequenceClassification.from_pretrained(path, **options)
        if missing := sorted(report["missing_keys"]):  # transformers would initialize them at random
            raise ValueError(f"the weights lack {', '.join(missing[:5])}: no trained classifier")
        labels = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
        limit = min(int(tokenizer.model_max_length), _positions(model.config))
    if len(labels) == 1 and label is not None:
        raise ValueError(f"{path} has a single output, which is the reward: it takes no label (given: {label!r})")
    if len(labels) > 1 and label not in labels:
        raise ValueError(f"{path} has the labels {', '.join(labels)}: name the one to reward (given: {label!r})")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    cut = {"truncation": True, "max_length": limit} if limit < UNLIMITED else {}

    @torch.inference_mode()
    def reward(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        values = []
        for start in range(0, len(texts), batch):
            inputs = tokenizer(texts[start : start + batch], padding=True, return_tensors="pt", **cut)
            logits = model(**inputs.to(device)).logits.double()
            if label is not None:
                chosen = labels.index(label)
                others = [number for number in range(len(labels)) if number != chosen]
                logits = logits[:, [chosen]] - logits[:, others].logsumexp(dim=1, keepdim=True)
            values.append(logits[:, 0].cpu().numpy())
        return np.concatenate(values) if values else np.zeros(0)

    with reading(where, remedy=again):
        if not np.isfinite(reward([""], ["A film."])).all():
            raise ValueError("its reward of a short text is not finite")
    return reward


def _positions(config: Any) -> int:
    """Number of tokens a classifier can read. RoBERTa's position table starts after its padding token: two rows are unused."""
    limit = getattr(config, "max_position_embeddings", None) or UNLIMITED
    return limit - (config.pad_token_id or 0) - 1 if "roberta" in config.model_type else limit


def learned(
    score: Callable[[Rows], Array],
    tokenizer: Any,
    *,
    length: int,
    batch: int,
    bos: Bos = "auto",
    host_part: tuple[int, int] = (0, 1),
    pad_token_id: int | None = None,
) -> Reward:
    """A reward model as a reward function: `score(rows) -> [R]` reads plain rows of one completion each.

    A completion ends as in the pairs that the model was trained on: after a prompt that the chat template wrote
    (`is_rendered`), with all that the template writes after a turn, as TRL does; otherwise in EOS. `bos`
    (`data.encode.with_bos`) must be the setting that the model was trained with. Trailing tokens `pad_token_id` are left out:
    models whose padding token is EOS were trained to score the token before it.

    `score` is `reward_model.completion_rewards` with model and variables bound, compiled. It gets `batch` rows at a time, as
    long as the longest text needs, in steps of 16 tokens. With several hosts, each passes its part (`Partitioner.host_part`)
    and gets all rewards. Raises `ValueError` for a text of more than `length` tokens.
    """

    after, rest = turn_end(tokenizer), _rest(tokenizer)

    def encoded(prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        chat = is_rendered(prompt, tokenizer)
        asked = with_bos(token_ids(prompt, tokenizer), tokenizer, bos=bos, chat=chat)
        if chat and tokenizer.eos_token not in completion:
            answer = np.concatenate([ended_ids(completion + after, tokenizer, chat=True), rest])
        else:
            answer = np.append(token_ids(completion, tokenizer), np.int32(tokenizer.eos_token_id))
        return asked, answer[: _end(answer, pad_token_id)]

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        texts = [encoded(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        values = np.empty(len(texts), np.float64)
        for start in range(0, len(texts), batch):
            here = texts[start : start + batch]
            width = min(length, round_up(max(len(prompt) + len(completion) for prompt, completion in here), 16))
            layout = Layout("plain", length=width, scored=width)
            rows = layout.rows(here, at_least=batch, part=host_part)
            values[start : start + len(here)] = np.asarray(score(rows))[: len(here)]
        return values

    return reward


def with_ends(pairs: Sequence[Encoded], tokenizer: Any) -> list[Encoded]:
    """The pairs as a reward model reads them: with all that the chat template writes after a turn, of which a policy learns
    only the first token. Samples that a token limit cut off end as well, because a reader of texts cannot know this;
    completions cut to `max_length` do not.
    """
    rest, after = _rest(tokenizer), turn_end(tokenizer)
    ends = {chat: ended_ids(after if chat else "", tokenizer, chat=True) for chat in (False, True)}

    def whole(pair: Encoded) -> Encoded:
        if not (pair.unended or len(rest)):
            return pair
        chat, found = is_rendered(tokenizer.decode(pair.prompt), tokenizer), {}
        for side in ("chosen", "rejected"):
            if getattr(pair, f"{side}_cut"):
                continue
            tail = [*(ends[chat] if side in pair.unended else []), *(rest if chat else [])]
            found[side] = np.append(getattr(pair, side), np.array(tail, np.int32))
            if (scored := getattr(pair, f"{side}_scored")) is not None:
                found[f"{side}_scored"] = np.append(scored, np.ones(len(tail), bool))
        return dataclasses.replace(pair, **found, unended=())

    return [whole(pair) for pair in pairs]


def _rest(tokenizer: Any) -> np.ndarray:
    """The ids that the chat template writes after the token that ends a turn: often a newline. int32[n], mostly empty."""
    after = turn_end(tokenizer)
    if not after:
        return np.zeros(0, np.int32)
    every, ended = token_ids(after, tokenizer), ended_ids(after, tokenizer, chat=True)
    return every[len(ended) :] if every[: len(ended)].tolist() == ended.tolist() else every[:0]


def _end(ids: np.ndarray, pad_token_id: int | None) -> int:
    """The number of ids up to the last one that is not `pad_token_id`."""
    real = np.flatnonzero(ids != pad_token_id) if pad_token_id is not None else []
    return int(real[-1]) + 1 if len(real) else len(ids)
