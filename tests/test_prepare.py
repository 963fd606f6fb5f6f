"""Every pair that falls out between text and tokens is counted under its cause, or refused by its name."""

import copy
import dataclasses
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_jax.cli.config import DataConfig
from dpo_jax.data.encode import encode
from dpo_jax.data.layout import plain_rows, shared_rows
from dpo_jax.data.pairs import Cause, DataError, DataReport, Preference, PreferenceSet
from dpo_jax.data.prepare import _CachingTokenizer, data_digest, encode_all, encode_targets

LIMITS = {"max_length": 32, "max_prompt_length": 16}
GOOD = {"prompt": "Human: hi\n\nAssistant:", "chosen": " Hello.", "rejected": " No."}
LONG = " abcdefgh" * 20  # 180 characters, many more than 32 tokens


def preference_set(*records, **common):
    preferences = [Preference(**{**GOOD, **common, **record}, uid=f"t.jsonl:{i}") for i, record in enumerate(records, 1)]
    report = DataReport(source="t.jsonl", split="train", format="trl", rows=len(records), read=len(records), kept=len(records))
    return PreferenceSet(preferences, report)


class LowerCase:
    """A tokenizer for which texts that differ in case are the same."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id, self.eos_token = tokenizer, tokenizer.eos_token_id, tokenizer.eos_token

    def __call__(self, text, **options):
        return self.tokenizer(text.lower(), **options)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


CAUSES = {
    Cause.IDENTICAL: ({"chosen": " SAME", "rejected": " same"}, {}, "chosen and rejected are the same tokens"),
    Cause.IDENTICAL_AFTER_TRUNCATION: (
        {"chosen": LONG + " one", "rejected": LONG + " two"},
        {},
        "both completions begin with the same 16 tokens",
    ),
    Cause.EOS_IN_TEXT: ({"rejected": " No.<|endoftext|> Yes."}, {}, "rejected contains the end-of-sequence token"),
    Cause.COMPLETION_CUT: ({"chosen": "\n \t" * 60 + "Hello"}, {}, "truncation to 16 tokens leaves only blanks"),
    Cause.NO_ROOM: ({"chosen": " abcdefgh" * 3}, {"row_length": 24}, "rows hold 24 \\(--data.row-length\\)"),
    Cause.NO_PROMPT: ({"prompt": ""}, {}, "the prompt has no tokens"),
    Cause.EMPTY: ({"sft_target": " \n"}, {}, "the completion to train on is empty"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_counted_and_its_place_is_kept(tokenizer, cause):
    record, options, detail = CAUSES[cause]
    encoded = encode_all(preference_set({}, record, {}), LowerCase(tokenizer), **LIMITS, on_bad="drop", **options)
    assert encoded.report.dropped == {cause.value: 1}
    assert [pair.uid for pair in encoded] == ["t.jsonl:1", "t.jsonl:3"]
    (example,) = encoded.report.examples[cause.value]
    assert example.startswith("t.jsonl:2: ")
    assert re.search(detail, example)
    assert encoded.report.kept + sum(encoded.report.dropped.values()) == encoded.report.read == 3


@pytest.mark.parametrize("desirable", [None, True])
def test_a_prompt_that_leaves_no_room_is_said_to_be_too_long(tokenizer, desirable):
    """Where prompts are kept whole, completions of no tokens are not identical."""
    record = {"prompt": LONG, "desirable": desirable} | ({} if desirable is None else {"rejected": GOOD["chosen"]})
    encoded = encode_all(preference_set({}, record), tokenizer, **LIMITS, truncation="completions", on_bad="drop")
    assert encoded.report.dropped == {Cause.NO_ROOM.value: 1}
    (example,) = encoded.report.examples[Cause.NO_ROOM.value]
    assert re.search(r"prompt: no_room: the prompt has \d+ tokens, --data.max-length is 32", example)


@pytest.mark.parametrize("cause", CAUSES)
def test_by_default_each_cause_is_refused_by_name_with_a_remedy(tokenizer, cause):
    record, options, detail = CAUSES[cause]
    preferences = preference_set({}, record)
    if cause is Cause.IDENTICAL_AFTER_TRUNCATION:  # no fault of the data: always dropped, always counted
        assert encode_all(preferences, LowerCase(tokenizer), **LIMITS).report.dropped == {cause.value: 1}
        return
    with pytest.raises(DataError, match=rf"t\.jsonl:2: .*{cause}.*{detail}") as caught:
        encode_all(preferences, LowerCase(tokenizer), **LIMITS, **options)
    assert caught.value.causes == (cause,)
    remedy = "Raise this limit" if cause is Cause.NO_ROOM else "Fix these rows"
    assert f"{remedy}, or drop and count such rows with --data.on-bad drop." in str(caught.value)
    assert "t.jsonl:1" not in str(caught.value)


def test_ten_bad_rows_are_listed_and_the_rest_counted(tokenizer):
    with pytest.raises(DataError) as caught:
        encode_all(preference_set(*[{"prompt": ""}] * 12, {"chosen": "<|endoftext|>"}), tokenizer, **LIMITS)
    assert "13 of 13 rows cannot be used (eos_in_text 1, no_prompt 12)" in str(caught.value)
    assert str(caught.value).count("t.jsonl:") == 10
    assert "... and 3 more" in str(caught.value)


def test_drops_come_on_top_of_those_of_the_source(tokenizer):
    preferences = preference_set({}, {"prompt": ""})
    preferences.report.read, preferences.report.dropped = 5, {"tie": 3}
    encoded = encode_all(preferences, tokenizer, **LIMITS, on_bad="drop")
    assert encoded.report.dropped == {"tie": 3, "no_prompt": 1}
    assert (encoded.report.kept, encoded.report.read) == (1, 5)
    assert encoded.report.bad_share == 1 / 5
    assert preferences.report.dropped == {"tie": 3}  # the source's own report is left alone


def test_truncations_are_counted_by_what_was_cut(tokenizer):
    records = [{}, {"prompt": LONG}, {"chosen": LONG}, {"prompt": LONG, "chosen": LONG, "rejected": " no" + LONG}]
    encoded = encode_all(preference_set(*records), tokenizer, **LIMITS)
    alone = [encode({**GOOD, **record}, tokenizer, **LIMITS) for record in records]
    prompts = sum(pair.prompt_cut > 0 for pair in alone)
    assert encoded.report.truncated == {"prompt": prompts, "chosen": 2, "rejected": 1}
    assert prompts in (2, 3)  # the short prompt may be longer than its limit, too
    assert "truncated, chosen" in encoded.report.summary()
    for pair, expected in zip(encoded, alone, strict=True):
        for what in ("prompt", "chosen", "rejected"):
            np.testing.assert_array_equal(getattr(pair, what), getattr(expected, what))
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= LIMITS["max_length"]


def test_rows_that_are_too_long_are_left_out_on_request_and_the_others_are_whole(tokenizer):
    """As a filter before TRL would: the default `on_bad` refuses nothing, and kept + dropped = read."""
    records = ({}, {"chosen": LONG}, {"rejected": LONG}, {"prompt": LONG}, {}, {"sft_target": LONG}, {"sft_target": " Yes."})
    encoded = encode_all(preference_set(*records), tokenizer, **LIMITS, truncation="drop")
    assert [pair.uid for pair in encoded] == ["t.jsonl:1", "t.jsonl:5", "t.jsonl:7"]
    assert (encoded.report.dropped, encoded.report.truncated, encoded.report.bad) == ({"beyond_max_length": 4}, {}, 0)
    long = encode({**GOOD, "prompt": LONG}, tokenizer, max_length=999, max_prompt_length=500)
    beyond = len(long.prompt) + max(len(long.chosen), len(long.rejected)) - LIMITS["max_length"]
    assert f"t.jsonl:4: beyond_max_length: {beyond} tokens beyond --data.max-length" in str(encoded.report.examples)
    whole = encode({**GOOD, "uid": "t.jsonl:1"}, tokenizer, max_length=999, max_prompt_length=500)
    assert encoded[0].prompt.tolist() == whole.prompt.tolist()
    assert encoded[0].chosen.tolist() == whole.chosen.tolist()
    used = len(whole.prompt) + max(len(whole.chosen), len(whole.rejected))
    for limit, kept in ((used, 1), (used - 1, 0)):
        limits = {"max_length": limit, "max_prompt_length": 1}
        assert len(encode_all(preference_set({}), tokenizer, **limits, truncation="drop")) == kept


@pytest.mark.parametrize(("source", "refused"), [("snippets", True), ("imdb", True), ("files", False)])
def test_plain_texts_are_cut_and_so_cannot_be_left_out(source, refused):
    problems = dict(DataConfig(path="d", source=source, truncation="drop").check())
    assert ("truncation" in problems) == refused


def test_row_length_is_what_the_shared_layout_needs(tokenizer):
    (pair,) = encode_all(preference_set({}), tokenizer, **LIMITS)
    needed = len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
    assert len(encode_all(preference_set({}), tokenizer, **LIMITS, row_length=needed)) == 1
    assert shared_rows([pair], length=needed).tokens.shape == (1, needed)
    with pytest.raises(DataError, match="no_room"):
        encode_all(preference_set({}), tokenizer, **LIMITS, row_length=needed - 1)


def test_sft_learns_the_target_or_else_the_chosen_side(tokenizer):
    preferences = preference_set(
        {"sft_target": " Best."}, {}, {"prompt": "Other:"}, {"sft_target": " Best."}, {"rejected": " x"}
    )
    texts, uids = encode_targets(preferences, tokenizer, **LIMITS)
    assert uids == ["t.jsonl:1", "t.jsonl:2", "t.jsonl:3"]  # 4 and 5 say the same as 1 and 2
    written = [(tokenizer.decode(prompt), tokenizer.decode(completion)) for prompt, completion in texts]
    eos = tokenizer.eos_token
    assert written == [(GOOD["prompt"], f" Best.{eos}"), (GOOD["prompt"], f" Hello.{eos}"), ("Other:", f" Hello.{eos}")]


def test_an_sft_text_is_cut_against_its_own_length(tokenizer):
    ((prompt, completion),), _ = encode_targets(preference_set({"rejected": LONG}), tokenizer, **LIMITS)
    alone = encode({**GOOD, "rejected": "x"}, tokenizer, **LIMITS)
    np.testing.assert_array_equal(prompt, alone.prompt)
    np.testing.assert_array_equal(completion, alone.chosen)
    ((prompt, completion),), _ = encode_targets(preference_set({"chosen": LONG, "prompt": LONG}), tokenizer, **LIMITS)
    assert (len(prompt), len(completion)) == (16, 16)


def test_scoring_the_prompt_makes_one_text_of_both(tokenizer):
    ((nothing, text),), _ = encode_targets(preference_set({}), tokenizer, **LIMITS, score_prompt=True)
    ((prompt, completion),), _ = encode_targets(preference_set({}), tokenizer, **LIMITS)
    assert len(nothing) == 0
    np.testing.assert_array_equal(text, np.concatenate([prompt, completion]))


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_the_data_digest_changes_with_any_token_and_with_the_order(tokenizer, side):
    pairs = list(encode_all(preference_set({}, {"chosen": " Good."}), tokenizer, **LIMITS))
    changed = [pairs[0], dataclasses.replace(pairs[1], **{side: getattr(pairs[1], side) + 1})]
    digests = {data_digest(p) for p in (pairs, changed, pairs[::-1], pairs[:1])}
    assert len(digests) == 4
    assert data_digest(pairs) == data_digest(tuple(pairs))


def test_kept_pairs_always_make_rows(tokenizer):
    """Texts of every awkward length, as a fuzz: what `encode_all` keeps, both layouts can lay out and something is scored."""
    rng = np.random.default_rng(0)
    alphabet = list("ab \n\té☃")
    records = [
        {name: "".join(rng.choice(alphabet, rng.integers(0, 60))) for name in ("prompt", "chosen", "rejected")}
        for _ in range(200)
    ]
    encoded = encode_all(preference_set(*records), tokenizer, **LIMITS, on_bad="drop")
    assert 100 < len(encoded) < 200
    assert encoded.report.kept + sum(encoded.report.dropped.values()) == 200
    for kind in (plain_rows, shared_rows):
        rows = kind(list(encoded), length=64)
        counts = [(rows.slot[r] == s).sum() for r in range(len(rows.slot)) for s in range(rows.slots)]
        assert min(counts) >= 1


def test_no_text_of_a_preference_is_tokenized_twice(tokenizer):
    asked = []

    class Counting(LowerCase):
        def __call__(self, text, **options):
            asked.append(text)
            return super().__call__(text, **options)

    preferences = preference_set({"sft_target": " Best."})
    encode_all(preferences, Counting(tokenizer), **LIMITS)
    assert sorted(asked) == sorted([GOOD["prompt"], GOOD["chosen"], GOOD["rejected"], " Best."])
    asked.clear()
    encode_targets(preferences, Counting(tokenizer), **LIMITS)
    assert sorted(asked) == sorted([GOOD["prompt"], " Best."])


def test_a_pair_takes_three_calls_of_a_fast_tokenizer(tokenizer, monkeypatch):
    """Its target only has to be free of EOS: that is seen without a call. Whether the tokenizer adds BOS is asked once."""
    asked = []

    class Counting(type(tokenizer)):
        def __call__(self, text, **options):
            asked.append(text)
            return super().__call__(text, **options)

    plain = copy.deepcopy(tokenizer)
    plain.__class__ = Counting
    preferences = preference_set(*({"prompt": f"{n}:", "sft_target": f" Best {n}."} for n in range(10)))
    encode_all(preferences, plain, **LIMITS)
    once = [text for text in asked if text == "hello"]
    assert len(once) <= 1
    assert len(asked) - len(once) == 10 + 2  # the prompts; chosen and rejected are the same in all of them
    asked.clear()
    distinct = preference_set(*({name: f" {n} {name}" for name in (*GOOD, "sft_target")} for n in range(10)))
    encode_all(distinct, plain, **LIMITS)
    assert len([text for text in asked if text != "hello"]) == 3 * 10


def _fast(model, *, normalizer=None, eos, normalized=False, unk=None):
    made = Tokenizer(model)
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(eos, normalized=normalized, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, unk_token=unk)


LETTERS = {letter: n for n, letter in enumerate([*"abcdefghijklmnopqrstuvwxyz</>.", "</s>"])}
LOWERED = {"normalizer": normalizers.Lowercase(), "normalized": True}
COMPOSED = {"normalizer": normalizers.NFKC(), "normalized": True}
EOS_CASES = {
    "literal": (_fast(models.BPE(LETTERS, []), eos="</s>"), "ab</s>c", "ab c"),
    "in another case": (_fast(models.BPE(LETTERS, []), eos="</S>", **LOWERED), "a</S>", "s"),
    "in other letters": (_fast(models.BPE(LETTERS, []), eos="</s>", **COMPOSED), "a\uff1c/s>", "a"),
    "for what is unknown": (_fast(models.BPE(LETTERS, [], unk_token="</s>"), eos="</s>", unk="</s>"), "a \u00e9", None),
    "a word": (_fast(models.WordLevel({"a": 0, "end": 1}, unk_token="end"), eos="end", unk="end"), "a \u00e9", None),
}


@pytest.mark.parametrize("case", EOS_CASES)
def test_no_eos_in_a_target_is_overlooked(case):
    tokenizer, holding, free = EOS_CASES[case]
    assert tokenizer.eos_token_id in tokenizer(holding, add_special_tokens=False)["input_ids"]
    assert _CachingTokenizer(tokenizer).may_hold_eos(holding)
    assert free is None or not _CachingTokenizer(tokenizer).may_hold_eos(free)


def test_the_ids_are_those_of_the_tokenizer_whatever_it_was_last_asked(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain("left behind", truncation=True, max_length=2)
    texts = {"prompt": "Human: caf\u00e9\n\nAssistant:", "chosen": " It's  12 \U0001f642 e\u0301.", "rejected": " no\t <|end"}
    (pair,) = encode_all(preference_set(texts), plain, **LIMITS | {"max_length": 400, "max_prompt_length": 200})
    for name, text in texts.items():
        expected = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (name != "prompt")
        assert getattr(pair, name).tolist() == expected
