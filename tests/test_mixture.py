"""Several sources with weights, and held-out pairs cut by a hash of the prompt: exact, the same each time, and in the books."""

import collections
import dataclasses
import functools
import json
import random
import types

import numpy as np
import pytest
from conftest import GOLDEN
from tiny_run import call

from dpo_jax.cli import identity, splits
from dpo_jax.cli.config import Config, ConfigError, DataConfig, MixConfig, RunConfig, dump_config, load_config
from dpo_jax.cli.data_sources import load_files, names_of
from dpo_jax.cli.main import main
from dpo_jax.data.chat import chat_preference
from dpo_jax.data.hash_split import is_held_out, take_side
from dpo_jax.data.mixture import by_source, copy_number, mix, source_names
from dpo_jax.data.pairs import DataError, DataReport, Preference, PreferenceSet
from dpo_jax.data.prepare import encode_all, encode_targets
from dpo_jax.data.repeats import find_repeats
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.evals.preference import summary_by_source
from dpo_jax.losses import dpo_loss, kto_loss
from dpo_jax.reference import ReferenceCache
from dpo_jax.report.audit import audited
from dpo_jax.report.run_record import read_run
from dpo_jax.training import fingerprint

LIMITS = {"max_length": 64, "max_prompt_length": 32}


def some(count, name="q", *, split="train", **report):
    pairs = [Preference(f"{name} {i}", " yes", " no", uid=f"{split}.jsonl:{i}") for i in range(1, count + 1)]
    counts = {"rows": count, "read": count, "kept": count} | report
    return PreferenceSet(pairs, DataReport(source=name, split=split, format="trl", **counts))


def hh_lines(count, word):
    for i in range(count):
        prompt = f"\n\nHuman: {word} {i}?\n\nAssistant:"
        yield json.dumps({"chosen": prompt + " Yes.", "rejected": prompt + " No, not that."})


def trl_lines(count, word):
    for i in range(count):
        yield json.dumps({"prompt": f"{word} {i}:", "chosen": " good", "rejected": " bad"})


