import copy
import json
import math
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.data import reviews
from dpo_jax.evals.intervals import score_interval
from dpo_jax.evals.reward_functions import (
    LinearReward,
    exact_reviews,
    fit_linear,
    hf_classifier,
    learned,
    sign_accuracy,
    vader_lexicon,
    words,
)
from dpo_jax.untrusted import Unreadable

GOOD, BAD = (
    ["bright film .", "a bright , clever plot", "clever and bright !"],
    ["dull film .", "a dull , tired plot", "tired and dull !"],
)
LINEAR = LinearReward(0.5, {"good": 2.0, "bad": -3.0, "!": 0.25})


def test_exact_reviews_is_the_rule_over_prompt_and_completion():
    prompts = ["The cast is", "The plot is not", "It runs for"]
    completions = [" superb.", " superb.", " two hours."]
    assert exact_reviews(prompts, completions).tolist() == [3.0, -1.5, 0.0]
    assert exact_reviews(prompts, completions).tolist() == [
        reviews.reward(p + c) for p, c in zip(prompts, completions, strict=True)
    ]
    assert exact_reviews([], []).shape == (0,)
    with pytest.raises(ValueError, match="shorter"):
        exact_reviews(prompts, completions[:2])


def test_words():
    assert words("It's a CAF\u00c9 film , isn't it ? yes! 7/10 -- snake_case") == [
        "it's", "a", "caf\u00e9", "film", "isn't", "it", "?", "yes", "!", "7", "10", "snake", "case",
    ]  # fmt: skip


def test_a_linear_reward_adds_the_weights_of_distinct_words():
    values = LINEAR(["A good", "A good", "", "ba"], [" film !", " good , good film", "", "d !"])
    assert values.tolist() == [0.5 + 2 + 0.25, 0.5 + 2, 0.5, 0.5 - 3 + 0.25]
    assert LINEAR([], []).shape == (0,)


def test_sign_accuracy_counts_zero_as_half():
    reward = LinearReward(0.0, {"good": 2.0, "bad": -3.0})
    share, interval = sign_accuracy(reward, ["good", "bad", "bad", "neither"], [1, 0, 1, 0])
    assert share == 2.5 / 4
    assert interval == score_interval([1, 0, 1, 0.5])


def test_a_fitted_linear_reward_is_scikit_learns_log_odds():
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = GOOD + BAD, [1] * 3 + [0] * 3
    reward = fit_linear(texts, labels, inverse_penalty=0.5)
    assert {"bright", "dull", "film"} <= reward.weights.keys() <= {word for text in texts for word in words(text)}
    bags = CountVectorizer(analyzer=words, binary=True, min_df=2)
    model = LogisticRegression(C=0.5).fit(bags.fit_transform(texts), labels)
    new = ["a bright bright plot", "dull , not clever", "nothing known"]
    np.testing.assert_allclose(reward([""] * 3, new), model.decision_function(bags.transform(new)), atol=1e-6)
    assert reward == fit_linear(texts, labels, inverse_penalty=0.5)
    assert sign_accuracy(reward, texts, labels)[0] == 1.0
    strong, weak = (fit_linear(texts, labels, inverse_penalty=c).weights["bright"] for c in (10.0, 0.01))
    assert strong > weak > 0
    with pytest.raises(ValueError, match=r"6 texts and 6 labels \[1\]"):
        fit_linear(texts, [1] * 6, inverse_penalty=1.0)


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("sklearn", "lab", lambda: fit_linear(GOOD, [1, 0, 1], inverse_penalty=1.0)),
        ("torch", "classifier", lambda: hf_classifier("nowhere", "POSITIVE")),
        ("vaderSentiment", "lab", vader_lexicon),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, extra, use):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install -e .*\[{extra}\]"):
        use()


def test_the_lexicon_scores_prompt_and_completion_as_one_text():
    pytest.importorskip("vaderSentiment")
    reward = vader_lexicon()
    # Published examples of the package (version 3.3.2).
    texts = ["VADER is smart, handsome, and funny.", "VADER is not smart, handsome, nor funny.", "Today SUX!", ""]
    np.testing.assert_allclose(reward([""] * 4, texts), [0.8316, -0.7424, -0.5461, 0.0], atol=5e-5)
    np.testing.assert_allclose(reward([texts[1][:9]], [texts[1][9:]]), [-0.7424], atol=5e-5)


