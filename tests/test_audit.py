"""What the audit counts and says, and that training commands say the same of what makes held-out numbers mean less."""

import copy
import itertools
import json
import re
import string

import numpy as np
import pytest
from conftest import GOLDEN
from tiny_run import call, refused

from dpo_jax.cli import splits
from dpo_jax.cli.commands.audit import longer_wins
from dpo_jax.cli.config import Config, DataConfig, load_config
from dpo_jax.cli.experiment import prompts_of
from dpo_jax.cli.repeats import check_repeats
from dpo_jax.data.encode import Encoded
from dpo_jax.data.lengths import cut_table, length_differences
from dpo_jax.data.pairs import DataError, DataReport
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.data.repeats import find_overlap, find_repeats
from dpo_jax.data.template import template_parts
from dpo_jax.data.terminal import one_line, printable
from dpo_jax.data.token_text import SEPARATOR, rows_of, shortened, token_strings
from dpo_jax.data.tokenizer import load_tokenizer

HOSTILE = " \x1b[2J\x1b]0;owned\x07 \u202eback \x9b31m 你好"


def pair(prompt, chosen, rejected, uid="", **cut):
    """Letters stand for tokens."""
    return Encoded(*(np.array([ord(c) for c in text], np.int32) for text in (prompt, chosen, rejected)), uid=uid, **cut)


def pairs_of(*texts):
    return [pair(*text.split(), uid=f"t:{number}") for number, text in enumerate(texts, 1)]


def counts(found):
    return tuple(finding.pairs for finding in found)


# Counting


def test_duplicates_and_contradictions_are_counted_once_for_each_pair_too_many():
    found = find_repeats(pairs_of("p a b", "p a b", "q a b", "p b a", "p a b", "p ab b"))
    assert counts(found) == (2, 2, 4)
    assert found.duplicates == (2, 2 / 6, ["t:2 with t:1", "t:5 with t:1"], 6)
    assert found.contradictions.examples == ["t:4 with t:1", "t:5 with t:4"]
    assert counts(find_repeats(pairs_of("p a b", "q a b", "p a c", "pa b c"))) == (0, 0, 0)


def test_a_ranking_of_three_contradicts_nothing():
    found = find_repeats(pairs_of("p a b", "p b c", "p a c"))
    assert (found.duplicates.pairs, found.contradictions.pairs) == (0, 0)
    assert found.both_sides == (1, 1 / 3, ["t:2 with t:1"], 3)


def test_overlap_is_of_pairs_of_swapped_pairs_and_of_prompts():
    train = pairs_of("p a b", "q a b")
    held_out = [pair(*text.split(), uid=f"h:{i}") for i, text in enumerate(("p a b", "q b a", "q a c", "r a b"), 1)]
    found = find_overlap(held_out, train)
    assert counts(found) == (1, 1, 3)
    assert found.prompts == (3, 0.75, ["h:1 with t:1", "h:2 with t:2", "h:3 with t:2"], 4)
    assert counts(find_overlap(train, train)) == (2, 0, 2)
    assert counts(find_overlap(held_out, [])) == counts(find_overlap([], train)) == (0, 0, 0)


def test_plain_texts_overlap_where_they_are_the_same():
    """All plain texts have an empty prompt, which by itself is no overlap."""
    train = [pair("", text, text, uid=f"t:{text}", desirable=True) for text in "ab"]
    held_out = [pair("", text, text, uid=f"h:{text}", desirable=True) for text in "bc"]
    assert counts(find_overlap(held_out, train)) == (1, 0, 1)


def test_copies_made_by_a_weight_are_neither_found_nor_counted():
    copies = [pair("p", "a", "b", uid=f"t:{number}") for number in (1, 2)]
    copies += [pair("p", "a", "b", uid=f"t:{number} ({copy})") for number in (1, 2) for copy in (2, 3)]
    assert find_repeats(copies).duplicates[::3] == (1, 2)


def test_only_the_first_three_places_are_kept():
    assert len(find_repeats(pairs_of(*["p a b"] * 9)).duplicates.examples) == 3