@pytest.fixture
def places(tmp_path):
    """Two sources of different formats; the second has a train split only."""
    for path, lines in {
        "hh/train.jsonl": hh_lines(40, "Say"),
        "hh/test.jsonl": hh_lines(6, "Ask"),
        "own/train.jsonl": trl_lines(60, "Own"),
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("\n".join(lines) + "\n")
    return tmp_path


def config_of(places, *, share=0.2, weights=(2.0, 0.5), **data):
    parts = tuple(MixConfig(str(places / name), weight) for name, weight in zip(("hh", "own"), weights, strict=True))
    return Config(run=RunConfig(dir=str(places / "run")), data=DataConfig(mix=parts, test_share=share, **data))


# Weights


@pytest.mark.parametrize(("weight", "least", "most"), [(1, 1, 1), (2, 2, 2), (0.5, 0, 1), (2.5, 2, 3)])
def test_a_weight_is_how_often_a_row_is_seen(weight, least, most):
    mixed = mix({"a": some(1000), "b": some(10, "other")}, {"a": weight, "b": 1})
    seen = collections.Counter(p.prompt for p in mixed)
    times = [seen[f"q {i}"] for i in range(1, 1001)]
    assert {least, most} == set(times)
    assert abs(sum(times) - 1000 * weight) < 60
    assert all(seen[f"other {i}"] == 1 for i in range(1, 11))


def test_which_half_is_taken_depends_on_nothing_else():
    half = {p.uid for p in mix({"a": some(100)}, {"a": 0.5})}
    assert half == {p.uid for p in mix({"b": some(50, "z"), "a": some(100)}, {"a": 0.5, "b": 3}) if p.uid.startswith("a")}
    assert half < {p.uid for p in mix({"a": some(100)}, {"a": 0.75})}
    assert half == {p.uid.replace("other", "a", 1) for p in mix({"other": some(100)}, {"other": 0.5})}
    assert half == {p.uid for p in mix({"a": some(200)}, {"a": 0.5}) if int(p.uid.rpartition(":")[2]) <= 100}


def test_the_books_of_a_mixture_are_closed_for_each_source_and_for_all():
    bad = some(10, "b", read=13)
    bad.report.dropped, bad.report.examples = {"empty": 3}, {"empty": ["train.jsonl:11: empty"]}
    mixed = mix({"a": some(100), "b": bad}, {"a": 0.3, "b": 2})
    a, b = mixed.report.sources["a"], mixed.report.sources["b"]
    assert (a.read, a.kept + a.dropped["weight"]) == (100, 100)
    assert (b.read, b.kept, b.dropped) == (23, 20, {"empty": 3})
    mixed.report.check()
    assert mixed.report.examples["empty"] == ["b: train.jsonl:11: empty"]
    taken = mixed.take(15)
    assert taken.report.kept == 15 == sum(source.kept for source in taken.report.sources.values())
    assert taken.report.to_json()["sources"]["b"]["kept"] == taken.report.sources["b"].kept
    taken.report.sources["a"].dropped["weight"] += 1
    with pytest.raises(AssertionError, match="the pairs kept by the sources do not add up"):
        taken.report.check()


def test_the_first_pairs_are_a_fair_sample_of_all_sources():
    first = mix({"a": some(500), "b": some(500)}, {"a": 1, "b": 1}).take(200)
    assert 70 < first.report.sources["a"].kept < 130


def test_uids_are_unique_and_subsets_are_the_sources():
    rows = some(3)
    rows = PreferenceSet([dataclasses.replace(rows[0], subset="own"), *rows[1:]], rows.report)
    mixed = mix({"a": rows, "b": some(3)}, {"a": 2, "b": 1})
    assert len({p.uid for p in mixed}) == 9
    assert {p.uid: p.subset for p in mixed if p.uid.endswith(":1")} == {"a: train.jsonl:1": "own", "b: train.jsonl:1": "b"}
    assert sorted(copy_number(p.uid) for p in mixed) == [1] * 6 + [2] * 3
    with pytest.raises(ValueError, match="a weight above 0 is needed"):
        mix({"a": rows}, {"a": 0.0})


def test_names_are_short_where_they_can_be():
    assert source_names(["x/hh", "org/pairs", "own.jsonl"]) == ["hh", "pairs", "own.jsonl"]
    assert source_names(["x/hh", "y/hh", "z"]) == ["x/hh", "y/hh", "z"]
    with pytest.raises(ValueError, match="is listed twice"):
        source_names(["a", "a"])


def test_a_copy_is_learned_twice_and_its_reference_computed_once(tokenizer, tmp_path):
    mixed = mix({"a": some(5), "b": some(2, "other")}, {"a": 3, "b": 1})
    encoded = encode_all(mixed, tokenizer, **LIMITS)
    assert len(encoded) == 17
    assert sum(encoded.report.sources[name].kept for name in "ab") == 17
    assert len(ReferenceCache(tmp_path, {"weights": "w"}).missing(encoded)) == 7
    assert len(encode_targets(mixed, tokenizer, **LIMITS)[0]) == 17  # of SFT, which learns equal texts only once
    found = find_repeats(encoded)
    assert found.duplicates.pairs == 0  # copies are wanted
    assert len(encode_targets(some(5), tokenizer, **LIMITS)[0]) == 5


# Cutting by hash


def test_each_prompt_decides_for_itself():
    pairs = some(2000)
    twice = PreferenceSet(
        [p for n, p in enumerate(pairs)] + [dataclasses.replace(p, uid=f"{p.uid}b", chosen=" sure") for p in pairs],
        dataclasses.replace(pairs.report, read=4000, kept=4000),
    )
    sides = {side: take_side(twice, side, share=0.1, split=side) for side in ("train", "test")}
    prompts = {side: {p.prompt for p in found} for side, found in sides.items()}
    assert not prompts["train"] & prompts["test"]
    assert len(prompts["train"] | prompts["test"]) == 2000
    assert 150 < len(prompts["test"]) < 250
    assert {p.prompt for p in pairs if is_held_out(p, 0.05)} < prompts["test"]
    shuffled = random.Random(0).sample(list(pairs), 500)
    assert [p for p in shuffled if is_held_out(p, 0.1)] == [p for p in shuffled if p.prompt in prompts["test"]]
    for side, other in (("train", "test"), ("test", "train")):
        report = sides[side].report
        assert report.dropped == {"other_split": len(sides[other])}
        assert (report.split, report.read, report.bad_share) == (side, 4000, 0)
        assert report.notes == [
            "'train' is the only split: 10.0% of its prompts are held out, by a hash of each (data.test_share)"
        ]


def test_neither_template_nor_date_moves_a_conversation_to_the_other_side():
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")

    def side(i, template):
        tokenizer.chat_template = "{% for m in messages %}[" + template + "{{ m.content }}]{% endfor %}"
        turns = [
            [{"role": role, "content": f"{text} {i}"}] for role, text in (("user", "q"), *[("assistant", t) for t in "ab"])
        ]
        return is_held_out(chat_preference(*turns, uid=str(i), tokenizer=tokenizer), 0.5)

    today, tomorrow = ([side(i, template) for i in range(40)] for template in ("Monday ", "Tuesday "))
    assert today == tomorrow
    assert 5 < sum(today) < 35


# The program


def test_sources_have_their_own_formats_and_only_those_without_held_out_pairs_are_cut(places):
    config = config_of(places)
    train, test = (splits.load_split(config, split) for split in ("train", "test"))
    assert names_of(config) == ["hh", "own"]
    assert {name: (one.format, one.weight) for name, one in train.report.sources.items()} == {
        "hh": ("hh", 2),
        "own": ("trl", 0.5),
    }
    kept = train.report.sources
    assert kept["hh"].kept == 80
    assert kept["own"].read == 60 == kept["own"].kept + kept["own"].dropped["other_split"] + kept["own"].dropped["weight"]
    held = test.report.sources
    assert (held["hh"].kept, held["hh"].weight, held["own"].weight) == (6, 1, 1)  # held out: each row once
    assert held["own"].kept == kept["own"].dropped["other_split"] > 0
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert [p.uid for p in load_files(config, "train")] == [p.uid for p in train]
    (places / "hh" / "test.jsonl").rename(places / "hh" / "val.jsonl")
    renamed = (dataclasses.replace(config.data.mix[0], test_split="val"), config.data.mix[1])
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, mix=renamed))
    assert splits.load_split(other, "test").report.sources["hh"].kept == 6
    few = dataclasses.replace(other, data=dataclasses.replace(config.data, max_train=7, max_test=3))
    assert [len(splits.load_split(few, split)) for split in ("train", "test")] == [7, 3]


