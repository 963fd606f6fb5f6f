"""Conversations of several turns and tools: what is rendered, and which tokens of it are scored."""

import copy
import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML, LLAMA, QWEN3, R1, chat_tokenizer

from dpo_jax.data.chat import chat_preference, chat_prompt
from dpo_jax.data.encode import encode
from dpo_jax.data.pairs import BadRow, Cause, DataError, DataReport, PreferenceSet
from dpo_jax.data.prepare import encode_all, encode_targets
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.template import asking_end, is_rendered, turn_end_token
from dpo_jax.data.tfds import read_tfds, write_tfds

LIMITS = {"max_length": 1000, "max_prompt_length": 600}
END = {"chatml": "<|im_end|>", "llama": "<|eot_id|>", "qwen3": "<|im_end|>", "r1": "<|im_end|>"}


@pytest.fixture(scope="module")
def chatty():
    return {name: chat_tokenizer(text) for name, text in (("chatml", CHATML), ("llama", LLAMA), ("qwen3", QWEN3), ("r1", R1))}


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(city, **changes):
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}, **changes}}


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": SCHEMA}}]
ASKED = [user("Weather in Rome?")]
CALLED, TOLD = said(None, tool_calls=[call("Rome")]), {"role": "tool", "name": "weather", "content": "12 C, rain"}
# Each is a line of a file, with what the assistant wrote on both sides; {call} is as the template writes a call.
ROWS = {
    "tools": (
        {"prompt": ASKED, "chosen": [said("Let me look.")], "rejected": [said("No.")], "tools": TOOLS},
        [["Let me look."], ["No."]],
    ),
    "a call": (
        {"prompt": ASKED, "chosen": [CALLED], "rejected": [said("I cannot know.")], "tools": TOOLS},
        [["{Rome}"], ["I cannot know."]],
    ),
    "calls and answers of tools": (
        {
            "prompt": ASKED,
            "chosen": [CALLED, TOLD, said("It rains, 12 C.")],
            "rejected": [said(None, tool_calls=[call("Paris")]), {**TOLD, "content": "9 C"}, said("It is 9 C.")],
            "tools": TOOLS,
        },
        [["{Rome}", "It rains, 12 C."], ["{Paris}", "It is 9 C."]],
    ),
    "numbers of turns differ": (
        {
            "prompt": [user("Plan a trip.")],
            "chosen": [said("Where to?"), user("Rome."), said("Take the night train.")],
            "rejected": [said("No.")],
        },
        [["Where to?", "Take the night train."], ["No."]],
    ),
    "turns diverge early": (
        {
            "chosen": [user("Hi"), said("Hello there!"), user("Name a fruit."), said("An apple.")],
            "rejected": [user("Hi"), said("What?"), user("Name a fruit."), said("A brick.")],
        },
        [["Hello there!", "An apple."], ["What?", "A brick."]],
    ),
    "sides part in a turn of the user": (
        {
            "chosen": [user("Hi"), said("Yes?"), user("A fruit."), said("An apple.")],
            "rejected": [user("Hi"), said("Yes?"), user("A stone."), said("Flint.")],
        },
        [["An apple."], ["Flint."]],
    ),
    "content parts": (
        {
            "prompt": [user([{"type": "text", "text": "Name a "}, {"type": "text", "text": "fruit."}])],
            "chosen": [said([{"type": "text", "text": "An apple."}])],
            "rejected": [said([{"type": "text", "text": "A brick."}])],
        },
        [["An apple."], ["A brick."]],
    ),
}
# The shared answer, which is context here, takes the room of the rest.
LATE = {
    side: [user("Hi"), said("Yes? " * 20), user(f"A {thing}."), said(answer)]
    for side, thing, answer in (("chosen", "fruit", "An apple."), ("rejected", "stone", "Flint."))
}
CALL = {
    "chatml": '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>',
    "llama": '{"name": "weather", "parameters": {"city": "%s"}}',
}