def test_a_learned_reward_reads_each_completion_with_its_eos(tokenizer):
    shapes = []

    def score(rows):  # stands for a model: what it reads, and where the completion begins and ends
        shapes.append(rows.tokens.shape)
        scored = rows.slot < rows.slots
        return (rows.tokens.sum(axis=1) + 1000 * scored.sum(axis=1)).astype(np.float32)

    prompts, completions = ["The film", "A", "The plot is"], [" is good.", "", " very, very dull"]
    ids = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair]
        for pair in zip(prompts, completions, strict=True)
    ]
    expected = [sum(prompt) + sum(rest) + tokenizer.eos_token_id + 1000 * (len(rest) + 1) for prompt, rest in ids]
    for batch in (1, 2, 8):
        assert learned(score, tokenizer, length=32, batch=batch)(prompts, completions).tolist() == expected
        assert set(shapes) == {(batch, 16)}
        shapes.clear()
    other = copy.deepcopy(tokenizer)  # whose BOS is not id 0, which would not count
    other.add_special_tokens({"bos_token": "<|b|>"})
    with_bos = learned(score, other, length=32, batch=8, bos="always")(prompts, completions)
    assert with_bos.tolist() == [value + other.bos_token_id for value in expected]
    shapes.clear()
    learned(score, tokenizer, length=64, batch=3)(prompts, [*completions[:2], completions[2] * 4])
    assert shapes == [(3, 48)]
    assert learned(score, tokenizer, length=32, batch=2)([], []).shape == (0,)
    with pytest.raises(ValueError, match="rows hold 4"):
        learned(score, tokenizer, length=4, batch=2)(prompts, completions)


def _without_head(folder):
    file = folder / "model.safetensors"
    save_file({name: array for name, array in load_file(file).items() if "classifier" not in name}, file, {"format": "pt"})


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _set(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _no_heads(folder):
    _set(folder, num_attention_heads=0)


def _no_label(folder):
    _set(folder, id2label=[1])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("labels", "family"), [(["NEGATIVE", "POSITIVE"], "roberta"), (["bad", "so-so", "good"], "bert"), (["score"], "bert")]
)
def test_a_hugging_face_classifier_is_the_log_odds_of_its_label(tmp_path, tokenizer, labels, family):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = {"roberta": transformers.RobertaConfig, "bert": transformers.BertConfig}[family](
        vocab_size=len(tokenizer) + 1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=1,
        id2label=dict(enumerate(labels)),
        label2id={name: number for number, name in enumerate(labels)},
        initializer_range=1.0,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    padded = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, pad_token="!")
    padded.save_pretrained(tmp_path)
    label = labels[-1] if len(labels) > 1 else None
    reward = hf_classifier(str(tmp_path), label, batch=2, device="cpu")
    prompts, completions = ["The film", "A", "The"], [" is good.", " b", " very" * 100]
    values = reward(prompts, completions)
    limit = 38 if family == "roberta" else 40  # RoBERTa's positions begin behind its padding token
    for value, prompt, completion in zip(values, prompts, completions, strict=True):
        ids = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"][:limit]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double()
        if len(labels) > 1:
            share = logits.softmax(0)[-1].item()
            logits = torch.tensor([math.log(share / (1 - share))])
        assert value == pytest.approx(logits[-1].item(), abs=1e-4)
    assert reward([], []).shape == (0,)
    for damage in (_without_head, _cut, _no_heads, _no_label):
        folder = tmp_path.parent / f"{tmp_path.name}_{damage.__name__}"
        shutil.copytree(tmp_path, folder)
        damage(folder)
        with pytest.raises(Unreadable, match=f"^classifier {folder}: "):
            hf_classifier(str(folder), label, device="cpu")
    wrong = "nonsense" if len(labels) > 1 else "score"
    with pytest.raises(ValueError, match="name the one to reward" if len(labels) > 1 else "takes no label"):
        hf_classifier(str(tmp_path), wrong)