def test_a_single_source_is_cut_too_or_refused_if_it_has_both_splits(places):
    alone = Config(data=DataConfig(path=str(places / "own" / "train.jsonl"), test_share=0.2))
    train, test = (splits.load_split(alone, split) for split in ("train", "test"))
    assert len(train) + len(test) == 60
    assert test.report.split == "test"
    both = DataConfig(path=str(places / "hh"), test_share=0.2)
    with pytest.raises(ConfigError, match="data.test_share: .*hh has a split 'test', so nothing is held out"):
        splits.load_split(Config(data=both), "train")
    asked = Config(data=dataclasses.replace(both, test_split="held_out"))
    assert sum(len(splits.load_split(asked, split)) for split in ("train", "test")) == 40
    without = Config(data=DataConfig(path=str(places / "own")))
    with pytest.raises(DataError, match="hold out a part of the train split with --data.test-share 0.05"):
        splits.load_split(without, "test")


def test_one_file_is_not_trained_and_tested_on_whatever_its_name_says(places, capsys):
    path = places / "model_test_v2.jsonl"
    (places / "own" / "train.jsonl").rename(path)
    alone = Config(data=DataConfig(path=str(path)))
    with pytest.raises(ConfigError, match=r"data.path: .*model_test_v2.jsonl is one file, .* --data.test-share 0.05, or give"):
        splits.load_split(alone, "train")
    assert len(splits.load_split(alone, "test")) == 60  # a command that does not train may read it
    cut = Config(data=dataclasses.replace(alone.data, test_share=0.2))
    train, test = (splits.load_split(cut, split) for split in ("train", "test"))
    assert len(train) + len(test) == 60
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    (places / "c.yaml").write_text(f"run: {{dir: {places}/run}}\ndata: {{path: {path}}}\ntokenizer: {{vocab_size: 300}}\n")
    assert main(["audit", str(places / "c.yaml"), "--check"]) == 2
    assert "model_test_v2.jsonl is one file" in capsys.readouterr().err
    assert main(["audit", str(places / "c.yaml"), "--check", "--data.test-share", "0.2"]) == 0