def whole_messages(row, side):
    messages = copy.deepcopy([*row.get("prompt", []), *row[side]])
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
    return messages


@pytest.mark.parametrize("family", CALL)
@pytest.mark.parametrize("name", ROWS)
def test_scored_tokens_are_exactly_those_of_the_assistant(name, family, chatty):
    row, wrote = ROWS[name]
    tokenizer, end = chatty[family], END[family]
    pair = encode(row, tokenizer, **LIMITS)
    for side, (ids, scored), turns in zip(("chosen", "rejected"), pair.sides, wrote, strict=True):
        turns = [CALL[family] % turn[1:-1] if turn[0] == "{" else turn for turn in turns]
        assert tokenizer.decode(ids if scored is None else ids[scored]) == "".join(turn + end for turn in turns)
        # transformers tells the same from the tags of the template: ids of the conversation, and a mark for each.
        messages = whole_messages(row, side)
        told = tokenizer.apply_chat_template(
            messages, tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ours = [*pair.prompt.tolist(), *ids.tolist()]
        assert told["input_ids"][: len(ours)] == ours
        theirs = told["assistant_masks"][len(pair.prompt) : len(ours)]
        if name == "sides part in a turn of the user":  # the first answer is shared: no part of the preference
            theirs[: len(tokenizer("Yes?" + end)["input_ids"])] = [0] * len(tokenizer("Yes?" + end)["input_ids"])
        assert theirs == ([1] * len(ids) if scored is None else scored.astype(int).tolist())


def test_a_single_turn_has_no_mask(chatty):
    for name in ("tools", "a call", "content parts"):
        pair = encode(ROWS[name][0], chatty["chatml"], **LIMITS)
        assert pair.chosen_scored is None
        assert pair.rejected_scored is None


def preference(row, tokenizer, **changes):
    row = {**row, **changes}
    more = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    return chat_preference(row.get("prompt"), row["chosen"], row["rejected"], uid="here", tokenizer=tokenizer, **more)


def test_forms_of_a_tool_call_say_the_same(chatty):
    row, _ = ROWS["calls and answers of tools"]
    wanted = preference(row, chatty["chatml"])
    answers = row["chosen"][1:]
    forms = [said("", tool_calls=[call("Rome")]), {"role": "assistant", "tool_calls": [call("Rome")]}]
    forms += [said(None, tool_calls=[call("Rome", arguments='{"city": "Rome"}')])]
    for form in forms:
        assert preference(row, chatty["chatml"], chosen=[form, *answers]) == wanted
    for tools in (json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
        assert preference(row, chatty["chatml"], tools=tools) == wanted
    odd = said(None, tool_calls=[call("Rome", arguments="no JSON")])  # as a model may write it
    assert '"no JSON"' in preference(row, chatty["chatml"], chosen=[odd, *answers]).chosen


TEXT_ARGUMENTS = (  # DeepSeek V3: a call is written only where there is no text, and its arguments are text
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is not string %}"
    "{% for c in m.tool_calls %}{{ 'CALL ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    "{% else %}{{ m.role + ': ' + m.content }}{% endif %}{{ eos_token }}{% endfor %}"
)
WRITES_NONE = (
    "{% for m in messages %}{{ m.role + ': ' + (m.content | trim) }}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEXT_ARGUMENTS, WRITES_NONE])
@pytest.mark.parametrize("form", [{"content": None}, {"content": ""}, {}])
def test_a_call_is_given_to_the_template_in_the_form_that_it_writes(template, form):
    tokenizer = chat_tokenizer(template)
    called = {"role": "assistant", "tool_calls": [call("Rome")], **form}
    pair = preference({"prompt": ASKED, "chosen": [called], "rejected": [said("No.")]}, tokenizer)
    assert "weather" in pair.chosen
    assert "Rome" in pair.chosen
    assert "None" not in pair.chosen


def test_files_of_both_kinds_give_the_same(chatty, tmp_path):
    """Arrow gives every tool and every call the keys of all, and its rows the columns of all; `datasets` exports the nulls."""
    add = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {
        "prompt": [
            user("Add."),
            said(None, tool_calls=[add, call("Rome")]),
            {"role": "tool", "name": "add", "content": "2"},
            user("Thanks."),
        ],
        "chosen": [said("Good.")],
        "rejected": [said("Bad.")],
        "tools": [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}],
        "chat_template_kwargs": {"shout": True},
    }
    rows = [other, *(ROWS[name][0] for name in ("tools", "calls and answers of tools", "numbers of turns differ"))]
    table = pa.Table.from_pylist(rows)
    exported = table.to_pylist()
    assert '{"a": 1, "city": null}' in json.dumps(exported)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exported.jsonl").write_text("".join(json.dumps(row) + "\n" for row in exported))
    pq.write_table(table, tmp_path / "train.parquet")
    loaded, again, nulls = (
        load_preferences(tmp_path / file, "train", tokenizer=chatty["chatml"])
        for file in ("train.jsonl", "train.parquet", "exported.jsonl")
    )
    assert len(loaded) == 4
    for one, *others in zip(loaded, again, nulls, strict=True):
        assert [dataclasses.replace(other, uid=one.uid) for other in others] == [one, one]
    assert "null" not in "".join(pair.prompt + pair.chosen for pair in loaded)
    for report in (loaded.report, again.report):
        assert "chat_template_kwargs: the chat template does not read 'shout' (1 of 4 pairs)" in report.notes
    folder = write_tfds({"train": loaded}, tmp_path / "tfds")
    assert list(read_tfds(folder, "train")) == list(loaded)


def test_template_options_of_a_row_reach_the_template(chatty):
    row = {"prompt": [user("2+2?")], "chosen": [said("4")], "rejected": [said("5")]}
    plain, off = (preference(row, chatty["qwen3"], chat_template_kwargs=given) for given in (None, {"enable_thinking": False}))
    block = "<think>\n\n</think>\n\n"
    assert (off.prompt, off.chosen, off.notes) == (plain.prompt + block, "4", ())
    assert plain.chosen == block + "4"  # as the template writes an answer without reasoning
    assert preference(row, chatty["qwen3"], chat_template_kwargs='{"enable_thinking": false}') == off
    assert chat_prompt(row["prompt"], tokenizer=chatty["qwen3"], chat_template_kwargs={"enable_thinking": False}) == off.prompt


def test_a_template_that_takes_reasoning_off_earlier_turns(chatty):
    """Qwen 3: a turn is written otherwise as the last one, with its reasoning, or with an empty block."""
    row = {
        "prompt": [user("Plan a trip.")],
        "chosen": [said("<think>\nhm\n</think>\n\nWhere to?"), user("Rome."), said("<think>\nso\n</think>\n\nBy train.")],
        "rejected": [said("Where?"), user("Rome."), said("By bus.")],
    }
    pair = preference(row, chatty["qwen3"])
    sides = (pair.chosen, pair.chosen_spans), (pair.rejected, pair.rejected_spans)
    wrote = [[text[begin:end] for begin, end in spans] for text, spans in sides]
    assert wrote[0] == ["Where to?<|im_end|>", "<think>\nso\n</think>\n\nBy train."]
    assert wrote[1] == ["Where?<|im_end|>", "<think>\n\n</think>\n\nBy bus."]
    assert "leaves out or changes part of what the assistant wrote" in pair.notes[0]
    trajectory = [said(None, tool_calls=[call("Rome")]), TOLD, said("Rain.")]
    pair = preference({"prompt": ASKED, "chosen": trajectory, "rejected": [said("No.")]}, chatty["qwen3"])
    assert [pair.chosen[begin:end] for begin, end in pair.chosen_spans] == [
        CALL["chatml"] % "Rome" + "<|im_end|>",
        "<think>\n\n</think>\n\nRain.",
    ]


@pytest.mark.parametrize("last", ["<|im_end|>", "<|User|>"])
def test_a_template_that_marks_the_end_of_a_conversation(last):
    """Phi 3 puts EOS behind the last turn, gpt-oss another token in place of that of other turns."""
    end = "<|begin|>" if last == "<|User|>" else "<|begin|>\n"
    after = f"{{{{ '{last}' if loop.last and not add_generation_prompt and m.role == 'assistant' else '{end}' }}}}"
    if last == "<|im_end|>":
        after = f"{end}{{{{ '{last}' if loop.last and not add_generation_prompt }}}}"
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + after + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    pair = preference(ROWS["numbers of turns differ"][0], chat_tokenizer(template))
    first, second = (pair.chosen[begin:end] for begin, end in pair.chosen_spans)
    assert first == "Where to?<|begin|>"
    assert second.startswith("Take the night train.")
    ids = encode(ROWS["numbers of turns differ"][0], chat_tokenizer(template), **LIMITS).chosen
    assert (ids == 0).sum() == (ids[-1] == 0) == (last == "<|im_end|>")  # EOS, where the template writes it
    assert pair.notes == ()


@pytest.mark.parametrize(
    ("written", "scored"),
    {
        "<|begin|>\n": "<|begin|>\n",  # Gemma: its end of a turn is not EOS, and no EOS follows
        "<|begin|>\n<|im_end|>": "<|begin|>\n<|im_end|>",  # Phi 3
        "<|im_end|>\n": "<|im_end|>",
        "\n": "\n<|im_end|>",  # a template without an end: EOS is appended
        "</think>": "</think><|im_end|>",  # no special token
    }.items(),
)
def test_eos_is_appended_where_a_template_ends_a_turn_in_no_special_token(written, scored):
    tokenizer = chat_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.content + '" + written.encode("unicode_escape").decode() + "' }}{% endfor %}"
    )
    row = {"prompt": ASKED, "chosen": [said("Rain.")], "rejected": [said("Sun.")]}
    pair = encode(row, tokenizer, **LIMITS)
    assert tokenizer.decode(pair.chosen) == "<|im_start|>Rain." + scored
    turns = {**row, "chosen": [said("Hm."), user("So?"), said("Rain.")]}
    several = encode(turns, tokenizer, **LIMITS)
    assert tokenizer.decode(several.chosen).endswith("Rain." + scored)
    first = next((token for token in ("<|begin|>", "<|im_end|>") if written.startswith(token)), None)
    assert turn_end_token(tokenizer) == (None if first is None else tokenizer.convert_tokens_to_ids(first))