def test_the_longer_one_wins_as_often_as_the_shorter_one_loses():
    pairs = pairs_of("p aa b", "p aaa b", "p a b", "p a bb")
    rule = longer_wins(length_differences(pairs))
    assert (rule["chosen_longer"], rule["equal"], rule["accuracy"]) == (0.5, 0.25, 0.625)
    other = longer_wins(-length_differences(pairs))
    assert other["accuracy"] == 1 - rule["accuracy"]
    assert (other["low"], other["high"]) == pytest.approx((1 - rule["high"], 1 - rule["low"]))


def test_pairs_of_one_prompt_count_once_in_the_interval_of_the_rule():
    pairs, prompts = pairs_of("p aa b", "q a bb", "r aa b"), [b"p", b"q", b"r"]
    once = longer_wins(length_differences(pairs), prompts)
    assert longer_wins(length_differences(pairs * 9), prompts * 9) == pytest.approx(once)
    assert longer_wins(length_differences(pairs)) == once


def test_cut_tokens_are_counted_by_part_and_a_pair_that_lost_both_ends_once():
    table = cut_table([pair("pp", "a", "bb", prompt_cut=2), pair("p", "a", "b", chosen_cut=3, rejected_cut=1)])
    assert table["prompt"] == {"pairs": 1, "tokens": 2, "share": 2 / 5}
    assert table["completions"] == {"pairs": 1, "tokens": 4, "share": 4 / 9}


# Tokens as text


def test_token_strings_are_the_text_and_nothing_that_a_terminal_obeys(tokenizer):
    text = f"Human: hi\n\n{string.printable}"
    assert "".join(token_strings(tokenizer(text)["input_ids"], tokenizer)) == one_line(text)
    strings = token_strings(tokenizer(HOSTILE + SEPARATOR)["input_ids"], tokenizer)
    assert all(string.isprintable() and SEPARATOR not in string for string in strings)
    assert "\\x1b" in strings
    assert token_strings([tokenizer.eos_token_id], tokenizer) == ["<|endoftext|>"]


def test_printable_escapes_what_is_invisible_and_keeps_the_rest():
    assert one_line("\x1b[31m\n\u202e\ud800 é你") == "\\x1b[31m\\n\\u202e\\ud800 é你"
    assert printable("a\n\x1b", keep="\n") == "a\n\\x1b"


@pytest.mark.parametrize("most", [20, 60, 10_000])
def test_shortened_tokens_keep_both_ends_and_the_count(most):
    strings = [f"{number:03}" for number in range(50)]
    short = shortened(strings, most)
    if most == 10_000:
        assert short == strings
        return
    (gap,) = [place for place, string in enumerate(short) if "more" in string]
    assert int(re.search(r"\d+", short[gap])[0]) + len(short) - 1 == 50
    assert short[:gap] + short[gap + 1 :] == strings[:gap] + strings[gap + 1 - len(short) :]
    assert sum(map(len, short)) < most + 30


def test_rows_of_tokens_fit_and_lose_nothing():
    strings = ["ab", "c" * 30, "", *"defghijk"]
    rows = rows_of(strings, 12)
    assert max(map(len, rows)) <= 12
    assert "".join(rows) == SEPARATOR.join(strings)


# Chat templates

