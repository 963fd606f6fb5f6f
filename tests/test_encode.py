import copy
import json

import numpy as np
import pytest
from conftest import GOLDEN

from dpo_jax.data.encode import EosInText, encode

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
            assert getattr(encoded, f"{side}_cut") == (completion[-1] != tokenizer.eos_token_id)


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
    with pytest.raises(ValueError, match="prompt: .*a list of messages is needed, this is str"):
        encode({**CONVERSATION, "prompt": "Hi."}, chat, **LIMITS)
    with pytest.raises(ValueError, match="chosen: .*a list of messages is needed, this is str"):
        encode({**CONVERSATION, "chosen": "Hello."}, chat, **LIMITS)


@pytest.mark.parametrize("options", [{"max_prompt_length": 64}, {"max_prompt_length": 0}, {"truncation": "middle"}])
def test_impossible_limits_are_refused(tokenizer, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        encode({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer, **{**LIMITS, **options})