@pytest.mark.parametrize(
    "template", ["{{ 'x' * 10**10 }}", "{% for", "{{ raise_exception('no') }}", "{{ messages[5].content }}"]
)
def test_a_template_that_cannot_be_rendered_has_no_end_of_a_turn(template):
    """Sampling from plain texts and exports ask for it, and go on."""
    assert turn_end_token(chat_tokenizer(template)) is None


def test_a_message_that_the_template_leaves_out_is_told(chatty):
    row = {"prompt": [{"role": "system", "content": "Be terse."}, *ASKED], "chosen": [said("Yes.")], "rejected": [said("No.")]}
    assert preference(row, chatty["chatml"]).notes == ()
    left_out = chat_tokenizer("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    assert preference(row, left_out).notes == (
        "the chat template leaves out or changes part of a system's or user's message in the prompt",
    )


@pytest.mark.parametrize("opener", ["<think>\n", "<think>", ""])
def test_reasoning_that_the_generation_prompt_opens_is_taken_as_written(opener, chatty):
    answers = [f"{opener}hm\n</think>\n\n{word}" for word in ("Yes", "No")]
    pair = preference({"prompt": [user("hi")], "chosen": [said(answers[0])], "rejected": [said(answers[1])]}, chatty["r1"])
    assert (pair.prompt, pair.chosen) == ("<|User|>hi<|Assistant|><think>\n", "hm\n</think>\n\nYes")
    assert "its generation prompt opens with '<think>': taken as written" in pair.notes[0]
    with pytest.raises(BadRow, match="one side has reasoning"):
        preference({"prompt": [user("hi")], "chosen": [said(answers[0])], "rejected": [said("No")]}, chatty["r1"])


