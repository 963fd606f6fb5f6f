"""A learned reward reads a sampled completion with the tokens that it would have had in the training pairs."""

import numpy as np
import pytest
from chat_templates import CHATML, LLAMA, chat_tokenizer

from dpo_jax.data.chat import chat_preference
from dpo_jax.data.encode import encode
from dpo_jax.evals.reward_functions import learned, with_ends

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
ASKS = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LAST = "{{ '<|im_end|>' if loop.last and not add_generation_prompt }}"
TEMPLATES = {
    "chatml": CHATML,
    "llama, which writes BOS": LLAMA,
    "gemma, whose turns do not end in EOS": TURN + "<|begin|>\n" + ASKS,
    "phi 3, with EOS after the last turn": TURN
    + "<|begin|>\n{{ '<|im_end|>' if loop.last and not add_generation_prompt }}"
    + ASKS,
    "no end": TURN + "\n" + ASKS,
}


def read_by_the_model(prompt, completion, tokenizer):
    seen = []

    def score(rows):
        scored = np.asarray(rows.slot)[0] < rows.slots
        asked = np.asarray(rows.tokens)[0][: np.asarray(rows.source)[0][0] + 1]
        seen.append(np.concatenate([asked, np.asarray(rows.target)[0][scored]]))
        return np.zeros(len(rows.tokens))

    learned(score, tokenizer, length=256, batch=1)([prompt], [completion])
    return tokenizer.decode(seen[0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_completions_of_conversations_end_as_in_the_pairs(name):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    asked = [{"role": "user", "content": "Where to?"}]
    sides = ([{"role": "assistant", "content": text}] for text in ("By train.", "By bus."))
    pair = chat_preference(asked, *sides, uid="1", tokenizer=tokenizer)
    [encoded] = with_ends([encode(pair, tokenizer, max_length=200, max_prompt_length=100)], tokenizer)
    wanted = tokenizer.decode(np.concatenate([encoded.prompt, encoded.chosen]))
    found = read_by_the_model(pair.prompt, "By train.", tokenizer)
    assert found == wanted
    if name not in ("llama, which writes BOS", "no end"):  # whose tokens the toy tokenizer splits; and EOS ends it
        turns = [*asked, {"role": "assistant", "content": "By train."}]
        assert found == tokenizer.apply_chat_template(turns, tokenize=False)  # where transformers reads the score


def test_completions_of_texts_end_in_eos():
    tokenizer = chat_tokenizer(CHATML)
    encoded = encode(
        {"prompt": "The sky is", "chosen": " blue", "rejected": " x"}, tokenizer, max_length=99, max_prompt_length=50
    )
    wanted = tokenizer.decode(np.concatenate([encoded.prompt, encoded.chosen]))
    assert read_by_the_model("The sky is", " blue", tokenizer) == wanted


def test_padding_tokens_at_the_end_are_not_scored():
    """Models whose padding token is EOS, as of many Llamas, score the token before it: so transformers trained them."""
    tokenizer, seen = chat_tokenizer(CHATML), []

    def score(rows):
        seen.append(np.asarray(rows.target)[0][np.asarray(rows.slot)[0] < rows.slots])
        return np.zeros(len(rows.tokens))

    for pad in (None, tokenizer.eos_token_id):
        learned(score, tokenizer, length=64, batch=1, pad_token_id=pad)(["The sky is"], [" blue"])
    assert seen[0].tolist() == [*seen[1].tolist(), tokenizer.eos_token_id]
