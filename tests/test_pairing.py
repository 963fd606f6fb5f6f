"""Completions are read, joined by prompt, chosen by reward and cut to fit."""

import functools
import json

import numpy as np
import pytest

from dpo_jax.cli.commands.sample import best_rows, shown_text, within
from dpo_jax.data.completion_files import Completion, read_completions
from dpo_jax.data.encode import token_ids
from dpo_jax.data.pairs import DataError
from dpo_jax.judge.pairing import pair_up


def completions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_are_joined_by_their_prompt_and_the_books_are_closed(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i} {t}", "temperature": t} for t in (0, 0.5) for i in (0, 1, 2, 9)]
    policy = read_completions(completions(tmp_path / "dpo.jsonl", rows), by="temperature")
    baseline = [Completion(f"p{i}", f"b{number}", None, f"data:{number}") for number, i in enumerate((5, 2, 1, 2, 0))]
    paired = pair_up({"dpo": policy, "sft": policy[:2]}, baseline, limit=2)
    assert [(p.uid, p.at, p.prompt, p.policy, p.baseline) for p in paired.pairs[:3]] == [
        ("dpo:0:2", 0.0, "p1", "c1 0", "b2"),
        ("dpo:0:3", 0.0, "p2", "c2 0", "b1"),
        ("dpo:0.5:6", 0.5, "p1", "c1 0.5", "b2"),
    ]
    assert paired.baseline.dropped == {
        "no policy has this prompt": ["data:0"],
        "repeated prompt": ["data:3"],
        "over judge.limit": ["data:4"],
    }
    assert (paired.baseline.read, paired.baseline.kept) == (5, 2)
    assert paired.policies["dpo"].dropped == {
        "over judge.limit": ["dpo.jsonl:1", "dpo.jsonl:5"],
        "the baseline lacks this prompt": ["dpo.jsonl:4", "dpo.jsonl:8"],
    }
    assert [(books.read, books.kept) for books in paired.policies.values()] == [(8, 4), (2, 1)]
    with pytest.raises(DataError, match=r"dpo: dpo.jsonl:5: completes the prompt of dpo.jsonl:1 again; --judge.by"):
        pair_up({"dpo": [one._replace(at=None) for one in policy]}, baseline)
    with pytest.raises(DataError, match="no prompt is in both"):
        pair_up({"dpo": policy}, baseline[:1])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "p"}', "a.jsonl:2: completion: missing_column"),
        (
            '{"prompt": "p", "completion": ["c"]}',
            "a.jsonl:2: completion: wrong_type: expected a string, got list; write the",
        ),
        ('{"prompt": " \\nTL;DR:", "completion": "c"}', "a.jsonl:2: prompt: no_prompt"),
        ('{"prompt": "\\ud800", "completion": "c"}', "a.jsonl:2: prompt: invalid_utf8: lone surrogate"),
        (f'{{"prompt": "p", "completion": "{"c" * 1_000_001}"}}', "a.jsonl:2: completion: too_long: 1,000,001 characters"),
        ('{"prompt": "p", "completion": "c"}', "a.jsonl:2: temperature: missing_column"),
        ('{"prompt": "p", "completion": "c", "temperature": "hot"}', "a.jsonl:2: temperature: wrong_type"),
        ('{"prompt": "p", "comp', "a.jsonl:2: invalid_json"),
    ],
)
def test_a_row_that_is_no_completion_is_told(tmp_path, line, expected):
    """To the judge as to people: one function reads for both."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": "c", "temperature": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=expected):
        read_completions(path, by="temperature")


def test_the_reward_reads_what_the_policy_was_shown(tokenizer):
    whole = token_ids("The sky over the sea is", tokenizer)
    assert shown_text("as given", whole, whole, tokenizer) == "as given"
    assert shown_text("as given", whole[-2:], whole, tokenizer) == tokenizer.decode(whole[-2:])
    bos = np.int32(tokenizer.bos_token_id)
    assert shown_text("as given", np.append(bos, whole[-2:]), whole, tokenizer) == tokenizer.decode(whole[-2:])


def test_the_best_of_the_first_n():
    texts = ["aa", "a", "aaaa", "aaa", "b", "bbb", "bb", "bbb"]
    rows = [{"prompt": text[0], "completion": text, "number": i} for i, text in enumerate(texts)]
    asked = []

    def reward(prompts, found):
        asked.extend(prompts)
        return np.array([float(len(text)) for text in found])

    best = best_rows(rows, ["of a", "of b"], [1, 2, 4], reward)
    assert asked == ["of a"] * 4 + ["of b"] * 4
    assert [(row["best_of"], row["prompt"], row["number"], row["reward"]) for row in best] == [
        (1, "a", 0, 2.0),
        (1, "b", 4, 1.0),
        (2, "a", 0, 2.0),
        (2, "b", 5, 3.0),
        (4, "a", 2, 4.0),
        (4, "b", 5, 3.0),
    ]


def test_an_article_loses_its_end_and_a_conversation_its_beginning_but_neither_its_bos(tokenizer):
    ids, none, cue = np.arange(1, 10), np.arange(0), np.array([8, 9])
    last, first = (functools.partial(within, tokenizer=tokenizer, truncation=f"keep_{which}") for which in ("end", "start"))
    assert last(ids, 4, cue=none).tolist() == [6, 7, 8, 9]
    assert first(ids, 4, cue=none).tolist() == [1, 2, 3, 4]
    assert last(ids, 4, cue=cue).tolist() == first(ids, 4, cue=cue).tolist() == [1, 2, 8, 9]
    assert last(ids, 9, cue=cue) is last(ids, 9, cue=none) is ids
    assert last(np.arange(10), 4, cue=none).tolist() == [0, 7, 8, 9]