TURN = "{{ '<' + m['role'] + '>' + m['content'] + eos_token }}"
ASK = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
TEMPLATES = {
    PLAIN: {},
    "{{ 'Today: ' + strftime_now('%Y') }}" + PLAIN: {"date": r"20\d\d"},
    '{% if not d is defined %}{% set d = strftime_now("%d %b") %}{% endif %}{{ d }}' + PLAIN: {"date": r"\d\d \w+"},
    "{{ 'Cut-off: 26 Jul 2024' }}" + PLAIN: {},
    "{% set unused = strftime_now('%Y') %}" + PLAIN: {},
    PLAIN.removesuffix(ASK): {"generation_prompt": ""},
    "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN: {"system": "refused"},
    "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + ASK: {"system": "dropped"},
    "{% for m in messages[-2:] %}" + TURN + "{% endfor %}" + ASK: {
        "earlier_turns": "dropped",
        "reasoning": "dropped in earlier turns",
    },
    PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]"): {"reasoning": "dropped"},
    PLAIN.replace("m['content']", "m['content'] | trim"): {"trims": True},
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_moving_parts_of_a_template(tokenizer, template):
    assert template_parts(tokenizer) is None
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    found = template_parts(other)._asdict()
    expected = {
        "date": None,
        "generation_prompt": "<assistant>",
        "turn_end": "<|endoftext|>",
        **dict.fromkeys(("system", "earlier_turns", "reasoning"), "kept"),
        "trims": False,
        **TEMPLATES[template],
    }
    if expected["date"]:
        assert re.fullmatch(expected.pop("date"), found.pop("date"))
    assert found == expected


# The program


def rows(*texts):
    names = ("prompt", "chosen", "rejected")
    return "".join(json.dumps(dict(zip(names, text.split("|"), strict=True))) + "\n" for text in texts)


TRAIN = [f"Tell me story {i}.{HOSTILE}| Yes, gladly and at once.| No." for i in range(40)]
SWAPPED = [f"Tell me story {i}.{HOSTILE}| No.| Yes, gladly and at once." for i in range(2)]
TEST = ["Tell me story 3.| Yes, gladly.| No.", TRAIN[5], "Another one.| Yes, of course.| No."]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(rows(*TRAIN, *TRAIN[:10], *SWAPPED))
    (folder / "data" / "test.jsonl").write_text(rows(*TEST))
    (folder / "c.yaml").write_text(
        f"run: {{dir: {folder / 'run'}}}\n"
        f"data: {{source: files, path: {folder / 'data'}, max_length: 96, max_prompt_length: 64}}\n"
        f"tokenizer: {{path: {GOLDEN / 'tokenizer'}}}\n"
        f"model: {{path: {GOLDEN / 'gpt2' / 'init'}}}\n"
        f"dpo: {{policy: {GOLDEN / 'gpt2' / 'init'}}}\n"
    )
    return folder / "c.yaml"


def test_the_audit_is_one_page_of_what_to_look_into(config):
    result = call("audit", config)
    assert result.code == 0, result
    shown = result.out.splitlines()
    assert len(shown) <= 60
    assert [line for line in shown[1:-1] if len(line) > 80] == []  # the first and the last name a path
    assert all(line.isprintable() for line in shown)
    page = " ".join(result.out.split())
    for words in (
        "exact duplicates 10 (19.2%) 0 (0.0%)",
        "contradictions: sides swapped 2 (3.8%)",
        "pairs also in train - 1 (33.3%)",
        "train, duplicates: train.jsonl:41 with train.jsonl:1;",
        "test, also in train: test.jsonl:2 with train.jsonl:6",
        "prompts do not begin with BOS",
        "note: 1 of 3 test pairs have a prompt that is also in train, 1 with the same answers: held-out accuracy is partly",
        "note: 2 of 52 train pairs repeat an earlier one with chosen and rejected swapped: keep the right pair",
        "note: 10 of 52 train pairs repeat an earlier one and count more than once: keep each pair once",
        'note: the rule "the longer one wins" alone has accuracy 0.96 on train',
        "note: 3 test pairs are too few",
    ):
        assert words in page
    marked = [line for line in shown if re.match(r"  (prompt|chosen|rejected) ", line) and "[" in line]
    assert [line.split()[0] for line in marked if line.split()[1].startswith("[")][-2:] == ["chosen", "rejected"]
    report = json.loads((config.parent / "run" / "audit" / "data_report.json").read_text())
    assert report["train"]["repeats"]["duplicates"]["pairs"] == 10
    assert report["test"]["overlap"]["prompts"] == {
        **{"pairs": 1, "share": 1 / 3, "of": 3},
        "examples": ["test.jsonl:2 with train.jsonl:6"],
    }
    example = report["train"]["example"]
    assert [example[name]["scored"] for name in ("prompt", "chosen", "rejected")] == [False, True, True]
    assert example["chosen"]["ids"][-1] == 0
    assert "\\x1b" in "".join(example["prompt"]["tokens"])


