import json
import os
import shutil

import pytest
from conftest import GOLDEN
from mutate import time_limit
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.reviews import generate_reviews
from dpo_jax.data.special_tokens import special_tokens
from dpo_jax.data.tokenizer import (
    LONGEST_WORD,
    check_tokenizer,
    decode_completion,
    load_tokenizer,
    save_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from dpo_jax.untrusted import Unreadable

TEXTS = generate_reviews(300, 0)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


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


def test_a_word_without_end_is_trained_in_parts(monkeypatch):
    with time_limit():
        for word in ("a" * 200_000, "漢" * 50_000 + "字" * 50_000, " " * 200_000):
            assert len(train_tokenizer([f"ab {word} é"], vocab_size=300)) > 257
    text = "x é " + "é" * 2500 + " y 🙂" + " " * 1500 + "123"
    parts = tokenizers._with_short_words(text, BYTE_LEVEL)
    assert "".join(parts) == text
    assert max(end - start for part in parts for _, (start, end) in BYTE_LEVEL.pre_tokenize_str(part)) == LONGEST_WORD
    assert len(parts) == 4
    # Ordinary texts, and those whose words are as long as may be, are trained on as they are.
    ordinary = [*TEXTS, "b" * LONGEST_WORD, " " + "c" * (LONGEST_WORD - 1)]
    digest = tokenizer_digest(train_tokenizer(ordinary, vocab_size=600))
    monkeypatch.setattr(tokenizers, "_with_short_words", lambda text, words: [text])
    assert digest == tokenizer_digest(train_tokenizer(ordinary, vocab_size=600))


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
    check_tokenizer(tokenizer, 700, eos_token_id=None)
    check_tokenizer(tokenizer, 700, eos_token_id=[7, 0])
    with pytest.raises(ValueError, match="token id 699.* 699 entries"):
        check_tokenizer(tokenizer, 699, eos_token_id=0)
    with pytest.raises(ValueError, match="eos_token_id is 0 in the tokenizer, but 2 in the model.*add 0 to eos_token_id in"):
        check_tokenizer(tokenizer, 700, eos_token_id=2)
    endless = train_tokenizer(TEXTS[:1], vocab_size=300)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        check_tokenizer(endless, 300, eos_token_id=0)


def test_saved_files_are_read_by_transformers_4_and_5(tokenizer, tmp_path):
    """Version 5 calls the class TokenizersBackend, which 4 does not know, and lists extra tokens where 4 reads an object."""
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] in ("PreTrainedTokenizerFast", "GPT2Tokenizer")
    assert not isinstance(content.get("extra_special_tokens"), list)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(loaded.all_special_tokens)
    assert loaded.chat_template == tokenizer.chat_template
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "chat_template.jinja").write_text("of another model")
    save_tokenizer(train_tokenizer(TEXTS[:1], vocab_size=300), tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").chat_template is None
    content = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_special_tokens_have_a_role_or_none():
    tokenizer = train_tokenizer(TEXTS[:1], vocab_size=300)
    assert special_tokens(tokenizer) == ("<|endoftext|>",)
    tokenizer.add_tokens([AddedToken("<|header|>", special=True), AddedToken("<think>", special=False)])
    assert special_tokens(tokenizer) == ("<|endoftext|>", "<|header|>")


def sentencepiece():
    """Like Llama's and Mistral's: a word begins with the space before it, and decoding takes off a text's first space."""
    words = ["<unk>", "</s>", "<turn>", "▁Say", "▁yes", "▁.", "▁Yes", ","]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<turn>", special=True)])
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ([3, 4], [6, 7, 4], " Yes, yes"),
        ([3, 4], [6, 1], " Yes"),
        ([3, 4], [6, 2], " Yes"),
        ([3, 4], [1], ""),
        ([3, 4], [4, 5], " yes ."),  # nothing is tidied up: these are the tokens
        ([2], [6], "Yes"),  # the first word of the text
    ],
)
def test_a_completion_is_what_it_adds_to_its_prompt(prompt, completion, text):
    tokenizer = sentencepiece()
    tokenizer.clean_up_tokenization_spaces = True
    assert decode_completion(tokenizer, prompt, completion, stop_ids=(1, 2)) == text
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert tokenizer.decode(prompt, **options) + text == tokenizer.decode(prompt + completion, **options)


