import copy
import json
import types

import numpy as np
import pytest
from conftest import GOLDEN

from dpo_jax.data.encode import Encoded, EosInText, adds_bos, cut_prompt, encode, token_ids, with_bos
from dpo_jax.data.layout import plain_rows, shared_rows
from dpo_jax.data.pairs import BadRow
from dpo_jax.data.prepare import data_digest
from dpo_jax.data.unpaired import mismatched
from dpo_jax.reference import pair_key

CASES = json.loads((GOLDEN / "tokenization.json").read_text())
LIMITS = {"max_length": 64, "max_prompt_length": 32}


def test_all_golden_cases_are_identical_to_the_original(tokenizer):
    assert len(CASES) == 300
    for case in CASES:
        encoded = encode(
            case,
            tokenizer,
            max_length=case["max_length"],
            max_prompt_length=case["max_prompt_length"],
            truncation=case["truncation_mode"],
        )
        assert encoded.prompt.tolist() == case["prompt_input_ids"]
        for side in ("chosen", "rejected"):
            completion = getattr(encoded, side).tolist()
            assert case["prompt_input_ids"] + completion == case[f"{side}_input_ids"]
            assert [-100] * len(encoded.prompt) + completion == case[f"{side}_labels"]
            assert bool(getattr(encoded, f"{side}_cut")) == (completion[-1] != tokenizer.eos_token_id)