def test_truncation_is_told_by_the_audit_and_by_training(config, tmp_path):
    short = ("--run.dir", tmp_path, "--data.max-prompt-length", 20, "--data.max-length", 25)
    page = " ".join(call("audit", config, *short, "--data.on-bad", "drop").out.split())
    assert "52 of 52 train prompts lost their beginning, cut to 20 tokens; 1 of 3 test prompts" in page
    # Without a reference pass, and with a step that takes little to compile.
    start = ("--dpo.loss", "cpo", "--dpo.trainable", "last_layers:1", "--dpo.steps", 1, "--dpo.batch", 4)
    start += ("--data.max-contradictions", 1, "--data.max-overlap", 1)
    out = call("dpo", config, *short, *start, "--data.max-prompt-length", 18).out
    limits = "data.max_length 25, data.max_prompt_length 18; data.truncation: completions keeps prompts whole"
    assert f"note: train split, 52 kept: 52 prompts, 50 chosen, 2 rejected truncated ({limits})" in out
    assert "note: test split, 3 kept: " in out
    assert "truncated" not in call("dpo", config, "--run.dir", tmp_path / "whole", *start).out


def test_lines_on_rows_that_are_lost():
    report = DataReport(split="train", kept=7, dropped={"over_limit": 2, "too_deep": 1, "identical_after_truncation": 4})
    dropped = "5 rows dropped (identical_after_truncation 4, too_deep 1); --data.max-length 512 is too short for some: raise it"
    assert splits.truncation_note(Config(), report) == f"train split, 7 kept: {dropped}"
    report.truncated = {"chosen": 2}
    whole = Config(data=DataConfig(truncation="completions"))
    assert splits.truncation_note(whole, report) == f"train split, 7 kept: 2 chosen truncated (data.max_length 512); {dropped}"
    report.truncated, report.dropped = {}, {"over_limit": 2}
    assert splits.truncation_note(Config(), report) is None


def test_the_report_page_shows_the_audit(config, tmp_path):
    assert call("audit", config, "--run.dir", tmp_path).code == 0
    out = call("report", tmp_path).out
    assert "note: audit: 1 of 3 test pairs have a prompt that is also in train" in out
    assert "note: audit: 2 of 52 train pairs repeat an earlier one with chosen and rejected swapped" in out
    assert "too few" not in out
    shown = (tmp_path / "report" / "report.md").read_text().replace("\\", "")
    section = shown.partition("## Data audit")[2].partition("\n## ")[0]
    for words in (
        "| exact duplicates | 10 (19.2%) | 0 (0.0%) |",
        "test.jsonl:2 with train.jsonl:6",
        "3 test pairs are too few",
        "train.jsonl:1 as the model reads it",
        "N·o·.·<|endoftext|>",
    ):
        assert words in section


@pytest.mark.parametrize("command", ["audit", "sft", "refs", "dpo"])
@pytest.mark.parametrize(
    ("option", "share"), [("--data.max-duplicates", 0.19), ("--data.max-contradictions", 0.03), ("--data.max-overlap", 0.33)]
)
def test_a_limit_refuses_and_names_its_option(config, tmp_path, command, option, share):
    message = refused(65, command, config, "--run.dir", tmp_path, option, share)
    assert message.startswith(f"dpo-jax: {option} {share}: ")
    assert re.search(r"t\w+\.jsonl:\d+ with train\.jsonl:\d+", message)


def test_what_a_limit_allows_is_not_refused(config, tmp_path):
    limits = {"duplicates": 0.2, "contradictions": 0.04, "overlap": 0.34}
    flags = itertools.chain(*((f"--data.max-{name}", share) for name, share in limits.items()))
    assert call("audit", config, "--run.dir", tmp_path, *flags).code == 0
    assert "data.max_overlap: must be a share" in refused(2, "audit", config, "--data.max-overlap", 1.5)