def test_a_bad_row_names_its_source(places):
    with (places / "own" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "", "chosen": " a", "rejected": " b"}\n')
    with pytest.raises(DataError, match="data.mix, .*own: 1 of 61 rows cannot be used"):
        splits.load_split(config_of(places), "train")
    report = splits.load_split(config_of(places, on_bad="drop"), "train").report
    assert report.dropped["no_prompt"] == report.sources["own"].dropped["no_prompt"] == 1
    assert report.bad_share == 1 / report.read


@pytest.mark.parametrize(("split", "options"), [("train", {"max_train": 20}), ("test", {"test_share": 0.05})])
def test_rows_of_no_split_do_not_hide_that_most_pairs_are_bad(split, options, tokenizer, tmp_path):
    """Ten of the split's pairs have EOS in the answer, 2.5% of all rows in the file: less than data.max_dropped_share."""
    pairs = [Preference(f"Q {i}", f" a{i}", f" b{i}", uid=str(i)) for i in range(400)]
    chosen = [is_held_out(pair, 0.05) for pair in pairs] if split == "test" else [True] * 400
    bad = [i for i in range(400) if chosen[i]][:10]
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    for i in bad:
        rows[i]["chosen"] += tokenizer.eos_token
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(data=DataConfig(path=str(tmp_path), on_bad="drop", **options))
    loaded = splits.load_split(config, split, tokenizer)
    assert len(bad) == 10 < len(loaded) < 30
    with pytest.raises(DataError, match=f"{10 / len(loaded):.1%} of the rows were dropped as bad, more than .* 5.0% allows"):
        splits.encode_split(config, loaded, tokenizer)
    tolerant = splits.with_data(config, max_dropped_share=10 / len(loaded))
    assert len(splits.encode_split(tolerant, loaded, tokenizer)) == len(loaded) - 10


def test_another_weight_is_another_run_and_is_named(places, tokenizer):
    was, now = (config_of(places, weights=weights) for weights in ((2.0, 0.5), (1.0, 0.5)))
    records = []
    for config in (was, now):
        loaded = splits.load_split(config, "train")
        records.append(identity.data_record(config, tokenizer, [loaded.report], held_out="x"))
    lines = fingerprint.data_changes(*records)
    assert f"  data.mix, weight of {places}/hh: was 2.0, is 1.0" in lines


YAML = """\
data:
  mix:
  - {{path: {0}/hh, weight: 2}}
  - {{path: {0}/own, format: trl}}
  test_share: 0.2
  max_length: 64
  max_prompt_length: 32
tokenizer: {{path: {1}}}
model: {{family: gpt_neox, width: 16, layers: 1, heads: 2}}
run: {{dir: {0}/run}}
"""


def test_a_mixture_is_audited_by_source(places, capsys):
    file = places / "mix.yaml"
    file.write_text(YAML.format(places, GOLDEN / "tokenizer"))
    config = load_config(file)
    assert config.data.mix == (MixConfig(f"{places}/hh", 2.0), MixConfig(f"{places}/own", format="trl"))
    (places / "again.yaml").write_text(dump_config(config))
    assert load_config(places / "again.yaml") == config
    printed = call("audit", str(file))
    report = json.loads((places / "run" / "audit" / "data_report.json").read_text())["train"]
    shares = report["sources"]
    assert sum(one["pairs_share"] for one in shares.values()) == pytest.approx(1)
    assert sum(one["tokens"] for one in shares.values()) > 1000
    assert shares["hh"]["pairs"] == shares["hh"]["kept"] == 80
    share = f"{shares['hh']['pairs_share']:.1%} of the pairs, {shares['hh']['tokens_share']:.1%} of the tokens"
    assert f"train, hh: weight 2, as hh: 80 read, 80 kept: {share}" in " ".join(printed.out.split())
    section = audited([read_run(places / "run", name="run")])
    (table,) = [block for block in section.blocks if getattr(block, "caption", "").startswith("Sources")]
    assert table.rows[0][:5] == ["train, hh", "2", "hh", "80", "80"]
    assert main(["audit", str(file), "--check"]) == 0
    assert "own: train (trl, 1 file, 60 rows), of which 20.0% of the prompts are held out" in capsys.readouterr().out


