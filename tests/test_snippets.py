import json
import random
import re

import pytest

from dpo_jax.cli import build
from dpo_jax.cli.commands import sft
from dpo_jax.cli.flags import parse
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.data.snippets import FILES, Snippet, load_snippets, part_of, prefixes, snippets_of

WORDS = re.findall(
    r"\S+", "a the film plot is was not very good bad dull bright , . acting story and but with caf\u00e9 it's funny"
)


def made_up(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 20))) + f" {i} ." for i in range(count)]


@pytest.fixture(scope="module")
def snippets():
    return [Snippet(text, i % 2, f"made-up:{i}") for i, text in enumerate(made_up(2000))]


def write(folder, **lines):
    for name in FILES:
        (folder / name).write_bytes(lines.get(name.rsplit(".", maxsplit=1)[-1], b"fine \n"))
    return folder


def test_a_line_is_a_snippet(tmp_path):
    write(tmp_path, pos="good caf\u00e9 . \nnext\u2028line\r\n".encode(), neg=b" bad . ")
    assert load_snippets(tmp_path) == [
        Snippet("good caf\u00e9 .", 1, "rt-polarity.pos:1"),
        Snippet("next\u2028line", 1, "rt-polarity.pos:2"),
        Snippet("bad .", 0, "rt-polarity.neg:1"),
    ]


@pytest.mark.parametrize(
    ("neg", "message", "cause"),
    [
        (b"", r"rt-polarity\.neg: is empty", Cause.NO_ROWS),
        (b"fine\ncaf\xe9\n", r"rt-polarity\.neg:2: not UTF-8 at byte 3 .* convert", Cause.INVALID_UTF8),
        (b"fine\n \nfine\n", r"rt-polarity\.neg:2: a blank line: remove it", Cause.EMPTY),
        (b"fine\nfi\0ne\n", r"rt-polarity\.neg:2: holds a NUL", Cause.NUL),
    ],
)
def test_bad_lines_are_named(tmp_path, neg, message, cause):
    with pytest.raises(DataError, match=message) as caught:
        load_snippets(write(tmp_path, neg=neg))
    assert caught.value.causes == (cause,)


def test_missing_files_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "rt-polarity.neg").unlink()
    with pytest.raises(DataError, match=r"rt-polarity\.neg: cannot be read .* must hold rt-polarity\.pos and rt-polarity\.neg"):
        load_snippets(tmp_path)
    with pytest.raises(DataError, match=r"rt-polarity\.pos: cannot be read"):
        load_snippets(tmp_path / "nowhere")


def test_parts_are_disjoint_and_depend_on_the_text_alone(snippets):
    parts = {name: snippets_of(snippets, name) for name in ("policy", "reward", "test")}
    assert sorted(s for part in parts.values() for s in part) == sorted(snippets)
    texts = [{s.text for s in part} for part in parts.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]  # noqa: PT018
    shares = {name: len(part) / len(snippets) for name, part in parts.items()}
    assert shares == pytest.approx({"policy": 0.5, "reward": 0.4, "test": 0.1}, abs=0.03)
    for part in parts.values():
        assert 0.4 < sum(s.label for s in part) / len(part) < 0.6
    assert snippets_of(snippets[::-1], "test") == parts["test"][::-1]
    # Promised across versions and machines: a policy must never meet the reward's texts because Python changed.
    assert [part_of(text) for text in ("good .", "bad .", "dull .", "a", "b", "c")] == [
        "policy",
        "policy",
        "test",
        "policy",
        "reward",
        "policy",
    ]
    with pytest.raises(ValueError, match="policy, reward, test, not 'train'"):
        snippets_of(snippets, "train")


def test_prefixes_are_short_distinct_beginnings(snippets, tokenizer):
    found = prefixes(snippets, tokenizer, 200, 0)
    assert len(set(found)) == 200
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in found]
    assert set(lengths) == {2, 3, 4, 5, 6, 7, 8}
    for text in found:
        assert any(s.text.startswith(text) and s.text != text for s in snippets)


def test_prefixes_are_a_function_of_texts_and_seed(snippets, tokenizer):
    found = prefixes(snippets, tokenizer, 50, 0)
    assert found[:20] == prefixes(snippets, tokenizer, 20, 0)
    assert found == prefixes(snippets[::-1], tokenizer, 50, 0)
    assert set(found) != set(prefixes(snippets, tokenizer, 50, 1))
    with pytest.raises(ValueError, match=r"3 snippets have \d+ distinct beginnings, and 22 are asked for"):
        prefixes(snippets[:3], tokenizer, 22, 0)
    # A snippet that is no longer than its beginning would leave nothing to continue.
    assert prefixes([Snippet("a", 0, "1"), Snippet("", 0, "2")], tokenizer, 0, 0) == []
    with pytest.raises(ValueError, match="0 distinct"):
        prefixes([Snippet("a", 0, "1")], tokenizer, 1, 0)


def test_a_second_prefix_of_a_snippet_is_of_another_length(snippets, tokenizer):
    longest = max(snippets, key=lambda snippet: len(snippet.text))
    alone = prefixes([longest], tokenizer, 7, 0)
    assert sorted(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in alone) == [2, 3, 4, 5, 6, 7, 8]
    others = [snippet for snippet in snippets if snippet.text[:2] != longest.text[:2]][:10]
    both = prefixes([longest, *others], tokenizer, 40, 0)
    turns = [number for number, text in enumerate(both) if longest.text.startswith(text)]
    assert len(set(both)) == 40
    assert [both[number] for number in turns] == alone[: len(turns)]
    assert len(turns) > 1
    assert turns[1] - turns[0] > len(others) / 2  # the others had theirs in between


def test_texts_that_are_cut_are_counted_in_the_report(tmp_path):
    lines = made_up(300)
    write(tmp_path, pos="\n".join(lines[:150]).encode(), neg="\n".join(lines[150:]).encode())
    (tmp_path / "config.yaml").write_text(
        f"run: {{dir: {tmp_path}/run}}\ndata: {{source: snippets, path: {tmp_path}, max_length: 48, max_prompt_length: 4}}\n"
        "tokenizer: {vocab_size: 300}\nmodel: {family: gpt2, width: 8, layers: 1, heads: 1, max_positions: 48}\n"
        "sft: {scored: all}\n"
    )
    config = parse("sft", [str(tmp_path / "config.yaml")])
    data = sft._plain_texts(config, build.tokenizer_of(config, model_path=None))
    written = json.loads(json.dumps([report.to_json() for report in data.reports]))
    for encoded, report in zip((data.train, data.held_out), written, strict=True):
        full = sum(len(ids) == 48 for _, ids in encoded)
        assert 0 < report["truncated"]["text"] <= full < len(encoded) == report["kept"]