def test_training_says_in_one_line_that_held_out_numbers_mean_less(config, capsys):
    both = [
        EncodedSet(pairs, DataReport(split=split))
        for pairs, split in (
            (pairs_of("p a b", "p b a", "q a b"), "train"),
            (pairs_of("q a b", "r a b"), "test"),
        )
    ]
    check_repeats(load_config(config), *both)
    assert capsys.readouterr().out == (
        "note: held-out numbers mean less: 1 of 3 train pairs contradict an earlier one, 1 of 2 test pairs have a prompt of "
        "train (1 the same pair); see dpo-jax audit\n"
    )
    assert [len(split.report.notes) for split in both] == [1, 1]
    clean = [
        EncodedSet(pairs_of(text, text), DataReport(split=split)) for text, split in (("p a b", "train"), ("q a b", "test"))
    ]
    check_repeats(load_config(config), *clean)
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match=r"--data.max-duplicates 0.4: 50.0% of the test pairs"):
        check_repeats(splits.with_data(load_config(config), max_duplicates=0.4), both[0], clean[1])


CHAT = [
    [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": text}]
    for i, text in enumerate(("Yes.", "No.") * 2)
]


@pytest.mark.parametrize("template", ["{{ strftime_now('%d %b %Y') }}" + PLAIN, PLAIN])
def test_the_audit_names_a_date_that_the_template_writes(config, tokenizer, tmp_path, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    other.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = [{"prompt": c[:1], "chosen": c[1:], "rejected": [{"role": "assistant", "content": "Maybe."}]} for c in CHAT]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = ("--run.dir", tmp_path / "run", "--tokenizer.path", tmp_path / "tokenizer", "--data.path", tmp_path / "data")
    page = " ".join(call("audit", config, *where).out.split())
    assert "chat template: system message kept; earlier turns kept;" in page
    assert ("note: the template writes a date, '" in page) == ("strftime" in template)


# BOS: what is trained is what is sampled


def test_all_that_reads_prompts_gives_them_the_same_bos(config, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def look(complete, variables, prompts, images, key, *, repeats):
        raise Seen([ids.tolist() for ids in prompts])

    monkeypatch.setattr("dpo_jax.cli.commands.sample._draw", look)
    flags = ("--run.dir", tmp_path, "--sample.policy", GOLDEN / "gpt2" / "init", "--data.max-length", 40)
    for bos, first, truncation in (("always", 0, "keep_end"), ("auto", None, "keep_end"), ("always", 0, "keep_start")):
        options = (*flags, "--data.bos", bos, "--data.max-prompt-length", 30, "--data.truncation", truncation)
        with pytest.raises(Seen) as seen:
            call("sample", config, *options)
        lengths = {"max_length": 40, "max_prompt_length": 30, "truncation": truncation}
        changed = splits.with_data(load_config(config), bos=bos, **lengths)
        tokenizer = load_tokenizer(GOLDEN / "tokenizer")
        encoded = splits.encode_split(changed, splits.load_split(changed, "test", tokenizer), tokenizer)
        trained = [pair.prompt.tolist() for pair in encoded]
        (sampled,) = seen.value.args
        assert sampled == trained == [ids.tolist() for ids in prompts_of(changed, "test_prompts", tokenizer).ids]
        assert {ids[0] if ids[0] == 0 else None for ids in sampled} == {first}
        assert max(map(len, sampled)) == 30  # cut, and begins with BOS all the same
        assert all(0 not in ids[1:] for ids in sampled)
    page = " ".join(call("audit", config, "--run.dir", tmp_path, "--data.bos", "always").out.split())
    assert "prompts begin with BOS, '<|endoftext|>'" in page
    assert "note: the tokenizer does not begin a text with BOS, but prompts do (--data.bos always)" in page


def test_bos_always_needs_a_tokenizer_that_has_it(config, tokenizer, tmp_path):
    type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "none")
    message = refused(2, "audit", config, "--run.dir", tmp_path, "--tokenizer.path", tmp_path / "none", "--data.bos", "always")
    assert "data.bos: always, but the tokenizer has no beginning-of-text token" in message