@pytest.mark.parametrize("desirable", [None, [1, 0, 1, 1, 0]])
def test_an_evaluation_also_looks_at_each_source(desirable):
    places = {"hh": [0, 3, 4], "own": [1, 2]}
    uids = ["hh: test.jsonl:1", "own: a/test.jsonl:1", "own: a/test.jsonl:2", "hh: test.jsonl:2", "hh: test.jsonl:2 (2)"]
    assert by_source(uids) == places
    assert by_source(["x/test.jsonl:1", "y/test.jsonl:1"]) == {"x": [0], "y": [1]}
    assert by_source(["test.jsonl:1", "test.jsonl:2"]) == by_source(["x/test.jsonl:1", "x/test.jsonl:2"]) == {}
    labels = [None] * 5 if desirable is None else [bool(label) for label in desirable]
    prompts = [np.array([number], np.int32) for number in range(5)]
    held_out = [
        types.SimpleNamespace(uid=u, scored_tokens=[1, 1], desirable=d, prompt=p, images=None)
        for u, d, p in zip(uids, labels, prompts, strict=True)
    ]
    logps = np.random.default_rng(0).normal(size=(2, 5, 2)).astype(np.float32)
    loss = functools.partial(dpo_loss if desirable is None else kto_loss, beta=0.5)
    found = summary_by_source(held_out, *logps, loss=loss)
    names = ("loss", "rewards/accuracies", "rewards/margins")
    for source, where in places.items():
        of_source = summary_by_source([held_out[i] for i in where], *logps[:, where], loss=loss)
        assert {name: found[f"{source}/{name}"] for name in names} == {name: of_source[name] for name in names}
        assert not any("/" in name.removeprefix("rewards/").removeprefix("displacement/") for name in of_source)
    if desirable is None:
        for name in names:
            assert found[name] == pytest.approx((3 * found[f"hh/{name}"] + 2 * found[f"own/{name}"]) / 5, abs=1e-6)


WRONG = {
    "{path: A, mix: [{path: B}]}": "data.path: cannot be combined with data.mix",
    "{mix: [{weight: 2}]}": "data.mix: entry 1 has no path",
    "{mix: [{path: A, weight: 0}]}": r"data.mix: entry 1 \(A\): weight must be above 0",
    "{mix: [{path: A}, {path: A}]}": "data.mix: A is listed twice; list it once, with a higher weight",
    "{mix: A}": "data.mix must be a list of `- path, weight, format, .*` entries, not the text 'A'",
    "{mix: [{path: A, wieght: 2}]}": r'data.mix\[1\].wieght: unknown key; did you mean "weight"',
    "{mix: [A]}": r"entry data.mix\[1\] must be `key: value` lines, not the text 'A'",
    "{path: A, test_share: 1.5}": "data.test_share: must be a share between 0 and 1",
    "{source: tfds, path: A, test_share: 0.1}": "data.test_share: is read only with source files",
}


@pytest.mark.parametrize("data", WRONG)
def test_a_wrong_mixture_is_told_with_its_line(data, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"run: {{dir: r}}\ndata: {data}\n")
    with pytest.raises(ConfigError, match=f"c.yaml:2: {WRONG[data]}"):
        load_config(file)


def test_a_list_is_no_flag(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: {path: x}\n")
    assert main(["audit", str(tmp_path / "c.yaml"), "--data.mix", "a"]) == 2
    assert "--data.mix: a list, which cannot be given as a flag; write it in" in capsys.readouterr().err
