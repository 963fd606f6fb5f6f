"""Columns and keys beside the messages: tools and template variables in every format, weights, metadata, roles of ShareGPT."""

import copy
import json

import pytest
from chat_templates import CHATML, LLAMA, chat_tokenizer
from test_chat import ASKED, TOOLS, call, said, user

from dpo_jax.data.encode import encode
from dpo_jax.data.hash_split import is_held_out
from dpo_jax.data.pairs import BadRow, DataError
from dpo_jax.data.prepare import encode_targets
from dpo_jax.data.sources import load_preferences
from dpo_jax.untrusted import LIMITS as UNTRUSTED

LIMITS = {"max_length": 1000, "max_prompt_length": 600}
ANSWER = [said("Rain.")]
ROWS = {
    "unpaired": {"prompt": ASKED, "completion": ANSWER, "label": True},
    "rankings": {"prompt": ASKED, "completions": [ANSWER, [said("Sun.")]]},
    "demonstrations": {"prompt": ASKED, "completion": ANSWER},
    "prompts": {"prompt": ASKED},
}


def load(folder, lines, tokenizer, **options):
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_preferences(folder, "train", tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def chatml():
    return chat_tokenizer(CHATML)


@pytest.mark.parametrize("kind", ROWS)
def test_tools_and_template_variables_are_read_in_every_format_with_messages(kind, tmp_path):
    tokenizer = chat_tokenizer(
        "{{ mode }}{% for tool in tools or [] %}{{ tool.function.description }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    options = {"tools": TOOLS, "chat_template_kwargs": {"mode": "fast"}}
    plain, told = (load(tmp_path, [row], tokenizer, rows=kind) for row in (ROWS[kind], ROWS[kind] | options))
    assert told[0].prompt == f"fastWeather of a city{plain[0].prompt}"
    assert not [note for note in told.report.notes if "tools" in note]


@pytest.mark.parametrize("kind", ["unpaired", "demonstrations", "prompts"])
def test_with_texts_a_note_says_that_tools_are_not_read(kind, tmp_path):
    row = {name: "Rain" if isinstance(value, list) else value for name, value in ROWS[kind].items()}
    found = load(tmp_path, [row | {"tools": TOOLS}], None, rows=kind)
    assert [note for note in found.report.notes if "tools: not read with texts, only with messages" in note]


def test_a_turn_of_weight_0_is_context(chatml, tmp_path):
    turns = [user("Hi"), said("Go away."), user("Please"), said("Hello.")]
    marked = copy.deepcopy(turns)
    marked[1]["weight"], marked[3]["weight"] = 0, 1
    scored = {}
    for name, messages in {"marked": marked, "plain": turns}.items():
        found = load(tmp_path, [{"messages": messages}], chatml, rows="demonstrations")
        texts, _ = encode_targets(found, chatml, **LIMITS)
        [one] = texts
        scored[name] = [found[0].chosen[begin:end] for begin, end in found[0].chosen_spans]
        assert chatml.decode([*one[0], *one[1]]).count("Go away.") == 1
    assert scored["plain"] == ["Go away.<|im_end|>", "Hello."]
    assert scored["marked"] == ["Hello."]
    for weight, words in ((0, "every turn of the assistant has weight 0"), (0.5, "expected 0 or 1, got 0.5")):
        with pytest.raises(DataError, match=words):
            load(tmp_path, [{"messages": [user("Hi"), said("No.", weight=weight)]}], chatml, rows="demonstrations")


def test_facts_about_messages_do_not_part_equal_prompts(chatml, tmp_path):
    """WildChat and others give each message an id and a time of its own."""
    rows = []
    for number in range(40):
        prompt = [{**user("Name a fruit."), "id": number, "timestamp": f"2024-01-01T00:00:{number:02}"}]
        rows.append({"prompt": prompt, "chosen": [said(f"Apple {number}.")], "rejected": [said("A brick.")]})
    found = load(tmp_path, rows, chatml)
    assert len({pair.prompt_digest for pair in found}) == 1
    assert len({is_held_out(pair, 0.5) for pair in found}) == 1
    # Where the prompt is implicit, it is the messages that say the same.
    one, other = ([{**user("Name a fruit."), "id": side}, said(side)] for side in ("An apple.", "A brick."))
    [pair] = load(tmp_path, [{"chosen": one, "rejected": other}], chatml)
    assert "Name a fruit." in pair.prompt
    with pytest.raises(DataError, match="identical: chosen and rejected are the same messages"):
        load(tmp_path, [{"chosen": [*one[:1], said("x", id=1)], "rejected": [*one[:1], said("x", id=2)]}], chatml)


def test_the_form_of_a_tool_call_does_not_part_equal_prompts(tmp_path):
    prompt = [*ASKED, said(None, tool_calls=[call("Rome")]), {"role": "tool", "content": "12 C"}]
    row = {"prompt": prompt, "chosen": [said("Cold.")], "rejected": [said("Hot.")]}
    as_text = copy.deepcopy(row)
    function = as_text["prompt"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    digests = {
        load(tmp_path, [one], chat_tokenizer(template))[0].prompt_digest
        for one in (row, as_text)
        for template in (CHATML, LLAMA)
    }
    assert len(digests) == 1


def test_roles_of_sharegpt(chatml, tmp_path):
    def row(role):
        turns = [{"from": "human", "value": "Hi"}]
        return {"prompt": turns, **{side: [{"from": role, "value": side}] for side in ("chosen", "rejected")}}

    for role in ("gpt", "bard", "model", "assistant"):
        assert load(tmp_path, [row(role)], chatml)[0].chosen == "chosen"
    with pytest.raises(DataError, match=r"from: wrong_type: unknown role 'function_call'; write a call as `tool_calls`"):
        load(tmp_path, [row("function_call")], chatml)
    with pytest.raises(DataError, match=r"unknown role 'narrator' \(known: human, "):
        load(tmp_path, [row("narrator")], chatml)


@pytest.mark.parametrize("names", [("human", "ai"), ("User", "Assistant"), ("HUMAN", "gpt"), ("user", "model")], ids=" ".join)
def test_other_names_of_roles(names, chatml, tmp_path):
    def row(asks, answers):
        system = {"role": "System", "content": "S"} if asks == "User" else {"role": "system", "content": "S"}
        turns = [system, {"role": asks, "content": "Hi"}, {"role": answers, "content": "Ho"}, {"role": asks, "content": "Ha"}]
        return {"prompt": turns, **{side: [{"role": answers, "content": side}] for side in ("chosen", "rejected")}}

    [read], [plain] = (load(tmp_path, [row(*both)], chatml) for both in (names, ("user", "assistant")))
    assert read == plain
    text = {"prompt": "Hi", **{side: [{"role": names[1], "content": side}] for side in ("chosen", "rejected")}}
    assert "user\nHi" in load(tmp_path, [text], chatml)[0].prompt  # a prompt that was lost before answers of such a role


def test_an_unknown_role_is_refused_unless_the_template_names_it(chatml, tmp_path):
    row = {"prompt": [user("Hi"), {"role": "narrator", "content": "N"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"prompt.1.role: wrong_type: unknown role 'narrator' \(known: human, "):
        load(tmp_path, [row], chatml)
    names = "{% for m in messages %}{% if m.role == 'narrator' %}TOLD {% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    assert "TOLD N" in load(tmp_path, [row], chat_tokenizer(names))[0].prompt


@pytest.mark.parametrize(("key", "says"), [("role", "content"), ("from", "value")], ids=" ".join)
def test_the_role_of_observations_is_that_of_the_template(key, says, tmp_path):
    turns = [{key: role, says: role} for role in ("user", "assistant", "Observation")]
    row = {"prompt": turns, **{side: [{key: "assistant", says: side}] for side in ("chosen", "rejected")}}
    writes = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    for names, role in (("", "tool"), ("{% set named = 'observation' %}", "observation")):
        assert f"[{role}] Observation" in load(tmp_path, [row], chat_tokenizer(names + writes))[0].prompt


def test_a_conversation_beyond_the_limits_of_a_template_is_named(tmp_path, monkeypatch):
    slow = chat_tokenizer(
        "{% for m in messages %}{{ m.content }}"
        "{% if 'stop' in m.content %}{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    monkeypatch.setattr(UNTRUSTED, "template_s", 0.2)
    rows = [{"prompt": [user(text)], "chosen": [said("a")], "rejected": [said("b")]} for text in ("go", "stop")]
    with pytest.raises(DataError, match=r"train.jsonl:2: chat_template: chat template of .*: did not end; the limit is 0.2 s"):
        load(tmp_path, rows, slow)


def test_encode_takes_the_same_rows():
    with pytest.raises(BadRow, match="weight: out_of_range"):
        encode({"prompt": ASKED, "chosen": [said("a", weight=2)], "rejected": [said("b")]}, chat_tokenizer(CHATML), **LIMITS)
