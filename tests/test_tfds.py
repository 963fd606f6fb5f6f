"""Preferences survive tfds unchanged, without TensorFlow, and damage is noticed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from dpo_jax.cli.config import Config, ConfigError, DataConfig
from dpo_jax.cli.prompts import references
from dpo_jax.cli.splits import load_split
from dpo_jax.data.pairs import Cause, DataError, Preference
from dpo_jax.data.snippets import Snippet
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tfds import Article, PreferenceBuilder, read_articles, read_texts, read_tfds, write_tfds
from dpo_jax.untrusted import Unreadable

TRAIN = [
    Preference("The sky is", " blue.", " grün 🙂.", "a:1"),
    Preference("The sky is", " blue.", " grün 🙂.", "a:2"),  # equal rows are two rows
    Preference("<s>Q", "A\u2028\0", "B\r\n", "b:1", sft_target="C", chat=True),
    *[Preference(f"Row {i}", " yes", " no", f"c:{i}") for i in range(500)],
]
TEST = [Preference("p", " c", " r", "t:1"), Preference("q", " c", " r", "t:2", unended=("chosen", "rejected"))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_tfds({"train": TRAIN, "test": TEST}, tmp_path_factory.mktemp("tfds"), name="small")


@pytest.fixture
def folder(written, tmp_path):
    """A copy of its own for each test: to write and read back takes half a second."""
    return Path(shutil.copytree(written, tmp_path / "small" / written.name))


def test_round_trip_in_order(folder, tmp_path):
    assert folder == tmp_path / "small" / "1.0.0"
    for source in (folder, tmp_path):
        loaded = load_preferences(source, "train")
        assert list(loaded) == TRAIN
        assert (loaded.report.format, loaded.report.rows, loaded.report.kept) == ("tfds", len(TRAIN), len(TRAIN))
        assert loaded.report.files[0]["path"].startswith("small-train.array_record")
    assert list(load_preferences(folder, "test", format="tfds")) == TEST
    assert all("array_record" in path.name or path.suffix == ".json" for path in folder.iterdir())


def test_any_reader_of_tfds_finds_it_and_tensorflow_is_never_imported(folder, tmp_path):
    program = f"""
import sys
from dpo_jax.data.pairs import Preference
from dpo_jax.data.tfds import write_tfds, read_tfds
import tensorflow_datasets as tfds
pairs = [Preference("p", "c", "r", str(i)) for i in range(3)]
assert list(read_tfds(write_tfds({{"train": pairs}}, {str(tmp_path / "other")!r}), "train")) == pairs
source = tfds.data_source("small", split="train", data_dir={str(tmp_path)!r})
assert len(source) == {len(TRAIN)} and source[2]["sft_target"] == b"C", source[2]
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    write_tfds({"test": TEST}, tmp_path, name="small")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path):
    """array_record, in C++, could not open its files."""
    for work in (lambda path: write_tfds({"train": TRAIN}, path), lambda path: read_tfds(path, "train")):
        with pytest.raises(Unreadable, match=r"caf.xe9: the name is not UTF-8, .*rename the folder"):
            work(tmp_path / "caf\udce9")


def test_existing_data_are_neither_reused_nor_mixed(folder, tmp_path):
    with pytest.raises(FileExistsError):
        write_tfds({"train": TEST}, tmp_path, name="small")
    write_tfds({"train": TEST}, tmp_path, name="second")
    with pytest.raises(DataError, match="exactly one tfds data set"):
        read_tfds(tmp_path, "train")
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        read_tfds(folder, "valid")


@pytest.mark.parametrize(
    ("change", "cause"),
    [({"chosen": " "}, Cause.EMPTY), ({"rejected": "\ud800"}, Cause.INVALID_UTF8)],
)
def test_only_valid_preferences_are_written(change, cause, tmp_path):
    bad = dataclasses.replace(TEST[0], **change)
    with pytest.raises(DataError) as refusal:
        write_tfds({"train": [*TRAIN, bad]}, tmp_path)
    assert refusal.value.causes == (cause,)
    assert "t:1" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_split_is_not_written(tmp_path):
    with pytest.raises(DataError, match="no preferences"):
        write_tfds({"train": TRAIN, "test": []}, tmp_path)


def damage(folder, how):
    shard = next(folder.glob("*train.array_record*"))
    content = bytearray(shard.read_bytes())
    match how:
        case "flipped bit":
            content[100] ^= 1
        case "cut off":
            del content[len(content) // 2 :]
        case "zeroed block":
            content[4096:8192] = bytes(4096)
        case "another file's records":
            content = next(folder.glob("*test.array_record*")).read_bytes()
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped bit", "cut off", "zeroed block", "another file's records", "missing"])
@pytest.mark.parametrize("on_bad", ["refuse", "drop"])
def test_damage_is_noticed(how, on_bad, folder):
    damage(folder, how)
    with pytest.raises(DataError) as refusal:
        read_tfds(folder, "train", on_bad=on_bad)
    assert refusal.value.causes == (Cause.BAD_ARRAY_RECORD,)


def test_records_that_are_not_those_written_are_noticed(folder):
    """The same number of sound records, from somewhere else: only the digest can tell."""
    metadata = folder / "metadata.json"
    digests = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**digests, "test": digests["train"]}))
    assert len(read_tfds(folder, "train")) == len(TRAIN)
    with pytest.raises(DataError, match="not those that were written"):
        read_tfds(folder, "test")