def test_other_answers_are_scored_from_where_they_part_from_the_generation_prompt(chatty):
    pair = preference({"prompt": [user("hi")], "chosen": [said("<b>Yes")], "rejected": [said("<b>No")]}, chatty["r1"])
    assert (pair.prompt, pair.chosen, pair.rejected) == ("<|User|>hi<|Assistant|>", "<b>Yes", "<b>No")  # not inside "<think>"
    (note,) = pair.notes
    assert note.startswith(r"the generation prompt '<|Assistant|><think>\n' is not the beginning of rendered answers")


def test_turns_behind_the_last_answer_are_left_off(chatty):
    row, _ = ROWS["numbers of turns differ"]
    wanted = preference(row, chatty["chatml"])
    pair = preference(row, chatty["chatml"], chosen=[*row["chosen"], user("Thanks.")])
    assert pair == wanted
    assert pair.notes == ("turns after the assistant's last one are left out",)


def test_texts_are_not_rendered_and_leave_tools_unread(tmp_path):
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c", "tools": tools} for tools in (TOOLS, [], None)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = load_preferences(tmp_path, "train").report.notes
    assert notes[1:] == ["tools: not read with texts, only with messages (1 of 3 pairs)"]


TWICE = said(None, tool_calls=[call("A"), call("B")])
TWO_PROMPTS = {side: [*ASKED, said(answer)] for side, answer in (("chosen", "Yes."), ("rejected", "No."))}
BAD = {
    "tools that the template leaves out": (Cause.CHAT_TEMPLATE, "qwen3", {"tools": TOOLS}, "tools: .*does not write tools"),
    "calls that it leaves out": (
        Cause.CHAT_TEMPLATE,
        "r1",
        {"chosen": [CALLED]},
        "chosen.0.tool_calls: .*not write tool calls",
    ),
    "an image": (
        Cause.WRONG_TYPE,
        "chatml",
        {"prompt": [user([{"type": "image_url"}])]},
        "prompt.0.*'image_url' are not",
    ),
    "a part that is text": (Cause.WRONG_TYPE, "chatml", {"prompt": [user(["hi"])]}, "prompt.0.content.0: .*got str"),
    "a role in the text of a call": (
        Cause.EOS_IN_TEXT,
        "chatml",
        {"chosen": [said(None, tool_calls=[call("<|im_start|>")])]},
        "chosen.0.tool_calls.0.function.arguments.city: ",
    ),
    "a role in the text of a tool": (Cause.EOS_IN_TEXT, "chatml", {"tools": [{"name": "<|im_end|>"}]}, "tools.0.name: "),
    "calls that are no list": (Cause.WRONG_TYPE, "chatml", {"chosen": [said(None, tool_calls={})]}, "chosen.0.tool_calls: "),
    "no text and no call": (Cause.WRONG_TYPE, "chatml", {"chosen": [said(None)]}, "chosen.0.content: "),
    "tools that are no list": (Cause.WRONG_TYPE, "chatml", {"tools": {"name": "f"}}, "tools: .*a list of tool schemas"),
    "tools that are no JSON": (Cause.INVALID_JSON, "chatml", {"tools": "[{"}, "tools: "),
    "options that are no object": (Cause.WRONG_TYPE, "chatml", {"chat_template_kwargs": ["a"]}, "chat_template_kwargs: "),
    "an option of ours": (
        Cause.WRONG_TYPE,
        "chatml",
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        "'add_generation",
    ),
    "an option that is a token": (Cause.WRONG_TYPE, "chatml", {"chat_template_kwargs": {"eos_token": "x"}}, "'eos_token'"),
    "two calls, where one is written": (
        Cause.CHAT_TEMPLATE,
        "llama",
        {"chosen": [TWICE]},
        "one call",
    ),
    "the prompt twice": (Cause.DIFFERENT_PROMPTS, "chatml", TWO_PROMPTS, "both repeat the messages of the prompt"),
    "too many turns": (Cause.TOO_LONG, "chatml", {"chosen": [said("a"), user("b")] * 250 + [said("a")]}, "501 turns"),
    "only a tool answers": (Cause.DIFFERENT_PROMPTS, "chatml", {"chosen": [TOLD]}, "a turn of 'tool'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_rendered_is_named(name, chatty):
    cause, family, changes, words = BAD[name]
    row = {"prompt": ASKED, "chosen": [said("Yes.")], "rejected": [said("No.")]}
    with pytest.raises(BadRow, match=words) as problem:
        preference(row, chatty[family], **changes)
    assert problem.value.cause == cause


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "chosen: chat_template: the chat template writes nothing for this turn"),
        ("{{ ' ' }}{% if messages[1:] %}{{ messages[1].content }}{% endif %}", "prompt: chat_template: the chat template"),
        (
            "{{ messages[0].content }}{% if messages[1:] %} A.{% endif %}",
            "chosen, rejected: chat_template: the chat template writes the same text for both, although their messages differ",
        ),
    ],
)
def test_turns_that_the_template_drops_are_its_fault_and_not_that_of_the_rows(template, message, tmp_path):
    tokenizer, file = chat_tokenizer(template), tmp_path / "train.jsonl"
    row = {"prompt": ASKED, "chosen": [said("It rains.")], "rejected": [said("No.")]}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as refused:
        load_preferences(file, "train", tokenizer=tokenizer)
    assert f"train.jsonl:1: {message}" in str(refused.value)
    assert str(refused.value).endswith("Use another chat template, or drop and count such rows with --data.on-bad drop.")