def test_a_stop_token_is_no_text_even_if_it_is_no_special_one():
    assert decode_completion(sentencepiece(), [3], [6, 4], stop_ids=(4,)) == " Yes"


def test_a_completion_may_begin_inside_a_character(tokenizer):
    halves = [tokenizer.convert_tokens_to_ids(token) for token in ("Ã", "©")]
    assert tokenizer.decode(halves) == "é"
    assert decode_completion(tokenizer, halves[:1], halves[1:] + tokenizer("a")["input_ids"]) == "\ufffda"


def llama_like():
    """Llama 2's pipeline: spaces become "▁" before words are split, also several, and one is put before a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "▁▁"]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "▁")]
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    inner = Tokenizer(bpe)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def byte_level():
    return train_tokenizer(TEXTS, vocab_size=300).backend_tokenizer


@pytest.mark.parametrize(
    ("inner", "settings", "model_type", "eos"),
    [
        (llama_like, {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": True}, "llama", "</s>"),
        (llama_like, {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, "llama", "</s>"),
        # DeepSeek's distilled Qwen; Qwen's own class would compose accents and split numbers into digits.
        (byte_level, {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|endoftext|>", "unk_token": None}, "qwen2", None),
        # The official GPT-2, whose EOS only the class of transformers knows.
        (byte_level, {"model_max_length": 1024}, "gpt2", None),
        (byte_level, {"tokenizer_class": "GPTNeoXTokenizer"}, "gpt_neox", None),
    ],
)
def test_a_text_has_the_tokens_that_the_file_says_whatever_class_is_named(inner, settings, model_type, eos, tmp_path):
    folder, written = tmp_path / "hub", inner()
    folder.mkdir()
    written.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(folder)
    for text in (" a", "  a b\n b", "e\u0301 1234", "", "b"):
        ids = tokenizer(text)["input_ids"]
        assert ids == written.encode(text).ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == written.decode(ids)
    assert tokenizer.eos_token == (eos or "<|endoftext|>")
    save_tokenizer(tokenizer, tmp_path / "again")
    assert tokenizer_digest(load_tokenizer(tmp_path / "again")) == tokenizer_digest(tokenizer)


def test_a_folder_whose_name_is_not_utf8_is_told(tokenizer, tmp_path):
    """The library opens no such file, and says nothing of the name."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    save_tokenizer(tokenizer, tmp_path / "good")
    shutil.copytree(tmp_path / "good", folder)
    for work in (lambda: load_tokenizer(folder), lambda: save_tokenizer(tokenizer, folder)):
        with pytest.raises(Unreadable, match=r"caf\\xe9: the name is not UTF-8, .*; rename the folder"):
            work()


@pytest.mark.parametrize(("number", "told"), [(2**31, "the id 2,147,483,648, and"), (1, "two tokens have the same id")])
def test_ids_that_no_vocabulary_has_are_told(number, told, tokenizer, tmp_path):
    """The library counts up to the largest id, and writes one of two tokens with the same."""
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for work in (lambda: load_tokenizer(tmp_path), lambda: tokenizers.vocabulary_of(tmp_path)):
        with time_limit(), pytest.raises(Unreadable, match=told):
            work()


def test_an_added_token_does_not_take_the_id_of_another(tokenizer, tmp_path):
    """The library gives it the number of tokens, which is one of theirs where a number was left out."""
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["model"]["vocab"]["!"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    load_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(Unreadable, match="two tokens have the same id"):
        load_tokenizer(tmp_path)
