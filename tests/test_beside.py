"""What stands beside the columns that are read: read, refused with the option that settles it, or counted in a note."""

import pytest
from test_columns import option_in, written
from test_sources import load
from test_sources import tokenizer as tokenizer

from dpo_jax.data.pairs import DataError
from dpo_jax.data.sources import peek

SUFFIXES = pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
FRUIT = {"prompt": "A fruit:", "completions": [" a brick", " an apple", " a tomato"]}


@SUFFIXES
@pytest.mark.parametrize(
    ("beside", "option", "best"),
    [
        ({"rewards": [0.1, 0.9, 0.5]}, "scores=rewards", " an apple"),
        ({"ratings": [1, 5, 3], "seed": 3}, "scores=ratings", " an apple"),
        ({"rank": [3, 1, 2]}, "ranks=rank", " an apple"),
        ({"labels": [True, True, False]}, "scores=", " a brick"),
    ],
)
def test_what_may_rank_completions_is_not_passed_over(beside, option, best, suffix, tmp_path):
    path = written(tmp_path / f"train.{suffix}", FRUIT | beside)
    for reading in (lambda: load(path, on_bad="drop", rows="any"), lambda: peek(path, "train")):
        with pytest.raises(DataError, match="unread_column") as refusal:
            reading()
        assert option_in(str(refusal.value)) == option
        assert ("stepwise supervision" in str(refusal.value)) == ("labels" in beside)
    assert load(path, columns=option, rows="rankings")[0].chosen == best
    assert load(path, columns="scores=", rows="rankings")[0].chosen == " a brick"


def test_what_ranks_no_completions_is_only_listed(tmp_path):
    row = FRUIT | {"labels": ["a", "b", "c"], "turns": [1, 2], "models": [], "label": 1}
    read = load(written(tmp_path / "train.jsonl", row, row | {"scores": [1, 2, 3], "turns": [1, 2, 3]}), rows="rankings")
    assert [ranking.chosen for ranking in read] == [" a brick", " a tomato"]
    assert read.report.notes[-1] == "columns that are not read: 'labels', 'turns', 'models', 'label'"
