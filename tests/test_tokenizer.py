import json

import pytest
from conftest import GOLDEN

from dpo_jax.data.reviews import generate_reviews
from dpo_jax.data.tokenizer import check_tokenizer, load_tokenizer, tokenizer_digest, train_tokenizer

TEXTS = generate_reviews(300, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=700)


def test_training_is_deterministic_and_encoding_exact(tokenizer):
    assert tokenizer_digest(tokenizer) == tokenizer_digest(train_tokenizer(iter(TEXTS), vocab_size=700))
    assert len(tokenizer) == 700
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    for text in [*TEXTS[:5], " \n\t Ünïcode 你好 🙂 , . ", ""]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert 0 not in ids
    prompt, completion = TEXTS[0][:-20], TEXTS[0][-20:]
    assert tokenizer.decode(tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]) == TEXTS[0]


def test_vocabulary_bounds():
    assert len(train_tokenizer(["ab ab"], vocab_size=500)) == 259  # 256 bytes, EOS, and the merges "ab" and " ab"
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(TEXTS, vocab_size=256)


def test_digest_survives_saving_and_sees_every_change(tokenizer, tmp_path):
    digest = tokenizer_digest(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_digest(loaded) == digest
    loaded(TEXTS[:2], truncation=True, max_length=3)
    assert tokenizer_digest(loaded) == digest
    loaded.chat_template = "{{ messages[0].content }}"
    changed = {digest, tokenizer_digest(loaded)}
    loaded.save_pretrained(tmp_path / "chat")
    assert tokenizer_digest(load_tokenizer(tmp_path / "chat")) in changed
    loaded.pad_token = loaded.eos_token
    changed |= {tokenizer_digest(loaded), tokenizer_digest(train_tokenizer(TEXTS[1:], vocab_size=700))}
    assert len(changed) == 4


def test_a_tokenizer_is_loaded_as_it_was_saved_whatever_model_lies_beside_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for family in ("qwen2", "llama", "gemma3_text"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        loaded = load_tokenizer(tmp_path)
        assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
        assert loaded.decode(loaded("e\u0301 \u00e9")["input_ids"]) == "e\u0301 \u00e9"  # Qwen2's own class would make them one


def test_load_refuses_what_is_no_tokenizer(tmp_path):
    assert load_tokenizer(GOLDEN / "tokenizer").eos_token == "<|endoftext|>"
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def test_check_names_both_numbers(tokenizer):
    check_tokenizer(tokenizer, 704, eos_token_id=0)
    check_tokenizer(tokenizer, 700, eos_token_id=None, pad_token_id=5)
    check_tokenizer(tokenizer, 700, eos_token_id=[7, 0])
    with pytest.raises(ValueError, match="token id 699.* 699 entries"):
        check_tokenizer(tokenizer, 699, eos_token_id=0)
    with pytest.raises(ValueError, match="eos_token_id is 0 in the tokenizer, but 2 in the model"):
        check_tokenizer(tokenizer, 700, eos_token_id=2)
    padded = train_tokenizer(TEXTS[:1], vocab_size=300)
    padded.pad_token = padded.eos_token
    with pytest.raises(ValueError, match="pad_token_id is 0 in the tokenizer, but 1 in the model"):
        check_tokenizer(padded, 300, eos_token_id=0, pad_token_id=1)
    padded.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        check_tokenizer(padded, 300, eos_token_id=0)