def test_truncation_cuts_the_marks_with_the_tokens(chatty, tmp_path):
    row, _ = ROWS["numbers of turns differ"]
    tokenizer = chatty["chatml"]
    whole = encode(row, tokenizer, **LIMITS)
    limit = len(whole.chosen) - 5
    short = {"max_length": len(whole.prompt) + limit, "max_prompt_length": len(whole.prompt)}
    cut = encode(row, tokenizer, **short)
    assert cut.chosen_cut == 5
    assert cut.chosen_scored.tolist() == whole.chosen_scored[:limit].tolist()
    short = {"max_length": 60, "max_prompt_length": 30}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(LATE))
    loaded = load_preferences(tmp_path, "train", tokenizer=tokenizer)
    assert encode_all(loaded, tokenizer, **short).report.dropped == {Cause.IDENTICAL_AFTER_TRUNCATION.value: 1}
    late = PreferenceSet([dataclasses.replace(loaded[1], chosen="No. " + loaded[1].chosen)], DataReport(read=1))
    with pytest.raises(DataError, match=r"train.jsonl:2: chosen: completion_cut: .* leaves nothing that the assistant wrote"):
        encode_all(late, tokenizer, **short)
    ((prompt, completion, scored, _), _), _ = encode_targets(loaded, tokenizer, **LIMITS)
    assert completion.tolist() == whole.chosen.tolist()
    assert scored.tolist() == whole.chosen_scored.tolist()


def test_a_prompt_of_a_template_without_special_tokens_is_told_by_its_end():
    """As Llama 2's: for a reward model of another template it would look like a plain text."""
    llama_2 = (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content }}{% endfor %}"
    )
    tokenizer = chat_tokenizer(llama_2)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert not is_rendered(prompt, tokenizer)
    assert asking_end(tokenizer) == " [/INST]"
    assert prompt.endswith(asking_end(tokenizer))
