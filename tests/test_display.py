"""Prompts for people: what the chat template wrote is taken off again, and no text reaches the terminal's controls."""

import json

import pytest
from conftest import GOLDEN
from tokenizers import AddedToken

from dpo_jax.data.display import as_text, chat_turns, shown_prompt
from dpo_jax.data.terminal import json_text, printable
from dpo_jax.data.tokenizer import load_tokenizer

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ '<|begin|>' }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}",
    "own system text": "{% if messages[0].role != 'system' %}<|header|>system<|/header|>\n\nBe kind.<|eot|>{% endif %}"
    "{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}",
    "system inside user": "{% for m in messages %}{% if m.role == 'system' %}[SYS]{{ m.content }}[/SYS]"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|eot|>{% endif %}{% endfor %}",
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ {'assistant': 'model'}.get(m.role, m.role) }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
}
SYSTEM = {"role": "system", "content": "You are terse.\nYes."}
ASKED = [{"role": "user", "content": "What is\n2 + 2?"}]
TALK = [*ASKED, {"role": "assistant", "content": "4."}, {"role": "user", "content": "And 3 + 3?"}]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>")


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("messages", [ASKED, TALK, [SYSTEM, *ASKED], [SYSTEM, *TALK]], ids=["1", "3", "system 1", "system 3"])
def test_rendering_is_undone(tokenizer, messages):
    if "no system role" in tokenizer.chat_template and messages[0] is SYSTEM:
        pytest.skip("this template has no system role")
    found = chat_turns(rendered(tokenizer, messages), tokenizer)
    own = "Be kind." in tokenizer.chat_template and messages[0] is not SYSTEM
    assert found == [{"role": "system", "content": "Be kind."}] * own + messages


def test_a_prompt_that_lost_its_beginning_keeps_its_last_turns(tokenizer):
    whole = rendered(tokenizer, TALK)
    start = whole.index("2 + 2")
    assert chat_turns(whole[start:], tokenizer) == [{"role": "user", "content": "...2 + 2?"}, *TALK[1:]]
    inside = whole.index("4.")
    assert chat_turns(whole[inside:], tokenizer) == [{"role": "assistant", "content": "...4."}, TALK[2]]
    assert chat_turns(whole[whole.index("3 + 3") :], tokenizer) == [{"role": "user", "content": "...3 + 3?"}]


def test_what_the_template_did_not_write_is_left_alone(tokenizer):
    assert chat_turns("A film about", tokenizer) is None
    whole = rendered(tokenizer, ASKED)
    assert chat_turns(whole + "Well", tokenizer) is None
    assert chat_turns(whole.replace("2 + 2", "<|eot|>"), tokenizer) is None  # another kind of turn
    tokenizer.chat_template = "{{ messages | length }}"
    assert chat_turns("1", tokenizer) is None
    tokenizer.chat_template = None
    assert chat_turns(whole, tokenizer) is None


def test_people_see_turns_and_no_controls():
    assert as_text(TALK) == "user: What is\n2 + 2?\nassistant: 4.\nuser: And 3 + 3?"
    assert shown_prompt({"prompt": "<|header|>", "turns": TALK[1:2]}) == "assistant: 4."
    hostile = "a\x1b[2Jb\x9b2Jc\x7f\r\n\td\0é"
    assert printable(hostile) == "a\\x1b[2Jb\\x9b2Jc\\x7f\\r\n\td\\x00é"
    assert shown_prompt({"prompt": hostile}) == printable(hostile)
    line = json_text({"prompt": hostile})
    assert json.loads(line) == {"prompt": hostile}
    assert line.isprintable()