def test_the_digest_is_checked_also_where_rows_are_dropped(tmp_path):
    """A folder of an older version, say, which did not refuse a blank completion."""
    rows = [TEST[0], dataclasses.replace(TEST[0], chosen=" ", uid="t:2"), *TRAIN[:2]]
    PreferenceBuilder(preferences={"train": rows}, name="old", data_dir=tmp_path).download_and_prepare()
    loaded = read_tfds(tmp_path, "train", on_bad="drop")
    assert list(loaded) == [rows[0], *rows[2:]]
    assert (loaded.report.read, loaded.report.kept, loaded.report.dropped) == (4, 3, {"empty": 1})
    (metadata,) = tmp_path.glob("*/*/metadata.json")
    metadata.write_text(json.dumps({"train": "0" * 64}))
    with pytest.raises(DataError, match="not those that were written"):
        read_tfds(tmp_path, "train", on_bad="drop")
    metadata.unlink()
    with pytest.raises(DataError, match="not those that were written"):
        read_tfds(tmp_path, "train", on_bad="drop")


def test_no_module_that_features_name_is_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    good = (folder / "features.json").read_text()
    own = "tensorflow_datasets.core.features.text_feature.Text"
    changed = [
        good.replace(own, "evil.Text", 1),
        good.replace("pythonClassName", "python_class_name").replace(own, "evil.Text"),
    ]
    changed += [json.dumps({"type": "evil.Text", "content": "{}"})]
    for content in changed:
        (folder / "features.json").write_text(content)
        with pytest.raises(DataError, match="features.json: bad_layout: 'evil.Text' is not a feature of TFDS itself"):
            read_tfds(folder, "train")


class LabeledTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set with the features of TFDS's imdb_reviews."""

    VERSION = tfds.core.Version("1.0.0")
    TEXTS = {"train": [("A fine film, très bien.", 1), ("Dull.", 0)], "test": [("So so.", 0)], "blank": [(" ", 1)]}

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(texts) for split, texts in self.TEXTS.items()}

    def _generate_examples(self, texts):
        yield from enumerate({"text": text, "label": label} for text, label in texts)


def test_labeled_texts_as_in_imdb_reviews(tmp_path, folder):
    LabeledTexts(data_dir=tmp_path / "imdb", file_format="array_record").download_and_prepare()
    assert read_texts(tmp_path / "imdb", "train") == [
        Snippet("A fine film, très bien.", 1, "labeled_texts/train:1"),
        Snippet("Dull.", 0, "labeled_texts/train:2"),
    ]
    with pytest.raises(DataError, match="blank:1: empty: the text is empty or blank"):
        read_texts(tmp_path / "imdb", "blank")
    with pytest.raises(DataError, match="no split 'dev'; it has"):
        read_texts(tmp_path / "imdb", "dev")
    with pytest.raises(DataError, match="no feature label, text"):
        read_texts(folder, "train")


class Articles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set with the features of TFDS's cnn_dailymail."""

    VERSION = tfds.core.Version("1.0.0")
    ROWS = {"test": [("News. \n", "It happened."), ("Old news.", "So what?\nThis.")], "blank": [("News.", " ")]}

    def _info(self):
        features = {name: tfds.features.Text() for name in ("article", "highlights", "id", "publisher")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self.ROWS.items()}

    def _generate_examples(self, rows):
        yield from enumerate({"article": a, "highlights": h, "id": "1", "publisher": "CNN"} for a, h in rows)


def test_articles_as_in_cnn_dailymail(tmp_path):
    Articles(data_dir=tmp_path / "cnn", file_format="array_record").download_and_prepare()
    assert read_articles(tmp_path / "cnn", "test") == [
        Article("News.", "It happened.", "articles/test:1"),
        Article("Old news.", "So what?\nThis.", "articles/test:2"),
    ]
    with pytest.raises(DataError, match="blank:1: empty: the highlights is empty or blank"):
        read_articles(tmp_path / "cnn", "blank")
    with pytest.raises(DataError, match="no feature label, text"):
        read_texts(tmp_path / "cnn", "test")
    data = DataConfig(source="cnn_dailymail", path=str(tmp_path / "cnn"), max_test=1)
    (reference,) = references(Config(data=data), None)
    assert reference == ("News.\nTL;DR:", " It happened.", "articles/test:1", False, ())
    with pytest.raises(ConfigError, match="cnn_dailymail holds articles and summaries, not preferences"):
        load_split(Config(data=data), "test")
