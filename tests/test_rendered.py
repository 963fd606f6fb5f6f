"""Texts that the chat template rendered before (`data.rendered`): the token ids of the messages themselves."""

import json
import types

import numpy as np
import pytest
from chat_templates import CHATML, LLAMA, chat_tokenizer

from dpo_jax.cli import build, splits
from dpo_jax.cli.config import Config, ConfigError, TokenizerConfig, load_config
from dpo_jax.cli.config.lab import FrontierConfig
from dpo_jax.cli.experiment import encode_samples, labeled_samples
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.data.tokenizer import save_tokenizer
from dpo_jax.evals.reward_functions import with_ends
from dpo_jax.lab.world import Prompts
from dpo_jax.untrusted import Unreadable

TURNS = [
    [{"role": "user", "content": "Where to?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Where to?"},
    ],
]


@pytest.fixture(params=["chatml", "llama"], scope="module")
def chatty(request):
    return chat_tokenizer({"chatml": CHATML, "llama": LLAMA}[request.param])


def rendered(tokenizer, turns, answer):
    """(prompt, completion) as scripts write them: the completion is what the template adds to the prompt."""
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
    assert whole.startswith(prompt)
    return prompt, whole.removeprefix(prompt)


def encoded(folder, rows, tokenizer, **options):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = json.dumps({"path": str(folder), **options})  # JSON is YAML
    (folder / "my.yaml").write_text(f"run: {{dir: {folder}}}\ndata: {data}\n")
    config = load_config(folder / "my.yaml")
    return splits.encode_split(config, splits.load_split(config, "train", tokenizer), tokenizer)


def as_messages(turns, answer):
    return {"prompt": turns, **{side: [{"role": "assistant", "content": text}] for side, text in answer.items()}}


def as_texts(tokenizer, turns, answer):
    texts = {side: rendered(tokenizer, turns, text) for side, text in answer.items()}
    return {"prompt": texts["chosen"][0], **{side: completion for side, (_, completion) in texts.items()}}


ANSWER = {"chosen": "By train.", "rejected": "By bus."}


def test_rendered_texts_give_the_tokens_of_their_messages(chatty, tmp_path):
    wanted = encoded(tmp_path / "messages", [as_messages(turns, ANSWER) for turns in TURNS], chatty)
    texts = [as_texts(chatty, turns, ANSWER) for turns in TURNS]
    found = encoded(tmp_path / "texts", texts, chatty, rendered=True)
    assert len(found) == len(wanted) == 2
    for one, other in zip(found, wanted, strict=True):
        for part in ("prompt", "chosen", "rejected"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
    assert found.report.chat == 2


@pytest.mark.parametrize("drop", [{}, {"on_bad": "drop"}])
def test_without_the_option_they_are_refused_with_it_as_the_remedy(chatty, tmp_path, drop):
    texts = [as_texts(chatty, turns, ANSWER) for turns in TURNS]
    with pytest.raises(DataError, match=r"If the chat template rendered these texts before, add --data\.rendered") as caught:
        encoded(tmp_path, texts, chatty, **drop)
    assert caught.value.causes == (Cause.EOS_IN_TEXT,)
    torn = [{**texts[0], "chosen": f"By{chatty.eos_token}train."}]  # in the middle it is bad in either case
    with pytest.raises(DataError, match="eos_in_text") as caught:
        encoded(tmp_path, torn, chatty, rendered=True)
    assert "--data.rendered" not in str(caught.value)


@pytest.mark.parametrize("finished", [True, False])
def test_labeled_samples_of_conversations_end_as_the_policy_stops(chatty, tmp_path, finished):
    """As `encode` gives the messages; the file of `label` is read with `data.rendered`. A sample that was cut has no end."""
    asked = chatty.apply_chat_template(TURNS[0], tokenize=False, add_generation_prompt=True)
    drawn = types.SimpleNamespace(texts=["By train.", "By bus."], finished=np.array([True, finished]))
    scored = types.SimpleNamespace(completions=drawn, rewards=np.array([1.0, 0.0]))
    world = types.SimpleNamespace(sample=lambda *_: scored, reference=None, tokenizer=chatty)
    prompts = Prompts(ids=[np.zeros(1, np.int32)], texts=[asked])
    config = Config(frontier=FrontierConfig(completions=2, labels="argmax"))
    folder = tmp_path / "label"
    folder.mkdir()
    preferences, _ = labeled_samples(config, world, prompts, folder / "train.jsonl", key=None)
    wanted = encoded(tmp_path / "messages", [as_messages(TURNS[0], ANSWER)], chatty)[0]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for found in (encode_samples(config, preferences, chatty)[0], encoded(tmp_path / "again", rows, chatty, rendered=True)[0]):
        for part in ("prompt", "chosen", "rejected") if finished else ("prompt", "chosen"):
            np.testing.assert_array_equal(getattr(found, part), getattr(wanted, part))
        if not finished:
            assert found.rejected.tolist() == chatty("By bus.", add_special_tokens=False)["input_ids"]
            (whole,) = with_ends([found], chatty)  # as a reward model reads the text
            np.testing.assert_array_equal(whole.rejected, with_ends([wanted], chatty)[0].rejected)
            assert whole.unended == ()


def test_a_chat_template_may_come_from_a_file(tmp_path, chatty):
    save_tokenizer(chatty, tmp_path / "model")
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    mine = TokenizerConfig(chat_template=str(tmp_path / "mine.jinja"))
    for section, template in ((mine, "{{ messages[0].content }}"), (TokenizerConfig(), chatty.chat_template)):
        found = build.tokenizer_of(Config(tokenizer=section), model_path=str(tmp_path / "model"))
        assert found.chat_template == template
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    for name, words in (("nowhere.jinja", "no such file"), ("model", "no such file"), ("binary.jinja", "not UTF-8")):
        config = Config(tokenizer=TokenizerConfig(chat_template=str(tmp_path / name)))
        with pytest.raises((ConfigError, Unreadable), match=rf"^tokenizer.chat_template: .*{name}: {words}"):
            build.tokenizer_of(config, model_path=str(tmp_path / "model"))
