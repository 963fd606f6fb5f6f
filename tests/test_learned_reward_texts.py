"""A learned reward reads a sampled completion with the tokens that it would have had in the training pairs."""

import numpy as np
import pytest
from chat_templates import CHATML, LLAMA, chat_tokenizer

from dpo_jax.data.chat import chat_preference
from dpo_jax.data.encode import encode
from dpo_jax.evals.reward_functions import learned

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
    encoded = encode(pair, tokenizer, max_length=200, max_prompt_length=100)
    wanted = tokenizer.decode(np.concatenate([encoded.prompt, encoded.chosen]))
    found = read_by_the_model(pair.prompt, "By train.", tokenizer)
    assert found == wanted


def test_completions_of_texts_end_in_eos():
    tokenizer = chat_tokenizer(CHATML)
    encoded = encode(
        {"prompt": "The sky is", "chosen": " blue", "rejected": " x"}, tokenizer, max_length=99, max_prompt_length=50
    )
    wanted = tokenizer.decode(np.concatenate([encoded.prompt, encoded.chosen]))
    assert read_by_the_model("The sky is", " blue", tokenizer) == wanted