def test_records_and_mappings_are_the_same(tokenizer):
    from dpo_jax.data.pairs import Preference

    record = Preference(prompt="Human: hi\n\nAssistant:", chosen=" Hello.", rejected=" No.", uid="a:1")
    ours = encode(record, tokenizer, **LIMITS)
    mapping = encode({"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}, tokenizer, **LIMITS)
    assert ours.uid == "a:1"
    np.testing.assert_array_equal(ours.chosen, mapping.chosen)
    assert [ours.prompt_cut, ours.chosen_cut, ours.rejected_cut] == [False] * 3


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_eos_inside_a_text_is_refused(tokenizer, side):
    texts = {"prompt": "a", "chosen": "b", "rejected": "c", side: "x<|endoftext|>y"}
    with pytest.raises(EosInText, match=side):
        encode(texts, tokenizer, **LIMITS)


def test_a_chat_template_may_end_turns_with_eos_but_never_twice(tokenizer):
    chat = {"prompt": "user: hi<|endoftext|>\nassistant: ", "chosen": "Hello.<|endoftext|>\n", "rejected": "No.", "chat": True}
    encoded = encode(chat, tokenizer, **LIMITS)
    plain = encode({"prompt": "a", "chosen": "Hello.", "rejected": "No."}, tokenizer, **LIMITS)
    assert 0 in encoded.prompt
    np.testing.assert_array_equal(encoded.chosen, plain.chosen)
    np.testing.assert_array_equal(encoded.rejected, plain.rejected)
    with pytest.raises(EosInText, match="chosen"):
        encode({**chat, "chosen": "Hello.<|endoftext|> user: more"}, tokenizer, **LIMITS)


TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_what_is_no_text_is_named(tokenizer, field):
    rest = {name: value for name, value in TEXT.items() if name != field}
    with pytest.raises(BadRow, match=f"{field}: missing_column: the row has "):
        encode(rest, tokenizer, **LIMITS)
    with pytest.raises(BadRow, match=f"{field}: missing_column: the row has "):
        encode(types.SimpleNamespace(**rest), tokenizer, **LIMITS)
    for value, message in (
        (None, "wrong_type: expected a string, got NoneType"),
        (5, "got int"),
        (float("nan"), "nan: expected a string, got NaN"),
    ):
        with pytest.raises(BadRow, match=f"{field}: .*{message}"):
            encode({**TEXT, field: value}, tokenizer, **LIMITS)


def test_encoded_pairs_are_compared_by_identity(tokenizer):
    one, other = (encode(TEXT, tokenizer, **LIMITS) for _ in range(2))
    same = one
    assert one == same
    assert one != other
    assert {one: 1, other: 2}[one] == 1


def test_what_is_no_preference_is_named(tokenizer):
    for value in ("a text", None, ("a", "b", "c")):
        with pytest.raises(TypeError, match=f"one preference with prompt, chosen and rejected, not {type(value).__name__}"):
            encode(value, tokenizer, **LIMITS)


CONVERSATION = {
    "prompt": [{"role": "user", "content": "Hi."}],
    "chosen": [{"role": "assistant", "content": "Hello."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_messages_are_rendered_by_the_chat_template(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    encoded = encode(CONVERSATION, chat, **LIMITS)
    assert tokenizer.decode(encoded.prompt) == "user: Hi.<|endoftext|>assistant: "
    assert tokenizer.decode(encoded.chosen) == "Hello.<|endoftext|>"
    assert encoded.uid == ""
    # Without a prompt of its own it is what both sides begin with.
    sides = {name: [*CONVERSATION["prompt"], *CONVERSATION[name]] for name in ("chosen", "rejected")}
    np.testing.assert_array_equal(encode({**sides, "uid": "a:1"}, chat, **LIMITS).rejected, encoded.rejected)


def test_messages_without_a_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="conversational rows need a tokenizer with a chat template"):
        encode(CONVERSATION, tokenizer, **LIMITS)


def test_messages_beside_texts_are_refused(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="prompt: .*expected a list of messages, got str"):
        encode({**CONVERSATION, "prompt": "Hi."}, chat, **LIMITS)
    with pytest.raises(ValueError, match="chosen: .*expected a list of messages, got str"):
        encode({**CONVERSATION, "chosen": "Hello."}, chat, **LIMITS)


@pytest.mark.parametrize("options", [{"max_prompt_length": 64}, {"max_prompt_length": 0}, {"truncation": "middle"}])
def test_impossible_limits_are_refused(tokenizer, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        encode({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer, **{**LIMITS, **options})


# BOS


@pytest.fixture(scope="module")
def with_post_processor():
    """A tokenizer that begins plain texts with BOS, `<|b|>`, and ends them with another EOS, as those of Llama may."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer")
    made.add_special_tokens({"bos_token": "<|b|>"})
    ids = [("<|b|>", made.bos_token_id), ("<|endoftext|>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<|b|> $A <|endoftext|>", special_tokens=ids)
    assert made("a")["input_ids"][0] == made.bos_token_id != made.eos_token_id
    return made


TEXTS = {"prompt": "Human: hi\n\nAssistant:", "chosen": " Hello.", "rejected": " No."}


def test_a_text_begins_with_bos_where_the_tokenizer_begins_it_so(tokenizer, with_post_processor):
    plain, begun = (encode(TEXTS, one, **LIMITS) for one in (tokenizer, with_post_processor))
    bos, own = with_post_processor.bos_token_id, token_ids(TEXTS["prompt"], with_post_processor).tolist()
    assert (adds_bos(tokenizer), adds_bos(with_post_processor)) == (False, True)
    assert plain.prompt.tolist() == own
    assert begun.prompt.tolist() == with_post_processor(TEXTS["prompt"])["input_ids"][:-1] == [bos, *own]
    assert (plain.bos_added, begun.bos_added) == (False, True)
    for side in ("chosen", "rejected"):  # BOS begins the prompt, and nothing else
        assert getattr(begun, side).tolist() == getattr(plain, side).tolist()


@pytest.mark.parametrize(
    ("bos", "chat", "times"),
    [("never", False, 0), ("always", False, 1), ("always", True, 1), ("auto", True, 0)],
)
def test_bos_is_an_option_and_a_template_decides_for_conversations(with_post_processor, tokenizer, bos, chat, times):
    for one in (with_post_processor, tokenizer):
        ids = encode({**TEXTS, "chat": chat}, one, **LIMITS, bos=bos).prompt
        assert ids.tolist() == [one.bos_token_id] * times + token_ids(TEXTS["prompt"], one).tolist()


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_writes_bos_itself_gets_no_second_one(with_post_processor, bos, chat):
    encoded = encode({**TEXTS, "prompt": "<|b|>hi", "chat": chat}, with_post_processor, **LIMITS, bos=bos)
    assert encoded.prompt.tolist() == token_ids("<|b|>hi", with_post_processor).tolist()
    assert encoded.prompt.tolist().count(with_post_processor.bos_token_id) == 1
    assert not encoded.bos_added


def test_only_completions_are_cut_on_request(tokenizer):
    """TRL's `keep_start`: prompt and completion together are cut at their end."""
    record = {"prompt": "one two three four five", "chosen": " six seven eight nine ten", "rejected": " six"}
    whole = encode(record, tokenizer, max_length=500, max_prompt_length=1)
    sizes = [len(ids) for ids in (whole.prompt, whole.chosen, whole.rejected)]
    found = encode(record, tokenizer, max_length=sizes[0] + 3, max_prompt_length=2, truncation="completions")
    assert found.prompt.tolist() == whole.prompt.tolist()
    assert found.chosen.tolist() == whole.chosen[:3].tolist()
    assert found.rejected.tolist() == whole.rejected[:3].tolist()
    assert (found.prompt_cut, found.chosen_cut) == (0, sizes[1] - 3)
    full = encode(record, tokenizer, max_length=sizes[0] - 1, max_prompt_length=2, truncation="completions")
    assert (len(full.prompt), len(full.chosen), full.chosen_cut) == (sizes[0], 0, sizes[1])


@pytest.mark.parametrize("limit", [1, 2, 32])
@pytest.mark.parametrize("prompt", ["abc " * 99, "<|b|>" + "abc " * 99])
@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_a_prompt_that_is_cut_keeps_its_bos(with_post_processor, limit, prompt, truncation):
    record, limits = {**TEXTS, "prompt": prompt}, {"max_length": 64, "max_prompt_length": limit}
    encoded = encode(record, with_post_processor, **limits, truncation=truncation)
    bos, *own = with_bos(token_ids(prompt, with_post_processor), with_post_processor).tolist()
    assert encoded.prompt.tolist() == [bos, *(own[len(own) + 1 - limit :] if truncation == "keep_end" else own[: limit - 1])]
    assert encoded.prompt_cut == 1 + len(own) - limit
    whole = np.array([bos, *own], np.int32)
    assert cut_prompt(whole, len(whole), with_post_processor) is whole


def test_bos_is_part_of_what_caches_and_resumed_runs_are_told_by(with_post_processor):
    one, other = (encode(TEXTS, with_post_processor, **LIMITS, bos=bos) for bos in ("auto", "never"))
    assert pair_key(one) != pair_key(other)
    assert data_digest([one]) != data_digest([other])


def test_an_impossible_bos_is_refused(tokenizer, with_post_processor):
    with pytest.raises(ValueError, match="bos='first': use 'auto'"):
        encode(TEXTS, tokenizer, **LIMITS, bos="first")
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    assert encode(TEXTS, without, **LIMITS).prompt.tolist() == token_ids(TEXTS["prompt"], without).tolist()
    with pytest.raises(ValueError, match="has no beginning-of-text token"):
        encode(TEXTS, without, **LIMITS, bos="always")


def test_a_sample_that_was_cut_has_no_end(tokenizer):
    pair = {"prompt": "The film was", "chosen": " a delight", "rejected": " a bore", "unended": ["rejected"]}
    found = encode(pair, tokenizer, max_length=64, max_prompt_length=32)
    whole = encode(pair | {"unended": []}, tokenizer, max_length=64, max_prompt_length=32)
    assert found.chosen.tolist() == whole.chosen.tolist()
    assert [*found.rejected, tokenizer.eos_token_id] == whole.rejected.tolist()
    with pytest.raises(ValueError, match="rejected contains the end-of-sequence token"):
        encode(pair | {"rejected": f" a{tokenizer.eos_token}"}, tokenizer, max_length=64, max_prompt_length=32)


@pytest.mark.parametrize("label", [True, np.True_, 1, 1.0, np.float32(1), np.int64(1)], ids=repr)
def test_labels_of_data_frames_are_labels(label, tokenizer):
    text = {"prompt": "The film was", "chosen": " fine", "rejected": " fine"}
    for value, expected in ((label, 1.0), (type(label)(0), 0.0)):
        found = encode(text | {"desirable": value}, tokenizer, **LIMITS)
        assert plain_rows([found], length=64).extras["desirable"].tolist() == [expected]
    for value in ("true", 2, np.nan, [True]):
        with pytest.raises(ValueError, match="a label is True or False"):
            encode(text | {"desirable": value}, tokenizer, **LIMITS)


def test_labeled_completions_need_mismatched_ones(tokenizer):
    texts = ({"prompt": "The film was", "chosen": f" {word}", "rejected": f" {word}"} for word in ("fine", "bad", "long"))
    labeled = [encode(text | {"desirable": True}, tokenizer, **LIMITS) for text in texts]
    with pytest.warns(match="its own mismatched one"):
        plain_rows(labeled, length=64)
    assert len(plain_rows(mismatched(labeled, max_length=64), length=64).tokens) == 6


def test_python_lists_are_ids_and_arrays_are_messages(tokenizer):
    one, other = Encoded([5, 6], [7, 0], [8, 9, 0]), Encoded(np.int32([5, 6]), np.int32([7, 0]), np.int32([8, 9, 0]))
    assert shared_rows([one], length=16).tokens.tolist() == shared_rows([other], length=16).tokens.tolist()
    with pytest.raises(BadRow, match="expected a list of completions, got one string"):
        encode({"prompt": "a", "chosen": "b", "rejected": "c", "between": " ok."}, tokenizer, **LIMITS)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    said = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    lists = {"prompt": [{"role": "user", "content": "Hi"}], **said}
    expected = encode(lists, tokenizer, **LIMITS)
    for make in (tuple, np.array):
        found = encode({name: make(messages) for name, messages in lists.items()}, tokenizer, **LIMITS)
        assert found.chosen.tolist() == expected.chosen.tolist()
